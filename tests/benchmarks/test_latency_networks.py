"""The networks of the latency benchmark: the same every time, zeros of all kinds, runnable as planned."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from benchmarks.latency.networks import (
    LEAST,
    PATTERNS,
    RARE_PATTERNS,
    SETTINGS,
    Spec,
    draw_targets_,
    space_of,
    specs,
)
from ops.layers import is_depthwise, sparse_layers
from ops.masks import kept_count, satisfies
from ops.plan import lower
from ops.runtime import Runtime


def test_a_longer_benchmark_begins_with_the_shorter_one() -> None:
    assert specs(80)[:30] == specs(30)
    assert specs(30, seed=1) != specs(30)


def test_every_setting_is_there_and_names_are_unique() -> None:
    made = specs(2 * sum(setting.share for setting in SETTINGS.values()))
    assert Counter(spec.setting for spec in made) == {name: 2 * s.share for name, s in SETTINGS.items()}
    assert len({spec.name for spec in made}) == len(made)


def test_two_networks_in_a_row_are_one_architecture_with_other_zeros() -> None:
    for one, two in zip(specs(40)[::2], specs(40)[1::2]):
        assert one.group == two.group
        assert one.seed != two.seed


def test_a_network_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    spec = specs(2)[0]
    before = torch.get_rng_state()
    one, two = spec.build().state_dict(), spec.build().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def drawn() -> list[list[tuple[float, str]]]:
    """(density, pattern) of the layers of some networks, on the meta device."""
    found = []
    for spec in [s for s in specs(300) if s.setting.startswith(("convnet", "mlp"))]:
        network = space_of(spec.setting).meta(spec.architecture)
        draw_targets_(network, random.Random(spec.seed))
        found.append([(layer.density, str(layer.pattern)) for _, layer in sparse_layers(network)])
    return found


def test_densities_span_a_hundredth_to_one_and_all_patterns_occur(drawn: list[list[tuple[float, str]]]) -> None:
    densities = [density for network in drawn for density, _ in network]
    assert min(densities) == pytest.approx(LEAST)
    assert max(densities) == 1
    decades = Counter(min(4, int(-math.log(density) / math.log(10) * 2)) for density in densities if density < 1)
    assert all(decades[i] > 10 for i in range(4)), decades  # each half of a decade between 1 and 0.01
    patterns = Counter(pattern for network in drawn for density, pattern in network if density < 1)
    assert set(patterns) == {*PATTERNS, *RARE_PATTERNS}
    assert sum(patterns[name] for name in RARE_PATTERNS) < 0.2 * patterns.total()


def test_networks_are_mixed_uniform_and_dense(drawn: list[list[tuple[float, str]]]) -> None:
    sparse = [[pair for pair in network if pair[0] < 1] for network in drawn]
    assert 0 < sum(not network for network in sparse) < len(sparse) / 3
    assert any(len({pattern for _, pattern in network}) > 2 for network in sparse)
    assert any(len({density for density, _ in network}) > 2 for network in sparse)


@pytest.mark.parametrize("index", range(0, 2 * len(SETTINGS), 2))
def test_the_runtime_computes_what_torch_computes_and_activations_live(index: int) -> None:
    spec = specs(2 * len(SETTINGS))[index]
    network = spec.build()
    for _, layer in sparse_layers(network):
        assert layer.nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)
        assert layer.density == 1 or satisfies(layer.mask, layer.pattern)
    with torch.inference_mode():
        x = spec.example()
        expected = network(x)
        assert torch.isfinite(expected).all()
        assert 1e-3 < float(expected.abs().max()) < 1e3
        plan = lower(network, x)
        assert torch.allclose(Runtime(plan)(x), expected, atol=1e-3 * float(expected.abs().max()))


def test_depthwise_layers_are_sparse_in_some_networks_only() -> None:
    spec: Spec = next(s for s in specs(40) if s.setting == "darts-14")
    sparse = []
    for seed in range(24):
        network = space_of(spec.setting).meta(spec.architecture)
        draw_targets_(network, random.Random(seed))
        sparse.append(any(is_depthwise(layer) for _, layer in sparse_layers(network)))
    assert 0 < sum(sparse) < len(sparse)
