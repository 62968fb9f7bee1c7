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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import BindParameter, bindparam, delete, func, insert, inspect, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from nas.database import Database, connect, connect_to_copy, explain, place, sqlite_path
from nas.errors import RunError
from nas.lease import LEASE_S, Lease, wait_for_lease
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
from nas.transactions import PATIENCE_S, Transactions, Work
from search_spaces.architecture import Architecture, SpaceError

__all__ = ["Metric", "State", "Store", "Trial"]

T = TypeVar("T")

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

    One process writes (the run's driver); threads of it may share the object. On a server that is enforced here, by a lease
    that is held while the object is open for writing; a transaction that loses its connection is repeated for 5 minutes.

    Attributes:
        where: the database in messages; never with a password.
    """

    def __init__(self, database: Database, *, read_only: bool, lease: Lease | None = None) -> None:
        self.where = database.where
        self.read_only = read_only
        self._engine = database.engine
        self._lease = lease
        self._transactions = Transactions(database)
        self._transactions.guard = lease

    # -- opening ----------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, url_or_path: str | Path, run: str = "run") -> Store:
        """Make an empty run database and open it for writing. A file appears whole or not at all.

        Args:
            url_or_path: file, or URL of a PostgreSQL database.
            run: the run's name; on a server it has a schema of that name.

        Raises:
            RunError: there is one already, or the place cannot be written to.
        """
        path = sqlite_path(url_or_path)
        if path is None:
            database = connect(url_or_path, "create", run)
            if database.server:
                return cls.serve(str(url_or_path), run, must_be="new")
            store = cls(database, read_only=False)
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
                unfinished.where = unfinished._transactions.where = str(path)
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
    def open(
        cls, url_or_path: str | Path, read_only: bool = False, run: str = "run", *, patience_s: float = 0.0
    ) -> Store:
        """Open the database of a run that exists.

        Args:
            url_or_path: file, or URL of a PostgreSQL database.
            read_only: for looking at a run, also while it is running or where nothing may be written.
            run: the run's name, on a server.
            patience_s: how long to try to reach a server; once it was reached, it is waited for whenever it is away.

        Raises:
            RunError: no such database, damaged, made by a newer version, or not of a run.
        """
        path = sqlite_path(url_or_path)
        database = connect(url_or_path, "read" if read_only else "write", run)
        if database.server and not read_only:
            database.engine.dispose()
            return cls.serve(str(url_or_path), run, must_be="old")
        store = cls(database, read_only=read_only)
        store._transactions.patience_s = patience_s
        try:
            if read_only and path is not None and not store._can_read():
                store.close()
                store = cls(connect_to_copy(path), read_only=True)
            store._check(whole=path is not None and not read_only)
        except BaseException:
            store.close()
            raise
        store._transactions.patience_s = PATIENCE_S
        return store

    @classmethod
    def serve(
        cls,
        url: str,
        run: str,
        *,
        identity: str | None = None,
        place: str = "",
        must_be: Literal["new", "old", "either"] = "either",
        standby: bool = False,
        lease_s: float = LEASE_S,
        message: Callable[[str], None] = lambda text: None,
    ) -> Store:
        """Open the database of a run on a server for writing, as its only driver; made if it is not there.

        Args:
            url: of a PostgreSQL database.
            run: the run's name; its schema is named after it.
            identity: what tells this run from another of the same name (`nas.executors.travel.run_id`); None: not asked.
            place: where its folder is, for messages about it.
            must_be: whether there may or must be one already.
            standby: wait until another driver of this run has ended.
            lease_s: how long a driver may be silent before others take over, seconds.
            message: is told whom we wait for, and when the server is away and back.

        Raises:
            RunError: the server cannot be reached or refuses; another driver has the run; a run of the same name belongs to
                another folder.
        """
        database = connect(url, "write" if must_be == "old" else "create", run)
        store = cls(database, read_only=False)
        try:
            store._transactions.patience_s = 0.0
            there = store._has_tables()
            if must_be == "old" and not there:
                raise RunError(f"{database.where}: not the database of a run (there is none of the name {run!r})")
            if there:
                store._check_identity(identity, run)
            try:
                lease = wait_for_lease(database, lease_s=lease_s, standby=standby, message=message)
            except DBAPIError as error:
                raise explain(error, database.where) from error
            store._lease = store._transactions.guard = lease
            if must_be == "new" or not store._has_tables():
                store._make_tables({"run_id": identity, "run_folder": place} if identity else {})
            store._check_identity(identity, run)
            store._check(whole=False)
            store._transactions.patience_s = PATIENCE_S
            store._transactions.message = message
        except BaseException:
            store.close()
            raise
        return store

    def on_message(self, message: Callable[[str], None]) -> None:
        """Tell `message` when the server cannot be reached, and when it is back."""
        self._transactions.message = message

    def close(self) -> None:
        """Give the database back. Twice is fine."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
        with suppress(DBAPIError, sqlite3.Error):
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_tables(self) -> bool:
        return self._read_with(lambda connection: inspect(connection).has_table("trial"))

    def _make_tables(self, facts: Mapping[str, Any] | None = None) -> None:
        if self._has_tables():
            raise RunError(
                f"{self.where}: a run's tables are there already. Continue that run, or choose another database"
            )
        with self.transaction():
            self._write_with(lambda connection: metadata.create_all(connection))
            self.set_meta("schema_version", SCHEMA_VERSION)
            self.set_meta("created_at", now())
            for key, value in (facts or {}).items():
                self.set_meta(key, value)

    def _check_identity(self, identity: str | None, run: str) -> None:
        found = self.get_meta("run_id")
        if identity is not None and found != identity:
            raise RunError(
                f"{self.where}: a run of the name {run!r} is there already and belongs to another folder "
                f"({self.get_meta('run_folder', 'unknown')}); give the new one another name (--set run.name=...) or database"
            )

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
            found = self._read_with(lambda connection: connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
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
        self._check_writable()
        with self._transactions.block():
            yield

    def _check_writable(self) -> None:
        if self.read_only:
            raise RunError(f"{self.where}: opened for reading only")

    def _read_with(self, work: Work[T]) -> T:
        return self._transactions.run(work, writing=False)

    def _write_with(self, work: Work[T]) -> T:
        """Call `work` in a transaction; again if its connection was lost. So `work` depends on nothing but the database."""
        self._check_writable()
        return self._transactions.run(work, writing=True)

    # -- facts about the run ----------------------------------------------------------------------------------------------

    def set_meta(self, key: str, value: Any) -> None:
        """Remember a JSON value under `key`, in place of what was there."""
        text = to_json(value)

        def work(connection: Connection) -> None:
            changed = connection.execute(update(meta_table).where(meta_table.c.key == key).values(value=text))
            if changed.rowcount == 0:
                connection.execute(insert(meta_table).values(key=key, value=text))

        self._write_with(work)

    def get_meta(self, key: str, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        query = select(meta_table.c.value).where(meta_table.c.key == key)
        text = self._read_with(lambda connection: connection.execute(query).scalar())
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
        values = {
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
            **metric_columns({}),
        }

        def work(connection: Connection) -> Trial:
            number = connection.execute(_NEXT).scalar_one()
            try:
                connection.execute(_INSERT, values | {"trial": number})
            except IntegrityError as error:
                no_copy = "" if copy_of is None else f", or that there is no trial {copy_of} to copy"
                raise RunError(
                    f"{self.where}: expected a new proposal, found that number {index} of {searcher!r} is there already"
                    f"{no_copy}: is another process writing to this run?"
                ) from error
            return self._read(connection, number)

        return self._write_with(work)

    def start(self, trial: int) -> Trial:
        """Begin the next attempt at a trial that is not finished; returns it "running" with the attempt's number.

        Raises:
            ValueError: no such trial, or it is finished.
        """
        moment = now()

        def work(connection: Connection) -> Trial:
            changed = connection.execute(_START, {"at": trial, "moment": moment})
            found = self._read(connection, trial)
            if changed.rowcount == 0:
                raise ValueError(f"trial {trial}: expected a trial to start, found it {found.state}; results are final")
            return found

        return self._write_with(work)

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

        def work(connection: Connection) -> bool:
            changed = connection.execute(_FINISH, values | {"at": trial, "attempt": attempt})
            if changed.rowcount == 0:
                self._read(connection, trial)  # raises if there is none
                return False
            _write_curve(connection, trial, curve)
            return True

        return self._write_with(work)

    def update_metrics(
        self,
        trial: int,
        metrics: Mapping[str, Metric],
        *,
        state: State | None = None,
        violations: Mapping[str, float] | None = None,
        error: str | None = None,
        curve: Sequence[Mapping[str, Any]] | None = None,
    ) -> Trial:
        """Add metrics to a trial (test accuracy, a later latency); those of the same name are replaced.

        Args:
            trial: its number.
            metrics: what is new.
            state: what the trial is in the light of it, e.g. "infeasible" after a second measurement; None to leave it.
            violations: as in `finish`; None to leave them.
            error: why it failed after all; None to leave what is there.
            curve: rows of the training history so far; None to leave what is there.

        Raises:
            ValueError: no such trial.
        """
        values: dict[str, Any] = {} if state is None else {"state": state}
        if error is not None:
            values["error"] = storable_text(error)
        if violations is not None:
            values["violations"] = to_json(dict(violations))

        def work(connection: Connection) -> Trial:
            merged = self._read(connection, trial).metrics | dict(metrics)
            query = update(trial_table).where(trial_table.c.trial == trial)
            connection.execute(query.values(metric_columns(merged) | values))
            if curve is not None:
                _write_curve(connection, trial, curve)
            return self._read(connection, trial)

        return self._write_with(work)

    def recover(self) -> list[Trial]:
        """Put every trial that a dead driver left "running" back to "proposed" and return those, in order.

        Their attempts stay counted, so the next `start` makes the old attempt's answer stale.
        """

        def work(connection: Connection) -> list[Trial]:
            query = select(_T.trial).where(_T.state == "running").order_by(_T.trial)
            numbers = connection.execute(query).scalars().all()
            connection.execute(update(trial_table).where(_T.state == "running").values(state="proposed"))
            return [self._read(connection, number) for number in numbers]

        return self._write_with(work)

    # -- reading trials ---------------------------------------------------------------------------------------------------

    def trials(self, searcher: str | None = None) -> list[Trial]:
        """All trials in order of their number, or those of one searcher (which is the order of its indices)."""
        query = select(trial_table).order_by(_T.trial)
        if searcher is not None:
            query = query.where(_T.searcher == searcher)
        rows = self._read_with(lambda connection: connection.execute(query).all())
        return [self._trial(row) for row in rows]

    def trial(self, trial: int) -> Trial:
        """One trial.

        Raises:
            ValueError: there is none of that number.
        """
        return self._read_with(lambda connection: self._read(connection, trial))

    def curve(self, trial: int) -> list[dict[str, Any]]:
        """The learning curve of a trial as it was given last; empty if it has none."""
        query = select(curve_table.c["values"]).where(curve_table.c.trial == trial).order_by(curve_table.c.row)
        texts = self._read_with(lambda connection: connection.execute(query).scalars().all())
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


def _write_curve(connection: Connection, trial: int, curve: Sequence[Mapping[str, Any]]) -> None:
    rows = [{"trial": trial, "row": i, "values": to_json(dict(row))} for i, row in enumerate(curve)]
    connection.execute(_CLEAR_CURVE, {"at": trial})
    if rows:
        connection.execute(_INSERT_CURVE, rows)
