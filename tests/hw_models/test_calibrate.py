"""Calibration end to end: it leaves a model that answers, goes on from what was measured, and loses nothing when it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hw_models.active import Wanted
from hw_models.analytical import AnalyticalModel
from hw_models.calibrate import _choose, _mixed, _Pool, calibrate
from hw_models.descriptor import load_device
from hw_models.device import runtime_id
from hw_models.measure import Measurement
from hw_models.predictor import load_predictor
from hw_models.probes import probes
from hw_models.store import MeasurementStore
from hw_models.teaching import fit_from_store
from hw_models.workload import workload
from ops.plan import legal_kernels, lower, rule_of_thumb
from tests.hw_models.synthetic_machine import observed, some_work

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))


def test_a_short_calibration_leaves_a_model_a_device_and_measurements() -> None:
    told = []
    report = calibrate(14, progress=lambda done, budget, text: told.append((done, budget, text)))
    assert report.device.measured
    assert load_device("host").measured
    model = load_predictor()
    assert model is not None
    steps, networks = MeasurementStore().observations(runtime_id())
    assert report.measured == len(networks) == report.networks
    assert len(networks) >= 2
    assert (steps["ms"] > 0).all()
    _, module, example = next(probes(99))
    assert 0 < model.predict(lower(module, example)).ms < 1000
    assert "networks measured now" in str(report)
    assert all(0 <= done <= budget == 14 for done, budget, _ in told)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_killed_while_it_measures_it_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    store = MeasurementStore()
    work = some_work(3)
    epoch = store.open_epoch(runtime_id(), {}, {"sentinel": Measurement(1.0, 1.0, 1.0, 1.0, 1.0, "ok", (1.0,))})
    store.add_networks(epoch, *observed(work))
    code = "from hw_models.calibrate import calibrate; calibrate(60)"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    time.sleep(6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(MeasurementStore().observations(runtime_id(), "all")[1])
    assert before >= 3
    assert load_predictor() is None
    report = calibrate(4)
    after = len(MeasurementStore().observations(runtime_id(), "all")[1])
    assert after == before + report.measured
    assert load_predictor() is not None


def test_candidates_come_with_probes_among_them_and_then_probes_alone() -> None:
    own = [("mine", nn.Linear(4, 2), torch.zeros(1, 4))] * 6
    names = [name for (name, _, _), _ in zip(_mixed(own, 0, 1, np.random.default_rng(0)), range(20))]
    assert names.count("mine") == 6
    assert all(name.startswith("probe") for name in names[names.index("mine") :] if name != "mine")


def test_what_cannot_be_lowered_is_told_and_left_out() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("never works")

    pool = _Pool(iter([("bad", Broken(), torch.zeros(1, 4)), ("good", nn.Linear(4, 2), torch.zeros(1, 4))]), RNG)
    pool.fill(5, time.monotonic() + 60)
    assert [entry[0][0] for entry in pool.waiting] == ["good"]
    assert "never works" in pool.failed[0]


def test_the_next_batch_is_of_what_is_least_known() -> None:
    drawn = probes(5)
    pool = _Pool(iter([next(drawn) for _ in range(8)]), RNG)
    pool.fill(8, time.monotonic() + 60)
    wanted, roofs = Wanted(), AnalyticalModel(load_device("host"))
    first = pool.waiting[0]
    wanted.seen(workload([plan for _, plan in pool.waiting[:4]]).steps)
    chosen = _choose(pool, wanted, roofs, 3)
    assert len(chosen) == 3
    assert first not in chosen
    assert not any(entry in pool.waiting for entry in chosen)


def test_a_store_with_nothing_in_it_gives_a_model_of_the_roofs() -> None:
    model = fit_from_store(MeasurementStore(), load_device("host"))
    assert set(model.predict_many(some_work(2))["source"]) == {"analytical"}


@pytest.mark.parametrize("arguments", [(0, 1, 1), (10, 0, 1), (10, 1, 0)])
def test_wrong_arguments_are_refused(arguments: tuple[float, int, int]) -> None:
    budget, threads, batch = arguments
    with pytest.raises(ValueError, match="budget_s > 0, threads >= 1 and batch >= 1"):
        calibrate(budget, threads=threads, batch=batch)


def test_candidates_are_planned_on_all_kernels() -> None:
    def convolutions():
        while True:
            yield "conv", nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), torch.zeros(1, 8, 6, 6)

    pool = _Pool(convolutions(), np.random.default_rng(1))
    pool.fill(40, time.monotonic() + 120)
    kernels = [plan.ops[0].kernel for _, plan in pool.waiting]
    legal = legal_kernels(pool.waiting[0][1].ops[0])
    assert set(kernels) == set(legal)
    assert kernels.count(rule_of_thumb(pool.waiting[0][1].ops[0], legal)) > 20
