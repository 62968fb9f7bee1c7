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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
        path: SQLite file, made if missing. Default: `layers.v1.sqlite` in `cache_folder()`; if that cannot be written, a warning
            is given once and the table lives in memory, for this process.

    Raises:
        TableError: the file is damaged, no SQLite file, stays locked, or (only with an explicit path) cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._explicit = path is not None
        self.path: Path | None = Path(path) if path is not None else cache_folder() / FILE
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
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
        with self._database() as db:
            row = db.execute(query, (runtime, op, kernel)).fetchone()
        return None if row is None else _measurement(row)

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
        try:
            with self._database() as db, db:
                db.executemany(insert, packed)
        except TableError as error:
            if self._explicit or self.path is None or not _unwritable(error.__cause__):
                raise
            self._in_memory(error)
            self.add(runtime, [(row[1], row[2], _measurement(row[3:])) for row in packed])

    def __len__(self) -> int:
        with self._database() as db:
            return int(db.execute("SELECT COUNT(*) FROM layer").fetchone()[0])

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None and self._owner == os.getpid():
            self._connection.close()
        self._connection = None

    def _open(self) -> None:
        if self.path is None:
            self._connection = sqlite3.connect(":memory:", check_same_thread=False)
            self._connection.executescript(_SCHEMA)
            self._owner = os.getpid()
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connected(self.path)
        except (OSError, sqlite3.Error) as error:
            if self._explicit or not _unwritable(error):
                raise self._error(error) from error
            self._in_memory(error)
        self._owner = os.getpid()

    def _in_memory(self, error: Exception) -> None:
        where, self.path = self.path, None
        _warn_once(
            f"measured layer times cannot be kept in {where} ({error}); they live in memory and are measured again next time. "
            "Set NAS_CACHE_DIR to a folder that can be written"
        )
        self._open()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        if self._connection is None or self._owner != os.getpid():  # closed, or this is a forked child
            self._connection = None
            self._open()
        assert self._connection is not None
        try:
            yield self._connection
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> TableError:
        text = str(error)
        if "locked" in text or "busy" in text:
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


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
