"""Which channels of a masked network can only give a constant, because no path of kept weights leads to them from the input.

At low densities whole channels lose all their weights, above all in depthwise convolutions, and what reads only such channels
is dead in its turn. Start with `dead_channels(module, input_shape)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ops.layers import SparseConv2d, SparseLinear

_LINEAR = (nn.Linear,)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class DeadChannels:
    """Output channels of the convolution and linear modules that run in eval mode.

    Attributes:
        dead: those that can only give a constant.
        channels: all of them.
        layers: module name -> (dead, channels), in the order of `module.named_modules()`.
    """

    dead: int
    channels: int
    layers: dict[str, tuple[int, int]]


def dead_channels(module: nn.Module, input_shape: Sequence[int]) -> DeadChannels:
    """Count the channels whose value does not depend on the input, whatever the kept weights are.

    A channel is dead if, at every position, each of its kept weights reads padding or a dead channel; so a channel whose weights
    are all masked is. Found by running a copy in which a value is positive exactly where it depends on the input: the input
    and all kept weights are 1, biases 0, batch norms the identity, and every convolution and linear module hands on only the
    sign. This is exact for networks of convolution and linear modules, batch norms, sums, products, concatenations, pooling and
    activations with f(0) = 0; where other operations make something of nothing (sigmoid as an activation, group norms,
    attention), channels behind them count as alive. Weights are dropped by masks only: a kept weight of 0 is a weight.

    Args:
        module: the network, masks drawn, not on the meta device; left as it is.
        input_shape: of one sample, without the batch axis.

    Raises:
        ValueError: the network is on the meta device, or cannot take such an input.
    """
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("masks on the meta device have no values; build the network and draw its masks first")
    alive: dict[str, Tensor] = {}
    with torch.no_grad(), _only_signs(copy.deepcopy(module).eval(), alive) as (network, example):
        try:
            network(example.new_ones(1, *input_shape))
        except Exception as error:  # whatever a user's forward raises
            raise ValueError(
                f"{type(module).__name__} cannot be run on ones of shape {[1, *input_shape]}: {error}"
            ) from error
    layers = {
        name: (int((~alive[name]).sum()), alive[name].numel()) for name, _ in module.named_modules() if name in alive
    }
    return DeadChannels(
        dead=sum(dead for dead, _ in layers.values()), channels=sum(n for _, n in layers.values()), layers=layers
    )


@contextmanager
def _only_signs(network: nn.Module, alive: dict[str, Tensor]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Make `network` (a copy) compute what depends on its input; its layers note in `alive` which channels do, bool[channels]."""
    biases = {
        id(layer.bias) for layer in network.modules() if isinstance(layer, _CONVS + _LINEAR) and layer.bias is not None
    }
    for parameter in network.parameters():
        parameter.fill_(0 if id(parameter) in biases else 1)

    def observe(name: str, axis: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            reached = output > 0
            channels = reached.movedim(axis, 0).flatten(1).any(1)
            alive[name] = channels if name not in alive else alive[name] | channels
            return reached.to(output.dtype)

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, _CONVS):
            spatial = layer.weight.dim() - 2
            layer.register_forward_hook(observe(name, -1 - spatial))
        elif isinstance(layer, _LINEAR):
            layer.register_forward_hook(observe(name, -1))
        elif isinstance(layer, _BatchNorm):
            layer.register_forward_hook(lambda _, inputs, __: inputs[0])
        elif isinstance(layer, _MIXING_NORMS):
            layer.register_forward_hook(lambda _, inputs, output: torch.full_like(output, float((inputs[0] > 0).any())))
        if isinstance(layer, SparseConv2d | SparseLinear):
            layer.capture_dense_grad = False
    first = next(network.parameters(), torch.zeros(()))
    yield network, first.detach()
