"""The analytical model: the formula by hand, bounds, monotony, and networks as the sum of their operations."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hw_models.analytical import CALLS_PER_CALL, WHOLE_CALLS, AnalyticalModel
from hw_models.descriptor import DeviceDescriptor, DeviceError, list_devices, load_device
from hw_models.efficiencies import _CPU, _GPU, efficiencies
from hw_models.model import PART_COLUMNS
from hw_models.workload import STEP_COLUMNS, workload
from ops.layers import draw_masks_, sparsify
from ops.plan import Plan, lower

# Round figures: 1 GFLOP takes 10 ms, 1 MB in L2 10 us.
TOY = DeviceDescriptor(
    "toy", "cpu", "Toy", cores=4, threads=1, clock_max_ghz=2.0, flops_per_cycle=50, peak_gflops=100.0,
    bandwidth_measured_gbs=10.0, l2_bandwidth_gbs=100.0, l3_bandwidth_gbs=50.0, l2_kib=1024, l3_kib=8192, call_us=10.0,
    measured=True,
)  # fmt: skip


def step(**changes: object) -> pd.DataFrame:
    row: dict[str, object] = dict.fromkeys(STEP_COLUMNS, 0.0)
    row |= {
        "key": "k",
        "curve": "c",
        "family": "conv/specialised",
        "kind": "conv",
        "kernel": "specialised",
        "pattern": "",
    }
    row |= {"density": 1.0, "channels_out": 64.0, "positions": 1024.0, "batch": 1.0}
    return pd.DataFrame([row | changes], columns=list(STEP_COLUMNS))


def network(density: float = 0.1, pattern: str = "unstructured") -> nn.Module:
    torch.manual_seed(0)
    wide = sparsify(nn.Conv2d(16, 32, 1), density, pattern)
    draw_masks_(wide, torch.Generator().manual_seed(0))
    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(stem, nn.ReLU(), wide, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 10))


def plan_of(module: nn.Module, kernel: str = "portable") -> Plan:
    plan = lower(module.eval(), torch.zeros(1, 3, 16, 16))
    return plan.with_kernels({op.name: kernel for op in plan.ops if op.kind == "conv2d" and op.pattern})


def price(model: AnalyticalModel, **changes: object) -> float:
    return float(model.step_ms(step(**changes))[0][0])


def test_a_step_costs_its_work_its_bytes_and_its_call() -> None:
    row = _CPU["conv", "specialised", "dense"]
    ms = price(AnalyticalModel(TOY), macs=1e6, in_bytes=2e5, out_bytes=1e5, weight_bytes=1e5)
    # 2e6 flops at 100 GFLOP/s: 0.02 ms; 4e5 bytes at 100 GB/s: 0.004 ms; call 0.01 ms
    assert ms == pytest.approx(0.02 / row.compute + 0.004 / row.bandwidth + 0.01 * row.calls)


@pytest.mark.parametrize(("size", "gbs"), [(5e5, 100.0), (4e6, 50.0), (4e7, 10.0)])
def test_bytes_come_from_the_level_they_fit_into(size: float, gbs: float) -> None:
    row = _CPU["halo", "lanes", ""]
    ms = price(AnalyticalModel(TOY), kind="halo", kernel="lanes", in_bytes=size)
    assert ms == pytest.approx(size / gbs / 1e6 / row.bandwidth + 0.01 * row.calls)


def every_step() -> pd.DataFrame:
    """A step for every row of the table and kind of zeros, over many sizes."""
    rng = np.random.default_rng(0)
    frames = []
    for kind, kernel, _ in _CPU:
        for pattern, density in (("", 1.0), ("unstructured", 0.1), ("4x1", 0.2), ("2:4", 0.5)):
            macs, in_, out, weights = 10 ** rng.uniform(0, 9, 4)
            changes = {"kind": kind or "torch.unheard_of", "kernel": kernel, "pattern": pattern, "density": density}
            frames.append(step(**changes, macs=macs, in_bytes=in_, out_bytes=out, weight_bytes=weights))
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("device", [TOY, *list_devices()], ids=str)
def test_no_price_is_below_the_roofline(device: DeviceDescriptor | str) -> None:
    model, steps = AnalyticalModel(device), every_step()
    ms, sigma = model.step_ms(steps)
    bound = model.bound_ms(steps)
    assert (ms >= bound * (1 - 1e-12)).all()
    assert np.isfinite(ms).all()
    assert (sigma > 0).all()
    assert (bound > 0).any()


def test_the_roofline_with_infinite_bandwidth_is_flops_over_peak() -> None:
    device = dataclasses.replace(TOY, bandwidth_measured_gbs=1e30, l2_bandwidth_gbs=1e30, l3_bandwidth_gbs=1e30)
    steps = every_step()
    np.testing.assert_allclose(AnalyticalModel(device).bound_ms(steps), 2 * steps["macs"] / 100 / 1e6, rtol=1e-9)


def test_the_roofline_of_no_work_is_bytes_over_bandwidth() -> None:
    assert AnalyticalModel(TOY).bound_ms(step(in_bytes=4e7))[0] == pytest.approx(4.0)


@pytest.mark.parametrize("name", list_devices())
def test_more_work_or_more_bytes_never_cost_less(name: str) -> None:
    model, steps = AnalyticalModel(name), every_step()
    before = model.step_ms(steps)[0]
    for column in ("macs", "in_bytes", "out_bytes", "weight_bytes"):
        assert (model.step_ms(steps.assign(**{column: 3 * steps[column]}))[0] >= before).all()


def test_each_kind_of_zeros_has_an_efficiency_of_its_own() -> None:
    for table in (_CPU, _GPU):
        for (_, _, weights), row in table.items():
            assert 0 < row.compute <= 1, weights
            assert 0 < row.bandwidth <= 3
    gpu = AnalyticalModel("h200-sxm")
    work = {"kind": "conv", "macs": 1e10, "positions": 1e6, "density": 0.5}
    dense, regular, anywhere = (price(gpu, **work, pattern=p) for p in ("", "2:4", "unstructured"))
    assert dense < regular < anywhere
    halved = price(gpu, **(work | {"macs": 0.5e10}), pattern="2:4")
    assert (
        halved < dense < price(gpu, **(work | {"macs": 0.5e10}), pattern="unstructured")
    )  # half the weights: 2:4 pays, any not
    cpu = AnalyticalModel("raspberry-pi-5")
    assert (
        len({price(cpu, macs=1e8, in_bytes=1e5, pattern=p, density=0.5) for p in ("", "2:4", "4x1", "unstructured")})
        >= 3
    )


def test_a_pair_is_as_irregular_as_its_less_regular_layer() -> None:
    patterns = {"2:4+unstructured": "sparse", "2:4+4x1": "block", "1:4": "n:m", "": "dense", "channel": "sparse"}
    frame = pd.concat([step(kernel="portable", pattern=p, density=0.5) for p in patterns])
    found = efficiencies(frame, "cpu")
    want = [_CPU["conv", "portable", name].compute for name in patterns.values()]
    assert len(set(want)) == 4
    np.testing.assert_array_equal(found.compute, want)


def test_twice_the_threads_halve_the_time_of_the_work() -> None:
    one, two = (AnalyticalModel(load_device("raspberry-pi-5").at_threads(n)) for n in (1, 2))
    assert price(two, macs=1e9) - price(two) == pytest.approx((price(one, macs=1e9) - price(one)) / 2)


def test_a_device_that_was_not_measured_is_less_sure() -> None:
    _, known = AnalyticalModel(TOY).step_ms(step(macs=1e6))
    _, guessed = AnalyticalModel(dataclasses.replace(TOY, measured=False)).step_ms(step(macs=1e6))
    assert guessed[0] > known[0] + 0.2


def test_a_device_without_peak_or_bandwidth_cannot_be_priced() -> None:
    with pytest.raises(DeviceError, match="bandwidth_gbs is not known"):
        AnalyticalModel(DeviceDescriptor("a", "cpu", "A", peak_gflops=1.0))
    with pytest.raises(DeviceError, match="peak_gflops"):
        AnalyticalModel(DeviceDescriptor("a", "cpu", "A", bandwidth_gbs=1.0))
    whole = DeviceDescriptor("a", "cpu", "A", cores=1, clock_max_ghz=1.0, flops_per_cycle=8.0, bandwidth_gbs=1.0)
    assert price(AnalyticalModel(whole), macs=1e9) > 250


@pytest.mark.parametrize("device", [TOY, load_device("raspberry-pi-4"), load_device("jetson-nano")], ids=lambda d: d.id)
@pytest.mark.parametrize("kernel", ["torch", "portable", "specialised"])
def test_a_network_costs_its_operations_and_its_calls(device: DeviceDescriptor, kernel: str) -> None:
    model, plan = AnalyticalModel(device), plan_of(network(), kernel)
    estimate = model.predict(plan)
    parts = estimate.parts
    assert tuple(parts.columns) == PART_COLUMNS
    assert list(parts["op"]) == [op.name for op in plan.ops]
    work = workload([plan])
    ms, _ = model.step_ms(work.steps)
    by_op = [
        sum(ms[i] for i, op in zip(work.ids, work.ops) if op == k) for k in range(len(plan.ops))
    ]  # the obvious twin
    np.testing.assert_allclose(parts["ms"], by_op)
    calls = WHOLE_CALLS + CALLS_PER_CALL * work.networks["calls"][0] * (device.device_class == "cpu")
    call_ms = {"toy": 0.01, "raspberry-pi-4": 0.014 * 3.6 / 1.5, "jetson-nano": 0.01}[device.id]
    assert estimate.ms == pytest.approx(sum(by_op) + calls * call_ms)
    assert parts["share"].sum() == pytest.approx(1.0)
    assert set(parts["source"]) == {estimate.source} == {"analytical"}
    assert 0 < estimate.lo_ms < estimate.ms / 1.3
    assert estimate.hi_ms > estimate.ms * 1.3
    assert ("was not measured" in estimate.note) == (not device.measured)


def test_many_networks_cost_what_each_costs_alone() -> None:
    model = AnalyticalModel("pixel-4")
    plans = [plan_of(network(d), k) for d, k in ((0.05, "portable"), (0.5, "specialised"), (0.2, "torch"))]
    many = model.predict_many(plans)
    assert list(many.columns) == ["ms", "lo_ms", "hi_ms", "source"]
    for row, plan in zip(many.itertuples(), plans):
        one = model.predict(plan)
        assert (row.ms, row.lo_ms, row.hi_ms) == pytest.approx((one.ms, one.lo_ms, one.hi_ms))
    pd.testing.assert_frame_equal(many, model.predict_many(workload(plans)))


def test_any_device_can_be_asked_for() -> None:
    plan = plan_of(network())
    found = AnalyticalModel(TOY).predict(plan, "raspberry-pi-5")
    assert found.ms == AnalyticalModel("raspberry-pi-5").predict(plan).ms
    many = AnalyticalModel(TOY).predict_many([plan], load_device("raspberry-pi-5"))
    assert many["ms"][0] == found.ms
    with pytest.raises(DeviceError, match="unknown device"):
        AnalyticalModel(TOY).predict(plan, "raspberry-pi-6")


def test_weights_need_not_exist() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    here = lower(module, torch.zeros(1, 3, 16, 16))
    nowhere = lower(module.to("meta"), torch.zeros(1, 3, 16, 16, device="meta"))
    assert AnalyticalModel(TOY).predict(nowhere).ms == AnalyticalModel(TOY).predict(here).ms


class _Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, dim=-1)


def test_an_operation_without_constants_is_priced_and_named() -> None:
    plan = lower(nn.Sequential(nn.Conv2d(3, 8, 3), _Odd()), torch.zeros(1, 3, 16, 16))
    estimate = AnalyticalModel(TOY).predict(plan)
    assert "no model knows cumsum: priced by the bytes" in estimate.note
    odd = estimate.parts.iloc[-1]
    assert odd["ms"] > 0
    assert odd["hi_ms"] / odd["ms"] > 4


def test_a_network_of_nothing_costs_its_call() -> None:
    estimate = AnalyticalModel(TOY).predict(lower(nn.Identity(), torch.zeros(1, 3)))
    assert len(estimate.parts) == 0
    assert 0 < estimate.ms < 0.01
    assert math.isfinite(estimate.hi_ms)
