"""Nodes: which belong together, what a mask keeps, and that dropping them is the same as never having had them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.nodes import (
    NodeError,
    NodeMask,
    apply_node_mask_,
    draw_node_mask,
    kept_weights,
    layer_masks,
    node_sets,
    without_nodes,
)
from ops.blocks import BLOCKS, conv_norm
from ops.layers import sparsify
from search_spaces import get_space

IMAGE = (3, 8, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """With biases, batch-norm weights, shifts and statistics that are not those of a fresh network."""
    chance = generator(seed)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=chance))
    return network


def convnet(blocks: list[str], width: int = 8, depth: int = 2, stem: int = 8) -> nn.Module:
    options = {"stages": len(blocks), "stem": stem, "widths": [width], "depths": [depth], "kernels": [3]}
    space = get_space("convnet", input_shape=IMAGE, classes=4, blocks=sorted(set(blocks)), densities=[1.0], **options)
    return space.build(space.draw(lambda name, options: blocks[int(name[5])]))


def mlp(widths: list[int], features: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 5))


class Twice(nn.Module):
    """One layer reads two sets, which are one for that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.both, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.both(self.one(x)).relu()) + self.head(self.both(self.two(x)).tanh())).mean((2, 3))


class Gated(nn.Module):
    """Products, means, functions and methods instead of modules, a layer used twice, and several features per node."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.gate = nn.Conv2d(6, 6, 1)
        self.widen = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12 * 16, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x * torch.tanh(self.gate(x)) * 0.5
        x = x + self.gate(x)
        x = F.avg_pool2d(self.norm(self.widen(x)), 2)
        return self.head(F.gelu(self.hidden(x.flatten(1))))


NETWORKS = {
    "mlp": (lambda: mlp([16, 9, 12]), (12,)),
    "mlp of images": (lambda: mlp([10, 6]), (3, 2, 2)),
    "conv": (lambda: convnet(["conv", "conv"]), IMAGE),
    "separable": (lambda: convnet(["separable", "separable"]), IMAGE),
    "mbconv": (lambda: convnet(["mbconv", "mbconv"]), IMAGE),
    "mixed, stem not tied": (lambda: convnet(["mbconv", "conv", "separable"], stem=6), IMAGE),
    "gated": (Gated, IMAGE),
    "twice": (Twice, IMAGE),
}


@pytest.fixture(params=NETWORKS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETWORKS[request.param]
    return stirred(make()), shape


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_masked_network_computes_what_the_smaller_network_computes(case, sparsity: float, training: bool) -> None:
    network, shape = case
    mask = draw_node_mask(node_sets(network, shape), sparsity, generator())
    small = without_nodes(network, mask).train(training)
    apply_node_mask_(network.train(training), mask)
    x = torch.randn(6, *shape, generator=generator(1))
    torch.testing.assert_close(network(x), small(x), rtol=1e-5, atol=1e-5)
    kept, total = kept_weights(network, mask)
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert kept == sum(w.numel() for w in weights) < total


def test_the_smaller_mlp_is_the_one_built_with_fewer_units() -> None:
    network = stirred(mlp([8, 6]))
    sets = node_sets(network, (12,))
    mask = draw_node_mask(sets, 0.5, generator())
    twin = mlp([4, 3])
    one, two = (kept.nonzero().squeeze(1) for kept in mask.kept)
    with torch.no_grad():
        twin[1].weight.copy_(network[1].weight[one])
        twin[4].weight.copy_(network[4].weight[two][:, one])
        twin[7].weight.copy_(network[7].weight[:, two])
        twin[7].bias.copy_(network[7].bias)
        for i, kept in ((2, one), (5, two)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(twin[i], name).copy_(getattr(network[i], name)[kept])
    apply_node_mask_(network, mask)
    x = torch.randn(7, 12, generator=generator(1))
    for training in (True, False):
        torch.testing.assert_close(network.train(training)(x), twin.train(training)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_smaller_convnet_is_the_one_built_with_fewer_channels(block: str) -> None:
    network = stirred(convnet([block], width=8, depth=3))
    sets = node_sets(network, IMAGE)
    masks = {s.name: torch.zeros(s.size, dtype=torch.bool) for s in sets}
    for kept in masks.values():
        kept[: len(kept) // 2] = True  # the first half, so that slices of the weights are the twin's
    twin = convnet([block], width=4, depth=3, stem=4)
    with torch.no_grad():
        for (name, small), (same, large) in zip(twin.state_dict().items(), network.state_dict().items(), strict=True):
            assert name == same
            small.copy_(large[tuple(slice(0, n) for n in small.shape)])
    mask = NodeMask(sets, tuple(masks.values()))
    apply_node_mask_(network, mask)
    x = torch.randn(3, *IMAGE, generator=generator(1))
    for training in (True, False):
        torch.testing.assert_close(network.train(training)(x), twin.train(training)(x), rtol=1e-5, atol=1e-5)


def test_nothing_of_a_dropped_node_reaches_anything_even_if_its_shift_comes_back() -> None:
    network = sparsify(stirred(convnet(["mbconv", "conv"])), 0.5)
    mask = draw_node_mask(node_sets(network, IMAGE), 0.5, generator())
    apply_node_mask_(network.eval(), mask)
    x = torch.randn(2, *IMAGE, generator=generator(1))
    before = network(x)
    with torch.no_grad():
        for nodes, kept in zip(mask.sets, mask.kept):
            for port in nodes.norms:
                network.get_submodule(port.layer).bias[~port.spread(kept)] = 1e3
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)


def test_an_additions_channels_are_one_set_and_a_depthwise_convolution_has_its_inputs() -> None:
    sets = node_sets(convnet(["mbconv", "separable"]), IMAGE)
    found = {s.name: ([p.layer for p in s.writers], [p.layer for p in s.readers]) for s in sets}
    assert found == {
        "0.0": (["0.0", "1.0.body.2.0", "1.1.body.2.0", "2.0.body.0.0"], ["1.0.body.0.0", "1.1.body.0.0", "2.0.body.1.0"]),
        "1.0.body.0.0": (["1.0.body.0.0", "1.0.body.1.0"], ["1.0.body.2.0"]),
        "1.1.body.0.0": (["1.1.body.0.0", "1.1.body.1.0"], ["1.1.body.2.0"]),
        "2.0.body.1.0": (["2.0.body.1.0", "2.1.body.0.0", "2.1.body.1.0"], ["2.1.body.1.0", "5"]),
    }  # fmt: skip


def test_inputs_and_classes_are_no_nodes() -> None:
    sets = node_sets(mlp([8, 6]), (12,))
    assert [(s.size, s.name) for s in sets] == [(8, "1"), (6, "4")]
    assert node_sets(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (12,)) == ()

    class TiedToInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)
            self.hidden = nn.Linear(12, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x + self.layer(x)))

    assert [s.name for s in node_sets(TiedToInput(), (12,))] == ["hidden"]


def test_features_of_one_channel_stay_together_when_flattened() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(3 * 4, 2))
    mask = NodeMask(node_sets(network, (1, 2, 2)), (torch.tensor([True, False, True]),))
    assert layer_masks(network, mask)["2"][0].tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_a_drawn_mask_keeps_the_share_rounded_up_and_at_least_one_of_every_set() -> None:
    sets = node_sets(mlp([1, 3, 7, 10, 30]), (12,))
    for sparsity in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        kept = [int(k.sum()) for k in draw_node_mask(sets, sparsity, generator()).kept]
        exact = round((1 - sparsity) * 100)  # whole percents: integer arithmetic, no float below
        assert kept == [max(1, -(-exact * n // 100)) for n in (1, 3, 7, 10, 30)], sparsity


def test_drawn_masks_are_uniform_over_all_subsets() -> None:
    sets = node_sets(mlp([4]), (12,))
    chance = generator()
    seen: dict[tuple[bool, ...], int] = {}
    for _ in range(1200):
        key = tuple(draw_node_mask(sets, 0.5, chance).kept[0].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == math.comb(4, 2)
    assert all(150 < count < 250 for count in seen.values())  # 200 +- 4 sigma


def test_equal_generators_draw_equal_masks_and_others_others() -> None:
    sets = node_sets(mlp([40]), (12,))
    masks = [draw_node_mask(sets, 0.5, generator(seed)).kept[0] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_weight_sparsity_between_hidden_layers_is_that_of_both_ends() -> None:
    network = mlp([20, 40])
    mask = draw_node_mask(node_sets(network, (12,)), 0.8, generator())
    assert layer_masks(network, mask)["4"].float().mean().item() == pytest.approx(0.2 * 0.2)


def test_sparse_layers_get_the_mask_and_dense_ones_zeros() -> None:
    network = mlp([8, 6])
    network[4] = sparsify(network[4], 0.5)
    network[4].set_mask(torch.arange(48).reshape(6, 8) % 3 > 0)  # dropped before, so it stays dropped
    mask = draw_node_mask(node_sets(network, (12,)), 0.5, generator())
    apply_node_mask_(network, mask)
    masks = layer_masks(network, mask)
    assert torch.equal(network[4].mask, masks["4"] & (torch.arange(48).reshape(6, 8) % 3 > 0))
    assert torch.equal(network[1].weight != 0, masks["1"])
    assert torch.equal(network[7].weight != 0, masks["7"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("blocks", list(itertools.product(["mbconv", "separable", "conv"], repeat=2)), ids="-".join)
def test_dropped_nodes_of_layers_without_masks_stay_dropped_in_training(
    blocks: tuple[str, str], optimizer: str
) -> None:
    network = stirred(convnet(list(blocks), width=4, depth=1, stem=4))
    mask = draw_node_mask(node_sets(network, IMAGE), 0.5, generator())
    apply_node_mask_(network, mask)
    if optimizer == "sgd":
        updates = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    else:
        updates = torch.optim.AdamW(network.parameters(), lr=0.01)
    x, y = torch.randn(8, *IMAGE, generator=generator(1)), torch.arange(8) % 4
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(4):
        updates.zero_grad()
        F.cross_entropy(network.train()(x), y).backward()
        updates.step()
    for name, kept in layer_masks(network, mask).items():
        weight = network.get_submodule(name).weight
        assert not weight[~kept].any(), name
        assert not torch.equal(weight, before[f"{name}.weight"])
    torch.testing.assert_close(network.eval()(x), without_nodes(network, mask)(x), rtol=1e-5, atol=1e-5)


def test_sets_are_found_on_the_meta_device_without_weights() -> None:
    with torch.device("meta"):
        there = node_sets(convnet(["mbconv", "conv"]), IMAGE)
    assert there == node_sets(convnet(["mbconv", "conv"]), IMAGE)


class Through(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.stem, self.head, self.function = conv_norm(3, 4, 3), nn.Conv2d(4, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.stem(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (torch.sigmoid, "sigmoid"),
        (lambda x: x + 1, "add"),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "getitem"),
        (nn.GroupNorm(2, 4), "function: GroupNorm"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "function: a convolution in 2 groups"),
        (lambda x: x + x.mean(1, keepdim=True), "mean"),
        (lambda x: x.transpose(1, 2).transpose(1, 2), "transpose"),
        (lambda x: x if x.sum() > 0 else -x, "cannot be looked into"),
    ],
)
def test_what_cannot_be_decided_is_an_error_that_names_the_operation(function, names: str) -> None:
    with pytest.raises(NodeError, match=names):
        node_sets(Through(function), IMAGE)


def test_a_layer_that_only_trains_is_an_error() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.extra = nn.Linear(12, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor):
            x = self.stem(x)
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    with pytest.raises(NodeError, match="extra: does not run in evaluation mode"):
        node_sets(Auxiliary(), (12,))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), True])
def test_a_senseless_sparsity_is_an_error(sparsity: float) -> None:
    with pytest.raises(ValueError, match="node sparsity in"):
        draw_node_mask((), sparsity, generator())


def test_a_mask_that_does_not_fit_its_sets_is_an_error() -> None:
    sets = node_sets(mlp([8]), (12,))
    with pytest.raises(ValueError, match=r"shape \[8\]"):
        NodeMask(sets, (torch.ones(7, dtype=torch.bool),))
    with pytest.raises(ValueError, match="keeps none of 8"):
        NodeMask(sets, (torch.zeros(8, dtype=torch.bool),))
