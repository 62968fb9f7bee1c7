"""Closed forms and simulated noise for the figures that predictions are judged by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hw_models.accuracy import accuracy, noise_ceiling


def test_figures_are_relative_to_the_measured_value() -> None:
    score = accuracy([1.0, 2.0, 4.0, 10.0], [1.05, 2.2, 3.0, 10.0])
    errors = [0.05, 0.1, -0.25, 0.0]
    assert score["hit5"] == 0.5
    assert score["hit10"] == 0.75
    assert score["mape"] == pytest.approx(np.mean(np.abs(errors)))
    assert score["bias"] == pytest.approx(np.mean(errors))
    assert score["rmspe"] == pytest.approx(math.sqrt(np.mean(np.square(errors))))
    assert score["spearman"] == pytest.approx(1.0)
    assert score["kendall"] == pytest.approx(1.0)
    assert score["n"] == 4


def test_rank_figures_equal_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 9, 60).astype(float), rng.integers(1, 9, 60).astype(float)
    score = accuracy(a, b)
    assert score["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert score["kendall"] == pytest.approx(stats.kendalltau(a, b).statistic)


def test_coverage_counts_measurements_inside_closed_intervals() -> None:
    score = accuracy([1.0, 2.0, 3.0], [1.0, 2.0, 2.0], lo=[1.0, 1.5, 1.0], hi=[1.2, 2.5, 2.9])
    assert score["coverage"] == pytest.approx(2 / 3)
    assert score["width"] == pytest.approx(np.mean([0.2, 0.5, 0.95]))


def test_a_constant_prediction_has_no_rank() -> None:
    score = accuracy([1.0, 2.0], [1.5, 1.5])
    assert math.isnan(score["spearman"])
    assert math.isnan(score["kendall"])


@pytest.mark.parametrize(
    ("measured", "predicted", "words"),
    [
        ([1.0, -1.0], [1.0, 1.0], "position 1"),
        ([1.0, math.nan], [1.0, 1.0], "measured"),
        ([1.0, 1.0], [1.0, math.inf], "predicted"),
        ([1.0], [1.0, 2.0], "as many"),
        ([], [], "at least one"),
    ],
)
def test_bad_times_are_named(measured: list[float], predicted: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        accuracy(measured, predicted)
    with pytest.raises(ValueError, match="both ends"):
        accuracy([1.0], [1.0], lo=[1.0])


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.1])
def test_the_ceiling_is_what_the_truth_scores_on_noisy_data(noise: float) -> None:
    rng = np.random.default_rng(1)
    truth = np.exp(rng.normal(0, 1, 4000))
    first, second = (truth * np.exp(rng.normal(0, noise, 4000)) for _ in range(2))
    ceiling = noise_ceiling(np.column_stack([first, second]))
    reached = accuracy(first, truth)
    for figure in ("hit5", "hit10", "mape", "rmspe", "spearman"):
        assert ceiling[figure] == pytest.approx(reached[figure], abs=0.02), figure
    assert ceiling["twins10"] <= ceiling["hit10"]
    assert ceiling["twin_spearman"] == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-3)


def test_the_ceiling_does_not_depend_on_the_order_within_pairs() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.uniform(1, 2, (50, 2))
    turned = np.where(rng.random((50, 1)) < 0.5, pairs, pairs[:, ::-1])
    assert noise_ceiling(turned) == pytest.approx(noise_ceiling(list(map(tuple, pairs))))


def test_equal_pairs_have_a_perfect_ceiling() -> None:
    ceiling = noise_ceiling([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
    assert ceiling["hit5"] == ceiling["twins5"] == 1.0
    assert ceiling["rmspe"] == 0.0
    assert ceiling["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("pairs", [[], [(1.0, 0.0)], [(1.0, 2.0, 3.0)]])
def test_pairs_of_positive_times_are_needed(pairs: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError):
        noise_ceiling(pairs)
