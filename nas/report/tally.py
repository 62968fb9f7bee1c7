"""What is known of a running search: counts, best, front, rate and time left, and the words for them. No output; see `Tally`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from nas.objectives import objective_values
from nas.report.pace import GrowingFront, Pace
from nas.report.units import digits, duration, show
from nas.schema import FINAL_STATES

if TYPE_CHECKING:
    from nas.store import Trial

MAX_RUNNING_SHOWN = 6


class Tally:
    """What is known of a search so far; no output. A finish costs O(front), everything else O(1), however many trials there are.

    Args:
        total_by_searcher: trials each searcher is to have.
        objectives: metric -> "max" or "min"; the best trial is the best by the first, then by the others.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_by_searcher: Mapping[str, int],
        objectives: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.totals = dict(total_by_searcher)
        self.objectives = dict(objectives)
        self.done = dict.fromkeys(self.totals, 0)
        self.states: dict[str, int] = dict.fromkeys(FINAL_STATES, 0)
        self.lost = 0
        self.busy = 0
        self.capacity: int | None = None  # not known until the first `workers`
        self.running: dict[int, tuple[Trial, Mapping[str, Any]]] = {}
        self.best: Trial | None = None
        self.front = GrowingFront(self.objectives)
        self._clock = clock
        self._began = clock()
        self._pace = Pace(clock)
        self._best_cost: tuple[float, ...] = ()

    def started(self, trial: Trial) -> None:
        self.running[trial.trial] = (trial, {})

    def progressed(self, trial: Trial, info: Mapping[str, Any]) -> None:
        self.running[trial.trial] = (trial, info)

    def attempt_lost(self, trial: Trial) -> None:
        """The process or node that a trial ran on died; the trial may start again."""
        self.running.pop(trial.trial, None)
        self.lost += 1

    def workers(self, busy: int, capacity: int) -> None:
        """How many trials are being evaluated, and how many could be at a time."""
        self.busy, self.capacity = busy, capacity
        self._pace.workers(capacity)

    def finished(self, trial: Trial, *, earlier: bool = False) -> None:
        """Count a finished trial; `earlier` ones were finished before this process began and say nothing of its speed."""
        self.running.pop(trial.trial, None)
        self.done[trial.searcher] = self.done.get(trial.searcher, 0) + 1
        self.totals.setdefault(trial.searcher, 0)
        self.states[trial.state] = self.states.get(trial.state, 0) + 1
        if not earlier:
            self._pace.finished()
        if trial.state == "complete":
            self._rank(trial)

    def restart_clock(self) -> None:
        """Trials begin only now: what was before says nothing of their speed."""
        self._began = self._clock()
        self._pace = Pace(self._clock)
        if self.capacity is not None:
            self._pace.workers(self.capacity)

    def seconds(self) -> float:
        """Since the search was started or continued."""
        return self._clock() - self._began

    def rate(self) -> float:
        """Trials finished per second, lately and with the workers that there are now; 0.0 before the first and without workers."""
        return self._pace.per_worker() * self._hands(self._left())

    def seconds_left(self) -> float | None:
        """At this rate; None before the first finished trial, and where no worker is there."""
        rate = self.rate()
        return self._left() / rate if rate > 0 else None

    def waiting(self) -> bool:
        """Whether there is nobody to evaluate trials."""
        return self.capacity == 0

    def line(self) -> str:
        """Everything in one line."""
        done, total = sum(self.done.values()), sum(self.totals.values())
        each = ", ".join(f"{name} {self.done[name]}/{self.totals[name]}" for name in self.totals)
        parts = [f"{done}/{total} trials ({each})", self.outcome(), self.speed()]
        return "; ".join(part for part in parts if part)

    def outcome(self) -> str:
        """Best so far, size of the front, and what became of the other trials."""
        if self.best is None:
            parts = ["no feasible trial yet"]
        else:
            values = [f"{metric} {show(metric, self.best.metrics.get(metric))}" for metric in self.objectives]
            if "nnz" not in self.objectives and self.best.metrics.get("nnz") is not None:
                values.append(f"nnz {show('nnz', self.best.metrics['nnz'])}")
            parts = [f"best: trial {self.best.trial}, {', '.join(values)}", f"front of {len(self.front)}"]
        said = {"stopped": "stopped early", "infeasible": "infeasible", "failed": "failed"}
        parts += [f"{self.states[state]:,} {word}" for state, word in said.items() if self.states[state]]
        if self.lost:
            parts.append(f"{self.lost:,} attempt{'s' if self.lost != 1 else ''} lost")
        return ", ".join(parts)

    def speed(self) -> str:
        """Workers, rate and time left."""
        parts = []
        if self.waiting():
            parts.append("waiting for workers" + (f" ({self.busy:,} trials wait with them)" if self.busy else ""))
        elif self.capacity is not None:
            plural = "" if self.busy == 1 else "s"
            parts.append(f"{self.busy:,} worker{plural} busy, {max(0, self.capacity - self.busy):,} free")
        rate, left = self.rate(), self.seconds_left()
        if rate > 0:
            parts.append(f"{digits(rate * 60, 2)} trials/min")
        parts.append(f"{duration(self.seconds())} spent")
        if left:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def under_way(self) -> str:
        """The trials that run longest and how far each is."""
        shown = []
        for trial, info in list(islice(self.running.values(), MAX_RUNNING_SHOWN)):
            text = f"{trial.trial} {trial.searcher}"
            if info.get("epoch") is not None:
                text += f" epoch {info['epoch']}" + (f"/{info['epochs']}" if info.get("epochs") else "")
            elif info.get("stage"):
                text += f" {info['stage']}"
            shown.append(text)
        more = len(self.running) - len(shown)
        return " · ".join(shown) + (f" · {more:,} more" if more > 0 else "")

    def _left(self) -> int:
        return sum(max(0, total - self.done[name]) for name, total in self.totals.items())

    def _hands(self, left: int) -> int:
        """Workers that the trials that are left will keep busy; counted as one where nobody said how many there are."""
        return 1 if self.capacity is None else min(self.capacity, max(left, 1))

    def _rank(self, trial: Trial) -> None:
        values = objective_values(trial.metrics, self.objectives)
        if values is None:
            return
        cost = self.front.cost(values)
        if trial.copy_of is None:
            self.front.add(cost)
        if self.best is None or cost < self._best_cost:
            self.best, self._best_cost = trial, cost
