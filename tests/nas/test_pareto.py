"""Fronts and hypervolumes: closed forms first, then slow obvious twins, then degenerate cases."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from nas.pareto import crowding_distance, hypervolume, nondominated, nondomination_rank, normalise_directions

MIN2 = ("min", "min")


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


def slow_nondominated(costs: NDArray[np.float64]) -> list[bool]:
    """The definition, pair by pair."""
    return [
        not any(np.isnan(row)) and not any(dominates(other, row) for other in costs if not any(np.isnan(other)))
        for row in costs
    ]


def slow_hypervolume(costs: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Cut the box into cells at every coordinate; a cell counts if a point is below its lower corner. O(n^m)."""
    axes = [np.unique(np.append(costs[:, j], reference[j])) for j in range(costs.shape[1])]
    axes = [axis[axis <= reference[j]] for j, axis in enumerate(axes)]
    total = 0.0
    for cell in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = np.array([axis[i] for axis, i in zip(axes, cell)])
        high = np.array([axis[i + 1] for axis, i in zip(axes, cell)])
        if (costs <= low).all(axis=1).any():
            total += float(np.prod(high - low))
    return total


def test_the_front_of_a_shuffled_staircase_is_the_staircase() -> None:
    rng = np.random.default_rng(0)
    stairs = np.array([(i, 20.0 - i) for i in range(20)])
    behind = stairs + rng.uniform(0.1, 3, stairs.shape)
    points = np.concatenate([stairs, behind])
    order = rng.permutation(40)
    assert (nondominated(points[order], MIN2) == (order < 20)).all()


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
@pytest.mark.parametrize("values", [3, 1000])
def test_nondominated_equals_the_definition(objectives: int, values: int) -> None:
    rng = np.random.default_rng(objectives)
    for n in (0, 1, 2, 7, 60):
        costs = rng.integers(0, values, (n, objectives)).astype(float)
        costs[rng.random(costs.shape) < 0.05] = np.nan
        costs[rng.random(costs.shape) < 0.05] = np.inf
        costs[rng.random(costs.shape) < 0.03] = -np.inf
        assert nondominated(costs, ("min",) * objectives).tolist() == slow_nondominated(costs)


def test_duplicates_of_a_front_point_are_all_on_the_front() -> None:
    assert nondominated([(1, 2), (2, 1), (1, 2), (2, 2)], MIN2).tolist() == [True, True, True, False]
    assert nondominated([(1, 2, 0), (1, 2, 0), (1, 3, 0)], ("min",) * 3).tolist() == [True, True, False]


def test_directions_turn_the_axes_round() -> None:
    points = np.random.default_rng(0).random((50, 2))
    assert (nondominated(points, ("max", "min")) == nondominated(points * [-1, 1], MIN2)).all()


def test_nan_is_never_on_the_front_and_dominates_nothing() -> None:
    assert nondominated([(np.nan, 0.0), (5.0, 5.0), (0.0, np.nan)], MIN2).tolist() == [False, True, False]
    assert nondominated([(np.nan, np.nan)], MIN2).tolist() == [False]


def test_an_infinitely_bad_point_is_on_the_front_if_there_is_nothing_else() -> None:
    assert nondominated([(1.0, np.inf), (2.0, np.inf)], MIN2).tolist() == [True, False]
    assert nondominated([(np.inf, np.inf)], MIN2).tolist() == [True]


def test_a_frame_is_read_by_column_and_missing_values_are_nan() -> None:
    frame = pd.DataFrame(
        {"trial": [0, 1, 2], "val_accuracy": pd.array([0.9, None, 0.8], dtype="Float64"), "latency_ms": [3.0, 1.0, 2.0]}
    )
    assert nondominated(frame, {"val_accuracy": "max", "latency_ms": "min"}).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"\['speed'\] are not columns"):
        nondominated(frame, {"speed": "max"})


@pytest.mark.parametrize("directions", [{}, (), {"a": "up"}, ("maximize",), "max"])
def test_directions_must_be_max_or_min(directions: object) -> None:
    with pytest.raises(ValueError, match="max"):
        normalise_directions(directions)  # type: ignore[arg-type]


def test_the_shape_must_fit_the_directions() -> None:
    with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
        nondominated(np.zeros((4, 3)), MIN2)


@pytest.mark.parametrize("front", ["few", "all"])
def test_ten_thousand_points_take_less_than_fifty_milliseconds(front: str) -> None:
    points = np.random.default_rng(0).random((10_000, 2))
    if front == "all":
        points[:, 1] = 1 - points[:, 0]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        marked = nondominated(points, MIN2)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    assert marked.sum() == (10_000 if front == "all" else np.sum(slow_sweep(points)))


def slow_sweep(points: NDArray[np.float64]) -> list[bool]:
    best, marked = np.inf, []
    for _, y in sorted(map(tuple, points)):
        marked.append(y < best)
        best = min(best, y)
    return marked


def test_ranks_peel_one_front_after_another() -> None:
    costs = np.random.default_rng(1).integers(0, 6, (60, 2)).astype(float)
    ranks = nondomination_rank(costs)
    for rank in range(ranks.max() + 1):
        left = ranks >= rank
        assert ((ranks == rank)[left] == slow_nondominated(costs[left])).all()
    with pytest.raises(ValueError, match="NaN"):
        nondomination_rank([(np.nan, 1.0)])


def test_crowding_distance_of_a_hand_worked_front() -> None:
    costs = [(0.0, 10.0), (1.0, 6.0), (4.0, 5.0), (10.0, 0.0)]
    assert crowding_distance(costs).tolist() == pytest.approx([np.inf, 0.4 + 0.5, 0.9 + 0.6, np.inf])
    assert crowding_distance([(1.0, 1.0), (1.0, 1.0)]).tolist() == [0.0, 0.0]
    assert crowding_distance(np.empty((0, 2))).tolist() == []


def test_hypervolume_of_a_staircase_has_a_closed_form() -> None:
    # Steps (i, n - i): above the diagonal of an (n + 1) box there are n + (n - 1) + ... + 1 + (n + 1) unit cells.
    for n in (1, 4, 30):
        points = np.random.default_rng(n).permutation([(i, n - i) for i in range(n + 1)])
        assert hypervolume(points, (n + 1, n + 1), MIN2) == (n + 1) * (n + 2) / 2


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6])
def test_one_point_dominates_a_box(m: int) -> None:
    assert hypervolume([tuple(range(m))], [m + 1.0] * m, ("min",) * m) == pytest.approx(
        np.prod([m + 1 - i for i in range(m)])
    )


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_two_points_follow_inclusion_and_exclusion(m: int) -> None:
    a, b = np.zeros(m), np.zeros(m)
    a[0], b[-1] = 3.0, 2.0
    reference = np.full(m, 5.0)
    both = np.prod(reference - a) + np.prod(reference - b) - np.prod(reference - np.maximum(a, b))
    assert hypervolume([a, b], reference, ("min",) * m) == pytest.approx(both)


@pytest.mark.parametrize(("m", "n"), [(1, 12), (2, 25), (3, 12), (4, 7), (5, 5)])
@pytest.mark.parametrize("values", [4, 10_000])
def test_hypervolume_equals_counting_cells(m: int, n: int, values: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        costs = rng.integers(0, values, (n, m)).astype(float)
        reference = np.full(m, values * 0.9)
        assert hypervolume(costs, reference, ("min",) * m) == pytest.approx(
            slow_hypervolume(costs, reference), rel=1e-12
        )


def test_hypervolume_agrees_with_a_monte_carlo_estimate_on_a_large_front() -> None:
    rng = np.random.default_rng(0)
    for m, n in ((3, 150), (4, 60)):
        directions = np.abs(rng.normal(size=(n, m)))
        costs = 1 - directions / np.linalg.norm(
            directions, axis=1, keepdims=True
        )  # on a sphere: all of them on the front
        samples = rng.random((20_000, m))
        share = (samples[:, None, :] >= costs[None]).all(axis=2).any(axis=1).mean()
        assert hypervolume(costs, np.ones(m), ("min",) * m) == pytest.approx(share, abs=4 * 0.5 / 20_000**0.5)


def test_three_objectives_of_which_one_is_constant_are_two() -> None:
    points = np.random.default_rng(0).random((40, 2))
    flat = np.column_stack([points, np.full(40, 0.25)])
    assert hypervolume(flat, (1, 1, 1), ("min",) * 3) == pytest.approx(0.75 * hypervolume(points, (1, 1), MIN2))


def test_dominated_points_duplicates_order_and_direction_change_nothing() -> None:
    rng = np.random.default_rng(0)
    for m in (2, 3, 4):
        points = rng.random((15, m))
        reference = np.ones(m)
        expected = hypervolume(points, reference, ("min",) * m)
        more = np.concatenate([points, points[:5], points + 0.05])
        assert hypervolume(rng.permutation(more), reference, ("min",) * m) == pytest.approx(expected)
        assert hypervolume(-points, -reference, ("max",) * m) == pytest.approx(expected)


def test_points_that_do_not_beat_the_reference_count_nothing() -> None:
    assert hypervolume([], (1, 1), MIN2) == 0.0
    assert hypervolume([(1.0, 0.0), (0.0, 1.0), (2.0, -5.0)], (1, 1), MIN2) == 0.0
    assert hypervolume([(np.nan, 0.0), (np.inf, 0.0), (0.5, 0.5)], (1, 1), MIN2) == 0.25


def test_an_infinitely_good_point_has_infinite_volume() -> None:
    assert hypervolume([(-np.inf, 0.5), (0.1, 0.1)], (1, 1), MIN2) == np.inf
    assert hypervolume([(np.inf, 0.5)], (0, 1), ("max", "min")) == np.inf


@pytest.mark.parametrize("reference", [(1.0,), (1.0, np.nan), (1.0, np.inf)])
def test_the_reference_must_fit_and_be_finite(reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="reference must be 2 finite numbers"):
        hypervolume([(0.0, 0.0)], reference, MIN2)
