"""Whole simulated searches: through the real loop and store, the same every time, each trial once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nas.config import StoppingSection
from nas.errors import ConfigError, RunError
from nas.simulate import Faults, Group, Simulation, SyntheticTable, decisions_space, simulate
from nas.stopping import make_rule
from nas.store import Store

SPACE = decisions_space(8, 3)
TIMELESS = [  # the real moments are of this machine
    "trial",
    "state",
    "searcher",
    "digest",
    "val_accuracy",
    "latency_ms",
    "duration_s",
    "attempts",
    "start_s",
    "end_s",
    "busy_s",
    "epochs_trained",
]


def search(trials: int = 40, workers: Any = 4, searchers: Any = ("random",), **more: Any) -> Simulation:
    table = SyntheticTable(SPACE, spread=more.pop("spread", 0.3), epochs=more.pop("epochs", 9))
    return simulate(SPACE, table, searchers, trials, workers, **more)


def test_the_same_seed_gives_the_same_history_and_another_does_not() -> None:
    everything = {"searchers": ["random", "nsga2"], "faults": Faults(0.2, 3.0, 0.2, 0.1)}
    one, two = search(**everything), search(**everything)
    pd.testing.assert_frame_equal(one.frame[TIMELESS], two.frame[TIMELESS])
    assert one.stays == two.stays
    assert search(**everything, seed=1).stays != one.stays


def test_every_trial_is_there_once_whatever_is_lost() -> None:
    found = search(60, faults=Faults(lost=0.15), workers=[Group(3, leaves_s=60.0), Group(2), Group(4, joins_s=30.0)])
    assert found.frame["trial"].tolist() == list(range(60))
    assert found.frame["digest"].nunique() == 60
    assert (found.frame["attempts"] > 1).any()
    done = [stay.trial for stay in found.stays if stay.ending == "done"]
    assert sorted(done) == found.frame["trial"][found.frame["state"] == "complete"].tolist()
    assert 0 < found.utilisation <= 1
    assert found.epochs_trained == 9 * len(done) + sum(s.epochs for s in found.stays if s.ending == "lost")


def test_a_trial_that_is_lost_too_often_is_a_failed_row() -> None:
    found = search(6, faults=Faults(lost=1.0))
    assert found.frame["state"].eq("failed").all()
    assert found.frame["attempts"].eq(3).all()


def test_what_a_trial_gives_does_not_depend_on_the_workers() -> None:
    columns = ["digest", "val_accuracy", "latency_ms", "duration_s"]
    one, many = search(workers=1), search(workers=13, faults=Faults(stragglers=0.3))
    pd.testing.assert_frame_equal(one.frame[columns[:3]], many.frame[columns[:3]])
    pd.testing.assert_frame_equal(one.frame[columns], search(workers=7).frame[columns])
    assert one.utilisation == 1.0
    assert one.makespan_s == pytest.approx(one.frame["duration_s"].sum())


def test_a_file_keeps_what_the_frame_shows(tmp_path: Path) -> None:
    found = search(10, store=tmp_path / "run.db")
    with Store.open(tmp_path / "run.db", read_only=True) as store:
        assert [t.metrics["val_accuracy"] for t in store.trials()] == found.frame["val_accuracy"].tolist()
        assert len(store.curve(3)) == 9


def test_progress_over_virtual_time_ends_at_the_best_and_at_the_whole_volume() -> None:
    found = search()
    best = found.best_over_time()
    assert best["val_accuracy"].is_monotonic_increasing
    assert best["time_s"].is_monotonic_increasing
    assert best["val_accuracy"].iloc[-1] == found.frame["val_accuracy"].max()
    assert found.best_over_time("latency_ms")["latency_ms"].iloc[-1] == found.frame["latency_ms"].min()
    reference = (0.0, 10.0)
    volume = found.hypervolume_over_time(reference, points=7)
    assert len(volume) == 7
    assert volume["hypervolume"].is_monotonic_increasing
    assert volume["hypervolume"].iloc[-1] == pytest.approx(found.hypervolume(reference))
    assert volume["time_s"].iloc[-1] == found.makespan_s


def test_a_searcher_that_waits_for_results_searches_better_than_one_that_cannot() -> None:
    """With all trials pending at once nothing is learned: evolution is random search then, and better with one worker."""
    space = decisions_space(10, 4)
    gains = []
    for seed in range(4):
        table = SyntheticTable(space, noise=0.0, epochs=1)
        by_workers = {}
        for workers in (1, 200):
            options = {"regularized_evolution": {"population": 20, "tournament": 5}}
            run = simulate(space, table, ["regularized_evolution"], 200, workers, options=options, seed=seed)
            by_workers[workers] = run.frame["val_accuracy"].max()
        gains.append(by_workers[1] - by_workers[200])
    assert np.mean(gains) > 0.005


def test_running_out_of_workers_is_an_error_that_says_so() -> None:
    with pytest.raises(RunError, match=r"let (one|a group of workers) stay"):
        search(workers=[Group(2, leaves_s=20.0)])


def obvious_asha(durations: list[float], curves: list[list[float]], workers: int, rungs: list[int], keep: float) -> Any:
    """ASHA by scanning everything at every step: trial -> (epochs trained, end)."""
    epochs, fresh = len(curves[0]), list(range(len(curves)))
    paused: list[tuple[int, int]] = []
    running: dict[int, tuple[float, int]] = {}  # trial -> (end, until)
    reports: dict[int, dict[int, float]] = {rung: {} for rung in rungs}
    ended: dict[int, tuple[int, float]] = {}
    now = 0.0
    while True:
        while len(running) < workers and (paused or fresh):
            trial, done = paused.pop(0) if paused else (fresh.pop(0), 0)
            until = min(rung for rung in [*rungs, epochs] if rung > done)
            running[trial] = (now + durations[trial] * (until - done) / epochs, until)
        if not running:
            return ended
        trial = min(running, key=lambda t: running[t][0])
        now, until = running.pop(trial)
        if until == epochs:
            ended[trial] = (epochs, now)
            continue
        reports[until][trial] = own = curves[trial][until - 1]
        values = list(reports[until].values())
        better = sum(value > own for value in values)
        if len(values) <= 4 or better < max(1, math.floor(len(values) / keep)):
            paused.append((trial, until))
        else:
            ended[trial] = (until, now)


@pytest.mark.parametrize("workers", [1, 5])
def test_asha_does_what_a_slow_obvious_simulation_does(workers: int) -> None:
    rule = make_rule(StoppingSection("asha", min_epochs=1, reduction=3.0), 9, 0)
    found = search(50, workers, stopping=rule)
    table = SyntheticTable(SPACE, spread=0.3)
    whole = search(50, 50)  # the same proposals, all trained to the end
    assert whole.frame["digest"].tolist() == found.frame["digest"].tolist()
    durations = whole.frame["duration_s"].tolist()
    curves = []
    for row in found.frame.to_dict("records"):
        architecture = SPACE.architecture({f"d{i}": row[f"arch.d{i}"] for i in range(8)})
        curves.append([r["val_accuracy"] for r in table.result(architecture, 0).curve])
    expected = obvious_asha(durations, curves, workers, [1, 3], 3.0)
    assert found.frame["epochs_trained"].tolist() == [expected[n][0] for n in range(50)]
    assert found.frame["end_s"].tolist() == pytest.approx([expected[n][1] for n in range(50)], abs=1e-6)
    states = ["complete" if expected[n][0] == 9 else "stopped" for n in range(50)]
    assert found.frame["state"].tolist() == states
    assert 5 < states.count("stopped") < 45


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"trials": 0}, "at least one searcher and one trial, got 1 searchers and 0 trials"),
        ({"trials": -3}, "-3 trials"),
        ({"searchers": []}, "got 0 searchers"),
        ({"searchers": "darts"}, "searcher darts trains a supernet"),
    ],
)
def test_a_plan_that_cannot_be_simulated_is_refused(wrong: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        search(**wrong)


def test_a_searcher_may_be_given_by_its_name_alone_and_a_metric_must_be_there() -> None:
    found = search(3, searchers="random")
    assert set(found.frame["searcher"]) == {"random"}
    with pytest.raises(ConfigError, match="expected a metric of this simulation, got 'speed'"):
        found.best_over_time("speed")
    with pytest.raises(ConfigError, match="spread = nan"):
        SyntheticTable(SPACE, spread=math.nan)
