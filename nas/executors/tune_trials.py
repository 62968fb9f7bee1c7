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


class _Trial:
    """A trial that has asked for a job: its process, and the job once it has one. No handle of a process is kept longer than that,
    as Tune ends one by letting go of it."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.order: asyncio.Future[ray_worker.Order | None] = asyncio.get_running_loop().create_future()
        self.token: int | None = None


class Desk:
    """An actor beside the driver where trials find jobs and leave answers, and where it is known which trial has which job."""

    def __init__(self) -> None:
        self._jobs: deque[ray_worker.Order] = deque()
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._trials: dict[str, _Trial] = {}
        self._room = 0
        self._between = 0  # processes on their way to their next trial
        self._early_deaths = 0
        self._failure = ""
        self._closed = False

    async def run(self, order: ray_worker.Order, room: int) -> Answer:
        """Have a trial run a job.

        Args:
            order: the job.
            room: how many trials there shall be.

        Returns:
            What `ray_worker.run` returned, or {"kind": "died", "reason"}: its process died, {"kind": "unable", "reason"}: there
            are no processes that could run it.
        """
        if self._failure:
            return {"kind": "unable", "reason": self._failure}
        self._room = room
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
        self._between = max(0, self._between - 1)
        return await self._wait(trial, process)

    async def leave(self, trial: str, answer: Answer) -> ray_worker.Order | None:
        """A trial's job has ended.

        Returns:
            None, the trial is over; or another job, while processes are still starting: if this trial ended, Tune would stop one of
            those and use this trial's for it, and with short jobs there would never be a second process.
        """
        found = self._trials.pop(trial, None)
        if found is None or found.token is None:
            return None
        self._resolve(found.token, answer)
        if len(self._trials) + 1 + self._between < self._room:
            return await self._wait(trial, found.process)
        self._between += 1
        return None

    async def ended(self, trial: str, reason: str) -> None:
        """A trial's process died, whether it had a job or not."""
        found = self._trials.pop(trial, None)
        if found is None:
            self._early_deaths += 1
            if self._early_deaths >= MAX_EARLY_DEATHS:
                await self.fail(reason)
        elif found.token is not None:
            self._resolve(found.token, {"kind": "died", "reason": reason})

    async def drop(self, token: int) -> None:
        """Forget a job; a process that is at it is killed."""
        self._jobs = deque(order for order in self._jobs if order.token != token)
        for trial in self._trials.values():
            if trial.token == token:
                ray.kill(trial.process)
        self._resolve(token, {"kind": "died", "reason": "stopped"})

    async def fail(self, reason: str) -> None:
        """No job will run any more."""
        self._failure = reason
        for token in list(self._answers):
            self._resolve(token, {"kind": "unable", "reason": reason})

    async def close(self) -> None:
        """End the processes at once; Tune's own way would wait for the jobs they are at."""
        self._closed = True
        for trial in self._trials.values():
            ray.kill(trial.process)

    async def _wait(self, trial: str, process: Any) -> ray_worker.Order | None:
        found = self._trials[trial] = _Trial(process)
        self._hand_out()
        return await found.order

    def _hand_out(self) -> None:
        for trial in self._trials.values():
            if not self._jobs:
                return
            if trial.token is None:
                order = self._jobs.popleft()
                trial.token = order.token
                trial.order.set_result(order)

    def _resolve(self, token: int, answer: Answer) -> None:
        future = self._answers.get(token)
        if future is not None and not future.done():
            future.set_result(answer)


class TuneTrial(tune.Trainable):
    """A trial of Tune: one job, as a rule. Its process goes on to be another trial."""

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
        while order is not None:
            answer = ray_worker.run(order, self._mailbox)
            order = ray.get(self._desk.leave.remote(self.trial_id, answer))
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
