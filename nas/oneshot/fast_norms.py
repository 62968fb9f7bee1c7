"""Sums of batch-normalised images on the CPU, in one pass where torch takes one per norm and one per sum, and more exactly.

torch sums the statistics of images in torch.channels_last in float32, number after number; here they are sums of short sums, in
float64. Start with `normalised_sum`; its twin is `torch.nn.functional.batch_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nas.oneshot.fast_norm_kernels import backward, forward
from ops.kernels.isa import compiles
from ops.kernels.vector import LANES


def is_fast(x: Tensor) -> bool:
    """Whether `normalised_sum` takes x: float32 on the CPU, more than one pixel, channels that fill or share vectors."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.numel() > x.shape[1] > 0
        and (x.shape[1] % LANES == 0 or LANES % x.shape[1] == 0)
        and compiles()
        and not torch.is_autocast_enabled("cpu")
    )


def normalised_sum(
    xs: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float,
    relu: bool = False,
    normed: Sequence[bool] | None = None,
) -> Tensor:
    """sum_i scale_i (x_i - mean x_i) / sqrt(var x_i + eps) + shift, over the batch and all pixels. Differentiable once.

    Args:
        xs: float32[n, c, h, w] each.
        scale: float32[len(xs), c].
        shift: float32[c]; None is 0.
        eps: added to the variances.
        relu: replace what is negative by 0; with one input only.
        normed: which inputs are normalised; of the others the term is scale_i x_i. None: all.

    Returns:
        float32[n, c, h, w] in torch.channels_last.
    """
    if relu and len(xs) > 1:
        raise ValueError(f"a ReLU can be taken along with one input only, got {len(xs)}")
    shift = constant(xs[0].shape[1], 0.0) if shift is None else shift
    laid_out = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    result: Tensor = _NormalisedSum.apply(
        scale, shift, eps, relu, _all(len(xs)) if normed is None else np.array(normed), *laid_out
    )
    return result


@lru_cache(maxsize=256)
def constant(channels: int, value: float) -> Tensor:
    """float32[channels], shared: not to be written to."""
    with torch.inference_mode(False):
        return torch.full((channels,), value, dtype=torch.float32)


@lru_cache(maxsize=64)
def _all(count: int) -> Any:
    return np.ones(count, bool)


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64)


class _NormalisedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor, eps: float, relu: bool, normed: Any, *xs: Tensor) -> Tensor:
        n, c, h, w = xs[0].shape
        y = torch.empty_like(xs[0], memory_format=torch.channels_last)
        scale, shift = scale.contiguous(), shift.contiguous()
        mean, rstd = np.empty((2, len(xs), c))
        forward(
            _addresses(xs), normed, y.data_ptr(), (n * h * w, c), scale.numpy(), shift.numpy(), eps, relu, mean, rstd
        )
        ctx.save_for_backward(scale, shift, *xs)
        ctx.relu, ctx.normed, ctx.mean, ctx.rstd = relu, normed, mean, rstd
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        scale, shift, *xs = ctx.saved_tensors
        n, c, h, w = g.shape
        g = g.contiguous(memory_format=torch.channels_last)
        by_x = [
            torch.empty_like(x, memory_format=torch.channels_last) if wanted else None
            for x, wanted in zip(xs, ctx.needs_input_grad[5:], strict=True)
        ]
        by_scale, by_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        backward(
            _addresses(xs),
            ctx.normed,
            ctx.normed | ctx.needs_input_grad[0] | ctx.needs_input_grad[1],
            g.data_ptr(),
            _addresses(by_x),
            (n * h * w, c),
            scale.numpy(),
            shift.numpy(),
            ctx.relu,
            ctx.mean,
            ctx.rstd,
            by_scale.numpy(),
            by_shift.numpy(),
        )
        return by_scale, by_shift, None, None, None, *by_x
