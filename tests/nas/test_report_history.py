"""How a search went, against slow obvious twins and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nas.frames import trials_frame
from nas.report.history import (
    best_so_far,
    equal_budget,
    hypervolume_so_far,
    reference_box,
    relative_hypervolume,
    searcher_summary,
    searchers,
)
from nas.report.words import comparison, describe, headline, status
from tests.nas.synthetic_run import OBJECTIVES, make_trial, synthetic_run

ARCHITECTURE = synthetic_run(1, dense=0).trials[0].architecture


def made(points, searcher="random", first=0, state="complete"):
    """Trials with given (accuracy, latency)."""
    return [
        make_trial(first + i, searcher, i, state, ARCHITECTURE, val_accuracy=a, latency_ms=t)
        for i, (a, t) in enumerate(points)
    ]


@pytest.mark.parametrize(("metric", "direction"), [("val_accuracy", "max"), ("latency_ms", "min")])
def test_best_so_far_is_the_best_feasible_value_of_the_first_k(metric, direction):
    frame = synthetic_run(60, failed=0.2, infeasible=0.2).frame()
    for searcher in ("random", "nsga2"):
        rows = frame[frame["searcher"] == searcher]
        values = best_so_far(frame, searcher, metric, direction)
        assert len(values) == len(rows)
        for k in range(1, len(rows) + 1):
            feasible = rows.iloc[:k].query("state == 'complete'")[metric]
            expected = math.nan if feasible.empty else feasible.max() if direction == "max" else feasible.min()
            assert values[k - 1] == pytest.approx(expected, nan_ok=True)


def test_running_trials_are_not_finished():
    frame = synthetic_run(20, unfinished=6, dense=0).frame()
    assert sum(len(best_so_far(frame, name, "val_accuracy", "max")) for name in searchers(frame)) == 14


def test_relative_hypervolume_of_a_known_staircase():
    frame = trials_frame(made([(0.0, 4.0), (1.0, 4.0), (0.5, 2.0), (0.0, 0.0)]))
    box = reference_box(frame, OBJECTIVES)
    assert [list(corner) for corner in box] == [[0.0, 4.0], [1.0, 0.0]]
    assert relative_hypervolume(frame, OBJECTIVES, box) == pytest.approx(
        0.25
    )  # (0.5, 2.0) only: the others touch the edge


def test_a_point_that_is_best_in_everything_dominates_the_whole_box():
    frame = trials_frame(made([(1.0, 0.0), (0.2, 3.0)]))
    assert relative_hypervolume(frame, OBJECTIVES, reference_box(frame, OBJECTIVES)) == pytest.approx(1.0)


@pytest.mark.parametrize("points", [[], [(0.5, 1.0)], [(0.5, 1.0), (0.5, 2.0)]])
def test_without_a_box_there_is_no_hypervolume(points):
    frame = trials_frame(made(points))
    assert reference_box(frame, OBJECTIVES) is None
    assert math.isnan(relative_hypervolume(frame, OBJECTIVES, None))


def test_hypervolume_so_far_never_falls_and_ends_at_the_whole():
    frame = synthetic_run(80).frame()
    box = reference_box(frame, OBJECTIVES)
    steps, values = hypervolume_so_far(frame, "nsga2", OBJECTIVES, box, points=17)
    assert len(steps) == 17
    assert (steps[0], steps[-1]) == (1, 40)
    assert (np.diff(values) >= -1e-12).all()
    assert values[-1] == pytest.approx(relative_hypervolume(frame[frame["searcher"] == "nsga2"], OBJECTIVES, box))


def test_searchers_are_compared_at_the_budget_all_have_reached():
    frame = trials_frame(
        made([(0.5, 1.0), (0.9, 3.0), (0.99, 0.1)])
        + made([(0.6, 2.0), (0.8, 1.5)], "nsga2", 3)
        + made([(0.7, 1.0)], "dense", 5)
    )
    summary = searcher_summary(frame, OBJECTIVES).set_index("searcher")
    assert equal_budget(frame) == 2
    assert summary["trials"].to_dict() == {"random": 2, "nsga2": 2, "dense": 1}
    assert summary.loc["random", "best_val_accuracy"] == 0.9  # the third trial of random search is beyond the budget
    assert list(summary.index) == ["random", "nsga2", "dense"]


def test_failed_and_infeasible_trials_spend_budget():
    frame = trials_frame(
        made([(0.5, 1.0)], state="failed")
        + made([(0.9, 2.0), (0.4, 1.0)], "random", 1)
        + made([(0.6, 2.0)], "nsga2", 3)
    )
    summary = searcher_summary(frame, OBJECTIVES).set_index("searcher")
    assert summary.loc["random", ["trials", "complete", "failed"]].tolist() == [1, 0, 1]
    assert math.isnan(summary.loc["random", "best_val_accuracy"])


def test_the_summary_of_nothing_is_empty():
    assert searcher_summary(trials_frame([]), OBJECTIVES).empty


def test_the_comparison_makes_no_claim_from_one_seed():
    text = " ".join(comparison(synthetic_run(40).frame(), OBJECTIVES))
    assert "first 20 finished trials" in text
    assert "n = 1" in text
    assert "no claim" in text


def test_the_headline_names_the_best_networks_and_the_dense_one():
    def numbers(trials):
        return trials_frame(trials)

    dense = make_trial(2, "dense", 0, "complete", ARCHITECTURE, val_accuracy=0.9, latency_ms=4.0, density=1.0, nnz=1000)
    sparse = make_trial(
        0, "random", 0, "complete", ARCHITECTURE, val_accuracy=0.92, latency_ms=2.0, density=0.1, nnz=100
    )
    fast = make_trial(1, "nsga2", 0, "complete", ARCHITECTURE, val_accuracy=0.5, latency_ms=1.0, density=0.1, nnz=50)
    sentences = headline(numbers([sparse, fast, dense]), OBJECTIVES)
    assert sentences[0].startswith("Best validation accuracy: trial 0 (random): validation accuracy 0.9200")
    assert sentences[1].startswith("Best latency (ms): trial 1 (nsga2)")
    assert "trial 0: latency 2.0 times lower" in sentences[2]
    unbeaten = headline(numbers([fast, dense]), OBJECTIVES)
    assert unbeaten[-1].endswith("No sparse network of this run reaches its validation accuracy.")


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (synthetic_run(0, dense=0), "No trial has been proposed yet."),
        (synthetic_run(5, failed=1, dense=0), "All 5 trials failed; their tracebacks are below."),
        (synthetic_run(5, failed=0, infeasible=1, dense=0), "5 broke a constraint"),
        (synthetic_run(5, unfinished=5, dense=0), "No trial is complete yet."),
    ],
)
def test_the_headline_says_why_there_is_nothing(run, says):
    assert says in headline(run.frame(), OBJECTIVES)[0]


def test_the_status_tells_a_running_search_from_a_finished_one():
    frame = synthetic_run(20, unfinished=6, dense=0).frame()
    assert "not finished: 14 trials (" in status(frame, {"random": 15, "nsga2": 15}, False)
    assert ") of 30 are done, 3 running" in status(frame, {"random": 15, "nsga2": 15}, False)
    assert status(synthetic_run(4, dense=0, failed=0, infeasible=0).frame(), {}, True).startswith(
        "The search is finished: 4 trials"
    )


def test_describing_a_trial_without_numbers_is_no_error():
    assert describe(synthetic_run(3, failed=1, dense=0).frame().iloc[0]) == "trial 0 (random)"


def test_a_search_whose_trials_are_all_there_is_finished_even_before_the_run_says_so():
    frame = synthetic_run(4, dense=0, failed=0, infeasible=0).frame()
    assert status(frame, {"random": 2, "nsga2": 2}, False).startswith("The search is finished: 4 trials (4 complete)")
