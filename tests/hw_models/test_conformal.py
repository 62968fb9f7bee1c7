"""Intervals cover what they promise, on simulated errors."""

import json
import math

import numpy as np
import pytest

from hw_models.conformal import FEWEST, UNKNOWN, WIDEN, Conformal, corrected_quantile
from hw_models.model import SOURCES


def slow_quantile(scores: np.ndarray, coverage: float) -> float:
    """The smallest score that at least coverage of (the scores and one that is infinite) do not exceed."""
    everything = [*scores.tolist(), math.inf]
    return min(s for s in everything if sum(x <= s for x in everything) >= coverage * len(everything) - 1e-12)


def test_the_quantile_equals_its_definition() -> None:
    rng = np.random.default_rng(3)
    for n in range(0, 45):
        scores = rng.random(n)
        assert corrected_quantile(scores, 0.9) == slow_quantile(scores, 0.9)


@pytest.mark.parametrize("tail", ["normal", "heavy"])
@pytest.mark.parametrize("n", [25, 60, 200])
def test_intervals_cover_at_least_what_they_promise_and_not_much_more(n: int, tail: str) -> None:
    rng = np.random.default_rng(n)
    hits, trials = 0, 400
    for _ in range(trials):
        spread = rng.uniform(0.01, 0.3, n + 10)
        noise = rng.standard_normal(n + 10) if tail == "normal" else rng.standard_t(3, n + 10)
        errors = 3 * spread * noise  # the model is three times too sure of itself
        fitted = Conformal.fit(errors[:n], spread[:n], ["learned"] * n)
        lo, hi = fitted.interval(np.ones(10), spread[n:], "learned")
        truth = np.exp(errors[n:])
        hits += int(((lo <= truth) & (truth <= hi)).sum())
    covered = hits / (10 * trials)
    assert 0.89 <= covered <= 0.9 + 1.3 / n + 0.01


def test_a_class_with_few_scores_borrows_from_the_next_worse_one_and_is_wider() -> None:
    rng = np.random.default_rng(0)
    few, many = np.full(FEWEST - 1, 1e-4), rng.standard_normal(100)
    source = ["interpolated"] * len(few) + ["learned"] * 100
    fitted = Conformal.fit(np.r_[few, many], np.ones(len(source)), source)
    learned = corrected_quantile(np.abs(many), 0.9)
    assert fitted.quantiles == pytest.approx(
        {
            "measured": learned * WIDEN**2,
            "interpolated": learned * WIDEN,
            "learned": learned,
            "analytical": learned * WIDEN,
        }
    )
    assert fitted.counts == {"measured": 0, "interpolated": FEWEST - 1, "learned": 100, "analytical": 0}


def test_few_scores_that_are_worse_than_the_borrowed_ones_count() -> None:
    fitted = Conformal.fit(np.r_[np.full(5, 9.0), np.full(50, 1.0)], np.ones(55), ["measured"] * 5 + ["learned"] * 50)
    assert fitted.quantiles["measured"] == pytest.approx(9)


def test_without_scores_intervals_are_wide() -> None:
    fitted = Conformal.fit([], [], [])
    assert fitted.quantiles == dict.fromkeys(SOURCES, UNKNOWN)
    lo, hi = fitted.interval(2.0, 0.1, "measured")
    assert (float(lo), float(hi)) == pytest.approx((2 / math.exp(0.1 * UNKNOWN), 2 * math.exp(0.1 * UNKNOWN)))


def test_each_row_gets_its_own_class() -> None:
    rng = np.random.default_rng(0)
    source = np.repeat(np.array(SOURCES, dtype=object), 30)
    fitted = Conformal.fit(np.repeat([1.0, 2, 3, 4], 30) * rng.uniform(0.5, 1, 120), np.ones(120), source)
    lo, hi = fitted.interval(np.ones(4), np.full(4, 0.1), list(SOURCES))
    assert (np.diff(hi) > 0).all()
    np.testing.assert_allclose(lo * hi, 1)
    for i, name in enumerate(SOURCES):
        assert hi[i] == fitted.interval(1.0, 0.1, name)[1]


def test_it_survives_json() -> None:
    fitted = Conformal.fit(np.linspace(-1, 1, 40), np.ones(40), ["learned"] * 40)
    assert Conformal.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], [1, 2], ["learned"]), "equally long"),
        (([0.1], [1], ["guessed"]), "unknown source 'guessed'"),
        (([np.nan], [1], ["learned"]), "finite"),
        (([0.1], [1], ["learned"], 1.0), "coverage"),
    ],
)
def test_nonsense_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conformal.fit(*arguments)
