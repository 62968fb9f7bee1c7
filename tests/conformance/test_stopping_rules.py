"""Laws of every stopping rule, and each against a slow twin that is written from its definition."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest

from nas.config import StoppingSection
from nas.stopping import RULES, StoppingRule, make_rule
from nas.stopping.asha import Asha
from nas.stopping.median import MedianRule
from nas.stopping.pbt import FACTORS, SETTINGS, PopulationBased

EPOCHS = 12
Reports = dict[int, dict[int, float]]
"""trial -> epoch -> value"""


def make(name: str, **options: float) -> StoppingRule:
    rule = make_rule(StoppingSection(rule=name, **options), EPOCHS, 0)  # type: ignore[arg-type]
    assert rule is not None
    return rule


def table(seed: int, trials: int = 30, *, ties: bool = True, broken: bool = True) -> Reports:
    """Learning curves that rise, wobble, tie now and then, and sometimes are no numbers."""
    draw = random.Random(seed)
    found: Reports = {}
    for trial in range(trials):
        top, speed = draw.random(), draw.uniform(1, 6)
        curve = {e: top * (1 - math.exp(-e / speed)) + draw.gauss(0, 0.05) for e in range(1, EPOCHS + 1)}
        if ties and trial % 3 == 0:
            curve = {e: round(v, 1) for e, v in curve.items()}
        if broken and trial % 11 == 5:
            curve |= dict.fromkeys(range(draw.randint(1, 9), EPOCHS + 1), math.nan)
        found[trial] = curve
    return found


def replay(rule: StoppingRule, curves: Reports, order: list[int]) -> tuple[set[int], Reports]:
    """Train the trials in an order that interleaves them at random; returns who was stopped, and all that was reported."""
    rungs = rule.rungs(EPOCHS)
    draw = random.Random(str(order))
    waiting, under_way, stopped, reported = list(order), dict[int, int](), set[int](), Reports()
    while waiting or under_way:
        if waiting and (len(under_way) < 4):
            under_way[waiting.pop(0)] = 0
        trial = draw.choice(sorted(under_way))
        epoch = under_way[trial] + 1
        under_way[trial] = epoch
        rule.report(trial, epoch, curves[trial][epoch])
        reported.setdefault(trial, {})[epoch] = curves[trial][epoch]
        if epoch == EPOCHS or (epoch in rungs and rule.decide(trial, epoch).stop):
            if epoch < EPOCHS:
                stopped.add(trial)
            del under_way[trial]
    return stopped, reported


def worst_is_low(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def slow_asha(reports: Reports, trial: int, epoch: int, *, reduction: float, startup: int) -> bool:
    """Sort the rung, count, cut."""
    values = sorted((worst_is_low(c[epoch]) for c in reports.values() if epoch in c), reverse=True)
    if len(values) - 1 < startup:
        return False
    keep = max(1, math.floor(len(values) / reduction))
    return worst_is_low(reports[trial][epoch]) < values[keep - 1]


def slow_median(reports: Reports, trial: int, epoch: int, *, first: int, startup: int) -> bool:
    """Golovin et al.: best so far, strictly below the median of the others' running averages."""
    averages = [
        statistics.fmean(worst_is_low(v) for e, v in curve.items() if first <= e <= epoch)
        for other, curve in reports.items()
        if other != trial and epoch in curve
    ]
    if len(averages) < startup:
        return False
    best = max(worst_is_low(v) for e, v in reports[trial].items() if first <= e <= epoch)
    return best < statistics.median(averages)


def check_against_twin(rule: StoppingRule, twin: Callable[[Reports, int, int], bool], seed: int) -> int:
    """Replay a table, asking the twin at every decision; returns how many were stopped."""
    reported: Reports = {}
    decisions = 0

    class Watched(StoppingRule):
        def rungs(self, epochs: int) -> list[int]:
            return rule.rungs(epochs)

        def report(self, trial: int, epoch: int, value: float) -> None:
            reported.setdefault(trial, {})[epoch] = value
            rule.report(trial, epoch, value)

        def decide(self, trial: int, epoch: int):
            nonlocal decisions
            decision = rule.decide(trial, epoch)
            assert decision.stop == twin(reported, trial, epoch), (trial, epoch)
            assert bool(decision.reason) == decision.stop
            decisions += 1
            return decision

    curves = table(seed)
    order = list(curves)
    random.Random(seed).shuffle(order)
    stopped, _ = replay(Watched(min_epochs=1, startup=1), curves, order)
    assert decisions >= len(curves)
    return len(stopped)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("reduction", "startup", "min_epochs"), [(3.0, 4, 1), (2.0, 1, 2), (1.5, 6, 1), (4.0, 2, 3)])
def test_asha_stops_exactly_those_its_slow_twin_stops(
    seed: int, reduction: float, startup: int, min_epochs: int
) -> None:
    rule = Asha(min_epochs=min_epochs, reduction=reduction, startup=startup)
    assert check_against_twin(rule, lambda *at: slow_asha(*at, reduction=reduction, startup=startup), seed) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("interval", "startup", "min_epochs"), [(1, 4, 1), (3, 1, 2), (2, 5, 3)])
def test_the_median_rule_stops_exactly_those_its_slow_twin_stops(
    seed: int, interval: int, startup: int, min_epochs: int
) -> None:
    rule = MedianRule(min_epochs=min_epochs, interval=interval, startup=startup)
    assert check_against_twin(rule, lambda *at: slow_median(*at, first=min_epochs, startup=startup), seed) > 0


@pytest.mark.parametrize("name", RULES)
def test_rungs_ascend_below_the_budget_from_the_first_judged_epoch(name: str) -> None:
    for epochs, min_epochs, reduction, interval in itertools.product((2, 5, 81, 200), (1, 3), (1.05, 1.5, 3.0), (1, 7)):
        if min_epochs < epochs:
            section = StoppingSection(
                rule=name,  # type: ignore[arg-type]
                **{"min_epochs": min_epochs, "reduction": reduction, "interval": interval},  # type: ignore[arg-type]
            )
            rule = make_rule(section, epochs, 0)
            assert rule is not None
            rungs = rule.rungs(epochs)
            assert rungs[0] == min_epochs
            assert rungs == sorted(set(rungs))
            assert rungs[-1] < epochs


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_reports_does_not_matter(name: str, seed: int) -> None:
    reports = [(t, e, v) for t, curve in table(seed).items() for e, v in curve.items()]
    first, second = make(name), make(name)
    for trial, epoch, value in reports:
        first.report(trial, epoch, value)
    random.Random(seed).shuffle(reports)
    for trial, epoch, value in [*reports, *reports[:50]]:  # told twice counts once
        second.report(trial, epoch, value)
    for trial in range(30):
        for rung in first.rungs(EPOCHS):
            assert first.decide(trial, rung) == second.decide(trial, rung)


@pytest.mark.parametrize("name", RULES)
def test_deciding_changes_nothing(name: str) -> None:
    rule = make(name)
    for trial, curve in table(1).items():
        for epoch, value in curve.items():
            rule.report(trial, epoch, value)
    once = [rule.decide(trial, rung) for trial in range(30) for rung in rule.rungs(EPOCHS)]
    assert once == [rule.decide(trial, rung) for trial in range(30) for rung in rule.rungs(EPOCHS)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_the_best_so_far_goes_on_unchanged(name: str, seed: int) -> None:
    rule = make(name, startup=1)
    best: dict[int, float] = {}
    judged = 0
    for trial, curve in table(seed).items():
        top = -math.inf
        for epoch in range(1, EPOCHS):
            top = max(top, worst_is_low(curve[epoch]))  # curves that never fall: best at the rung is best so far
            rule.report(trial, epoch, top)
            best[epoch] = max(best.get(epoch, -math.inf), top)
            if epoch in rule.rungs(EPOCHS) and top == best[epoch]:
                judged += 1
                decision = rule.decide(trial, epoch)
                assert not decision.stop
                assert decision.settings is None
    assert judged > 5


@pytest.mark.parametrize("name", RULES)
def test_nothing_happens_before_startup_results_of_others(name: str) -> None:
    for startup in (1, 4, 7):
        rule = make(name, startup=startup)
        for trial in range(startup):
            rule.report(trial, 1, 1.0 - trial / 10)
            assert rule.decide(trial, 1) == rule.decide(0, 1), "no result is judged before there are enough"
            assert not rule.decide(trial, 1).stop
        for trial in range(startup, startup + 8):
            rule.report(trial, 1, -1.0 - trial)
        decision = rule.decide(startup + 7, 1)
        assert decision.stop or decision.settings


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_worse_than_any_number(name: str, broken: float) -> None:
    rule = make(name, startup=2)
    for trial in range(11):
        rule.report(trial, 1, -100.0 + trial)
    rule.report(11, 1, broken)
    decision = rule.decide(11, 1)
    assert decision.stop or decision.settings
    assert not rule.decide(10, 1).stop


@pytest.mark.parametrize("name", RULES)
def test_values_before_the_first_judged_epoch_are_not_used(name: str) -> None:
    with_them, without = make(name, min_epochs=3, startup=2), make(name, min_epochs=3, startup=2)
    for trial, curve in table(2, broken=False).items():
        for epoch, value in curve.items():
            with_them.report(trial, epoch, 100.0 * (-1) ** trial if epoch < 3 else value)
            if epoch >= 3:
                without.report(trial, epoch, value)
    for trial in range(30):
        for rung in with_them.rungs(EPOCHS):
            assert with_them.decide(trial, rung) == without.decide(trial, rung)


@pytest.mark.parametrize("name", RULES)
def test_a_decision_without_a_report_is_refused(name: str) -> None:
    rule = make(name)
    rule.report(0, 1, 0.5)
    with pytest.raises(ValueError, match="expected a report of trial 1"):
        rule.decide(1, 1)


def test_pbt_never_stops_and_takes_over_from_the_best_quarter() -> None:
    rule = PopulationBased(startup=4, seed=3)
    for trial in range(20):
        rule.introduce(trial, f"digest {trial % 19}", {"lr": 2.0 + trial, "weight_decay": 1.0})
        rule.report(trial, 1, trial / 20)
    for trial in range(20):
        decision = rule.decide(trial, 1)
        assert not decision.stop
        if trial >= 5:
            assert decision.settings is None
            continue
        assert decision.settings is not None
        assert set(decision.settings) == set(SETTINGS)
        donors = [d for d in range(15, 20) if decision.settings["lr"] / (2.0 + d) in FACTORS]
        assert donors, "expected the settings of one of the best five, times 0.8 or 1.2"
        assert decision.settings["weight_decay"] in FACTORS
        assert decision.donor in (None, 19)


def test_pbt_takes_weights_over_only_from_an_equal_network() -> None:
    given = set()
    for seed in range(40):
        rule = PopulationBased(startup=1, seed=seed)
        for trial in range(8):
            rule.introduce(trial, "same" if trial in (0, 7) else f"other {trial}", {})
            rule.report(trial, 1, trial / 8)
        given.add(rule.decide(0, 1).donor)
        assert rule.decide(1, 1).donor is None
    assert given == {None, 7}


def test_pbt_draws_by_its_seed() -> None:
    def settings(seed: int) -> list[object]:
        rule = PopulationBased(startup=1, seed=seed)
        for trial in range(40):
            rule.report(trial, 1, trial / 8)
        return [rule.decide(trial, 1) for trial in range(10)]

    assert settings(0) == settings(0)
    assert settings(0) != settings(1)


def test_no_rule_is_no_rule_and_one_that_never_judges_is_refused() -> None:
    assert make_rule(StoppingSection(), EPOCHS, 0) is None
    with pytest.raises(ValueError, match="min_epochs"):
        make_rule(StoppingSection(rule="asha", min_epochs=12), EPOCHS, 0)
