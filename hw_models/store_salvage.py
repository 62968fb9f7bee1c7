"""What can be read of a measurement store's file, damaged or not.

SQLite gives up at the first damaged page; here every row is asked for by its number where a whole table cannot be read. A network
counts as readable when its row and all of its steps are, and checksums and times make sense.

Start with `readable`.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw_models.store_rows import NETWORK, STEP, sentinels_of
from hw_models.store_schema import (
    NETWORK_NUMBERS,
    NETWORK_TEXTS,
    NETWORK_WHOLE,
    OBSERVED_NUMBERS,
    QUALITIES,
    columns,
    facts_of,
    unpacked_rounds,
)

__all__ = ["Found", "readable"]

GAP = 20_000  # numbers of rows tried beyond the last readable one


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        epochs: (uid, runtime, started_at, its openings: (opened_at, environment, sentinels)), the texts as in the file.
        networks: (uid of its epoch, row of the network table, (facts, row of the step table, times) of its steps), as
            `store_rows.add_network` takes them.
        broken: networks that were seen but are not whole.
    """

    epochs: list[tuple[str, str, str, list[tuple[str, str, str]]]]
    networks: list[tuple[str, dict[str, Any], list[tuple[bytes, dict[str, Any], tuple[Any, ...]]]]]
    broken: int


def readable(path: Path) -> Found:
    """Read a file, which is not changed.

    Raises:
        sqlite3.Error: it is no SQLite file, has other tables, or not even their names can be read.
        OSError: there is no such file.
    """
    path.stat()
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        db.execute("SELECT facts FROM step, network, observation, opening, epoch LIMIT 0")
        openings = defaultdict(list)
        for epoch, *opening in _rows(db, "opening", ("epoch", "opened_at", "environment", "sentinels")).values():
            if _sensible_sentinels(opening[2]):
                openings[epoch].append((opening[0], opening[1], opening[2]))
        epochs = _rows(db, "epoch", ("uid", "runtime", "started_at"))
        uids = {i: uid for i, (uid, *_) in epochs.items() if openings[i]}
        steps = _steps(db)
        observations = defaultdict(list)
        for network, step, *times in _rows(db, "observation", _OBSERVATION).values():
            if step in steps and _sensible_times(times):
                observations[network].append((*steps[step], tuple(times)))
        networks, broken = [], 0
        names = ("uid", "measured_at", *NETWORK, "more", "rounds")
        for number, (epoch, observed, *values) in _rows(db, "network", ("epoch", "observed", *names)).items():
            row = dict(zip(names, values))
            if epoch in uids and observed == len(observations[number]) and _sensible_network(row):
                networks.append((uids[epoch], row, observations[number]))
            else:
                broken += 1
    return Found([(*epochs[i], openings[i]) for i in uids], networks, broken)


_OBSERVATION = ("network", "step", *OBSERVED_NUMBERS, "quality")


def _steps(db: sqlite3.Connection) -> dict[int, tuple[bytes, dict[str, Any]]]:
    """(facts, row) by number, of those whose facts are still the checksum of the row."""
    names = (*STEP, "more")
    found = {}
    for number, (facts, *values) in _rows(db, "step", ("facts", *names)).items():
        row = dict(zip(names, values))
        if facts == facts_of(row):
            found[number] = (facts, row)
    return found


def _rows(db: sqlite3.Connection, table: str, names: tuple[str, ...]) -> dict[int, tuple[Any, ...]]:
    """Readable rows by number, in order."""
    found: dict[int, tuple[Any, ...]] = {}
    query = f"SELECT id, {columns(names)} FROM {table} NOT INDEXED"
    try:
        for number, *values in db.execute(query):
            found[number] = tuple(values)
        return found
    except sqlite3.DatabaseError:
        pass
    number = failed = 0
    while failed < GAP:
        number += 1
        try:
            row = found.get(number) or db.execute(f"{query} WHERE id = ?", (number,)).fetchone()[1:]
        except (sqlite3.DatabaseError, TypeError):  # damaged, or there is none
            failed += 1
        else:
            found[number] = row
            failed = 0
    return dict(sorted(found.items()))


def _sensible_times(times: list[Any]) -> bool:
    *ms, quality = times
    return all(isinstance(t, float) and math.isfinite(t) and t >= 0 for t in ms) and quality in QUALITIES


def _sensible_network(row: dict[str, Any]) -> bool:
    kinds = {**dict.fromkeys(NETWORK_TEXTS, str), **dict.fromkeys(NETWORK_WHOLE, int), "uid": str, "measured_at": str}
    if not all(isinstance(row[name], kind) for name, kind in kinds.items()):
        return False
    if not all(row[name] is None or isinstance(row[name], float) for name in NETWORK_NUMBERS):
        return False
    try:
        unpacked_rounds(row["rounds"])  # has a checksum
        json.loads(row["more"])
    except (ValueError, TypeError, OSError, KeyError, zlib.error):
        return False
    return row["ms"] is not None and math.isfinite(row["ms"]) and row["ms"] > 0


def _sensible_sentinels(text: Any) -> bool:
    try:
        return bool(sentinels_of(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
