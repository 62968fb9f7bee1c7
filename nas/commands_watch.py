"""Watching a run: `nas dashboard`, which `nas.cli` puts among the other commands, and `nas results --watch`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nas.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

    from nas.run import Run

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

WATCH_S = 3.0
"""Seconds between two looks at a run, or more where a look takes long."""
ROOM = 9
"""Lines of a terminal that the table's frame and notes take."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_commands(add: Add) -> None:
    """Add the commands.

    Args:
        add: makes a command's parser from its name, function and one line of help.
    """
    sub = add("dashboard", _dashboard, "Look at a run in the browser with optuna-dashboard, also while it goes on.")
    sub.add_argument("run", metavar="RUN", help="a run's folder, e.g. runs/quickstart")
    sub.add_argument("--port", metavar="N", type=_port, default=8080, help="default 8080; 0 for any that is free")
    sub.add_argument(
        "--host", metavar="ADDR", default="127.0.0.1", help="address to listen on; default this machine only"
    )
    sub.add_argument(
        "--export",
        metavar="FILE",
        help="instead, write an Optuna storage for other tools: .log (journal) or .db (SQLite, some 30 trials a second)",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text}")
    return int(text)


def _dashboard(arguments: argparse.Namespace) -> None:
    from nas.run import load_run

    run = load_run(arguments.run)
    if arguments.export:
        from nas.dashboard.export import export_study

        count = export_study(run, arguments.export)
        print(f"{count} trials as the Optuna study {run.name!r}: {arguments.export}")
        return
    from nas.dashboard.server import serve

    if arguments.host not in LOOPBACK:
        print(f"nas: whoever reaches {arguments.host} can look at this run; there is no password", file=sys.stderr)
    serve(run, host=arguments.host, port=arguments.port, started=_started)


def _started(address: str) -> None:
    print(f"{address}\nCtrl-C ends it", flush=True)


def watch_results(run: Run, limit: int | None = None, console: Console | None = None, every_s: float = WATCH_S) -> None:
    """Show the table of a run's last trials again and again, until the run is finished or Ctrl-C.

    Args:
        run: the run.
        limit: rows of the table; default what the terminal has room for.
        console: where to; default standard output.
        every_s: least seconds between two looks.

    Raises:
        RunError: standard output is no terminal.
    """
    from rich.console import Console
    from rich.live import Live

    from nas.report.sheet import to_rich
    from nas.report.tables import results_sheet

    console = console or Console()
    if not console.is_terminal:
        raise RunError("--watch: expected a terminal to show the table in; without --watch it is printed once")
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                began = time.monotonic()
                finished = run.finished  # asked first: what comes after is then complete
                frame = run.frame()
                states = ", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items())
                title = f"{run.name}: {states or 'no trial yet'}" + ("; finished" if finished else "")
                rows = limit or max(1, console.height - ROOM)
                sheet = results_sheet(frame, run.objectives, limit=rows, title=title)
                live.update(to_rich(sheet, console.width), refresh=True)
                if finished:
                    return
                time.sleep(max(every_s, 4 * (time.monotonic() - began)))
        except KeyboardInterrupt:
            return
