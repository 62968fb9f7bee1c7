"""Networks to learn from: `probe(rng)` draws one of random shape, with every kind of layer, activation and pattern in it.

A network of a search space answers for the space's own shapes. Probes answer for shapes nobody has asked for yet: channels,
sizes, windows, strides, patterns and densities are drawn as widely as small networks have them, so that what is learned from
them holds in between. They are not trained and compute nothing of use.

`randomise_sparsity_` gives any network other densities and patterns. Start with `probe`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from ops.candidates import OPERATIONS
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparse_layers, sparsify
from ops.patterns import PatternError, check_pattern

__all__ = ["PATTERNS", "Probe", "probe", "probes", "randomise_sparsity_"]

Probe = tuple[str, nn.Module, torch.Tensor]  # name, network in eval mode with masks drawn, example input

PATTERNS = ("unstructured", "unstructured", "4x1", "16x1", "1x4", "2:4", "channel")
LEAST_DENSITY = 0.01
DENSE = 0.18  # of the probes are dense throughout: then torch runs pooling, sums and activations as well
SIZES = (8, 14, 16, 28, 32, 32, 64)
MOST_WEIGHTS = 600_000  # of one convolution
MOST_MACS = 60e6  # of one convolution, dense
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)


def probes(seed: int = 0, batch: int = 1) -> Iterator[Probe]:
    """Endless probe networks, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield probe(rng, batch)


def probe(rng: random.Random, batch: int = 1) -> Probe:
    """One network of random make.

    Args:
        rng: decides everything, weights and masks included.
        batch: images in the example input.

    Returns:
        Name ("probe: ..."), network in eval mode with masks drawn, float[batch, ...] example.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(40))
        kind = rng.choices(("cells", "blocks", "bottlenecks", "mlp"), (4, 5, 4, 2))[0]
        if kind == "mlp":
            network, shape = _mlp(rng)
        else:
            network, shape = _convolutions(rng, kind)
        if rng.random() >= DENSE:
            randomise_sparsity_(network, rng)
        return f"probe: {kind}", network.eval(), torch.rand(batch, *shape)


def randomise_sparsity_(
    network: nn.Module, rng: random.Random, patterns: Sequence[str] = PATTERNS, dense_share: float = 0.15
) -> nn.Module:
    """Give every convolution and linear layer a density and a pattern at random, and draw the masks.

    Density is uniform in its logarithm between 0.01 and 1 around one the network has as a whole, so that networks differ as much
    as layers do.

    Args:
        network: changed; plain layers become sparse ones.
        rng: decides.
        patterns: drawn from; where one is not legal on a layer, unstructured.
        dense_share: of layers that stay dense; stems and depthwise convolutions do so half of the time.

    Returns:
        The network.
    """
    network = sparsify(network)
    centre, width = rng.uniform(math.log(LEAST_DENSITY), 0.0), rng.choice((0.2, 0.7, 1.5))
    favourite = rng.choice(patterns)
    for _, layer in sparse_layers(network):
        groups = getattr(layer, "groups", 1)
        few = groups > 1 or layer.weight[0].numel() <= 32
        density = math.exp(min(0.0, max(math.log(LEAST_DENSITY), rng.gauss(centre, width))))
        pattern = favourite if rng.random() < 0.7 else rng.choice(patterns)
        if rng.random() < (0.5 if few else dense_share):
            density = 1.0
        if ":" in pattern and density < 1:
            density = 0.5
        _set(layer, max(density, 1.0 / layer.weight.numel()), pattern, groups)
    draw_masks_(network, torch.Generator().manual_seed(rng.getrandbits(40)))
    return network


def _set(layer: SparseConv2d | SparseLinear, density: float, pattern: str, groups: int) -> None:
    if density >= 1:
        layer.set_target(1.0, "unstructured")
        return
    try:
        check_pattern(pattern, tuple(layer.weight.shape), groups)
        layer.set_target(density, pattern)
    except (PatternError, ValueError):
        layer.set_target(density, "unstructured")


def _channels(rng: random.Random, least: int = 8, most: int = 320) -> int:
    """Uniform in the logarithm; often a multiple of 8, as people choose them."""
    n = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    return max(least, n // 8 * 8) if rng.random() < 0.75 else n


def _mlp(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    widths = [_channels(rng, 8, 1024) for _ in range(rng.randint(2, 6))]
    layers: list[nn.Module] = []
    act = rng.choice(ACTIVATIONS)
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if rng.random() < 0.3 else []), act()]
    first = [nn.Flatten()] if rng.random() < 0.6 else []
    return nn.Sequential(*first, *layers, nn.Linear(widths[-1], rng.choice((2, 10, 100)))), (widths[0],)


def _convolutions(rng: random.Random, kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    size, colours = rng.choice(SIZES), rng.choice((1, 3, 3))
    odd = kind != "cells" and rng.random() < 0.2
    height, width = size, max(4, size - rng.randint(1, 4)) if odd else size
    act = rng.choice(ACTIVATIONS)
    channels = _channels(rng, 8, 96)
    stride = rng.choice((1, 1, 2)) if size >= 32 else 1
    layers: list[nn.Module] = [_conv(colours, channels, 3, stride, 1, act)]
    place = size // stride
    for _ in range(rng.randint(3, 7)):
        stride = 2 if place > 3 and rng.random() < 0.3 else 1
        wider = stride == 2 or rng.random() < 0.3
        most = int(min(320, max(8, math.sqrt(MOST_MACS) / max(place / stride, 1))))
        after = (
            min(most, _channels(rng, channels, 2 * channels) if wider else channels) if rng.random() < 0.9 else channels
        )
        after = max(after, 4)
        make = {"cells": _cell, "blocks": _block, "bottlenecks": _bottleneck}[kind]
        layers.append(make(rng, channels, after, stride, place, act))
        channels, place = after, -(-place // stride)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, rng.choice((10, 100)))]
    return nn.Sequential(*layers, *head), (colours, height, width)


def _conv(
    a: int, b: int, kernel: int, stride: int, groups: int, act: Callable[[], nn.Module] | None, dilation: int = 1
) -> nn.Sequential:
    padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(a, b, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), *([act()] if act is not None else []))


def _kernel(rng: random.Random, a: int, b: int, place: int) -> int:
    kernel = rng.choice((1, 1, 3, 3, 3, 5, 7))
    while kernel > 1 and (
        kernel * kernel * a * b > MOST_WEIGHTS or kernel * kernel * a * b * place * place > MOST_MACS
    ):
        kernel -= 2
    return kernel if kernel <= 2 * place else 1


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, act: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.body, self.act = body, act() if act is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        out: torch.Tensor = self.act(self.body(x) + x)
        return out


class _Branches(nn.Module):
    """Sums or concatenates what its branches make of the same input."""

    def __init__(self, branches: Sequence[nn.Module], concatenate: bool) -> None:
        super().__init__()
        self.branches, self.concatenate = nn.ModuleList(branches), concatenate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, h, w] -> the same with the branches' channels."""
        values = [branch(x) for branch in self.branches]
        if self.concatenate:
            return torch.cat(values, 1)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


def _block(rng: random.Random, a: int, b: int, stride: int, place: int, act: Callable[[], nn.Module]) -> nn.Module:
    """Plain convolutions: one, or two with a residual."""
    first = _conv(a, b, _kernel(rng, a, b, place), stride, 1, act)
    if stride == 1 and a == b and rng.random() < 0.5:
        last = act if rng.random() < 0.6 else None
        return _Residual(nn.Sequential(first, _conv(b, b, _kernel(rng, b, b, place), 1, 1, None)), last)
    return first


def _bottleneck(rng: random.Random, a: int, b: int, stride: int, place: int, act: Callable[[], nn.Module]) -> nn.Module:
    """1x1, depthwise or k x k, 1x1: inverted residual, separable or ResNet's bottleneck."""
    style = rng.choice(("inverted", "separable", "narrow"))
    kernel = rng.choice((3, 5, 7)) if place >= 4 else 3
    if style == "separable":
        body = nn.Sequential(_conv(a, a, kernel, stride, a, act), _conv(a, b, 1, 1, 1, act))
    elif style == "inverted":
        wide = a * rng.choice((2, 3, 4, 6))
        body = nn.Sequential(
            _conv(a, wide, 1, 1, 1, act), _conv(wide, wide, kernel, stride, wide, act), _conv(wide, b, 1, 1, 1, None)
        )
    else:
        narrow = max(4, a // 4)
        body = nn.Sequential(
            _conv(a, narrow, 1, 1, 1, act), _conv(narrow, narrow, 3, stride, 1, act), _conv(narrow, b, 1, 1, 1, None)
        )
    return _Residual(body, act if style == "narrow" else None) if stride == 1 and a == b else body


def _cell(rng: random.Random, a: int, b: int, stride: int, place: int, act: Callable[[], nn.Module]) -> nn.Module:
    """A few candidate operations of the cell spaces side by side."""
    width = max(4, b // 2)
    names = [name for name in OPERATIONS if name != "none"]
    chosen = [rng.choice(names) for _ in range(rng.randint(2, 3))]
    odd = place % 2 == 1
    if rng.random() < 0.5:  # all read the same value, as in the cells of search spaces
        branches = [OPERATIONS[n](a, width, stride, odd=odd) for n in chosen]
    else:
        narrowed = [_conv(a, width, 1, 1, 1, None) for _ in chosen]
        branches = [nn.Sequential(c, OPERATIONS[n](width, width, stride, odd=odd)) for c, n in zip(narrowed, chosen)]
    cell = _Branches(branches, rng.random() < 0.5)
    total = width * len(branches) if cell.concatenate else width
    return nn.Sequential(cell, _conv(total, b, 1, 1, 1, act if rng.random() < 0.5 else None))
