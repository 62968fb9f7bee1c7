"""Measured latency: the faster kernel of each layer is chosen, remembered, and the whole network is what is timed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hw_models import latency
from hw_models.device import runtime_id
from hw_models.latency import measure_latency, measure_many
from hw_models.measure import Measurement, Measurer
from hw_models.tables import LayerTable
from ops.layers import draw_masks_, sparsify
from ops.runtime import Runtime

X = torch.randn(1, 8, 6, 6)


def _network(density: float) -> nn.Module:
    body = sparsify(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), density
    )
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net


@dataclass(frozen=True)
class Told(Measurer):
    """A measurer that is told what to find: times by the end of the name. Calls everything once."""

    times: tuple[tuple[str, float], ...] = ()
    asked: tuple[list[list[str]], ...] = ()

    def measure(self, items: Mapping[str, Callable[[], object]]) -> dict[str, Measurement]:
        self.asked[0].append(list(items))
        for call in items.values():
            call()
        found = {name: next((ms for end, ms in self.times if name.endswith(end)), 0.01) for name in items}
        return {name: Measurement(ms, ms, ms, ms, ms, "ok", (ms,)) for name, ms in found.items()}


def _told(**times: float) -> Told:
    return Told(times=tuple((f"on {kernel}", ms) for kernel, ms in times.items()), asked=([],))


@pytest.fixture
def table(tmp_path: Path) -> LayerTable:
    return LayerTable(tmp_path / "table.sqlite")


@pytest.mark.parametrize(("sparse", "expected"), [(0.5, "portable"), (2.0, "torch"), (1.0, "torch")])
def test_the_faster_kernel_is_chosen_and_a_tie_stays_dense(table: LayerTable, sparse: float, expected: str) -> None:
    found = measure_latency(_network(0.3), X, table=table, measurer=_told(torch=1.0, portable=sparse, specialised=9.0))
    assert list(found.plan.frame()["kernel"]) == [expected, expected, "torch", "torch", "torch"]
    parts = found.parts
    assert list(parts["kernel"]) == list(found.plan.frame()["kernel"])
    assert parts["portable_ms"].tolist()[:2] == pytest.approx([sparse] * 2, abs=0.03)  # and the halo
    assert parts["portable_ms"][2:].isna().all()
    assert parts["torch_ms"].tolist() == [1.0] * 5
    assert parts["ms"].tolist()[:2] == pytest.approx([min(1.0, sparse)] * 2, abs=0.05)
    assert parts["share"].sum() == pytest.approx(1)


def test_the_whole_decides_where_conversions_eat_the_gain(table: LayerTable) -> None:
    """Every layer is faster in lanes, but the whole was measured to be slower: plans are named in the order they are tried."""
    whole = (("plan 0", 5.0), ("plan 1", 1.0))
    told = _told(torch=1.0, portable=0.5, specialised=9.0)
    found = measure_latency(_network(0.3), X, table=table, measurer=replace(told, times=(*whole, *told.times)))
    assert set(found.plan.frame()["kernel"]) == {"torch"}


def test_small_dense_layers_are_tried_on_sparse_kernels(table: LayerTable) -> None:
    net = nn.Conv2d(32, 32, 3, padding=1)
    found = measure_latency(
        net, torch.randn(1, 32, 8, 8), table=table, measurer=_told(torch=1.0, portable=0.1, specialised=0.2)
    )
    assert found.plan.ops[0].macs <= latency.FEW_MACS
    assert found.plan.ops[0].kernel == "portable"


def test_layers_that_keep_most_weights_stay_dense_untried(table: LayerTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "FEW_MACS", 0)
    measurer = _told(torch=1.0, portable=0.1, specialised=0.1)
    net = sparsify(nn.Conv2d(64, 8, 3), latency.DENSE_FROM)
    draw_masks_(net, torch.Generator().manual_seed(0))
    found = measure_latency(net, torch.randn(1, 64, 6, 6), table=table, measurer=measurer)
    assert set(found.plan.frame()["kernel"]) == {"torch"}
    assert not any("portable" in name or "specialised" in name for run in measurer.asked[0] for name in run)


def test_depthwise_convolutions_try_both_kernels_at_any_density(table: LayerTable) -> None:
    found = measure_latency(nn.Conv2d(8, 8, 3, groups=8), X, table=table, measurer=_told(torch=1.0, portable=0.1))
    assert found.plan.ops[0].kernel == "portable"


def test_identical_layers_are_measured_once_and_remembered(table: LayerTable) -> None:
    measurer = _told(torch=1.0, portable=0.5, specialised=9.0)
    measure_latency(_network(0.3), X, table=table, measurer=measurer)
    names = [name for run in measurer.asked[0] for name in run]
    assert names.count("0.0 on torch") == 1
    assert names.count("0.0 on portable") == 1
    assert "0.2 on torch" not in names  # the same layer
    before = len(table)

    again = _told(torch=0.1, portable=0.5, specialised=9.0)  # would choose torch now, but the table knows better
    found = measure_latency(_network(0.3), X, table=table, measurer=again)
    assert [len(run) for run in again.asked[0]] == [2, 1]  # two plans against each other, and the whole
    assert found.plan.ops[0].kernel == "portable"
    assert len(table) == before

    threads = _told(torch=0.1, portable=0.5, specialised=9.0)  # another runtime: measured again
    found = measure_latency(_network(0.3), X, table=table, measurer=threads, threads=2)
    assert found.plan.ops[0].kernel == "torch"
    assert len(table) > before


def test_what_cannot_be_traced_is_measured_but_not_remembered(table: LayerTable) -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 1e9 else -x

    for _ in range(2):
        measurer = _told(torch=1.0)
        found = measure_latency(nn.Sequential(Moody(), nn.Flatten()), X, table=table, measurer=measurer)
        assert "0 (Moody) on torch" in measurer.asked[0][0]
        assert len(table) == 1
    assert found.parts["op"].tolist() == ["0 (Moody)", "1"]


def test_whole_networks_are_measured_together(table: LayerTable) -> None:
    measurer = _told(torch=1.0, portable=0.5, specialised=9.0)
    found = measure_many({0.1: (_network(0.1), X), "dense": (_network(1.0), X)}, table=table, measurer=measurer)
    assert list(found) == [0.1, "dense"]
    assert len(measurer.asked[0][-1]) == 2
    assert found["dense"].plan.macs == found["dense"].plan.dense_macs > found[0.1].plan.macs


def test_the_plan_returned_gives_the_network_s_results(table: LayerTable) -> None:
    net = _network(0.3).eval()
    found = measure_latency(net, X, table=table, measurer=_told(torch=1.0, portable=0.5, specialised=9.0))
    with torch.no_grad():
        torch.testing.assert_close(Runtime(found.plan)(X), net(X), rtol=1e-4, atol=1e-6)


def test_a_real_measurement_is_consistent(table: LayerTable) -> None:
    measurer = Measurer(rounds=3, spacing_s=0.01, cap_rounds=4)
    found = measure_latency(_network(0.1), X, table=table, measurer=measurer)
    assert 0 < found.lo_ms <= found.ms <= found.hi_ms
    assert found.ms <= found.median_ms <= found.p90_ms
    assert found.source == "measured"
    assert all(math.isfinite(ms) and ms >= 0 for ms in found.parts["ms"])  # a view costs nothing
    runtime = Runtime(found.plan)
    step = next(step for step in runtime.schedule.steps if step.op == 0 and step.kernel == found.plan.ops[0].kernel)
    known = table.lookup(runtime_id(1), str(runtime.schedule.key(step)), step.kernel)
    assert known is not None
    assert 0 < known.floor_ms <= found.parts["ms"][0]
