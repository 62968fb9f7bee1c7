"""Predictions of networks by models that have not seen them.

`by_others` leaves architectures out, fold by fold; `by` asks a model that was made of other networks altogether. Both give
prediction frames (`tables`). `per_second` says how fast a model answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.latency.frames import part
from benchmarks.latency.records import Record
from benchmarks.latency.splits import curves_of, known_share
from hw_models.model import LatencyModel
from hw_models.workload import Workload

__all__ = ["Fit", "by", "by_others", "per_second", "tiled"]

Fit = Callable[[pd.DataFrame, pd.DataFrame], LatencyModel]
"""Makes a model of (observed steps, networks); see `hw_models.predictor.Predictor.fit`."""


def by_others(
    work: Workload,
    records: Sequence[Record],
    frames: tuple[pd.DataFrame, pd.DataFrame],
    fold: npt.NDArray[np.int64],
    fit: Fit,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[pd.DataFrame, LatencyModel]:
    """Every network predicted by a model fitted to the other folds.

    Args:
        work: of all networks.
        records: one per network, in the same order.
        frames: (steps, networks) from `frames.observed`.
        fold: int[networks]; no architecture may be in two.
        fit: makes the model.

    Returns:
        The predictions, and the model of the last fold.

    Raises:
        ValueError: an architecture is in two folds.
    """
    _check_apart(records, fold)
    answers: list[pd.DataFrame] = []
    model: LatencyModel | None = None
    step_ms = [record.step_ms() for record in records]
    for i, number in enumerate(np.unique(fold)):
        if progress is not None:
            progress(i, len(np.unique(fold)), f"fitting fold {i + 1}")
        training = fold != number
        model = fit(*part(*frames, training))
        left_out = np.flatnonzero(~training)
        answer = model.predict_many(work.subset(left_out)).set_index(left_out)
        known = known_share(work, step_ms, curves_of(work, training))[left_out]
        answers.append(answer.assign(fold=number, known=known))
    assert model is not None
    return _joined(records, pd.concat(answers).sort_index()), model


def by(model: LatencyModel, work: Workload, records: Sequence[Record], known: npt.NDArray[np.float64]) -> pd.DataFrame:
    """Every network predicted by one model.

    Args:
        known: float[networks], the share of each one's time in shapes that the model has measured.
    """
    return _joined(records, model.predict_many(work).assign(known=known))


def tiled(work: Workload, count: int) -> Workload:
    """At least `count` networks: the given ones again and again."""
    repeats = -(-count // len(work))
    return work.subset(np.tile(np.arange(len(work)), repeats))


def per_second(
    model: LatencyModel, work: Workload, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Network predictions per second of `predict_many`, the best of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        model.predict_many(work)
        best = min(best, clock() - start)
    return len(work) / best


def _joined(records: Sequence[Record], answers: pd.DataFrame) -> pd.DataFrame:
    facts = pd.DataFrame(
        {
            "network": [record.name for record in records],
            "setting": [record.group.partition("/")[0] for record in records],
            "group": [record.group for record in records],
            "measured_ms": [record.ms for record in records],
            "quality": [record.quality for record in records],
        }
    )
    return pd.concat([facts, answers.reset_index(drop=True)], axis=1)


def _check_apart(records: Sequence[Record], fold: npt.NDArray[np.int64]) -> None:
    of: dict[str, int] = {}
    for record, number in zip(records, fold):
        if of.setdefault(record.group, int(number)) != number:
            raise ValueError(
                f"architecture {record.group} is in folds {of[record.group]} and {number}; a split may not tear it apart"
            )
