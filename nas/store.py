"""The run's trials in one SQL database with one writer: proposals, attempts, learning curves, results.

    store = Store.create("runs/mine/run.db")
    trial = store.propose(searcher="random", index=0, architecture=arch, seed=0, epochs=5)
    trial = store.start(trial.trial)
    store.finish(trial.trial, trial.attempts, "complete", metrics={"val_accuracy": 0.9}, curve=[{"epoch": 0, ...}])

Every call is one transaction; `with store.transaction():` makes several one. Whoever is killed leaves the last finished call.
Results are idempotent: `finish` counts the first answer to the latest attempt and drops all others. Readers
(`Store.open(..., read_only=True)`) may come at any time. Does not lock the run (`nas.lock` does) and holds no weights.

SQLite files want a local disk: on network file systems its shared-memory index does not work; give a server's URL there.
Faults of the database come as `nas.errors.RunError`; a wrong argument as ValueError or TypeError.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from sqlalchemy import BindParameter, bindparam, delete, func, insert, inspect, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from nas.database import Database, connect, connect_to_copy, explain, place, sqlite_path
from nas.errors import RunError
from nas.schema import (
    FINAL_STATES,
    OPEN_STATES,
    SCHEMA_VERSION,
    Metric,
    State,
    Trial,
    curve_table,
    from_json,
    meta_table,
    metadata,
    metric_columns,
    now,
    row_to_trial,
    storable_text,
    to_json,
    trial_table,
)
from search_spaces.architecture import Architecture, SpaceError

__all__ = ["Metric", "State", "Store", "Trial"]

# Statements are built once: building them was more than half of a call's time.
_T = trial_table.c
_AT: BindParameter[int] = bindparam("at")
_NEXT = select(func.coalesce(func.max(_T.trial) + 1, 0))
_INSERT = insert(trial_table)
_READ = select(trial_table).where(_T.trial == _AT)
_START = (
    update(trial_table)
    .where(_T.trial == _AT, _T.state.in_(OPEN_STATES))
    .values(state="running", attempts=_T.attempts + 1, started_at=bindparam("moment"))
)
_FINISH = update(trial_table).where(_T.trial == _AT, _T.attempts == bindparam("attempt"), _T.state.in_(OPEN_STATES))
_UPDATE = update(trial_table).where(_T.trial == _AT)
_CLEAR_CURVE = delete(curve_table).where(curve_table.c.trial == _AT)
_INSERT_CURVE = insert(curve_table)


class Store:
    """The database of one run. Made by `Store.create` and `Store.open`; close it, or use it as a context manager.

    One process writes (the run's driver); threads of it may share the object.
    """

    def __init__(self, database: Database, *, read_only: bool) -> None:
        self.where = database.where
        self.read_only = read_only
        self._engine = database.engine
        self._lock = threading.RLock()
        self._connection: Connection | None = None

    # -- opening ----------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, url_or_path: str | Path) -> Store:
        """Make an empty run database and open it for writing. A file appears whole or not at all.

        Raises:
            RunError: there is one already, or the place cannot be written to.
        """
        path = sqlite_path(url_or_path)
        if path is None:
            store = cls(connect(url_or_path, "create"), read_only=False)
            store._make_tables()
            return store
        if path.exists():
            raise RunError(f"{path}: a run's database is there already. Continue that run, or choose another folder")
        if not path.parent.is_dir():
            raise RunError(f"{path.parent}: expected a folder to make {path.name} in, found none")
        temporary = path.with_name(path.name + ".new")
        try:
            for suffix in ("", "-wal", "-shm", "-journal"):  # left over from a run that was killed while making it
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)
            with cls(connect(temporary, "create"), read_only=False) as unfinished:
                unfinished.where = str(path)
                unfinished._make_tables()
                unfinished._checkpoint()
            place(temporary, path)
        except OSError as error:
            raise RunError(f"{path}: cannot be made ({error.strerror or error})") from error
        finally:
            for suffix in ("", "-wal", "-shm", "-journal"):
                with suppress(OSError):
                    Path(f"{temporary}{suffix}").unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, url_or_path: str | Path, read_only: bool = False) -> Store:
        """Open the database of a run that exists.

        Args:
            url_or_path: file or SQLAlchemy URL.
            read_only: for looking at a run, also while it is running or where nothing may be written.

        Raises:
            RunError: no such database, damaged, made by a newer version, or not of a run.
        """
        path = sqlite_path(url_or_path)
        store = cls(connect(url_or_path, "read" if read_only else "write"), read_only=read_only)
        try:
            if read_only and path is not None and not store._can_read():
                store.close()
                store = cls(connect_to_copy(path), read_only=True)
            store._check(whole=path is not None and not read_only)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give the database back. Twice is fine."""
        with self._lock, suppress(DBAPIError, sqlite3.Error):
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_tables(self) -> None:
        with self._transaction() as connection:
            if inspect(connection).has_table("trial"):
                raise RunError(
                    f"{self.where}: a run's tables are there already. Continue that run, or choose another database"
                )
            metadata.create_all(connection)
            self.set_meta("schema_version", SCHEMA_VERSION)
            self.set_meta("created_at", now())

    def _checkpoint(self) -> None:
        """Move everything from the write-ahead log into the file itself, or fail: the file is about to be moved without its log."""
        try:
            with self._engine.connect() as connection:
                cursor = connection.connection.cursor()
                busy, _, _ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                cursor.close()
        except (DBAPIError, sqlite3.Error) as error:
            raise explain(error, self.where) from error
        if busy:
            raise RunError(f"{self.where}: cannot be written out; free some space, then start the same command again")

    def _can_read(self) -> bool:
        try:
            with self._engine.begin() as connection:
                connection.execute(select(func.count()).select_from(meta_table)).scalar()
        except DBAPIError as error:
            low = str(error.orig).lower()
            return not any(text in low for text in ("unable to open", "readonly", "disk i/o"))
        return True

    def _check(self, *, whole: bool) -> None:
        version = self.get_meta("schema_version")
        if not isinstance(version, int):
            raise RunError(f"{self.where}: not the database of a run (it does not state the version of its tables)")
        if version > SCHEMA_VERSION:
            raise RunError(
                f"{self.where}: made by a newer version (tables of version {version}, this program knows {SCHEMA_VERSION}). "
                "Update this program"
            )
        if whole:
            with self._transaction() as connection:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise RunError(
                    f"{self.where}: damaged ({found}). Restore it from a copy, or start a new run in another folder"
                )

    # -- transactions -----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls inside one transaction: all of them are kept, or (on any exception) none.

        Also much cheaper for many calls at once. May be nested; the outermost one commits.
        """
        with self._transaction(writing=True):
            yield

    @contextmanager
    def _transaction(self, *, writing: bool = False) -> Iterator[Connection]:
        if writing and self.read_only:
            raise RunError(f"{self.where}: opened for reading only")
        with self._lock:
            if self._connection is not None:
                yield self._connection
                return
            try:
                with self._engine.begin() as connection:
                    self._connection = connection
                    try:
                        yield connection
                    finally:
                        self._connection = None
            except (DBAPIError, sqlite3.Error) as error:
                raise explain(error, self.where) from error

    # -- facts about the run ----------------------------------------------------------------------------------------------

    def set_meta(self, key: str, value: Any) -> None:
        """Remember a JSON value under `key`, in place of what was there."""
        text = to_json(value)
        with self._transaction(writing=True) as connection:
            changed = connection.execute(update(meta_table).where(meta_table.c.key == key).values(value=text))
            if changed.rowcount == 0:
                connection.execute(insert(meta_table).values(key=key, value=text))

    def get_meta(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        with self._transaction() as connection:
            text = connection.execute(select(meta_table.c.value).where(meta_table.c.key == key)).scalar()
        try:
            return default if text is None else from_json(text)
        except ValueError as error:
            raise RunError(f"{self.where}: damaged (meta {key!r}: {error})") from error

    # -- writing trials ---------------------------------------------------------------------------------------------------

    def propose(
        self,
        *,
        searcher: str,
        index: int,
        architecture: Architecture,
        seed: int,
        epochs: int,
        copy_of: int | None = None,
        sampler: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Add a trial in state "proposed", with the next number.

        Args:
            searcher: who proposes.
            index: its how-manieth proposal, from 0; (searcher, index) is taken once only.
            architecture: what to build.
            seed: of the training.
            epochs: training budget.
            copy_of: the trial whose result this one will share.
            sampler: what the searcher wants to see again, JSON.

        Raises:
            RunError: (searcher, index) is taken, or there is no trial `copy_of`.
        """
        with self._transaction(writing=True) as connection:
            number = connection.execute(_NEXT).scalar_one()
            values = {
                "trial": number,
                "searcher": searcher,
                "index": index,
                "state": "proposed",
                "digest": architecture.digest,
                "seed": seed,
                "epochs": epochs,
                "attempts": 0,
                "copy_of": copy_of,
                "violations": "{}",
                "sampler": to_json(dict(sampler or {})),
                "architecture": architecture.to_json(),
                "proposed_at": now(),
            }
            try:
                connection.execute(_INSERT, values | metric_columns({}))
            except IntegrityError as error:
                no_copy = "" if copy_of is None else f", or that there is no trial {copy_of} to copy"
                raise RunError(
                    f"{self.where}: expected a new proposal, found that number {index} of {searcher!r} is there already"
                    f"{no_copy}: is another process writing to this run?"
                ) from error
            return self._read(connection, number)

    def start(self, trial: int) -> Trial:
        """Begin the next attempt at a trial that is not finished; returns it "running" with the attempt's number.

        Raises:
            ValueError: no such trial, or it is finished.
        """
        with self._transaction(writing=True) as connection:
            changed = connection.execute(_START, {"at": trial, "moment": now()})
            found = self._read(connection, trial)
            if changed.rowcount == 0:
                raise ValueError(f"trial {trial}: expected a trial to start, found it {found.state}; results are final")
            return found

    def finish(
        self,
        trial: int,
        attempt: int,
        state: State,
        *,
        metrics: Mapping[str, Metric] | None = None,
        violations: Mapping[str, float] | None = None,
        curve: Sequence[Mapping[str, Any]] = (),
        duration_s: float | None = None,
        error: str | None = None,
    ) -> bool:
        """Record the result of an attempt, once.

        A trial that needs no training (a copy, or one known to be infeasible) may be finished without `start`, as attempt 0.

        Args:
            trial: its number.
            attempt: which attempt this is the answer of; the trial's `attempts` when it was started.
            state: "complete", "infeasible" or "failed".
            metrics: name with unit -> value; NaN and infinities are kept as they are.
            violations: constraint -> violation, <= 0 is feasible.
            curve: rows of the training history.
            duration_s: wall time, seconds.
            error: traceback or reason.

        Returns:
            True if recorded; False, and nothing is changed, if the trial is finished or has a newer attempt.

        Raises:
            ValueError: no such trial or state.
        """
        if state not in FINAL_STATES:
            raise ValueError(f"trial {trial}: expected a final state ({', '.join(FINAL_STATES)}), got {state!r}")
        values = {
            **metric_columns(metrics or {}),
            "state": state,
            "violations": to_json(dict(violations or {})),
            "error": storable_text(error),
            "duration_s": duration_s,
            "finished_at": now(),
        }
        rows = [{"trial": trial, "row": i, "values": to_json(dict(row))} for i, row in enumerate(curve)]
        with self._transaction(writing=True) as connection:
            changed = connection.execute(_FINISH, values | {"at": trial, "attempt": attempt})
            if changed.rowcount == 0:
                self._read(connection, trial)  # raises if there is none
                return False
            connection.execute(_CLEAR_CURVE, {"at": trial})
            if rows:
                connection.execute(_INSERT_CURVE, rows)
            return True

    def update_metrics(
        self,
        trial: int,
        metrics: Mapping[str, Metric],
        *,
        state: State | None = None,
        violations: Mapping[str, float] | None = None,
        error: str | None = None,
    ) -> Trial:
        """Add metrics to a trial (test accuracy, a later latency); those of the same name are replaced.

        Args:
            trial: its number.
            metrics: what is new.
            state: what the trial is in the light of it, e.g. "infeasible" after a second measurement; None to leave it.
            violations: as in `finish`; None to leave them.
            error: why it failed after all; None to leave what is there.

        Raises:
            ValueError: no such trial.
        """
        values: dict[str, Any] = {} if state is None else {"state": state}
        if error is not None:
            values["error"] = storable_text(error)
        if violations is not None:
            values["violations"] = to_json(dict(violations))
        with self._transaction(writing=True) as connection:
            merged = self._read(connection, trial).metrics | dict(metrics)
            query = update(trial_table).where(trial_table.c.trial == trial)
            connection.execute(query.values(metric_columns(merged) | values))
            return self._read(connection, trial)

    def recover(self) -> list[Trial]:
        """Put every trial that a dead driver left "running" back to "proposed" and return those, in order.

        Their attempts stay counted, so the next `start` makes the old attempt's answer stale.
        """
        with self._transaction(writing=True) as connection:
            query = select(_T.trial).where(_T.state == "running").order_by(_T.trial)
            numbers = connection.execute(query).scalars().all()
            connection.execute(update(trial_table).where(_T.state == "running").values(state="proposed"))
            return [self._read(connection, number) for number in numbers]

    # -- reading trials ---------------------------------------------------------------------------------------------------

    def trials(self, searcher: str | None = None) -> list[Trial]:
        """All trials in order of their number, or those of one searcher (which is the order of its indices)."""
        query = select(trial_table).order_by(_T.trial)
        if searcher is not None:
            query = query.where(_T.searcher == searcher)
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return [self._trial(row) for row in rows]

    def trial(self, trial: int) -> Trial:
        """One trial.

        Raises:
            ValueError: there is none of that number.
        """
        with self._transaction() as connection:
            return self._read(connection, trial)

    def curve(self, trial: int) -> list[dict[str, Any]]:
        """The learning curve of a trial as it was given to `finish`; empty if it has none."""
        query = select(curve_table.c["values"]).where(curve_table.c.trial == trial).order_by(curve_table.c.row)
        with self._transaction() as connection:
            texts = connection.execute(query).scalars().all()
        try:
            return [from_json(text) for text in texts]
        except ValueError as error:
            raise RunError(f"{self.where}: damaged (curve of trial {trial}: {error})") from error

    def _read(self, connection: Connection, trial: int) -> Trial:
        row = connection.execute(_READ, {"at": trial}).one_or_none()
        if row is None:
            count = connection.execute(select(func.count()).select_from(trial_table)).scalar_one()
            raise ValueError(f"no trial {trial}: {self.where} holds {count}, numbered from 0")
        return self._trial(row)

    def _trial(self, row: Any) -> Trial:
        try:
            return row_to_trial(row)
        except (ValueError, TypeError, SpaceError) as error:
            raise RunError(f"{self.where}: damaged (trial {row._mapping['trial']}: {error})") from error
