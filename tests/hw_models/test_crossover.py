"""Crossovers found by asking a model for other densities are where its curves cross."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hw_models.crossover import DENSITIES, _crossing, at_density, crossovers
from ops.layers import draw_masks_, sparsify
from ops.masks import kept_count
from ops.patterns import parse_pattern
from ops.plan import Plan, legal_kernels, lower
from ops.schedule import schedule
from tests.hw_models.flat_model import CALL_MS, MS_PER_MAC, FlatModel

X = torch.randn(1, 16, 8, 8)


def _plan(pattern: str = "unstructured", density: float = 0.2, kernel: str = "portable") -> Plan:
    net = nn.Sequential(
        sparsify(nn.Conv2d(16, 16, 3, padding=1), density, pattern), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Flatten()
    )
    draw_masks_(net, torch.Generator().manual_seed(0))
    return lower(net, X, lambda op, legal: kernel if kernel in legal else legal[-1])


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "channel"])
@pytest.mark.parametrize("kernel", ["portable", "specialised"])
def test_a_flat_model_s_crossover_is_the_ratio_of_its_prices(pattern: str, kernel: str) -> None:
    plan = _plan(pattern, 0.25, kernel)
    if plan.ops[0].kernel != kernel:
        pytest.skip(f"no {kernel} kernels on this machine")
    found = crossovers(plan, FlatModel())
    assert list(found) == [op.name for op in plan.ops if len(legal_kernels(op)) > 1]
    for value in found.values():
        assert value == pytest.approx(MS_PER_MAC["torch"] / MS_PER_MAC[kernel], rel=1e-6)


def test_layers_on_torch_are_asked_about_on_a_sparse_kernel() -> None:
    plan = _plan(kernel="torch")
    best = legal_kernels(plan.ops[0])[-1]
    found = crossovers(plan, FlatModel())
    assert found[plan.ops[0].name] == pytest.approx(MS_PER_MAC["torch"] / MS_PER_MAC[best], rel=1e-6)


def test_layers_of_fixed_density_and_other_operations_have_none() -> None:
    plan = _plan("2:4", 0.5)
    assert list(crossovers(plan, FlatModel())) == [op.name for op in plan.ops[1:] if len(legal_kernels(op)) > 1]
    assert crossovers(lower(nn.Sequential(nn.Flatten(), nn.Linear(1024, 3)), X), FlatModel()) == {}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_a_layer_at_another_density_is_the_one_that_would_be_planned(density: float, pattern: str) -> None:
    changed = at_density(_plan(pattern).ops[0], density)
    fresh = _plan(pattern, density).ops[0]
    kept = kept_count((16, 16, 3, 3), density, parse_pattern(pattern)) if density < 1 else 16 * 16 * 9
    assert changed.nnz == kept
    if density < 1:
        assert (changed.nnz, changed.macs, changed.density) == (fresh.nnz, fresh.macs, fresh.density)
    assert changed.dense_macs == fresh.dense_macs
    assert changed.layer is not None
    assert changed.layer.nnz == kept


def test_changed_plans_can_be_scheduled_and_have_the_steps_of_fresh_ones() -> None:
    plan, fresh = _plan(), _plan(density=0.4)
    changed = replace(plan, ops=(at_density(plan.ops[0], 0.4), *plan.ops[1:]))
    one, two = schedule(changed), schedule(fresh)
    assert [(s.kind, s.kernel, one.key(s)) for s in one.steps] == [(s.kind, s.kernel, two.key(s)) for s in two.steps]


def _slow_crossing(density: list[float], sparse: list[float], dense: float) -> float | None:
    """By walking a fine grid down from density 1."""
    grid = np.linspace(density[0], density[-1], 200_001)[::-1]
    values = np.interp(grid, density, sparse)
    below = np.flatnonzero(values <= dense)
    return 0.0 if not len(below) else None if below[0] == 0 else float(grid[below[0]])


def test_the_crossing_is_where_a_fine_grid_finds_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        density = np.sort(rng.uniform(0.01, 1, 6))
        sparse = np.sort(rng.uniform(0.1, 2, 6)) if rng.random() < 0.7 else rng.uniform(0.1, 2, 6)
        dense = float(rng.uniform(0, 2.2))
        slow = _slow_crossing(list(density), list(sparse), dense)
        fast = _crossing(density, sparse, dense)
        assert (fast is None) == (slow is None)
        if slow is not None:
            assert fast == pytest.approx(slow, abs=2e-5)


def test_always_and_never() -> None:
    density = np.array([0.1, 0.5, 1.0])
    assert _crossing(density, np.array([1.0, 2.0, 3.0]), 0.5) == 0.0
    assert _crossing(density, np.array([1.0, 2.0, 3.0]), 3.0) is None
    assert _crossing(density, np.array([CALL_MS] * 3), CALL_MS) is None
