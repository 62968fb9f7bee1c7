"""The networks of the latency benchmark: architectures of the shipped spaces, each with zeros of its own.

A network is named by a `Spec`: a setting (a space with its options), an architecture drawn from it, and the seed of its zeros.
Network i of a benchmark is the same however many there are, so that a longer benchmark goes on where a shorter one stopped.
Architectures come in pairs of specs that differ in their zeros alone: a split must keep them together (`Spec.group`).

Zeros are drawn layer by layer: a density between 0.01 and 1 around one of the network's own, a pattern for the whole network or one
for each layer; in a tenth of the networks the rare patterns take part. Half of the networks take densities from a grid, as spaces
offer them, half any density. A tenth is dense.

Start with `specs` and `Spec.build`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.kernels.networks import settle_
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, is_depthwise, sparse_layers, sparsify
from ops.patterns import parse_pattern
from search_spaces import Architecture, Space, get_space

__all__ = [
    "DENSITIES",
    "PATTERNS",
    "RARE_PATTERNS",
    "SETTINGS",
    "Setting",
    "Spec",
    "draw_targets_",
    "space_of",
    "specs",
]

DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)  # the grid
LEAST = 0.01
PATTERNS = ("unstructured", "4x1", "2:4")  # those that the spaces offer
RARE_PATTERNS = ("16x1", "1x4", "1:4", "channel")
DENSE_NETWORKS, DENSE_LAYERS, DENSE_ENDS, SPARSE_DEPTHWISE, RARE = 0.1, 0.1, 0.7, 0.2, 0.1  # probabilities


@dataclass(frozen=True)
class Setting:
    """A shipped space with options.

    Attributes:
        name: in the tables.
        space: name of the space.
        input_shape: of one input, without the batch axis.
        options: of the space, beside the input shape and the sparsity.
        share: how many of the architectures in a cycle come from it.
    """

    name: str
    space: str
    input_shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    share: int = 1


def _convnet(size: int, channels: int, widths: tuple[int, ...], share: int, **more: Any) -> Setting:
    options = {"stages": 3, "depths": (1, 2), "kernels": (3,), "widths": widths, **more}
    return Setting(f"convnet-{size}", "convnet", (channels, size, size), options, share)


# Few enough choices each that some dozen architectures hold most of the shapes there are, as measurements of a calibrated space do.
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        _convnet(8, 1, (16, 32), 2, stages=2, stem=8),
        _convnet(14, 1, (16, 32), 3, blocks=("conv", "separable")),
        _convnet(32, 3, (32, 64), 3, blocks=("conv", "mbconv")),
        _convnet(64, 3, (32,), 2, depths=(1, 2, 3)),
        Setting("nasbench201-32", "nasbench201", (3, 32, 32), {"cells": 3}, share=2),
        Setting("nasbench201-16", "nasbench201", (3, 16, 16), {"cells": 2, "channels": 32}, share=2),
        Setting("darts-32", "darts", (3, 32, 32), share=2),
        Setting("darts-14", "darts", (1, 14, 14), {"cells": 5, "channels": 24}),
        Setting("nasnet-32", "nasnet", (3, 32, 32), {"cells": 1}, share=2),
        Setting("mlp-64", "mlp", (64,)),
        Setting("mlp-784", "mlp", (784,), {"widths": (128, 256, 512), "max_depth": 2}),
    )
}


@functools.cache
def space_of(name: str) -> Space:
    """The space of a setting, without sparsity: that is drawn here."""
    setting = SETTINGS[name]
    options: dict[str, Any] = {**setting.options, "densities": (1.0,), "patterns": ("unstructured",)}
    return get_space(setting.space, input_shape=setting.input_shape, **options)


@dataclass(frozen=True)
class Spec:
    """One network of the benchmark.

    Attributes:
        index: its place.
        setting: a key of `SETTINGS`.
        architecture: without sparsity.
        seed: of the zeros and the weights.
    """

    index: int
    setting: str
    architecture: Architecture
    seed: str

    @property
    def group(self) -> str:
        """What a split must not tear apart: equal for all networks of one architecture."""
        return f"{self.setting}/{self.architecture.digest}"

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.architecture.digest[:8]}/{self.index:04d}"

    def build(self) -> nn.Module:
        """The network in eval mode, with masks drawn and weights that keep activations alive; the same every time."""
        setting = SETTINGS[self.setting]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(self.seed).getrandbits(60))
            network = space_of(self.setting).build(self.architecture).requires_grad_(False)
            draw_targets_(network, random.Random(self.seed))
            draw_masks_(network, torch.Generator().manual_seed(random.Random(self.seed).getrandbits(60)))
            return settle_(network, torch.randn(4, *setting.input_shape))

    def example(self, batch: int = 1) -> torch.Tensor:
        """float[batch, *input_shape], like a normalised input."""
        return torch.randn(batch, *SETTINGS[self.setting].input_shape, generator=torch.Generator().manual_seed(1))


def specs(count: int, seed: int = 0) -> list[Spec]:
    """The first `count` networks of the benchmark of a seed."""
    most = max(setting.share for setting in SETTINGS.values())
    cycle = [name for turn in range(most) for name, setting in SETTINGS.items() if setting.share > turn]
    made = []
    for index in range(count):
        pair = index // 2
        name = cycle[pair % len(cycle)]
        architecture = space_of(name).sample(random.Random(f"{seed}/architecture/{pair}"))
        made.append(Spec(index, name, architecture, f"{seed}/zeros/{index}"))
    return made


def draw_targets_(network: nn.Module, rng: random.Random) -> None:
    """Give the layers of a network densities and patterns at random, in place; masks are not drawn yet.

    Args:
        network: of torch's layers.
        rng: decides everything.
    """
    depthwise = rng.random() < SPARSE_DEPTHWISE
    sparsify(network, where=lambda _, layer: depthwise or not is_depthwise(layer))
    layers = sparse_layers(network)
    if not layers or rng.random() < DENSE_NETWORKS:
        return
    centre = math.exp(rng.uniform(math.log(LEAST), 0.0))
    spread = rng.choice((0.0, 0.5, 1.0))
    grid = rng.random() < 0.5
    patterns = PATTERNS + RARE_PATTERNS if rng.random() < RARE else PATTERNS
    of_network = rng.choice(patterns) if rng.random() < 0.5 else None
    for i, (name, layer) in enumerate(layers):
        density = min(1.0, max(LEAST, centre * math.exp(rng.gauss(0.0, spread))))
        if grid:
            density = min(DENSITIES, key=lambda d: abs(math.log(d / density)))
        pattern = of_network or rng.choice(patterns)
        if rng.random() >= (DENSE_ENDS if i in (0, len(layers) - 1) else DENSE_LAYERS):
            _set_target(name, layer, density, pattern)


def _set_target(name: str, layer: SparseConv2d | SparseLinear, density: float, text: str) -> None:
    """Where the pattern is impossible, the layer is unstructured; a pattern of fixed density has that."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    pattern = parse_pattern(text)
    if pattern.illegal(layer.weight.shape, groups) is not None:
        pattern = parse_pattern("unstructured")
    layer.set_target(pattern.fixed_density or density, pattern, name)
