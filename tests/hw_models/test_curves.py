"""Curves over density: against slow twins, and the laws the rest relies on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_models.curves import Curve, isotonic


def slow_isotonic(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Max-min formula: g_i = max over a <= i of min over b >= i of the mean of y[a..b]."""
    n = len(y)
    return np.array(
        [
            max(min(np.average(y[a : b + 1], weights=w[a : b + 1]) for b in range(i, n)) for a in range(i + 1))
            for i in range(n)
        ]
    )


def slow_predict(curve: Curve, d: float) -> float:
    """One density, by walking over the segments."""
    xs, ys = curve.density, curve.ms
    for i in range(len(xs) - 1):
        last = i == len(xs) - 2
        if d <= xs[i + 1] or last:
            return max(ys[i] + (ys[i + 1] - ys[i]) * (d - xs[i]) / (xs[i + 1] - xs[i]), curve.floor_ms)
    return curve.floor_ms + (ys[0] - curve.floor_ms) * d / xs[0]


points = st.lists(
    st.tuples(st.integers(1, 40).map(lambda k: k / 40), st.floats(1e-3, 1e3), st.floats(1e-3, 0.3)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(points)
def test_isotonic_equals_the_max_min_formula(data: list[tuple[float, float, float]]) -> None:
    y, w = np.array([p[1] for p in data]), np.array([p[2] for p in data])
    np.testing.assert_allclose(isotonic(y, w), slow_isotonic(y, w), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(points, st.floats(0, 1))
def test_curves_never_fall_and_never_pass_below_the_floor(data: list[tuple[float, float, float]], floor: float) -> None:
    d, t, s = map(np.array, zip(*data, strict=True))
    curve = Curve.fit(d, t, s, floor_ms=floor)
    grid = np.linspace(0.001, 1, 97)
    values = curve.predict(grid)
    assert (np.diff(values) >= -1e-9 * values[1:]).all()
    assert (values >= floor * (1 - 1e-12)).all()
    np.testing.assert_allclose(values, [slow_predict(curve, float(g)) for g in grid], rtol=1e-9, atol=1e-12)
    assert (curve.spread(grid) > 0).all()


def test_a_single_measurement_below_the_floor_is_lifted_to_it() -> None:
    np.testing.assert_array_equal(Curve.fit([0.5], [0.1], floor_ms=0.4).predict([0.1, 0.5, 1.0]), 0.4)


def test_exact_lines_are_found_exactly() -> None:
    d = np.array([0.4, 0.01, 0.1, 0.05, 0.2])
    curve = Curve.fit(d, 0.1 + 2 * d)
    np.testing.assert_allclose(curve.predict([0.01, 0.03, 0.33, 0.8]), 0.1 + 2 * np.array([0.01, 0.03, 0.33, 0.8]))


def test_a_knot_is_the_weighted_mean_of_its_measurements() -> None:
    curve = Curve.fit([0.1, 0.1, 0.5], [1.0, 4.0, 9.0], sigma=[0.1, 0.2, 0.1])
    assert curve.predict(0.1) == pytest.approx(4 ** (1 / 5))
    assert curve.counts.tolist() == [2, 1]


def test_a_surer_measurement_pulls_a_pooled_pair_towards_it() -> None:
    curve = Curve.fit([0.1, 0.2], [2.0, 1.0], sigma=[0.001, 0.1])
    assert curve.predict(0.2) == pytest.approx(2.0, rel=1e-3)
    assert curve.spread(0.2) > 0.3, "a knot that had to be moved by half is not sure"


@pytest.mark.parametrize(
    ("dense", "expected"), [(1.1, 0.5), (0.1, 0.0), (0.099, 0.0), (2.1, None), (5.0, None), (None, None), (0.3, 0.1)]
)
def test_crossover_is_where_the_line_meets_dense(dense: float | None, expected: float | None) -> None:
    d = np.array([0.05, 0.2, 0.4, 0.8])
    found = Curve.fit(d, 0.1 + 2 * d, dense_ms=dense).crossover()
    assert (found is None) == (expected is None)
    if found is not None:
        assert found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(points, st.floats(1e-3, 1e3), st.floats(0, 5))
def test_above_the_crossover_dense_is_faster_and_below_it_is_not(
    data: list[tuple[float, float, float]], dense: float, floor: float
) -> None:
    d, t, s = map(np.array, zip(*data, strict=True))
    curve = Curve.fit(d, t, s, dense_ms=dense, floor_ms=floor)
    crossover = curve.crossover()
    for x in np.linspace(0.001, 1, 201):
        if crossover is None or x < crossover - 1e-9:
            assert curve.predict(x) <= dense * (1 + 1e-9)
        elif x > crossover + 1e-9:
            assert curve.predict(x) > dense * (1 - 1e-9)


def test_points_are_added_beside_a_bend_and_nowhere_on_a_line() -> None:
    d = np.array([0.05, 0.2, 0.4, 0.6, 1.0])
    line = Curve.fit(d, 0.1 + 2 * d)
    candidates = [0.02, 0.1, 0.3, 0.4, 0.5, 0.8]
    assert line.worth_adding(candidates) == []
    bent = Curve.fit(d, [0.2, 0.5, 0.9, 1.9, 3.9])  # bends at 0.4
    assert set(bent.worth_adding(candidates)) == {0.3, 0.5}
    noisy = Curve.fit(d, [0.2, 0.5, 0.9, 1.9, 3.9], sigma=np.full(5, 0.2))
    assert noisy.worth_adding(candidates) == [], "a bend within the noise is none"


def test_spread_grows_in_gaps_and_beyond_the_hull() -> None:
    curve = Curve.fit([0.1, 0.5], [1.0, 4.0])
    at, gap, beyond = curve.spread([0.1, 0.3, 1.0])
    assert at < gap < beyond
    assert curve.inside([0.05, 0.1, 0.3, 0.5, 0.9]).tolist() == [False, True, True, True, False]


def test_a_curve_survives_json() -> None:
    curve = Curve.fit([0.1, 0.5, 0.5], [1.0, 4.0, 4.1], dense_ms=3, floor_ms=0.2)
    back = Curve.from_dict(json.loads(json.dumps(curve.to_dict())))
    grid = np.linspace(0.01, 1, 9)
    np.testing.assert_array_equal(back.predict(grid), curve.predict(grid))
    np.testing.assert_array_equal(back.spread(grid), curve.spread(grid))
    assert back.crossover() == curve.crossover()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "not empty"),
        (([0.1], [1, 2]), "equally long"),
        (([0.0], [1]), r"\(0, 1\]"),
        (([1.1], [1]), "1.1"),
        (([0.1], [-1]), "ms must be positive"),
        (([0.1], [np.nan]), "ms must be positive"),
        (([0.1], [1], [0]), "sigma must be positive"),
        (([0.1], [1], None, -1), "dense_ms"),
        (([0.1], [1], None, None, -1), "floor_ms"),
    ],
)
def test_nonsense_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve.fit(*arguments)
