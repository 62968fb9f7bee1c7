"""Runs jobs in `nas worker` processes anywhere: a driver and its workers meet in the run's PostgreSQL database and nowhere else.

For clusters without Ray (SLURM and its like): nothing listens but the database, and workers come and go as they please. A worker
has a job on a lease that it renews; one that is not heard of for that long loses it, and the job is "lost" without blame. A driver
that begins sets the generation one up, so that nothing an earlier driver asked for, and no answer to it, counts any more.

Does not start workers, and does not run jobs (`nas.executors.queue_worker` does). The tables are `nas.executors.work_queue`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from nas.database import explain
from nas.errors import ConfigError, RunError
from nas.executors import work_queue as queue
from nas.executors.base import Event, Job, Placement, check_submit, decode, encode
from nas.executors.task import setup_error
from nas.executors.travel import pack, run_id, unpack
from nas.executors.versions import differences, versions
from nas.executors.work_queue import Claimed, Member, Message, Setup
from nas.server import server_engine, server_url, shown
from nas.storage import DATABASE

LEASE_S = 60.0
PATIENCE_S = 600.0
"""So long without the database, and the search gives up."""
FASTEST_S, SLOWEST_S = 0.01, 0.25
"""Seconds between two looks at the messages: a tenth of the time since something happened, within these. Asking costs one
transaction of this one process, and needs nothing but a connection (a pooler that forgets LISTEN will do)."""
_CENSUS_S = 1.0
"""Least time between two looks at leases and workers, seconds."""
_NEWS_S = 5.0
"""Least time between two messages on workers that came or went, seconds."""


@dataclass(eq=False)
class _Held:
    """A job between submit and its last event; `last`: number of the last message that was read."""

    job: Job
    row: Claimed
    last: int = 0


class WorkersExecutor:
    """See `nas.executors.base.Executor`. `capacity` is what the workers there have room for, as of the last `poll`.

    While the database cannot be reached, `poll` has no events and everything else is done as soon as it is back; no lease ends
    before workers had the time to renew it.

    Args:
        task: "module:function", importable at every worker.
        setup: what the function gets there; JSON. "folder" in it becomes a scratch folder where a worker does not see it.
        placement: workers, threads, timeout_s, folder, setup_needs, storage, run and message are used.
        lease_s: a worker that was not heard of for so many seconds has lost its jobs.

    Raises:
        ConfigError: no PostgreSQL storage.
        RunError: it cannot be reached.
        TypeError: the setup is not JSON.
    """

    def __init__(self, task: str, setup: Mapping[str, Any], placement: Placement, *, lease_s: float = LEASE_S) -> None:
        encoded = encode(setup, "the setup")
        where = _where(placement.storage)
        self._task, self._placement, self._lease_s, self._where = task, placement, lease_s, where
        self._held: dict[int, _Held] = {}  # by trial
        self._jobs: dict[int, _Held] = {}  # by id
        self._unsent: list[Claimed] = []
        self._taken_back: list[int] = []
        self._read: dict[int, Message] = {}  # not known to be removed from the database
        self._events: list[Event] = []
        self._members: dict[str, Member] = {}
        self._names: dict[str, str] = {}  # of those that have gone, too
        self._room = 0
        self._submitted = 0
        self._closed = False
        self._census_at = self._news_at = 0.0
        self._told: set[str] = set()
        self._expire_from = 0.0
        self._looked_at = time.monotonic()
        self._silent_since: float | None = None
        self._last = time.monotonic()  # when something happened
        folder = placement.folder
        settings = {
            "lease_s": lease_s,
            "timeout_s": placement.timeout_s,
            "threads": placement.threads,
            "folder": None if folder is None else str(folder),
            "identity": "" if folder is None else run_id(folder),
            "versions": versions(),
        }
        files = {} if folder is None else pack(folder, placement.setup_needs)
        self._engine = server_engine(placement.storage, placement.run)
        try:
            with self._engine.begin() as connection:
                self.generation = queue.begin(connection, Setup(task, encoded, settings))
                queue.put_files(connection, queue.SETUP_FILES, 0, files)
            with self._engine.begin() as connection:
                self._count(connection)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, DBAPIError):
                raise explain(error, where) from error
            raise

    @property
    def capacity(self) -> int:
        return self._room

    @property
    def members(self) -> list[Member]:
        """The workers that were there at the last look."""
        return list(self._members.values())

    def submit(self, job: Job) -> None:
        payload = check_submit(job, len(self._held), self._room, job.trial in self._held, self._closed)
        self._submitted += 1
        row = Claimed((self.generation << 32) + self._submitted, job.trial, job.attempt, payload, job.needs)
        self._held[job.trial] = self._jobs[row.id] = _Held(job, row)
        self._unsent.append(row)
        self._try_to_send()

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """As promised there. With nothing held it also returns at once, but for what it waits to see the first worker.

        Raises:
            NasError: no worker that is there can set the task up.
            RunError: the database was away for ten minutes, another driver has taken the run over, or a file cannot be written.
        """
        until = time.monotonic() + timeout_s
        while not self._closed:
            self._reach(self._look)
            now = time.monotonic()
            waits = bool(self._held) or not self._room
            if self._events or not waits or now >= until:
                break
            pause = min(SLOWEST_S, max(FASTEST_S, (now - self._last) / 10))
            if self._silent_since is not None:
                pause = random.uniform(0.5, 2.0)
            time.sleep(max(0.0, min(pause, until - now)))
        if self._events:
            self._last = time.monotonic()
        events, self._events = self._events, []
        return events

    def cancel(self, trial: int) -> bool:
        held = self._held.pop(trial, None)
        if held is None:
            return False
        del self._jobs[held.row.id]
        self._taken_back.append(held.row.id)
        self._events = [event for event in self._events if event.trial != trial]
        self._try_to_send()
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._events.clear()
        self._reach(lambda connection: queue.end(connection, self.generation))
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the database -----------------------------------------------------------------------------------------------------

    def _reach(self, step: Callable[[Connection], None]) -> None:
        """Do a step on a connection; where the database cannot be reached it is left for later."""
        now = time.monotonic()
        try:
            with self._engine.connect() as connection:
                step(connection)
                connection.commit()
        except DBAPIError as error:
            trouble = explain(error, self._where)
            if not queue.unreachable(error) and not self._closed:
                raise trouble from error
            if self._silent_since is None:
                self._silent_since = now
                if not self._closed:
                    self._placement.message(f"{trouble}. Workers go on meanwhile")
            elif now > self._silent_since + PATIENCE_S and not self._closed:
                raise trouble from error
            return
        if self._silent_since is not None:
            away_s, self._silent_since = now - self._silent_since, None
            self._placement.message(f"the database is back after {away_s:.0f} s")

    def _try_to_send(self) -> None:
        self._last = time.monotonic()
        if self._silent_since is None:
            self._reach(self._send)

    def _send(self, connection: Connection) -> None:
        if queue.generation_of(connection) != self.generation:
            raise RunError(
                f"{self._where}: another driver has taken over the run {self._placement.run!r}; let that one go on"
            )
        for row in self._unsent:
            if row.id in self._jobs:
                queue.add(connection, row, self.generation)
        queue.remove(connection, self._taken_back)
        connection.commit()
        self._unsent.clear()
        self._taken_back.clear()

    def _look(self, connection: Connection) -> None:
        """Send what is to be sent, read what was said, and now and then look who is there."""
        now = time.monotonic()
        if now > self._looked_at + self._lease_s / 2:  # the database was away, or this process
            self._expire_from = now + self._lease_s / 2  # workers shall have their turn to renew first
        self._send(connection)
        for message in queue.messages(connection):
            if message.id not in self._read:
                self._handle(message, connection)
                self._read[message.id] = message
        if self._read:
            queue.forget(connection, self._read.values())
            connection.commit()
            self._read.clear()
        self._looked_at = now
        if now >= max(self._census_at, self._expire_from):
            self._census_at = now + min(_CENSUS_S, self._lease_s / 4)
            self._count(connection)
            self._expire(connection)
        if self._taken_back:
            self._send(connection)

    # -- jobs -------------------------------------------------------------------------------------------------------------

    def _handle(self, message: Message, connection: Connection) -> None:
        held = self._jobs.get(message.job)
        if held is None or message.number <= held.last:
            return
        folder = self._placement.folder
        if message.kind == queue.ASKS:
            queue.serve(connection, message.job, {} if folder is None else pack(folder, held.job.needs))
            connection.commit()
        else:
            files = queue.get_files(connection, message.job, message.number)
            if folder is not None and files:
                unpack(folder, files)
            self._tell(held, Event(trial=held.job.trial, attempt=held.job.attempt, **decode(message.body)))
        held.last = message.number

    def _tell(self, held: _Held, event: Event) -> None:
        self._events.append(event)
        if event.kind in queue.FINAL:
            del self._held[held.job.trial], self._jobs[held.row.id]
            self._taken_back.append(held.row.id)

    def _expire(self, connection: Connection) -> None:
        """Give up jobs whose worker has not renewed its lease."""
        found = queue.leases(connection, self.generation)
        for held in list(self._jobs.values()):
            worker, over = found.get(held.row.id, (None, True))
            if over:
                who = self._names.get(worker or "", "its worker")
                error = f"{who} was not heard of for {self._lease_s:g} s"
                self._tell(held, Event("lost", held.job.trial, held.job.attempt, {"blameless": True}, error))

    # -- workers ----------------------------------------------------------------------------------------------------------

    def _count(self, connection: Connection) -> None:
        """See who is there.

        Raises:
            NasError: there are workers, and none of them can set the task up.
        """
        before = self._members
        self._members = {member.id: member for member in queue.members(connection, self._lease_s)}
        self._names |= {member.id: member.name for member in self._members.values()}
        broken = [m for m in self._members.values() if m.state == "broken" and m.generation == self.generation]
        useful = sum(member.slots for member in self._members.values() if member not in broken)
        self._room = min(useful, self._placement.workers) if self._placement.workers > 0 else useful
        for member in broken:
            if len(broken) == len(self._members):
                connection.rollback()
                raise setup_error(member.error, self._task)
            self._once(f"{member.name} cannot set the task up and gets no jobs: {member.error['message']}")
        for member in self._members.values():
            if member.id not in before and (found := differences(member.versions, versions())):
                self._once(f"{member.name} has {found}; results may differ")
        now = time.monotonic()
        if before.keys() != self._members.keys() and now >= self._news_at:
            self._news_at = now + _NEWS_S
            came, went = len(self._members.keys() - before.keys()), len(before.keys() - self._members.keys())
            self._placement.message(f"workers there now: {len(self._members)} ({came} came, {went} went)")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._placement.message(text)


def check_storage(storage: str, folder: Path | None = None) -> None:
    """See that a run can have this executor.

    Args:
        storage: URL of its database; "" for a file in its folder.
        folder: the run's, for advice.

    Raises:
        ConfigError: the database is not on a PostgreSQL server.
    """
    if storage.startswith(("postgres:", "postgresql")):
        return
    if folder is not None and (folder / DATABASE).is_file():
        cure = (
            f"this run's database is {folder / DATABASE}: use executor local or ray, or begin another run (--out) with"
        )
    else:
        cure = "use executor local or ray, or give"
    raise ConfigError(
        "executor workers: expected a PostgreSQL server that this machine and all workers reach, got "
        + ("none" if not storage else "another kind of database")
        + f"; {cure} --storage postgresql+psycopg://user@host/database (or NAS_STORAGE)"
    )


def _where(storage: str) -> str:
    check_storage(storage)
    return shown(server_url(storage))


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> WorkersExecutor:
    """For `nas.executors.make_executor`."""
    return WorkersExecutor(task, setup, placement)
