"""Probe networks: the same for the same seed, every kind of layer is met, what is drawn is legal and runs."""

import random
from itertools import islice

import torch

from hw_models.probes import LEAST_DENSITY, probe, probes, randomise_sparsity_
from hw_models.workload import workload
from ops.layers import sparse_layers
from ops.plan import lower
from ops.runtime import Runtime


def test_the_same_seed_gives_the_same_networks() -> None:
    for (name, a, x), (other, b, y) in zip(islice(probes(3), 4), islice(probes(3), 4)):
        assert name == other
        assert torch.equal(x, y)
        assert torch.equal(a(x), b(y))
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key])


def test_drawing_a_probe_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    probe(random.Random(0))
    assert torch.equal(torch.rand(3), expected)


def test_probes_run_as_they_compute() -> None:
    rng = random.Random(11)
    for _ in range(6):
        _, module, example = probe(rng)
        with torch.no_grad():
            expected = module(example)
        torch.testing.assert_close(Runtime(lower(module, example))(example), expected, rtol=1e-3, atol=1e-4)


def test_every_kind_of_layer_and_pattern_is_met() -> None:
    rng = random.Random(0)
    work = workload([lower(m.to("meta"), x.to("meta")) for _, m, x in (probe(rng) for _ in range(60))])
    families, patterns = set(work.steps["family"]), set(work.steps["pattern"])
    assert {"conv/specialised", "depthwise/portable"} <= families or {"conv/portable", "depthwise/portable"} <= families
    assert {"linear/portable", "torch.conv2d/torch", "torch.linear/torch", "halo/lanes", "add/lanes"} <= families
    assert {"torch.flatten/torch", "max_pool/lanes", "avg_pool/lanes", "pair/specialised"} <= families
    assert {"", "unstructured", "4x1", "16x1", "1x4", "2:4", "channel"} <= patterns
    density = work.steps.query("nnz > 100 and pattern != ''")["density"]
    assert density.min() < 0.03
    assert density.max() > 0.8


def test_the_batch_is_that_of_the_example() -> None:
    assert probe(random.Random(0), batch=5)[2].shape[0] == 5


def test_sparsity_drawn_for_a_network_of_ones_own_is_legal_and_varied() -> None:
    net = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3) for _ in range(30)))
    densities = {layer.density for _, layer in sparse_layers(randomise_sparsity_(net, random.Random(0)))}
    assert len(densities) > 10
    assert min(densities) >= LEAST_DENSITY
