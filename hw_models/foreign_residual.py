"""What a sum over operations leaves over: `fit_residual(operations, each, whole, held, ms, folds)`.

Times of whole networks are not always sums: launches hide behind work, branches run at once, kernels change with size. The rest is
learned in log time from a few numbers per network, and only kept where it predicts left-out networks clearly better.

Source: sections 2.1 and 5.3 of the facts this package is built from (additive backbone plus residual, by cross-validated gain).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.foreign_additive import typical_error
from hw_models.foreign_features import Operations
from hw_models.regression import GaussianProcess
from hw_models.trees import BoostedTrees

__all__ = ["Residual", "Summary", "fit_residual"]

Floats = NDArray[np.float64]
FEWEST = 16  # networks below which nothing is learned
TREES_FROM = 300
GAIN = 0.03  # share of the error that must go
LARGEST = 1.0  # a correction stays within a factor e
MOST_KINDS = 12
CHANNELS = ("c_in", "c_out", "mid")
ALIGNED = (8, 16, 32)
MOST_FOLDS = 5


@dataclass(frozen=True)
class Summary:
    """Networks as a few numbers each, the same numbers for networks met later.

    Attributes:
        kinds: kinds that are counted.
        numbers: descriptors of operations that are averaged, weighted by time.
        keep: which of all numbers are used: those that varied.
        graph, dead: whether the tables have a graph, and operations that are not live.
    """

    kinds: tuple[str, ...]
    numbers: tuple[str, ...]
    keep: tuple[int, ...]
    graph: bool
    dead: bool

    @classmethod
    def of(cls, operations: Operations, each: Floats, whole: Floats) -> tuple[Summary, Floats]:
        """Choose the numbers, and those of these networks; arguments as for `numbers_of`."""
        cost = each * operations.count
        names, code = np.unique(operations.kind.astype(str), return_inverse=True)
        share = np.bincount(code, cost)
        kinds = tuple(str(names[i]) for i in np.argsort(-share)[:MOST_KINDS])
        draft = cls(kinds, tuple(operations.numbers.columns), (), operations.src is not None, not operations.live.all())
        full = draft._all(operations, each, whole)
        deviation = full.std(axis=0)
        keep: list[int] = []
        for i in np.flatnonzero(deviation > 1e-6 * np.maximum(np.abs(full).mean(axis=0), 1e-3)):
            column = (full[:, i] - full[:, i].mean()) / deviation[i]
            alike = [abs(float(np.mean(column * (full[:, j] - full[:, j].mean()) / deviation[j]))) for j in keep]
            if not alike or max(alike) < 0.999:
                keep.append(int(i))
        return cls(kinds, draft.numbers, tuple(keep), draft.graph, draft.dead), full[:, keep]

    def numbers_of(self, operations: Operations, each: Floats, whole: Floats) -> Floats:
        """The numbers of networks.

        Args:
            operations: of the networks.
            each: float[rows], ms of one execution of each operation.
            whole: float[networks], ms by the sum.

        Returns:
            float[networks, len(keep)].
        """
        return self._all(operations, each, whole)[:, list(self.keep)]

    def _all(self, operations: Operations, each: Floats, whole: Floats) -> Floats:
        ops = operations
        total = ops.per_network(each)
        whole = np.maximum(whole, 1e-12)
        alive = ops.live.astype(float)
        columns = [np.log(whole), total / whole, ops.per_network(alive)]
        for kind in self.kinds:
            mine = (ops.kind == kind).astype(float)
            columns.append(ops.per_network(mine * alive))
            if self.dead:
                columns.append(ops.per_network(mine))
        columns.extend(np.log1p(ops.per_network(ops.physics * alive[:, None]))[:, 1:].T)
        if self.graph:
            columns += [ops.longest_path(each) / whole, ops.longest_path(alive)]
        weight = ops.count * each + 1e-9

        def mean(values: Floats, given: NDArray[np.bool_]) -> Floats:
            """Over the rows of a network that have a value, weighted by time."""
            here = np.where(given, weight, 0.0)
            below = np.bincount(ops.row, here, minlength=len(ops.networks))
            return np.bincount(ops.row, here * values, minlength=len(ops.networks)) / np.maximum(below, 1e-12)

        for name in self.numbers:
            value = ops.numbers[name].to_numpy(float) if name in ops.numbers else np.full(len(weight), np.nan)
            given = ~np.isnan(value)
            value = np.nan_to_num(value)
            columns.append(mean(np.log1p(np.maximum(value, 0.0)), given))
            if name in CHANNELS:  # kernels work on whole vectors of channels
                columns.extend(mean((value % step == 0).astype(float), given) for step in ALIGNED)
        return np.stack(columns, axis=1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Summary:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Residual:
    """A factor on the sum.

    Attributes:
        summary: what it is learned from.
        model: mean correction in log time, and how unsure it is.
        lowest, highest: of the corrections seen; later ones go no further than a little beyond.
    """

    summary: Summary
    model: GaussianProcess | BoostedTrees
    lowest: float
    highest: float

    def log_factor(self, operations: Operations, each: Floats, whole: Floats) -> tuple[Floats, Floats]:
        """Correction and its standard deviation (0 for trees), float[networks] each; arguments as for `Summary.numbers_of`."""
        return self.at(self.summary.numbers_of(operations, each, whole))

    def at(self, numbers: Floats) -> tuple[Floats, Floats]:
        """The same from the numbers of the networks."""
        if isinstance(self.model, GaussianProcess):
            mean, deviation = self.model.predict(numbers)
        else:
            mean, deviation = self.model.predict(numbers), np.zeros(len(numbers))
        return np.clip(mean, self.lowest, self.highest), deviation

    def to_arrays(self) -> dict[str, Floats]:
        """For an NPZ file."""
        return self.model.to_arrays()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, what `to_arrays` does not hold."""
        kind = "gaussian process" if isinstance(self.model, GaussianProcess) else "trees"
        return {"summary": self.summary.to_dict(), "model": kind, "lowest": self.lowest, "highest": self.highest}

    @classmethod
    def load(cls, data: dict[str, Any], arrays: dict[str, Any]) -> Residual:
        """The inverse of `to_dict` and `to_arrays`."""
        family: Any = GaussianProcess if data["model"] == "gaussian process" else BoostedTrees
        return cls(Summary.from_dict(data["summary"]), family.from_arrays(arrays), data["lowest"], data["highest"])


def fit_residual(
    operations: Operations,
    each: Floats,
    whole: Floats,
    held: Floats,
    ms: Floats,
    folds: NDArray[np.int64],
    seed: int = 0,
) -> tuple[Residual | None, Floats, Floats]:
    """The best correction, None where none predicts left-out networks clearly better.

    Args:
        operations: of n networks.
        each: float[rows], ms of one execution of each operation, by the sum fitted to the networks.
        whole: float[n], what the sum says of each network.
        held: float[n], what the sum says of each network when it has not seen its fold.
        ms: float[n].
        folds: int[n]; more than five are put together to five.
        seed: of trees and of rows drawn.

    Returns:
        The correction; the predictions for left-out networks with it; their spread in log time (constant without one).
    """
    base = np.log(ms / held)
    best_error = typical_error(base)
    flat = np.full(len(ms), max(1.4826 * float(np.median(np.abs(base))), 1e-4))
    if len(ms) < FEWEST:
        return None, held, flat
    summary, numbers = Summary.of(operations, each, whole)
    if not numbers.shape[1]:
        return None, held, flat
    target = np.log(ms / np.maximum(whole, 1e-3 * ms.min()))
    target = np.clip(target, -LARGEST, LARGEST)
    lowest, highest = 1.2 * min(target.min(), 0.0), 1.2 * max(target.max(), 0.0)
    best: tuple[Residual | None, Floats, Floats] = (None, held, flat)
    folds = np.unique(folds, return_inverse=True)[1] % MOST_FOLDS

    def consider(model: GaussianProcess | BoostedTrees, refit: Any) -> None:
        nonlocal best, best_error
        mean, deviation = np.zeros(len(ms)), np.zeros(len(ms))
        for fold in np.unique(folds):
            out = folds == fold
            part = Residual(summary, refit(~out), lowest, highest)
            mean[out], deviation[out] = part.at(numbers[out])
        error = typical_error(base - mean)
        if error < best_error * (1 - GAIN):
            noise = max(1.4826 * float(np.median(np.abs(base - mean))), 1e-4)
            best_error = error
            best = Residual(summary, model, lowest, highest), held * np.exp(mean), np.hypot(noise, deviation)

    process = GaussianProcess.fit(numbers, target, seed=seed)
    consider(process, lambda keep: GaussianProcess.fit(numbers[keep], target[keep], seed=seed, like=process))
    if len(ms) >= TREES_FROM:
        options: dict[str, Any] = {"trees": 300, "depth": 4, "rate": 0.06, "seed": seed}
        consider(
            BoostedTrees.fit(numbers, target, **options),
            lambda keep: BoostedTrees.fit(numbers[keep], target[keep], **options),
        )
    return best
