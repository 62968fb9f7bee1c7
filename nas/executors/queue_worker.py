"""A worker of `nas.executors.workers`: takes jobs from the run's database and runs them in child processes of its own.

Every slot is a `LocalExecutor` of one process, so a job that hangs, crashes or prints cannot harm the worker, and time-outs are
kept here. A thread renews the leases, whatever the rest waits for. While the database is away jobs go on; what they say is kept and
delivered when it is back, if they are this worker's still.

Knows neither what jobs compute nor the command line. Start with `QueueWorker.run`.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, ProgrammingError

from nas.database import explain
from nas.errors import NasError, RunError
from nas.executors import work_queue as queue
from nas.executors.base import Event, Job, decode, encode
from nas.executors.local import LocalExecutor
from nas.executors.travel import Files, Workplace
from nas.executors.versions import differences, versions
from nas.executors.work_queue import Claimed, Member, Setup

T = TypeVar("T")
_Said = tuple[int, str, bytes, Files]  # number, kind, body, files

TICK_S = 0.2
"""Longest time before a signal is noticed, seconds."""
FASTEST_S, SLOWEST_S = 0.01, 5.0
"""Seconds between two questions for work: a tenth of the time without any, within these. A worker whose job has just ended, for
which the driver will soon have another, asks often; a thousand that are idle ask 200 times a second all together. Being told
(LISTEN) would wake all thousand for every job, and need a thousand connections; asking needs none in between."""
_LONG_S = 2.0
"""A connection that was not used for so long is closed: those that work or wait hold none."""
_SILENCE_S = 10.0
"""Time without a job before that is worth a line, seconds."""
_FAREWELL_S = 5.0
"""Longest time that a worker that was told to end tries to say so, seconds."""


@dataclass(eq=False)
class _Slot:
    """A place for one job at a time, and what is to be said of the job there."""

    executor: LocalExecutor
    workplace: Workplace
    setup_files: Files
    job: Claimed | None = None
    begun: bool = False
    number: int = 0
    unsent: list[_Said] = field(default_factory=list)
    started: float = 0.0
    ended: str = ""
    says: dict[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        return self.begun and not self.ended

    def say(self, kind: str, body: bytes = b"", files: Files | None = None) -> None:
        self.number += 1
        self.unsent.append((self.number, kind, body, files or {}))

    def take(self, event: Event) -> None:
        """What became of the job, with the files it has written until now."""
        facts = {"kind": event.kind, "payload": event.payload, "error": event.error, "duration_s": event.duration_s}
        self.say(event.kind, encode(facts, "a message"), self.workplace.changes())
        if event.kind == "progress":
            self.says = event.payload
        else:
            self.ended = event.kind if event.error is None else f"{event.kind}: {_last_line(event.error)}"


class QueueWorker:
    """One worker, of as many slots.

    Args:
        engine: of the run's schema, from `nas.database.server_engine`.
        where: its name in messages.
        slots: jobs at a time.
        threads: of numeric libraries per job; None: what the driver says.
        idle_exit_s: ends after so many seconds without a job; None: never.
        patience_s: ends after so many seconds without the database.
        scratch: where folders are made for jobs if this machine does not see the run's; None: the machine's temporary folder.
        say: is told, in one line each, what happens.
        show: is told now and then what the jobs are doing.

    Attributes:
        told_to_end: set it to a reason ("SIGTERM") to have `run` give its jobs back and return.
    """

    def __init__(
        self,
        engine: Engine,
        where: str,
        *,
        slots: int = 1,
        threads: int | None = None,
        idle_exit_s: float | None = None,
        patience_s: float = 600.0,
        scratch: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        show: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._engine, self._where = engine, where
        self._threads, self._idle_exit_s, self._patience_s, self._scratch = threads, idle_exit_s, patience_s, scratch
        self._say, self._show = say, show
        self.told_to_end = ""
        self._me = Member(uuid.uuid4().hex, socket.gethostname(), os.getpid(), slots, versions(), threads)
        self._slots: list[_Slot] = []
        self._setup = Setup("", b"", {"lease_s": 60.0}, 0, False)
        self._silent_since: float | None = None
        self._retry_at = self._ask_at = 0.0
        self._busy_at = time.monotonic()  # when there last was a job, or news
        self._worked_at = time.monotonic()
        self._waits_for = ""
        self._finished = False
        self._lock = threading.Lock()
        self._held: set[int] = set()
        self._lost: set[int] = set()
        self._leaving = threading.Event()
        self._used_at: float | None = None  # a connection may be open

    def run(self) -> str:
        """Work until the run is finished, or there is another reason to end; returns it.

        Raises:
            RunError: the database was away too long, or refuses.
        """
        renewals = threading.Thread(target=self._renew_leases, name="leases", daemon=True)
        renewals.start()
        try:
            while not (reason := self._over()):
                self._step()
            return reason
        finally:
            self._leave()
            renewals.join(_FAREWELL_S)
            self._engine.dispose()

    @property
    def _lease_s(self) -> float:
        return float(self._setup.settings["lease_s"])

    def _over(self) -> str:
        if self.told_to_end:
            return self.told_to_end
        if any(slot.job for slot in self._slots):
            return ""
        if self._finished:
            return "the run is finished"
        if self._idle_exit_s is not None and time.monotonic() > self._worked_at + self._idle_exit_s:
            return f"nothing to do for {self._idle_exit_s:g} s"
        return ""

    def _step(self) -> None:
        running = sum(slot.running for slot in self._slots)
        for slot in list(self._slots):
            if not self._me.error:
                self._attend(slot, TICK_S / running if slot.running else 0.0)
        self._drop_lost()
        if time.monotonic() >= self._retry_at:
            for slot in self._slots:
                self._deliver(slot)
        free = any(slot.job is None for slot in self._slots) or not self._slots
        if free and time.monotonic() >= max(self._retry_at, self._ask_at):
            self._ask()
        if self._used_at is not None and time.monotonic() > self._used_at + _LONG_S:
            self._used_at = None
            self._engine.dispose()
        self._tell()
        if not any(slot.running for slot in self._slots):
            time.sleep(min(TICK_S, max(FASTEST_S, max(self._retry_at, self._ask_at) - time.monotonic())))

    # -- the database -----------------------------------------------------------------------------------------------------

    def _reach(self, step: Callable[[Connection], T]) -> T | None:
        """Do a step in a transaction; None if the database cannot be reached, which is then tried again later."""
        try:
            self._used_at = time.monotonic()
            with self._engine.begin() as connection:
                found = step(connection)
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", "") in ("42P01", "3F000"):  # the run was removed
                self._setup = replace(self._setup, open=False)
                return None
            raise explain(error, self._where) from error
        except DBAPIError as error:
            trouble = explain(error, self._where)
            if not queue.unreachable(error):
                raise trouble from error
            now = time.monotonic()
            if self._silent_since is None:
                self._silent_since = now
                self._say(f"{trouble}; trying again for {self._patience_s:g} s" + self._meanwhile())
            elif now > self._silent_since + self._patience_s:
                raise RunError(f"{trouble} (tried for {self._patience_s:g} s)") from error
            self._retry_at = now + random.uniform(0.5, 1.0) * min(10.0, 1.0 + (now - self._silent_since) / 5)
            return None
        if self._silent_since is not None:
            self._say(f"the database is back after {time.monotonic() - self._silent_since:.0f} s")
            self._silent_since = None
        return found

    def _renew_leases(self) -> None:
        """The thread's work: say that this worker is there, every third of a lease."""
        last = time.monotonic()
        while not self._leaving.wait(min(0.5, self._lease_s / 3)):
            now = time.monotonic()
            if now < last + self._lease_s / 3:
                continue
            last = self._used_at = now
            try:
                with self._engine.begin() as connection:
                    self._beat(connection)
            except DBAPIError:
                continue  # the other thread notices, and says so

    def _beat(self, connection: Connection) -> None:
        if not self._setup.generation or self._leaving.is_set():
            return
        with self._lock:
            held = list(self._held)
        mine = queue.beat(connection, self._me, held, self._lease_s)
        with self._lock:
            self._lost |= set(held) - mine

    # -- jobs -------------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """See whether there is another driver, and take jobs for the free slots."""
        known = self._setup.generation

        def look(connection: Connection) -> tuple[Setup | None, Files, bool]:
            setup = queue.read_setup(connection, known) if queue.exists(connection) else None
            if setup is None or setup.open:
                fresh = setup is not None and setup.generation != known
                return setup, queue.get_files(connection, queue.SETUP_FILES, 0) if fresh else {}, False
            return setup, {}, queue.run_finished(connection)

        found = self._reach(look)
        if found is not None:
            setup, files, self._finished = found
            if setup is None:
                self._wait_for("the run; it begins when nas search does, with the same storage and --executor workers")
            elif not setup.open:
                self._wait_for("a driver; nas search goes on with the run")
            elif setup.generation == known:
                self._fill()
            else:  # jobs of the one before are not wanted any more
                with self._lock:
                    self._lost |= self._held
                if not self._lost:
                    self._set_up(setup, files)
        idle_s = time.monotonic() - self._busy_at
        self._ask_at = time.monotonic() + min(SLOWEST_S, max(FASTEST_S, idle_s / 10)) * random.uniform(0.8, 1.2)

    def _fill(self) -> None:
        ready = all(slot.executor.ready for slot in self._slots)
        if self._me.state == "starting" and ready:
            self._me = replace(self._me, state="ready")
            self._reach(self._beat)
        if not ready:
            self._busy_at = time.monotonic()
        for slot in self._slots:
            if slot.job is None and slot.executor.ready:
                job = self._reach(lambda c: queue.claim(c, self._me.id, self._setup.generation, self._lease_s))
                if job is None:
                    if time.monotonic() > self._busy_at + _SILENCE_S:
                        self._wait_for("jobs")
                    return
                self._begin(slot, job)

    def _set_up(self, setup: Setup, files: Files) -> None:
        """Start afresh, for another driver."""
        self._close_slots()
        self._setup, self._me = setup, replace(self._me, generation=setup.generation, state="starting", error={})
        self._busy_at = self._worked_at = time.monotonic()
        settings = setup.settings
        try:
            for _ in range(self._me.slots):
                workplace = Workplace(settings["folder"], settings["identity"], self._scratch)
                plain = decode(setup.setup)
                if not workplace.shared:
                    workplace.begin(files)
                    plain |= {"folder": str(workplace.folder)} if "folder" in plain else {}
                executor = LocalExecutor(
                    setup.task,
                    plain,
                    workers=1,
                    threads=self._threads or settings["threads"],
                    timeout_s=settings["timeout_s"],
                )
                self._slots.append(_Slot(executor, workplace, files))
        except NasError as error:
            self._break(error)
            return
        self._reach(self._beat)
        where = (
            "in the run's folder"
            if workplace.shared
            else f"in {workplace.folder}, as the run's folder is not seen here"
        )
        self._say(f"setting up for driver {setup.generation} of this run, {where}")
        if found := differences(self._me.versions, settings["versions"]):
            self._say(f"this machine has {found} as at the driver; results may differ")

    def _begin(self, slot: _Slot, job: Claimed) -> None:
        slot.job, slot.begun, slot.number, slot.ended, slot.says = job, False, 0, "", {}
        slot.unsent.clear()
        slot.started = self._busy_at = time.monotonic()
        self._waits_for = ""
        with self._lock:
            self._held.add(job.id)
            self._lost.discard(job.id)
        if job.needs and not slot.workplace.shared:
            slot.say(queue.ASKS)

    def _attend(self, slot: _Slot, wait_s: float) -> None:
        """Let a slot's child do its work, and see what it says."""
        if slot.job is not None and not slot.begun:
            self._start(slot, slot.job)
        try:
            for event in slot.executor.poll(wait_s):
                if event.kind == "lost":
                    time.sleep(TICK_S)  # a signal for both of us has come here too by now
                    if self.told_to_end:
                        return
                slot.take(event)
        except NasError as error:
            self._break(error)

    def _start(self, slot: _Slot, job: Claimed) -> None:
        files: Files = {}
        if job.needs and not slot.workplace.shared:
            if time.monotonic() < max(self._retry_at, self._ask_at):
                return
            self._ask_at = time.monotonic() + 0.05
            found = self._reach(lambda connection: queue.served(connection, self._me.id, job.id))
            if found is None:
                return
            files = found
        slot.workplace.begin(slot.setup_files | files)
        slot.executor.submit(Job(job.trial, job.attempt, decode(job.payload), job.needs))
        slot.begun = True

    def _deliver(self, slot: _Slot) -> None:
        job, unsent = slot.job, slot.unsent
        if job is None or not unsent:
            return
        post = partial(_post, worker=self._me.id, job=job.id, messages=unsent, lease_s=self._lease_s)
        delivered = self._reach(post)
        if delivered is None:
            return
        unsent.clear()
        if not delivered:
            self._lost.add(job.id)
        elif slot.ended:
            self._end(slot, slot.ended)

    def _end(self, slot: _Slot, how: str) -> None:
        """A slot's job is over, and what was to be said is said."""
        assert slot.job is not None
        with self._lock:
            self._held.discard(slot.job.id)
            self._lost.discard(slot.job.id)
        self._busy_at = self._worked_at = time.monotonic()
        self._ask_at = 0.0
        self._say(f"trial {slot.job.trial}, attempt {slot.job.attempt}: {how} ({self._busy_at - slot.started:.1f} s)")
        slot.job, slot.begun = None, False

    def _drop_lost(self) -> None:
        """Stop jobs that are not this worker's any more."""
        for slot in self._slots:
            if slot.job is not None and slot.job.id in self._lost:
                slot.executor.cancel(slot.job.trial)
                self._end(
                    slot, "no longer wanted here, stopped" if not slot.ended else f"{slot.ended}, which came too late"
                )

    def _break(self, error: NasError) -> None:
        """The task cannot be set up here: say so, and have no more to do with this driver's jobs."""
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        self._me = replace(self._me, state="broken", error={"type": kind, "message": str(error)})
        self._say(f"the task cannot be set up here: {' '.join(str(error).split())}")
        self._give_up_jobs("its worker cannot run the task any more")
        self._close_slots()
        self._reach(self._beat)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def _give_up_jobs(self, reason: str) -> None:
        """Kill what runs and hand it back, with the checkpoints it has written."""
        untouched = []
        for slot in self._slots:
            if slot.job is None or slot.ended:
                continue
            slot.executor.cancel(slot.job.trial)
            if slot.number == 0 and not slot.begun:
                untouched.append(slot.job.id)
                continue
            duration_s = time.monotonic() - slot.started
            error = f"{reason} ({self._me.name})"
            event = Event("lost", slot.job.trial, slot.job.attempt, {"blameless": True}, error, duration_s)
            slot.take(event)
        if untouched:
            self._reach(lambda connection: queue.give_back(connection, self._me.id, untouched))
        for slot in self._slots:
            if slot.job is not None:
                self._deliver(slot)

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.executor.close()
        self._slots.clear()
        with self._lock:
            self._held.clear()
            self._lost.clear()

    def _leave(self) -> None:
        """Say goodbye, or at least try to; what cannot be said the end of the leases will."""
        self._leaving.set()
        self._patience_s = float("inf")
        until = time.monotonic() + _FAREWELL_S
        try:
            self._give_up_jobs(
                f"its worker was told to end by {self.told_to_end}" if self.told_to_end else "its worker ended"
            )
            while any(slot.job and slot.unsent for slot in self._slots) and time.monotonic() < until:
                time.sleep(TICK_S)
                for slot in self._slots:
                    self._deliver(slot)
            if self._me.generation and self._silent_since is None:
                self._reach(lambda connection: queue.leave(connection, self._me.id))
        except RunError as error:
            self._say(str(error))
        finally:
            self._close_slots()

    # -- words ------------------------------------------------------------------------------------------------------------

    def _wait_for(self, what: str) -> None:
        if self._waits_for != what:
            self._waits_for = what
            self._say(f"waiting for {what}")

    def _meanwhile(self) -> str:
        return ", the jobs here go on" if any(slot.job for slot in self._slots) else ""

    def _tell(self) -> None:
        now = time.monotonic()
        doing = []
        for slot in self._slots:
            if slot.job:
                facts = [f"{k} {slot.says[k]}" for k in ("stage", "epoch", "epochs") if k in slot.says]
                doing.append(f"trial {slot.job.trial} for {now - slot.started:.0f} s ({', '.join(facts) or 'begun'})")
        self._show("; ".join(doing))


def _post(connection: Connection, worker: str, job: int, messages: list[_Said], lease_s: float) -> bool:
    return all(queue.post(connection, worker, job, *message, lease_s) for message in messages)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
