"""Laws every space keeps. To put a space under them, add it to `SPACES` with options that make it small enough to build."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tracemalloc
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

from ops.layers import sparse_layers
from search_spaces import Architecture, Chooser, Space, SpaceError, get_space


def _users_own(c: Chooser) -> nn.Module:
    """A space as a user would write one: modules made on the spot, choices that depend on choices."""
    channels = c.choice("channels", [8, 16])
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for i in range(c.choice("depth", [0, 1, 2])):
        op = c.op(
            f"block{i}.op",
            {"conv": lambda n: nn.Conv2d(n, n, 3, padding=1), "none": lambda n: nn.Identity()},
            n=channels,
        )
        layers += [
            c.sparse(f"block{i}", op, densities=[1, 0.5, 0.1], patterns=["unstructured", "4x1", "2:4"]),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


IMAGE = {"input_shape": (3, 16, 16), "classes": 4}
SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": ("mlp", {"input_shape": (12,), "classes": 4, "widths": [8, 12], "max_depth": 2}),
    "convnet": ("convnet", {**IMAGE, "stages": 2, "stem": 8, "widths": [8, 16], "depths": [1, 2]}),
    "darts": ("darts", {**IMAGE, "channels": 8, "cells": 3}),
    "nasnet": ("nasnet", {**IMAGE, "channels": 8, "cells": 3}),
    "nasbench201": ("nasbench201", {**IMAGE, "channels": 8, "cells": 1}),
    "user": (_users_own, {}),
}
NAMES = list(SMALL)


@pytest.fixture(params=NAMES)
def space(request: pytest.FixtureRequest) -> Space:
    name, options = SMALL[request.param]
    return get_space(name, **options)


def batch(space: Space, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *space.options.get("input_shape", (3, 16, 16)))


def test_samples_are_valid_and_reproducible(space: Space) -> None:
    for seed in range(20):
        sampled = space.sample(seed)
        assert sampled == space.sample(seed)
        assert sampled.digest == space.sample(seed).digest
        assert space.architecture(sampled.as_dict()) == sampled
        assert space.architecture(sampled.as_dict()).digest == sampled.digest


def test_json_round_trip_gives_an_equal_value(space: Space) -> None:
    for seed in range(10):
        sampled = space.sample(seed)
        back = Architecture.from_json(sampled.to_json())
        assert back == sampled
        assert hash(back) == hash(sampled)
        assert back.digest == sampled.digest
        assert [type(v) for _, v in back.decisions] == [type(v) for _, v in sampled.decisions]


def test_a_built_network_runs_and_trains(space: Space) -> None:
    for seed in range(4):
        model = space.build(space.sample(seed)).train()
        out = model(batch(space))
        out = out[0] if isinstance(out, tuple) else out
        assert out.shape == (2, 4)
        out.sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_decisions_below_density_one_reach_the_layers(space: Space) -> None:
    seen = 0
    for seed in range(40):
        sampled = space.sample(seed)
        densities = [v for name, v in sampled.decisions if name.endswith("density")]
        if densities and all(d < 1 for d in densities) and seen < 5:
            targets = [layer.density for _, layer in sparse_layers(space.meta(sampled))]
            assert any(d < 1 for d in targets)
            seen += 1
        if densities and all(d == 1 for d in densities):
            assert all(layer.density == 1 for _, layer in sparse_layers(space.meta(sampled)))
    assert seen


def test_a_mutant_differs_in_what_it_computes_and_stays_in_the_space(space: Space) -> None:
    rng = random.Random(0)
    parent = space.sample(rng)
    for _ in range(40):
        child = space.mutate(parent, rng)
        assert child.digest != parent.digest
        assert space.architecture(child.as_dict()) == child
        parent = child


def test_a_child_takes_each_decision_from_a_parent_where_it_can(space: Space) -> None:
    rng = random.Random(0)
    for _ in range(20):
        a, b = space.sample(rng), space.sample(rng)
        child = space.crossover(a, b, rng)
        assert space.architecture(child.as_dict()) == child
        offered = space.offers(child)
        for name, value in child.decisions:
            parents = [p[name] for p in (a, b) if name in p and p[name] in offered[name]]
            if len(parents) == 2:
                assert value in parents
        assert space.crossover(a, a, rng) == a


def test_enumeration_yields_valid_different_architectures(space: Space) -> None:
    first = list(itertools.islice(space.enumerate(), 200))
    assert len(set(first)) == len(first)
    for architecture in first[::20]:
        assert space.architecture(architecture.as_dict()) == architecture


def test_size_is_what_random_walks_estimate(space: Space) -> None:
    size = space.size()
    mean, error = space.estimate_size(samples=2000, seed=1)
    assert abs(mean - size) <= 5 * error + 1e-9 * size


def test_drawing_and_counting_allocate_no_weights(space: Space) -> None:
    sampled = space.sample(0)
    for name, tensor in [*space.meta(sampled).named_parameters(), *space.meta(sampled).named_buffers()]:
        assert tensor.device.type == "meta", name


def test_the_graph_is_a_labelled_dag(space: Space) -> None:
    for seed in range(5):
        graph = space.graph(space.sample(seed))
        assert nx.is_directed_acyclic_graph(graph)
        assert all("label" in data for _, data in graph.nodes(data=True))


def test_wrong_decisions_are_refused_by_name(space: Space) -> None:
    decisions = space.sample(0).as_dict()
    name = next(n for n, options in space.offers(space.sample(0)).items() if len(options) > 1)
    with pytest.raises(SpaceError, match=name.replace(".", r"\.")):
        space.architecture({k: v for k, v in decisions.items() if k != name})
    with pytest.raises(SpaceError, match=name.replace(".", r"\.")):
        space.architecture({**decisions, name: "nonsense"})
    with pytest.raises(SpaceError, match="no_such_decision"):
        space.architecture({**decisions, "no_such_decision": 1})


def test_an_architecture_of_another_space_is_refused(space: Space) -> None:
    with pytest.raises(SpaceError, match="other"):
        space.build(Architecture("other", (), ""))


def test_digests_are_the_same_in_another_process() -> None:
    code = (
        "import sys, json\n"
        "from search_spaces import get_space\n"
        "for name, options in json.loads(sys.stdin.read()):\n"
        "    space = get_space(name, **options)\n"
        "    print(*[space.sample(seed).digest for seed in range(5)])\n"
    )
    shipped = [(name, options) for name, options in SMALL.values() if isinstance(name, str)]
    out = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(shipped), capture_output=True, text=True, check=True
    ).stdout.split()
    here = [get_space(name, **options).sample(seed).digest for name, options in shipped for seed in range(5)]
    assert out == here


def test_drawing_a_large_network_costs_little_memory() -> None:
    space = get_space("darts", channels=256, cells=20)
    space.sample(0)
    tracemalloc.start()
    for seed in range(5):
        space.sample(seed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
