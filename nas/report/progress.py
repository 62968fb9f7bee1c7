"""What a running search shows: a live display on a terminal, a plain line now and then elsewhere.

`SearchProgress` is told what happens and never asks; it holds no result anybody else needs. It writes to standard error, so
that standard output carries results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nas.objectives import objective_values
from nas.pareto import nondominated
from nas.report.stage_progress import StageTally
from nas.report.tables import last_line
from nas.report.units import digits, duration, show

if TYPE_CHECKING:
    from nas.store import Trial

MAX_RUNNING_SHOWN = 6


class Tally:
    """What is known of a search so far; no output.

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
        self.states: dict[str, int] = {"complete": 0, "infeasible": 0, "failed": 0}
        self.running: dict[int, tuple[Trial, Mapping[str, Any]]] = {}
        self.best: Trial | None = None
        self.front: list[tuple[float, ...]] = []
        self._clock = clock
        self._began = clock()
        self._here = 0

    def started(self, trial: Trial) -> None:
        self.running[trial.trial] = (trial, {})

    def progressed(self, trial: Trial, info: Mapping[str, Any]) -> None:
        self.running[trial.trial] = (trial, info)

    def finished(self, trial: Trial, *, earlier: bool = False) -> None:
        """Count a finished trial; `earlier` ones were finished before this process began and say nothing of its speed."""
        self.running.pop(trial.trial, None)
        self.done[trial.searcher] = self.done.get(trial.searcher, 0) + 1
        self.totals.setdefault(trial.searcher, 0)
        self.states[trial.state] = self.states.get(trial.state, 0) + 1
        self._here += not earlier
        if trial.state == "complete":
            self._rank(trial)

    def restart_clock(self) -> None:
        """Trials begin only now: what was before says nothing of their speed."""
        self._began = self._clock()

    def seconds(self) -> float:
        """Since the search was started or continued."""
        return self._clock() - self._began

    def rate(self) -> float:
        """Trials finished per second since then; 0.0 before the first."""
        seconds = self.seconds()
        return self._here / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float | None:
        """At this rate; None before the first finished trial."""
        left = sum(max(0, self.totals[name] - self.done[name]) for name in self.totals)
        return left / self.rate() if self.rate() > 0 else None

    def line(self) -> str:
        """Everything in one line."""
        done, total = sum(self.done.values()), sum(self.totals.values())
        each = ", ".join(f"{name} {self.done[name]}/{self.totals[name]}" for name in self.totals)
        parts = [f"{done}/{total} trials ({each})", self.outcome(), self.speed()]
        return "; ".join(part for part in parts if part)

    def outcome(self) -> str:
        """Best so far, size of the front, and what went wrong."""
        if self.best is None:
            parts = ["no feasible trial yet"]
        else:
            values = [f"{metric} {show(metric, self.best.metrics.get(metric))}" for metric in self.objectives]
            if "nnz" not in self.objectives and self.best.metrics.get("nnz") is not None:
                values.append(f"nnz {show('nnz', self.best.metrics['nnz'])}")
            parts = [f"best: trial {self.best.trial}, {', '.join(values)}", f"front of {len(self.front)}"]
        parts += [f"{self.states[state]} {state}" for state in ("infeasible", "failed") if self.states[state]]
        return ", ".join(parts)

    def speed(self) -> str:
        """Rate and time left."""
        if self.rate() <= 0:
            return f"{duration(self.seconds())} spent"
        per_minute = digits(self.rate() * 60, 2)
        left = self.seconds_left()
        rest = f", about {duration(left)} left" if left else ""
        return f"{per_minute} trials/min, {duration(self.seconds())} spent{rest}"

    def under_way(self) -> str:
        """The running trials and how far each is."""
        shown = []
        for trial, info in list(self.running.values())[:MAX_RUNNING_SHOWN]:
            text = f"{trial.trial} {trial.searcher}"
            if info.get("epoch") is not None:
                text += f" epoch {info['epoch']}" + (f"/{info['epochs']}" if info.get("epochs") else "")
            elif info.get("stage"):
                text += f" {info['stage']}"
            shown.append(text)
        more = len(self.running) - len(shown)
        return " · ".join(shown) + (f" · {more} more" if more > 0 else "")

    def _rank(self, trial: Trial) -> None:
        values = objective_values(trial.metrics, self.objectives)
        if values is None:
            return
        if trial.copy_of is None and values not in self.front:
            points = [*self.front, values]
            self.front = [p for p, kept in zip(points, nondominated(points, self.objectives), strict=True) if kept]
        if self.best is None or self._cost(values) < self._cost(objective_values(self.best.metrics, self.objectives)):
            self.best = trial

    def _cost(self, values: tuple[float, ...] | None) -> tuple[float, ...]:
        signs = [-1.0 if direction == "max" else 1.0 for direction in self.objectives.values()]
        return tuple(sign * value for sign, value in zip(signs, values or (), strict=False))


class SearchProgress:
    """Shows a search while it runs; use it as a context.

    Args:
        total_by_searcher: trials each searcher is to have.
        objectives: metric -> "max" or "min".
        quiet: show nothing at all.
        console: where to; default standard error.
        every_s: off a terminal, seconds between two lines.
        clock: seconds, monotonic.
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
    ) -> None:
        self.tally = Tally(total_by_searcher, objectives, clock)
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
        self._tick()

    def trial_finished(self, trial: Trial) -> None:
        """A trial is complete, infeasible or failed."""
        self.tally.finished(trial)
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

    def _tick(self) -> None:
        if self._live is None and not self._quiet and self._clock() - self._last >= self._every_s:
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
