"""What runs in Ray's worker processes for `nas.executors.ray_tasks`: one job per call of `run`, and the `Mailbox` for its reports.

A process sets a task up once and keeps it (`_seat`), as that takes seconds. Where it does not see the run's folder it works in a
scratch folder: what a job needs comes with its order, what it writes goes with its reports and its answer. Knows nothing of Ray
but that a handle has `.push.remote(...)`, and how to wait. Start with `run`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from nas.errors import RunError
from nas.executors.base import Evaluate, decode, encode
from nas.executors.task import describe, free_device_memory, load_task, run_job
from nas.executors.travel import Files, Workplace
from nas.executors.versions import versions

ACKNOWLEDGE_EVERY = 100
"""Reports that a job sends before it waits for the mailbox, so that it cannot flood it."""

BEGUN_S = 10.0
"""How long a job waits until it is known that it has begun."""

Letter = dict[str, Any]
"""From a job to the driver: {"token", "kind": "seated" | "begun" | "alive" | "progress" | "last", ...}."""


class Mailbox:
    """An actor beside the driver: jobs push letters, the driver takes them. Every executor has its own box in it."""

    def __init__(self) -> None:
        self._boxes: dict[str, _Box] = {}

    async def push(self, box: str, letter: Letter) -> None:
        """Add a letter. Ray does not promise that those of one job arrive in order."""
        found = self._boxes.setdefault(box, _Box())
        found.letters.append(letter)
        found.news.set()

    async def take(self, box: str, wait_s: float) -> list[Letter]:
        """All letters since the last call; waits for one, `wait_s` at most."""
        found = self._boxes.setdefault(box, _Box())
        if not found.letters:
            with suppress(TimeoutError):
                await asyncio.wait_for(found.news.wait(), wait_s)
        found.news.clear()
        letters, found.letters = found.letters, []
        return letters

    async def drop(self, box: str) -> None:
        """Throw a box away."""
        found = self._boxes.pop(box, None)
        if found is not None:
            found.news.set()


@dataclass
class _Box:
    letters: list[Letter] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Order:
    """One job, and what its process needs to set itself up.

    Attributes:
        box: of the executor in the mailbox.
        token: number of this submission; no other of the executor has it.
        key: of the task and its setup; equal keys share a process.
        task: "module:function".
        setup: encoded.
        payload: encoded.
        folder: the run's, as the driver names it; None: no files.
        identity: `run_id` of it.
        files: what the job needs, for a process that does not see the folder; None: the driver thinks that it sees it.
        setup_files: reference of an object with what the setup needs, in a list so that it is fetched only if it is used.
        alive_s: seconds between two signs of life.
        directory: the driver's working directory, which is used where it exists, so that relative paths mean the same.
        scratch: where scratch folders are made; "" for the machine's temporary folder.
    """

    box: str
    token: int
    key: str
    task: str
    setup: bytes
    payload: bytes
    folder: str | None
    identity: str
    files: Files | None
    setup_files: list[Any]
    directory: str
    scratch: str
    alive_s: float


@dataclass(frozen=True)
class _Seat:
    key: str
    evaluate: Evaluate
    workplace: Workplace


_seat: _Seat | None = None


def run(order: Order, mailbox: Any) -> dict[str, Any]:
    """Run one job.

    Returns:
        {"kind": "done", "body", "seconds"}, {"kind": "failed", "failure", "seconds"}, {"kind": "broken", "failure"} (the setup
        raised), {"kind": "unshared"} (files are needed: send them) or {"kind": "disk", "message"} (this machine cannot keep
        them); each with "node", "host", and the number of "reports" and the "files" that changed after the last of them.
    """
    with _signs_of_life(order, mailbox):
        return _run(order, mailbox)


def _run(order: Order, mailbox: Any) -> dict[str, Any]:
    here = {"node": ray.get_runtime_context().get_node_id(), "host": platform.node(), "reports": 0, "files": {}}
    try:
        workplace = _workplace(order)
        if not workplace.shared and order.files is None:
            return here | {"kind": "unshared"}
        seat = _sit(order, workplace, here, mailbox)
        workplace.begin(order.files or {})
    except RunError as error:
        return here | {"kind": "disk", "message": str(error)}
    except _Broken as broken:
        return here | {"kind": "broken", "failure": broken.failure}
    return here | _evaluate(order, seat, mailbox)


@contextmanager
def _signs_of_life(order: Order, mailbox: Any) -> Iterator[None]:
    """Say now and then that this process is there, whatever it does: the driver cannot know otherwise that it is cut off."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(order.alive_s):
            mailbox.push.remote(order.box, {"token": order.token, "kind": "alive"})

    threading.Thread(target=tell, name="signs of life", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Broken(Exception):
    """The setup raised."""

    def __init__(self, failure: dict[str, Any]) -> None:
        self.failure = failure


def _workplace(order: Order) -> Workplace:
    if _seat is not None and _seat.key == order.key:
        return _seat.workplace
    return Workplace(order.folder, order.identity, Path(order.scratch) if order.scratch else None)


def _sit(order: Order, workplace: Workplace, here: Mapping[str, Any], mailbox: Any) -> _Seat:
    """The task, set up in this process."""
    global _seat
    if _seat is not None and _seat.key == order.key:
        return _seat
    facts = {key: here[key] for key in ("node", "host")} | {"pid": os.getpid(), "versions": versions()}
    mailbox.push.remote(order.box, {"token": order.token, "kind": "seated", "shared": workplace.shared, **facts})
    _seat = None
    gc.collect()  # what the last task held
    if Path(order.directory).is_dir():
        os.chdir(order.directory)
    setup = decode(order.setup)
    if not workplace.shared:
        workplace.begin(ray.get(order.setup_files[0]) if order.setup_files else {})
        setup["folder"] = str(workplace.folder)
    try:
        evaluate = load_task(order.task, setup)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _Broken(describe(error)) from None
    _seat = _Seat(order.key, evaluate, workplace)
    return _seat


def _evaluate(order: Order, seat: _Seat, mailbox: Any) -> dict[str, Any]:
    lock = threading.Lock()  # a job may report from several threads
    running = True
    reports = 0
    begun = {"token": order.token, "kind": "begun", "node": ray.get_runtime_context().get_node_id()}
    with suppress(ray.exceptions.RayError):
        ray.get(mailbox.push.remote(order.box, begun), timeout=BEGUN_S)  # before anything the job may do to its process

    def report(info: dict[str, Any]) -> None:
        nonlocal reports
        body = encode(info, "a report")
        with lock:
            if not running:  # a thread that a job left behind has nothing more to say
                return
            files = seat.workplace.changes()
            sent = mailbox.push.remote(
                order.box, {"token": order.token, "kind": "progress", "number": reports, "body": body, "files": files}
            )
            reports += 1
            if reports % ACKNOWLEDGE_EVERY == 0:
                with suppress(ray.exceptions.RayError):
                    ray.get(sent)

    started = time.perf_counter()
    result, failure = run_job(seat.evaluate, decode(order.payload), report)
    seconds = time.perf_counter() - started
    with lock:
        running = False
    try:
        files = seat.workplace.changes()
    except RunError as error:
        return {"kind": "disk", "message": str(error), "reports": reports}
    answer = {"reports": reports, "files": files, "seconds": seconds}
    if result is not None:
        return answer | {"kind": "done", "body": result}
    free_device_memory()
    if failure["type"] == "nas.errors.RunError" and not seat.workplace.shared:
        return {"kind": "disk", "message": failure["message"], "reports": reports}
    return answer | {"kind": "failed", "failure": failure}
