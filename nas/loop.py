"""The search loop: asks searchers for architectures, hands them to an executor, writes every answer to the store.

Knows neither how an architecture is evaluated nor where. All state is in the store, so a loop that was killed at any moment is
continued by a new one: trials that were under way are run again, finished ones are never repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from nas.errors import RunError
from nas.executors.base import Event, Executor, Job
from nas.objectives import objective_values
from nas.searchers import Proposal, Searcher, SpaceExhausted
from nas.store import State, Store, Trial
from search_spaces import SpaceError

MAX_LOST = 3
"""A trial whose process dies this often (out of memory, killed) is a failed row; the search goes on."""

INITIAL = "initial"
"""Key of a trial's sampler dict and of its job: the file of weights and masks that its training starts from, if there is one."""

Work = tuple[str, int, str | None]
"""What makes two trials of a run the same work: digest, seed, and what they start from."""


class Progress(Protocol):
    """What the loop tells whoever watches it."""

    def already(self, trials: Iterable[Trial]) -> None: ...
    def trial_started(self, trial: Trial) -> None: ...
    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None: ...
    def trial_finished(self, trial: Trial) -> None: ...
    def message(self, text: str) -> None: ...


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
    ) -> None:
        self.store = store
        self.searchers = dict(searchers)
        self.totals = dict(totals)
        self.executor = executor
        self.objectives = dict(objectives)
        self.seed = seed
        self.epochs = epochs
        self.progress = progress
        self.history: dict[str, list[Trial]] = {name: [] for name in self.searchers}
        self._proposed: dict[str, set[str]] = {name: set() for name in self.searchers}
        self._original: dict[Work, int] = {}  # -> the trial that is or was really evaluated
        self._trials: dict[int, Trial] = {}
        self._waiting: dict[int, list[int]] = {}  # original -> copies that wait for its answer
        self._queue: deque[int] = deque()
        self._running: set[int] = set()
        self._lost: dict[int, int] = {}
        self._exhausted: set[str] = set()

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Search until every searcher has its trials. `stop()` is asked between events; True ends early, nothing is lost."""
        self._restore()
        while not stop():
            self._fill()
            if not self._running:
                break
            for event in self.executor.poll(0.5):
                self._handle(event)

    # -- proposing ------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        self.store.recover()
        for trial in self.store.trials():
            self._remember(trial)
        self.progress.already(self._trials.values())
        for trial in list(self._trials.values()):
            if trial.state != "proposed":
                continue
            if trial.copy_of is None:
                self._queue.append(trial.trial)
            else:
                self._follow(trial)

    def _remember(self, trial: Trial) -> None:
        fresh = trial.trial not in self._trials
        self._trials[trial.trial] = trial
        if trial.searcher in self.history:
            if fresh:
                self.history[trial.searcher].append(trial)
                self._proposed[trial.searcher].add(trial.digest)
            else:
                self.history[trial.searcher][trial.index] = trial
        work = (trial.digest, trial.seed, trial.sampler.get(INITIAL))
        if trial.copy_of is None and trial.state != "failed":
            self._original.setdefault(work, trial.trial)
        elif trial.state == "failed" and self._original.get(work) == trial.trial:
            del self._original[work]

    def _fill(self) -> None:
        while len(self._running) < self.executor.capacity:
            if self._queue:
                trial = self._trials[self._queue.popleft()]
            else:
                proposed = self._propose()
                if proposed is None:
                    return
                trial = proposed
            trial = self.store.start(trial.trial)
            self._remember(trial)
            self._running.add(trial.trial)
            self.progress.trial_started(trial)
            payload = {"trial": trial.trial, "architecture": trial.architecture.to_json(), "seed": trial.seed}
            if trial.sampler.get(INITIAL):
                payload[INITIAL] = trial.sampler[INITIAL]
            self.executor.submit(Job(trial.trial, trial.attempts, payload))

    def _propose(self) -> Trial | None:
        """The next trial that must be evaluated, or None if all have been proposed."""
        while True:
            open_searchers = [
                name
                for name, total in self.totals.items()
                if len(self.history[name]) < total and name not in self._exhausted
            ]
            if not open_searchers:
                return None
            name = min(open_searchers, key=lambda n: len(self.history[n]) / self.totals[n])
            history, proposed = self.history[name], self._proposed[name]
            try:
                proposal = self._ask(name, history, proposed.__contains__)
            except SpaceExhausted as reason:
                self._exhausted.add(name)
                self.progress.message(f"{name} stops after {len(history)} of {self.totals[name]} trials: {reason}")
                continue
            seed = self.seed if proposal.seed is None else proposal.seed
            original = self._original.get((proposal.architecture.digest, seed, proposal.initial))
            trial = self.store.propose(
                searcher=name,
                index=len(history),
                architecture=proposal.architecture,
                seed=seed,
                epochs=self.epochs,
                sampler=proposal.sampler | ({INITIAL: proposal.initial} if proposal.initial else {}),
                copy_of=original,
            )
            self._remember(trial)
            if original is None:
                return trial
            self._follow(trial)

    def _ask(self, name: str, history: list[Trial], avoid: Callable[[str], bool]) -> Proposal:
        searcher, index = self.searchers[name], len(history)
        try:
            return searcher.propose(history, index, avoid)
        except (
            SpaceError
        ) as error:  # the space function raised for what the searcher wanted; anything new will do instead
            self.progress.message(f"{name}, proposal {index}: {error}; drawn at random instead")
            return Proposal(searcher.draw_random(index, avoid))

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
            self._lost[trial.trial] = self._lost.get(trial.trial, 0) + 1
            if self._lost[trial.trial] < MAX_LOST:
                self.progress.message(f"trial {trial.trial}: {event.error}; it starts again")
                self._queue.appendleft(trial.trial)
                return
            error = f"{event.error} ({MAX_LOST} times); not tried again"
            self._finish(trial, "failed", {}, {}, [], event.duration_s, error)
        elif event.kind == "failed":
            if event.payload.get("type") == "nas.errors.RunError":
                # The run's folder cannot be written: no other trial would do better. The next start runs this one again.
                raise RunError(str(event.payload["message"]))
            self._finish(trial, "failed", {}, {}, [], event.duration_s, event.error)
        else:
            self._answer(trial, event.payload, event.duration_s)

    def _answer(self, trial: Trial, answer: Mapping[str, Any], duration_s: float | None) -> None:
        state, error = answer["state"], None
        metrics = dict(answer["metrics"])
        if state == "complete" and objective_values(metrics, self.objectives) is None:
            state = "failed"
            got = {name: metrics.get(name) for name in self.objectives}
            error = f"expected a finite value for every objective, got {got}"
        self._finish(
            trial,
            state,
            metrics,
            answer.get("violations", {}),
            answer.get("curve", []),
            duration_s,
            error,
        )

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
        recorded = self.store.finish(
            trial.trial,
            trial.attempts,
            state,
            metrics=dict(metrics),
            violations=dict(violations),
            curve=curve,
            duration_s=duration_s,
            error=error,
        )
        if not recorded:
            return
        finished = self.store.trial(trial.trial)
        self._remember(finished)
        self.progress.trial_finished(finished)
        for copy in self._waiting.pop(trial.trial, []):
            self._follow(self._trials[copy])
