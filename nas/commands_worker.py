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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from nas.storage import Storage

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

SHOW_S = 60.0
"""Seconds between two lines on what is going on, where standard error is no terminal."""
_LOOK_S = 2.0
_COPY_S = 1.0
"""Signals so soon after the first, seconds, are the same."""
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
        help="the run's PostgreSQL server, postgresql+psycopg://user@host/db; default: the folder's, or NAS_STORAGE; password: "
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
    from nas.executors.queue_worker import QueueWorker
    from nas.server import server_engine, server_url, shown

    words, told = Words(), _Signals()
    storage = _storage(arguments.run, arguments.storage, words, told)
    name, where = storage.run, shown(server_url(storage.url))
    engine = server_engine(storage.url, name, create=False)
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


def _storage(run: str, asked: str | None, words: Words, told: _Signals) -> Storage:
    """Server and name of the run that RUN names; waits for a folder that is to come.

    Raises:
        ConfigError: no server is named.
        RunError: the run's folder names another.
    """
    from nas.storage import ENVIRONMENT, Storage, is_run, run_storage

    folder = Path(run)
    if not folder.is_dir() and "/" not in run:
        storage = Storage(os.environ.get(ENVIRONMENT, "") if asked is None else asked, run)
    else:
        if not is_run(folder):
            words.say(f"waiting for a run in {folder}; where its folder is not seen, give the run's name in its place")
        while not is_run(folder):
            told.sleep(_LOOK_S)
        storage = run_storage(folder, asked=asked)
        if not storage.url:
            raise ConfigError(
                f"{folder}: expected a run on a PostgreSQL server, which workers can reach; found one in its folder. Begin "
                "another with nas search --storage URL --executor workers"
            )
    if not storage.url:
        raise ConfigError(
            "nas worker: expected the run's PostgreSQL server, got none; give --storage postgresql+psycopg://user@host/database, "
            "or set NAS_STORAGE"
        )
    return storage


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

    One that comes later ends the process as it stands; not a copy of the first, which reaches a worker that is told both by name
    and with its process group (a scheduler's step in a shell, `timeout`).
    """

    def __init__(self) -> None:
        self._worker: Any = None
        self._told_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)

    def tell(self, worker: Any) -> None:
        self._worker = worker

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _told(self, number: int, _: object) -> None:
        if self._worker is None:  # nothing has begun
            sys.exit(0)
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
            self._worker.told_to_end = signal.Signals(number).name
        elif now > self._told_at + _COPY_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


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
