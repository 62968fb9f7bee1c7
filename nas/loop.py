"""The search loop: asks searchers for architectures, hands them to an executor, writes every answer to the store.

Knows neither how an architecture is evaluated nor where. All state is in the store, so a loop that was killed at any moment is
continued by a new one: trials that were under way are run again, finished ones are never repeated. Where a stopping rule is on,
trials train in segments (`nas.stopping.segments`). What a trial costs here does not grow with the number of trials.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from nas.errors import EvaluationFailed, RunError
from nas.executors.base import Event, Executor, Job
from nas.objectives import objective_values
from nas.proposals import INITIAL, Proposals
from nas.searchers import Searcher
from nas.stopping import StoppingRule
from nas.stopping.segments import Segments
from nas.store import State, Store, Trial

MAX_LOST = 3
"""A trial whose process dies this often (out of memory, killed) is a failed row; the search goes on."""

MAX_BLAMELESS = 20
"""The same where the executor says that the trial had no part in it (its machine left the cluster)."""

WAIT_S = 0.5
"""Longest time between two looks at the executor, seconds."""


class Progress(Protocol):
    """What the loop tells whoever watches it."""

    def already(self, trials: Iterable[Trial]) -> None: ...
    def trial_started(self, trial: Trial) -> None: ...
    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None: ...
    def trial_finished(self, trial: Trial) -> None: ...
    def message(self, text: str) -> None: ...
    def workers(self, busy: int, capacity: int) -> None: ...
    def trial_lost(self, trial: Trial) -> None: ...


class SearchLoop:
    """One run of all its searchers, each to its own number of trials.

    Args:
        store: the run's; this loop is its only writer.
        searchers: name -> searcher.
        totals: name -> number of trials.
        executor: evaluates; its answer per job is {"state", "metrics", "violations", "curve"}.
        objectives: metric -> "max" or "min"; a finished trial without a finite value for each is a failed row.
        seed: seed of every trial whose proposal names none, so that equal architectures are equal trials.
        epochs: training budget of every trial, for the record.
        progress: is told what happens.
        stopping: decides which trainings end early; None: all are trained to the end.
        on_finished: called after every final state that was recorded, of copies too.
    """

    def __init__(
        self,
        store: Store,
        searchers: Mapping[str, Searcher],
        totals: Mapping[str, int],
        executor: Executor,
        *,
        objectives: Mapping[str, str],
        seed: int,
        epochs: int,
        progress: Progress,
        stopping: StoppingRule | None = None,
        on_finished: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self.store = store
        self.executor = executor
        self.objectives = dict(objectives)
        self.progress = progress
        self.segments = Segments(stopping, epochs)
        self.on_finished = on_finished
        self.proposals = Proposals(store, searchers, totals, seed=seed, epochs=epochs, message=progress.message)
        self._trials = self.proposals.trials
        self._waiting: dict[int, list[int]] = {}  # original -> copies that wait for its answer
        self._queue: deque[int] = deque()  # to be started
        self._paused: deque[int] = deque()  # to go on
        self._running: set[int] = set()  # the executor holds them
        self._lost: dict[tuple[int, bool], int] = {}  # trial, whether blameless -> times
        self._spent_s: dict[int, float] = {}  # in the segments of an open trial
        self._workers: tuple[int, int] | None = None

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Search until every searcher has its trials. `stop()` is asked between events; True ends early, nothing is lost."""
        self._restore()
        while not stop():
            self._fill()
            if not self._running and not self._left():
                break
            for event in self._poll():
                self._handle(event)

    def _left(self) -> bool:
        """Whether there is anything to submit, once there is a worker."""
        return bool(self._paused or self._queue or self.proposals.open_searchers())

    def _poll(self) -> list[Event]:
        """What happened; with nothing under way, waits for workers without keeping the processor busy."""
        self._tell_workers()
        began = time.monotonic()
        events = self.executor.poll(WAIT_S)
        if not events and not self._running:
            time.sleep(max(0.0, WAIT_S - (time.monotonic() - began)))
        return events

    def _tell_workers(self) -> None:
        now = (len(self._running), self.executor.capacity)
        before, self._workers = self._workers, now
        self.progress.workers(*now)
        if now[1] <= 0 and (before is None or before[1] > 0):
            self.progress.message(
                "there is no worker at the moment; the search waits for one and goes on by itself. Start `nas worker` for this "
                "run, or add a machine to the cluster (ray start --address=HOST:6379)"
            )

    # -- proposing ------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        self.store.recover()
        for trial in self.store.trials():
            self.proposals.remember(trial)
        self.segments.restore(self.store, self._trials.values())
        self.progress.already(self._trials.values())
        for trial in list(self._trials.values()):
            if trial.state != "proposed":
                continue
            if trial.copy_of is None:
                self._queue.append(trial.trial)
            else:
                self._follow(trial)

    def _fill(self) -> None:
        """Hand the executor what it has room for: trainings that go on first, then restarts, then new proposals."""
        room = self.executor.capacity - len(self._running)
        for _ in range(room):
            if self._paused:
                trial = self._trials[self._paused.popleft()]
            else:
                waiting = self._trials[self._queue.popleft()] if self._queue else self._propose()
                if waiting is None:
                    return
                trial = self.store.start(waiting.trial)
                self.proposals.remember(trial)
                self.progress.trial_started(trial)
            self._running.add(trial.trial)
            self.executor.submit(self._job(trial))

    def _job(self, trial: Trial) -> Job:
        payload: dict[str, Any] = {
            "trial": trial.trial,
            "architecture": trial.architecture.to_json(),
            "seed": trial.seed,
            **self.segments.payload(trial),
        }
        needs = [f"checkpoints/{trial.trial:05d}"]
        if trial.sampler.get(INITIAL):
            payload[INITIAL] = trial.sampler[INITIAL]
            needs.append(payload[INITIAL])
        donor = payload.pop("donor", None)
        if donor is not None and not self._trials[donor].finished:  # a finished trial has no checkpoint any more
            payload["donor"] = f"checkpoints/{donor:05d}"
            needs.append(payload["donor"])
        return Job(trial.trial, trial.attempts, payload, tuple(needs))

    def _propose(self) -> Trial | None:
        """The next trial that must be evaluated, or None if all have been proposed."""
        while (trial := self.proposals.next()) is not None and trial.copy_of is not None:
            self._follow(trial)
        return trial

    def _follow(self, copy: Trial) -> None:
        """Give a copy its original's answer, now or when it comes."""
        assert copy.copy_of is not None
        original = self._trials[copy.copy_of]
        if original.state in ("proposed", "running"):
            self._waiting.setdefault(original.trial, []).append(copy.trial)
            return
        self._finish(
            copy,
            original.state,
            {k: v for k, v in original.metrics.items() if k != "test_accuracy"},
            original.violations,
            [],
            0.0,
            f"copy of trial {original.trial}, which failed" if original.state == "failed" else None,
        )

    # -- answers --------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        trial = self._trials[event.trial]
        if event.attempt != trial.attempts or trial.trial not in self._running:
            return  # a late answer of an earlier attempt
        if event.kind == "progress":
            self.progress.trial_progress(trial, event.payload)
            return
        self._running.discard(trial.trial)
        if event.kind == "lost":
            self._answer_lost(trial, event)
        elif event.kind == "failed":
            if event.payload.get("type") == "nas.errors.RunError":
                # The run's folder cannot be written: no other trial would do better. The next start runs this one again.
                raise RunError(str(event.payload["message"]))
            self._fail(trial, event.error, event.duration_s)
        elif event.payload["state"] == "paused":
            self._answer_paused(trial, event.payload, event.duration_s)
        else:
            self._answer(trial, event.payload, event.duration_s)

    def _answer_lost(self, trial: Trial, event: Event) -> None:
        self.progress.trial_lost(trial)
        blameless = bool(event.payload.get("blameless"))
        times = self._lost[trial.trial, blameless] = self._lost.get((trial.trial, blameless), 0) + 1
        if times < (MAX_BLAMELESS if blameless else MAX_LOST):
            self.progress.message(f"trial {trial.trial}: {event.error}; it starts again")
            self._queue.appendleft(trial.trial)
        else:
            self._fail(trial, f"{event.error} ({times} times); not tried again", event.duration_s)

    def _answer_paused(self, trial: Trial, answer: Mapping[str, Any], duration_s: float | None) -> None:
        try:
            decision = self.segments.judge(trial, answer)
        except EvaluationFailed as error:
            self._fail(trial, str(error), duration_s)
            return
        metrics = dict(answer["metrics"])
        if decision.stop:
            metrics |= self.segments.ended(trial, decision)
            self._finish(
                trial, "stopped", metrics, answer.get("violations", {}), answer.get("curve", []), duration_s, None
            )
            return
        self._spent_s[trial.trial] = self._spent_s.get(trial.trial, 0.0) + (duration_s or 0.0)
        passed = self.store.update_metrics(
            trial.trial, metrics | self.segments.passed(trial), curve=self.segments.rows(trial)
        )
        self.proposals.remember(passed)
        self._paused.append(trial.trial)

    def _answer(self, trial: Trial, answer: Mapping[str, Any], duration_s: float | None) -> None:
        state, error = answer["state"], None
        metrics = dict(answer["metrics"])
        try:
            self.segments.check_end(trial, answer)
        except EvaluationFailed as refused:
            state, error = "failed", str(refused)
        if state == "complete" and objective_values(metrics, self.objectives) is None:
            state = "failed"
            got = {name: metrics.get(name) for name in self.objectives}
            error = f"expected a finite value for every objective, got {got}"
        metrics |= self.segments.factors(trial)
        self._finish(trial, state, metrics, answer.get("violations", {}), answer.get("curve", []), duration_s, error)

    def _fail(self, trial: Trial, error: str | None, duration_s: float | None) -> None:
        self._finish(trial, "failed", {}, {}, self.segments.rows(trial), duration_s, error)

    def _finish(
        self,
        trial: Trial,
        state: State,
        metrics: Mapping[str, Any],
        violations: Mapping[str, float],
        curve: list[dict[str, Any]],
        duration_s: float | None,
        error: str | None,
    ) -> None:
        spent_s = self._spent_s.pop(trial.trial, 0.0)
        recorded = self.store.finish(
            trial.trial,
            trial.attempts,
            state,
            metrics=dict(metrics),
            violations=dict(violations),
            curve=curve,
            duration_s=spent_s + duration_s if duration_s is not None else spent_s or None,
            error=error,
        )
        self.segments.forget(trial)
        if not recorded:
            return
        finished = self.store.trial(trial.trial)
        self.proposals.remember(finished)
        self.progress.trial_finished(finished)
        self.on_finished(finished)
        for copy in self._waiting.pop(trial.trial, []):
            self._follow(self._trials[copy])
