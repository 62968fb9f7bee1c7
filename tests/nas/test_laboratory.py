"""Laws of the laboratory: what is measured is kept, adds up and teaches the model; older epochs are scaled, and it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hw_models.teaching
from hw_models.measure import Measurement, Measurer
from hw_models.predictor import load_predictor
from hw_models.store import MeasurementStore
from hw_models.teaching import teaching
from nas.laboratory import InPlaceLaboratory
from ops.layers import draw_masks_, sparsify
from ops.plan import Plan, lower

QUICK = Measurer(rounds=3, spacing_s=0.0, blocks=3, min_block_ms=0.2, cap_rounds=3)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def plan_of(width: int, density: float = 0.2, depth: int = 2) -> tuple[Plan, torch.Tensor]:
    """A chain of equal convolutions, so that one distinct step is executed several times."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers)
    sparsify(network, density)
    draw_masks_(network, torch.Generator().manual_seed(0))
    example = torch.randn(1, 1, 12, 12)
    return lower(network.eval(), example), example


@pytest.fixture(scope="module")
def measured() -> tuple[InPlaceLaboratory, dict]:
    laboratory = InPlaceLaboratory(QUICK)
    plans = {width: plan_of(width) for width in (8, 16, 24, 32)}
    return laboratory, laboratory.measure(plans)


def test_every_measurement_is_kept_before_anybody_sees_it(measured) -> None:
    laboratory, found = measured
    steps, networks = MeasurementStore().observations(laboratory.runtime)
    assert networks["name"].tolist() == [f"trial {n}" for n in found]
    for (at, row), priced in zip(networks.iterrows(), found.values()):
        assert row["ms"] == priced.metrics["latency_ms"]
        assert (row["lo_ms"], row["hi_ms"]) == (priced.metrics["latency_lo_ms"], priced.metrics["latency_hi_ms"])
        mine = steps[steps["network"] == at]
        assert mine["count"].sum() == row["steps"]
        assert (mine["ms"] * mine["count"]).sum() == pytest.approx(priced.plan["ms"].sum(), rel=1e-3)
        rounds = laboratory.store.rounds(at)
        assert rounds["whole"].min() == pytest.approx(row["ms"])
        assert rounds["steps"].shape[1] == row["steps"]


def test_a_measured_network_says_where_its_time_goes(measured) -> None:
    for priced in measured[1].values():
        assert priced.metrics["latency_source"] == "measured"
        assert set(priced.plan["source"]) == {"in place"}
        assert priced.plan["share"].sum() == pytest.approx(1.0)
        assert (priced.plan["ms"] >= 0).all()


def test_refitting_makes_the_model_the_next_search_begins_with(measured) -> None:
    laboratory, found = measured
    laboratory._new = len(found)
    model = laboratory.refit()
    assert model is not None
    plans = [plan_of(width)[0] for width in found]
    known = model.predict_many(plans)
    assert set(known["source"]) == {"measured"}
    truth = [priced.metrics["latency_ms"] for priced in found.values()]
    assert known["ms"].to_numpy() == pytest.approx(truth, rel=0.3)  # they taught it, within the noise of three rounds
    again = load_predictor(1)
    assert again is not None
    pd.testing.assert_frame_equal(again.predict_many(plans), known)
    assert laboratory.refit() is None  # nothing new


def two_epochs(path: Path, measured, per_epoch: int, slower: float) -> MeasurementStore:
    """A store with `per_epoch` networks measured, then as many after the sentinels became slower."""
    laboratory, _ = measured
    steps, networks = laboratory.store.observations(laboratory.runtime)
    of = steps[steps["network"] == networks.index[0]].drop(columns="epoch")
    store = MeasurementStore(path)
    for epoch in range(2):
        factor = slower**epoch
        sentinels = {"sentinel: a": one(1.0 * factor), "sentinel: b": one(3.0 * factor)}
        opened = store.open_epoch(laboratory.runtime, {}, sentinels)
        assert opened.is_new
        rows = networks.drop(columns="epoch").iloc[[0] * per_epoch].reset_index(drop=True)
        store.add_networks(opened, pd.concat([of.assign(network=i) for i in range(per_epoch)]), rows)
    return store


def one(ms: float) -> Measurement:
    return Measurement(ms, ms, ms, ms, ms, "ok", (ms, ms, ms))


def test_times_of_an_earlier_epoch_are_scaled_by_the_sentinels_and_it_is_said(measured, tmp_path: Path) -> None:
    store = two_epochs(tmp_path / "s.sqlite", measured, 3, slower=1.25)
    runtime = measured[0].runtime
    raw_steps, raw = store.observations(runtime, "all")
    steps, networks = teaching(store, runtime)
    assert len(networks) == 6
    old = networks["epoch"] == networks["epoch"].min()
    assert networks["scaled"][old].to_numpy() == pytest.approx(1.25)
    assert (networks["scaled"][~old] == 1.0).all()
    assert (networks["ms"] / raw["ms"]).to_numpy() == pytest.approx(networks["scaled"].to_numpy())
    assert (networks["sum_ms"] / raw["sum_ms"]).to_numpy() == pytest.approx(networks["scaled"].to_numpy())
    factor = steps["network"].map(networks["scaled"])
    assert (steps["ms"] / raw_steps["ms"]).to_numpy() == pytest.approx(factor.to_numpy())


def test_an_epoch_with_enough_networks_is_not_mixed_with_others(measured, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hw_models.teaching, "ENOUGH", 3)
    store = two_epochs(tmp_path / "s.sqlite", measured, 3, slower=1.25)
    steps, networks = teaching(store, measured[0].runtime)
    assert networks["epoch"].nunique() == 1
    assert (networks["scaled"] == 1.0).all()
    assert set(steps["network"]) == set(networks.index)


def test_batches_and_threads_are_those_of_the_run() -> None:
    plan, example = plan_of(8)
    laboratory = InPlaceLaboratory(replace(QUICK, threads=2))
    found = laboratory.measure({0: (plan, example)})
    _, networks = laboratory.store.observations(laboratory.runtime)
    assert laboratory.runtime.endswith("/t2")
    assert networks["threads"].tolist() == [2]
    assert networks["batch"].tolist() == [1]
    assert np.isfinite(found[0].metrics["latency_ms"])
