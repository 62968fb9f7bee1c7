"""An executor without processes: it replays a table of results on a virtual clock. Start with `SimulatedExecutor`.

Keeps what `nas.executors.base.Executor` promises, but for time: `poll` jumps to the next event instead of waiting, whatever its
time-out. Trains nothing, and cannot say how accurate a network would be that its table does not know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from nas.errors import RunError
from nas.executors.base import Event, Job, check_submit
from nas.simulate.clock import SECOND, Agenda, ticks
from nas.simulate.cluster import Faults, Group, Workers, uniform
from nas.simulate.table import Result, Row, Table
from search_spaces.architecture import Architecture

_JOB, _LEAVE, _JOIN = 0, 1, 2
"""Ranks of what happens at one moment: a job that ends when its node leaves has ended."""

Fate = Literal["done", "failed", "lost"]
Ending = Literal["done", "failed", "lost", "cancelled"]


class Stay(NamedTuple):
    """A job on a worker, from its start to its end, virtual nanoseconds."""

    trial: int
    attempt: int
    worker: int
    start: int
    end: int
    ending: Ending
    epochs: int
    """whole epochs trained in it, also those that were lost"""


@dataclass
class _Held:
    job: Job
    result: Result
    worker: int
    start: int
    ends: int
    ending: Fate
    scale: int
    """nanoseconds of the whole training in this attempt"""
    done: int
    """epochs in the checkpoint it starts from"""
    until: int
    reported: int = 0


class SimulatedExecutor:
    """See `nas.executors.base.Executor`, and "until" and "paused" in `nas.evaluate`.

    A trial's checkpoint is kept at a pause only: what is lost, goes on from its last pause. "settings" and "donor" of a payload
    change nothing, as a table knows nothing of them.

    Args:
        table: what is replayed.
        workers: how many, or the groups they come in.
        faults: what goes wrong.
        seed: of the faults.
        progress: send an event after every epoch, as real trainings do.
        start_s: virtual time that every job takes before it trains: sending it, starting its process.
        charge_driver: let the virtual clock run while the caller is at work, by the processor time of this process: workers wait
            for a slow driver, and `utilisation` shows it. The history then depends on this machine.

    Attributes:
        stays: every job that has ended, in the order it ended.
        now: virtual nanoseconds since the start.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        table: Table,
        workers: int | Sequence[Group] = 1,
        *,
        faults: Faults | None = None,
        seed: int = 0,
        progress: bool = False,
        start_s: float = 0.0,
        charge_driver: bool = False,
    ) -> None:
        self.table = table
        self.workers = Workers([Group(workers)] if isinstance(workers, int) else workers)
        self.faults = faults or Faults()
        self.seed = seed
        self.progress = progress
        self.stays: list[Stay] = []
        self.now = 0
        self._start = ticks(start_s, "start_s")
        self._charged = time.process_time_ns() if charge_driver else None
        self._agenda: Agenda[tuple[str, int, _Held | None]] = Agenda()
        self._changes = 0  # joins and leaves to come
        self._held: dict[int, _Held] = {}
        self._on: list[dict[int, None]] = [{} for _ in self.workers.groups]  # per group, the trials it holds
        self._checkpoints: dict[int, int] = {}  # trial -> epochs
        self._fates: dict[int, tuple[int, int | None]] = {}  # trial -> (attempt, where in the training it is lost)
        self._closed = False
        for number, group in enumerate(self.workers.groups):
            if group.joins_s == 0:
                self.workers.join(number)
            else:
                self._change("join", number, group.joins_s, _JOIN)
            if group.leaves_s is not None:
                self._change("leave", number, group.leaves_s, _LEAVE)

    def _change(self, what: str, group: int, at_s: float, rank: int) -> None:
        self._agenda.add(ticks(at_s, what), rank, (what, group, None))
        self._changes += 1

    @property
    def capacity(self) -> int:
        """Workers that are there now."""
        return self.workers.capacity

    @property
    def makespan_s(self) -> float:
        """When the last job ended, virtual seconds."""
        return max((stay.end for stay in self.stays), default=0) / SECOND

    @property
    def utilisation(self) -> float:
        """Share of the workers' time, until the last job ended, in which they held a job; lost ones count. NaN before."""
        end = max((stay.end for stay in self.stays), default=0)
        available = self.workers.available(end)
        busy = sum(stay.end - stay.start for stay in self.stays)
        return busy / available if available else float("nan")

    # -- the executor ---------------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        check_submit(job, len(self._held), self.capacity, job.trial in self._held, self._closed)
        self._charge()
        payload = job.payload
        result = self.table.result(Architecture.from_json(payload["architecture"]), int(payload["seed"]))
        epochs = len(result.curve)
        until = min(int(payload.get("until") or epochs), epochs)
        if self._fates.get(job.trial, (job.attempt, None))[0] != job.attempt:
            del self._fates[job.trial]
        done = min(self._checkpoints.get(job.trial, 0), epochs)
        scale = self._scale(job, result)
        origin = _at(done, scale, epochs)
        end = max(_at(until, scale, epochs), origin) if epochs else scale
        ending: Fate = "done"
        if self.faults.failed and uniform(self.seed, "failed", job.trial) < self.faults.failed:
            raises = int(uniform(self.seed, "failed at", job.trial) * scale)
            if origin <= raises < end:
                end, ending = raises, "failed"
        lost = self._lost_at(job, origin, scale)
        if lost is not None and lost < end:
            end, ending = lost, "lost"
        if ending == "done" and result.state == "failed" and until == epochs:
            ending = "failed"
        worker = self.workers.take()
        ends = self.now + self._start + end - origin
        held = _Held(job, result, worker, self.now, ends, ending, scale, done, until)
        self._held[job.trial] = held
        self._on[self.workers.group_of(worker)][job.trial] = None
        self._schedule(held)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """The events of the next moment at which anything happens. None come when a group joins or leaves, but `capacity` changes.

        Raises:
            RunError: no worker is there, and none will come.
        """
        self._charge()
        events: list[Event] = []
        while not events and (self._held or not self.capacity) and self._agenda:
            self.now = max(self.now, self._agenda.next_moment)
            changed = False
            while self._agenda and self._agenda.next_moment <= self.now:
                moment, (what, number, held) = self._agenda.take()
                if held is None:
                    self._group_changes(what, number, moment, events)
                    changed = True
                elif self._held.get(number) is held:
                    self._happen(held, moment, events)
            if changed:
                break
        if not (self._held or self.capacity or self._changes or events):
            raise RunError(
                f"the simulation ran out of workers after {self.now / SECOND:g} virtual seconds: all groups have left; "
                "let one stay, or another join"
            )
        self._charge()
        return events

    def cancel(self, trial: int) -> bool:
        held = self._held.get(trial)
        if held is None:
            return False
        self._end(held, self.now, "cancelled", self._trained(held, self.now))
        return True

    def close(self) -> None:
        for trial in list(self._held):
            self.cancel(trial)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _charge(self) -> None:
        if self._charged is not None:
            before, self._charged = self._charged, time.process_time_ns()
            self.now += self._charged - before

    def _scale(self, job: Job, result: Result) -> int:
        seconds = result.seconds
        if self.faults.stragglers:
            draw = uniform(self.seed, "straggler", job.trial, job.attempt)
            seconds *= self.faults.factor if draw < self.faults.stragglers else 1.0
        return round(seconds * SECOND)

    def _lost_at(self, job: Job, origin: int, scale: int) -> int | None:
        if not self.faults.lost:
            return None
        if job.trial not in self._fates:
            dies = uniform(self.seed, "lost", job.trial, job.attempt) < self.faults.lost
            share = uniform(self.seed, "lost at", job.trial, job.attempt)
            self._fates[job.trial] = (job.attempt, origin + int(share * (scale - origin)) if dies else None)
        return self._fates[job.trial][1]

    def _schedule(self, held: _Held) -> None:
        """The next event of a job: the end of an epoch, where those are wanted, or of the job."""
        moment = held.ends
        if self.progress and held.done + held.reported < held.until:
            moment = min(moment, self._epoch_ends(held, held.done + held.reported + 1))
        self._agenda.add(moment, _JOB, ("job", held.job.trial, held))

    def _epoch_ends(self, held: _Held, epoch: int) -> int:
        epochs = len(held.result.curve)
        return held.start + self._start + _at(epoch, held.scale, epochs) - _at(held.done, held.scale, epochs)

    def _happen(self, held: _Held, moment: int, events: list[Event]) -> None:
        job, epoch = held.job, held.done + held.reported + 1
        if self.progress and epoch <= held.until and self._epoch_ends(held, epoch) <= moment:
            held.reported += 1
            row = held.result.curve[epoch - 1]
            info = {"stage": "training", "epochs": len(held.result.curve), **row}
            events.append(Event("progress", job.trial, job.attempt, info))
            self._schedule(held)
            return
        duration_s = (moment - held.start) / SECOND
        self._end(held, moment, held.ending, self._trained(held, moment))
        if held.ending == "lost":
            events.append(Event("lost", job.trial, job.attempt, error="the process died", duration_s=duration_s))
        elif held.ending == "failed":
            reason = {"type": "nas.errors.EvaluationFailed", "message": "the simulated training failed"}
            events.append(Event("failed", job.trial, job.attempt, reason, reason["message"], duration_s))
        else:
            answer = self._answer(held)
            if answer["state"] == "paused":
                self._checkpoints[job.trial] = max(held.until, held.done)
            else:
                self._checkpoints.pop(job.trial, None)
                self._fates.pop(job.trial, None)
            events.append(Event("done", job.trial, job.attempt, answer, duration_s=duration_s))

    def _answer(self, held: _Held) -> dict[str, Any]:
        result, until = held.result, held.until
        rows: list[Row] = [dict(row) for row in result.curve[:until]]
        metrics = dict(result.metrics)
        if until == len(result.curve):
            return {"state": result.state, "metrics": metrics, "violations": dict(result.violations), "curve": rows}
        metrics |= {name: value for name, value in rows[-1].items() if name in ("val_accuracy", "val_loss")}
        metrics["trained_epochs"] = until
        return {"state": "paused", "metrics": metrics, "violations": dict(result.violations), "curve": rows}

    def _trained(self, held: _Held, moment: int) -> int:
        """Whole epochs between the start of a job and a moment."""
        epochs = len(held.result.curve)
        if not epochs or not held.scale:
            return max(0, held.until - held.done) if moment >= held.ends and held.ending == "done" else 0
        position = moment - held.start - self._start + _at(held.done, held.scale, epochs)
        reached = min(max(position, 0) * epochs // held.scale, held.until)
        while reached < held.until and _at(reached + 1, held.scale, epochs) <= position:
            reached += 1
        return max(0, reached - held.done)

    def _end(self, held: _Held, moment: int, ending: Ending, epochs: int) -> None:
        job = held.job
        del self._held[job.trial]
        del self._on[self.workers.group_of(held.worker)][job.trial]
        self.workers.give_back(held.worker)
        self.stays.append(
            Stay(job.trial, job.attempt, held.worker, held.start, max(moment, held.start), ending, epochs)
        )

    def _group_changes(self, what: str, group: int, moment: int, events: list[Event]) -> None:
        self._changes -= 1
        if what == "join":
            self.workers.join(group)
            return
        self.workers.leave(group)
        for trial in list(self._on[group]):
            held = self._held[trial]
            self._end(held, moment, "lost", self._trained(held, moment))
            duration_s = max(0, moment - held.start) / SECOND
            events.append(
                Event("lost", trial, held.job.attempt, {"blameless": True}, "its node left the cluster", duration_s)
            )


def _at(epoch: int, scale: int, epochs: int) -> int:
    """Where in a training of `scale` nanoseconds an epoch ends."""
    return scale * epoch // epochs if epochs else 0
