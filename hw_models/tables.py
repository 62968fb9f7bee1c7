"""Remembered times of single operations: a table in the user's cache folder, shared by all processes of a machine.

Rows are only ever added. A row holds for one runtime (machine, kernels, libraries, threads: `hw_models.device.runtime_id`),
one operation (`PlannedOp.key`) and one kernel. It is a cache: deleting the file loses nothing but measuring time.

Start with `LayerTable().lookup(...)` and `.add(...)`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from hw_models.measure import Measurement

__all__ = ["LayerTable", "TableError", "cache_folder"]

FILE = "layers.v1.sqlite"  # another version, another file: old and new releases can work side by side
BUSY_S = 20.0
_QUALITY = ("ok", "thin", "unreached")  # best first
_SCHEMA = """
CREATE TABLE IF NOT EXISTS layer (
    id INTEGER PRIMARY KEY, runtime TEXT NOT NULL, op TEXT NOT NULL, kernel TEXT NOT NULL,
    floor_ms REAL NOT NULL, lo_ms REAL NOT NULL, hi_ms REAL NOT NULL, median_ms REAL NOT NULL, p90_ms REAL NOT NULL,
    quality TEXT NOT NULL, rounds_ms TEXT NOT NULL, measured_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS layer_by_op ON layer (runtime, op, kernel);
"""


class TableError(RuntimeError):
    """The table's file cannot be used; says why and what to do."""


def cache_folder() -> Path:
    """Where measurements are remembered: $NAS_CACHE_DIR, or the user's cache folder for this project."""
    return Path(os.environ.get("NAS_CACHE_DIR") or platformdirs.user_cache_dir("sparse-nas", appauthor=False))


class LayerTable:
    """Times by runtime, operation and kernel.

    Args:
        path: SQLite file, made if missing. Default: `layers.v1.sqlite` in `cache_folder()`, which never stops anybody, only warns
            once: a damaged file is moved aside (`layers.v1.sqlite.damaged`) and a new one begun; if it cannot be written, stays
            locked or cannot be moved, the table lives in memory, for this process.

    Raises:
        TableError: a file given by `path` is damaged, no SQLite file, stays locked, or cannot be written; it is left alone.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._explicit = path is not None
        self.path: Path | None = Path(path) if path is not None else cache_folder() / FILE
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._file: tuple[int, int] | None = None
        self._moved = False
        self._open()

    def lookup(self, runtime: str, op: str, kernel: str) -> Measurement | None:
        """The best-confirmed measurement of an operation, the latest of several; None if there is none.

        Args:
            runtime: `runtime_id(threads)`.
            op: `PlannedOp.key`.
            kernel: "torch", "csr", ...
        """
        order = " ".join(f"WHEN '{quality}' THEN {i}" for i, quality in enumerate(_QUALITY))
        query = (
            "SELECT floor_ms, lo_ms, hi_ms, median_ms, p90_ms, quality, rounds_ms FROM layer "
            f"WHERE runtime = ? AND op = ? AND kernel = ? ORDER BY CASE quality {order} ELSE 9 END, id DESC LIMIT 1"
        )
        row = self._do(lambda db: db.execute(query, (runtime, op, kernel)).fetchone())
        try:
            return None if row is None else _measurement(row)
        except (ValueError, TypeError):  # not written by this module; measuring again adds a row that is preferred
            return None

    def add(self, runtime: str, rows: Iterable[tuple[str, str, Measurement]]) -> None:
        """Remember measurements, all or none.

        Args:
            runtime: `runtime_id(threads)`.
            rows: (operation key, kernel, measurement).
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        packed = [
            (
                runtime,
                op,
                kernel,
                m.floor_ms,
                m.lo_ms,
                m.hi_ms,
                m.median_ms,
                m.p90_ms,
                m.quality,
                json.dumps(m.rounds),
                now,
            )
            for op, kernel, m in rows
        ]
        columns = "runtime, op, kernel, floor_ms, lo_ms, hi_ms, median_ms, p90_ms, quality, rounds_ms, measured_at"
        insert = f"INSERT INTO layer ({columns}) VALUES ({', '.join('?' * 11)})"

        def write(db: sqlite3.Connection) -> None:
            with db:
                db.executemany(insert, packed)

        self._do(write)

    def __len__(self) -> int:
        return int(self._do(lambda db: db.execute("SELECT COUNT(*) FROM layer").fetchone()[0]))

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None and self._owner == os.getpid():
            self._connection.close()
        self._connection = None

    def _open(self) -> None:
        while self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _identity(self.path)
                self._connection = _connected(self.path)
                self._file = _identity(self.path)
                self._owner = os.getpid()
                return
            except (OSError, sqlite3.Error) as error:
                if not self._do_without(error):
                    raise self._error(error) from error
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)
        self._owner = os.getpid()

    def _do(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """The result of one statement or transaction, in the file or in what takes its place."""
        while True:
            if self._connection is None or self._owner != os.getpid():  # closed, or this is a forked child
                self._connection = None
                self._open()
            assert self._connection is not None
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                if not self._do_without(error):
                    raise self._error(error) from error

    def _do_without(self, error: Exception) -> bool:
        """After a fault of the user's cache: leave the file, so that the next `_open` finds a new one or takes the memory."""
        if self._explicit or self.path is None or not (_damaged(error) or _unwritable(error) or _locked(error)):
            return False
        with suppress(sqlite3.Error):
            self.close()
        where = self.path
        if _damaged(error) and not self._moved:
            self._moved = True
            if _identity(where) != self._file:  # another process has moved it already
                return True
            aside = where.with_name(f"{where.name}.damaged")
            with suppress(OSError):
                _move(where, aside)
                _warn_once(
                    f"the table of layer times {where} is damaged ({error}); it was moved to {aside.name}, "
                    "and the times are measured again"
                )
                return True
        self.path = None
        _warn_once(
            f"measured layer times cannot be kept in {where} ({error}); they live in memory and are measured again next time. "
            "Set NAS_CACHE_DIR to a folder that can be written"
        )
        return True

    def _error(self, error: Exception) -> TableError:
        text = str(error)
        if _locked(error):
            cure = f"another process has held it for {BUSY_S:.0f} s; end that process, or use another NAS_CACHE_DIR"
        elif _unwritable(error):
            cure = "choose a folder that can be written and has room"
        else:
            cure = "delete it to start afresh (it holds nothing but times that can be measured again), or use another NAS_CACHE_DIR"
        return TableError(f"the table of layer times {self.path} cannot be used: {text}; {cure}")


def _measurement(row: Sequence[Any]) -> Measurement:
    """From floor_ms, lo_ms, hi_ms, median_ms, p90_ms, quality, rounds_ms as JSON."""
    floor, lo, hi, median, p90, quality, rounds = row[:7]
    return Measurement(floor, lo, hi, median, p90, quality, tuple(json.loads(rounds)))


def _connected(path: Path) -> sqlite3.Connection:
    """An open, writable table. Several processes may be doing this at the same moment."""
    deadline = time.monotonic() + BUSY_S
    while True:
        db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")  # does not wait for others by itself, hence the loop
            db.execute("PRAGMA synchronous=NORMAL")
            if db.execute("SELECT COUNT(*) FROM sqlite_master WHERE name LIKE 'layer%'").fetchone()[0] < 2:
                db.executescript(_SCHEMA)
            db.execute("BEGIN IMMEDIATE")  # can it be written?
            db.rollback()
            return db
        except sqlite3.OperationalError as error:
            db.close()
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except BaseException:
            db.close()
            raise


def _unwritable(error: BaseException | None) -> bool:
    """Is this about permission, a missing folder or a full disk, not about what is in the file?"""
    if isinstance(error, OSError):
        return True
    words = ("unable to open", "readonly", "disk is full", "disk I/O")
    return isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in words)


def _locked(error: BaseException | None) -> bool:
    """Does another process hold the file?"""
    return isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in ("locked", "busy"))


def _damaged(error: BaseException | None) -> bool:
    """Is this about what is in the file: damaged, no SQLite file, or tables of something else?"""
    words = ("not a database", "malformed", "encrypted", "no such table", "no such column", "has no column", "indexed")
    return isinstance(error, sqlite3.DatabaseError) and any(word in str(error) for word in words)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name now; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _move(path: Path, aside: Path) -> None:
    """Rename a database, its log first: a new file of the same name must not find the old one's log."""
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
