"""Runs jobs in this process, one at a time, inside `poll`. For debugging, for tests, and for objects that cannot travel.

Cannot enforce a time-out, and a job that kills its process kills this one. Start with `InlineExecutor`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from nas.errors import ConfigError
from nas.executors.base import Evaluate, Event, Job, Placement, check_submit, decode, encode
from nas.executors.task import describe, free_device_memory, load_task, run_job, setup_error


class InlineExecutor:
    """See `nas.executors.base.Executor`.

    Args:
        task: "module:function" to set up, or an `evaluate(payload, report)` that is ready.
        setup: what the task's function gets.
        workers: 0 or 1; there is one process.
        threads: not used: this process keeps its own number of threads.
        timeout_s: must be None.

    Raises:
        ConfigError: several workers, or a time-out.
        NasError: the task is not there, or its setup raised.
    """

    def __init__(
        self,
        task: str | Evaluate,
        setup: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        threads: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if workers not in (0, 1):
            raise ConfigError(
                f"the inline executor is one process, got workers = {workers}; use executor local for more"
            )
        if timeout_s is not None:
            raise ConfigError(
                f"the inline executor cannot stop a job after a time, got timeout_s = {timeout_s:g}; use executor local"
            )
        self._job: Job | None = None
        self._payload = b""
        self._closed = False
        own_setup = decode(encode(setup or {}, "the setup"))
        self._evaluate: Evaluate
        if isinstance(task, str):
            try:
                self._evaluate = load_task(task, own_setup)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise setup_error(describe(error), task) from error
        else:
            self._evaluate = task

    @property
    def capacity(self) -> int:
        return 1

    def submit(self, job: Job) -> None:
        held = int(self._job is not None)
        same = self._job is not None and self._job.trial == job.trial
        self._payload = check_submit(job, held, self.capacity, same, self._closed)
        self._job = job

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """Runs the job that was submitted, however long it takes, and returns all of its events."""
        job = self._job
        if job is None:
            return []
        events: list[Event] = []

        def report(info: dict[str, Any]) -> None:
            copy = decode(encode(info, "a report"))
            events.append(Event("progress", job.trial, job.attempt, copy))

        started = time.perf_counter()
        result, failure = run_job(self._evaluate, decode(self._payload), report)
        duration_s = time.perf_counter() - started
        self._job = None
        if result is not None:
            events.append(Event("done", job.trial, job.attempt, decode(result), duration_s=duration_s))
        else:
            free_device_memory()
            error = failure.pop("error")
            events.append(Event("failed", job.trial, job.attempt, failure, error, duration_s))
        return events

    def cancel(self, trial: int) -> bool:
        if self._job is None or self._job.trial != trial:
            return False
        self._job = None
        return True

    def close(self) -> None:
        self._job = None
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make(task: str, setup: Mapping[str, Any], placement: Placement) -> InlineExecutor:
    """For `nas.executors.make_executor`."""
    return InlineExecutor(task, setup, workers=placement.workers, timeout_s=placement.timeout_s)
