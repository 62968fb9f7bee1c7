"""Paired statistics against scipy's own, against all flips written out, and where they have nothing to say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nas.oneshot.statistics import EXACT_PAIRS, flip_p, mean_sd, paired, plus_minus


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_t_test_and_its_interval_are_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.9, 0.01, n), rng.normal(0.895, 0.01, n)
    found, theirs = paired(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert found.n == n
    assert found.mean == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.p_t == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_flip_test_counts_all_flips(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1, n)
    flips = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
    assert flip_p(d) == sum(f >= abs(d.sum()) - 1e-12 for f in flips) / 2**n
    theirs = stats.permutation_test((d, 0 * d), lambda x, y: np.mean(x - y), permutation_type="samples")
    assert flip_p(d) == pytest.approx(theirs.pvalue)


def test_differences_of_one_sign_have_the_smallest_p_there_is() -> None:
    for n in (2, 3, 5):
        assert flip_p([0.1 + 0.01 * i for i in range(n)]) == 2 / 2**n


def test_many_pairs_are_sampled_alike_each_time_and_close_to_exact() -> None:
    d = np.random.default_rng(0).normal(0.25, 1, EXACT_PAIRS + 4)
    first, second = (
        np.sort(
            [sum(s * v for s, v in zip(signs, half, strict=True)) for signs in itertools.product((1, -1), repeat=12)]
        )
        for half in (d[:12], d[12:])
    )
    far = abs(d.sum()) - 1e-12
    above = len(second) - np.searchsorted(second, far - first)
    below = np.searchsorted(second, -far - first, side="right")
    assert flip_p(d) == flip_p(d)
    assert flip_p(d) == pytest.approx((above + below).sum() / 2**24, abs=0.005)


def test_swapping_sides_turns_the_sign_and_nothing_else() -> None:
    a, b = [0.9, 0.92, 0.95], [0.89, 0.93, 0.91]
    one, two = paired(a, b), paired(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-two.mean, -two.high, -two.low))
    assert (one.p_t, one.p_flip) == pytest.approx((two.p_t, two.p_flip))


def test_pairs_that_miss_one_side_are_left_out() -> None:
    nan = math.nan
    assert paired([0.9, nan, 0.8, 0.7], [0.8, 0.5, nan, 0.65]) == paired([0.9, 0.7], [0.8, 0.65])


def test_one_pair_has_a_difference_and_no_more() -> None:
    found = paired([0.9], [0.8])
    assert (found.n, found.mean) == (1, pytest.approx(0.1))
    assert all(map(math.isnan, (found.low, found.high, found.p_t, found.p_flip)))
    assert str(found) == "+0.1000 (one pair: no interval)"
    assert (paired([], []).n, str(paired([], []))) == (0, "no pair")


def test_equal_differences_have_an_interval_of_no_width_and_no_t_test() -> None:
    found = paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    assert (found.low, found.high) == (found.mean, found.mean)
    assert math.isnan(found.p_t)
    assert found.p_flip == 0.25
    assert paired([1.0, 2.0], [1.0, 2.0]).p_flip == 1.0


def test_what_is_no_list_of_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="equal length"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        paired([math.inf], [1.0])


def test_mean_and_spread() -> None:
    assert mean_sd([1.0, 2.0, 3.0, math.nan]) == (2.0, 1.0)
    mean, spread = mean_sd([0.5])
    assert mean == 0.5
    assert math.isnan(spread)
    assert plus_minus(0.93214, 0.00399) == "0.9321 +- 0.0040"
    assert plus_minus(mean, spread) == "0.5000"
    assert plus_minus(*mean_sd([])) == "–"
