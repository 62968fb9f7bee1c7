"""Remembered times of single operations: a table in the user's cache folder, shared by all processes of a machine.

Rows are only ever added. A row holds for one runtime (machine, kernels, libraries, threads: `hw_models.device.runtime_id`),
one operation (`PlannedOp.key`) and one kernel. It is a cache: deleting the file loses nothing but measuring time.

Start with `LayerTable().lookup(...)` and `.add(...)`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from hw_models.measure import Measurement
from hw_models.sqlite_file import SqliteFile, SqliteFileError, cache_folder

__all__ = ["LayerTable", "TableError", "cache_folder"]

FILE = "layers.v1.sqlite"  # another version, another file: old and new releases can work side by side
_QUALITY = ("ok", "thin", "unreached")  # best first
_SCHEMA = """
CREATE TABLE IF NOT EXISTS layer (
    id INTEGER PRIMARY KEY, runtime TEXT NOT NULL, op TEXT NOT NULL, kernel TEXT NOT NULL,
    floor_ms REAL NOT NULL, lo_ms REAL NOT NULL, hi_ms REAL NOT NULL, median_ms REAL NOT NULL, p90_ms REAL NOT NULL,
    quality TEXT NOT NULL, rounds_ms TEXT NOT NULL, measured_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS layer_by_op ON layer (runtime, op, kernel);
"""


class TableError(SqliteFileError):
    """The table's file cannot be used; says why and what to do."""


class LayerTable(SqliteFile):
    """Times by runtime, operation and kernel.

    Args:
        path: SQLite file, made if missing. Default: `layers.v1.sqlite` in `cache_folder()`, which never stops anybody: see
            `SqliteFile`.

    Raises:
        TableError: a file given by `path` is damaged, no SQLite file, stays locked, or cannot be written; it is left alone.
    """

    default_name = FILE
    title = "the table of layer times"
    plural = "measured layer times"
    again = "the times are measured again"
    cure_damaged = "delete it to start afresh (it holds nothing but times that can be measured again), or use another NAS_CACHE_DIR"
    schema = _SCHEMA
    error = TableError

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


def _measurement(row: Sequence[Any]) -> Measurement:
    """From floor_ms, lo_ms, hi_ms, median_ms, p90_ms, quality, rounds_ms as JSON."""
    floor, lo, hi, median, p90, quality, rounds = row[:7]
    return Measurement(floor, lo, hi, median, p90, quality, tuple(json.loads(rounds)))
