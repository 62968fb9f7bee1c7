"""What every executor promises: `Job` in, `Event`s out. The search above does not know which executor runs.

An executor evaluates jobs somewhere (this process, local processes, a cluster) with one function that was set up there once:
`task="module:function"` names a function that is called with the setup (a JSON dict) and returns
`evaluate(payload, report) -> dict`. Jobs, reports and results are JSON dicts; NaN and infinities are allowed in them.

The laws that all of them keep are tests/conformance/test_executors.py. Start with `Executor`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

Report = Callable[[dict[str, Any]], None]
Evaluate = Callable[[dict[str, Any], Report], dict[str, Any]]
Kind = Literal["progress", "done", "failed", "lost"]


@dataclass(frozen=True)
class Job:
    """One evaluation to run.

    Attributes:
        trial: number of the trial; at most one job of a trial may be held at a time.
        attempt: which attempt at it this is.
        payload: what `evaluate` gets; JSON.
        needs: files and folders below the run's folder that it reads, relative, "/" between parts; some may be missing. They are
            brought to workers that do not see the run's folder (`nas.executors.travel`); what the job writes below that folder
            comes back.
    """

    trial: int
    attempt: int
    payload: dict[str, Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something that became of a job. "progress" any number of times, in order, then exactly one of the other three.

    Attributes:
        kind: "progress"; "done": it returned; "failed": it raised, took too long, or returned what is no JSON dict;
            "lost": its process died, which says nothing about the job itself (another attempt may succeed).
        trial: as in the job.
        attempt: as in the job.
        payload: the reported or returned dict; of a failed job that raised, {"type": "module.Class", "message": str}, else {}.
        error: traceback or reason, for "failed" and "lost".
        duration_s: wall time the job ran, seconds; None for "progress".
    """

    kind: Kind
    trial: int
    attempt: int
    payload: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Placement:
    """Where jobs run and what each of them gets; every executor takes of it what it knows.

    Attributes:
        workers: processes of the local executor; on a cluster the most jobs at a time, 0 for as many as there is room for.
        threads: of numeric libraries, per job.
        timeout_s: a job that takes longer has failed; None: never.
        cpus: CPUs that a job occupies on a cluster.
        gpus: GPUs that a job occupies on a cluster; may be a fraction.
        address: of the cluster; "" for a cluster of this machine, started and ended with the executor.
        folder: the run's folder, absolute; None where jobs read and write no files.
        setup_needs: files below it that the task's setup reads; as `Job.needs`.
        storage: URL of the run's database, with its password; "" for the file in the run's folder.
        run: the run's name.
        message: is told what a person should read: a node that came or went, a file that could not be sent.
    """

    workers: int = 1
    threads: int = 1
    timeout_s: float | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""
    folder: Path | None = None
    setup_needs: tuple[str, ...] = ()
    storage: str = ""
    run: str = "run"
    message: Callable[[str], None] = lambda text: None


class Executor(Protocol):
    """Runs jobs. Not for use by several threads at once.

    The shipped ones are made by `nas.executors.make_executor(name, task, setup, placement)`.
    """

    @property
    def capacity(self) -> int:
        """How many jobs it holds at a time, from submit to their last event. On a cluster it changes as nodes come and go, may
        fall below the number of jobs held, and may be 0 for a while."""
        ...

    def submit(self, job: Job) -> None:
        """Take a job; returns at once.

        Raises:
            RuntimeError: `capacity` jobs are held already, or the executor is closed.
            ValueError: a job of the same trial is held.
            TypeError: the payload is not JSON.
        """
        ...

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """The events since the last call, in order per job. Waits until there is one, `timeout_s` at most; if no job is
        held it returns at once.

        Raises:
            NasError: no job can ever run: the task is not there, its setup raised, or its processes die before any job.
        """
        ...

    def cancel(self, trial: int) -> bool:
        """Forget the job of a trial: no further event of it will come. Its process may be killed.

        Returns:
            Whether there was one.
        """
        ...

    def close(self) -> None:
        """Stop everything, without waiting for jobs. Twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def encode(value: Mapping[str, Any], what: str) -> bytes:
    """JSON bytes of a dict; the bare tokens NaN and Infinity are used for those floats, as Python reads them back.

    Args:
        value: the dict.
        what: its name in the message, e.g. "the payload of trial 3".

    Raises:
        TypeError: it is no JSON dict; the message says at which key.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}: expected a dict, got {type(value).__name__}")
    try:
        return json.dumps(value).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        where = _not_json(value, "")
        raise TypeError(
            f"{what} must be JSON (dicts with text keys, lists, text, numbers, True, False, None): "
            + (f"found {where}" if where else str(error))
        ) from None


def decode(data: bytes | bytearray) -> Any:
    """What `encode` wrote."""
    return json.loads(data)


def check_submit(job: Job, held: int, capacity: int, same_trial: bool, closed: bool) -> bytes:
    """What `submit` refuses, alike for all executors; returns the encoded payload."""
    if closed:
        raise RuntimeError(f"trial {job.trial}: the executor is closed")
    if same_trial:
        raise ValueError(
            f"trial {job.trial}: expected one job of a trial at a time, found another that is not finished"
        )
    if held >= capacity:
        raise RuntimeError(
            f"trial {job.trial}: the executor is full ({held} of {capacity} jobs); poll() until one ends"
        )
    return encode(job.payload, f"the payload of trial {job.trial}")


def _not_json(value: Any, path: str, depth: int = 0) -> str | None:
    """Where and what the first thing that is not JSON is; None if it is only visible to the encoder (a cycle)."""
    if depth > 50:
        return None
    if isinstance(value, dict):
        items = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        bad_key = next((key for key in value if not isinstance(key, str | int | float | bool | None)), None)
        if bad_key is not None:
            return f"the key {bad_key!r} ({type(bad_key).__name__}) in {path or 'it'}"
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    elif value is None or isinstance(value, str | int | float | bool):
        return None
    else:
        return f"{type(value).__module__}.{type(value).__qualname__} at {path}"
    return next((found for where, item in items if (found := _not_json(item, where, depth + 1))), None)
