"""Times of steps whose shape was never measured: `StepModel.fit(observed steps)`, then `predict(steps)`.

Steps of one family ("conv/specialised", "halo/lanes", ...) cost what their work costs: multiply-adds, bytes, rows of a loop and a
call, each at a price that cannot be negative (`regression.NonNegative`). Prices of a family are drawn towards those of its kernel,
and these towards those of everything, so that a family seen a few times is not left to itself. What is left over is learned in log
space, by a Gaussian process or boosted trees, and used only in families where that helps on shapes left out.

What counts is the time of networks. A step matters by its share of the time of the networks it was seen in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.regression import GaussianProcess, NonNegative
from hw_models.step_features import shape, work
from hw_models.trees import BoostedTrees

__all__ = ["StepModel", "out_of_fold", "shape_groups"]

Floats = NDArray[np.float64]

# Prices are drawn towards those of the wider class with the strength of this many rows; a robust fit beyond this relative error.
SHRINK = 3.0
ROBUST = 0.3
# A learned residual needs this many distinct rows of a family, trees this many; and to be better by this much on shapes left out.
FEWEST_ROWS = 15
FEWEST_FOR_TREES = 150
GAIN = 0.03
SMALLEST_SIGMA = 0.01
# Standard deviation in log space for a family nobody has seen, at least, by what it was priced from: its kernel, or everything.
UNKNOWN_SIGMA = {"kernel": 0.6, "all": 1.0}
FOLDS = 5


def shape_groups(steps: pd.DataFrame) -> NDArray[Any]:
    """str[n]: equal for steps of equal shape, whatever the density, the kernel and what is fused: what to leave out together."""
    columns = ("channels_in", "channels_out", "positions", "window", "stride", "groups", "batch")
    text = steps["kind"].astype(str)
    for name in columns:
        text = text + "/" + steps[name].astype(np.int64).astype(str)
    return text.to_numpy(dtype=object)


def out_of_fold(
    observed: pd.DataFrame, groups: NDArray[Any] | None = None, folds: int = FOLDS, seed: int = 0
) -> tuple[Floats, Floats]:
    """Predict every row by a model that was fitted without any row of its group.

    Args:
        observed: as for `StepModel.fit`.
        groups: object[n], what to leave out together; default `shape_groups`.
        folds: how many models are fitted.
        seed: of the deal of groups to folds.

    Returns:
        ms: float64[n]. sigma: float64[n], in log space.
    """
    groups = shape_groups(observed) if groups is None else groups
    which = _deal(groups, folds, seed)
    ms, sigma = np.empty(len(observed)), np.empty(len(observed))
    for fold in np.unique(which):
        out = which == fold
        if out.all():
            raise ValueError(f"cannot leave a group out: all {len(observed)} rows are of one group")
        ms[out], sigma[out] = StepModel.fit(observed[~out], seed=seed).predict(observed[out])
    return ms, sigma


@dataclass(frozen=True, eq=False)
class _Family:
    """One family: prices, and what was learned of the rest. `sigma` is the part of the spread that does not depend on the row."""

    prices: NonNegative
    residual: str  # "", "process", "trees" or "both"
    offset: float
    process: GaussianProcess | None
    trees: BoostedTrees | None
    sigma: float
    stretch: float  # of the process's own standard deviation

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


@dataclass(frozen=True, eq=False)
class StepModel:
    """Priced families, and prices for families that were not seen.

    Attributes:
        families: family -> model.
        kernels: kernel -> prices over all families of a kernel, e.g. "lanes".
        everything: prices over all rows.
    """

    families: dict[str, _Family]
    kernels: dict[str, NonNegative]
    everything: NonNegative

    @classmethod
    def fit(cls, observed: pd.DataFrame, groups: NDArray[Any] | None = None, seed: int = 0) -> StepModel:
        """Fit all families.

        Args:
            observed: steps frame (`hw_models.workload.STEP_COLUMNS`) and `ms` > 0; `network` and `count` (how often the network
                executes the step), if there, give the rows their weights.
            groups: object[n]: rows that are left out together where choices are tried; default `shape_groups`.
            seed: of every draw.

        Raises:
            ValueError: no rows, or a time that is not positive.
        """
        if not len(observed):
            raise ValueError("a step model needs at least one observed step")
        if not (observed["ms"].to_numpy(float) > 0).all():
            raise ValueError("ms of observed steps must be positive; leave steps that failed out")
        rows = _distinct(observed, shape_groups(observed) if groups is None else groups)
        w, x, ms = work(rows), shape(rows), rows["ms"].to_numpy(float)
        weight, group = rows["weight"].to_numpy(float), rows["group"].to_numpy()
        everything = NonNegative.fit(w, ms, weight, robust=ROBUST)
        kernels: dict[str, NonNegative] = {}
        families: dict[str, _Family] = {}
        for kernel, at in rows.groupby("kernel").indices.items():
            wide = NonNegative.fit(w[at], ms[at], weight[at], prior=everything.prices, shrink=SHRINK, robust=ROBUST)
            kernels[str(kernel)] = wide
            for family, inside in rows.iloc[at].groupby("family").indices.items():
                i = np.asarray(at)[inside]
                families[str(family)] = _fit_family(w[i], x[i], ms[i], weight[i], group[i], wide, seed)
        return cls(families, kernels, everything)

    def predict(self, steps: pd.DataFrame) -> tuple[Floats, Floats]:
        """Price steps.

        Args:
            steps: steps frame, n rows.

        Returns:
            ms: float64[n], positive. sigma: float64[n], standard deviation of log ms; for families that were not seen, which
            are priced like others of their kernel or like everything, 0.6 or 1 at least.
        """
        w, x = work(steps), shape(steps)
        ms, sigma = np.empty(len(steps)), np.empty(len(steps))
        for family, at in steps.groupby("family").indices.items():
            kernel = str(steps["kernel"].iloc[at[0]])
            if str(family) in self.families:
                ms[at], sigma[at] = self.families[str(family)].predict(w[at], x[at])
            else:
                known = kernel in self.kernels
                prices = self.kernels[kernel] if known else self.everything
                ms[at] = np.maximum(prices.predict(w[at]), 1e-9)
                sigma[at] = UNKNOWN_SIGMA["kernel" if known else "all"]
        return ms, sigma

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays for one NPZ file; the names of families are in "index", JSON text as uint8."""
        arrays: dict[str, NDArray[Any]] = {"everything": self.everything.prices}
        index: dict[str, Any] = {"kernels": list(self.kernels), "families": []}
        for i, prices in enumerate(self.kernels.values()):
            arrays[f"kernel{i}"] = prices.prices
        for i, (name, family) in enumerate(self.families.items()):
            numbers = [family.offset, family.sigma, family.stretch]
            index["families"].append([name, family.residual, numbers])
            arrays[f"family{i}.prices"] = family.prices.prices
            for part, model in (("process", family.process), ("trees", family.trees)):
                if model is not None:
                    arrays |= {f"family{i}.{part}.{n}": a for n, a in model.to_arrays().items()}
        arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> StepModel:
        """The model `to_arrays` was called on; KeyError if an array is missing."""
        index = json.loads(np.asarray(arrays["index"]).tobytes())
        kernels = {name: NonNegative(np.asarray(arrays[f"kernel{i}"])) for i, name in enumerate(index["kernels"])}
        families = {}
        for i, (name, residual, (offset, sigma, stretch)) in enumerate(index["families"]):
            parts: dict[str, dict[str, Any]] = {"process": {}, "trees": {}}
            for part, found in parts.items():
                head = f"family{i}.{part}."
                found.update({n[len(head) :]: arrays[n] for n in arrays if n.startswith(head)})
            process = GaussianProcess.from_arrays(parts["process"]) if parts["process"] else None
            trees = BoostedTrees.from_arrays(parts["trees"]) if parts["trees"] else None
            prices = NonNegative(np.asarray(arrays[f"family{i}.prices"]))
            families[name] = _Family(prices, residual, offset, process, trees, sigma, stretch)
        return cls(families, kernels, NonNegative(np.asarray(arrays["everything"])))


def _distinct(observed: pd.DataFrame, groups: NDArray[Any]) -> pd.DataFrame:
    """One row per distinct step, with `weight` (mean 1) and `group`; times of repeats are averaged in log space."""
    frame = observed.assign(group=groups).reset_index(drop=True)
    ms = frame["ms"].to_numpy(float)
    if "network" in frame:
        spent = ms * (frame["count"].to_numpy(float) if "count" in frame else 1.0)
        share = spent / pd.Series(spent).groupby(frame["network"].to_numpy()).transform("sum").to_numpy()
    else:
        share = np.ones(len(frame))
    share = np.maximum(share, 1e-3 * share.max())
    key = frame["key"].astype(str) + "@" + frame["family"].astype(str)
    key = key.where(frame["key"].astype(str) != "", "row " + frame.index.astype(str).to_series(index=frame.index))
    log = pd.DataFrame({"sum": share * np.log(ms), "weight": share}).groupby(key.to_numpy(), sort=False).sum()
    rows = frame[~key.duplicated().to_numpy()].copy()
    rows["ms"] = np.exp((log["sum"] / log["weight"]).to_numpy())
    rows["weight"] = (log["weight"] / log["weight"].mean()).to_numpy()
    return rows


def _deal(groups: NDArray[Any], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each row; rows of one group share it."""
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.asarray((np.random.default_rng(seed).permutation(len(names)) % folds)[which])


def _fit_family(
    w: Floats, x: Floats, ms: Floats, weight: Floats, group: NDArray[Any], wide: NonNegative, seed: int
) -> _Family:
    """Prices of one family, and the residual that shapes left out call for."""
    weight = weight / weight.mean()
    calm = np.clip(weight, 0.1, 10)
    which = _deal(group, FOLDS, seed)

    def priced(rows: NDArray[Any]) -> NonNegative:
        return NonNegative.fit(w[rows], ms[rows], weight[rows], prior=wide.prices, shrink=SHRINK, robust=ROBUST)

    def rest(prices: NonNegative) -> Floats:
        return np.asarray(np.log(ms) - np.log(np.maximum(prices.predict(w), 1e-9)))

    everything = np.ones(len(ms), bool)
    prices = priced(everything)
    left = rest(prices)
    tuned = None
    if len(ms) >= FEWEST_ROWS:
        offset = float(np.average(left, weights=calm))
        tuned = GaussianProcess.fit(x, left - offset, calm, seed=seed)
    # Errors on shapes left out: of prices alone, and with each residual.
    errors = {name: np.zeros(len(ms)) for name in ("", "process", "trees", "both")}
    deviation = np.zeros(len(ms))
    with_trees = tuned is not None and len(ms) >= FEWEST_FOR_TREES
    for fold in np.unique(which):
        out, rows = which == fold, which != fold
        if not rows.any():
            errors[""] = np.log(ms) - np.log(np.maximum(wide.predict(w), 1e-9))
            continue
        part = rest(priced(rows))
        errors[""][out] = part[out]
        if tuned is None:
            continue
        middle = float(np.average(part[rows], weights=calm[rows]))
        process = GaussianProcess.fit(x[rows], part[rows] - middle, calm[rows], seed=seed, like=tuned, limit=800)
        mean, deviation[out] = process.predict(x[out])
        errors["process"][out] = part[out] - middle - mean
        if with_trees:
            grown = BoostedTrees.fit(x[rows], part[rows] - middle, calm[rows], seed=seed).predict(x[out])
            errors["trees"][out] = part[out] - middle - grown
            errors["both"][out] = part[out] - middle - (grown + mean) / 2
    tried = [""] + (["process"] if tuned is not None else []) + (["trees", "both"] if with_trees else [])
    loss = {name: float(np.average(np.minimum(np.abs(errors[name]), 1.0) ** 2, weights=weight)) for name in tried}
    best = min(tried, key=lambda name: loss[name])
    if best and loss[best] > (1 - GAIN) * loss[""]:
        best = ""
    kept = tuned if best in ("process", "both") else None
    trees = None
    offset = float(np.average(left, weights=calm)) if best else 0.0
    if best in ("trees", "both"):
        trees = BoostedTrees.fit(x, left - offset, calm, seed=seed)
    sigma, stretch = _spread(errors[best], deviation if kept is not None else None, weight)
    return _Family(prices, best, offset, kept, trees, sigma, stretch)


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
