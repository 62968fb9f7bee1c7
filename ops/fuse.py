"""Passes over a traced network: less work, same result. In the order `simplify` runs them:

1. in-place operations become ordinary ones (`x += y`, `ReLU(inplace=True)`) where that is safe, and are pinned where not;
2. what does nothing in eval mode goes: Dropout, Identity;
3. what depends on no input is computed now;
4. the same function of the same values is computed once (several branches that each start with a ReLU, for example);
5. what nobody reads goes (auxiliary heads in eval mode, for example);
6. convolutions and linear layers are taken out of their modules as a `Layer` (weight, mask, bias, geometry);
7. a batch norm that directly follows a layer is folded into it, and a ReLU or ReLU6 that directly follows is fused. The mask
   stays: folding scales rows, it moves no zero.

It chooses no kernels; that is `ops.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ops.inplace import functionalise
from ops.layers import SparseConv2d, SparseLinear

__all__ = ["Layer", "simplify"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer with everything that was folded into it.

    Attributes:
        kind: "conv2d", "depthwise_conv2d" or "linear".
        weight: float[out, in/groups, kh, kw] or float[out, in]; zero outside the mask.
        mask: bool like the weight, or None for a dense layer.
        bias: float[out] or None.
        stride, dilation: (vertical, horizontal); empty for linear, like padding: (top, bottom, left, right).
        groups: as in torch; 1 for linear.
        pattern: canonical text of the sparsity pattern, "" for a dense layer.
        target: the density the layer was built for (its mask may not be drawn yet).
        post_ops: "relu" or "relu6", or nothing.
    """

    kind: str
    weight: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pattern: str = ""
    target: float = 1.0
    post_ops: tuple[str, ...] = ()


def simplify(graph: fx.Graph) -> None:
    """Run all passes on a graph made by `ops.trace.trace`, in place."""
    functionalise(graph)
    _drop_identities(graph)
    _fold_constants(graph)
    _merge_equals(graph)
    graph.eliminate_dead_code(_keeps)
    for node in graph.nodes:
        layer = _layer_of(node)
        if layer is not None:
            node.meta["layer"] = layer
    _fold_followers(graph)
    graph.eliminate_dead_code(_keeps)


def _keeps(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or node.meta.get("pinned", False)


# --- identities and constants -------------------------------------------------------------------------------------

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        nothing = node.op == "call_module" and (
            type(node.meta["module"]) is nn.Identity
            or (isinstance(node.meta["module"], nn.modules.dropout._DropoutNd) and not node.meta["module"].training)
        )
        if node.op == "call_function" and node.target in _DROPOUTS:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            nothing = training is False or rate == 0
        if nothing and not _hooked(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _fold_constants(graph: fx.Graph) -> None:
    """Mark what depends on no input; the plan then embeds its value. Random draws are left alone."""
    for node in graph.nodes:
        inputs = node.all_input_nodes
        node.meta["constant"] = node.op == "get_attr" or (
            node.op in ("call_function", "call_method")
            and bool(inputs)
            and all(n.meta["constant"] for n in inputs)
            and not node.meta.get("pinned")
            and not _random(node)
        )


def _random(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("rand", "dropout", "bernoulli", "normal", "multinomial"))


def _merge_equals(graph: fx.Graph) -> None:
    """Compute equal calls once: functions, methods, and torch's modules that have no parameters or buffers.

    Not where something is still changed in place: two equal values may then have to differ later.
    """
    if any(node.meta.get("pinned") for node in graph.nodes):
        return
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":
            module = node.meta["module"]
            if not type(module).__module__.startswith("torch.nn") or _hooked(node) or module.state_dict():
                continue
            call: Any = (type(module), repr(module))
        elif node.op in ("call_function", "call_method") and not _random(node):
            call = node.target
        else:
            continue
        key = (node.op, call, _hashable(node.args), _hashable(node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _hashable(argument: Any) -> Any:
    """An fx argument as a key: nodes stand for themselves, numbers carry their type (1, 1.0 and True differ)."""
    if isinstance(argument, tuple | list):
        return (type(argument).__name__, *(_hashable(a) for a in argument))
    if isinstance(argument, dict):
        return ("dict", *((name, _hashable(a)) for name, a in sorted(argument.items())))
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, repr(argument))


# --- layers --------------------------------------------------------------------------------------------------------------


def _hooked(node: fx.Node) -> bool:
    module = node.meta["module"] if node.op == "call_module" else None
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _layer_of(node: fx.Node) -> Layer | None:
    """The convolution or linear layer a node computes, or None if it is something else or out of the ordinary."""
    if node.op == "call_module" and not _hooked(node):
        module = node.meta["module"]
        forward = type(module).forward
        plain = isinstance(module, nn.Conv2d) and type(module)._conv_forward is nn.Conv2d._conv_forward
        if plain and forward in (nn.Conv2d.forward, SparseConv2d.forward) and module.padding_mode == "zeros":
            geometry = module.stride, module.padding, module.dilation, module.groups
            return _conv(_weight(module), _detached(module.bias), *geometry) if node.meta["value"].ndim == 4 else None
        if isinstance(module, nn.Linear) and forward in (nn.Linear.forward, SparseLinear.forward):
            weight, mask, pattern, target = _weight(module)
            return Layer("linear", weight, mask, _detached(module.bias), pattern=pattern, target=target)
    if node.op == "call_function" and node.target in (F.linear, F.conv2d):
        return _functional_layer(node)
    return None


def _functional_layer(node: fx.Node) -> Layer | None:
    """F.linear or F.conv2d with constant weights."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, node.args)), **node.kwargs}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(x, fx.Node) or x.meta["constant"] or not isinstance(weight, fx.Node):
        return None
    if not weight.meta["constant"] or (isinstance(bias, fx.Node) and not bias.meta["constant"]):
        return None  # computed from the input, so not a layer
    w = weight.meta["value"].detach()
    b = bias.meta["value"].detach() if isinstance(bias, fx.Node) else None
    if node.target is F.linear:
        return Layer("linear", w, None, b) if w.ndim == 2 else None
    if x.meta["value"].ndim != 4:
        return None
    geometry = [
        given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    ]
    return _conv((w, None, "", 1.0), b, *geometry)


def _conv(
    packed: tuple[torch.Tensor, torch.Tensor | None, str, float],
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Layer:
    """A convolution's Layer; numbers stand for pairs as in torch, and padding may be "same" or "valid"."""
    weight, mask, pattern, target = packed
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        totals = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        sides = tuple(side for total in totals for side in (total // 2, total - total // 2))
    else:
        sides = tuple(side for p in _pair(padding) for side in (p, p))
    kind = "depthwise_conv2d" if groups > 1 and weight.shape[1] == 1 else "conv2d"
    return Layer(kind, weight, mask, bias, stride, sides, dilation, groups, pattern, target)


def _pair(value: Any) -> tuple[int, int]:
    vertical, horizontal = (
        (value * 2 if len(value) == 1 else value) if isinstance(value, tuple | list) else (value, value)
    )
    return int(vertical), int(horizontal)


def _weight(module: nn.Conv2d | nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None, str, float]:
    """(weight with zeros applied, mask, pattern, target density)."""
    if isinstance(module, SparseConv2d | SparseLinear) and module.density < 1:
        weight, mask = module.effective_weight().detach(), module.mask.detach()
        # An explicit zero, so that a NaN outside the mask does not survive the product weight * mask.
        return torch.where(mask, weight, weight.new_zeros(())), mask, str(module.pattern), module.density
    return module.weight.detach(), None, "", 1.0


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


# --- what follows a layer ------------------------------------------------------------------------------------------------


def _fold_followers(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        while "layer" in node.meta and len(node.users) == 1:
            follower = next(iter(node.users))
            fused = _fused(node, follower)
            if fused is None:
                break
            node.meta["layer"] = fused
            node.meta["value"] = follower.meta["value"]
            follower.replace_all_uses_with(node)
            graph.erase_node(follower)
    for node in graph.nodes:
        if "layer" in node.meta:
            node.meta["layer"] = _flushed(node.meta["layer"])


def _fused(node: fx.Node, follower: fx.Node) -> Layer | None:
    """The layer with its follower folded in, or None where the follower is nothing that can be."""
    layer: Layer = node.meta["layer"]
    if layer.post_ops or follower.meta.get("pinned") or _hooked(follower):
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
    return _with_norm(layer, module)


def _activation(node: fx.Node) -> str | None:
    if node.op == "call_module":
        return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(node.meta["module"]))
    if node.op == "call_function":
        names: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
        return names.get(node.target)
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
