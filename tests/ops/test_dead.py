"""Dead channels: cases worked out by hand, and the Jacobian of networks with random positive weights as a slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ops.dead import dead_channels
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparse_layers
from search_spaces import get_space

torch.set_num_threads(1)


def test_a_depthwise_convolution_at_one_percent_keeps_4_weights_and_32_channels_at_least_are_dead() -> None:
    layer = SparseConv2d(36, 36, 3, padding=1, groups=36, bias=False, density=0.01)
    for seed in range(5):
        draw_masks_(layer, torch.Generator().manual_seed(seed))
        found = dead_channels(layer, (36, 8, 8))
        alive = int(layer.mask.flatten(1).any(1).sum())
        assert (layer.nnz, found.channels) == (4, 36)
        assert found.dead == 36 - alive >= 32


def chain() -> nn.Sequential:
    """Depthwise 3x3, pointwise 4 -> 3, batch norm, ReLU, linear 3 -> 2; masks by hand."""
    depthwise = SparseConv2d(4, 4, 3, padding=1, groups=4, bias=False, density=0.5)
    pointwise = SparseConv2d(4, 3, 1, bias=True, density=0.5)
    head = SparseLinear(3, 2, density=0.5)
    mask = torch.zeros_like(depthwise.mask)
    mask[0, 0, 1, 1] = mask[2, 0, 0, 0] = True  # channels 1 and 3 lose everything
    depthwise.set_mask(mask)
    rows = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)  # 1 reads dead ones, 2 reads none
    pointwise.set_mask(rows.view(3, 4, 1, 1))
    head.set_mask(torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool))
    return nn.Sequential(
        depthwise, pointwise, nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    )


def test_what_reads_only_dead_channels_is_dead_in_its_turn() -> None:
    network = chain()
    found = dead_channels(network, (4, 5, 5))
    assert found.layers == {"0": (2, 4), "1": (2, 3), "6": (1, 2)}
    assert (found.dead, found.channels) == (5, 9)


def test_a_weight_that_meets_only_padding_feeds_nothing() -> None:
    network = chain()
    assert dead_channels(network, (4, 1, 1)).layers["0"] == (3, 4)  # channel 2 keeps a corner of its 3x3


def test_a_residual_keeps_the_sum_alive() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = SparseConv2d(2, 2, 1, bias=False, density=0.5)
            self.first.set_mask(torch.tensor([[1, 1], [0, 0]], dtype=torch.bool).view(2, 2, 1, 1))
            self.second = SparseConv2d(2, 2, 1, bias=False, density=0.5)
            self.second.set_mask(torch.tensor([[0, 1], [0, 1]], dtype=torch.bool).view(2, 2, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(x + self.first(x)) + self.second(self.first(x))

    assert dead_channels(Residual(), (2, 3, 3)).layers == {"first": (1, 2), "second": (0, 2)}


def test_a_dense_network_has_no_dead_channel_and_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4))
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = dead_channels(network, (3, 5, 5))
    assert (found.dead, found.channels) == (0, 9)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_weights_that_happen_to_be_zero_are_weights() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert dead_channels(layer, (3,)).dead == 0


def test_what_does_not_run_is_not_counted() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary = nn.Linear(3, 2), nn.Linear(2, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            return self.auxiliary(x) if self.training else x

    assert dead_channels(Headed(), (3,)).layers == {"body": (0, 2)}


def test_the_meta_device_and_a_wrong_shape_are_errors() -> None:
    with torch.device("meta"):
        network = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="meta device"):
        dead_channels(network, (3,))
    with pytest.raises(ValueError, match="Linear cannot be run"):
        dead_channels(nn.Linear(3, 2), (4,))


def jacobian_twin(network: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Dead channels by differentiation: positive weights and inputs, so that no path cancels and every ReLU is open."""
    network = network.double().eval()
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(0.5, 1.5)
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    x = torch.rand(1, *shape, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        network(x)
    found = {}
    for name, y in outputs.items():
        dead = 0
        for channel in range(y.shape[1]):
            if not y.requires_grad:
                dead += 1
                continue
            (g,) = torch.autograd.grad(y[:, channel].sum(), x, retain_graph=True, allow_unused=True)
            dead += g is None or not bool((g != 0).any())
        found[name] = (dead, y.shape[1])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("name", "options", "density"),
    [
        ("darts", {"channels": 4, "cells": 3, "input_shape": (1, 8, 8), "sparse_depthwise": True}, 0.02),
        ("nasnet", {"channels": 4, "cells": 1, "input_shape": (1, 8, 8), "sparse_depthwise": True}, 0.05),
        ("nasbench201", {"channels": 4, "cells": 1, "input_shape": (1, 8, 8)}, 0.05),
        ("mlp", {"input_shape": (9,), "widths": (6, 8)}, 0.05),
        ("convnet", {"input_shape": (1, 8, 8), "stages": 2, "widths": (8,), "stem": 4, "depthwise": True}, 0.02),
    ],
)
def test_signs_find_what_the_jacobian_finds(name: str, options: dict, density: float) -> None:
    space = get_space(name, **options)
    seen = 0
    for seed in range(2):
        torch.manual_seed(seed)
        drawn = space.sample(seed)
        given = {n: density for n in drawn.as_dict() if n.endswith("density")}
        wanted = drawn.as_dict() | given
        network = space.build(
            space.draw(lambda n, options, w=wanted: w[n] if w.get(n) in options else options[0], given)  # type: ignore[misc]
        )
        draw_masks_(network, torch.Generator().manual_seed(seed))
        found = dead_channels(network, options["input_shape"])
        assert found.layers == jacobian_twin(network, options["input_shape"])
        assert len(sparse_layers(network)) > 0
        seen += found.dead
    assert seen > 0


def test_depth_does_not_overflow() -> None:
    last = SparseLinear(64, 4, bias=False, density=0.5)
    last.set_mask((torch.arange(64) < 2).repeat(4, 1))
    network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(30)), last)  # 64 ** 30 is beyond float32
    assert dead_channels(network, (64,)).dead == 0
