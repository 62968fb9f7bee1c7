"""The machines of a simulation: groups of workers that join and leave, and the faults that happen on them.

Knows no jobs and no clock (engine.py does). Start with `Group`, `Faults` and `Workers`.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from nas.errors import ConfigError
from nas.simulate.clock import SECOND, ticks

MAX_WORKERS = 1_000_000


@dataclass(frozen=True)
class Group:
    """Workers that come and go together: a node, or a rack of them.

    Attributes:
        workers: jobs they hold at a time.
        joins_s: when they join, virtual seconds.
        leaves_s: when they leave for good, and what runs on them is lost; None: never.
    """

    workers: int
    joins_s: float = 0.0
    leaves_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"workers of a group: expected 1 to {MAX_WORKERS:,}, got {self.workers}")
        ticks(self.joins_s, "joins_s of a group")
        if self.leaves_s is not None and ticks(self.leaves_s, "leaves_s of a group") <= ticks(self.joins_s, "joins_s"):
            raise ConfigError(f"a group that joins at {self.joins_s:g} s must leave later, got {self.leaves_s:g} s")


@dataclass(frozen=True)
class Faults:
    """What goes wrong, as shares in [0, 1]; drawn per trial and attempt from the seed, whatever else happens.

    Attributes:
        stragglers: share of attempts that are slow.
        factor: how many times as long those take, >= 1.
        lost: share of attempts whose process dies, at a moment drawn evenly over what the attempt has still to train.
        failed: share of trials whose training raises, at the same point in every attempt.
    """

    stragglers: float = 0.0
    factor: float = 4.0
    lost: float = 0.0
    failed: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stragglers", "lost", "failed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"faults: {name}: expected a share in [0, 1], got {getattr(self, name)!r}")
        if not 1 <= self.factor <= 1e6:
            raise ConfigError(f"faults: factor: expected >= 1 (and at most a million), got {self.factor!r}")


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` only; the same in every process."""
    text = "\x1f".join(map(str, parts))
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11) / 2**53


class Workers:
    """Which workers are there and free. A worker is a number; those of one group follow each other.

    Args:
        groups: at least one.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        if not groups:
            raise ConfigError("workers: expected at least one group, got none")
        self.groups = tuple(groups)
        self._first = [0]
        for group in self.groups:
            self._first.append(self._first[-1] + group.workers)
        self._there = [False] * len(self.groups)
        self._free: list[int] = []
        self.capacity = 0

    def group_of(self, worker: int) -> int:
        return bisect_right(self._first, worker) - 1

    def join(self, group: int) -> None:
        self._there[group] = True
        self.capacity += self.groups[group].workers
        for worker in range(self._first[group], self._first[group + 1]):
            heapq.heappush(self._free, worker)

    def leave(self, group: int) -> None:
        self._there[group] = False
        self.capacity -= self.groups[group].workers

    def take(self) -> int:
        """The free worker of lowest number; there must be one."""
        while True:
            worker = heapq.heappop(self._free)
            if self._there[self.group_of(worker)]:
                return worker

    def give_back(self, worker: int) -> None:
        if self._there[self.group_of(worker)]:
            heapq.heappush(self._free, worker)

    def available(self, until: int) -> int:
        """Ticks that workers were there, all together, from 0 to `until`."""
        total = 0
        for group in self.groups:
            end = until if group.leaves_s is None else min(until, round(group.leaves_s * SECOND))
            total += group.workers * max(0, end - round(group.joins_s * SECOND))
        return total
