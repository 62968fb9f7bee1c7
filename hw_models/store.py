"""Every network that was ever measured on this machine, with the time of each of its steps: `MeasurementStore`.

A file in the user's cache folder, shared by all processes; rows are only ever added. Measurements hold for one runtime (machine,
kernels, libraries, threads) and one *epoch*: a stretch in which two fixed kernels, the sentinels, kept their times within 3 %.
Measurements of different epochs are never mixed silently.

Start with `MeasurementStore.open_epoch`, `add_networks` and `observations`.

Source: append-only raw measurements, sentinels and environment epochs, and measuring a twentieth of the old entries again for
the noise ceiling are sections 4.3 and 5.5 of the project's collection of facts about latency models.
"""

from __future__ import annotations

import json
import math
import sqlite3
import uuid
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models import store_schema as schema
from hw_models.measure import Measurement
from hw_models.sqlite_file import SqliteFile, SqliteFileError
from hw_models.workload import STEP_NUMBERS, STEP_TEXTS

__all__ = ["Epoch", "MeasurementStore", "StoreError", "moved"]

FILE = "measurements.v1.sqlite"  # another version, another file: old and new releases can work side by side
SAME = 0.03  # sentinels within 3 % of the stored ones: the environment has not changed


class StoreError(SqliteFileError):
    """The store's file cannot be used; says why and what to do."""


@dataclass(frozen=True)
class Epoch:
    """A stretch of time in which one runtime's environment did not change.

    Attributes:
        id: in the store's file.
        is_new: begun by this call of `open_epoch`.
        moved: relative change of every sentinel against the runtime's last epoch, 0.05 = now 5 % slower, NaN for one that only
            one of the two has; empty for the first epoch of a runtime and for one that goes on.
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


def moved(old: Mapping[str, Measurement], new: Mapping[str, Measurement], limit: float = SAME) -> dict[str, float]:
    """The sentinels whose times differ by more than `limit`.

    Args:
        old, new: measurements by name of the sentinel.
        limit: relative to the old time; 0.03 = 3 %.

    Returns:
        new / old - 1 of those that moved; NaN for one that is in one of the two only. Empty: the environment is the same.
    """
    changes = {}
    for name in {**old, **new}:
        change = new[name].floor_ms / old[name].floor_ms - 1 if name in old and name in new else math.nan
        if not abs(change) <= limit:
            changes[name] = change
    return changes


class MeasurementStore(SqliteFile):
    """Measured networks and steps.

    Args:
        path: SQLite file, made if missing. Default: `measurements.v1.sqlite` in `cache_folder()`, which never stops anybody: see
            `SqliteFile`. What can be read of a damaged file is taken over into the new one.

    Raises:
        StoreError: a file given by `path` is damaged, no SQLite file, stays locked, or cannot be written; it is left alone.
    """

    default_name = FILE
    title = "the store of measurements"
    plural = "measurements"
    again = "what can still be read of it is taken over"
    cure_damaged = (
        "name another file, which is made, and take over what can be read of this one with "
        "MeasurementStore(ANOTHER).absorb(THIS)"
    )
    schema = schema.SCHEMA
    synchronous = "FULL"
    error = StoreError

    def open_epoch(
        self, runtime: str, environment: Mapping[str, Any], sentinels: Mapping[str, Measurement], limit: float = SAME
    ) -> Epoch:
        """Go on with the last epoch of a runtime whose sentinels took as long as now, or begin a new one.

        An epoch is known by the sentinels of its first opening, so that it cannot drift away by small steps.

        Args:
            runtime: `hw_models.device.runtime_id(threads)`.
            environment: `hw_models.environment.describe()`; kept with this opening, anything JSON can say.
            sentinels: measured now, `hw_models.sentinels.sentinel_calls`.
            limit: relative change of a sentinel from which on the environment is another.

        Raises:
            ValueError: there are no sentinels, or one took no time.
        """
        bad = [name for name, m in sentinels.items() if not (math.isfinite(m.floor_ms) and m.floor_ms > 0)]
        if bad or not sentinels:
            raise ValueError(
                f"an epoch is known by its sentinels, but {f'{bad} took no time' if bad else 'there are none'}"
            )
        opened = _now()
        facts = json.dumps(dict(environment), sort_keys=True)

        def write(db: sqlite3.Connection) -> tuple[int, str, str, bool, dict[str, float]]:
            with db:
                db.execute("BEGIN IMMEDIATE")  # wait for other writers here, not at the end
                known = _epochs_of(db, runtime)
                changes = {uid: moved(reference, sentinels, limit) for _, uid, _, reference in known}
                same = [row for row in known if not changes[row[1]]]
                if same:
                    number, uid, started, _ = same[0]
                else:
                    uid, started = uuid.uuid4().hex, opened
                    number = _add_epoch(db, uid, runtime, started)
                _add_opening(db, number, opened, facts, sentinels)
                last = changes[known[0][1]] if known and not same else {}
                return number, uid, started, not same, last

        number, uid, started, is_new, last = self._do(write)
        return Epoch(number, is_new, last, uid, runtime, started, dict(environment), dict(sentinels))

    def add_networks(
        self,
        epoch: Epoch,
        steps: pd.DataFrame,
        networks: pd.DataFrame,
        rounds: Mapping[Any, Mapping[str, npt.ArrayLike]] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Keep measured networks: all of them or, when this is interrupted or refused, none.

        Args:
            epoch: of the measuring run, from `open_epoch`.
            steps: one row per distinct step of each network: `STEP_COLUMNS` of `hw_models.workload` and ms, lo_ms, hi_ms (of one
                execution in place), network (a label of the index of `networks`), quality ("ok", "thin", "unreached").
            networks: one row per network: name, ms, lo_ms, hi_ms, median_ms, p90_ms, quality, sum_ms, steps, calls, weight_bytes,
                arena_bytes, batch, threads, group, digest (the same for the same network measured again). Only name and ms must
                be there. Columns of other names with plain values are kept and come back too.
            rounds: by label of the network, arrays of ms such as "whole" float[rounds] and "steps" float[rounds, executed steps].

        Returns:
            int64[networks], the ids under which `observations` lists them, in the order given.

        Raises:
            ValueError: a column is missing or a time is no time; names them. Nothing is kept.
            StoreError: the file, named by the caller, cannot be written. Nothing is kept of this call.
        """
        schema.checked(steps, networks)
        rounds = rounds or {}
        strangers = [label for label in rounds if label not in networks.index]
        if strangers:
            raise ValueError(f"rounds: {strangers[0]!r} is not in the index of the networks frame")
        rows = schema.packed_networks(networks)
        blobs = [schema.packed_rounds(rounds.get(label, {})) for label in networks.index]
        labels, uids = list(networks.index), [uuid.uuid4().hex for _ in rows]
        packed = schema.packed_steps(steps)
        times = schema.packed_observations(steps)
        measured_at = _now()

        def write(db: sqlite3.Connection) -> list[int]:
            with db:
                db.execute("BEGIN IMMEDIATE")  # wait for other writers here, not at the end
                number = _find_epoch(db, epoch)
                ids: dict[Hashable, int] = {}
                for label, uid, row, blob in zip(labels, uids, rows, blobs):
                    ids[label] = _add_network(
                        db, {"uid": uid, "epoch": number, "measured_at": measured_at, **row}, blob
                    )
                step_ids = _add_steps(db, packed)
                _add_observations(db, [(ids[t[0]], step_id, *t[1:]) for step_id, t in zip(step_ids, times)])
                return [ids[label] for label in labels]

        return np.asarray(self._do(write), np.int64)

    def observations(self, runtime: str, epoch: int | str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What was measured on a runtime.

        Args:
            runtime: `runtime_id(threads)`.
            epoch: an `Epoch.id`; None or "latest", the epoch opened last; "all", to be told apart by the column `epoch`.

        Returns:
            (steps, networks): frames as given to `add_networks`, `steps.network` being the index of `networks`, and a column
            `epoch` in both. No rows where nothing was measured.
        """
        if not (epoch is None or epoch in ("latest", "all") or isinstance(epoch, int | np.integer)):
            raise ValueError(f'epoch must be a number, "latest" or "all", got {epoch!r}')

        def read(db: sqlite3.Connection) -> tuple[list[Any], list[Any]]:
            if isinstance(epoch, int | np.integer):
                wanted = [int(epoch)]
            else:
                wanted = [row[0] for row in _epochs_of(db, runtime)][: None if epoch == "all" else 1]
            marks = ", ".join("?" * len(wanted))
            where = f"JOIN epoch e ON e.id = n.epoch WHERE e.runtime = ? AND e.id IN ({marks})"
            network = f"SELECT n.id, n.epoch, {_of('n', _NETWORK)}, n.more FROM network n {where} ORDER BY n.id"
            step = (
                f"SELECT {_of('s', _STEP)}, {_of('o', schema.OBSERVED_NUMBERS)}, o.network, o.quality, n.epoch, s.more "
                f"FROM observation o JOIN step s ON s.id = o.step JOIN network n ON n.id = o.network {where} ORDER BY n.id, o.id"
            )
            db.execute("BEGIN")  # both of the same moment
            try:
                return db.execute(step, (runtime, *wanted)).fetchall(), db.execute(
                    network, (runtime, *wanted)
                ).fetchall()
            finally:
                db.rollback()

        steps, networks = self._do(read)
        return _step_frame(steps), _network_frame(networks)

    def rounds(self, network: int) -> dict[str, npt.NDArray[np.float64]]:
        """The arrays of ms given with one network.

        Raises:
            KeyError: there is no network of this id.
        """
        row = self._do(lambda db: db.execute("SELECT rounds FROM network WHERE id = ?", (int(network),)).fetchone())
        if row is None:
            raise KeyError(f"the store holds no network {network}")
        return schema.unpacked_rounds(row[0])


_STEP = (*STEP_TEXTS, *STEP_NUMBERS)
_NETWORK = (*schema.NETWORK_TEXTS, *schema.NETWORK_NUMBERS, *schema.NETWORK_WHOLE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _of(table: str, names: Iterable[str]) -> str:
    return ", ".join(f'{table}."{name}"' for name in names)


def _epochs_of(db: sqlite3.Connection, runtime: str) -> list[tuple[int, str, str, dict[str, Measurement]]]:
    """(id, uid, started_at, sentinels of the first opening) of a runtime's epochs, the one opened last first."""
    query = (
        "SELECT e.id, e.uid, e.started_at, (SELECT sentinels FROM opening WHERE epoch = e.id ORDER BY opened_at, id LIMIT 1) "
        "FROM epoch e WHERE e.runtime = ? "
        "ORDER BY (SELECT MAX(opened_at) FROM opening WHERE epoch = e.id) DESC, e.id DESC"
    )
    return [(i, uid, at, _sentinels(text)) for i, uid, at, text in db.execute(query, (runtime,))]


def _sentinels(text: str | None) -> dict[str, Measurement]:
    found = json.loads(text) if text else {}
    return {name: Measurement(**{**facts, "rounds": tuple(facts["rounds"])}) for name, facts in found.items()}


def _add_epoch(db: sqlite3.Connection, uid: str, runtime: str, started: str) -> int:
    insert = "INSERT INTO epoch (uid, runtime, started_at) VALUES (?, ?, ?)"
    return int(db.execute(insert, (uid, runtime, started)).lastrowid or 0)


def _add_opening(
    db: sqlite3.Connection, epoch: int, opened: str, environment: str, sentinels: Mapping[str, Measurement]
) -> None:
    facts = json.dumps({name: asdict(m) for name, m in sentinels.items()})
    insert = "INSERT INTO opening (epoch, opened_at, environment, sentinels) VALUES (?, ?, ?, ?)"
    db.execute(insert, (epoch, opened, environment, facts))


def _find_epoch(db: sqlite3.Connection, epoch: Epoch) -> int:
    """The epoch's id in this file; it is added where the file was replaced since the epoch was opened."""
    row = db.execute("SELECT id FROM epoch WHERE uid = ?", (epoch.uid,)).fetchone()
    if row is not None:
        return int(row[0])
    number = _add_epoch(db, epoch.uid, epoch.runtime, epoch.started_at)
    _add_opening(db, number, epoch.started_at, json.dumps(epoch.environment, sort_keys=True), epoch.sentinels)
    return number


def _add_network(db: sqlite3.Connection, row: Mapping[str, Any], rounds: bytes) -> int:
    names = (*row, "rounds")
    insert = f"INSERT INTO network ({schema.columns(names)}) VALUES ({', '.join('?' * len(names))})"
    return int(db.execute(insert, (*row.values(), rounds)).lastrowid or 0)


def _add_steps(db: sqlite3.Connection, packed: list[tuple[bytes, dict[str, Any]]]) -> list[int]:
    """Ids of steps, added where they are new."""
    distinct = dict(packed)
    names = (*_STEP, "more")
    insert = f"INSERT OR IGNORE INTO step (facts, {schema.columns(names)}) VALUES ({', '.join('?' * (len(names) + 1))})"
    db.executemany(insert, [(facts, *row.values()) for facts, row in distinct.items()])
    ids = {facts: db.execute("SELECT id FROM step WHERE facts = ?", (facts,)).fetchone()[0] for facts in distinct}
    return [ids[facts] for facts, _ in packed]


def _add_observations(db: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    names = ("network", "step", *schema.OBSERVED_NUMBERS, "quality")
    db.executemany(f"INSERT INTO observation ({schema.columns(names)}) VALUES (?, ?, ?, ?, ?, ?)", rows)


def _step_frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    names = [*_STEP, *schema.OBSERVED_NUMBERS, "network", "quality", "epoch", "more"]
    frame = pd.DataFrame(rows, columns=names)
    numbers = dict.fromkeys((*STEP_NUMBERS, *schema.OBSERVED_NUMBERS), "float64")
    texts = dict.fromkeys((*STEP_TEXTS, "quality"), "str")
    return _with_more(frame.astype({**numbers, **texts, "network": "int64", "epoch": "int64"}))


def _network_frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["network", "epoch", *_NETWORK, "more"]).set_index("network")
    frame.index = frame.index.astype("int64")
    whole = dict.fromkeys((*schema.NETWORK_WHOLE, "epoch"), "int64")
    texts = dict.fromkeys(schema.NETWORK_TEXTS, "str")
    frame = _with_more(frame.astype({**dict.fromkeys(schema.NETWORK_NUMBERS, "float64"), **whole, **texts}))
    return frame[[c for c in frame if c != "epoch"] + ["epoch"]]


def _with_more(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of other names, taken out of their JSON."""
    texts = frame.pop("more")
    if (texts == "{}").all():
        return frame
    return frame.join(pd.DataFrame([json.loads(text) for text in texts], index=frame.index))
