"""What a running search shows: a live display on a terminal, a plain line now and then elsewhere.

`SearchProgress` is told what happens and never asks; it holds no result anybody else needs. It writes to standard error, so
that standard output carries results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nas.report.stage_progress import StageTally
from nas.report.tables import last_line
from nas.report.tally import Tally

if TYPE_CHECKING:
    from nas.store import Trial


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
