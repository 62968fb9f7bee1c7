"""A burst of calls and its low percentile. Needs numpy alone, so that an engine in an environment of its own can use it.

Start with `InProcess`; the rest of the protocol is in `protocol`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

__all__ = ["InProcess", "Settings"]

GROUP_S = 25e-6  # a look at the clock costs some 50 ns: shorter calls are timed in groups of at least this length


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds, cap_rounds: at least and at most, for each contender.
        burst_ms: timed calls per burst last this long (one call, where that is longer).
        warm_ms: untimed calls before them; at least one.
        percentile: of the calls of a burst.
        settle_s: wait before each turn, for the spinning threads of the engine before; 0 for one thread.
    """

    rounds: int = 8
    cap_rounds: int = 16
    burst_ms: float = 4.0
    warm_ms: float = 1.0
    percentile: float = 10.0
    settle_s: float = 0.0


class InProcess:
    """Times a function of no argument.

    Args:
        call: one inference.
        clock: seconds; for tests.
    """

    def __init__(self, call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> None:
        self.call, self.clock = call, clock
        self.group = 1  # calls between two looks at the clock

    def burst(self, settings: Settings) -> float:
        """Seconds of one call: the low percentile of a burst."""
        call, clock, group = self.call, self.clock, self.group
        begin = clock()
        while True:
            call()
            if (clock() - begin) * 1e3 >= settings.warm_ms:
                break
        times: list[float] = []
        end = clock() + settings.burst_ms / 1e3
        while True:
            start = clock()
            for _ in repeat(None, group):
                call()
            stop = clock()
            times.append((stop - start) / group)
            if stop >= end:
                break
        per_call = min(times)
        self.group = max(1, min(1000, math.ceil(GROUP_S / per_call))) if per_call > 0 else 1
        return float(np.percentile(times, settings.percentile))
