"""The commands that watch a run: `nas dashboard`. `nas.cli` puts them among the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

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
        help="instead, write an Optuna storage for other tools: .db (SQLite) or .log (journal)",
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
