"""Times of callables that can be believed on a machine shared with others.

Bursts of calls ("blocks") are taken in rounds, in random order over all callables and well apart in time. A round keeps the
20th percentile of its blocks, and the estimate, `floor_ms`, is the minimum over the rounds: the time without disturbance.
On a loaded two-core host two such estimates of the same kernel differ by 0.5 % typically, where medians differ by 20 %.

A time is that of a hot call: the same input again and again, caches warm. It contains the cost of a Python call (some 50 ns).
Memory that was used once stays with the process (`steady_memory`). It pins no thread to a core: the scheduler finds the idle one.
To pin, start the process under `taskset`.

Start with `Measurer().measure({"name": callable})`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat

import numpy as np
import torch
from threadpoolctl import threadpool_limits

__all__ = ["Measurement", "MeasurementError", "Measurer", "no_garbage_collection", "steady_memory", "threads_at"]

NEAR = 0.03  # a round within 3 % of the floor confirms it
STEADY = 0.05  # three blocks within 5 % of each other end the warm-up
WARM_BLOCKS, WARM_MS = 40, 2000.0  # ... or these caps do
ROUND_MS = 200.0  # a round of a slow callable takes fewer blocks, so that it fits into this
BOOTSTRAPS = 200


class MeasurementError(RuntimeError):
    """A callable raised while it was being timed; names it."""


@dataclass(frozen=True)
class Measurement:
    """The time of one call.

    Attributes:
        floor_ms: the estimate, minimum over rounds of the round's low percentile.
        lo_ms, hi_ms: 90 % interval of the floor: bootstrap over rounds, widened by how much the even and odd rounds of the same
            measuring run disagree (median over its callables).
        median_ms, p90_ms: over all blocks of all rounds; what one sees under the present load.
        quality: "ok" when at least 3 rounds lie within 3 % of the floor, "thin" for 2, "unreached" otherwise.
        rounds: the low percentile of each round, ms per call, in order of time.
    """

    floor_ms: float
    lo_ms: float
    hi_ms: float
    median_ms: float
    p90_ms: float
    quality: str
    rounds: tuple[float, ...]


@dataclass
class _Item:
    """What is known about one callable while it is being measured; times in ms."""

    name: str
    call: Callable[[], object]
    calls: int = 1  # per block
    blocks: int = 1  # per round
    rounds: list[float] = field(default_factory=list)
    all_blocks: list[float] = field(default_factory=list)
    ended_ms: float = -1e30


@dataclass(frozen=True)
class Measurer:
    """Settings of a measuring run.

    Attributes:
        rounds: of every callable, at least.
        spacing_s: wall time between the end of a callable's round and the start of its next; other callables fill it.
        blocks: timed blocks in a round; fewer for callables slower than 20 ms, so that a round stays within about 0.2 s.
        min_block_ms: a block is as many calls as last this long.
        percentile: kept of a round's blocks.
        cap_rounds: rounds at most, for callables whose floor is not confirmed by `rounds` of them.
        threads: for torch, BLAS, OpenMP and Numba while measuring; put back afterwards.
        seed: of the order and the bootstrap.
        progress: called as progress(done, total, name) after each round of a callable; total may grow.
        clock_ns, sleep: the time, for tests.
    """

    rounds: int = 8
    spacing_s: float = 0.3
    blocks: int = 10
    min_block_ms: float = 1.0
    percentile: float = 20
    cap_rounds: int = 24
    threads: int = 1
    seed: int = 0
    progress: Callable[[int, int, str], None] | None = None
    clock_ns: Callable[[], int] = field(default=time.perf_counter_ns, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if not (1 <= self.rounds <= self.cap_rounds and self.blocks >= 1 and self.threads >= 1):
            raise ValueError(
                "Measurer needs 1 <= rounds <= cap_rounds, blocks >= 1 and threads >= 1, got "
                f"rounds={self.rounds}, cap_rounds={self.cap_rounds}, blocks={self.blocks}, threads={self.threads}"
            )
        if not (0 <= self.percentile <= 100 and self.min_block_ms > 0 and self.spacing_s >= 0):
            raise ValueError(
                "Measurer needs percentile in [0, 100], min_block_ms > 0 and spacing_s >= 0, got "
                f"percentile={self.percentile}, min_block_ms={self.min_block_ms}, spacing_s={self.spacing_s}"
            )

    def quick(self) -> Measurer:
        """The same with fewer, shorter and closer rounds (some 10 ms per callable): enough to see which of two kernels is
        faster, not to quote a latency."""
        return replace(self, rounds=3, spacing_s=0.03, blocks=5, min_block_ms=0.4, cap_rounds=6)

    def measure(
        self,
        items: Mapping[str, Callable[[], object]],
        after_round: Mapping[str, Callable[[int], None]] | None = None,
    ) -> dict[str, Measurement]:
        """Time callables against each other.

        Args:
            items: functions of no argument, from a microsecond to seconds each; called many times.
            after_round: by the same names, what to do after each round of the callable, given the number of calls a round is
                made of: more to be measured while the core and the caches are as they are.

        Returns:
            A measurement for each, in the order given.

        Raises:
            MeasurementError: one of them raised; it is named and the cause attached.
        """
        steady_memory()
        work = [_Item(name, call) for name, call in items.items()]
        rng = random.Random(self.seed)
        with threads_at(self.threads), no_garbage_collection():
            for item in work:
                self._warm(item)
            total, done = self.rounds * len(work), 0
            pending = work
            for number in range(self.cap_rounds):
                if number >= self.rounds:
                    pending = [item for item in work if _quality(item.rounds) != "ok"]
                    total += len(pending)
                order = rng.sample(pending, len(pending))
                while order:
                    item = self._next(order)
                    self._round(item)
                    if after_round is not None and item.name in after_round:
                        self._after(item, after_round[item.name])
                    done += 1
                    if self.progress is not None:
                        self.progress(done, total, item.name)
        disagreement = statistics.median(_even_odd(item.rounds) for item in work) if work else 0.0
        return {item.name: self._result(item, disagreement) for item in work}

    def _block(self, item: _Item, calls: int) -> float:
        """ms per call of one block."""
        call, clock = item.call, self.clock_ns
        try:
            start = clock()
            for _ in repeat(None, calls):
                call()
            end = clock()
        except Exception as error:
            raise MeasurementError(
                f'measuring "{item.name}": the call raised {type(error).__name__}: {error}'
            ) from error
        return (end - start) / 1e6 / calls

    def _warm(self, item: _Item) -> None:
        """Compile, find the block size, and call until three consecutive blocks agree."""
        start = self.clock_ns()
        self._block(item, 1)  # compiles
        calls, per_call = 1, self._block(item, 1)
        while per_call * calls < self.min_block_ms:
            # Aim a little beyond, at most tenfold: a first reading may be wrong by more.
            wanted = 1.2 * self.min_block_ms / per_call if per_call > 0 else 10.0 * calls
            calls = min(10 * calls, max(calls + 1, int(wanted) + 1))
            per_call = self._block(item, calls)
        last = [per_call]
        for _ in range(WARM_BLOCKS):
            last = [*last[-2:], self._block(item, calls)]
            steady = len(last) == 3 and max(last) <= (1 + STEADY) * min(last)
            if steady or (self.clock_ns() - start) / 1e6 > WARM_MS:
                break
        fastest = min(last)
        # Anew, because warm calls are faster than those the block was sized by so far.
        item.calls = max(1, math.ceil(self.min_block_ms / fastest)) if fastest > 0 else calls
        item.blocks = max(1, min(self.blocks, int(ROUND_MS / max(fastest * item.calls, 1e-9))))

    def _next(self, order: list[_Item]) -> _Item:
        """Take the first in the order that has waited long enough; sleep only if none has."""
        while True:
            now = self.clock_ns() / 1e6
            for item in order:
                if now - item.ended_ms >= self.spacing_s * 1e3:
                    order.remove(item)
                    return item
            first = min(item.ended_ms for item in order)
            self.sleep(max(0.0, first / 1e3 + self.spacing_s - now / 1e3) + 1e-4)

    def _round(self, item: _Item) -> None:
        if item.calls > 1:
            self._block(item, item.calls)  # not counted: wakes the core and its caches up
        blocks = [self._block(item, item.calls) for _ in range(item.blocks)]
        item.rounds.append(float(np.percentile(blocks, self.percentile)))
        item.all_blocks += blocks
        item.ended_ms = self.clock_ns() / 1e6

    def _after(self, item: _Item, work: Callable[[int], None]) -> None:
        try:
            work(item.calls * item.blocks)
        except Exception as error:
            raise MeasurementError(
                f'measuring "{item.name}": the call raised {type(error).__name__}: {error}'
            ) from error
        item.ended_ms = self.clock_ns() / 1e6

    def _result(self, item: _Item, disagreement: float) -> Measurement:
        rounds = np.asarray(item.rounds)
        floor = float(rounds.min())
        rng = np.random.default_rng(self.seed)
        floors = rng.choice(rounds, (BOOTSTRAPS, rounds.size)).min(axis=1)
        low, high = np.percentile(floors, [5, 95])
        median, p90 = np.percentile(item.all_blocks, [50, 90])
        return Measurement(
            floor_ms=floor,
            lo_ms=float(low) * (1 - min(disagreement, 1.0)),
            hi_ms=float(high) * (1 + disagreement),
            median_ms=float(median),
            p90_ms=float(p90),
            quality=_quality(item.rounds),
            rounds=tuple(item.rounds),
        )


def _quality(rounds: list[float]) -> str:
    near = sum(r <= min(rounds) * (1 + NEAR) for r in rounds)
    return "ok" if near >= 3 else "thin" if near == 2 else "unreached"


def _even_odd(rounds: list[float]) -> float:
    """Relative difference between the floors of the even and of the odd rounds: the same thing measured twice."""
    if len(rounds) < 2 or min(rounds) <= 0:
        return 0.0
    return abs(min(rounds[::2]) - min(rounds[1::2])) / min(rounds)


@functools.cache
def steady_memory() -> None:
    """Let freed memory stay with this process, for good, where the C library is glibc.

    Left to itself glibc gives large blocks back to the system, or keeps them, as it has come to know by what was freed before. Then
    every call of a network gets fresh pages, or none does, and the same conversion to a large tensor takes half or twice as long
    from one process to the next. Long-running processes keep them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: at its largest
    mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Without pauses of Python's garbage collector; put back afterwards."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads_at(count: int) -> Iterator[None]:
    """Every thread pool of this process at `count`, put back afterwards."""
    before = torch.get_num_threads()
    numba = sys.modules.get("numba")
    numba_before = numba.get_num_threads() if numba is not None else 0  # starts its pool, which may reset torch's
    try:
        with threadpool_limits(limits=count):
            torch.set_num_threads(count)
            if numba is not None:
                numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
            yield
    finally:  # after threadpool_limits has put back what it saw, which need not be what torch had
        if numba is not None:
            numba.set_num_threads(numba_before)
        torch.set_num_threads(before)
