"""The search loop with an executor the test plays itself: losses, late answers, copies, restarts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nas.errors import RunError
from nas.executors.base import Event, Job
from nas.loop import MAX_BLAMELESS, MAX_LOST, SearchLoop
from nas.searchers import make_searcher
from nas.store import Store, Trial
from search_spaces import get_space

OBJECTIVES = {"val_accuracy": "max"}


class Script:
    """An executor whose answers the test gives: `answer(job) -> event`, or None to keep it waiting."""

    def __init__(self, answer: Any, capacity: int = 1) -> None:
        self.answer = answer
        self.capacity = capacity
        self.jobs: list[Job] = []
        self.waiting: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.waiting.append(job)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        events, waiting = [], []
        for job in self.waiting:
            event = self.answer(job)
            waiting += [job] if event is None else []
            events += [] if event is None else event if isinstance(event, list) else [event]
        self.waiting = waiting
        return events


class Silent:
    """Progress that remembers messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.seen: list[tuple[int, int]] = []
        self.lost: list[int] = []

    def already(self, trials: Iterable[Trial]) -> None: ...
    def trial_started(self, trial: Trial) -> None: ...
    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None: ...
    def trial_finished(self, trial: Trial) -> None: ...
    def trial_lost(self, trial: Trial) -> None:
        self.lost.append(trial.trial)

    def workers(self, busy: int, capacity: int) -> None:
        self.seen.append((busy, capacity))

    def message(self, text: str) -> None:
        self.messages.append(text)


def done(job: Job, value: float = 0.5) -> Event:
    answer = {"state": "complete", "metrics": {"val_accuracy": value}, "violations": {}, "curve": [{"epoch": 1}]}
    return Event("done", job.trial, job.attempt, answer, None, 1.5)


def loop(store: Store, executor: Script, totals: dict[str, int], **space: Any) -> tuple[SearchLoop, Silent]:
    made = get_space("mlp", input_shape=(8,), classes=3, **{"max_depth": 1, "widths": [8, 16, 32, 64], **space})
    searchers = {name: make_searcher(name, made, OBJECTIVES) for name in totals}
    silent = Silent()
    return SearchLoop(
        store, searchers, totals, executor, objectives=OBJECTIVES, seed=0, epochs=1, progress=silent
    ), silent


@pytest.fixture
def store(tmp_path: Path) -> Iterable[Store]:
    with Store.create(tmp_path / "run.db") as made:
        yield made


def test_every_searcher_gets_exactly_its_trials(store: Store) -> None:
    executor = Script(done, capacity=3)
    loop(store, executor, {"random": 4, "nsga2": 5})[0].run()
    trials = store.trials()
    assert [t.searcher for t in trials].count("random") == 4
    assert [t.searcher for t in trials].count("nsga2") == 5
    assert {t.state for t in trials} == {"complete"}
    assert store.curve(trials[0].trial) == [{"epoch": 1}]
    assert trials[0].duration_s == 1.5


def test_equal_networks_are_evaluated_once_and_share_the_answer(store: Store) -> None:
    executor = Script(lambda job: done(job, 0.1 + job.trial))
    loop(store, executor, {"random": 4, "nsga2": 4})[0].run()  # NSGA-II starts with random search's proposals
    trials = {t.trial: t for t in store.trials()}
    copies = [t for t in trials.values() if t.copy_of is not None]
    assert copies
    assert len(executor.jobs) == 8 - len(copies)
    for copy in copies:
        assert copy.digest == trials[copy.copy_of].digest
        assert copy.metrics == trials[copy.copy_of].metrics
        assert trials[copy.copy_of].copy_of is None


def test_a_copy_of_a_trial_under_way_waits_for_its_answer(store: Store) -> None:
    held: list[Job] = []

    def answer(job: Job) -> Event | None:
        if not held:
            held.append(job)
        return None if job is held[0] and len(executor.jobs) < 3 else done(job, 0.7)

    executor = Script(answer, capacity=2)
    loop(store, executor, {"random": 3, "nsga2": 3})[0].run()
    trials = store.trials()
    assert {t.state for t in trials} == {"complete"}
    assert any(t.copy_of == held[0].trial for t in trials)


def test_a_copy_of_a_failed_trial_has_failed_too(store: Store) -> None:
    executor = Script(lambda job: Event("failed", job.trial, job.attempt, {}, "Traceback ...\nValueError: no", 0.1))
    loop(store, executor, {"random": 2})[0].run()
    assert {t.state for t in store.trials()} == {"failed"}
    assert all("ValueError: no" in (t.error or "") for t in store.trials())


def test_a_lost_trial_starts_again_and_is_given_up_after_a_while(store: Store) -> None:
    executor = Script(lambda job: Event("lost", job.trial, job.attempt, {}, "the worker was killed by SIGKILL", 0.1))
    _loop, silent = loop(store, executor, {"random": 1})
    _loop.run()
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert trial.attempts == MAX_LOST
    assert "SIGKILL" in (trial.error or "")
    assert len([m for m in silent.messages if "starts again" in m]) == MAX_LOST - 1
    assert silent.lost == [trial.trial] * MAX_LOST


def test_a_late_answer_of_an_earlier_attempt_is_dropped(store: Store) -> None:
    def answer(job: Job) -> Event | list[Event]:
        if job.attempt == 1:
            return Event("lost", job.trial, 1, {}, "gone", 0.1)
        late = done(Job(job.trial, 1, {}), 0.1)
        return [late, done(job, 0.9), done(job, 0.2)]

    loop(store, Script(answer), {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.metrics["val_accuracy"] == 0.9
    assert trial.attempts == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_an_objective_without_a_finite_value_is_a_failed_trial(store: Store, value: float | None) -> None:
    loop(store, Script(lambda job: done(job, value)), {"random": 1})[0].run()  # type: ignore[arg-type]
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert "val_accuracy" in (trial.error or "")


def test_an_exhausted_space_ends_its_searcher_with_a_word(store: Store) -> None:
    running, silent = loop(
        store, Script(done), {"random": 9}, widths=[8], densities=[1.0, 0.5], patterns=["unstructured"]
    )
    running.run()
    assert len(store.trials()) == 2
    assert any("random stops after 2 of 9" in message for message in silent.messages)


def test_a_stopped_loop_is_continued_by_a_new_one_without_repeating_anything(tmp_path: Path) -> None:
    with Store.create(tmp_path / "run.db") as store:
        executor = Script(
            lambda job: None if job is executor.waiting[-1] and len(executor.waiting) > 1 else done(job), 2
        )
        steps = iter([False, False, False, True])
        loop(store, executor, {"random": 4, "nsga2": 4})[0].run(stop=lambda: next(steps))
        before = store.trials()
        assert any(t.state == "running" for t in before)  # in flight when the driver died
    with Store.open(tmp_path / "run.db") as store:
        executor = Script(lambda job: done(job, job.trial), capacity=2)
        loop(store, executor, {"random": 4, "nsga2": 4})[0].run()
        after = {t.trial: t for t in store.trials()}
        assert len(after) == 8
        assert {t.state for t in after.values()} == {"complete"}
        finished = [t for t in before if t.state == "complete"]
        assert finished
        assert all(after[t.trial] == t for t in finished)
        assert not {job.trial for job in executor.jobs} & {t.trial for t in finished}


def test_a_folder_that_cannot_be_written_stops_the_run_and_keeps_the_trial_open(store: Store) -> None:
    failure = {"type": "nas.errors.RunError", "message": "no space left on device"}
    running, _ = loop(
        store, Script(lambda job: Event("failed", job.trial, job.attempt, failure, "...", 0.1)), {"random": 3}
    )
    with pytest.raises(RunError, match="no space left"):
        running.run()
    assert [t.state for t in store.trials()] == ["running"]


class Cluster(Script):
    """Holds nothing while it has no workers; its capacity at each look is what the test says."""

    def __init__(self, answer: Any, capacities: list[int]) -> None:
        super().__init__(answer, capacities[0])
        self.capacities = capacities[1:]

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if self.capacities:
            self.capacity = self.capacities.pop(0)
        return super().poll(timeout_s)


def test_a_loop_without_workers_waits_says_so_once_and_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("nas.loop.time.sleep", slept.append)
    running, silent = loop(store, Cluster(done, [0, 0, 0, 2, 2]), {"random": 4})
    running.run()
    assert [t.state for t in store.trials()] == ["complete"] * 4
    assert len(slept) == 3
    assert all(0.4 < s <= 0.5 for s in slept)
    assert len([m for m in silent.messages if "no worker" in m and "nas worker" in m]) == 1
    assert silent.seen[0] == (0, 0)
    assert (2, 2) in silent.seen


def test_capacity_below_what_is_held_neither_ends_nor_overfills(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.loop.time.sleep", lambda s: None)
    looks: list[tuple[int, int]] = []

    def answer(job: Job) -> Event | None:
        return None if len(looks) < 6 else done(job)

    class Shrinking(Cluster):
        def submit(self, job: Job) -> None:
            assert len(self.waiting) < self.capacity
            super().submit(job)

        def poll(self, timeout_s: float = 0.0) -> list[Event]:
            looks.append((len(self.waiting), self.capacity))
            return super().poll(timeout_s)

    running, silent = loop(store, Shrinking(answer, [3, 3, 1, 0, 0, 0, 0, 1, 0, 1]), {"random": 6})
    running.run()
    assert [t.state for t in store.trials()] == ["complete"] * 6
    assert (3, 0) in looks
    assert (0, 0) in looks
    assert len([m for m in silent.messages if "no worker" in m]) == 2


def test_losses_that_say_nothing_of_the_trial_have_a_limit_of_their_own(store: Store) -> None:
    def answer(job: Job) -> Event:
        blameless = {"blameless": True} if job.attempt % 2 else {}
        if job.attempt in (2, 4) or (job.attempt % 2 and job.attempt < 12):
            return Event("lost", job.trial, job.attempt, blameless, "the node left", 0.1)
        return done(job)

    loop(store, Script(answer), {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.state == "complete"
    assert trial.attempts == 6  # lost twice by itself, three times blameless


def test_blameless_losses_do_not_go_on_for_ever(store: Store) -> None:
    gone = Script(lambda job: Event("lost", job.trial, job.attempt, {"blameless": True}, "the node left", 0.1))
    loop(store, gone, {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert trial.attempts == MAX_BLAMELESS
    assert f"{MAX_BLAMELESS} times" in (trial.error or "")
