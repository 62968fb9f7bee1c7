"""Trainings in segments: the search loop with stopping rules and an evaluator that has nothing but learning curves."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nas.executors.base import Event, Job
from nas.loop import SearchLoop
from nas.searchers import make_searcher
from nas.searchers.base import Avoid, Proposal, Searcher, TrialLike
from nas.stopping import StoppingRule
from nas.stopping.asha import Asha
from nas.stopping.base import GO_ON, Decision
from nas.stopping.median import MedianRule
from nas.stopping.pbt import PopulationBased
from nas.store import Store, Trial
from search_spaces import get_space
from tests.nas.test_loop import Silent

EPOCHS = 9
OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}


def value(architecture: str, epoch: int) -> float:
    """A curve per architecture: rises to its top at its own speed, with noise, always the same."""
    draw = random.Random(architecture)
    top, speed = draw.random(), draw.uniform(1, 4)
    return top * (1 - math.exp(-epoch / speed)) + random.Random(f"{architecture} {epoch}").gauss(0, 0.02)


class Trainer:
    """An executor that trains nothing, in segments as the real evaluation does: what was trained stays in its `checkpoints`.

    Args:
        capacity: jobs at a time.
        checkpoints: trial -> epochs trained; give that of a dead driver to a new one.
        latency: of every network.
        density: trial, epoch -> what the row says.
    """

    def __init__(
        self,
        capacity: int = 2,
        *,
        checkpoints: dict[int, int] | None = None,
        latency: Any = lambda trial: 1.0,
        density: Any = lambda trial, epoch: 0.5,
        final_density: float = 0.5,
    ) -> None:
        self.capacity = capacity
        self.checkpoints: dict[int, int] = {} if checkpoints is None else checkpoints
        self.latency, self.density, self.final_density = latency, density, final_density
        self.jobs: list[Job] = []
        self.held: list[Job] = []
        self.epochs_trained = 0

    def submit(self, job: Job) -> None:
        assert len(self.held) < self.capacity
        assert job.trial not in [held.trial for held in self.held]
        self.jobs.append(job)
        self.held.append(job)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if not self.held:
            return []
        return [self.train(self.held.pop(len(self.jobs) % len(self.held)))]

    def train(self, job: Job) -> Event:
        until = job.payload.get("until", EPOCHS)
        assert job.payload.get("until") is None or until < EPOCHS
        self.epochs_trained += max(0, until - self.checkpoints.get(job.trial, 0))
        self.checkpoints[job.trial] = max(until, self.checkpoints.get(job.trial, 0))
        rows = [
            {
                "epoch": epoch,
                "val_accuracy": value(job.payload["architecture"], epoch),
                "density": self.density(job.trial, epoch),
            }
            for epoch in range(1, until + 1)
        ]
        metrics = {
            "val_accuracy": rows[-1]["val_accuracy"],
            "latency_ms": self.latency(job.trial),
            "density": self.final_density,
        }
        state = "paused" if until < EPOCHS else "complete"
        answer = {"state": state, "metrics": metrics, "violations": {}, "curve": rows}
        return Event("done", job.trial, job.attempt, answer, None, float(until))


class Fixed(Searcher):
    """Random search's proposals under another name, with notes."""

    name = "fixed"
    note: Mapping[str, Any] = MappingProxyType({})

    def propose(self, history: Sequence[TrialLike], index: int, avoid: Avoid = lambda digest: False) -> Proposal:
        return Proposal(self.draw_random(index, avoid), dict(self.note), seed=index)


class Watched(StoppingRule):
    """Passes everything on to another rule and remembers it; without one, stops nothing."""

    def __init__(self, rule: StoppingRule | None = None) -> None:
        super().__init__(min_epochs=1, startup=1)
        self.rule = rule
        self.reports: dict[tuple[int, int], float] = {}
        self.decided: list[tuple[int, int]] = []
        self.stopped: set[int] = set()

    def rungs(self, epochs: int) -> list[int]:
        return self.rule.rungs(epochs) if self.rule else [1, 3]

    def introduce(self, trial: int, digest: str, settings: Any) -> None:
        if self.rule:
            self.rule.introduce(trial, digest, settings)

    def report(self, trial: int, epoch: int, value: float) -> None:
        self.reports.setdefault((trial, epoch), value)
        if self.rule:
            self.rule.report(trial, epoch, value)

    def decide(self, trial: int, epoch: int) -> Decision:
        self.decided.append((trial, epoch))
        decision = self.rule.decide(trial, epoch) if self.rule else GO_ON
        if decision.stop:
            self.stopped.add(trial)
        return decision


def make_loop(
    store: Store,
    executor: Any,
    rule: StoppingRule | None,
    totals: dict[str, int],
    made: dict[str, Searcher] | None = None,
    **more: Any,
) -> tuple[SearchLoop, Silent]:
    space = get_space("mlp", input_shape=(8,), classes=3)
    searchers = {name: make_searcher(name, space, OBJECTIVES) for name in totals if name not in (made or {})}
    silent = Silent()
    loop = SearchLoop(
        store,
        searchers | (made or {}),
        totals,
        executor,
        objectives=OBJECTIVES,
        seed=0,
        epochs=EPOCHS,
        progress=silent,
        stopping=rule,
        **more,
    )
    return loop, silent


@pytest.fixture
def store(tmp_path: Path) -> Iterable[Store]:
    with Store.create(tmp_path / "run.db") as made:
        yield made


def test_stopped_trials_are_those_the_rule_stops_with_the_values_of_their_last_epoch(store: Store) -> None:
    executor, rule = Trainer(), Watched(Asha(startup=3))
    make_loop(store, executor, rule, {"random": 30})[0].run()
    trials = store.trials()
    assert {t.trial for t in trials if t.state == "stopped"} == rule.stopped != set()
    assert Counter(t.state for t in trials)["complete"] == 30 - len(rule.stopped)
    for trial in trials:
        curve = store.curve(trial.trial)
        if trial.state == "stopped":
            assert curve[-1]["epoch"] == trial.metrics["trained_epochs"] in (1, 3)
            assert curve[-1]["val_accuracy"] == trial.metrics["val_accuracy"]
            assert "asha: val_accuracy" in str(trial.metrics["stopped_because"])
            assert trial.error is None
        else:
            assert [row["epoch"] for row in curve] == list(range(1, EPOCHS + 1))
    assert executor.epochs_trained < 30 * EPOCHS / 2


def test_a_trial_goes_on_before_anything_new_in_the_same_attempt(store: Store) -> None:
    executor = Trainer(capacity=1)
    make_loop(store, executor, Watched(), {"random": 3})[0].run()
    assert [(j.trial, j.attempt, j.payload.get("until")) for j in executor.jobs] == [
        (trial, 1, until) for trial in range(3) for until in (1, 3, None)
    ]
    assert all(j.needs == (f"checkpoints/{j.trial:05d}",) for j in executor.jobs)
    assert [t.duration_s for t in store.trials()] == [1.0 + 3.0 + 9.0] * 3


def test_a_rule_is_told_every_epoch_once_and_nothing_but_accuracy(store: Store) -> None:
    rule = Watched()
    make_loop(store, Trainer(), rule, {"random": 4})[0].run()
    for trial in store.trials():
        text = trial.architecture.to_json()
        assert {e: v for (t, e), v in rule.reports.items() if t == trial.trial} == {
            e: value(text, e) for e in range(1, EPOCHS + 1)
        }
    assert sorted(rule.decided) == [(t, e) for t in range(4) for e in (1, 3)]


def test_costs_decide_nothing(tmp_path: Path) -> None:
    stopped = []
    for name, latency in (("a", lambda t: 1.0), ("b", lambda t: [1e-9, 1e12, math.nan][t % 3])):
        with Store.create(tmp_path / f"{name}.db") as store:
            make_loop(store, Trainer(latency=latency), Asha(startup=2), {"random": 20})[0].run()
            stopped.append([t.trial for t in store.trials() if t.state == "stopped"])
    assert stopped[0] == stopped[1] != []


@pytest.mark.parametrize("kind", ["dense", "random/control", "replicate"])
def test_comparisons_are_trained_to_the_end_and_the_rule_hears_nothing_of_them(store: Store, kind: str) -> None:
    space = get_space("mlp", input_shape=(8,), classes=3)
    compared = Fixed(space, OBJECTIVES, 7)
    compared.note = {"replicate": 0} if kind == "replicate" else {}
    name = "darts" if kind == "replicate" else kind
    rule = Watched(Asha(startup=1))
    executor = Trainer()
    make_loop(store, executor, rule, {"random": 12, name: 12}, {name: compared})[0].run()
    mine = {t.trial for t in store.trials(name)}
    assert {t.state for t in store.trials(name)} == {"complete"}
    assert not mine & {trial for trial, _ in rule.reports}
    assert all("until" not in job.payload for job in executor.jobs if job.trial in mine)
    assert rule.stopped


def test_a_copy_of_a_stopped_trial_is_stopped_with_its_values(store: Store) -> None:
    done: list[Trial] = []
    made = make_loop(store, Trainer(), Asha(startup=2), {"random": 16, "nsga2": 16}, on_finished=done.append)
    made[0].run()
    trials = {t.trial: t for t in store.trials()}
    copies = [t for t in trials.values() if t.copy_of is not None and trials[t.copy_of].state == "stopped"]
    assert copies
    for copy in copies:
        assert copy.state == "stopped"
        assert copy.metrics == trials[copy.copy_of].metrics  # type: ignore[index]
    assert sorted(t.trial for t in done) == sorted(trials)
    assert all(t == trials[t.trial] for t in done)


@pytest.mark.parametrize("rule", [lambda: Asha(startup=2), lambda: MedianRule(startup=2, interval=2), PopulationBased])
def test_a_killed_loop_and_a_new_one_leave_every_trial_once_and_none_open(tmp_path: Path, rule: Any) -> None:
    checkpoints: dict[int, int] = {}
    totals = {"random": 12, "nsga2": 12}
    Store.create(tmp_path / "run.db").close()
    kills = random.Random(0)
    before: dict[int, Trial] = {}
    lives = 0
    while len(before) < 24 and lives < 40:
        lives += 1
        with Store.open(tmp_path / "run.db") as store:
            executor = Trainer(capacity=3, checkpoints=checkpoints)
            steps = iter(range(kills.randint(1, 12)))
            make_loop(store, executor, rule(), totals)[0].run(stop=lambda: next(steps, None) is None)  # noqa: B023
            trials = {t.trial: t for t in store.trials()}
            assert all(trials[n] == t for n, t in before.items()), "a finished trial changed"
            assert not {j.trial for j in executor.jobs} & set(before), "a finished trial was run again"
            before = {n: t for n, t in trials.items() if t.finished}
    assert lives > 3, "expected some kills on the way"
    assert Counter(t.searcher for t in trials.values()) == totals
    assert len(trials) == len(before) == 24


def test_a_restarted_loop_has_a_rule_that_knows_what_the_last_one_knew(tmp_path: Path) -> None:
    first, second = Watched(Asha(startup=2)), Watched(Asha(startup=2))
    checkpoints: dict[int, int] = {}
    Store.create(tmp_path / "run.db").close()
    with Store.open(tmp_path / "run.db") as store:
        steps = iter(range(30))
        make_loop(store, Trainer(3, checkpoints=checkpoints), first, {"random": 24})[0].run(
            stop=lambda: next(steps, None) is None
        )
        open_trials = {t.trial for t in store.trials() if not t.finished}
        assert any("trained_epochs" in store.trial(t).metrics for t in open_trials)
    with Store.open(tmp_path / "run.db") as store:
        make_loop(store, Trainer(3, checkpoints=checkpoints), second, {"random": 24})[0].run(stop=lambda: True)
        passed = {t: len(store.curve(t)) for t in open_trials}
    assert max(passed.values()) == 3, "expected an open trial with more than one rung behind it"
    assert second.reports == first.reports != {}


def test_a_trial_that_passed_a_rung_is_not_judged_there_again_after_a_restart(tmp_path: Path) -> None:
    Store.create(tmp_path / "run.db").close()
    with Store.open(tmp_path / "run.db") as store:
        steps = iter(range(1))
        make_loop(store, Trainer(1), Watched(), {"random": 1})[0].run(stop=lambda: next(steps, None) is None)
    with Store.open(tmp_path / "run.db") as store:
        executor, rule = Trainer(1), Watched()
        make_loop(store, executor, rule, {"random": 1})[0].run()
        assert [(j.attempt, j.payload.get("until")) for j in executor.jobs] == [(2, 3), (2, None)]
        assert rule.decided == [(0, 3)]
        assert store.trial(0).state == "complete"


def test_changed_settings_stay_with_a_trial_through_restarts_and_into_its_record(tmp_path: Path) -> None:
    class Once(Watched):
        def decide(self, trial: int, epoch: int) -> Decision:
            return Decision(settings={"lr": 0.8, "weight_decay": 1.2}, reason="changed") if epoch == 1 else GO_ON

    Store.create(tmp_path / "run.db").close()
    with Store.open(tmp_path / "run.db") as store:
        steps = iter(range(1))
        make_loop(store, Trainer(1), Once(), {"random": 1})[0].run(stop=lambda: next(steps, None) is None)
    with Store.open(tmp_path / "run.db") as store:
        executor = Trainer(1)
        make_loop(store, executor, Once(), {"random": 1})[0].run()
        assert [j.payload["settings"] for j in executor.jobs] == [{"lr": 0.8, "weight_decay": 1.2}] * 2
        metrics = store.trial(0).metrics
        assert (metrics["lr_factor"], metrics["weight_decay_factor"]) == (0.8, 1.2)


def test_a_donor_is_handed_over_once_and_only_while_it_has_a_checkpoint(store: Store) -> None:
    class Given(Watched):
        def decide(self, trial: int, epoch: int) -> Decision:
            return Decision(settings={"lr": 0.8}, donor=1 - trial) if (trial, epoch) in ((0, 1), (1, 3)) else GO_ON

    class InTurn(Trainer):
        def poll(self, timeout_s: float = 0.0) -> list[Event]:  # trial 0 first, whenever it is there
            self.held.sort(key=lambda job: job.trial)
            return [self.train(self.held.pop(0))] if self.held else []

    executor = InTurn(2)
    make_loop(store, executor, Given(), {"random": 2})[0].run()
    of_first = [j for j in executor.jobs if j.trial == 0]
    assert [j.payload.get("donor") for j in of_first] == [None, "checkpoints/00001", None]
    assert of_first[1].needs == ("checkpoints/00000", "checkpoints/00001")
    assert all("donor" not in j.payload for j in executor.jobs if j.trial == 1), "trial 0 was finished by then"


def test_a_row_that_is_denser_than_the_network_will_be_is_not_judged(store: Store) -> None:
    executor = Trainer(density=lambda trial, epoch: 0.9 if trial == 1 and epoch < 4 else 0.5)
    rule = Watched()
    make_loop(store, executor, rule, {"random": 3})[0].run()
    trials = store.trials()
    assert [t.state for t in trials] == ["complete", "failed", "complete"]
    error = trials[1].error or ""
    assert "density 0.5" in error
    assert "found 0.9 after epoch 1" in error
    assert "min_epochs" in error
    assert 1 not in {trial for trial, _ in rule.reports}


def test_a_half_dense_row_shows_at_the_end_too(store: Store) -> None:
    executor = Trainer(density=lambda trial, epoch: 0.9 if epoch < 4 else 0.5)
    told = executor.train

    def late(job: Job) -> Event:  # while it trains it does not know better than its masks of the moment
        event = told(job)
        event.payload["metrics"]["density"] = event.payload["curve"][-1]["density"]
        return event

    executor.train = late  # type: ignore[method-assign]
    make_loop(store, executor, Watched(), {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert "found 0.9 after epoch 1" in (trial.error or "")
    assert len(store.curve(0)) == EPOCHS


def test_a_training_that_pauses_unasked_is_a_failed_row(store: Store) -> None:
    class Rash(Trainer):
        def train(self, job: Job) -> Event:
            event = super().train(job)
            event.payload["state"] = "paused"
            return event

    make_loop(store, Rash(), None, {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert "paused" in (trial.error or "")


def test_the_curve_of_a_trial_that_fails_later_is_kept(store: Store) -> None:
    class Breaks(Trainer):
        def train(self, job: Job) -> Event:
            if "until" not in job.payload:
                return Event("failed", job.trial, job.attempt, {}, "Traceback ...\nValueError: no", 1.0)
            return super().train(job)

    make_loop(store, Breaks(), Watched(), {"random": 1})[0].run()
    (trial,) = store.trials()
    assert trial.state == "failed"
    assert [row["epoch"] for row in store.curve(0)] == [1, 2, 3]


def test_searchers_see_stopped_trials_as_known(store: Store) -> None:
    make_loop(store, Trainer(), Asha(startup=2), {"random": 12})[0].run()
    searcher = make_searcher("nsga2", get_space("mlp", input_shape=(8,), classes=3), OBJECTIVES)
    trials = store.trials()
    for trial, outcome in zip(trials, searcher.outcomes(trials), strict=True):
        assert outcome.kind == "known"
        assert outcome.costs == (-float(trial.metrics["val_accuracy"]), 1.0)  # type: ignore[arg-type]
    assert any(t.state == "stopped" for t in trials)
