"""From the sum of a network's steps to its whole time: `NetworkModel.fit(networks)`.

    whole = a * sum of steps + (b + c * moved) * calls from Python + d * steps + e * bytes handed over + f,  none negative,

times a residual of the network's features where cross-validation says that it helps. Sums alone miss what happens between steps and
over-count where every step was measured with overhead of its own. Source: the additive backbone with a learned residual
as in section 2.1 of the survey this follows; relative least squares, shrunk to a = 1 and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.context import surroundings

__all__ = ["NetworkModel"]

Floats = npt.NDArray[np.float64]

TERMS = (
    "sum_ms",
    "calls",
    "cold_calls",
    "steps",
    "handed_bytes",
    "one",
)  # cold: calls x what is moved (`surroundings`)
# What the coefficients are shrunk to and how much of one is an ordinary deviation from it: 10 %, 5 us and 1 us a call, 0.05 us a
# step, 1 us a page, 10 us.
PRIOR = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
SCALE = np.array([0.1, 0.005, 0.001, 0.00005, 0.001 / 4096, 0.01])
STRENGTH = 0.02  # relative error of a network that weighs as much as one such deviation
ENOUGH = 50  # networks, for a residual to be tried
RIDGE = 3.0
GAIN = 0.97  # of the cross-validated error that the residual must go below


@dataclass(frozen=True, eq=False)
class NetworkModel:
    """The correction of a sum.

    Attributes:
        coefficients: float[6], of `TERMS`: the sum, ms per call, per call and size, per step, per byte, ms.
        residual: float[features + 1] of a ridge regression of the log ratio on standardised features; empty if it does not pay.
        centre, scale: float[features] of the standardisation.
        error: relative error (root mean square, log space) on the networks it was fitted to, cross-validated.
    """

    coefficients: Floats
    residual: Floats
    centre: Floats
    scale: Floats
    error: float

    @classmethod
    def fit(cls, networks: pd.DataFrame, seed: int = 0) -> NetworkModel:
        """Fit to measured networks.

        Args:
            networks: ms (whole), sum_ms (of its steps, measured in place), calls, steps, weight_bytes, arena_bytes, handed_bytes
                (default 0).

        Returns:
            The sum itself (a = 1) where there are no networks.
        """
        empty = np.zeros(0)
        if len(networks) == 0:
            return cls(PRIOR.copy(), empty, empty, empty, 0.05)
        table, whole = _terms(networks), networks["ms"].to_numpy(float)
        plain = cls(_non_negative(table, whole), empty, empty, empty, 0.05)
        errors = _cross_validated(networks, whole, False, seed)
        best, rms = plain, _rms(errors)
        if len(networks) >= ENOUGH:
            with_residual = _rms(_cross_validated(networks, whole, True, seed))
            if with_residual < GAIN * rms:
                best, rms = _with_residual(plain, networks, whole), with_residual
        return cls(best.coefficients, best.residual, best.centre, best.scale, max(rms, 0.002))

    def predict(self, networks: pd.DataFrame) -> Floats:
        """Whole times in ms.

        Args:
            networks: sum_ms and the other columns of `fit`, without ms.
        """
        whole = np.maximum(_terms(networks) @ self.coefficients, 1e-9)
        if len(self.residual):
            features = (_features(networks) - self.centre) / self.scale
            # beyond what was seen the correction stays what it is at the edge
            whole = whole * np.exp(
                np.clip(np.clip(features, -2.5, 2.5) @ self.residual[1:] + self.residual[0], -0.3, 0.3)
            )
        return np.asarray(whole)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        arrays = {name: getattr(self, name).tolist() for name in ("coefficients", "residual", "centre", "scale")}
        return {**arrays, "error": self.error}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NetworkModel:
        """The model `to_dict` was called on."""
        a, b, c, d = (np.asarray(data[name], float) for name in ("coefficients", "residual", "centre", "scale"))
        return cls(a, b, c, d, float(data["error"]))


def _terms(networks: pd.DataFrame) -> Floats:
    full = networks.reindex(columns=list(TERMS), fill_value=0.0).fillna(0.0)
    cold = full["calls"].to_numpy(float) * surroundings(networks)[:, 1]
    return full.assign(one=1.0, cold_calls=cold)[list(TERMS)].to_numpy(float)


def _features(networks: pd.DataFrame) -> Floats:
    sums = np.maximum(networks["sum_ms"].to_numpy(float), 1e-6)
    columns = [
        np.log(sums),
        np.log(sums / np.maximum(networks["steps"].to_numpy(float), 1)),
        networks["calls"].to_numpy(float) / np.maximum(networks["steps"].to_numpy(float), 1),
        np.log1p(networks["weight_bytes"].to_numpy(float) / 2**18),
        np.log1p(networks["arena_bytes"].to_numpy(float) / 2**18),
    ]
    return np.column_stack(columns)


def _non_negative(table: Floats, whole: Floats) -> Floats:
    from scipy.optimize import lsq_linear

    rows, shrink = table / whole[:, None], np.diag(STRENGTH / SCALE)
    weight, found = np.ones(len(whole)), PRIOR
    for _ in range(8):  # Huber's weights: what was disturbed while it was measured counts less
        stacked = np.vstack([weight[:, None] * rows, shrink])
        target = np.concatenate([weight, STRENGTH / SCALE * PRIOR])
        found = np.asarray(lsq_linear(stacked, target, bounds=(0, np.inf)).x)
        error = np.abs(rows @ found - 1.0)
        tolerated = max(1.5 * 1.4826 * float(np.median(error)), 1e-6)
        weight = np.sqrt(np.minimum(1.0, tolerated / np.maximum(error, 1e-12)))
    return found


def _with_residual(plain: NetworkModel, networks: pd.DataFrame, whole: Floats) -> NetworkModel:
    features = _features(networks)
    centre, scale = features.mean(axis=0), features.std(axis=0) + 1e-9
    design = np.column_stack([np.ones(len(whole)), np.clip((features - centre) / scale, -2.5, 2.5)])
    target = _calmed(np.log(whole / plain.predict(networks)), 2.5)
    ridge = RIDGE * np.eye(design.shape[1])
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ target)
    return NetworkModel(plain.coefficients, weights, centre, scale, plain.error)


def _cross_validated(networks: pd.DataFrame, whole: Floats, residual: bool, seed: int, folds: int = 5) -> Floats:
    """log(measured / predicted) of every network, by a model that has not seen it."""
    empty = np.zeros(0)
    folds = min(folds, len(networks))
    of = np.random.default_rng(seed).permutation(len(networks)) % max(folds, 1)
    errors = np.zeros(len(networks))
    for fold in range(folds):
        train, test = networks[of != fold], networks[of == fold]
        if len(train) == 0:
            errors[of == fold] = np.log(whole[of == fold] / test["sum_ms"].to_numpy(float))
            continue
        model = NetworkModel(_non_negative(_terms(train), whole[of != fold]), empty, empty, empty, 0.05)
        if residual:
            model = _with_residual(model, train, whole[of != fold])
        errors[of == fold] = np.log(whole[of == fold] / model.predict(test))
    return errors


def _calmed(errors: Floats, deviations: float) -> Floats:
    """The errors, none larger than so many (robust) standard deviations."""
    most = deviations * max(1.4826 * float(np.median(np.abs(errors))), 1e-6)
    return np.clip(errors, -most, most)


def _rms(errors: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(_calmed(errors, 5.0)))))
