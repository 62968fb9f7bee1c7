"""What a running search shows: a live display on a terminal, a plain line now and then elsewhere.

`SearchProgress` is told what happens and never asks; it holds no result anybody else needs. It writes to standard error, so
that standard output carries results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nas.objectives import objective_values
from nas.report.pace import GrowingFront, Pace
from nas.report.stage_progress import StageTally
from nas.report.tables import last_line
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


class Listener(Protocol):
    """Who else wants to know what becomes of trials and supernets, e.g. `nas.tensorboard.TensorBoard`."""

    def trial_progress(self, trial: Trial, info: Mapping[str, Any]) -> None: ...
    def trial_finished(self, trial: Trial) -> None: ...
    def stage_progress(self, job: str, info: Mapping[str, Any]) -> None: ...


class SearchProgress:
    """Shows a search while it runs; use it as a context.

    Args:
        total_by_searcher: trials each searcher is to have.
        objectives: metric -> "max" or "min".
        quiet: show nothing at all.
        console: where to; default standard error.
        every_s: off a terminal, seconds between two lines.
        clock: seconds, monotonic.
        also: is told of trials and supernets, too, until it raises an OSError.
    """

    def __init__(
        self,
        total_by_searcher: Mapping[str, int],
        objectives: Mapping[str, str],
        *,
        quiet: bool = False,
        console: Console | None = None,
        every_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        also: Listener | None = None,
    ) -> None:
        self.tally = Tally(total_by_searcher, objectives, clock)
        self._also = also
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._every_s = every_s
        self._clock = clock
        self._last = clock()
        self._live: Live | None = None
        self._stage: StageTally | None = None

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif not self._quiet and any(self.tally.done.values()):
            self._print(self.tally.line())

    def already(self, trials: Iterable[Trial]) -> None:
        """Count what an earlier process finished, before anything else is told."""
        for trial in trials:
            if trial.state in self.tally.states:
                self.tally.finished(trial, earlier=True)

    def trial_started(self, trial: Trial) -> None:
        """A trial runs (again)."""
        self.tally.started(trial)
        self._tick()

    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None:
        """A trial says how far it is: {"epoch", "epochs"} or {"stage"}."""
        self.tally.progressed(trial, info)
        self._tell("trial_progress", trial, info)
        self._tick()

    def trial_lost(self, trial: Trial) -> None:
        """The process or node that a trial ran on died; the trial may start again."""
        self.tally.attempt_lost(trial)
        self._tick()

    def workers(self, busy: int, capacity: int) -> None:
        """How many trials are being evaluated, and how many could be at a time; to be told when either changes, or as often as
        one likes: that keeps the lines coming where nothing else happens."""
        waited = self.tally.waiting()
        self.tally.workers(busy, capacity)
        self._tick(now=self.tally.waiting() != waited)

    def trial_finished(self, trial: Trial) -> None:
        """A trial is complete, infeasible, stopped or failed."""
        self.tally.finished(trial)
        self._tell("trial_finished", trial)
        if trial.state == "failed" and trial.copy_of is None:
            self.message(f"trial {trial.trial} failed: {last_line(trial.error)}")
        self._tick()

    def expect(self, total_by_searcher: Mapping[str, int]) -> None:
        """The trials each searcher is to have, where that is known only now."""
        self.tally.totals = {**self.tally.totals, **total_by_searcher}
        self.tally.done = dict.fromkeys(self.tally.totals, 0) | self.tally.done

    def stage_started(self, jobs: Mapping[str, bool]) -> None:
        """Supernets are trained before the trials: name -> whether an earlier process finished it."""
        self._stage = StageTally(jobs, self._clock)
        self._tick()

    def stage_progress(self, job: str, info: Mapping[str, Any]) -> None:
        """A supernet says how far it is: {"phase", "epoch", "epochs", "done", "accuracy"}."""
        if self._stage is not None:
            self._stage.progressed(job, info)
        self._tell("stage_progress", job, info)
        self._tick()

    def stage_finished(self, job: str, *, failed: bool = False) -> None:
        """A supernet is trained, or will not be."""
        if self._stage is not None:
            self._stage.finished(job, failed=failed)
        self._tick()

    def stage_ended(self) -> None:
        """No supernet is trained any more; the trials begin."""
        if self._stage is not None and self._live is None:
            self.message(self._stage.line())
        self._stage = None
        self.tally.restart_clock()

    def message(self, text: str) -> None:
        """Say something that stays on the screen."""
        if not self._quiet:
            self._print(text)

    def _tell(self, what: str, *args: Any) -> None:
        """Tell whoever listens; a search does not end because its listener cannot write."""
        try:
            if self._also is not None:
                getattr(self._also, what)(*args)
        except OSError as error:
            listener = type(self._also).__name__
            self._also = None
            self.message(f"{listener} gets nothing more in this start: {error}")

    def _tick(self, *, now: bool = False) -> None:
        if self._live is None and not self._quiet and (now or self._clock() - self._last >= self._every_s):
            self._last = self._clock()
            self._print(self._stage.line() if self._stage is not None else self.tally.line())

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> Group:
        if self._stage is not None:
            return Group(self._stage.bars())
        tally = self.tally
        bars = Table.grid(padding=(0, 2))
        for name, total in tally.totals.items():
            done = tally.done[name]
            bars.add_row(Text(name), ProgressBar(max(total, 1), done, width=32), Text(f"{done}/{total}"))
        lines: list[Any] = [bars, Text(tally.outcome())]
        if tally.running:
            lines.append(Text(f"running: {tally.under_way()}", style="dim", overflow="ellipsis", no_wrap=True))
        lines.append(Text(tally.speed(), style="dim"))
        return Group(*lines)
