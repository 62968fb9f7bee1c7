"""Runs jobs as trials of an NNI 3.0 experiment: NNI's manager starts a process per job, on this machine, and lists it.

NNI only starts processes: each asks the driver for a job over a local socket, runs it, answers, and tells NNI its accuracy.
Proposals, results, retries and early stopping stay the loop's. A process per job costs seconds (NNI's own import is 1 to 3 s), so
executor local is faster on one machine; this one is for those who want to see trials where they see their others.

NNI's manager listens on all network interfaces, asks nobody for a password, and outlives its driver. So it runs in network and
process namespaces of its own, which end with the driver; where those are not allowed it is refused, unless NAS_NNI_OPEN=1 says that
the machine's ports are closed otherwise. NNI's remote, Kubernetes and other training services were not tried and are not offered.
Start with `NniExecutor`.
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from nas.errors import ConfigError, EvaluationFailed, NasError
from nas.executors import nni_manager
from nas.executors.base import Event, Job, Kind, Placement, check_submit, encode
from nas.executors.nni_peer import Peer
from nas.executors.process import thread_environment
from nas.executors.task import setup_error

if importlib.util.find_spec("nni") is None:  # importing it takes a second, and only other processes need it
    raise ModuleNotFoundError("No module named 'nni'", name="nni")

MAX_EARLY_DEATHS = 6
"""So many trial processes that end before they ask for a job, one after the other, and the executor gives up."""
MAX_PLACE_BYTES = 100
ALONE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
OPEN = "NAS_NNI_OPEN"


class NniExecutor:
    """See `nas.executors.base.Executor`.

    Args:
        task: "module:function", importable with this process's `sys.path`.
        setup: what the function gets in every process; JSON.
        workers: processes at a time.
        threads: threads of numeric libraries per process; None leaves it to them.
        timeout_s: a job that takes longer is stopped and has failed; None: never.
        folder: where NNI keeps its database and logs, of trials only where their process died; default a temporary one.

    Raises:
        ConfigError: NNI is not installed, its manager cannot be kept apart, or a number is not positive.
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
        folder: Path | None = None,
    ) -> None:
        for name, value in (("workers", workers), ("threads", threads), ("timeout_s", timeout_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"expected {name} > 0, got {value}")
        order = {"sys_path": [str(entry) for entry in sys.path], "task": task, "setup": dict(setup or {})}
        self._order = encode(order, "the setup")
        self._task, self._workers, self._timeout_s = task, workers, timeout_s
        self._waiting: deque[tuple[Job, bytes]] = deque()
        self._peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._early_deaths = 0
        self._broken: NasError | None = None
        self._closed = False
        environment = thread_environment(threads)
        self._place = _new_place()
        self._folder = folder or self._place / "experiments"
        self._door = socket.socket(socket.AF_UNIX)
        try:
            self._door.bind(str(self._place / "door"))
            self._door.listen(1024)
            self._door.setblocking(False)
            self._selector.register(self._door, selectors.EVENT_READ)
            self._manager = _start_manager(self._place, workers, self._folder, environment)
        except BaseException:
            self._selector.close()
            self._door.close()
            shutil.rmtree(self._place, ignore_errors=True)
            raise
        self._last_resort = weakref.finalize(self, _clean_up, self._manager, self._place)

    @property
    def capacity(self) -> int:
        return self._workers

    def submit(self, job: Job) -> None:
        held = [peer.job for peer in self._peers if peer.job] + [waiting for waiting, _ in self._waiting]
        same = any(other.trial == job.trial for other in held)
        payload = check_submit(job, len(held), self.capacity, same, self._closed)
        self._waiting.append((job, b'{"payload": ' + payload + b"}"))
        self._dispatch()

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        until = time.monotonic() + timeout_s
        events: list[Event] = []
        while not self._closed:
            holds = bool(self._waiting) or any(peer.job for peer in self._peers)
            deadlines = [peer.deadline for peer in self._peers if peer.job and peer.deadline is not None]
            wait = min([until, *deadlines]) - time.monotonic() if holds and not self._broken else 0.0
            for key, _ in self._selector.select(min(max(0.0, wait), 0.5)):
                if key.data is None:
                    self._welcome()
                else:
                    self._attend(key.data, events)
            self._stop_overdue(events)
            self._check_manager()
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
        for peer in self._peers:
            if peer.job and peer.job.trial == trial:
                peer.job = None
                self._leave(peer, kill=True)
                return True
        return False

    def close(self) -> None:
        """Everything that NNI has started is killed, the manager too."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        for peer in list(self._peers):
            self._leave(peer, kill=True)
        self._selector.close()
        self._door.close()
        self._last_resort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- trial processes --------------------------------------------------------------------------------------------------

    def _welcome(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._door.accept()
            peer = Peer(connection)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)
            peer.send(self._order)

    def _dispatch(self) -> None:
        for peer in self._peers:
            if self._waiting and peer.ready and peer.job is None and not peer.used:
                peer.job, message = self._waiting.popleft()
                peer.message, peer.used, peer.begun = message, True, False
                peer.started = time.monotonic()
                peer.deadline = None if self._timeout_s is None else peer.started + self._timeout_s
                peer.send(message)

    def _attend(self, peer: Peer, events: list[Event]) -> None:
        messages, ended = peer.receive()
        for message in messages:
            self._handle(peer, message, events)
        if not ended or peer not in self._peers:
            return
        if peer.job and not peer.begun:
            self._waiting.appendleft((peer.job, peer.message))
            peer.job = None
        if not peer.used or not peer.begun:
            self._early_deaths += 1
            if self._early_deaths >= MAX_EARLY_DEATHS:
                self._broken = self._broken or EvaluationFailed(
                    f'task "{self._task}": {MAX_EARLY_DEATHS} trial processes of NNI ended, one after the other, before they could '
                    f"run a job. What they printed: {self._folder}/*/environments/local-env/trials"
                )
        self._end(peer, events, "lost", {}, f"its process ({peer.pid}) ended without an answer")
        self._leave(peer)

    def _handle(self, peer: Peer, message: Mapping[str, Any], events: list[Event]) -> None:
        match message["kind"]:
            case "ready":
                peer.ready = True
            case "broken":
                self._broken = self._broken or setup_error(message["failure"], self._task)
            case "begun":
                peer.begun = True
                self._early_deaths = 0
            case "progress" if peer.job:
                events.append(Event("progress", peer.job.trial, peer.job.attempt, message["payload"]))
            case "done":
                self._end(peer, events, "done", message["payload"])
            case "failed":
                failure = dict(message["failure"])
                error = failure.pop("error")
                self._end(peer, events, "failed", failure, error)

    def _end(
        self, peer: Peer, events: list[Event], kind: Kind, payload: dict[str, Any], error: str | None = None
    ) -> None:
        if peer.job is not None:
            events.append(
                Event(kind, peer.job.trial, peer.job.attempt, payload, error, time.monotonic() - peer.started)
            )
            peer.job = None

    def _stop_overdue(self, events: list[Event]) -> None:
        for peer in list(self._peers):
            if peer.job and peer.deadline is not None and time.monotonic() >= peer.deadline:
                message = f"took longer than timeout_s = {self._timeout_s:g} s and was stopped"
                self._end(peer, events, "failed", {"type": "builtins.TimeoutError", "message": message}, message)
                self._leave(peer, kill=True)

    def _leave(self, peer: Peer, *, kill: bool = False) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        peer.close(kill=kill)
        self._peers.remove(peer)

    def _check_manager(self) -> None:
        if self._broken is None and self._manager.poll() is not None:
            log = self._place / "manager.log"
            tail = log.read_text(errors="replace")[-2000:].strip() if log.exists() else ""
            self._broken = EvaluationFailed(f"NNI's manager has ended (exit code {self._manager.returncode}):\n{tail}")


def _new_place() -> Path:
    """A temporary folder with a path that leaves room for a socket's name, of which the system takes 107 bytes."""
    place = Path(tempfile.mkdtemp(prefix="nas-nni-"))
    if len(os.fsencode(place)) <= MAX_PLACE_BYTES:
        return place
    place.rmdir()
    return Path(tempfile.mkdtemp(prefix="nas-nni-", dir="/tmp"))


def _start_manager(place: Path, workers: int, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process that holds NNI's manager; it ends when its standard input does, so with this process."""
    command = [sys.executable, "-P", str(Path(nni_manager.__file__)), str(place), str(workers), str(folder)]
    if _can_be_alone():
        command = [*ALONE, *command]
    elif os.environ.get(OPEN) != "1":
        raise ConfigError(
            "executor nni: NNI's manager listens on every network interface without a password, and this machine does not allow "
            f"the namespaces that would keep it apart (unshare --user --net). Use executor local or ray, or set {OPEN}=1 where a "
            "firewall or container closes the machine's ports"
        )
    with (place / "manager.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(environment), start_new_session=True
        )


def _can_be_alone() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _clean_up(manager: subprocess.Popen[bytes], place: Path) -> None:
    if manager.stdin is not None:
        manager.stdin.close()
    try:
        manager.wait(10)
    except subprocess.TimeoutExpired:
        manager.kill()
        manager.wait()
    shutil.rmtree(place, ignore_errors=True)


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> NniExecutor:
    """For `nas.executors.make_executor`. A limit of 0 jobs at a time is one per CPU of this machine."""
    if placement.address:
        raise ConfigError("executor nni runs on this machine only; leave run.address empty, or use executor ray")
    workers = placement.workers or max(1, int((os.cpu_count() or 1) // max(1.0, placement.cpus)))
    folder = None if placement.folder is None else placement.folder / "nni"
    return NniExecutor(
        task, setup, workers=workers, threads=placement.threads, timeout_s=placement.timeout_s, folder=folder
    )
