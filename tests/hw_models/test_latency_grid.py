"""Grids: what they say at each density, where dense wins, and how they are made of tables, curves and models."""

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hw_models.analytical import AnalyticalModel
from hw_models.curves import Curve
from hw_models.latency_grid import LatencyGrid
from hw_models.model import Estimate, LatencyModel
from ops.layers import SparseConv2d
from ops.plan import Plan, lower

NAN = math.nan


def naive(x: list[float], y: list[float], dense: float, floor: float, allowed: bool, d: float) -> float:
    """The definition, one number at a time: a line through two neighbouring points, the outermost ones prolonged."""
    if not x:
        return dense
    if d >= 1 and not math.isnan(dense):
        return dense
    if len(x) == 1:
        value = min(floor, y[0]) + (y[0] - min(floor, y[0])) * d / x[0]
    else:
        i = 0
        while i + 2 < len(x) and d >= x[i + 1]:
            i += 1
        value = y[i] + (d - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])
    value = max(value, floor)
    return min(value, dense) if allowed and not math.isnan(dense) else value


def random_grid(rng: np.random.Generator, candidates: int = 4, points: int = 5, allowed: bool = True) -> LatencyGrid:
    """Candidates with all, some, one and no sparse points; some without a dense time."""
    densities = np.sort(rng.choice(np.arange(1, 101), points, replace=False)) / 100
    ms = np.sort(rng.uniform(0.1, 5, (candidates, points)), axis=1)
    ms[rng.random(ms.shape) < 0.3] = NAN
    dense = rng.uniform(0.1, 5, candidates)
    dense[rng.random(candidates) < 0.3] = NAN
    ms[0], dense[0] = NAN, rng.uniform(0, 1)
    if candidates > 1:
        ms[1, 1:], ms[1, 0] = NAN, 0.7
    lost = np.isnan(ms).all(axis=1) & np.isnan(dense)
    dense[lost] = 1.5
    names = [f"op{i}" for i in range(candidates)]
    return LatencyGrid.from_arrays(
        names, densities, ms, dense, floor_ms=rng.uniform(0, 1.5, candidates), dense_allowed=allowed
    )


@pytest.mark.parametrize("seed", range(12))
def test_predict_equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = random_grid(rng, candidates=int(rng.integers(1, 6)), points=int(rng.integers(1, 7)), allowed=seed % 3 > 0)
    densities = np.concatenate([rng.uniform(0.001, 1, 40), grid.densities, [1.0, 0.01]])
    found = grid.predict(densities)
    assert found.shape == (len(grid.candidates), len(densities))
    for i in range(len(grid.candidates)):
        known = ~np.isnan(grid.ms[i])
        x, y = grid.densities[known].tolist(), grid.ms[i][known].tolist()
        wanted = [
            naive(x, y, float(grid.dense_ms[i]), float(grid.floor_ms[i]), grid.dense_allowed, float(d))
            for d in densities
        ]
        np.testing.assert_allclose(found[i], wanted, rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_time_never_falls_with_density_while_a_mask_is_on(seed: int) -> None:
    grid = random_grid(np.random.default_rng(seed), candidates=6)
    assert (np.diff(grid.predict(np.linspace(0.001, 0.999, 200)), axis=1) >= -1e-12).all()


def test_rows_are_sorted_and_made_monotone_by_hand() -> None:
    grid = LatencyGrid.from_arrays(["a"], [0.5, 0.1, 0.3], [[2.0, 1.5, 0.5]])
    assert grid.densities.tolist() == [0.1, 0.3, 0.5]
    assert grid.ms.tolist() == [[1.0, 1.0, 2.0]]  # 1.5 and 0.5 pooled


def test_at_a_priced_point_the_grid_gives_that_price_and_dense_stands_apart() -> None:
    grid = LatencyGrid.from_arrays(["conv"], [0.1, 0.5], [[1.0, 3.0]], [9.0])
    assert grid.predict([0.1, 0.3, 0.5, 0.99, 1.0]).tolist() == [pytest.approx([1.0, 2.0, 3.0, 5.45, 9.0])]


def test_where_dense_is_faster_a_masked_layer_runs_dense_unless_it_may_not() -> None:
    table: dict[str, Any] = {"candidates": ["conv"], "densities": [0.1, 0.5], "ms": [[1.0, 3.0]], "dense_ms": [2.0]}
    free, bound = LatencyGrid.from_arrays(**table), LatencyGrid.from_arrays(**table, dense_allowed=False)
    assert free.predict([0.1, 0.5, 1.0]).tolist() == [[1.0, 2.0, 2.0]]
    assert bound.predict([0.1, 0.5, 1.0]).tolist() == [[1.0, 3.0, 2.0]]


def test_a_candidate_without_weights_costs_the_same_at_every_density() -> None:
    grid = LatencyGrid.from_arrays(["skip", "conv"], [0.2], [[NAN], [1.0]], [0.25, 4.0], dense_allowed=False)
    assert grid.predict([0.01, 0.2, 0.9, 1.0])[0].tolist() == [0.25] * 4


def test_crossover_by_hand() -> None:
    grid = LatencyGrid.from_arrays(
        ["crosses", "never", "always", "pool", "not priced dense", "floor above dense"],
        [0.1, 0.5],
        [[1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [NAN, NAN], [1.0, 3.0], [1.0, 3.0]],
        [2.0, 6.0, 0.4, 1.0, NAN, 1.0],
        floor_ms=[0, 0, 0, 0, 0, 1.2],
    )
    assert grid.crossover("crosses") == pytest.approx(0.3)
    assert grid.crossover("never") is None
    assert grid.crossover("always") == 0.0
    assert grid.crossover("pool") is None
    assert grid.crossover("not priced dense") is None
    assert grid.crossover("floor above dense") == 0.0
    with pytest.raises(KeyError, match='no candidate "conv"; there are crosses, never'):
        grid.crossover("conv")


@pytest.mark.parametrize("seed", range(8))
def test_below_the_crossover_sparse_is_faster_and_above_it_dense_is(seed: int) -> None:
    grid = random_grid(np.random.default_rng(seed), candidates=6)
    for i, name in enumerate(grid.candidates):
        crossing = grid.crossover(name)
        if crossing is None:
            continue
        above = grid.predict(np.linspace(crossing + 1e-9, 0.999, 20))[i]
        np.testing.assert_allclose(above, grid.dense_ms[i])
        if crossing > 0:
            assert (grid.predict(np.linspace(1e-6, crossing * 0.999, 20))[i] < grid.dense_ms[i]).all()


def test_a_grid_of_curves_says_what_the_curves_say() -> None:
    curves = {
        "a": Curve.fit([0.05, 0.2, 0.6], [0.5, 0.9, 3.0], dense_ms=2.0, floor_ms=0.6),
        "b": Curve.fit([0.1, 0.3], [0.2, 0.4]),
        "one point": Curve.fit([0.5], [2.0], floor_ms=1.0),
    }
    grid = LatencyGrid.from_curves({**curves, "skip": 0.1})
    d = np.linspace(0.01, 0.99, 99)
    for i, curve in enumerate(curves.values()):
        cap = math.inf if curve.dense_ms is None else curve.dense_ms
        np.testing.assert_allclose(grid.predict(d)[i], np.minimum(curve.predict(d), cap), rtol=1e-12)
    assert grid.crossover("a") == pytest.approx(curves["a"].crossover())
    assert grid.predict(0.5)[3] == 0.1


class TableModel(LatencyModel):
    """Prices what it is told to: plans here carry their own time."""

    def predict(self, plan: Any, device: Any = None) -> Estimate:
        raise NotImplementedError

    def predict_many(self, plans: Sequence[Any], device: Any = None) -> pd.DataFrame:  # type: ignore[override]
        self.device = device
        return pd.DataFrame({"ms": [p.ms for p in plans], "source": [p.source for p in plans]})


def plan(ms: float, source: str = "measured") -> Any:
    return SimpleNamespace(ms=ms, source=source)


def test_a_grid_of_a_model_holds_its_prices_by_candidate_and_density() -> None:
    model = TableModel()
    grid = LatencyGrid.from_model(
        model,
        {"skip": plan(0.0), "conv": {0.5: plan(3.0, "learned"), 1: plan(4.0), 0.1: plan(1.0)}, "sep": {0.2: plan(0.7)}},
        "some device",
    )
    assert model.device == "some device"
    assert grid.densities.tolist() == [0.1, 0.2, 0.5]
    np.testing.assert_array_equal(grid.ms, [[NAN, NAN, NAN], [1.0, NAN, 3.0], [NAN, 0.7, NAN]])
    np.testing.assert_array_equal(grid.dense_ms, [0.0, 4.0, NAN])
    assert grid.source == "learned"  # the least sure


def test_of_whole_networks_the_one_without_the_operation_is_subtracted() -> None:
    plans = {"skip": plan(9.5), "conv": {1.0: plan(14.0), 0.1: plan(11.0)}}
    grid = LatencyGrid.from_model(TableModel(), plans, without=plan(10.0))
    assert grid.ms.tolist()[1] == [1.0]
    assert grid.dense_ms.tolist() == [0.0, 4.0]  # never negative


def test_a_grid_of_real_plans_holds_what_the_model_says_of_each() -> None:
    example = torch.zeros(1, 8, 8, 8)

    def lowered(density: float) -> Plan:
        layer = SparseConv2d(8, 8, 3, padding=1, density=density)
        if density < 1:
            layer.set_mask(torch.rand_like(layer.weight) < density)
        return lower(layer.eval(), example)

    model = AnalyticalModel("xeon-avx512")
    plans: dict[str, Any] = {
        "pool": lower(nn.MaxPool2d(3, 1, 1).eval(), example),
        "conv": {density: lowered(density) for density in (1.0, 0.5, 0.1)},
    }
    grid = LatencyGrid.from_model(model, plans)
    for density, plan_ in plans["conv"].items():
        assert grid.predict(density)[1] == pytest.approx(min(model.predict(plan_).ms, grid.dense_ms[1]))
    assert grid.predict(0.3)[0] == pytest.approx(model.predict(plans["pool"]).ms)
    assert grid.predict(0.1)[1] < grid.predict(0.5)[1]
    assert grid.source == "analytical"


@pytest.mark.parametrize("seed", range(4))
def test_json_there_and_back_changes_nothing(seed: int) -> None:
    grid = random_grid(np.random.default_rng(seed))
    back = LatencyGrid.from_dict(json.loads(json.dumps(grid.to_dict(), allow_nan=False)))
    for name in ("densities", "ms", "dense_ms", "floor_ms"):
        np.testing.assert_array_equal(getattr(back, name), getattr(grid, name))
    assert (back.candidates, back.dense_allowed, back.source) == (grid.candidates, grid.dense_allowed, grid.source)
    dense_only = LatencyGrid.from_arrays(["skip"], dense_ms=[0.5])
    assert LatencyGrid.from_dict(json.loads(json.dumps(dense_only.to_dict()))).predict(0.3).tolist() == [0.5]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"candidates": []}, "C >= 1"),
        ({"candidates": ["a"], "densities": [0.1, 0.5], "ms": [[1.0]]}, r"got shapes \(1, 1\)"),
        ({"candidates": ["a", "a"], "dense_ms": [1, 2]}, "different names, got a, a"),
        ({"candidates": ["a"], "densities": [0.0], "ms": [[1.0]]}, r"ascend within \(0, 1\], got \[0.0\]"),
        ({"candidates": ["a"], "densities": [0.2, 0.2], "ms": [[1.0, 1.0]]}, "ascend"),
        ({"candidates": ["a"], "densities": [0.2], "ms": [[-1.0]]}, 'ms of candidate "a" must be 0 or more and finite'),
        ({"candidates": ["a", "b"], "dense_ms": [1.0, math.inf]}, 'dense_ms of candidate "b" must be 0 or more'),
        ({"candidates": ["a"], "dense_ms": [1.0], "floor_ms": NAN}, "floor_ms must be 0 or more for every candidate"),
        ({"candidates": ["a", "b"], "dense_ms": [1.0, NAN]}, 'candidate "b" has no time at all'),
    ],
)
def test_tables_that_make_no_grid_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyGrid.from_arrays(**table)


def test_what_is_no_grid_on_disk_is_refused() -> None:
    good = LatencyGrid.from_arrays(["a"], [0.1, 0.5], [[1.0, 2.0]]).to_dict()
    with pytest.raises(ValueError, match=r'expected a "latency grid 1".*found format None'):
        LatencyGrid.from_dict({"ms": []})
    with pytest.raises(ValueError, match='"a" falls with density'):
        LatencyGrid.from_dict({**good, "ms": [[2.0, 1.0]]})
