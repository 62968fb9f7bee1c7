"""One driver per run on a PostgreSQL server: a lease, a row that its holder renews and that others may take when it ran out.

The database's clock decides. Every writing transaction of the holder begins at the same row, so a driver that lost its lease
without noticing (a partition, a machine that slept) can write nothing. Files are `nas.lock`'s. Start with `Lease.take`.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    TIMESTAMP,
    Column,
    Double,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    func,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from nas.database import Database
from nas.errors import RunError
from nas.server import lost

LEASE_S = 30.0
"""How long a driver may be silent before another takes its run."""

lease_metadata = MetaData()
driver_table = Table(
    "driver",
    lease_metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("owner", String(32), nullable=False),  # "": nobody
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("machine", Text, nullable=False),
    Column("lease_s", Double, nullable=False),
    Column("until", TIMESTAMP(timezone=True), nullable=False),
    Column("last", String(32), nullable=False),  # the token of the last transaction
)

_D = driver_table.c
_NOW = func.clock_timestamp()
_MINE = bindparam("mine", type_=String)
_LENGTH = func.make_interval(0, 0, 0, 0, 0, 0, _D.lease_s)
# A server that was away could not be told: its start counts as a renewal.
_OVER = func.greatest(_D.until, func.pg_postmaster_start_time() + _LENGTH) < _NOW
_LOOK = select(driver_table, _OVER.label("over"), func.extract("epoch", _D.until - _NOW).label("left"))
_RENEW = update(driver_table).where(_D.owner == _MINE).values(until=_NOW + _LENGTH)
_ENTER = update(driver_table).where(_D.owner == _MINE).values(until=_NOW + _LENGTH, last=bindparam("token"))
_RELEASE = update(driver_table).where(_D.owner == _MINE).values(owner="", until=_NOW)


@dataclass(frozen=True)
class Holder:
    """Who holds a run.

    Attributes:
        pid, host: of the process.
        left_s: until its lease ends, seconds, if it is not renewed; below 0 it may be taken soon.
    """

    pid: int
    host: str
    left_s: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A run that is ours; renewed by a thread until `release`. Made by `Lease.take`. A `nas.transactions.Guard`."""

    def __init__(self, database: Database, owner: str, lease_s: float) -> None:
        self._database = database
        self._owner = owner
        self._pause_s = lease_s / 6
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, database: Database, lease_s: float = LEASE_S) -> Self | Holder:
        """The lease, or who has it. A holder of this machine whose process is gone has lost it at once.

        Args:
            database: the run's, on a server; its table of one row is made if it is missing.
            lease_s: how long we may be silent.

        Raises:
            DBAPIError: the server refused or cannot be reached.
        """
        owner = uuid.uuid4().hex
        with database.engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            _make_table(connection)
            holder = _holder(connection.execute(_LOOK).one())
            if holder is not None:
                return holder
            holder = _holder(connection.execute(_LOOK.with_for_update()).one())
            if holder is not None:
                return holder
            facts = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
            length = func.make_interval(0, 0, 0, 0, 0, 0, literal(lease_s, Double))
            connection.execute(update(driver_table).values(**facts, lease_s=lease_s, until=_NOW + length, last=""))
        return cls(database, owner, lease_s)

    def release(self) -> None:
        """Let others have the run. Twice is fine; a server that is away finds out when the lease ends."""
        self._end.set()
        self._thread.join(timeout=10)
        with suppress(SQLAlchemyError), self._database.engine.begin() as connection:
            connection.execute(_RELEASE, {"mine": self._owner})

    def enter(self, connection: Connection, token: str) -> None:
        """Begin a writing transaction: it excludes that another takes the run before its end.

        Raises:
            RunError: another has it already.
        """
        if connection.execute(_ENTER, {"mine": self._owner, "token": token}).rowcount == 0:
            raise RunError(self._why_not(connection))

    def did(self, connection: Connection, token: str) -> bool:
        """Whether the transaction that entered with `token` was committed.

        Raises:
            RunError: another has the run, so nobody can say.
        """
        row = connection.execute(select(_D.owner, _D.last).with_for_update()).one()
        if row.owner != self._owner:
            raise RunError(self._why_not(connection))
        return bool(row.last == token)

    def _why_not(self, connection: Connection) -> str:
        row = connection.execute(select(_D.owner, _D.pid, _D.host)).one_or_none()
        by = "" if row is None or not row.owner else f": process {row.pid} on {row.host} has taken it over"
        return (
            f"{self._database.where}: this driver no longer has the run{by}. It was silent for longer than its lease (no "
            "connection, or a machine that slept) and stops now; what it did before is kept. Look at the run, or wait for it with "
            "--standby"
        )

    def _renew(self) -> None:
        while not self._end.wait(self._pause_s):
            # The driver's own transactions notice what is wrong, and say so.
            with suppress(SQLAlchemyError), self._database.engine.begin() as connection:
                if connection.execute(_RENEW, {"mine": self._owner}).rowcount == 0:
                    return


def wait_for_lease(
    database: Database, *, lease_s: float = LEASE_S, standby: bool = False, message: Callable[[str], None]
) -> Lease:
    """The run's lease.

    Args:
        database: the run's, on a server.
        lease_s: how long the holder may be silent.
        standby: wait for it until its holder ends, however it ends; also while the server cannot be reached.
        message: is told whom we wait for, once.

    Raises:
        RunError: another driver (named) has the run.
        DBAPIError: the server refused or cannot be reached.
    """
    pause, told = threading.Event(), ""
    while True:
        taken = _take(database, lease_s, patient=bool(told))
        if isinstance(taken, Lease):
            return taken
        if taken is not None and not standby:
            raise RunError(
                f"{database.where}: the run is in use by {taken}. Wait for it or end it (where that process is dead, for "
                f"{max(1.0, taken.left_s):.0f} s), or give --standby to take over when it ends; looking at results needs no lock"
            )
        if taken is not None and str(taken) != told:
            told = str(taken)
            message(f"standing by: the run is in use by {taken}; this driver takes over when that one ends")
        pause.wait(min(1.0, lease_s / 5))


def _take(database: Database, lease_s: float, *, patient: bool) -> Lease | Holder | None:
    """As `Lease.take`; None where we wait already and the server is away for now."""
    try:
        return Lease.take(database, lease_s)
    except DBAPIError as error:
        if patient and lost(error):
            return None
        raise


def _make_table(connection: Connection) -> None:
    if connection.dialect.has_table(connection, driver_table.name):
        return
    connection.execute(text("SELECT pg_advisory_xact_lock(7268, hashtext(current_schema()))"))
    lease_metadata.create_all(connection)
    empty = {"id": 0, "owner": "", "host": "", "pid": 0, "machine": "", "lease_s": 0.0, "last": ""}
    connection.execute(insert(driver_table).values(**empty, until=_NOW).on_conflict_do_nothing())


def _holder(row: Any) -> Holder | None:
    if not row.owner or row.over:
        return None
    if row.machine and row.machine == _machine() and not _alive(row.pid):
        return None
    return Holder(row.pid, row.host, float(row.left))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _machine() -> str:
    """This machine since it was started, as its processes see it; "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
