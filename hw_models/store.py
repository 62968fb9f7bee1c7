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
import os
import sqlite3
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models import store_rows as rows
from hw_models import store_schema as schema
from hw_models.measure import Measurement
from hw_models.sentinels import SAME, moved
from hw_models.sqlite_file import SqliteFile, SqliteFileError
from hw_models.store_rows import Epoch
from hw_models.store_salvage import Found, readable

__all__ = ["Epoch", "MeasurementStore", "StoreError"]

FILE = "measurements.v1.sqlite"  # another version, another file: old and new releases can work side by side


class StoreError(SqliteFileError):
    """The store's file cannot be used; says why and what to do."""


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
    again = "a new one is begun"
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
                known = rows.epochs_of(db, runtime)
                changes = {uid: moved(reference, sentinels, limit) for _, uid, _, reference in known}
                same = [row for row in known if not changes[row[1]]]
                if same:
                    number, uid, started, _ = same[0]
                else:
                    uid, started = uuid.uuid4().hex, opened
                    number = rows.add_epoch(db, uid, runtime, started)
                rows.add_opening(db, number, opened, facts, rows.sentinels_text(sentinels))
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
            raise ValueError(f"rounds: {strangers[0]} is not in the index of the networks frame")
        table = [
            {
                "uid": uuid.uuid4().hex,
                "measured_at": _now(),
                "rounds": schema.packed_rounds(rounds.get(label, {})),
                **row,
            }
            for label, row in zip(networks.index, schema.packed_networks(networks))
        ]
        observed: dict[Any, list[Any]] = {label: [] for label in networks.index}
        for label, step in zip(steps["network"].tolist(), schema.packed_steps(steps)):
            observed[label].append(step)

        def write(db: sqlite3.Connection) -> list[int]:
            with db:
                db.execute("BEGIN IMMEDIATE")
                number = rows.find_epoch(db, epoch)
                return [
                    rows.add_network(db, {**row, "epoch": number}, seen) for row, seen in zip(table, observed.values())
                ]

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
            db.execute("BEGIN")  # both frames of the same moment
            try:
                if isinstance(epoch, int | np.integer):
                    wanted = [int(epoch)]
                else:
                    wanted = [row[0] for row in rows.epochs_of(db, runtime)][: None if epoch == "all" else 1]
                return rows.observed_rows(db, runtime, wanted), rows.network_rows(db, runtime, wanted)
            finally:
                db.rollback()

        steps, networks = self._do(read)
        return rows.step_frame(steps), rows.network_frame(networks)

    def rounds(self, network: int) -> dict[str, npt.NDArray[np.float64]]:
        """The arrays of ms given with one network.

        Raises:
            KeyError: there is no network of this id.
        """
        row = self._do(lambda db: db.execute("SELECT rounds FROM network WHERE id = ?", (int(network),)).fetchone())
        if row is None:
            raise KeyError(f"the store holds no network {network}")
        return schema.unpacked_rounds(row[0])

    def epochs(self, runtime: str | None = None) -> pd.DataFrame:
        """The epochs of a runtime, or of all, in the order of their beginning.

        Returns:
            One row per epoch, indexed by its id: runtime, started_at, last_opened_at (ISO 8601, UTC), openings, networks (numbers),
            environment (dict, of the first opening) and for every sentinel "NAME_ms", as at the first opening; NaN for one it
            did not have.
        """
        return rows.epoch_frame(self._do(lambda db: rows.epoch_rows(db, runtime)))

    def pick_for_remeasure(
        self, runtime: str, share: float = 0.05, rng: np.random.Generator | int | None = None
    ) -> npt.NDArray[np.int64]:
        """Networks to measure again with the next ones, so that `noise` can be told.

        Args:
            runtime: `runtime_id(threads)`.
            share: of the different networks, in [0, 1]; rounded up, so that it is at least one where there is any.
            rng: draws among those measured least often; a seed or a generator.

        Returns:
            int64[picked], ids of networks (their last measurement), of the last epoch that has any; those that can be known
            again, by their `digest`.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be in [0, 1], got {share}")
        known = self._do(lambda db: rows.known_networks(db, runtime))
        if known.empty:
            return np.zeros(0, np.int64)
        known = known[known["epoch"] == known["epoch"].iloc[-1]]
        last = known.groupby(["digest", "batch"])["network"].agg(["max", "size"])
        tie = np.random.default_rng(rng).permutation(len(last))
        order = np.lexsort((tie, last["size"]))[: math.ceil(share * len(last))]
        return last["max"].to_numpy(np.int64)[order]

    def noise(self, runtime: str, across_epochs: bool = False) -> pd.DataFrame:
        """Networks measured more than once: how far two measurements of the same thing are apart.

        Args:
            runtime: `runtime_id(threads)`.
            across_epochs: pairs of different epochs too, whose difference is not noise alone.

        Returns:
            One row per measurement but the first of each network (digest and batch) and epoch, against the one before: digest,
            name, network, again (ids), epoch, again_epoch, first_ms, again_ms. `accuracy.noise_ceiling` makes hit rates of it.
        """
        known = self._do(lambda db: rows.known_networks(db, runtime)).sort_values("network")
        by = ["digest", "batch"] if across_epochs else ["digest", "batch", "epoch"]
        before = known.groupby(by)[["network", "epoch", "ms"]].shift()
        pairs = before["network"].notna()
        first, again = before[pairs].astype({"network": "int64", "epoch": "int64"}), known[pairs]
        return pd.DataFrame(
            {
                "digest": again["digest"],
                "name": again["name"],
                "network": first["network"],
                "again": again["network"],
                "epoch": first["epoch"],
                "again_epoch": again["epoch"],
                "first_ms": first["ms"],
                "again_ms": again["ms"],
            }
        ).reset_index(drop=True)

    def absorb(self, path: str | os.PathLike[str]) -> int:
        """Take over the networks of another store's file, as far as they can be read; the file is left as it is.

        Args:
            path: of a damaged store, or of one from another folder or machine. Absorbing it twice adds nothing.

        Returns:
            How many networks were new here.

        Raises:
            StoreError: nothing can be read of it.
        """
        return self._absorb(self._readable(Path(path)))

    def _readable(self, path: Path) -> Found:
        try:
            return readable(path)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"nothing can be read of the store of measurements {path}: {error}") from error

    def _absorb(self, found: Found) -> int:
        def write(db: sqlite3.Connection) -> int:
            with db:
                db.execute("BEGIN IMMEDIATE")
                ids = dict(db.execute("SELECT uid, id FROM epoch"))
                for uid, runtime, started, openings in found.epochs:
                    if uid not in ids:
                        ids[uid] = rows.add_epoch(db, uid, runtime, started)
                        for opening in openings:
                            rows.add_opening(db, ids[uid], *opening)
                known = {uid for (uid,) in db.execute("SELECT uid FROM network")}
                new = {row["uid"]: (epoch, row, seen) for epoch, row, seen in found.networks if row["uid"] not in known}
                for epoch, row, seen in new.values():
                    rows.add_network(db, {**row, "epoch": ids[epoch]}, seen)
                return len(new)

        return int(self._do(write))

    def _salvage(self, aside: Path) -> str:
        try:
            found = self._readable(aside)
        except StoreError as error:
            return f"none of its measurements could be taken over ({error.__cause__})"
        count = self._absorb(found)
        return f"{count} of the {len(found.networks) + found.broken} networks seen in it were taken over"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
