"""Convolutions and linear layers, taken out of the modules and calls that compute them, as plain `Layer` records.

Only what is exactly torch's is taken: a module with hooks, a subclass with a forward of its own, other padding modes and weights
computed from the input are left as they are. Start with `layer_of`; what follows a layer is folded in by `ops.followers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from ops.layers import SparseConv2d, SparseLinear
from ops.masks import kept_count
from ops.patterns import parse_pattern

__all__ = ["FEW_ZEROS", "Layer", "hooked", "layer_of"]

# A dense layer whose weight has at least a tenth exact zeros was pruned by somebody; they are its mask.
FEW_ZEROS = 0.9


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer with everything that was folded into it: act(layer(x) + bias + residual).

    Attributes:
        kind: "conv2d", "depthwise_conv2d" or "linear".
        weight: float[out, in/groups, kh, kw] or float[out, in]; zero outside the mask.
        mask: bool like the weight, or None for a dense layer.
        bias: float[out] or None.
        stride, dilation: (vertical, horizontal); empty for linear, like padding: (top, bottom, left, right).
        groups: as in torch; 1 for linear.
        pattern: canonical text of the sparsity pattern, "" for a dense layer.
        target: the density the layer was built for (its mask may not be drawn yet).
        residual: whether a second input, of the shape of the result, is added after the bias.
        post_ops: "relu", "relu6", "hardswish" or "silu", applied last, or nothing.
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
    residual: bool = False
    post_ops: tuple[str, ...] = ()

    @cached_property
    def nnz(self) -> int:
        """Kept weights; on the meta device those that the mask is to keep."""
        if self.mask is None:
            return self.weight.numel()
        if not self.mask.is_meta:
            return int(self.mask.sum())
        try:
            return kept_count(tuple(self.weight.shape), self.target, parse_pattern(self.pattern))
        except ValueError:  # a part of a layer, smaller than the pattern's blocks
            return round(self.target * self.weight.numel())


def hooked(node: fx.Node) -> bool:
    """Whether something of the user's hangs on the call of a module."""
    module = node.meta["module"] if node.op == "call_module" else None
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def layer_of(node: fx.Node) -> Layer | None:
    """The convolution or linear layer a node computes, or None if it is something else or out of the ordinary."""
    if node.op == "call_module" and (not hooked(node) or _pruned(node.meta["module"])):
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
    if _pruned(module):
        tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        mask, kept = tensors["weight_mask"].detach().bool(), tensors["weight_orig"].detach()
        return torch.where(mask, kept, kept.new_zeros(())), mask, "unstructured", float(mask.float().mean())
    weight = module.weight.detach()
    if isinstance(module, SparseConv2d | SparseLinear) or weight.is_meta or not weight.numel():
        return weight, None, "", 1.0
    mask = weight != 0
    share = int(mask.sum()) / weight.numel()
    return (weight, mask, "unstructured", share) if share <= FEW_ZEROS else (weight, None, "", 1.0)


def _pruned(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune holds the mask of the weight, and nothing else hangs on the call."""
    hooks = list(module._forward_pre_hooks.values())
    known = bool(hooks) and all(isinstance(hook, prune.BasePruningMethod) for hook in hooks)
    return known and not module._forward_hooks and hasattr(module, "weight_mask")


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()
