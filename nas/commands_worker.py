"""The command `nas worker`: a process that takes trials of a run from its PostgreSQL database and computes them, anywhere.

What it does is `nas.executors.queue_worker`; here are its arguments, its signals and its words on standard error.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import ConfigError, RunError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

SHOW_S = 60.0
"""Seconds between two lines on what is going on, where standard error is no terminal."""
_LOOK_S = 2.0
_SOON = ("starting up", "too many clients", "connection slots", "shutting down")
"""What a server says that will take connections in a moment."""


def add_worker(add: Add) -> None:
    """Add the command.

    Args:
        add: makes a command's parser from its name, function and one line of help.
    """
    sub = add(
        "worker", _worker, "Compute trials of a run that nas search drives with --executor workers; on any machine."
    )
    sub.add_argument("run", metavar="RUN", help="the run's name, or its folder if this machine sees it")
    sub.add_argument(
        "--storage",
        metavar="URL",
        help="the run's PostgreSQL server, e.g. postgresql+psycopg://user@host/db; default NAS_STORAGE; leave the password to "
        "~/.pgpass or PGPASSWORD",
    )
    sub.add_argument("--slots", metavar="N", type=_positive, default=1, help="trials at a time; default 1")
    sub.add_argument("--threads", metavar="N", type=_positive, help="CPU threads per trial; default the run file's")
    sub.add_argument("--idle-exit", metavar="S", type=_seconds, help="end after so long without work; default: stay")
    sub.add_argument(
        "--patience",
        metavar="S",
        type=_seconds,
        default=600.0,
        help="end after so long without the database; default 600",
    )
    sub.add_argument(
        "--scratch", metavar="DIR", type=Path, help="for files, where the run's folder is not seen; default TMPDIR"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return value


def _worker(arguments: argparse.Namespace) -> None:
    from nas.database import server_engine, server_url
    from nas.executors.queue_worker import QueueWorker

    storage = os.environ.get("NAS_STORAGE", "") if arguments.storage is None else arguments.storage
    if not storage:
        raise ConfigError(
            "nas worker: expected the run's PostgreSQL server, got none; give --storage postgresql+psycopg://user@host/database, "
            "or set NAS_STORAGE"
        )
    words = Words()
    told = _Signals()
    name = _run_name(arguments.run, words, told)
    engine, where = server_engine(storage, name, create=False), server_url(storage).render_as_string()
    _connect(engine, where, words, told)
    worker = QueueWorker(
        engine,
        where,
        slots=arguments.slots,
        threads=arguments.threads,
        idle_exit_s=arguments.idle_exit,
        patience_s=arguments.patience,
        scratch=arguments.scratch,
        say=words.say,
        show=words.show,
    )
    told.tell(worker)
    words.say(f"process {os.getpid()} computes trials of the run {name!r} in {where}")
    words.say(f"ends: {worker.run()}")


def _run_name(run: str, words: Words, told: _Signals) -> str:
    """The run that RUN names; waits for one whose folder is to come."""
    folder = Path(run)
    if not folder.is_dir() and "/" not in run:
        return run
    config = folder / "config.toml"
    if not config.is_file():
        words.say(f"waiting for {config}; where the run's folder is not seen, give the run's name in its place")
    while not config.is_file():
        told.sleep(_LOOK_S)
    try:
        name = tomllib.loads(config.read_text())["run"]["name"]
        return str(name or folder.resolve().name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{config}: damaged ({error}); give the run's name in place of its folder") from error


def _connect(engine: Engine, where: str, words: Words, told: _Signals) -> None:
    """See that the database can be reached; what is wrong with the URL or the password is said now.

    Raises:
        RunError: it cannot.
    """
    from sqlalchemy.exc import DBAPIError

    from nas.database import explain

    while True:
        try:
            engine.connect().close()
            return
        except DBAPIError as error:
            if not any(text in str(error) for text in _SOON):
                raise explain(error, where) from error
            words.say(f"{' '.join(str(explain(error, where)).split())}; trying again")
        told.sleep(_LOOK_S)


class _Signals:
    """SIGTERM (a scheduler that wants the machine back) and Ctrl-C: what is being computed is handed back, and the end is in order.

    A second one ends the process as it stands.
    """

    def __init__(self) -> None:
        self._worker: Any = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)

    def tell(self, worker: Any) -> None:
        self._worker = worker

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _told(self, number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self._worker is None:  # nothing has begun
            sys.exit(0)
        self._worker.told_to_end = signal.Signals(number).name


class Words:
    """Standard error: a line with the time for what happens, and on a terminal one that changes for what is going on."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._shown = ""

    def say(self, text: str) -> None:
        """One line."""
        self._clear()
        print(f"{time.strftime('%H:%M:%S')} {' '.join(text.split())}", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """What is going on, "" for nothing: on a terminal in place of the last one, else a line a minute."""
        now = time.monotonic()
        if self._terminal:
            if text != self._shown:
                self._clear()
                self._shown = text
                print(f"\r{text[:120]}", end="", file=sys.stderr, flush=True)
        elif not text:
            self._shown_at = now
        elif now > self._shown_at + SHOW_S:
            self._shown_at = now
            self.say(text)

    def _clear(self) -> None:
        if self._shown:
            print("\r" + " " * min(120, len(self._shown)) + "\r", end="", file=sys.stderr, flush=True)
            self._shown = ""
