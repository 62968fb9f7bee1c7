"""What Ray Tune sees of the executor in tune.py: trials that take jobs from a desk, how many to keep, when to end.

Start with `Desk` and `TuneTrial`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from nas.executors import ray_worker

MAX_EARLY_DEATHS = 3
"""So many processes in a row that died before they asked for a job, and no more is tried."""
MOST_CALLS = 10_000
"""Of the desk at a time: one per idle trial and one per job."""

Answer = dict[str, Any]


class Desk:
    """An actor beside the driver where trials find jobs and leave answers, and where it is known which trial has which job."""

    def __init__(self) -> None:
        self._jobs: deque[ray_worker.Order] = deque()
        self._idle: dict[str, asyncio.Future[ray_worker.Order | None]] = {}
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._at_work: dict[str, tuple[int, Any]] = {}
        self._early_deaths = 0
        self._failure = ""
        self._closed = False

    async def run(self, order: ray_worker.Order) -> Answer:
        """Have a trial run a job.

        Returns:
            What `ray_worker.run` returned, or {"kind": "died", "reason"}: its process died, {"kind": "unable", "reason"}: there
            are no processes that could run it.
        """
        if self._failure:
            return {"kind": "unable", "reason": self._failure}
        answer = self._answers[order.token] = asyncio.get_running_loop().create_future()
        self._jobs.append(order)
        self._hand_out()
        try:
            return await answer
        finally:
            del self._answers[order.token]

    async def next(self, trial: str, process: Any) -> ray_worker.Order | None:
        """The next job for a trial; None: there will be none."""
        self._early_deaths = 0
        if self._closed:
            return None
        idle = self._idle[trial] = asyncio.get_running_loop().create_future()
        self._hand_out()
        order = await idle
        if order is not None:
            self._at_work[trial] = (order.token, process)
        return order

    async def leave(self, trial: str, answer: Answer) -> None:
        """A trial's job has ended."""
        token, _ = self._at_work.pop(trial)
        self._resolve(token, answer)

    async def ended(self, trial: str, reason: str) -> None:
        """A trial's process died, whether it had a job or not."""
        idle = self._idle.pop(trial, None)
        if trial in self._at_work:
            token, _ = self._at_work.pop(trial)
            self._resolve(token, {"kind": "died", "reason": reason})
        elif idle is None:
            self._early_deaths += 1
            if self._early_deaths >= MAX_EARLY_DEATHS:
                await self.fail(reason)

    async def drop(self, token: int) -> None:
        """Forget a job; a process that is at it is killed."""
        self._jobs = deque(order for order in self._jobs if order.token != token)
        for trial, (at, process) in list(self._at_work.items()):
            if at == token:
                del self._at_work[trial]
                self._idle[trial] = asyncio.get_running_loop().create_future()  # it had started well
                ray.kill(process)
        self._resolve(token, {"kind": "died", "reason": "stopped"})

    async def fail(self, reason: str) -> None:
        """No job will run any more."""
        self._failure = reason
        for token in list(self._answers):
            self._resolve(token, {"kind": "unable", "reason": reason})

    async def close(self) -> None:
        """Send idle trials home, kill the processes of the others."""
        self._closed = True
        for idle in self._idle.values():
            if not idle.done():
                idle.set_result(None)
        for _, process in self._at_work.values():
            ray.kill(process)

    def _hand_out(self) -> None:
        while self._jobs and self._idle:
            trial = next(iter(self._idle))
            idle = self._idle.pop(trial)
            if not idle.done():
                idle.set_result(self._jobs.popleft())

    def _resolve(self, token: int, answer: Answer) -> None:
        future = self._answers.get(token)
        if future is not None and not future.done():
            future.set_result(answer)


class TuneTrial(tune.Trainable):
    """A trial of Tune: one job. Its process goes on to be another trial."""

    def setup(
        self,
        config: dict[str, Any],
        desk: Any = None,
        mailbox: Any = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Once per process."""
        self._desk, self._mailbox = desk, mailbox
        self._process = ray.get_runtime_context().current_actor
        os.environ.update(environment or {})
        known = set(sys.path)
        sys.path += [
            entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in known
        ]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Nothing of the last trial is kept but the task's setup."""
        return True

    def step(self) -> dict[str, Any]:
        """Wait for a job and run it."""
        order = ray.get(self._desk.next.remote(self.trial_id, self._process))
        if order is not None:
            answer = ray_worker.run(order, self._mailbox)
            ray.get(self._desk.leave.remote(self.trial_id, answer))
        return {"done": True}


class Trials(Searcher):
    """Has Tune keep as many trials as there is room for, until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 1
        self.closed = False
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if self.closed:
            return self.FINISHED
        if len(self._live) >= self.room:
            return None
        self._live.add(trial_id)
        return {}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Watch(tune.Callback):
    """Tells the desk which trials died, and removes what Tune keeps of those that ended."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._clean(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        try:
            reason = Path(trial.local_path, "error.txt").read_text()
        except OSError as error:
            reason = f"(unknown: {error})"
        self._desk.ended.remote(trial.trial_id, reason)
        self._clean(trial)

    def _clean(self, trial: Any) -> None:
        for folder in (trial.local_path, trial.storage.trial_working_directory, trial.storage.trial_fs_path):
            shutil.rmtree(folder, ignore_errors=True)


class Closed(Exception):
    """Ends Tune's loop at once, without its closing work, which reads and writes files of every trial there was."""


class UntilClosed(tune.Stopper):
    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._trials.closed:
            raise Closed
        return False
