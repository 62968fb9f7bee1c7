"""Which planned operations have a compiled kernel, whatever way they were written: `recognise(op) -> Native | None`.

A network may say `nn.ReLU()`, `F.relu(x)` or `x.relu()`; here these become one name with plain parameters. Layers are not
looked at (`PlannedOp.layer` already says everything). What is not recognised runs through torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ops.plan import PlannedOp, Ref

__all__ = ["Native", "recognise"]


@dataclass(frozen=True)
class Native:
    """An operation on values with a compiled kernel.

    Attributes:
        kind: "activate", "add", "multiply", "gate" (one factor per image and channel), "affine", "max_pool",
            "avg_pool", "global_average", "concat" or "view".
        inputs: the values it reads, in the kernel's order.
        parameters: of the kernel: `activation`, `kernel_size`, `stride`, `padding`, `scale`, `shift`, ...
    """

    kind: str
    inputs: tuple[int, ...]
    parameters: dict[str, Any] = field(default_factory=dict)


def recognise(op: PlannedOp) -> Native | None:
    """The kernel for an operation that is no layer, or None where torch has to run it."""
    if op.layer is not None or op.dtype != "float32" or any(not shape for shape in op.input_shapes):
        return None
    if len(op.input_shapes) != len(op.inputs):  # reads something that is no tensor
        return None
    call = op.call
    module = getattr(call, "__self__", None)
    if isinstance(module, nn.Module):
        find = _MODULES.get(type(module))
        return (
            find(op, module) if find is not None and type(module).forward is getattr(call, "__func__", None) else None
        )
    if op.detail == "method":
        method = _METHODS.get(op.kind)
        return method(op) if method is not None else None
    function = _FUNCTIONS.get(call)
    return function(op) if function is not None else None


def _one(op: PlannedOp) -> tuple[int, ...] | None:
    """The only value an operation reads, if it is its first argument."""
    first = op.args[0] if op.args else None
    return (first.index,) if isinstance(first, Ref) and len(op.inputs) == 1 else None


def _given(op: PlannedOp, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments after the first, by name."""
    given = {**defaults, **dict(zip(names, op.args[1:])), **op.kwargs}
    return given if set(given) <= set(names) else None


def _activation(name: str) -> Callable[..., Native | None]:
    def find(op: PlannedOp, *_: Any) -> Native | None:
        inputs = _one(op)
        return Native("activate", inputs, {"activation": name}) if inputs else None

    return find


def _two(kind: str) -> Callable[[PlannedOp], Native | None]:
    def find(op: PlannedOp) -> Native | None:
        both = len(op.args) == 2 and all(isinstance(a, Ref) for a in op.args)
        if not both or op.kwargs.get("alpha", 1) != 1 or set(op.kwargs) - {"alpha"}:
            return None
        shapes = dict(zip(op.inputs, op.input_shapes))
        a, b = (shapes[arg.index] for arg in op.args)
        if a == b:
            return Native(kind, tuple(arg.index for arg in op.args))
        per_channel = len(a) == len(b) == 4 and a[:2] == b[:2] and (1, 1) in (a[2:], b[2:])
        if kind == "multiply" and per_channel:
            wide, gate = op.args if b[2:] == (1, 1) else op.args[::-1]
            return Native("gate", (wide.index, gate.index))
        return None

    return find


def _affine(op: PlannedOp, norm: nn.BatchNorm2d) -> Native | None:
    if norm.running_mean is None or norm.running_var is None or norm.training:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    inputs = _one(op)
    if not inputs:
        return None
    if scale.is_meta:  # the plan can be priced, not run
        scale, shift = (torch.zeros(part.shape) for part in (scale, shift))
    return Native("affine", inputs, {"scale": scale.float().numpy(), "shift": shift.float().numpy()})


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, tuple | list):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


_POOL_NAMES = ("kernel_size", "stride", "padding")
_MAX_NAMES = (*_POOL_NAMES, "dilation", "ceil_mode", "return_indices")
_AVG_NAMES = (*_POOL_NAMES, "ceil_mode", "count_include_pad", "divisor_override")


def _pool(kind: str, op: PlannedOp, given: dict[str, Any] | None) -> Native | None:
    inputs = _one(op)
    if inputs is None or given is None or len(op.output_shape) != 4:
        return None
    if given.get("ceil_mode") or given.get("return_indices") or given.get("divisor_override") is not None:
        return None
    kernel_size = _pair(given["kernel_size"])
    parameters: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": kernel_size if not given.get("stride") else _pair(given["stride"]),
        "padding": _pair(given.get("padding", 0)),
    }
    if kind == "max_pool":
        parameters["dilation"] = _pair(given.get("dilation", 1))
    else:
        parameters["count_include_pad"] = bool(given.get("count_include_pad", True))
    return Native(kind, inputs, parameters)


def _pool_module(kind: str, names: tuple[str, ...]) -> Callable[[PlannedOp, Any], Native | None]:
    return lambda op, module: _pool(kind, op, {name: getattr(module, name) for name in names})


def _pool_function(kind: str, names: tuple[str, ...]) -> Callable[[PlannedOp], Native | None]:
    return lambda op: _pool(kind, op, _given(op, names, {}))


def _global(op: PlannedOp, size: Any) -> Native | None:
    inputs = _one(op)
    one = size in (1, (1,), (1, 1), [1, 1])
    return Native("global_average", inputs) if inputs and one and len(op.input_shapes[0]) == 4 else None


def _mean(op: PlannedOp) -> Native | None:
    given = _given(op, ("dim", "keepdim"), {"keepdim": False})
    inputs = _one(op)
    if (
        given is None
        or inputs is None
        or len(op.input_shapes[0]) != 4
        or not isinstance(given.get("dim"), tuple | list)
    ):
        return None
    spatial = sorted(d % 4 for d in given["dim"]) == [2, 3]
    return Native("global_average", inputs) if spatial else None


def _concat(op: PlannedOp) -> Native | None:
    given = {**dict(zip(("tensors", "dim"), op.args)), **op.kwargs}
    parts, dim = given.get("tensors", ()), given.get("dim", 0)
    if set(given) - {"tensors", "dim"} or dim not in (1, -3) or len(op.output_shape) != 4:
        return None
    if not isinstance(parts, tuple | list) or not all(isinstance(p, Ref) for p in parts):
        return None
    return Native("concat", tuple(p.index for p in parts))


def _view(op: PlannedOp, *_: Any) -> Native | None:
    """Flatten, reshape, view, squeeze: the same numbers in the same order under another shape."""
    inputs = _one(op)
    return Native("view", inputs) if inputs else None


_MODULES: dict[type, Callable[[PlannedOp, Any], Native | None]] = {
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    nn.Hardswish: _activation("hardswish"),
    nn.SiLU: _activation("silu"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Hardsigmoid: _activation("hardsigmoid"),
    nn.BatchNorm2d: _affine,
    nn.MaxPool2d: _pool_module("max_pool", _MAX_NAMES),
    nn.AvgPool2d: _pool_module("avg_pool", _AVG_NAMES),
    nn.AdaptiveAvgPool2d: lambda op, module: _global(op, module.output_size),
    nn.Flatten: _view,
}
_FUNCTIONS: dict[Any, Callable[[PlannedOp], Native | None]] = {
    F.relu: _activation("relu"),
    torch.relu: _activation("relu"),
    F.relu6: _activation("relu6"),
    F.hardswish: _activation("hardswish"),
    F.silu: _activation("silu"),
    torch.sigmoid: _activation("sigmoid"),
    F.sigmoid: _activation("sigmoid"),
    F.hardsigmoid: _activation("hardsigmoid"),
    operator.add: _two("add"),
    torch.add: _two("add"),
    operator.mul: _two("multiply"),
    torch.mul: _two("multiply"),
    F.max_pool2d: _pool_function("max_pool", _MAX_NAMES),
    torch.max_pool2d: _pool_function("max_pool", _MAX_NAMES),
    F.avg_pool2d: _pool_function("avg_pool", _AVG_NAMES),
    F.adaptive_avg_pool2d: lambda op: _global(op, op.args[1] if len(op.args) > 1 else op.kwargs.get("output_size")),
    torch.mean: _mean,
    torch.cat: _concat,
    torch.concat: _concat,
    torch.flatten: _view,
    torch.reshape: _view,
    torch.squeeze: _view,
}
_METHODS: dict[str, Callable[[PlannedOp], Native | None]] = {
    "relu": _activation("relu"),
    "sigmoid": _activation("sigmoid"),
    "add": _two("add"),
    "mul": _two("multiply"),
    "mean": _mean,
    "flatten": _view,
    "reshape": _view,
    "view": _view,
    "squeeze": _view,
}
