"""What directly follows a layer, folded into it: a batch norm, then an addition (a shortcut), then an activation.

    relu(norm(conv(x)) + y)   becomes one layer with two inputs, (x, y): conv with scaled weights, + bias + y, relu.

An operation is folded only if nothing else reads the layer's result. A layer that takes an addition is computed where the
addition stood, since that is where the other summand is ready. Start with `fold_followers`.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ops.extract import Layer, hooked

__all__ = ["fold_followers"]


def fold_followers(graph: fx.Graph) -> None:
    """Fold into every node with `meta["layer"]` what follows it, in place. Nodes know their values and what is constant."""
    for node in list(graph.nodes):
        if "layer" in node.meta:
            _fold_chain(graph, node)
    # After the batch norms, so that both summands of an addition are seen for the layers they are.
    place = {node: i for i, node in enumerate(graph.nodes)}
    fences = [i for node, i in place.items() if _may_mutate(node)]
    for node in list(place):
        summands = _summands(node)
        layers = [layer for layer in summands if _takes(layer, node, summands)]
        layers = [layer for layer in layers if not any(place[layer] < fence < place[node] for fence in fences)]
        if layers:
            last = max(layers, key=place.__getitem__)
            place[last] = place[node]
            _fold_addition(graph, node, last, next(n for n in summands if n is not last))
            _fold_chain(graph, last)
    for node in graph.nodes:
        if "layer" in node.meta:
            node.meta["layer"] = _flushed(node.meta["layer"])


# --- additions -----------------------------------------------------------------------------------------------------------


def _summands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two values a node adds one to one, or nothing where it does anything else."""
    function = node.op == "call_function" and node.target in (operator.add, torch.add)
    if not function and not (node.op == "call_method" and node.target == "add"):
        return ()
    given: dict[str, Any] = {**dict(zip(("input", "other"), node.args)), **node.kwargs}
    if len(node.args) > 2 or set(given) - {"input", "other", "alpha"} or given.get("alpha", 1) != 1:
        return ()
    both = (given.get("input"), given.get("other"))
    if node.meta.get("pinned") or not all(isinstance(n, fx.Node) and not n.meta["constant"] for n in both):
        return ()
    values = [n.meta["value"] for n in (*both, node)]  # type: ignore[union-attr]
    tensors = all(isinstance(value, torch.Tensor) for value in values)
    return both if tensors and len({(value.shape, value.dtype) for value in values}) == 1 else ()  # type: ignore[return-value]


def _takes(node: fx.Node, addition: fx.Node, summands: tuple[fx.Node, ...]) -> bool:
    """Whether a summand is a layer the addition can be folded into."""
    layer: Layer | None = node.meta.get("layer")
    if layer is None or layer.post_ops or layer.residual or len(node.users) != 1 or summands[0] is summands[1]:
        return False
    return bool(node.meta["value"].is_contiguous() == addition.meta["value"].is_contiguous())


def _may_mutate(node: fx.Node) -> bool:
    """Whether a node may change memory it did not make, so that no computation may be moved across it."""
    if node.op == "call_module" and "layer" not in node.meta:
        module = node.meta["module"]
        return bool(node.meta.get("pinned")) or hooked(node) or not type(module).__module__.startswith("torch.nn")
    return bool(node.meta.get("pinned")) or node.kwargs.get("out") is not None


def _fold_addition(graph: fx.Graph, addition: fx.Node, node: fx.Node, other: fx.Node) -> None:
    """Make the node of a layer compute the addition, in the addition's place; its arguments become (x, other)."""
    (source,) = (n for n in node.all_input_nodes if not n.meta["constant"])
    addition.prepend(node)
    addition.replace_all_uses_with(node)
    graph.erase_node(addition)
    node.args, node.kwargs = (source, other), {}
    node.meta["layer"] = replace(node.meta["layer"], residual=True)
    node.meta["value"] = addition.meta["value"]


# --- batch norms and activations -----------------------------------------------------------------------------------------


def _fold_chain(graph: fx.Graph, node: fx.Node) -> None:
    """Fold the batch norms and the activation that follow a layer one after another."""
    while len(node.users) == 1:
        follower = next(iter(node.users))
        fused = _fused(node, follower)
        if fused is None:
            return
        node.meta["layer"] = fused
        node.meta["value"] = follower.meta["value"]
        follower.replace_all_uses_with(node)
        graph.erase_node(follower)


def _fused(node: fx.Node, follower: fx.Node) -> Layer | None:
    """The layer with its follower folded in, or None where the follower is nothing that can be."""
    layer: Layer = node.meta["layer"]
    if layer.post_ops or follower.meta.get("pinned") or hooked(follower):
        return None
    activation = _activation(follower)
    if activation is not None:
        return replace(layer, post_ops=(activation,))
    module = follower.meta.get("module")
    norm = nn.BatchNorm1d if layer.kind == "linear" else nn.BatchNorm2d
    if not isinstance(module, norm) or type(module).forward is not norm.forward or module.running_mean is None:
        return None
    if layer.kind == "linear" and node.meta["value"].ndim != 2:  # the channel axis is then not the layer's output axis
        return None
    return None if layer.residual else _with_norm(layer, module)


_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
}


def _activation(node: fx.Node) -> str | None:
    if node.op == "call_module":
        return _MODULES.get(type(node.meta["module"]))
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return "relu" if node.op == "call_method" and node.target == "relu" else None


def _with_norm(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    """norm(layer(x)) as one layer: row o of the weight is scaled by gamma[o] / sqrt(var[o] + eps). In float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = -mean if layer.bias is None else layer.bias.double() - mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.mask is not None:
        weight = torch.where(layer.mask, weight, weight.new_zeros(()))
    dtype = layer.weight.dtype
    return replace(layer, weight=weight.to(dtype), bias=bias.to(dtype))


def _flushed(layer: Layer) -> Layer:
    """Subnormal weights become 0: they change no result that matters and can make a layer ten times slower."""
    weight = layer.weight
    if weight.is_meta or not weight.is_floating_point():
        return layer
    tiny = (weight != 0) & (weight.abs() < torch.finfo(weight.dtype).tiny)
    return replace(layer, weight=torch.where(tiny, weight.new_zeros(()), weight).contiguous()) if tiny.any() else layer
