"""Runs jobs in N processes of this machine. Each sets the task up once and then runs one job at a time.

A process that dies is replaced and its job is reported "lost"; when the driver dies, by kill -9 too, its processes die with it
(their pipe closes; on Linux the kernel also kills them). Processes that a job itself has started end with its worker, except
that they may outlive a driver killed by -9. Never forks, never imports the caller's `__main__`.
Jobs are handed out inside `submit` and `poll`: call `poll` often enough that no worker waits for its first job.
What jobs print is kept only as the tail of the report on a process that died; use the inline executor to see it.
Start with `LocalExecutor`.
"""

from __future__ import annotations

import selectors
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from nas.errors import ConfigError, EvaluationFailed, NasError
from nas.executors.base import Event, Job, Kind, Placement, check_submit, encode
from nas.executors.process import WorkerProcess, bury_all, thread_environment
from nas.executors.task import setup_error

MAX_EARLY_DEATHS = 3
"""So many deaths in a row outside of any job, of one worker and its successors, and the executor gives up."""


@dataclass(eq=False)
class _Slot:
    """A place for one worker: who is there now, and what it does."""

    process: WorkerProcess
    ready: bool = False
    job: Job | None = None
    message: bytes = b""
    begun: bool = False
    started: float = 0.0
    early_deaths: int = 0
    leaving: bool = False


class LocalExecutor:
    """See `nas.executors.base.Executor`. The processes start at once, beside what the caller does next.

    Args:
        task: "module:function", importable with this process's `sys.path`.
        setup: what the function gets in every process; JSON.
        workers: number of processes, and of jobs held at a time.
        threads: threads of numeric libraries per process; None leaves it to them.
        timeout_s: a job that takes longer is stopped and has failed; None: never.

    Raises:
        ConfigError: workers, threads or timeout_s is not positive.
        TypeError: the setup is not JSON.
    """

    def __init__(
        self,
        task: str,
        setup: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        threads: int | None = 1,
        timeout_s: float | None = None,
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads), ("timeout_s", timeout_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"expected {name} > 0, got {value}")
        self._task = task
        self._timeout_s = timeout_s
        self._environment = thread_environment(threads)
        order = {"sys_path": [str(entry) for entry in sys.path], "task": task, "setup": dict(setup or {})}
        self._first_message = encode(order, "the setup")
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[tuple[Job, bytes]] = deque()
        self._broken: NasError | None = None
        self._closed = False
        self._processes: list[WorkerProcess] = []
        self._last_resort = weakref.finalize(self, bury_all, self._processes)
        self._slots: list[_Slot] = []
        for _ in range(workers):
            self._slots.append(_Slot(self._spawn()))
            self._watch(self._slots[-1])

    @property
    def capacity(self) -> int:
        return len(self._slots)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, for whoever watches the machine."""
        return [slot.process.pid for slot in self._slots]

    @property
    def ready(self) -> bool:
        """Whether every worker had set the task up and could begin a job at the last `poll`."""
        return all(slot.ready and not slot.leaving for slot in self._slots)

    def submit(self, job: Job) -> None:
        held = [slot.job for slot in self._slots if slot.job] + [waiting for waiting, _ in self._waiting]
        same = any(other.trial == job.trial for other in held)
        payload = check_submit(job, len(held), self.capacity, same, self._closed)
        self._waiting.append((job, b'{"payload": ' + payload + b"}"))
        self._dispatch()

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        until = time.monotonic() + timeout_s
        events: list[Event] = []
        while not self._closed:
            holds = bool(self._waiting) or any(slot.job for slot in self._slots)
            wait = min([until, *self._deadlines()]) - time.monotonic() if holds and not self._broken else 0.0
            for slot in self._happened(max(0.0, wait)):
                self._attend(slot, events)
            self._stop_overdue(events)
            self._dispatch()
            if self._broken and not events:
                raise self._broken
            if events or not holds or time.monotonic() >= until:
                break
        return events

    def cancel(self, trial: int) -> bool:
        for entry in self._waiting:
            if entry[0].trial == trial:
                self._waiting.remove(entry)
                return True
        for slot in self._slots:
            if slot.job and slot.job.trial == trial:
                slot.job = None
                slot.process.kill()
                self._renew(slot)
                return True
        return False

    def close(self) -> None:
        """Idle workers end by themselves, within two seconds or killed; busy ones are killed."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        until = time.monotonic() + 2.0
        for slot in self._slots:
            slot.process.send(b'{"exit": true}')
            if slot.job or not slot.ready:
                slot.process.kill()
        for slot in self._slots:
            slot.process.bury(max(0.0, until - time.monotonic()))
        self._processes.clear()
        self._selector.close()
        self._last_resort.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- jobs -------------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._waiting and slot.ready and slot.job is None and not slot.leaving:
                job, message = self._waiting.popleft()
                slot.job, slot.message, slot.begun = job, message, False
                slot.started = time.monotonic()
                slot.process.forget_output()
                slot.process.send(message)
                self._watch_writing(slot)

    def _deadlines(self) -> list[float]:
        if self._timeout_s is None:
            return []
        return [slot.started + self._timeout_s for slot in self._slots if slot.job]

    def _stop_overdue(self, events: list[Event]) -> None:
        if self._timeout_s is None:
            return
        for slot in self._slots:
            if slot.job and time.monotonic() >= slot.started + self._timeout_s:
                message = f"took longer than timeout_s = {self._timeout_s:g} s and was stopped"
                self._end(slot, events, "failed", {"type": "builtins.TimeoutError", "message": message}, message)
                slot.process.kill()
                self._renew(slot)

    def _end(
        self, slot: _Slot, events: list[Event], kind: Kind, payload: dict[str, Any], error: str | None = None
    ) -> None:
        """The last event of a slot's job."""
        if slot.job is not None:
            duration_s = time.monotonic() - slot.started
            events.append(Event(kind, slot.job.trial, slot.job.attempt, payload, error, duration_s))
            slot.job = None

    # -- processes --------------------------------------------------------------------------------------------------------

    def _spawn(self) -> WorkerProcess:
        try:
            process = WorkerProcess(self._environment, self._first_message)
        except OSError as error:
            raise EvaluationFailed(
                f"a worker process cannot be started: {error}. Use fewer workers, or free memory"
            ) from error
        self._processes.append(process)
        return process

    def _watch(self, slot: _Slot) -> None:
        self._selector.register(slot.process.read_end, selectors.EVENT_READ, slot)
        if slot.process.death_watch is not None:
            self._selector.register(slot.process.death_watch, selectors.EVENT_READ, slot)
        self._watch_writing(slot)

    def _watch_writing(self, slot: _Slot) -> None:
        """Be told when the process takes more, exactly while there is more."""
        watched = slot.process.write_end in self._selector.get_map()
        if slot.process.has_unsent and not watched:
            self._selector.register(slot.process.write_end, selectors.EVENT_WRITE, slot)
        elif watched and not slot.process.has_unsent:
            self._selector.unregister(slot.process.write_end)

    def _renew(self, slot: _Slot) -> str:
        """Put a new process in the place of one that is dead or shall be; say how the old one died."""
        for end in (slot.process.read_end, slot.process.death_watch, slot.process.write_end):
            if end is not None and end in self._selector.get_map():
                self._selector.unregister(end)
        reason = slot.process.bury()
        slot.ready = slot.leaving = False
        if self._broken is None and slot.early_deaths >= MAX_EARLY_DEATHS:
            self._broken = EvaluationFailed(
                f'task "{self._task}": a worker died {MAX_EARLY_DEATHS} times in a row before it could run a job. '
                f"The last time {reason}"
            )
        if self._broken is None:
            try:
                process = self._spawn()
            except EvaluationFailed as error:
                self._broken = error
            else:
                self._processes.remove(slot.process)
                slot.process = process
                self._watch(slot)
        return reason

    def _happened(self, wait_s: float) -> list[_Slot]:
        """Wait for slots whose process needs attention."""
        unwatched = [slot for slot in self._slots if slot.process.death_watch is None and not slot.process.buried]
        found = [key.data for key, _ in self._selector.select(min(wait_s, 1.0) if unwatched else wait_s)]
        return list(dict.fromkeys(found + [slot for slot in unwatched if slot.process.dead]))

    def _attend(self, slot: _Slot, events: list[Event]) -> None:
        """Something happened to a slot's process: it wrote, takes more, or died."""
        dead = slot.process.dead  # asked first, so that everything it wrote is there to be read
        slot.process.flush()
        self._watch_writing(slot)
        messages, ended = slot.process.receive()
        for message in messages:
            self._handle(slot, message, events)
        if dead or ended:
            self._lose(slot, events)

    def _handle(self, slot: _Slot, message: Mapping[str, Any], events: list[Event]) -> None:
        match message["kind"]:
            case "ready":
                slot.ready = True
            case "broken":
                self._broken = self._broken or setup_error(message["failure"], self._task)
            case "begun":
                slot.begun = True
            case "progress" if slot.job:
                events.append(Event("progress", slot.job.trial, slot.job.attempt, message["payload"]))
            case "done":
                slot.early_deaths = 0
                self._end(slot, events, "done", message["payload"])
            case "failed":
                slot.early_deaths = 0
                slot.leaving = message["leaving"]
                if slot.leaving:
                    slot.process.kill()  # its end is noticed like any other
                failure = dict(message["failure"])
                error = failure.pop("error")
                self._end(slot, events, "failed", failure, error)

    def _lose(self, slot: _Slot, events: list[Event]) -> None:
        """A slot's process has died and another takes its place. A job that had begun is lost; one that had not goes back."""
        if slot.job and not slot.begun:
            self._waiting.appendleft((slot.job, slot.message))
            slot.job = None
        slot.early_deaths += slot.job is None and not slot.leaving
        reason = self._renew(slot)
        self._end(slot, events, "lost", {}, reason)


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> LocalExecutor:
    """For `nas.executors.make_executor`."""
    return LocalExecutor(
        task, setup, workers=placement.workers, threads=placement.threads, timeout_s=placement.timeout_s
    )
