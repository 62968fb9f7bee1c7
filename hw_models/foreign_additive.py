"""Time as a sum over operations, fitted from whole networks: `fit_additive(operations, ms)`.

What one operation costs is looked for at three levels, each shrunk towards the one before: one price per million multiply-adds,
activations and parameters for all operations; such prices per kind; a price of its own for each distinct operation. All prices are
non-negative, errors count relative to the network's time, and one network that was disturbed does not spoil the fit.
Operations that a compiler would delete are counted, left out, or priced apart. Cross-validation chooses level, shrinkage and view;
an operation that was never seen falls back to the price of its kind, or of all.

Source: sections 2.1 and 5.3 of the facts this package is built from (additive, lowered, shrunk); weights of Huber 1964 and of
Welsch (Holland and Welsch 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.foreign_features import Operations
from hw_models.foreign_least_squares import System, usual_size, without_each

__all__ = ["Additive", "fit_additive", "typical_error"]

Floats = NDArray[np.float64]
VIEWS = ("raw", "live", "both")
SHRINKAGE = (1e-4, 1e-3, 1e-2, 1e-1)  # variance of the noise over that of prices, relative
MOST_COLUMNS = 600
HUBER = 2.0
WELSCH = (0.3, 0.2, 0.14, 0.1, 0.07, 0.07)  # widths, in log time, of one round each
TOLERATED = 0.1  # errors in log time beyond this count for less and less when models are compared
SIMPLER = 0.02  # a richer model must be better by this share


@dataclass(frozen=True)
class Additive:
    """Prices of operations.

    Attributes:
        view: "raw" counts all operations, "live" only those that are live, "both" prices the others apart.
        level: 1, 2 or 3, as in the module's text.
        constant_ms: of every network.
        common: float[4], ms per unit of `PHYSICS`.
        kinds: kind (with "dead:" before it where priced apart) -> the same for one kind.
        keys: distinct operation -> ms of one execution.
        error: `typical_error` on networks it was not fitted to.
    """

    view: str
    level: int
    constant_ms: float
    common: Floats
    kinds: dict[str, Floats]
    keys: dict[str, float]
    error: float

    def operation_ms(self, operations: Operations) -> Floats:
        """ms of one execution of each row; 0 for what the view leaves out."""
        price = operations.physics @ self.common
        if self.level >= 2:
            price = np.where(
                _known(_kinds(operations, self.view), self.kinds),
                np.einsum("ij,ij->i", operations.physics, _looked_up(_kinds(operations, self.view), self.kinds, 4)),
                price,
            )
        if self.level == 3:
            names = _keys(operations, self.view)
            price = np.where(_known(names, self.keys), _looked_up(names, self.keys, 1)[:, 0], price)
        return np.where(operations.live, price, 0.0) if self.view == "live" else price

    def predict(self, operations: Operations) -> Floats:
        """ms of each network."""
        return self.constant_ms + operations.per_network(self.operation_ms(operations))

    def seen(self, operations: Operations) -> NDArray[np.bool_]:
        """Whether all operations of a network have a price of their own, or of their kind."""
        strange = (
            ~_known(_kinds(operations, self.view), self.kinds) if self.kinds else np.zeros(len(operations.row), bool)
        )
        if self.view == "live":
            strange &= operations.live
        return np.bincount(operations.row[strange], minlength=len(operations.networks)) == 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        kinds = {name: price.tolist() for name, price in self.kinds.items()}
        return {**self.__dict__, "common": self.common.tolist(), "kinds": kinds}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Additive:
        """The inverse of `to_dict`."""
        kinds = {name: np.array(price) for name, price in data["kinds"].items()}
        return cls(**{**data, "common": np.array(data["common"]), "kinds": kinds})


@dataclass(frozen=True)
class _Rows:
    """Networks as equations: what all fits share."""

    ms: Floats
    scale: Floats  # of the error of each network, ms
    folds: NDArray[np.int64]

    def error(self, held: Floats) -> float:
        return typical_error(np.log(held / self.ms))


def typical_error(log_error: Floats) -> float:
    """Mean size of errors in log time, large ones damped: it is about how many are small, not how bad the worst is."""
    return float(np.mean(TOLERATED * np.log1p(np.abs(log_error) / TOLERATED)))


def fit_additive(
    operations: Operations, ms: Floats, folds: NDArray[np.int64], views: Sequence[str] | None = None
) -> tuple[Additive, Floats]:
    """The best of all views, levels and shrinkages.

    Args:
        operations: of n networks.
        ms: float[n].
        folds: int[n], networks with the same number are left out together; at least two different ones.
        views: of `VIEWS`; default: all if any operation is not live, else "raw".

    Returns:
        The model, and what it predicts for each network when that one's fold is left out, float[n].
    """
    if views is None:
        views = ("raw",) if operations.live.all() else VIEWS
    rows = _Rows(ms, _scales(operations, ms), folds)
    best: _Candidate | None = None
    for view in views:
        found = _candidates(operations, rows, view)
        found.append(_robust(min(found, key=lambda candidate: candidate.model.error), rows))
        for candidate in found:
            demand = SIMPLER + (1 / len(ms) if view == "both" else 0.0)
            if best is None or candidate.model.error < best.model.error * (1 - demand):
                best = candidate
    assert best is not None
    return best.model, best.held


def _scales(operations: Operations, ms: Floats) -> Floats:
    """Size of an error that is as bad for each network: its own time, smoothed, more if disturbed or by a coarse timer."""
    design = np.column_stack([np.ones(len(ms)), operations.per_network(operations.physics)])
    guess = ms
    weight = np.ones(len(ms))
    for _ in range(3):
        size = np.sqrt(np.maximum(ms * guess, (0.05 * np.median(ms)) ** 2)) / weight
        spread = usual_size(design, ms)
        price = System.of(design, ms, size).solve(np.zeros(5), spread, 1e-6)
        guess = np.maximum(design @ price, 0.2 * ms)
        weight = np.sqrt(_huber(np.log(ms / guess)))
    step = _timer_step(ms)
    size = np.sqrt(np.maximum(ms * guess, (0.05 * np.median(ms)) ** 2)) / weight
    return np.sqrt(size**2 + (step / np.sqrt(12) / 0.05) ** 2)


def _huber(error: Floats) -> Floats:
    sigma = max(1.4826 * float(np.median(np.abs(error))), 1e-3)
    return np.minimum(1.0, HUBER * sigma / np.maximum(np.abs(error), 1e-12))


def _timer_step(ms: Floats) -> float:
    """1 if these are whole milliseconds of something short enough for that to matter, else 0."""
    return 1.0 if len(ms) > 5 and np.median(ms) < 200 and np.allclose(ms, np.round(ms), atol=1e-9) else 0.0


@dataclass
class _Candidate:
    """A fitted model with what it was fitted from; the last of `prices` and `priors` are from all networks, the others without
    one fold each."""

    model: Additive
    held: Floats
    design: Floats
    prices: list[Floats]
    priors: list[Floats]
    strength: float
    name: Callable[[Floats], dict[str, Any]]  # prices -> fields of the model


def _candidates(operations: Operations, rows: _Rows, view: str) -> list[_Candidate]:
    """One model per level, each with its best shrinkage."""
    use = operations.live if view == "live" else np.ones(len(operations.row), bool)
    ones = np.ones((len(rows.ms), 1))
    physics = operations.physics[use]

    def model(level: int, **fields: Any) -> Additive:
        filled: dict[str, Any] = {"kinds": {}, "keys": {}, "error": np.inf} | fields
        return Additive(view, level, **filled)

    def common(price: Floats) -> dict[str, Any]:
        return {"constant_ms": float(price[0]), "common": price[1:]}

    first = np.hstack([ones, operations.per_network(np.where(use[:, None], operations.physics, 0.0))])
    zero = [np.zeros(5)] * (_folds(rows) + 1)
    found = [_fitted(first, rows, zero, (1e-6,), partial(model, 1), common)]

    kinds, kind_code = np.unique(_kinds(operations, view)[use].astype(str), return_inverse=True)
    base = found[0].prices
    if 4 * len(kinds) <= MOST_COLUMNS:
        second = np.hstack([ones, _sums(operations, use, kind_code, len(kinds), physics)])
        priors = [np.concatenate([price[:1], np.tile(price[1:], len(kinds))]) for price in base]

        def per_kind(price: Floats) -> dict[str, Any]:
            table = {str(kind): price[1 + 4 * i : 5 + 4 * i] for i, kind in enumerate(kinds)}
            return {"constant_ms": float(price[0]), "common": base[-1][1:], "kinds": table}

        found.append(_fitted(second, rows, priors, SHRINKAGE, partial(model, 2), per_kind))
    better = min(found, key=lambda candidate: candidate.model.error)

    keys, first_row, key_code = np.unique(
        _keys(operations, view)[use].astype(str), return_index=True, return_inverse=True
    )
    met = np.bincount(np.unique(np.stack([key_code, operations.row[use]]), axis=1)[0])  # networks with each operation
    if len(keys) <= MOST_COLUMNS and np.median(met) >= 2:
        mean = (
            np.stack([np.bincount(key_code, column) for column in physics.T], axis=1) / np.bincount(key_code)[:, None]
        )
        of_kind = kind_code[first_row]

        def prior(price: Floats) -> Floats:
            each = np.tile(price[1:], (len(keys), 1)) if better is found[0] else price[1:].reshape(-1, 4)[of_kind]
            return np.concatenate([price[:1], np.einsum("ij,ij->i", mean, each)])

        def per_key(price: Floats) -> dict[str, Any]:
            own = {str(key): float(p) for key, p in zip(keys, price[1:])}
            return {"constant_ms": float(price[0]), "common": base[-1][1:], "kinds": better.model.kinds, "keys": own}

        third = np.hstack([ones, _sums(operations, use, key_code, len(keys), np.ones((int(use.sum()), 1)))])
        priors = [prior(price) for price in better.prices]
        found.append(_fitted(third, rows, priors, SHRINKAGE, partial(model, 3), per_key))
    return found


def _sums(
    operations: Operations, use: NDArray[np.bool_], code: NDArray[np.intp], groups: int, values: Floats
) -> Floats:
    """float[networks, groups * k]: count x value summed per network and group."""
    n, k = len(operations.networks), values.shape[1]
    cell = operations.row[use] * groups + code
    total = [
        np.bincount(cell, operations.count[use] * column, minlength=n * groups).reshape(n, groups)
        for column in values.T
    ]
    return np.stack(total, axis=2).reshape(n, groups * k).astype(float)


def _folds(rows: _Rows) -> int:
    return len(np.unique(rows.folds))


def _fitted(
    design: Floats,
    rows: _Rows,
    priors: list[Floats],
    shrinkage: Sequence[float],
    model: Callable[..., Additive],
    name: Callable[[Floats], dict[str, Any]],
) -> _Candidate:
    """Fit with the shrinkage that does best on left-out folds. A prior comes from the networks its fit sees."""
    spread = usual_size(design, rows.ms)
    parts = [rows.folds == f for f in np.unique(rows.folds)]
    systems = without_each([System.of(design[p], rows.ms[p], rows.scale[p]) for p in parts])
    best: _Candidate | None = None
    for strength in shrinkage:
        prices = [system.solve(prior, prior + spread, strength) for system, prior in zip(systems, priors)]
        held = _held(design, prices, parts, rows)
        error = rows.error(held)
        if best is None or error < best.model.error:
            best = _Candidate(
                model(**name(prices[-1]) | {"error": error}), held, design, prices, priors, strength, name
            )
    assert best is not None
    return best


def _robust(start: _Candidate, rows: _Rows) -> _Candidate:
    """The same model, pulled towards where most networks are: for devices with two states, or often disturbed.

    Welsch weights, narrowed step by step: in the end networks further off than some 10 % count for little.
    """
    spread = usual_size(start.design, rows.ms)
    parts = [rows.folds == f for f in np.unique(rows.folds)]
    prices = start.prices
    for width in WELSCH:
        fresh = []
        for i, (price, prior) in enumerate(zip(prices, start.priors)):
            keep = ~parts[i] if i < len(parts) else np.ones(len(rows.ms), bool)
            design, ms, scale = start.design[keep], rows.ms[keep], rows.scale[keep]
            off = np.log(np.maximum(design @ price, 1e-3 * rows.ms.min()) / ms)
            weight = np.exp(-0.25 * (off / width) ** 2)
            fresh.append(
                System.of(design, ms, scale / np.maximum(weight, 1e-6)).solve(prior, prior + spread, start.strength)
            )
        prices = fresh
    held = _held(start.design, prices, parts, rows)
    model = replace(start.model, error=rows.error(held), **start.name(prices[-1]))
    return replace(start, model=model, held=held, prices=prices)


def _held(design: Floats, prices: list[Floats], parts: list[NDArray[np.bool_]], rows: _Rows) -> Floats:
    held = np.empty(len(rows.ms))
    for part, price in zip(parts, prices):
        held[part] = design[part] @ price
    return np.maximum(held, 1e-3 * rows.ms.min())


def _kinds(operations: Operations, view: str) -> NDArray[np.object_]:
    return np.where(operations.live, operations.kind, "dead:" + operations.kind) if view == "both" else operations.kind


def _keys(operations: Operations, view: str) -> NDArray[np.object_]:
    return np.where(operations.live, operations.key, "dead:" + operations.key) if view == "both" else operations.key


def _known(names: NDArray[np.object_], table: dict[str, Any]) -> NDArray[np.bool_]:
    unique, code = np.unique(names.astype(str), return_inverse=True)
    return np.array([str(name) in table for name in unique])[code]


def _looked_up(names: NDArray[np.object_], table: dict[str, Any], width: int) -> Floats:
    unique, code = np.unique(names.astype(str), return_inverse=True)
    return np.array([np.broadcast_to(table.get(str(name), 0.0), width) for name in unique])[code]
