"""Operations of a plan that torch computes, as functions of the values they read: `torch_call(op)(values) -> result`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ops.fuse import Layer
from ops.plan import PlannedOp, Ref

__all__ = ["fill", "torch_call"]

Values = Mapping[int, Any]
Call = Callable[[Values], Any]

_IN_PLACE: dict[tuple[str, ...], Callable[[torch.Tensor], Any] | None] = {
    (): None,
    ("relu",): torch.relu_,
    ("relu6",): lambda t: F.hardtanh_(t, 0.0, 6.0),
    ("hardswish",): lambda t: F.hardswish(t, inplace=True),
    ("silu",): lambda t: F.silu(t, inplace=True),
}


def torch_call(op: PlannedOp) -> Call:
    """A function from the values `op` reads (by index) to its result."""
    return _function(op) if op.layer is None else _layer(op, op.layer)


def _layer(op: PlannedOp, layer: Layer) -> Call:
    """Dense through torch, the masked weight as it is."""
    source = op.inputs[0]
    other = op.inputs[1] if layer.residual else -1
    weight, bias, post = layer.weight.contiguous(), layer.bias, _IN_PLACE[layer.post_ops]

    def finished(y: torch.Tensor, values: Values) -> torch.Tensor:
        if other >= 0:
            y.add_(values[other])
        if post is not None:
            post(y)
        return y

    if layer.kind == "linear":
        return lambda values: finished(F.linear(values[source], weight, bias), values)

    top, bottom, left, right = layer.padding
    even = top == bottom and left == right
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    padding = (top, left) if even else (0, 0)

    def conv(values: Values) -> torch.Tensor:
        x = values[source] if even else F.pad(values[source], (left, right, top, bottom))
        return finished(torch.conv2d(x, weight, bias, stride, padding, dilation, groups), values)

    return conv


def _function(op: PlannedOp) -> Call:
    """A call with its constants bound; the usual forms of arguments have a shorter way."""
    call, args, kwargs = op.call, op.args, op.kwargs
    assert call is not None
    if not _read(kwargs):
        constants = args[1:]
        if args and isinstance(args[0], Ref) and not _read(constants):
            first = args[0].index
            return lambda values: call(values[first], *constants, **kwargs)
        if len(args) == 2 and all(isinstance(a, Ref) for a in args):
            left, right = args[0].index, args[1].index
            return lambda values: call(values[left], values[right], **kwargs)
    positional, named = fill(args), fill(kwargs)
    return lambda values: call(*positional(values), **named(values))


def fill(template: Any) -> Call:
    """A function that puts values in the place of the `Ref`s of a template."""
    if isinstance(template, Ref):
        index = template.index
        return lambda values: values[index]
    if not _read(template):
        return lambda values: template
    if isinstance(template, dict):
        named = {name: fill(part) for name, part in template.items()}
        return lambda values: {name: get(values) for name, get in named.items()}
    if isinstance(template, slice):
        ends = [fill(end) for end in (template.start, template.stop, template.step)]
        return lambda values: slice(*(get(values) for get in ends))
    parts = [fill(part) for part in template]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return lambda values: type(template)(*(get(values) for get in parts))
    kind = type(template)
    return lambda values: kind([get(values) for get in parts])


def _read(template: Any) -> set[int]:
    """The values a template refers to."""
    if isinstance(template, Ref):
        return {template.index}
    if isinstance(template, tuple | list):
        return {i for part in template for i in _read(part)}
    if isinstance(template, dict):
        return _read(list(template.values()))
    if isinstance(template, slice):
        return _read((template.start, template.stop, template.step))
    return set()
