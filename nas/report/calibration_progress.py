"""How far a calibration is: a bar on a terminal, a line now and then elsewhere; on standard error.

Nothing is drawn by a thread of its own, which would disturb what is being measured: only `update` draws, between measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from nas.report.units import duration


class CalibrationProgress:
    """Shows a calibration while it runs; use it as a context.

    Args:
        budget_s: seconds it may take.
        quiet: show nothing.
        console: where to; default standard error.
        every_s: least time between two drawings on a terminal; off it, sixty times as long.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        budget_s: float,
        *,
        quiet: bool = False,
        console: Console | None = None,
        every_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_s = budget_s
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._every_s = every_s if self._console.is_terminal else 60 * every_s
        self._clock = clock
        self._last = -float("inf")
        self._bar = Progress(
            TextColumn("{task.fields[spent]}"),
            BarColumn(bar_width=32),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("beginning", total=budget_s, spent="")

    def __enter__(self) -> CalibrationProgress:
        if self._console.is_terminal and not self._quiet:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal and not self._quiet:
            self._bar.stop()

    def update(self, done_s: float, budget_s: float, text: str) -> None:
        """So many seconds of the budget are spent, and this is being done."""
        if self._quiet or self._clock() - self._last < self._every_s:
            return
        self._last = self._clock()
        spent = f"{duration(min(done_s, budget_s))} of {duration(budget_s)}"
        if self._console.is_terminal:
            done = min(done_s, budget_s)
            self._bar.update(self._task, completed=done, total=budget_s, description=escape(text), spent=spent)
            self._bar.refresh()
        else:
            self._console.print(Text(f"{spent}: {text}"), soft_wrap=True)
