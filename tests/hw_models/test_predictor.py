"""The predictor on a machine whose truth is known: right where it was measured, honest where it was not, the same from disk."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hw_models import predictor_files
from hw_models.choices import choose_kernels
from hw_models.context import Context, class_of, surroundings
from hw_models.descriptor import DeviceDescriptor, DeviceError
from hw_models.device import runtime_id
from hw_models.honesty import Spread, left_out
from hw_models.model import PART_COLUMNS, SOURCES, CalibrationError
from hw_models.network_model import NetworkModel
from hw_models.predictor import Predictor, load_predictor
from hw_models.step_model import StepModel
from ops.layers import draw_masks_, sparsify
from ops.plan import lower
from tests.hw_models.synthetic_machine import observed, some_plans, some_work, true_network_ms, true_step_ms

MACHINE = DeviceDescriptor(
    "synthetic",
    "cpu",
    "a machine of numbers",
    peak_gflops=60.0,
    bandwidth_gbs=20.0,
    sources={"peak_gflops": "the formula", "bandwidth_gbs": "the formula"},
)
PLANS = some_plans(40, seed=1)
TRAIN = some_work(0, plans=PLANS[:30])


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.set_num_threads(1)
    return Predictor.fit(*observed(TRAIN), device=MACHINE, runtime=runtime_id())


def test_measured_networks_are_answered_from_the_table(model: Predictor) -> None:
    found = model.predict_many(TRAIN)
    assert (found["source"] == "measured").all()
    assert np.abs(found["ms"] / true_network_ms(TRAIN) - 1).max() < 0.06


def test_other_networks_are_learned_and_their_intervals_hold(model: Predictor) -> None:
    test = some_work(0, plans=PLANS[30:])
    found, truth = model.predict_many(test), true_network_ms(test)
    assert set(found["source"]) <= {"learned", "interpolated", "analytical"}
    assert np.abs(np.log(found["ms"] / truth)).mean() < 0.15
    assert ((found["lo_ms"] <= truth) & (truth <= found["hi_ms"])).mean() >= 0.6
    assert ((found["lo_ms"] < found["ms"]) & (found["ms"] < found["hi_ms"])).all()


def test_one_and_many_say_the_same(model: Predictor) -> None:
    many = model.predict_many(PLANS[28:32])
    for plan, (_, row) in zip(PLANS[28:32], many.iterrows()):
        one = model.predict(plan)
        assert (one.ms, one.lo_ms, one.hi_ms, one.source) == pytest.approx(tuple(row)) or one.ms == pytest.approx(
            row["ms"]
        )
        assert one.source == row["source"]
        assert tuple(one.parts.columns) == PART_COLUMNS
        assert one.parts["op"].tolist() == [op.name for op in plan.ops]
        assert one.parts["share"].sum() == pytest.approx(1.0)
        assert set(one.parts["source"]) <= set(SOURCES)


def test_parts_are_the_sums_of_their_steps(model: Predictor) -> None:
    work = some_work(0, plans=PLANS[:1])
    parts = model.predict(PLANS[0]).parts
    there = model.context.attached(model.price(work.steps)[0], class_of(work.steps), surroundings(work.networks)[0])
    assert parts["ms"].sum() == pytest.approx(float(work.sums(there)[0]))


def test_an_operation_nobody_measured_is_priced_from_the_roofs_and_said_so(model: Predictor) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x, dim=1).real

    estimate = model.predict(lower(Odd(), torch.zeros(1, 64)))
    assert estimate.source == "analytical"
    assert "never measured here" in estimate.note
    assert "fft" in estimate.note
    assert estimate.hi_ms / estimate.lo_ms > 1.5


def test_a_known_shape_at_another_density_is_drawn_to_what_is_known_of_it() -> None:
    work = TRAIN
    steps, networks = observed(work, noise=0.0)
    curve = steps[steps["nnz"] > 0]["curve"].iloc[0]
    steps.loc[steps["curve"] == curve, "ms"] *= 3.0  # a shape that is dear for a reason no feature tells
    model = Predictor.fit(steps, networks, device=MACHINE)
    row = work.steps[work.steps["curve"] == curve].iloc[[0]].assign(key="", density=0.97)
    plain = model.learned.predict(row)[0][0]
    ms, _, source = model.price(row)
    assert source.tolist() == [2]
    assert ms[0] > 1.2 * plain


def test_nothing_measured_leaves_the_roofs() -> None:
    steps, networks = observed(TRAIN)
    model = Predictor.fit(steps.iloc[:0], networks.iloc[:0], device=MACHINE)
    assert (model.predict_many(TRAIN)["source"] == "analytical").all()


def test_another_device_is_refused_with_the_way_out(model: Predictor) -> None:
    with pytest.raises(DeviceError, match=r'calibrated on "synthetic".*AnalyticalModel'):
        model.predict_many(TRAIN, "raspberry-pi-4")
    assert len(model.predict_many(TRAIN, "synthetic")) == len(TRAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, n: (s.drop(columns="curve"), n), "observed: the columns curve are missing"),
        (lambda s, n: (s.assign(ms=0.0), n), "every ms must be above 0"),
        (lambda s, n: (s.assign(ms=np.inf), n), "above 0 and finite"),
        (lambda s, n: (s, pd.concat([n, n])), "0 twice"),
        (lambda s, n: (s.assign(network=99), n), "not in the index of networks"),
    ],
)
def test_wrong_frames_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor.fit(*change(*observed(TRAIN)), device=MACHINE)


def test_fifty_thousand_networks_a_second(model: Predictor) -> None:
    work = TRAIN.subset(np.tile(np.arange(30), 400))
    model.predict_many(TRAIN)
    best = min(_seconds(lambda: model.predict_many(work)) for _ in range(3))
    assert len(work) / best > 50_000


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --- honesty --------------------------------------------------------------------------------------------------------------


def test_left_out_networks_are_not_answered_by_their_own_measurements() -> None:
    steps, networks = observed(TRAIN)
    judged = left_out(steps, networks, StepModel.fit(steps), Context(), NetworkModel.fit(networks))
    own = judged.frame[judged.frame["hidden"] == 1.0]
    assert (own["source"] != "measured").all()  # every probe has shapes of its own
    assert judged.frame["error"].abs().mean() > 0.005


def test_copies_of_a_network_are_left_out_together() -> None:
    twice = some_work(0, plans=[*PLANS[:12], *PLANS[:12]])
    steps, networks = observed(twice)
    together = networks.assign(group=[str(k % 12) for k in range(24)])
    apart = networks.assign(group=[str(k) for k in range(24)])
    correction, learned = NetworkModel.fit(networks), StepModel.fit(steps)
    known = [
        (
            left_out(steps, frame, learned, Context(), correction).frame.query("hidden == 0")["source"] == "measured"
        ).mean()
        for frame in (together, apart)
    ]
    assert known[0] < known[1]


def test_the_spread_grows_with_each_of_its_parts() -> None:
    spread = Spread(0.5, 0.3)
    base = spread(np.array([0.01]), np.array([0.1]), np.array([0.1]), 0.02)[0]
    for args in ((0.02, 0.1, 0.1, 0.02), (0.01, 0.2, 0.1, 0.02), (0.01, 0.1, 0.2, 0.02), (0.01, 0.1, 0.1, 0.05)):
        assert spread(np.array([args[0]]), np.array([args[1]]), np.array([args[2]]), args[3])[0] > base


# --- files ----------------------------------------------------------------------------------------------------------------


def test_a_predictor_from_disk_answers_the_same(model: Predictor, tmp_path) -> None:
    again = predictor_files.load(predictor_files.save(model, tmp_path / "model"))
    work = some_work(0, plans=PLANS)
    pd.testing.assert_frame_equal(again.predict_many(work), model.predict_many(work))
    assert again.facts == json.loads(json.dumps(model.facts))
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]


def test_saving_again_leaves_one_model_and_there_is_always_one(model: Predictor, tmp_path, monkeypatch) -> None:
    folder = predictor_files.save(model, tmp_path / "model")
    before = (folder / "current").read_text()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictor_files, "save_device", killed)  # the last file that is written
        with pytest.raises(KeyboardInterrupt):
            predictor_files.save(model, folder)
    assert (folder / "current").read_text() == before
    predictor_files.load(folder)
    monkeypatch.setattr(predictor_files, "KEEP_S", -1.0)
    predictor_files.save(model, folder)
    assert (folder / "current").read_text() != before
    assert sorted(path.name for path in folder.iterdir()) == sorted(["current", (folder / "current").read_text()])


@pytest.mark.parametrize("name", ["model.json", "table.json", "learned.npz", "device.toml"])
def test_a_damaged_file_is_named_with_the_cure(model: Predictor, tmp_path, name: str) -> None:
    folder = predictor_files.save(model, tmp_path / "model")
    (folder / (folder / "current").read_text() / name).write_bytes(b"\x00 not this")
    with pytest.raises(CalibrationError, match=r"is damaged.*nas calibrate.*not lost"):
        predictor_files.load(folder)


def test_an_empty_place_is_no_calibration(tmp_path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration"):
        predictor_files.load(tmp_path)


def test_a_calibration_of_other_versions_is_not_used(
    model: Predictor, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    assert load_predictor() is None
    predictor_files.save(model, predictor_files.home(runtime_id(2)))
    with pytest.raises(CalibrationError, match=r"now runs .*t1.*nas calibrate"):
        load_predictor(1)
    predictor_files.save(model, predictor_files.home(runtime_id(1)))
    found = load_predictor(1)
    assert found is not None
    assert found.runtime == runtime_id(1)


# --- kernels --------------------------------------------------------------------------------------------------------------


def _layers(density: float) -> nn.Module:
    net = sparsify(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1)), density)
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net.eval()


def test_the_model_chooses_the_kernels_it_thinks_fastest(model: Predictor) -> None:
    example = torch.zeros(1, 16, 16, 16)
    plan = lower(_layers(0.05), example, choose=lambda op, legal: "torch")
    chosen = choose_kernels(plan, model)
    assert all(op.kernel != "torch" for op in chosen.ops if op.layer is not None)
    assert model.predict(chosen).ms <= model.predict(plan).ms


def test_where_sparse_kernels_are_dear_layers_stay_dense() -> None:
    steps, networks = observed(TRAIN)
    dear = steps["kernel"] != "torch"
    steps.loc[dear, "ms"] *= 300.0
    sums = (steps["ms"] * steps["count"]).groupby(steps["network"]).sum()
    model = Predictor.fit(steps, networks.assign(sum_ms=sums, ms=1.02 * sums + 0.01), device=MACHINE)
    plan = lower(_layers(0.3), torch.zeros(1, 16, 16, 16))
    assert all(op.kernel == "torch" for op in choose_kernels(plan, model).ops)


def test_synthetic_steps_have_positive_times() -> None:
    assert (true_step_ms(TRAIN.steps) > 0).all()
