"""The formula of whole networks: exact where it holds, robust where it does not, and as good as promised on public tables."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from hw_models.specs import choose_networks, fit_specs
from tests.nas.data_files import real_data

TRUTH = np.array([4.0, 0.7, 0.3, 1.5])


def networks(count: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    numbers = np.exp(rng.normal([1.5, 2.5, 3.0], [1.0, 1.0, 1.0], (count, 3)))
    return pd.DataFrame(numbers, columns=["gmacs", "activations", "params"], index=[f"net{i}" for i in range(count)])


def times(frame: pd.DataFrame) -> pd.Series:
    return pd.Series(np.column_stack([frame, np.ones(len(frame))]) @ TRUTH, index=frame.index)


def test_exact_times_give_back_the_formula() -> None:
    frame = networks(30)
    fit = fit_specs(frame, times(frame))
    assert fit.coefficients == pytest.approx(TRUTH, rel=1e-6)
    new = networks(10, seed=1)
    np.testing.assert_allclose(fit.predict(new)["ms"], times(new), rtol=1e-6)
    assert list(fit.predict(new).index) == list(new.index)


def test_no_coefficient_is_negative() -> None:
    frame = networks(40)
    ms = times(frame) - 0.25 * frame["params"]
    fit = fit_specs(frame, np.maximum(ms - 1.4, 0.1))
    assert min(fit.coefficients) >= 0


def test_the_unit_of_a_column_does_not_matter() -> None:
    frame, new = networks(30), networks(10, 1)
    noisy = times(frame) * np.exp(np.random.default_rng(0).normal(0, 0.1, 30))
    scale = {"gmacs": 1e3, "activations": 1e-6, "params": 1e6}
    one = fit_specs(frame, noisy).predict(new)["ms"]
    other = fit_specs(frame.assign(**{c: frame[c] * s for c, s in scale.items()}), noisy).predict(
        new.assign(**{c: new[c] * s for c, s in scale.items()})
    )["ms"]
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_few_wild_times_do_not_spoil_it() -> None:
    frame = networks(60)
    ms = times(frame)
    ms.iloc[::12] *= 5
    assert fit_specs(frame, ms).coefficients == pytest.approx(TRUTH, rel=0.03)


def test_intervals_hold_nine_in_ten_new_networks() -> None:
    held = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        frame, new = networks(40, seed), networks(200, 100 + seed)
        noise = rng.normal(0, 0.2, 240)
        found = fit_specs(frame, times(frame) * np.exp(noise[:40])).predict(new)
        ms = times(new) * np.exp(noise[40:])
        held.append(float(((ms >= found["lo_ms"]) & (ms <= found["hi_ms"])).mean()))
    assert 0.86 < np.mean(held) < 0.96


def odd_ones(carry: float, count: int = 200) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    """Networks that are odd on another device, and times of this one where a share of that shows."""
    rng = np.random.default_rng(1)
    frame = networks(count)
    odd = pd.Series(rng.normal(0, 0.3, count), index=frame.index)
    ms = times(frame) * np.exp(carry * odd + rng.normal(0, 0.03, count))
    return frame, ms, pd.DataFrame({"other": odd})


@pytest.mark.parametrize("carry", [0.0, 0.4, 0.9])
def test_what_carries_over_from_another_device_is_found(carry: float) -> None:
    frame, ms, peers = odd_ones(carry)
    fit = fit_specs(frame, ms, peers)
    assert fit.carry["other"] == pytest.approx(carry, abs=0.06)
    np.testing.assert_allclose(fit.predict(frame, peers)["ms"], ms, rtol=0.2)


def test_with_few_networks_half_is_believed_to_carry_over() -> None:
    for seed in range(10):
        rng, frame = np.random.default_rng(seed), networks(8, seed)
        peers = pd.DataFrame({"other": rng.normal(0, 0.3, 8)}, index=frame.index)
        fit = fit_specs(frame, times(frame) * np.exp(rng.normal(0, 0.3, 8)), peers)  # nothing to be learned
        assert fit.carry["other"] == pytest.approx(0.5, abs=0.15)


def test_a_network_unknown_elsewhere_is_ordinary() -> None:
    frame, ms, peers = odd_ones(0.5)
    fit = fit_specs(frame, ms, peers)
    unknown = fit.predict(frame, peers * float("nan"))["ms"]
    np.testing.assert_allclose(unknown, fit.predict(frame, peers * 0.0)["ms"])


def test_the_residual_of_a_device_undoes_its_formula() -> None:
    frame, ms, _ = odd_ones(0.7)
    fit = fit_specs(frame, ms)
    np.testing.assert_allclose(fit.predict(frame)["ms"] * np.exp(fit.log_residual(frame, ms)), ms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: (f.drop(columns="params"), t), "missing: params"),
        (lambda f, t: (f.assign(gmacs=float("nan")), t), "net0.*not all known"),
        (lambda f, t: (f, t.where(t.index != "net3", -1.0)), "net3.*must be positive|must be positive.*net3"),
        (lambda f, t: (f, t.where(t.index != "net3", float("nan"))), "net3"),
        (lambda f, t: (f, t.iloc[1:]), "one time for each"),
        (lambda f, t: (f.iloc[:0], t.iloc[:0]), "at least one"),
    ],
)
def test_a_table_that_cannot_be_fitted_is_refused(change: Any, message: str) -> None:
    frame = networks(10)
    with pytest.raises(ValueError, match=message):
        fit_specs(*change(frame, times(frame)))


def test_a_fit_with_another_device_needs_it_again() -> None:
    frame, ms, peers = odd_ones(0.5)
    with pytest.raises(ValueError, match="missing: \\['other'\\]"):
        fit_specs(frame, ms, peers).predict(frame)


def test_one_network_is_enough_and_not_much() -> None:
    frame = networks(1)
    found = fit_specs(frame, [7.0]).predict(frame).iloc[0]
    assert found["ms"] == pytest.approx(7.0)
    assert found["source"] == "analytical"
    assert math.isfinite(found["hi_ms"])


def test_chosen_networks_are_different_ones_and_tell_more_than_random_ones() -> None:
    frame = networks(100)
    chosen = choose_networks(frame, times(frame), 8)
    assert len(set(chosen.tolist())) == 8
    np.testing.assert_array_equal(chosen, choose_networks(frame, times(frame), 8))
    np.testing.assert_array_equal(np.sort(choose_networks(frame, times(frame), 100)), np.arange(100))

    def knowledge(at: np.ndarray) -> float:
        rows = np.column_stack([frame, np.ones(100)])[at] / times(frame).to_numpy()[at, None]
        return float(np.linalg.slogdet(rows.T @ rows)[1])

    drawn = [knowledge(np.random.default_rng(seed).permutation(100)[:8]) for seed in range(50)]
    assert knowledge(chosen) > np.median(drawn)
    with pytest.raises(ValueError, match="101 of 100"):
        choose_networks(frame, times(frame), 101)


# --- the public tables of timm ---------------------------------------------------------------------------------------

I7, I9 = "fp32-nchw-pt240-cpu-i7_12700h-dynamo", "fp32-nchw-pt240-cpu-i9_10940x-dynamo"


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    path = real_data("hw") / "timm_infer_benchmarks.parquet"
    if not Path(path).exists():
        pytest.skip("needs the table of timm's benchmarks")
    names = {"infer_gmacs": "gmacs", "infer_macts": "activations", "param_count": "params", "infer_step_time": "ms"}
    everything = pd.read_parquet(path).rename(columns=names).dropna(subset=list(names.values()))
    made = {}
    for run in (I7, I9):
        table = everything[everything["run"] == run].set_index(["model", "infer_img_size"])
        made[run] = table.assign(family=table.index.get_level_values(0).str.extract("^([a-z]+)")[0].to_numpy())
    both = made[I7].index.intersection(made[I9].index)
    return {run: table.loc[both] for run, table in made.items()}


def left_out(table: pd.DataFrame, peers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Predictions of every network by a formula that saw no network of its family."""

    def parts() -> Iterator[pd.DataFrame]:
        families = sorted(table["family"].unique())
        fold = dict(zip(families, np.random.default_rng(0).integers(0, 10, len(families))))
        number = table["family"].map(fold)
        for k in range(10):
            seen, new = number != k, number == k
            fit = fit_specs(table[seen], table["ms"][seen], None if peers is None else peers[seen])
            yield fit.predict(table[new], None if peers is None else peers[new])

    return pd.concat(parts()).loc[table.index]


def mape(found: pd.DataFrame, ms: pd.Series) -> float:
    return float((found["ms"] / ms - 1).abs().mean())


def peers_of(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"other": fit_specs(table, table["ms"]).log_residual(table, table["ms"])})


def test_families_left_out_the_formula_is_as_good_as_published(tables: dict[str, pd.DataFrame]) -> None:
    for run, most, least_rank in ((I7, 0.13, 0.98), (I9, 0.225, 0.945)):
        table = tables[run]
        found = left_out(table)
        assert mape(found, table["ms"]) < most
        assert spearmanr(found["ms"], table["ms"])[0] > least_rank
        assert 0.86 < float(table["ms"].between(found["lo_ms"], found["hi_ms"]).mean()) < 0.94


def test_families_left_out_another_device_helps(tables: dict[str, pd.DataFrame]) -> None:
    for run, other, most, least_rank in ((I7, I9, 0.10, 0.99), (I9, I7, 0.175, 0.97)):
        found = left_out(tables[run], peers_of(tables[other]))
        assert mape(found, tables[run]["ms"]) < most
        assert spearmanr(found["ms"], tables[run]["ms"])[0] > least_rank


def test_ten_chosen_networks_and_another_device_are_off_by_a_tenth(tables: dict[str, pd.DataFrame]) -> None:
    table, peers = tables[I7], peers_of(tables[I9])
    errors, held = [], []
    for seed in range(20):
        ten = choose_networks(table, tables[I9]["ms"], 10, seed)
        rest = np.setdiff1d(np.arange(len(table)), ten)
        ms = table["ms"].iloc[rest]
        found = fit_specs(table.iloc[ten], table["ms"].iloc[ten], peers.iloc[ten]).predict(
            table.iloc[rest], peers.iloc[rest]
        )
        errors.append(mape(found, ms))
        held.append(float(ms.between(found["lo_ms"], found["hi_ms"]).mean()))
    assert np.mean(errors) < 0.10
    assert 0.8 < np.mean(held) < 0.97
