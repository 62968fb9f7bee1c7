"""What of a supernet lives under its masks, for logs: kept weights, density by candidate, dead depthwise channels."""

from __future__ import annotations

from torch import nn

from nas.oneshot.mixed import MixedOp
from ops.layers import SparseLayer, is_depthwise


def layers_of(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """All convolution and linear layers, each once."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def kept(layer: nn.Conv2d | nn.Linear) -> int:
    """Weights that a layer keeps at its present density."""
    return layer.planned_nnz if isinstance(layer, SparseLayer) else layer.weight.numel()


def candidate_density(network: nn.Module) -> dict[str, float]:
    """Candidate operation -> share of the weights of all of its kind that live, for those that have weights."""
    counts: dict[str, list[int]] = {}
    for mixed in network.modules():
        if isinstance(mixed, MixedOp):
            for option, candidate in zip(mixed.options, mixed.candidates):
                for layer in layers_of(candidate):
                    count = counts.setdefault(str(option), [0, 0])
                    count[0] += kept(layer)
                    count[1] += layer.weight.numel()
    return {option: live / all_of_them for option, (live, all_of_them) in counts.items()}


def dead_depthwise(network: nn.Module) -> tuple[int, int]:
    """Channels of learned depthwise layers whose weights are all masked; and how many such layers have in all."""
    dead = channels = 0
    for layer in layers_of(network):
        if isinstance(layer, SparseLayer) and is_depthwise(layer):
            channels += layer.weight.shape[0]
            if layer.density < 1:
                dead += int((~layer.mask.flatten(1).any(1)).sum())
    return dead, channels
