"""Where buffers go in one block of memory, planned once from when each is alive: `allocate`.

Greedy by size, largest first, at the lowest offset that is free while the buffer lives (Pisarchyk and Lee 2020, "Efficient
Memory Management for Deep Neural Net Inference", §5.2, "greedy by size for offset calculation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GUARD", "Interval", "allocate"]

GUARD = 64  # bytes before and after every buffer that may be read, never written
ALIGNMENT = 64


@dataclass(frozen=True)
class Interval:
    """A buffer of `size` bytes, alive from step `first` to step `last`, both included."""

    first: int
    last: int
    size: int


def allocate(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """Offsets, multiples of 64, and the size of the whole block; buffers that are alive together do not overlap."""
    offsets = [0] * len(intervals)
    placed: list[int] = []
    for i in sorted(range(len(intervals)), key=lambda i: (-intervals[i].size, i)):
        mine = intervals[i]
        rivals = sorted(
            (offsets[j], offsets[j] + _room(intervals[j].size))
            for j in placed
            if intervals[j].first <= mine.last and mine.first <= intervals[j].last
        )
        offset = 0
        for start, end in rivals:
            if offset + _room(mine.size) <= start:
                break
            offset = max(offset, end)
        offsets[i] = offset
        placed.append(i)
    return offsets, max((offsets[i] + _room(intervals[i].size) for i in placed), default=0)


def _room(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
