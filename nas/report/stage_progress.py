"""What is shown while supernets are trained, before the trials: a bar or a few words per supernet. Start with `StageTally`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nas.report.units import duration, show


class StageTally:
    """What is known of the supernets that are trained before the trials; no output.

    Args:
        jobs: name -> whether an earlier process finished it.
        clock: seconds, monotonic.
    """

    def __init__(self, jobs: Mapping[str, bool], clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs = dict(jobs)
        self.failed: set[str] = set()
        self.info: dict[str, Mapping[str, Any]] = {}
        self._clock = clock
        self._began: dict[
            str, tuple[float, float]
        ] = {}  # job -> when it was first heard of here, and how far it was then

    def progressed(self, job: str, info: Mapping[str, Any]) -> None:
        done = float(info.get("done", 0.0))
        fell_back = done < float(
            self.info.get(job, {}).get("done", 0.0)
        )  # its process died; it goes on from a checkpoint
        self.info[job] = info
        if fell_back or job not in self._began:
            self._began[job] = (self._clock(), done)

    def finished(self, job: str, *, failed: bool = False) -> None:
        if failed:
            self.failed.add(job)
        self.jobs[job] = True

    def share(self, job: str) -> float:
        """How much of a job is done, in [0, 1]."""
        if job in self.failed:
            return float(self.info.get(job, {}).get("done", 0.0))
        return 1.0 if self.jobs[job] else float(self.info.get(job, {}).get("done", 0.0))

    def seconds_left(self, job: str) -> float | None:
        """Of a job that runs, at its pace since it was first heard of here; None before that is known."""
        if job not in self._began or self.jobs[job]:
            return None
        since, done_then = self._began[job]
        gained, spent = self.share(job) - done_then, self._clock() - since
        return spent * (1.0 - self.share(job)) / gained if gained > 0 and spent > 0 else None

    def state(self, job: str) -> str:
        """Phase, epoch, accuracy of the supernet and time left, in words."""
        if job in self.failed:
            return "failed"
        if self.jobs[job]:
            return "done"
        info = self.info.get(job)
        if info is None:
            return "waiting"
        parts = [f"{info['phase']} epoch {info['epoch']}/{info['epochs']}"]
        if info.get("accuracy") is not None:
            parts.append(f"supernet accuracy {show('val_accuracy', info['accuracy'])}")
        left = self.seconds_left(job)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def line(self) -> str:
        """Everything in one line."""
        done = sum(1 for job, ended in self.jobs.items() if ended and job not in self.failed)
        running = "; ".join(
            f"{job} {self.state(job)}" for job, ended in self.jobs.items() if not ended and job in self.info
        )
        return f"{done}/{len(self.jobs)} supernets" + (f"; {running}" if running else "")

    def bars(self) -> Table:
        """A bar per job, with its state."""
        bars = Table.grid(padding=(0, 2))
        for job in self.jobs:
            bars.add_row(Text(job), ProgressBar(1.0, self.share(job), width=32), Text(self.state(job)))
        return bars
