"""A cell space with every kind of layer, small enough that a step of its supernet takes milliseconds. Start with `little_space`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ops.candidates import candidates
from search_spaces import Space
from search_spaces.chooser import Chooser
from search_spaces.darts_network import NodeSums

SHAPE = (1, 6, 6)
CLASSES = 3
OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "conv_3x3")


class LittleNetwork(nn.Module):
    """Stem with a norm that has parameters, two nodes, a linear classifier with a bias."""

    def __init__(self, nodes: list[list[tuple[int, nn.Module]]], channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.nodes = NodeSums(nodes)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        states = self.nodes(stem, stem.relu())
        return self.classifier(torch.cat(states[2:], 2).mean((2, 3)))  # type: ignore[no-any-return]


def little(
    c: Chooser,
    *,
    channels: int = 8,
    operations: Sequence[str] = OPERATIONS,
    densities: Sequence[float] = (1.0, 0.5, 0.1),
    patterns: Sequence[str] = ("unstructured",),
    rules: Sequence[str] = ("uniform", "erk"),
    dense: Sequence[str] = (),
    depthwise: bool = True,
) -> nn.Module:
    """Two nodes that keep two inputs each, and one overall sparsity; layers whose path begins with one of `dense` stay dense."""
    offered = candidates(operations)

    def operation(i: int, j: int) -> nn.Module:
        return c.op(f"node{i}.from{j}.op", offered, in_channels=channels, out_channels=channels)

    nodes = [c.edges(f"node{i}.inputs", 2 + i, 2, partial(operation, i)) for i in range(2)]
    network = LittleNetwork(nodes, channels)
    skip = lambda path, _: path.startswith(tuple(dense)) if dense else False  # noqa: E731
    return c.allocate("sparsity", network, densities, rules, patterns, skip=skip, depthwise=depthwise)


def little_space(**options: object) -> Space:
    return Space(little, "little", options)
