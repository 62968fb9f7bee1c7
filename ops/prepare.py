"""Pack the weights of a schedule's steps and pick their compiled kernels: `prepare(step, plan) -> KernelStep`.

Importing this file loads Numba; kernels are compiled, or loaded from the on-disk cache, when their step is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ops.formats import CSR
from ops.fuse import Layer
from ops.kernels import depthwise, elementwise, linear, movement, pooling
from ops.kernels.portable import portable_conv_step
from ops.kernels.specialised import specialised_conv_step, specialised_pair_step
from ops.kernels.step import KernelStep
from ops.schedule import Step

__all__ = ["prepare"]


def prepare(step: Step) -> KernelStep:
    """The kernel of a step (any kind but "torch", "fetch" and "view"), weights packed."""
    return _PREPARE[step.kind](step)


def packed(layer: Layer) -> CSR:
    """The kept weights of a layer as a matrix [out, in/groups * kernel_height * kernel_width]."""
    mask = torch.ones_like(layer.weight, dtype=torch.bool) if layer.mask is None else layer.mask
    return CSR.from_dense(layer.weight.flatten(1), mask.flatten(1))


def _bias(layer: Layer) -> npt.NDArray[np.float32] | None:
    return None if layer.bias is None else layer.bias.numpy().astype(np.float32)


def _activation(layer: Layer) -> str:
    return layer.post_ops[0] if layer.post_ops else "none"


def _ints(numbers: Any) -> tuple[Any, ...]:
    return tuple(int(n) for n in numbers)


_CONV: dict[str, Callable[..., KernelStep]] = {
    "portable": portable_conv_step,
    "specialised": specialised_conv_step,
}


def _conv(step: Step) -> KernelStep:
    layer = step.layer
    assert layer is not None
    assert step.writes is not None
    return _CONV[step.kernel](
        packed(layer),
        _ints(layer.weight.shape[2:]),
        _bias(layer),
        _ints(layer.stride),
        _ints(layer.padding),
        _ints(layer.dilation),
        layer.groups,
        step.reads[0].lanes,
        step.writes.lanes,
        _activation(layer),
        step.reads[1].lanes if len(step.reads) > 1 else None,
    )


def _pair(step: Step) -> KernelStep:
    first, second = step.layer, step.parameters["second"]
    assert first is not None
    assert step.writes is not None
    return specialised_pair_step(
        packed(first),
        packed(second),
        _ints(first.weight.shape[2:]),
        _bias(first),
        _bias(second),
        _ints(first.stride),
        _ints(first.padding),
        _ints(first.dilation),
        step.reads[0].lanes,
        step.writes.lanes,
        (_activation(first), _activation(second)),
        step.reads[1].lanes if len(step.reads) > 1 else None,
    )


def _depthwise(step: Step) -> KernelStep:
    layer = step.layer
    assert layer is not None
    assert step.writes is not None
    return depthwise.depthwise_step(
        packed(layer),
        _ints(layer.weight.shape[2:]),
        _bias(layer),
        _ints(layer.stride),
        _ints(layer.padding),
        _ints(layer.dilation),
        step.reads[0].lanes,
        step.writes.lanes,
        _activation(layer),
        step.reads[1].lanes if len(step.reads) > 1 else None,
    )


def _linear(step: Step) -> KernelStep:
    layer = step.layer
    assert layer is not None
    batch = math.prod(step.reads[0].shape[:-1])
    return linear.linear_step(packed(layer), batch, _bias(layer), _activation(layer), residual=len(step.reads) > 1)


def _max_pool(step: Step) -> KernelStep:
    given, source, target = step.parameters, step.reads[0].lanes, _to(step)
    ph, pw = given["padding"]
    return pooling.max_pool_step(
        given["kernel_size"], given["stride"], (ph, ph, pw, pw), given["dilation"], source, target
    )


def _avg_pool(step: Step) -> KernelStep:
    given, source, target = step.parameters, step.reads[0].lanes, _to(step)
    ph, pw = given["padding"]
    include = given["count_include_pad"]
    return pooling.avg_pool_step(given["kernel_size"], given["stride"], (ph, ph, pw, pw), include, source, target)


def _to(step: Step) -> Any:
    assert step.writes is not None
    return step.writes.lanes


_PREPARE: dict[str, Callable[[Step], KernelStep]] = {
    "conv": _conv,
    "pair": _pair,
    "depthwise": _depthwise,
    "linear": _linear,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_average": lambda step: pooling.global_average_step(step.reads[0].lanes),
    "to_lanes": lambda step: movement.to_lanes_step(_to(step)),
    "from_lanes": lambda step: movement.from_lanes_step(step.reads[0].lanes),
    "relayout": lambda step: movement.relayout_step(step.reads[0].lanes, _to(step)),
    "copy": lambda step: movement.copy_step(step.reads[0].lanes, _to(step)),
    "halo": lambda step: movement.halo_step(_to(step)),
    "add": lambda step: elementwise.add_step(
        step.reads[0].lanes, step.reads[1].lanes, _to(step), step.parameters.get("activation", "none")
    ),
    "multiply": lambda step: elementwise.multiply_step(step.reads[0].lanes, step.reads[1].lanes, _to(step)),
    "gate": lambda step: elementwise.gate_step(step.reads[0].lanes, _to(step)),
    "activate": lambda step: elementwise.activate_step(step.reads[0].lanes, _to(step), step.parameters["activation"]),
    "affine": lambda step: elementwise.affine_step(
        step.reads[0].lanes, _to(step), step.parameters["scale"], step.parameters["shift"], "none"
    ),
    "plain_activate": lambda step: elementwise.plain_activate_step(
        math.prod(step.reads[0].shape), step.parameters["activation"]
    ),
    "plain_add": lambda step: elementwise.plain_add_step(math.prod(step.reads[0].shape)),
}
