"""From sums to wholes: known truth is found, nothing is invented without data, disturbed networks do not bend it."""

import json

import numpy as np
import pandas as pd
import pytest

from hw_models.context import surroundings
from hw_models.network_model import ENOUGH, TERMS, NetworkModel

TRUTH = np.array([1.03, 0.0015, 0.0003, 0.00006, 1e-7, 0.005])


def _networks(count: int, seed: int = 0, noise: float = 0.01) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "sum_ms": np.exp(rng.uniform(-4, 2, count)),
            "calls": rng.integers(2, 30, count).astype(float),
            "steps": rng.integers(4, 300, count).astype(float),
            "weight_bytes": np.exp(rng.uniform(8, 15, count)),
            "arena_bytes": np.exp(rng.uniform(8, 14, count)),
            "handed_bytes": rng.choice([40.0, 4e3, 6e4, 3e5], count),
            "moved_bytes": np.exp(rng.uniform(8, 17, count)),
        }
    )
    full = frame.assign(one=1.0, cold_calls=frame["calls"] * surroundings(frame)[:, 1])
    table = full[list(TERMS)].to_numpy()
    return frame.assign(ms=(table @ TRUTH) * np.exp(noise * rng.standard_normal(count)))


def test_known_coefficients_are_found() -> None:
    train, test = _networks(300), _networks(200, seed=1, noise=0.0)
    model = NetworkModel.fit(train)
    assert np.abs(model.predict(test) / test["ms"] - 1).max() < 0.04
    assert model.error < 0.015


def test_with_nothing_known_the_whole_is_the_sum() -> None:
    frame = _networks(5)
    np.testing.assert_allclose(NetworkModel.fit(frame.iloc[:0]).predict(frame), frame["sum_ms"])


def test_few_networks_stay_near_the_sum() -> None:
    large = _networks(3).assign(sum_ms=5.0)
    model = NetworkModel.fit(large.assign(ms=large["sum_ms"] * 1.05))
    assert model.predict(large.assign(sum_ms=5.0)) == pytest.approx(5.25, rel=0.03)


def test_disturbed_networks_do_not_bend_it() -> None:
    train, test = _networks(200), _networks(100, seed=1, noise=0.0)
    train.loc[train.index[:30], "ms"] *= 2.0
    assert np.abs(np.log(NetworkModel.fit(train).predict(test) / test["ms"])).mean() < 0.03


def test_coefficients_are_never_negative() -> None:
    train = _networks(100)
    assert (NetworkModel.fit(train.assign(ms=train["sum_ms"] * 0.9)).coefficients >= 0).all()


def test_a_residual_is_used_where_it_helps_and_only_there() -> None:
    plain = _networks(200, noise=0.02)
    assert len(NetworkModel.fit(plain).residual) == 0
    bent = plain.assign(ms=plain["ms"] * (plain["weight_bytes"] / 2**18 + 1) ** 0.1)
    model = NetworkModel.fit(bent)
    assert len(model.residual) > 0
    assert model.error < 0.8 * float(np.std(np.log(bent["ms"] / (bent["sum_ms"] * TRUTH[0]))))
    assert len(NetworkModel.fit(bent.iloc[: ENOUGH - 1]).residual) == 0


def test_json_there_and_back() -> None:
    frame = _networks(120).assign(weight_bytes=1e6)
    model = NetworkModel.fit(frame.assign(ms=frame["ms"] * frame["steps"] ** 0.1))
    again = NetworkModel.from_dict(json.loads(json.dumps(model.to_dict())))
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
    assert again.error == model.error


def test_measurements_of_before_know_nothing_of_bytes_handed_over() -> None:
    old = _networks(60).drop(columns="handed_bytes")
    assert np.isfinite(NetworkModel.fit(old).predict(old)).all()
