"""The tables through which a driver hands jobs to workers anywhere, and every statement on them. PostgreSQL only.

They lie in the run's schema beside its trials, which they never touch: the driver stays the one writer of those.

    queue_setup     one row: what workers set up, and the generation, which is counted up by every driver that begins
    queue_job       "open" -> "running" (a worker has it until `lease_until`) -> "ended" (its last message is there)
    queue_message   what workers report of a job, in order
    queue_file      what a job needs, and what it wrote, for workers that do not see the run's folder; in parts
    queue_worker    who is there, and when it was last heard of

A job is a worker's as long as its row says so: what a worker says of any other job is dropped, whoever is late and why. All times
are the database's. Every function is one step of a transaction of the caller's and may be repeated when it is not known whether
that was committed: nothing then happens twice. Start with `begin` (driver) and `claim` (worker).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    column,
    delete,
    func,
    select,
    table,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from nas.executors.travel import Files

SETUP_FILES = 0
"""In place of a job's id: the files that the task's setup reads."""
PART_BYTES = 8 << 20
FINAL = ("done", "failed", "lost")
ASKS = "asks"
"""Kind of message by which a worker asks for the files of its job."""

metadata = MetaData()
_setup = Table(
    "queue_setup",
    metadata,
    Column("one", Integer, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("setup", LargeBinary, nullable=False),
    Column("settings", Text, nullable=False),
)
_job = Table(
    "queue_job",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("trial", BigInteger, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("needs", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("served", Integer, nullable=False),
    Column("worker", Text),
    Column("lease_until", DateTime(timezone=True)),
)
Index("queue_job_open", _job.c.id, postgresql_where=_job.c.state == "open")
_message = Table(
    "queue_message",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("job", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    UniqueConstraint("job", "number"),
)
_file = Table(
    "queue_file",
    metadata,
    Column("job", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("path", Text, primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    Column("content", LargeBinary),
)
_worker = Table(
    "queue_worker",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("threads", Integer),
    Column("generation", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("versions", Text, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),
    Column("seen", DateTime(timezone=True), nullable=False),
)
_facts = table("meta", column("key"), column("value"))  # of `nas.schema`, which brings torch along
_NOW = func.clock_timestamp()


@dataclass(frozen=True)
class Setup:
    """What a driver wants set up.

    Attributes:
        task: "module:function".
        setup: encoded JSON for it.
        settings: lease_s, timeout_s, threads, folder, identity (`nas.executors.travel.run_id`), versions.
        generation: of the driver, from 1.
        open: False once the driver has closed.
    """

    task: str
    setup: bytes
    settings: dict[str, Any]
    generation: int = 0
    open: bool = True


@dataclass(frozen=True)
class Claimed:
    """A job that a worker has."""

    id: int
    trial: int
    attempt: int
    payload: bytes
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """What a worker said of a job; `number` counts them from 1, per job."""

    id: int
    job: int
    number: int
    kind: str
    body: bytes


@dataclass(frozen=True)
class Member:
    """A worker as the others see it.

    Attributes:
        id: no other process ever has it.
        state: "starting", "ready" or "broken", of `generation`.
        error: of a broken one, {"type", "message"}.
    """

    id: str
    host: str
    pid: int
    slots: int
    versions: dict[str, str]
    threads: int | None = None
    generation: int = 0
    state: str = "starting"
    error: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.host}, process {self.pid}"


def unreachable(error: DBAPIError) -> bool:
    """Whether this may pass by itself: no connection, a server that stops or starts, a statement that met another."""
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def exists(connection: Connection) -> bool:
    """Whether a driver of this run ever made the tables."""
    return connection.execute(select(func.to_regclass("queue_setup"))).scalar() is not None


# -- the driver -----------------------------------------------------------------------------------------------------------


def begin(connection: Connection, setup: Setup) -> int:
    """Become the driver: jobs of earlier ones are gone, workers set up what this one wants. Returns the generation."""
    metadata.create_all(connection)
    values = {
        "state": "open",
        "task": setup.task,
        "setup": setup.setup,
        "settings": json.dumps(setup.settings),
    }
    statement = insert(_setup).values(one=1, generation=1, **values)
    statement = statement.on_conflict_do_update(
        index_elements=[_setup.c.one], set_=values | {"generation": _setup.c.generation + 1}
    )
    generation: int = connection.execute(statement.returning(_setup.c.generation)).scalar_one()
    # Jobs first: whoever is writing about one has finished when its row can be removed.
    for each in (_job, _message, _file):
        connection.execute(delete(each))
    return generation


def end(connection: Connection, generation: int) -> None:
    """The driver's last word; nothing happens if there is a newer one."""
    closed = update(_setup).where(_setup.c.generation == generation).values(state="closed")
    if connection.execute(closed).rowcount:
        for each in (_job, _message, _file):
            connection.execute(delete(each))


def add(connection: Connection, job: Claimed, generation: int) -> None:
    """Offer a job."""
    values = {"payload": job.payload, "needs": json.dumps(job.needs), "state": "open", "served": 0}
    numbers = {"id": job.id, "generation": generation, "trial": job.trial, "attempt": job.attempt}
    connection.execute(insert(_job).values(**numbers, **values).on_conflict_do_nothing())


def remove(connection: Connection, jobs: Iterable[int]) -> None:
    """Take jobs back, with everything that was said of them."""
    ids = list(jobs)
    if ids:
        connection.execute(delete(_job).where(_job.c.id.in_(ids)))
        connection.execute(delete(_message).where(_message.c.job.in_(ids)))
        connection.execute(delete(_file).where(_file.c.job.in_(ids)))


def messages(connection: Connection, limit: int = 200) -> list[Message]:
    """The oldest messages, in order; they stay until `forget`."""
    statement = select(_message).order_by(_message.c.id).limit(limit)
    return [Message(row.id, row.job, row.number, row.kind, row.body) for row in connection.execute(statement)]


def forget(connection: Connection, read: Iterable[Message]) -> None:
    """Remove messages, with their files."""
    for message in read:
        connection.execute(delete(_message).where(_message.c.id == message.id))
        connection.execute(delete(_file).where(_file.c.job == message.job, _file.c.number == message.number))


def serve(connection: Connection, job: int, files: Files) -> None:
    """Give the worker of a job the files it asked for."""
    if connection.execute(update(_job).where(_job.c.id == job).values(served=1)).rowcount:
        put_files(connection, job, 0, files)


def leases(connection: Connection, generation: int) -> dict[int, tuple[str | None, bool]]:
    """Job -> (who has it, whether the lease is over), of all jobs of a driver."""
    over = (_job.c.state == "running") & (_job.c.lease_until < _NOW)
    rows = connection.execute(select(_job.c.id, _job.c.worker, over).where(_job.c.generation == generation))
    return {job: (worker, bool(late)) for job, worker, late in rows}


def members(connection: Connection, lease_s: float) -> list[Member]:
    """The workers that were heard of within a lease; others are forgotten (one that comes back says so)."""
    connection.execute(delete(_worker).where(_worker.c.seen < _NOW - timedelta(seconds=lease_s)))
    rows = connection.execute(select(_worker).order_by(_worker.c.since, _worker.c.id))
    return [
        Member(
            *(row.id, row.host, row.pid, row.slots, json.loads(row.versions)),
            *(row.threads, row.generation, row.state, json.loads(row.error)),
        )
        for row in rows
    ]


# -- the worker -----------------------------------------------------------------------------------------------------------


def read_setup(connection: Connection, known: int = 0) -> Setup | None:
    """What is to be set up; None if no driver ever was. Without task and setup where the generation is `known` already."""
    row = connection.execute(select(_setup.c.generation, _setup.c.state)).one_or_none()
    if row is None:
        return None
    if row.generation == known:
        return Setup("", b"", {}, known, row.state == "open")
    row = connection.execute(select(_setup)).one()
    return Setup(row.task, row.setup, json.loads(row.settings), row.generation, row.state == "open")


def run_finished(connection: Connection) -> bool:
    """Whether the run has everything it was to have (`nas.store` says so in the table of facts about a run)."""
    if connection.execute(select(func.to_regclass("meta"))).scalar() is None:
        return False
    return connection.execute(select(_facts.c.value).where(_facts.c.key == "finished")).scalar() == "true"


def generation_of(connection: Connection) -> int:
    """The generation of the newest driver."""
    return int(connection.execute(select(_setup.c.generation)).scalar() or 0)


def beat(connection: Connection, me: Member, held: Sequence[int], lease_s: float) -> set[int]:
    """Say that a worker is there, and renew its leases; returns those of the jobs it holds that are its own still."""
    values = {
        **{"generation": me.generation, "state": me.state, "error": json.dumps(me.error), "seen": _NOW},
        **{"host": me.host, "pid": me.pid, "slots": me.slots, "threads": me.threads},
    }
    statement = insert(_worker).values(id=me.id, versions=json.dumps(me.versions), since=_NOW, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=[_worker.c.id], set_=values))
    if not held:
        return set()
    mine = update(_job).where(_job.c.id.in_(list(held)), _job.c.worker == me.id).values(lease_until=_until(lease_s))
    return set(connection.execute(mine.returning(_job.c.id)).scalars())


def claim(connection: Connection, worker: str, generation: int, lease_s: float) -> Claimed | None:
    """Take the oldest open job; two workers never get the same, and neither waits for the other."""
    oldest = select(_job.c.id).where(_job.c.state == "open", _job.c.generation == generation).order_by(_job.c.id)
    taken = (
        update(_job)
        .where(_job.c.id == oldest.limit(1).with_for_update(skip_locked=True).scalar_subquery())
        .values(state="running", worker=worker, served=0, lease_until=_until(lease_s))
    )
    row = connection.execute(taken.returning(_job)).one_or_none()
    if row is None:
        return None
    return Claimed(row.id, row.trial, row.attempt, row.payload, tuple(json.loads(row.needs)))


def post(
    connection: Connection,
    worker: str,
    job: int,
    number: int,
    kind: str,
    body: bytes,
    files: Mapping[str, bytes | None],
    lease_s: float,
) -> bool:
    """Say something of a job; False, and nothing is kept, if it is not this worker's any more."""
    state = "ended" if kind in FINAL else "running"
    mine = update(_job).where(_job.c.id == job, _job.c.worker == worker)
    if not connection.execute(mine.values(state=state, lease_until=_until(lease_s))).rowcount:
        return False
    statement = insert(_message).values(job=job, number=number, kind=kind, body=body).on_conflict_do_nothing()
    if connection.execute(statement).rowcount:
        put_files(connection, job, number, files)
    return True


def served(connection: Connection, worker: str, job: int) -> Files | None:
    """The files that were asked for; None while they are not there."""
    mine = select(_job.c.served).where(_job.c.id == job, _job.c.worker == worker)
    return get_files(connection, job, 0) if connection.execute(mine).scalar() else None


def give_back(connection: Connection, worker: str, jobs: Iterable[int]) -> None:
    """Let others have jobs that have not begun."""
    mine = update(_job).where(_job.c.id.in_(list(jobs)), _job.c.worker == worker)
    connection.execute(mine.values(state="open", worker=None, lease_until=None))


def leave(connection: Connection, worker: str) -> None:
    """A worker's last word."""
    connection.execute(delete(_worker).where(_worker.c.id == worker))


# -- files ----------------------------------------------------------------------------------------------------------------


def put_files(connection: Connection, job: int, number: int, files: Mapping[str, bytes | None]) -> None:
    """Keep files for a job (number 0), or with one of its messages; in parts, as one value has at most 1 GB."""
    for path, content in files.items():
        for part in range(0, max(1, len(content or b"")), PART_BYTES):
            piece = None if content is None else content[part : part + PART_BYTES]
            row = {"job": job, "number": number, "path": path, "part": part // PART_BYTES, "content": piece}
            connection.execute(insert(_file).values(**row).on_conflict_do_nothing())


def get_files(connection: Connection, job: int, number: int) -> Files:
    """What `put_files` kept."""
    parts: dict[str, list[bytes | None]] = {}
    rows = select(_file.c.path, _file.c.content).where(_file.c.job == job, _file.c.number == number)
    for path, content in connection.execute(rows.order_by(_file.c.path, _file.c.part)):
        parts.setdefault(path, []).append(content)
    return {
        path: None if found[0] is None else b"".join(part or b"" for part in found) for path, found in parts.items()
    }


def _until(lease_s: float) -> Any:
    return _NOW + timedelta(seconds=lease_s)
