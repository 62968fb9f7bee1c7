"""One family of steps: how its work is priced, and what is learned of the rest. `hw_models.step_model` puts families together.

Choices are made by what they get wrong on shapes left out: which prices (all kinds of work, a few, one for the call, or those of
the wider class times a number), then whether a Gaussian process, boosted trees, their mean or nothing corrects them. Start with
`fit_family`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.regression import GaussianProcess, NonNegative
from hw_models.step_features import WORK_FEATURES
from hw_models.trees import BoostedTrees

__all__ = ["ROBUST", "SHRINK", "Family", "deal", "fit_family"]

Floats = NDArray[np.float64]

# Prices are drawn towards those of the wider class with the strength of this many rows; beyond this error in log time a row counts
# less.
SHRINK = 3.0
ROBUST = 0.3
# A learned residual needs this many distinct rows of a family, trees this many; and to be better by this much on shapes left out.
FEWEST_ROWS = 15
FEWEST_FOR_TREES = 150
GAIN = 0.03
SMALLEST_SIGMA = 0.01
FOLDS, FOLDS_OF_MANY, MANY = 5, 3, 800
# Ways to price, the plainest first; a later one must be better by `GAIN`.
PRICINGS = ("scaled", "call", "few", "own")
_CALL = np.array([name in ("call", "followers") for name in WORK_FEATURES])
_FEW = np.array([name in ("macs", "weights", "in_bytes", "out_bytes", "followers", "call") for name in WORK_FEATURES])


@dataclass(frozen=True, eq=False)
class Family:
    """One family: prices, and what was learned of the rest. `sigma` is the part of the spread that does not depend on the row.

    `errors` and `deviations` are what the fit found on shapes left out: log(measured / predicted) of every row and the process's
    standard deviation there; None after reading from a file.
    """

    prices: NonNegative
    residual: str  # "", "process", "trees" or "both"
    offset: float
    process: GaussianProcess | None
    trees: BoostedTrees | None
    sigma: float
    stretch: float  # of the process's own standard deviation
    errors: Floats | None = field(default=None, repr=False)
    deviations: Floats | None = field(default=None, repr=False)

    def predict(self, w: Floats, x: Floats) -> tuple[Floats, Floats]:
        log_ms = np.log(np.maximum(self.prices.predict(w), 1e-9))
        sigma = np.full(len(w), self.sigma)
        parts = []
        if self.process is not None:
            mean, deviation = self.process.predict(x)
            sigma = np.hypot(sigma, self.stretch * deviation)
            if self.residual in ("process", "both"):
                parts.append(mean + self.offset)
        if self.trees is not None and self.residual in ("trees", "both"):
            parts.append(self.trees.predict(x) + self.offset)
        if parts:
            log_ms = log_ms + np.mean(parts, axis=0)
        return np.exp(log_ms), sigma


def deal(groups: NDArray[Any], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each row; rows of one group share it."""
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.asarray((np.random.default_rng(seed).permutation(len(names)) % folds)[which])


def fit_family(
    w: Floats,
    x: Floats,
    ms: Floats,
    weight: Floats,
    group: NDArray[Any],
    wide: NonNegative,
    seed: int,
    learn: bool = True,
) -> Family:
    """Fit one family.

    Args:
        w: float[n, work features]. x: float[n, shape features]. ms: float[n].
        weight: float[n], how much each row matters.
        group: object[n], what is left out together.
        wide: prices of the wider class.
        seed: of every draw.
        learn: whether a residual is tried at all.
    """
    weight = weight / weight.mean()
    calm = np.clip(weight, 0.1, 10)
    which = deal(group, FOLDS if len(ms) < MANY else FOLDS_OF_MANY, seed)
    folds = [(which == k, which != k) for k in np.unique(which) if (which != k).any()]

    def loss(errors: Floats) -> float:
        return float(np.average(np.minimum(np.abs(errors), 1.0) ** 2, weights=weight))

    def rest(prices: NonNegative) -> Floats:
        return np.asarray(np.log(ms) - np.log(np.maximum(prices.predict(w), 1e-9)))

    # Prices.
    whole = np.ones(len(ms), bool)
    if not folds:
        prices = _priced("scaled", w, ms, weight, wide)
        alone = np.log(ms) - np.log(np.maximum(wide.predict(w), 1e-9))
        return Family(prices, "", 0.0, None, None, max(0.3, SMALLEST_SIGMA), 0.0, alone, np.zeros(len(ms)))
    tried: dict[str, list[NonNegative]] = {}
    plain: dict[str, Floats] = {}
    pricing = ""
    for name in PRICINGS if len(ms) < MANY else PRICINGS[-1:]:
        tried[name] = [_priced(name, w[rows], ms[rows], weight[rows], wide) for _, rows in folds]
        plain[name] = np.zeros(len(ms))
        for (out, _), prices in zip(folds, tried[name], strict=True):
            plain[name][out] = rest(prices)[out]
        if not pricing or loss(plain[name]) < (1 - GAIN) * loss(plain[pricing]):
            pricing = name
    prices = _priced(pricing, w, ms, weight, wide)
    errors = {"": plain[pricing]}
    left = rest(prices)
    offset = float(np.average(left, weights=calm))

    # What they leave.
    tuned, deviation = None, np.zeros(len(ms))
    if learn and len(ms) >= FEWEST_ROWS:
        tuned = GaussianProcess.fit(x, left - offset, calm, seed=seed)
        with_trees = len(ms) >= FEWEST_FOR_TREES
        for name in ("process", "trees", "both") if with_trees else ("process",):
            errors[name] = np.zeros(len(ms))
        for (out, rows), priced in zip(folds, tried[pricing], strict=True):
            part = rest(priced)
            middle = float(np.average(part[rows], weights=calm[rows]))
            process = GaussianProcess.fit(x[rows], part[rows] - middle, calm[rows], seed=seed, like=tuned)
            mean, deviation[out] = process.predict(x[out])
            errors["process"][out] = part[out] - middle - mean
            if with_trees:
                grown = BoostedTrees.fit(x[rows], part[rows] - middle, calm[rows], seed=seed).predict(x[out])
                errors["trees"][out] = part[out] - middle - grown
                errors["both"][out] = part[out] - middle - (grown + mean) / 2
    best = min(errors, key=lambda name: loss(errors[name]))
    if loss(errors[best]) > (1 - GAIN) * loss(errors[""]):
        best = ""
    kept = tuned if best in ("process", "both") else None
    trees = None
    if best in ("trees", "both"):
        trees = BoostedTrees.fit(x[whole], left - offset, calm, seed=seed)
    sigma, stretch = _spread(errors[best], deviation if kept is not None else None, weight)
    return Family(prices, best, offset if best else 0.0, kept, trees, sigma, stretch, errors[best], deviation)


def _priced(name: str, w: Floats, ms: Floats, weight: Floats, wide: NonNegative) -> NonNegative:
    """Prices of one of `PRICINGS`."""
    if name == "own":
        return NonNegative.fit(w, ms, weight, prior=wide.prices, shrink=SHRINK, robust=ROBUST)
    if name == "scaled":
        ratio = np.log(ms) - np.log(np.maximum(wide.predict(w), 1e-9))
        # As if one more row had asked for the prices as they are.
        return NonNegative(wide.prices * np.exp(np.sum(weight * ratio) / (np.sum(weight) + weight.mean())))
    used = _CALL if name == "call" else _FEW
    prices = np.zeros(w.shape[1])
    prices[used] = NonNegative.fit(w[:, used], ms, weight, shrink=0.1, robust=ROBUST).prices
    return NonNegative(prices)


def _spread(errors: Floats, deviation: Floats | None, weight: Floats) -> tuple[float, float]:
    """Constant part of the spread, and the factor of the process's own, that explain the squares of the errors best."""
    square = np.minimum(errors**2, 4.0)
    size = np.sqrt(np.average(square, weights=weight) * (1 + 2 / len(errors)))
    if deviation is None:
        return max(float(size), SMALLEST_SIGMA), 0.0
    both = np.stack([np.ones(len(errors)), deviation**2], axis=1)
    found = NonNegative.fit(both, np.maximum(square, 0.1 * size**2) + 1e-12, weight).prices
    scale = np.average(square, weights=weight) / max(float(np.average(both @ found, weights=weight)), 1e-12)
    constant, slope = np.sqrt(found * scale)
    return max(float(constant), SMALLEST_SIGMA), float(slope)
