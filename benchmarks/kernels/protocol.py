"""The clock: interleaved bursts of chains, and the time of one layer as a difference between two of them.

Rounds go over all contenders in random order. In its turn a contender's long and short chain each run one burst, right after
another: warm-up calls, then calls for some milliseconds, of which a low percentile is kept. The estimate of a chain is the
minimum over rounds: the time without disturbance, as in `hw_models.measure`. A layer is (long - short) / units between them.
Rounds go on until every chain's minimum was met again by two other rounds, or a cap.

`Clocked` is what a contender must do; `clock.InProcess` times a Python callable, engines in other processes time themselves.
Start with `measure`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.kernels.clock import InProcess, Settings
from hw_models.measure import no_garbage_collection

__all__ = ["Cell", "Clocked", "InProcess", "Settings", "measure", "per_unit_us"]

NEAR = 0.03  # rounds within 3 % of the minimum confirm it


class Clocked(Protocol):
    """A chain that can be timed."""

    def burst(self, settings: Settings) -> float:
        """Seconds of one call: the low percentile of a burst."""
        ...


@dataclass
class Cell:
    """What was measured of one contender: seconds per round, of both chains."""

    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)

    @property
    def confirmed(self) -> bool:
        """Whether at least three rounds of each chain lie within 3 % of its minimum."""
        return all(sum(t <= (1 + NEAR) * min(times) for t in times) >= 3 for times in (self.short, self.long))


def per_unit_us(cell: Cell, lengths: tuple[int, int], split: int = 1) -> float:
    """Microseconds of one reported layer; NaN if the long chain was not slower than the short one."""
    if not cell.long:
        return math.nan
    difference = min(cell.long) - min(cell.short)
    return 1e6 * difference / (lengths[1] - lengths[0]) / split if difference > 0 else math.nan


def measure(
    contenders: Mapping[str, tuple[Clocked, Clocked]],
    settings: Settings,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Cell]:
    """Time contenders against each other.

    Args:
        contenders: (short chain, long chain) by name.
        settings: how long.
        seed: of the order.
        progress: called with a contender's name after each of its turns.
        sleep: for tests.

    Returns:
        A cell for each name, in the order given.
    """
    rng = random.Random(seed)
    cells = {name: Cell() for name in contenders}
    with no_garbage_collection():
        for short, long in contenders.values():  # sizes the groups, wakes everything up; not counted
            short.burst(settings)
            long.burst(settings)
        pending = list(contenders)
        for number in range(settings.cap_rounds):
            if number >= settings.rounds:
                pending = [name for name in contenders if not cells[name].confirmed]
            for name in rng.sample(pending, len(pending)):
                if settings.settle_s:
                    sleep(settings.settle_s)
                short, long = contenders[name]
                cells[name].long.append(long.burst(settings))
                cells[name].short.append(short.burst(settings))
                if progress is not None:
                    progress(name)
    return cells
