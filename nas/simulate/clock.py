"""A virtual clock: what happens when, in whole nanoseconds, so that sums of durations are exact. Start with `Agenda`."""

from __future__ import annotations

import heapq
import math
from typing import Generic, TypeVar

from nas.errors import ConfigError

T = TypeVar("T")
SECOND = 1_000_000_000
"""Ticks per second."""


def ticks(seconds: float, what: str) -> int:
    """Seconds as nanoseconds.

    Args:
        seconds: finite, >= 0.
        what: its name in the message.

    Raises:
        ConfigError: it is negative or not finite.
    """
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"{what}: expected a finite number of seconds >= 0, got {seconds!r}")
    return round(seconds * SECOND)


class Agenda(Generic[T]):
    """Entries by the moment they are due; at equal moments by rank, then in the order they were added.

    Adding and taking cost O(log n). Nothing is ever removed: who adds an entry that may become void marks it, and skips it later.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, T]] = []
        self._added = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, moment: int, rank: int, entry: T) -> None:
        heapq.heappush(self._heap, (moment, rank, self._added, entry))
        self._added += 1

    @property
    def next_moment(self) -> int:
        """When the next entry is due; there must be one."""
        return self._heap[0][0]

    def take(self) -> tuple[int, T]:
        """(moment, entry) of the next one."""
        moment, _, _, entry = heapq.heappop(self._heap)
        return moment, entry
