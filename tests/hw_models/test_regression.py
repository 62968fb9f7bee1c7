"""Non-negative prices and the Gaussian process: closed forms, slow twins, and what they must not do."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize

from hw_models import regression
from hw_models.regression import GaussianProcess, NonNegative


def test_exact_sums_are_found_exactly() -> None:
    rng = np.random.default_rng(0)
    work = rng.lognormal(0, 2, (60, 4))
    prices = np.array([0.3, 0.0, 2.0, 1e-6])
    fitted = NonNegative.fit(work, work @ prices)
    np.testing.assert_allclose(fitted.prices, prices, atol=1e-9)
    np.testing.assert_allclose(fitted.predict(work), work @ prices)


def test_the_fit_minimises_the_squares_of_log_errors_and_no_price_is_negative() -> None:
    rng = np.random.default_rng(1)
    work = rng.lognormal(0, 1, (40, 3))
    ms = work @ [1.0, 0.5, 0.0] * rng.lognormal(0, 0.3, 40)
    w, prior, shrink = rng.uniform(0.1, 3, 40), np.array([0.5, 1.0, 0.2]), 5.0
    fitted = NonNegative.fit(work, ms, w, prior=prior, shrink=shrink)

    def loss(prices: np.ndarray) -> float:
        rows = (w / w.mean() * np.log(work @ prices / ms) ** 2).mean()
        scale = (w[:, None] / w.mean() * (work / ms[:, None]) ** 2).mean(0)
        return float(rows + shrink / 40 * (scale * (prices - prior) ** 2).sum())

    slow = minimize(loss, [1.0, 1, 1], bounds=[(0, None)] * 3, options={"ftol": 1e-14, "gtol": 1e-10})
    np.testing.assert_allclose(fitted.prices, slow.x, atol=1e-3)
    assert (fitted.prices >= 0).all()


def test_too_high_and_too_low_weigh_alike() -> None:
    """One price for times of 1 and 4: the middle of the logarithms, not nearer to one of them."""
    assert NonNegative.fit([[1.0], [1.0]], [1.0, 4.0]).prices[0] == pytest.approx(2.0, rel=0.02)


def test_without_data_to_speak_of_prices_stay_at_the_prior_and_with_much_they_leave_it() -> None:
    prior = np.array([1.0, 2.0])
    work = np.array([[1.0, 1.0]])
    close = NonNegative.fit(work, [9.0], prior=prior, shrink=1e6).prices
    np.testing.assert_allclose(close, prior, rtol=1e-4)
    many = np.random.default_rng(0).uniform(1, 2, (500, 2))
    np.testing.assert_allclose(NonNegative.fit(many, many @ [3.0, 1.0], prior=prior, shrink=1).prices, [3, 1], rtol=0.1)


def test_one_spoiled_row_does_not_move_a_robust_fit() -> None:
    work = np.random.default_rng(0).uniform(1, 2, (50, 1))
    ms = 2 * work[:, 0]
    ms[7] /= 10
    robust = NonNegative.fit(work, ms, robust=0.1).prices[0]
    assert abs(robust - 2) < 0.1 * abs(NonNegative.fit(work, ms).prices[0] - 2)


@pytest.mark.parametrize(
    ("work", "ms", "message"),
    [
        ([[1.0]], [0.0], "positive"),
        ([[-1.0]], [1.0], "not negative"),
        ([[1.0]], [1.0, 2], "n times"),
        ([1.0], [1], "n"),
    ],
)
def test_prices_of_nonsense_are_refused(work: list, ms: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonNegative.fit(work, ms)


def data(n: int = 60, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (n, features)) * [1.0, 10.0, 0.1][:features]
    return x, np.sin(x[:, 0]) + 0.05 * x[:, 1] + rng.normal(0, 0.02, n)


def test_mean_and_deviation_are_those_of_the_textbook_formula() -> None:
    x, y = data()
    w = np.random.default_rng(0).uniform(0.2, 3, len(y))
    gp = GaussianProcess.fit(x, y, w)

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        r = float(np.sqrt((((a - b) * gp.scale) ** 2).sum()))
        return gp.signal**2 * (1 + 5**0.5 * r + 5 / 3 * r * r) * float(np.exp(-(5**0.5) * r))

    k = np.array([[covariance(a, b) for b in x] for a in x])
    k += np.diag(gp.noise**2 / w + 1e-8 * gp.signal**2)
    new = np.array([[0.1, 3.0, 0.05], [2.0, -5.0, 0.0]])
    cross = np.array([[covariance(a, b) for b in x] for a in new])
    mean, deviation = gp.predict(new)
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(k, y), rtol=1e-5, atol=1e-8)
    expected = np.sqrt(gp.signal**2 - (cross * np.linalg.solve(k, cross.T).T).sum(1))
    np.testing.assert_allclose(deviation, expected, rtol=1e-4)


def test_the_gradient_of_the_likelihood_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(25)
    seen = {}

    def capture(loss, start, **_):  # type: ignore[no-untyped-def]
        seen["loss"], seen["start"] = loss, start
        return type("Result", (), {"x": start})

    monkeypatch.setattr("scipy.optimize.minimize", capture)
    regression._tune(x, y, np.linspace(0.5, 2, 25))
    for theta in (seen["start"], seen["start"] + 0.3, seen["start"] - [0.1, -0.8, 0.5, 0, 0.2]):
        slow = approx_fprime(theta, lambda t: seen["loss"](t)[0], 1e-6)
        np.testing.assert_allclose(seen["loss"](theta)[1], slow, rtol=2e-3, atol=2e-3)


def test_it_learns_what_is_near_and_knows_nothing_far_away() -> None:
    x, y = data(150)
    gp = GaussianProcess.fit(x[:120], y[:120])
    mean, deviation = gp.predict(x[120:])
    assert np.sqrt(np.mean((mean - y[120:]) ** 2)) < 0.25 * y.std()
    far_mean, far = gp.predict(x[:1] + 1e4)
    assert abs(far_mean[0]) < 1e-6
    assert far[0] == pytest.approx(gp.signal, rel=1e-3)
    assert far[0] > 3 * np.median(deviation)


def test_features_that_do_not_vary_are_ignored() -> None:
    x, y = data()
    gp = GaussianProcess.fit(np.c_[x, np.full(len(x), 7.0)], y)
    same = GaussianProcess.fit(x, y)
    np.testing.assert_allclose(gp.predict(np.c_[x, np.full(len(x), 1.0)])[0], same.predict(x)[0], rtol=1e-6, atol=1e-9)


def test_more_rows_than_the_limit_are_thinned_and_the_weightiest_stay() -> None:
    x, y = data(100)
    w = np.ones(100)
    w[:10] = 50
    gp = GaussianProcess.fit(x, y, w, limit=30)
    assert len(gp.alpha) == 30
    kept = gp.points / np.where(gp.scale > 0, gp.scale, 1) + gp.shift
    assert all(np.abs(kept - row).sum(1).min() < 1e-9 for row in x[:10])


def test_models_survive_arrays() -> None:
    x, y = data()
    gp = GaussianProcess.fit(x, y)
    for a, b in zip(GaussianProcess.from_arrays(gp.to_arrays()).predict(x), gp.predict(x), strict=True):
        np.testing.assert_array_equal(a, b)
    prices = NonNegative.fit(np.abs(x), np.exp(y))
    np.testing.assert_array_equal(NonNegative.from_arrays(prices.to_arrays()).predict(x), prices.predict(x))


def test_a_process_on_nonsense_is_refused() -> None:
    for x, y in (([[1.0]], [1.0]), ([[1.0], [np.nan]], [1.0, 2]), ([[1.0], [2]], [1.0])):
        with pytest.raises(ValueError, match=r"x (must be|and y)"):
            GaussianProcess.fit(x, y)
