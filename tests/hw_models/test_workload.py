"""Plans as rows of numbers: nothing is lost, equal steps are one row, and weights on the meta device count the same."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from hw_models.probes import probe
from hw_models.workload import LEAST_DENSITY, NETWORK_COLUMNS, STEP_COLUMNS, STEP_NUMBERS, workload
from ops.kernels.lanes import LANES
from ops.layers import SparseConv2d, draw_masks_
from ops.plan import lower
from ops.schedule import schedule

X = torch.randn(1, 8, 8, 8)


def _conv(density: float, pattern: str = "unstructured") -> nn.Module:
    net = nn.Sequential(SparseConv2d(8, 16, 3, padding=1, density=density, pattern=pattern), nn.ReLU())
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net.eval()


def _some(count: int = 6) -> list:
    rng = random.Random(4)
    return [lower(module, example) for _, module, example in (probe(rng) for _ in range(count))]


def test_columns_are_the_documented_ones_and_numbers_are_finite_and_not_negative() -> None:
    work = workload(_some())
    assert tuple(work.steps.columns) == STEP_COLUMNS
    assert tuple(work.networks.columns) == NETWORK_COLUMNS
    numbers = work.steps[list(STEP_NUMBERS)].to_numpy()
    assert np.isfinite(numbers).all()
    assert (numbers >= 0).all()
    assert ((work.steps["density"] > 0) & (work.steps["density"] <= 1)).all()


def test_every_executed_step_is_there_once_and_in_order() -> None:
    plans = _some()
    work = workload(plans)
    assert len(work) == len(plans)
    for k, plan in enumerate(plans):
        steps = schedule(plan).steps
        assert [f"{s.kind if s.kind != 'torch' else 'torch.' + plan.ops[s.op].kind}/{s.kernel}" for s in steps] == list(
            work.steps["family"].iloc[work.of(k)]
        )


def test_sums_are_those_of_a_loop() -> None:
    work = workload(_some())
    per_step = np.random.default_rng(0).random(len(work.steps))
    slow = [sum(per_step[i] for i in work.of(k)) for k in range(len(work))]
    np.testing.assert_allclose(work.sums(per_step), slow, rtol=1e-9)


def test_a_subset_keeps_what_its_networks_execute() -> None:
    work = workload(_some())
    part = work.subset([4, 1])
    assert [part.of(0).tolist(), part.of(1).tolist()] == [work.of(4).tolist(), work.of(1).tolist()]
    assert part.networks["name"].tolist() == ["4", "1"]


def test_equal_networks_share_all_their_steps() -> None:
    plan, again = lower(_conv(0.2), X), lower(_conv(0.2), X)
    assert len(workload([plan, again]).steps) == len(workload([plan]).steps)


def test_the_meta_device_gives_the_same_numbers() -> None:
    for density, pattern in ((1.0, "unstructured"), (0.1, "unstructured"), (0.25, "4x1"), (0.5, "2:4")):
        real = _conv(density, pattern)
        meta = _conv(density, pattern).to("meta")
        a, b = workload([lower(real, X)]), workload([lower(meta, X.to("meta"))])
        assert a.steps.equals(b.steps)


def test_densities_share_a_curve_and_patterns_do_not() -> None:
    rows = {
        (density, pattern): workload([lower(_conv(density, pattern), X)]).steps.query("nnz > 0").iloc[0]
        for density, pattern in ((0.1, "unstructured"), (0.2, "unstructured"), (0.2, "4x1"), (1.0, "unstructured"))
    }
    sparse, denser = rows[0.1, "unstructured"], rows[0.2, "unstructured"]
    assert sparse["curve"] == denser["curve"]
    assert sparse["key"] != denser["key"]
    assert len({rows[0.2, "4x1"]["curve"], denser["curve"], rows[1.0, "unstructured"]["curve"]}) == 3


def test_macs_are_those_executed_with_idle_lanes() -> None:
    plan = lower(_conv(0.1), X)
    row = workload([plan]).steps.query("nnz > 0").iloc[0]
    assert row["nnz"] == plan.ops[0].nnz
    assert row["dense_macs"] == plan.dense_macs
    assert row["macs"] == plan.ops[0].nnz * row["tiles"] * LANES
    assert row["macs"] >= plan.macs


def test_a_layer_torch_runs_computes_its_zeros() -> None:
    plan = lower(_conv(0.1), X, choose=lambda op, kernels: "torch")
    row = workload([plan]).steps.query("kernel == 'torch' and nnz > 0").iloc[0]
    assert row["macs"] == row["dense_macs"] == plan.dense_macs
    assert row["density"] == 1.0
    assert json.loads(row["curve"].rpartition("@")[0])["nnz"] is None


def test_zeros_do_not_tell_layers_apart_that_torch_runs() -> None:
    rows = [
        workload([lower(_conv(density, pattern), X, choose=lambda op, kernels: "torch")]).steps.query("nnz > 0").iloc[0]
        for density, pattern in ((0.1, "unstructured"), (0.3, "4x1"), (1.0, "unstructured"))
    ]
    assert len({row["key"] for row in rows}) == len({row["curve"] for row in rows}) == 1


def test_calls_count_what_python_calls() -> None:
    all_torch = lower(_conv(1.0), X, choose=lambda op, kernels: "torch")
    assert workload([all_torch]).networks["calls"].iloc[0] == len(all_torch.ops)


def test_each_plan_needs_a_name() -> None:
    with pytest.raises(ValueError, match="1 plans need as many names, got 2"):
        workload([lower(_conv(0.2), X)], ["a", "b"])


def test_bytes_handed_over_are_those_of_tensors_that_kernels_fill_for_torch() -> None:
    plan = lower(_conv(0.1), X)
    assert workload([plan]).networks["handed_bytes"].iloc[0] == 4 * 16 * 8 * 8
    dense = lower(_conv(1.0), X, choose=lambda op, kernels: "torch")
    assert workload([dense]).networks["handed_bytes"].iloc[0] == 0


def test_a_layer_that_keeps_nothing_can_be_priced() -> None:
    net = _conv(0.2)
    net[0].set_mask(torch.zeros_like(net[0].mask))
    row = workload([lower(net, X)]).steps.query("kind == 'conv'").iloc[0]
    assert row["nnz"] == 0
    assert 0 < row["density"] <= LEAST_DENSITY
