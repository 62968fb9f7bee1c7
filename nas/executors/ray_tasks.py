"""Runs jobs as tasks of a Ray cluster: this machine's own, or one that is there, whose nodes come and go.

Ray retries nothing (the loop above counts attempts): a task whose process died is "lost", with {"blameless": True} where its node
died. Capacity follows the nodes. Where nodes do not share a disk with the driver, files travel: `nas.executors.travel`. A node
whose disk is full is avoided for a while. What runs in the workers is `nas.executors.ray_worker`. Start with `RayExecutor`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nas.errors import ConfigError, EvaluationFailed, NasError
from nas.executors import ray_worker
from nas.executors.base import Event, Job, Kind, Placement, check_submit, decode, encode
from nas.executors.ray_cluster import connect, disconnect, modules_named, worker_environment
from nas.executors.ray_nodes import Nodes
from nas.executors.task import setup_error
from nas.executors.travel import Files, pack, unpack

MAX_EARLY_DEATHS = 3
"""So many processes in a row that died before they could run a job, and the executor gives up."""
LETTERS_S = 20.0
"""How long one request to the mailbox waits; another follows."""
SILENCE_S = 120.0
"""A job of which nothing was heard for so long is lost: its node is cut off, or its last message was."""
UNHEARD_S = 60.0
"""A job that has not begun after so long, though there is room for it, is handed to Ray again: its order was lost on the way."""
PATIENCE_S = 10.0
"""How long an answer waits for reports that were sent before it."""


@dataclass(eq=False)
class _Held:
    """A job that was submitted and has not ended."""

    job: Job
    payload: bytes
    token: int
    ref: Any
    submitted: float
    begun: float | None = None
    heard: float | None = None
    node: str = ""
    reports: int = 0
    answer: dict[str, Any] | None = None
    answered: float = 0.0
    letters_are_in: bool = False
    early: dict[int, ray_worker.Letter] = field(default_factory=dict)


class RayExecutor:
    """See `nas.executors.base.Executor`.

    Args:
        task: "module:function".
        setup: what the function gets in every process; JSON. "folder" and "run_id" in it are the run's.
        placement: `nas.executors.base.Placement`.
        scratch: where workers that do not see the run's folder make scratch folders; "": the machine's temporary folder.
        silence_s: a job of which nothing was heard for so long is lost, without blame.

    Raises:
        ConfigError: the cluster cannot be used; says why. A time-out that is not positive.
        TypeError: the setup is not JSON.
    """

    unheard_s = UNHEARD_S

    def __init__(
        self,
        task: str,
        setup: Mapping[str, Any] | None,
        placement: Placement,
        *,
        scratch: str = "",
        silence_s: float = SILENCE_S,
    ) -> None:
        if placement.timeout_s is not None and not placement.timeout_s > 0:
            raise ConfigError(f"expected timeout_s > 0, got {placement.timeout_s}")
        self._task = task
        self._setup = encode(setup or {}, "the setup")
        self._identity = str((setup or {}).get("run_id", ""))
        self._key = hashlib.sha256(task.encode() + b"\0" + self._setup).hexdigest()
        self._placement = placement
        self._scratch = scratch
        self._silence_s = silence_s
        self._held: dict[int, _Held] = {}
        self._tokens = itertools.count()
        self._early_deaths = 0
        self._broken: NasError | None = None
        self._closed = False
        self._setup_files: list[Any] = []
        self._connection = connect(
            placement.address,
            cpus=placement.workers * placement.cpus,
            job_cpus=placement.cpus,
            gpus=placement.gpus,
            modules=modules_named(task, setup or {}),
        )
        self._last_resort = weakref.finalize(self, disconnect, self._connection)
        self._nodes = Nodes(placement)
        environment = worker_environment(self._connection, placement.threads)
        # With a GPU Ray ends a process after its task, as one that has used a GPU cannot be given another.
        options: Any = {
            "num_cpus": placement.cpus,
            "num_gpus": placement.gpus,
            "max_retries": 0,
            "runtime_env": {"env_vars": environment},
        } | ({} if placement.gpus else {"max_calls": 0})
        decorate: Any = ray.remote(**options)
        self._run = decorate(ray_worker.run)
        self._box = uuid.uuid4().hex
        self._mailbox = _mailbox(environment)
        self._letters = self._mailbox.take.remote(self._box, LETTERS_S)

    @property
    def capacity(self) -> int:
        return self._nodes.capacity

    def submit(self, job: Job) -> None:
        same = any(held.job.trial == job.trial for held in self._held.values())
        payload = check_submit(job, len(self._held), max(self.capacity, 0), same, self._closed)
        self._start(job, payload)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        until = time.monotonic() + timeout_s
        events: list[Event] = []
        while not self._closed:
            wait = min([until, *self._deadlines()]) - time.monotonic() if self._held and not self._broken else 0.0
            self._attend(max(0.0, wait), events)
            self._stop_overdue(events)
            self._give_up_silent(events)
            if self._broken and not events:
                raise self._broken
            if events or not self._held or time.monotonic() >= until:
                break
        return events

    def cancel(self, trial: int) -> bool:
        held = next((held for held in self._held.values() if held.job.trial == trial), None)
        if held is None:
            return False
        self._forget(held)
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if ray.is_initialized():
            for held in list(self._held.values()):
                self._forget(held)
            with suppress(ray.exceptions.RayError):
                self._mailbox.drop.remote(self._box)
            self._nodes.close()
        self._held.clear()
        self._last_resort.detach()
        disconnect(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- jobs -------------------------------------------------------------------------------------------------------------

    def _start(self, job: Job, payload: bytes, token: int | None = None) -> None:
        """Hand a job to Ray; `token` replaces an earlier try at the same submission."""
        if token is not None:
            self._held.pop(token, None)
        files: Files | None = None
        placement = self._placement
        if placement.folder is not None and self._nodes.unshared:
            files = pack(placement.folder, job.needs)
            if not self._setup_files and placement.setup_needs:
                self._setup_files.append(ray.put(pack(placement.folder, placement.setup_needs)))
        order = ray_worker.Order(
            box=self._box,
            token=next(self._tokens),
            key=self._key,
            task=self._task,
            setup=self._setup,
            payload=payload,
            folder=None if placement.folder is None else str(placement.folder),
            identity=self._identity,
            files=files,
            setup_files=self._setup_files if files is not None else [],
            directory=os.getcwd(),
            scratch=self._scratch,
            alive_s=self._silence_s / 8,
        )
        self._held[order.token] = _Held(job, payload, order.token, self._launch(order), time.monotonic())

    # How a job gets into a process: `nas.executors.tune` replaces these three.

    def _launch(self, order: ray_worker.Order) -> Any:
        """Start a job; returns a reference that is ready when it has ended."""
        selector = self._nodes.selector
        run = self._run.options(**selector) if selector else self._run
        return run.remote(order, self._mailbox)

    def _fetch(self, ref: Any) -> dict[str, Any]:
        """What `ray_worker.run` returned. Raises RayError: its process died."""
        return dict(ray.get(ref))

    def _kill(self, ref: Any) -> None:
        """Stop a job, if need be with its process."""
        with suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(ref, force=True)

    def _again(self, held: _Held) -> None:
        self._start(held.job, held.payload, held.token)

    def _forget(self, held: _Held) -> None:
        """Stop a job, whose events are of no more interest."""
        self._held.pop(held.token, None)
        if held.answer is None:
            self._kill(held.ref)

    def _deadlines(self) -> list[float]:
        now, found = time.monotonic(), []
        for held in self._held.values():
            if held.answer is not None:
                found.append(held.answered + PATIENCE_S)
            elif held.begun is not None and self._placement.timeout_s is not None:
                found.append(held.begun + self._placement.timeout_s)
        return found or [now + 3600]

    def _stop_overdue(self, events: list[Event]) -> None:
        limit = self._placement.timeout_s
        if limit is None:
            return
        for held in list(self._held.values()):
            if held.answer is None and held.begun is not None and time.monotonic() >= held.begun + limit:
                message = f"took longer than timeout_s = {limit:g} s and was stopped"
                self._forget(held)
                self._end(held, events, "failed", {"type": "builtins.TimeoutError", "message": message}, message)

    def _give_up_silent(self, events: list[Event]) -> None:
        now = time.monotonic()
        for held in [held for held in self._held.values() if held.answer is None]:
            if held.heard is not None and now > held.heard + self._silence_s:
                self._forget(held)
                where = self._nodes.name(held.node)
                reason = f"nothing was heard of it for {self._silence_s:g} s: {where} is cut off, or its process hangs"
                self._end(held, events, "lost", {"blameless": True}, reason)
            elif held.heard is None and now > held.submitted + self.unheard_s:
                held.submitted = now  # ask again later
                if self._nodes.has_room():
                    self._kill(held.ref)
                    self._again(held)

    def _end(
        self,
        held: _Held,
        events: list[Event],
        kind: Kind,
        payload: dict[str, Any],
        error: str | None = None,
        seconds: float | None = None,
    ) -> None:
        self._held.pop(held.token, None)
        began = held.begun if held.begun is not None else held.submitted
        duration_s = time.monotonic() - began if seconds is None else seconds
        events.append(Event(kind, held.job.trial, held.job.attempt, payload, error, duration_s))

    # -- what comes back --------------------------------------------------------------------------------------------------

    def _attend(self, wait_s: float, events: list[Event]) -> None:
        """Wait for letters or answers, and take all that are there."""
        refs = {held.ref: held for held in self._held.values() if held.answer is None}
        waited = [self._letters, *refs]
        ready, _ = ray.wait(waited, num_returns=1, timeout=wait_s)
        if ready and len(waited) > 1:
            ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        for ref in ready:
            if ref in refs:
                self._answered(refs[ref], events)
        if self._letters in ready:
            self._read_letters(events)
        for held in list(self._held.values()):
            if held.answer is None:
                continue
            complete = held.letters_are_in or held.reports >= held.answer["reports"]
            if complete or time.monotonic() >= held.answered + PATIENCE_S:
                self._report(held, events, all_=True)
                self._conclude(held, held.answer, events)

    def _read_letters(self, events: list[Event]) -> None:
        try:
            letters = ray.get(self._letters)
        except ray.exceptions.RayError:  # the mailbox died and Ray starts it again; what was in it is gone
            letters = []
            time.sleep(0.05)
        self._letters = self._mailbox.take.remote(self._box, LETTERS_S)
        for letter in letters:
            held = self._held.get(letter["token"])
            if letter["kind"] == "seated":
                self._nodes.seated(letter)
            if held is None:
                continue  # cancelled, or an earlier try
            held.heard = time.monotonic()
            if letter["kind"] == "seated":
                held.node = letter["node"]
            elif letter["kind"] == "begun":
                held.begun, held.node = time.monotonic(), letter["node"]
                self._early_deaths = 0
            elif letter["kind"] == "last":
                held.letters_are_in = True
            elif letter["kind"] == "progress":
                held.early[letter["number"]] = letter
                self._report(held, events)

    def _report(self, held: _Held, events: list[Event], *, all_: bool = False) -> None:
        """Hand out reports in their order (the mailbox may have got them in another); `all_`: none is to come any more."""
        while held.early and (held.reports in held.early or all_):
            letter = held.early.pop(min(held.early))
            held.reports += 1
            self._keep(letter["files"])
            events.append(Event("progress", held.job.trial, held.job.attempt, decode(letter["body"])))

    def _answered(self, held: _Held, events: list[Event]) -> None:
        try:
            held.answer = self._fetch(held.ref)
            held.answered = time.monotonic()
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            self._broken = self._broken or EvaluationFailed(
                f'task "{self._task}": a worker process of the cluster cannot run this project\'s code: {_first_lines(error)}'
            )
            self._held.pop(held.token, None)
        except ray.exceptions.RayError as error:
            # Its reports may still be under way: a letter behind them says when all are in.
            kind = "node died" if isinstance(error, ray.exceptions.NodeDiedError) else "process died"
            held.answer = {"kind": kind, "reason": _first_lines(error), "reports": float("inf")}
            held.answered = time.monotonic()
            self._mailbox.push.remote(self._box, {"token": held.token, "kind": "last"})

    def _lose(self, held: _Held, reason: str, events: list[Event]) -> None:
        """The process of a job died: the job is lost if it had begun; else it is the setup that kills."""
        if held.begun is not None:
            self._end(held, events, "lost", {}, reason)
            return
        self._early_deaths += 1
        if self._early_deaths < MAX_EARLY_DEATHS:
            self._again(held)
            return
        self._held.pop(held.token, None)
        self._broken = self._broken or EvaluationFailed(
            f'task "{self._task}": a worker died {MAX_EARLY_DEATHS} times in a row before it could run a job. '
            f"The last time {reason}"
        )

    def _conclude(self, held: _Held, answer: Mapping[str, Any], events: list[Event]) -> None:
        match answer["kind"]:
            case "process died":
                self._lose(held, f"its process on {self._nodes.name(held.node)} died: {answer['reason']}", events)
            case "node died":
                reason = f"{self._nodes.name(held.node)} died or was taken away"
                self._nodes.died(held.node)
                self._end(held, events, "lost", {"blameless": True}, reason)
            case "done":
                self._keep(answer["files"])
                self._end(held, events, "done", decode(answer["body"]), seconds=answer["seconds"])
            case "failed":
                self._keep(answer["files"])
                failure = dict(answer["failure"])
                error = failure.pop("error")
                self._end(held, events, "failed", failure, error, answer["seconds"])
            case "broken":
                self._held.pop(held.token, None)
                self._broken = self._broken or setup_error(answer["failure"], self._task)
            case "unshared":
                self._nodes.mark_unshared(answer["node"])
                self._again(held)
            case "disk":
                self._full(held, answer, events)

    def _full(self, held: _Held, answer: Mapping[str, Any], events: list[Event]) -> None:
        """A node has no room for a job's files: another node shall have the job, if there is one."""
        message = f"node {self._nodes.name(answer['node'])}: {answer['message']}"
        if self._nodes.avoid(answer["node"]):
            self._placement.message(f"{message}; this node gets no trials for a while")
            self._end(held, events, "lost", {"blameless": True}, message)
        else:
            self._end(held, events, "failed", {"type": "nas.errors.RunError", "message": message}, message)

    def _keep(self, files: Files) -> None:
        """Put what a job wrote elsewhere into the run's folder.

        Raises:
            RunError: it cannot be written.
        """
        if files and self._placement.folder is not None:
            unpack(self._placement.folder, files)


_mailboxes: dict[str, Any] = {}
"""The handle of this connection's mailbox, by the name of its Ray job: the actor ends when nobody has a handle."""


def _mailbox(environment: Mapping[str, str]) -> Any:
    """The mailbox of this process's connection, on this node; made when it is first asked for."""
    context = ray.get_runtime_context()
    connection = (
        context.get_job_id() + context.get_node_id()
    )  # job numbers and addresses come again with the next cluster
    if connection not in _mailboxes:
        _mailboxes.clear()
        decorate: Any = ray.remote
        _mailboxes[connection] = (
            decorate(ray_worker.Mailbox)
            .options(
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True),
                runtime_env={"env_vars": dict(environment)},
            )
            .remote()
        )
    return _mailboxes[connection]


def _first_lines(error: BaseException, lines: int = 2) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(text[-lines:] if isinstance(error, ray.exceptions.RayTaskError) else text[:lines])[:600]


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> RayExecutor:
    """For `nas.executors.make_executor`."""
    return RayExecutor(task, setup, placement)
