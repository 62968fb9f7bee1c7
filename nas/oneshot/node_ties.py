"""Which channels of a traced network stand or fall together. Start with `tie`; `nas.oneshot.nodes` is what uses it.

Walks the graph once. Every value has channels on axis 1, and each channel belongs to a node: linear layers and convolutions make
new nodes, additions and products make two sets one, everything else passes them on. Of anything not known to do so it says no.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nas.errors import NasError
from ops.layers import SparseConv2d, SparseLinear, is_depthwise


class NodeError(NasError, ValueError):
    """It cannot be decided which nodes a network has; names the operation."""


@dataclass(frozen=True)
class Port:
    """Where a layer's axis meets a set of nodes: node i has `repeat` consecutive entries of the axis, from i * repeat."""

    layer: str
    repeat: int = 1

    def spread(self, nodes: Tensor) -> Tensor:
        """A value per node -> a value per entry of the axis."""
        return nodes.repeat_interleave(self.repeat) if self.repeat > 1 else nodes


@dataclass(frozen=True)
class NodeSet:
    """Nodes that are chosen among together.

    Attributes:
        size: number of nodes.
        writers: convolutions and linear layers whose output rows they are, depthwise convolutions among them.
        norms: batch norms over them.
        readers: convolutions and linear layers whose input columns they are.
    """

    size: int
    writers: tuple[Port, ...]
    norms: tuple[Port, ...]
    readers: tuple[Port, ...]

    @property
    def name(self) -> str:
        """Of the layer that writes them first."""
        return self.writers[0].layer


def tie(graph: fx.Graph) -> tuple[tuple[NodeSet, ...], set[str]]:
    """The node sets of a network that `ops.trace.trace` recorded, and the names of the layers that run.

    Raises:
        NodeError: an operation of which it is not known what it does to channels.
    """
    return _Walk(graph).sets()


@dataclass(eq=False)
class _Group:
    """A set while more may be tied to it. `fixed`: the network's input or output is in it."""

    size: int
    fixed: bool = False
    writers: dict[Port, None] = field(default_factory=dict)
    norms: dict[Port, None] = field(default_factory=dict)
    readers: dict[Port, None] = field(default_factory=dict)
    into: _Group | None = None

    def root(self) -> _Group:
        found = self
        while found.into is not None:
            found = found.into
        return found


@dataclass(frozen=True)
class _Channels:
    """Axis 1 of a value: the set its channels belong to and how many consecutive ones each node has."""

    group: _Group
    repeat: int


class _Walk:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.values: dict[fx.Node, _Channels] = {}
        self.groups: list[_Group] = []
        self.calls: dict[str, tuple[_Channels, _Channels]] = {}

    def sets(self) -> tuple[tuple[NodeSet, ...], set[str]]:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.new(_shape(node)[1], fixed=True)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.of(source).group.root().fixed = True
            elif node.users:
                self.values[node] = self.visit(node)
        found = [group for group in self.groups if group.into is None and not group.fixed and group.writers]
        sets = (NodeSet(g.size, tuple(g.writers), tuple(g.norms), tuple(g.readers)) for g in found)
        return tuple(sets), set(self.calls)

    def visit(self, node: fx.Node) -> _Channels:
        module = node.meta.get("module")
        if type(module) in _CONVS or type(module) in _LINEARS:
            return self.layer(node, module)
        if type(module) in _NORMS:
            value = self.of(node.args[0])
            value.group.root().norms[Port(_path(node), value.repeat)] = None
            return value
        kind = type(module) if node.op == "call_module" else node.target
        if kind in _COMBINING:
            return self.combined(node)
        if kind in _PASSING:
            return self.of(node.args[0])
        if kind in _FLATTENING:
            return self.flattened(node)
        if kind in _AVERAGING and self.keeps_channels(node):
            return self.of(node.args[0])
        what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        where = _path(node) if module is not None else str(node.meta.get("scope") or "the network")
        raise NodeError(
            f"{where}: {what}: it is not known what becomes of single channels here, or a channel of zeros does not stay one; "
            "node masks need a chain of linear layers, convolutions, batch norms, pooling, activations with f(0) = 0, and "
            "additions, as the spaces mlp and convnet have"
        )

    def layer(self, node: fx.Node, layer: Any) -> _Channels:
        """A convolution or linear layer: reads a set and writes another, or the same if depthwise."""
        path, source = _path(node), self.of(node.args[0])
        if type(layer) in _LINEARS and len(_shape(node)) != 2:
            raise NodeError(f"{path}: a linear layer on values of shape {_shape(node)}; flatten them first")
        if path in self.calls:  # a layer that is used again ties what it reads and what it writes
            before, result = self.calls[path]
            self.same(before, source, node)
            return result
        if is_depthwise(layer):
            result = _Channels(source.group, source.repeat * (layer.out_channels // layer.in_channels))
            source.group.root().writers[Port(path, result.repeat)] = None
        elif getattr(layer, "groups", 1) != 1:
            raise NodeError(
                f"{path}: a convolution in {layer.groups} groups of {layer.in_channels} channels; "
                "node masks know plain and depthwise convolutions"
            )
        else:
            result = self.new(layer.weight.shape[0])
            result.group.writers[Port(path)] = None
            source.group.root().readers[Port(path, source.repeat)] = None
        self.calls[path] = (source, result)
        return result

    def combined(self, node: fx.Node) -> _Channels:
        """A sum or product: of two values it ties their channels; a factor passes them on."""
        inputs = [argument for argument in node.args if isinstance(argument, fx.Node)]
        others = [argument for argument in node.args if not isinstance(argument, fx.Node)]
        if len(inputs) == 1 and node.target in _PRODUCTS and all(isinstance(a, int | float) for a in others):
            return self.of(inputs[0])
        shapes = [_shape(value) for value in inputs]
        if len(inputs) != 2 or others or node.kwargs or len({(len(s), s[1]) for s in shapes}) != 1:
            raise NodeError(
                f"{node.meta.get('scope') or 'the network'}: {getattr(node.target, '__name__', node.target)} of "
                f"{', '.join(map(str, [*shapes, *others]))}; node masks know sums and products of two values with as many channels"
            )
        one, two = (self.of(value) for value in inputs)
        self.same(one, two, node)
        return one

    def flattened(self, node: fx.Node) -> _Channels:
        """[n, channels, ...] -> [n, features]: a node's features stay together."""
        source = node.args[0]
        before, after = _shape(source), _shape(node)
        if len(after) != 2 or after[0] != before[0] or after[1] != prod(before[1:]):
            raise NodeError(
                f"{node.meta.get('scope') or 'the network'}: values of shape {before} become {after}; "
                "node masks know only the flattening of everything but the batch axis"
            )
        value = self.of(source)
        return _Channels(value.group, value.repeat * prod(before[2:]))

    def keeps_channels(self, node: fx.Node) -> bool:
        """Whether a mean is over axes behind the channels."""
        before, after = _shape(node.args[0]), _shape(node)
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        return after[:2] == before[:2] and all(axis % len(before) > 1 for axis in axes)

    def same(self, one: _Channels, two: _Channels, node: fx.Node) -> None:
        a, b = one.group.root(), two.group.root()
        if (a.size, one.repeat) != (b.size, two.repeat):
            raise NodeError(
                f"{node.meta.get('scope') or 'the network'}: ties {a.size} nodes of {one.repeat} channels to {b.size} of "
                f"{two.repeat}; node masks need as many on both sides"
            )
        if a is b:
            return
        if self.groups.index(b) < self.groups.index(a):
            a, b = b, a
        for name in ("writers", "norms", "readers"):
            getattr(a, name).update(getattr(b, name))
        a.fixed |= b.fixed
        b.into = a

    def of(self, node: Any) -> _Channels:
        if node not in self.values:
            raise NodeError(f"{node}: a value that is not made from the input by layers; node masks know nothing of it")
        return self.values[node]

    def new(self, size: int, *, fixed: bool = False) -> _Channels:
        self.groups.append(_Group(size, fixed))
        return _Channels(self.groups[-1], 1)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta["value"]
    if not isinstance(value, Tensor) or value.ndim < 2:
        raise NodeError(f"{node.meta.get('scope') or 'the network'}: {node}: expected a tensor with a channel axis")
    return tuple(value.shape)


def _path(node: fx.Node) -> str:
    """Of a module, in the network that was traced."""
    return str(node.target).removeprefix("network").removeprefix(".")


_CONVS = {nn.Conv2d, SparseConv2d}
_LINEARS = {nn.Linear, SparseLinear}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d}
_PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_COMBINING: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_", *_PRODUCTS}
_FLATTENING: set[Any] = {nn.Flatten, torch.flatten, "flatten", "view", "reshape", torch.reshape}
_AVERAGING: set[Any] = {torch.mean, "mean"}
_PASSING: set[type | str | Callable[..., Any]] = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous", "clone"),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh),
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.tanh),
    *(torch.relu, torch.relu_, torch.tanh, "relu", "relu_", "tanh"),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
}
