"""The statements of the measurement store, each on an open connection, and the frames made of its rows.

Those that write leave the transaction to the caller. Start in `hw_models.store`, which is what one uses.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from hw_models.measure import Measurement
from hw_models.store_schema import NETWORK_NUMBERS, NETWORK_TEXTS, NETWORK_WHOLE, OBSERVED_NUMBERS, columns
from hw_models.workload import STEP_NUMBERS, STEP_TEXTS

__all__ = ["NETWORK", "STEP", "Epoch"]

STEP = (*STEP_TEXTS, *STEP_NUMBERS)
NETWORK = (*NETWORK_TEXTS, *NETWORK_NUMBERS, *NETWORK_WHOLE)


@dataclass(frozen=True)
class Epoch:
    """A stretch of time in which one runtime's environment did not change.

    Attributes:
        id: in the store's file.
        is_new: begun by this call of `open_epoch`.
        moved: by how much the sentinels that moved did, against the epoch of this runtime that was opened last: 0.05 = now 5 %
            slower, NaN for one that only one of the two has. Empty for the first epoch of a runtime and for one that goes on.
        uid: the same in every file the epoch is copied to.
        runtime, started_at: of the epoch.
        environment, sentinels: of this opening, as given.
    """

    id: int
    is_new: bool
    moved: dict[str, float]
    uid: str
    runtime: str
    started_at: str
    environment: dict[str, Any] = field(repr=False)
    sentinels: dict[str, Measurement] = field(repr=False)


def epochs_of(db: sqlite3.Connection, runtime: str) -> list[tuple[int, str, str, dict[str, Measurement]]]:
    """(id, uid, started_at, sentinels of the first opening) of a runtime's epochs, the one opened last first."""
    query = (
        "SELECT e.id, e.uid, e.started_at, (SELECT sentinels FROM opening WHERE epoch = e.id ORDER BY opened_at, id LIMIT 1) "
        "FROM epoch e WHERE e.runtime = ? "
        "ORDER BY (SELECT MAX(opened_at) FROM opening WHERE epoch = e.id) DESC, e.id DESC"
    )
    return [(i, uid, at, sentinels_of(text)) for i, uid, at, text in db.execute(query, (runtime,))]


def sentinels_of(text: str | None) -> dict[str, Measurement]:
    """Sentinels by name, from JSON."""
    found = json.loads(text) if text else {}
    return {name: Measurement(**{**facts, "rounds": tuple(facts["rounds"])}) for name, facts in found.items()}


def sentinels_text(sentinels: Mapping[str, Measurement]) -> str:
    """Sentinels by name, as JSON."""
    return json.dumps({name: asdict(m) for name, m in sentinels.items()})


def add_epoch(db: sqlite3.Connection, uid: str, runtime: str, started: str) -> int:
    """The id of a new epoch."""
    return _insert(db, "epoch", {"uid": uid, "runtime": runtime, "started_at": started})


def add_opening(db: sqlite3.Connection, epoch: int, opened: str, environment: str, sentinels: str) -> None:
    """Note that an epoch was opened; environment and sentinels as JSON."""
    row = {"epoch": epoch, "opened_at": opened, "environment": environment, "sentinels": sentinels}
    _insert(db, "opening", row)


def find_epoch(db: sqlite3.Connection, epoch: Epoch) -> int:
    """The epoch's id in this file; it is added where the file was replaced since the epoch was opened."""
    row = db.execute("SELECT id FROM epoch WHERE uid = ?", (epoch.uid,)).fetchone()
    if row is not None:
        return int(row[0])
    number = add_epoch(db, epoch.uid, epoch.runtime, epoch.started_at)
    environment = json.dumps(epoch.environment, sort_keys=True)
    add_opening(db, number, epoch.started_at, environment, sentinels_text(epoch.sentinels))
    return number


def add_network(
    db: sqlite3.Connection, row: Mapping[str, Any], observed: Sequence[tuple[bytes, Mapping[str, Any], tuple[Any, ...]]]
) -> int:
    """The id of a new network.

    Args:
        row: of the network table, but the number of its observations.
        observed: (facts, row of the step table, (ms, lo_ms, hi_ms, quality)) of each of its steps.
    """
    number = _insert(db, "network", {**row, "observed": len(observed)})
    names = (*STEP, "more")
    step = f"INSERT OR IGNORE INTO step (facts, {columns(names)}) VALUES ({_marks(len(names) + 1)})"
    db.executemany(step, [(facts, *(facts_row[name] for name in names)) for facts, facts_row, _ in observed])
    seen = ("network", "step", *OBSERVED_NUMBERS, "quality")
    observation = (
        f"INSERT INTO observation ({columns(seen)}) VALUES (?, (SELECT id FROM step WHERE facts = ?), ?, ?, ?, ?)"
    )
    db.executemany(observation, [(number, facts, *times) for facts, _, times in observed])
    return number


def observed_rows(db: sqlite3.Connection, runtime: str, epochs: Sequence[int]) -> list[tuple[Any, ...]]:
    """For `step_frame`: the steps measured in some epochs of a runtime."""
    query = (
        f"SELECT {_of('s', STEP)}, {_of('o', OBSERVED_NUMBERS)}, o.network, o.quality, n.epoch, s.more "
        f"FROM observation o JOIN step s ON s.id = o.step JOIN network n ON n.id = o.network {_within(epochs)} "
        "ORDER BY n.id, o.id"
    )
    return db.execute(query, (runtime, *epochs)).fetchall()


def network_rows(db: sqlite3.Connection, runtime: str, epochs: Sequence[int]) -> list[tuple[Any, ...]]:
    """For `network_frame`: the networks measured in some epochs of a runtime."""
    query = f"SELECT n.id, {_of('n', NETWORK)}, n.epoch, n.more FROM network n {_within(epochs)} ORDER BY n.id"
    return db.execute(query, (runtime, *epochs)).fetchall()


def epoch_rows(db: sqlite3.Connection, runtime: str | None) -> list[tuple[Any, ...]]:
    """For `epoch_frame`: the epochs of a runtime, or of all."""
    first = "FROM opening WHERE epoch = e.id ORDER BY opened_at, id LIMIT 1"
    query = (
        "SELECT e.id, e.runtime, e.started_at, MAX(o.opened_at), COUNT(o.id), "
        f"(SELECT COUNT(*) FROM network WHERE epoch = e.id), (SELECT environment {first}), (SELECT sentinels {first}) "
        "FROM epoch e LEFT JOIN opening o ON o.epoch = e.id WHERE ? IS NULL OR e.runtime = ? GROUP BY e.id "
        "ORDER BY e.started_at, e.id"
    )
    return db.execute(query, (runtime, runtime)).fetchall()


def known_networks(db: sqlite3.Connection, runtime: str) -> pd.DataFrame:
    """digest, batch, name, network, epoch, ms of a runtime's networks that have a digest; those of the last epoch last."""
    query = (
        "SELECT n.digest, n.batch, n.name, n.id, n.epoch, n.ms FROM network n JOIN epoch e ON e.id = n.epoch "
        "WHERE e.runtime = ? AND n.digest <> '' "
        "ORDER BY (SELECT MAX(opened_at) FROM opening WHERE epoch = e.id), e.id, n.id"
    )
    names = ["digest", "batch", "name", "network", "epoch", "ms"]
    return pd.DataFrame(db.execute(query, (runtime,)).fetchall(), columns=names)


def epoch_frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """One row per epoch, indexed by its id."""
    names = ["epoch", "runtime", "started_at", "last_opened_at", "openings", "networks", "environment"]
    frame = pd.DataFrame([row[:7] for row in rows], columns=names).set_index("epoch")
    frame["environment"] = [json.loads(text or "{}") for text in frame["environment"]]
    sentinels = [sentinels_of(row[7]) for row in rows]
    for name in sorted({name for each in sentinels for name in each}):
        frame[f"{name}_ms"] = [each[name].floor_ms if name in each else math.nan for each in sentinels]
    return frame


def step_frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """One row per observed step."""
    frame = pd.DataFrame(rows, columns=[*STEP, *OBSERVED_NUMBERS, "network", "quality", "epoch", "more"])
    numbers = dict.fromkeys((*STEP_NUMBERS, *OBSERVED_NUMBERS), "float64")
    texts = dict.fromkeys((*STEP_TEXTS, "quality"), "str")
    return _with_more(frame.astype({**numbers, **texts, "network": "int64", "epoch": "int64"}))


def network_frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    """One row per network, indexed by its id."""
    frame = pd.DataFrame(rows, columns=["network", *NETWORK, "epoch", "more"]).set_index("network")
    frame.index = frame.index.astype("int64")
    whole = dict.fromkeys((*NETWORK_WHOLE, "epoch"), "int64")
    texts = dict.fromkeys(NETWORK_TEXTS, "str")
    return _with_more(frame.astype({**dict.fromkeys(NETWORK_NUMBERS, "float64"), **whole, **texts}))


def _with_more(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of other names, taken out of their JSON."""
    texts = frame.pop("more")
    if (texts == "{}").all():
        return frame
    return frame.join(pd.DataFrame([json.loads(text) for text in texts], index=frame.index))


def _insert(db: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
    query = f"INSERT INTO {table} ({columns(tuple(row))}) VALUES ({_marks(len(row))})"
    return int(db.execute(query, tuple(row.values())).lastrowid or 0)


def _within(epochs: Sequence[int]) -> str:
    return f"JOIN epoch e ON e.id = n.epoch WHERE e.runtime = ? AND e.id IN ({_marks(len(epochs))})"


def _of(table: str, names: Iterable[str]) -> str:
    return ", ".join(f'{table}."{name}"' for name in names)


def _marks(count: int) -> str:
    return ", ".join("?" * count)
