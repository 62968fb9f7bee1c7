"""How fast a search goes, and its front as it grows: what the display of a running search counts, cheap for many trials.

`Pace` says how fast trials finish lately; `GrowingFront` is the Pareto front of what has finished. No output.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from nas.pareto import normalise_directions

WINDOW_S = 600.0
"""The window reaches back at least so far, ..."""
WINDOW_FINISHES = 50
"""... over at least so many finished trials, ..."""
WINDOW_ROUNDS = 2
"""... and over so many per worker: trials that begin together end together, and a window within one round would show a burst."""
BIN_S = 5.0


class Pace:
    """Trials that a worker finishes per second, lately.

    Counted per second of a worker, not of the clock: workers come and go on a cluster, and what ten of them did an hour ago says
    how fast a thousand are now. Time without workers does not count.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers = 1
        self._since = clock()
        self._worked = 0.0  # worker-seconds up to `_since`
        self._bins: deque[tuple[float, float]] = deque([(self._since, 0.0)])  # (when a bin began, worker-seconds then)
        self._counts: deque[int] = deque([0])
        self._counted = 0

    def workers(self, count: int) -> None:
        """So many there are from now on; one, until this is called."""
        if count != self._workers:
            self._since, self._worked = self._clock(), self._now()
            self._workers = count

    def finished(self) -> None:
        """A trial finished."""
        self._counts[-1] += 1
        self._counted += 1
        now = self._clock()
        if now - self._bins[-1][0] >= BIN_S:
            self._bins.append((now, self._now()))
            self._counts.append(0)
            least = max(WINDOW_FINISHES, WINDOW_ROUNDS * self._workers)
            while now - self._bins[1][0] >= WINDOW_S and self._counted - self._counts[0] >= least:
                self._bins.popleft()
                self._counted -= self._counts.popleft()

    def per_worker(self) -> float:
        """Trials per second and worker over the window; 0.0 before the first."""
        worked = self._now() - self._bins[0][1]
        return self._counted / worked if worked > 0 else 0.0

    def _now(self) -> float:
        return self._worked + (self._clock() - self._since) * self._workers


class GrowingFront:
    """The values that no other dominates, one at a time; equal values are all on it, as in `nas.pareto.nondominated`.

    Args:
        objectives: metric -> "max" or "min".
    """

    def __init__(self, objectives: Mapping[str, str]) -> None:
        self._signs = tuple(float(sign) for sign in normalise_directions(objectives))
        self._rows = np.empty((16, len(self._signs)))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def cost(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The same values, each to be minimised."""
        return tuple(sign * value for sign, value in zip(self._signs, values, strict=True))

    def add(self, cost: tuple[float, ...]) -> bool:
        """Put a point (from `cost`) on the front if nothing there dominates it; O(size of the front).

        Returns:
            Whether it is on it now.
        """
        new, rows = np.array(cost), self._rows[: self._count]
        smaller, greater = (rows < new).any(axis=1), (rows > new).any(axis=1)
        if (smaller & ~greater).any():
            return False
        worse = greater & ~smaller
        if worse.any():
            kept = rows[~worse]
            self._count = len(kept)
            self._rows[: self._count] = kept
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._count] = new
        self._count += 1
        return True
