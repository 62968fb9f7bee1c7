"""Times of every step of networks, taken while the networks run: `measure_in_place`.

A step alone, called again and again, has its weights and its code in the first caches; in a network they come from the outer ones,
and a hot time is 15 to 40 % too optimistic for deep, narrow layers. So whole networks run, with the clock read between steps
(`ops.runtime.Runtime.timed_call`). The protocol is that of `hw_models.measure`: rounds in random order over all networks, a
low percentile within a round, the minimum across rounds. Whole networks are timed as well, without any clock inside.

Start with `measure_in_place`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hw_models.measure import Measurement, Measurer
from ops.runtime import Runtime

__all__ = ["InPlace", "measure_in_place"]

Key = TypeVar("Key", bound=Hashable)
Nanoseconds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class InPlace:
    """One network, measured.

    Attributes:
        whole: of one call of the network.
        step_ms: float[steps of the schedule], the time of each in its place: minimum over rounds of the round's low percentile, all
            scaled so that their sum is `sum_ms`.
        step_rounds: float[rounds, steps], ms, in order of time.
        sum_ms: of the steps of a call: the whole less what is between the steps, which is the median over rounds of the difference
            of the two, taken right after each other.
    """

    whole: Measurement
    step_ms: npt.NDArray[np.float64]
    step_rounds: npt.NDArray[np.float64] = field(repr=False)
    sum_ms: float


def measure_in_place(
    networks: Mapping[Key, tuple[Runtime, torch.Tensor]], measurer: Measurer | None = None
) -> dict[Key, InPlace]:
    """Measure networks and their steps against each other, in one measuring run.

    Args:
        networks: (runtime, example input) by any key.
        measurer: settings; its threads should be those of the runtimes. Takes about `rounds x blocks x min_block_ms` per network
            (0.1 s with the default), and `rounds x spacing_s` at least.

    Returns:
        A measurement for each, in the order given.

    Raises:
        MeasurementError: a network failed while it was timed; it is named.
    """
    measurer = measurer or Measurer()
    recorders = {key: _Recorder(runtime, example, measurer.percentile) for key, (runtime, example) in networks.items()}
    names = {key: f"{i}: {key}" for i, key in enumerate(networks)}
    calls: dict[str, Callable[[], object]] = {
        names[key]: _whole(runtime, example) for key, (runtime, example) in networks.items()
    }
    measured = measurer.measure(calls, after_round={names[key]: recorders[key].round for key in networks})
    return {key: recorders[key].result(measured[names[key]]) for key in networks}


def _whole(runtime: Runtime, example: torch.Tensor) -> Callable[[], object]:
    return lambda: runtime(example)


class _Recorder:
    """Takes the times of the steps of one network after each of its rounds, with as many calls."""

    def __init__(self, runtime: Runtime, example: torch.Tensor, percentile: float) -> None:
        self._call = runtime.timed_call(example)
        self._percentile = percentile
        self._rounds: list[npt.NDArray[np.float64]] = []
        self._sums: list[float] = []

    def round(self, calls: int) -> None:
        """One round of `calls` calls, and two before that are not counted."""
        self._call(), self._call()
        times = np.array([self._call().copy() for _ in range(min(max(calls, 5), 200))], np.float64) / 1e6
        self._rounds.append(np.percentile(times, self._percentile, axis=0))
        self._sums.append(float(np.percentile(times.sum(axis=1), self._percentile)))

    def result(self, whole: Measurement) -> InPlace:
        rounds, sums = np.array(self._rounds), np.array(self._sums)
        between = float(np.median(np.array(whole.rounds) - sums))
        total = float(np.clip(whole.floor_ms - between, 0.2 * sums.min(), whole.floor_ms))
        steps = np.maximum(rounds.min(axis=0), 1e-6)
        return InPlace(whole, steps * (total / steps.sum()) if len(steps) else steps, rounds, total)
