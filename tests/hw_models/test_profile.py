"""A profile holds what was measured in place and what the model says, operation by operation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hw_models import profile as module
from hw_models.insitu import InPlace
from hw_models.measure import Measurement, Measurer
from hw_models.profile import NEVER, Profile, profile
from hw_models.tables import LayerTable
from ops.layers import draw_masks_, sparsify
from ops.plan import legal_kernels, lower
from ops.runtime import Runtime
from tests.hw_models.flat_model import MS_PER_MAC, FlatModel, flat_ms

X = torch.randn(2, 8, 6, 6)
BRIEF = Measurer(rounds=3, spacing_s=0.0, cap_rounds=3, blocks=2, min_block_ms=0.05)


def _network(density: float = 0.2) -> nn.Module:
    body = sparsify(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid()), density
    )
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net.eval()


@dataclass(frozen=True)
class Forbidden(Measurer):
    """Fails the test that measures."""

    def measure(self, *_: object, **__: object) -> dict[str, Measurement]:
        raise AssertionError("nothing was to be measured")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LayerTable:
    """One for all tests: what the first measures the others remember."""
    return LayerTable(tmp_path_factory.mktemp("profile") / "table.sqlite")


@pytest.fixture(scope="module")
def found(table: LayerTable) -> Profile:
    return profile(_network(), X, table=table, measurer=BRIEF, model=FlatModel(note="by hand"), notes=["from me"])


def test_there_is_a_row_for_every_operation_of_the_plan_in_order(found: Profile) -> None:
    plan = lower(_network(), X)
    assert list(found.table["op"]) == [op.name for op in plan.ops]
    assert list(found.table["nnz"]) == [op.nnz for op in plan.ops]
    assert (found.batch, found.threads) == (2, 1)
    assert found.notes == ("from me", "by hand")


def test_a_measured_profile_is_consistent(found: Profile) -> None:
    assert found.measured is not None
    assert found.dense is not None
    assert found.ms == found.measured.floor_ms
    assert found.gain == found.dense.floor_ms / found.measured.floor_ms
    rows = found.table
    whole = max(found.ms, rows["ms"].sum())  # with so few rounds the sum may be the larger one
    assert np.allclose(rows["share"], rows["ms"] / whole)
    assert 0 < rows["share"].sum() <= 1 + 1e-9
    layers = rows["kind"] == "conv2d"
    assert (rows.loc[layers, ["ms", "dense_ms", "sparse_ms"]] > 0).all(axis=None)
    assert rows.loc[~layers, ["dense_ms", "sparse_ms"]].isna().all(axis=None)  # the linear layer has no mask: no choice


def test_predictions_are_the_model_s_for_the_plan_all_dense_and_all_sparse(found: Profile) -> None:
    plan = lower(_network(), X).with_kernels(dict(zip(found.table["op"], found.table["kernel"], strict=True)))
    dense = plan.with_kernels(lambda op, legal: "torch")
    sparse = plan.with_kernels(lambda op, legal: op.kernel if op.kernel != "torch" else legal[-1])
    for row, op, on_torch, not_on_torch in zip(found.table.to_dict("records"), plan.ops, dense.ops, sparse.ops):
        assert row["predicted_ms"] == flat_ms(op)
        assert (row["predicted_lo_ms"], row["predicted_hi_ms"]) == (0.9 * flat_ms(op), 1.2 * flat_ms(op))
        assert row["predicted_source"] == "learned"
        if len(legal_kernels(op)) > 1:
            assert row["predicted_dense_ms"] == flat_ms(on_torch)
            assert row["predicted_sparse_ms"] == flat_ms(not_on_torch)
        else:
            assert math.isnan(row["predicted_dense_ms"])
    assert found.predicted is not None
    assert found.predicted_dense is not None
    assert found.predicted.ms == pytest.approx(sum(map(flat_ms, plan.ops)))
    assert found.predicted_dense.ms == pytest.approx(sum(map(flat_ms, dense.ops)))


def test_a_dense_network_is_its_own_dense_twin_and_measured_once(table: LayerTable) -> None:
    found = profile(nn.Linear(6, 3), X, table=table, measurer=BRIEF)
    assert found.measured is found.dense
    assert found.gain == 1
    assert found.predicted is None
    assert found.table["predicted_ms"].isna().all()


def test_no_time_of_any_step_is_lost_when_steps_are_added_up_by_operation() -> None:
    runtime = Runtime(lower(_network(), X))
    steps = len(runtime.schedule.steps)
    times = np.arange(1.0, steps + 1)
    whole = Measurement(1, 1, 1, 1, 1, "ok", (1,))
    by_op = module._by_op(runtime, InPlace(whole, times, times[None], float(times.sum())))
    slow = [0.0] * len(runtime.plan.ops)
    for step, ms in zip(runtime.schedule.steps, times):
        slow[min(step.op, len(slow) - 1)] += ms
    assert by_op.tolist() == slow
    assert by_op.sum() == times.sum()
    assert steps > len(slow)  # conversions and halos are there to be lost


def test_the_network_dense_and_sparse_are_one_measuring_run(table: LayerTable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = module.measure_in_place

    def spy(networks: Mapping[str, tuple[Runtime, torch.Tensor]], measurer: Measurer) -> dict[str, InPlace]:
        asked.append([f"{name}: {runtime.plan.ops[0].kernel}" for name, (runtime, _) in networks.items()])
        return real(networks, measurer)

    monkeypatch.setattr(module, "measure_in_place", spy)
    found = profile(_network(), X, table=table, measurer=BRIEF)
    kernel = found.table["kernel"][0]
    assert len(asked) == 1
    assert asked[0][:2] == [f"network: {kernel}", "dense: torch"] if kernel != "torch" else ["network: torch"]


def test_predicting_only_measures_nothing_and_takes_the_model_s_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def cheapest(plan: object, model: object) -> object:
        return lower(_network(), X, lambda op, legal: "portable")

    monkeypatch.setattr(module, "_fastest_by", cheapest)
    found = profile(_network(), X, measure=False, model=FlatModel(), measurer=Forbidden())
    assert set(found.table["kernel"][:1]) == {"portable"}
    assert found.measured is None
    assert found.table[["ms", "dense_ms", "sparse_ms", "torch_ms"]].isna().all(axis=None)
    assert found.table["share"].sum() == pytest.approx(1)
    assert found.predicted is not None
    assert found.ms == found.predicted.ms
    assert found.gain == pytest.approx(found.predicted_dense.ms / found.predicted.ms)  # type: ignore[union-attr]


@pytest.mark.parametrize(("said", "expected"), [(0.31, 0.31), (None, NEVER), (0.0, 0.0), (1.7, NEVER)])
def test_crossovers_stand_beside_their_layers(
    said: float | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_fastest_by", lambda plan, model: plan)
    monkeypatch.setattr(module, "crossovers", lambda plan, model: {plan.ops[2].name: said})
    found = profile(_network(), X, measure=False, model=FlatModel())
    assert found.table["crossover_density"][2] == expected
    assert found.table["crossover_density"].isna().sum() == len(found.table) - 1


def test_crossovers_are_found_by_asking_the_model(found: Profile) -> None:
    layers = found.table[found.table["kind"] == "conv2d"]
    best = legal_kernels(lower(_network(), X).ops[0])[-1]
    kernels = [kernel if kernel != "torch" else best for kernel in layers["kernel"]]
    assert layers["crossover_density"].tolist() == pytest.approx([MS_PER_MAC["torch"] / MS_PER_MAC[k] for k in kernels])


def test_nothing_to_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a model or measure=True"):
        profile(_network(), X, measure=False)
