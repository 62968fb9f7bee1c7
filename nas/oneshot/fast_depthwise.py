"""Depthwise convolution for training on the CPU: torch's forward pass, and a backward pass that is faster than its own.

The gradient of the input is a convolution with the window turned round, which torch is fast at, as it is not at its own form of it
where the window is dilated. The gradient of the weight is ours (`nas.oneshot.fast_kernels`). Start with `depthwise`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nas.oneshot.fast_kernels import supports, weight_gradient


def is_fast(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `depthwise` computes this convolution of x, and pays.

    It does for float32 on the CPU, as many groups as channels on both sides, square windows of 3, 5 or 7 with stride 1 or 2 that
    keep the size; torch's own code for the plain 3x3 is as fast.
    """
    if conv.groups == 1 or x.is_cuda or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    window = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    plain = conv.groups == conv.in_channels == conv.out_channels and conv.bias is None and conv.padding_mode == "zeros"
    return plain and x.device.type == "cpu" and _is_fast_window(*window) and supports(conv.groups, conv.kernel_size[0])


@lru_cache(maxsize=1024)
def _is_fast_window(kernel: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    side, step, apart = kernel[0], stride[0], dilation[0]
    return (
        (kernel, stride, dilation) == ((side, side), (step, step), (apart, apart))
        and padding == (apart * (side // 2),) * 2
        and step in (1, 2)
        and (side, apart) != (3, 1)
    )


def depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """Convolution of every channel with its own window, zeros around. Differentiable once.

    Args:
        x: float32[n, c, h, w] in torch.channels_last.
        weight: float32[c, 1, kernel, kernel].
        stride: 1 or 2.
        dilation: of the window.

    Returns:
        float32[n, c, ceil(h / stride), ceil(w / stride)] in torch.channels_last.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _convolve(x, weight, stride, dilation)
    result: Tensor = _Depthwise.apply(x, weight, stride, dilation)
    return result


def _convolve(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    half = weight.shape[2] // 2
    # Taps that are outside the image wherever the window is are left out: torch is slow where the padding is larger than the image.
    down, right = (min(half, (size - 1) // dilation) for size in x.shape[2:])
    if down < half or right < half:
        weight = weight[:, :, half - down : half + down + 1, half - right : half + right + 1]
    return torch.conv2d(x, weight, None, stride, (dilation * down, dilation * right), dilation, x.shape[1])


def input_gradient(g: Tensor, weight: Tensor, size: tuple[int, int], stride: int, dilation: int) -> Tensor:
    """Gradient of `depthwise`'s input, of height and width `size`."""
    if stride == 2:  # what the convolution skipped has gradient 0
        spread = torch.zeros(*g.shape[:2], *size).to(g).contiguous(memory_format=torch.channels_last)
        spread[:, :, ::2, ::2] = g
        g = spread
    return _convolve(g, weight.flip(2, 3), 1, dilation)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return _convolve(x, weight, stride, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = input_gradient(g, weight, (x.shape[2], x.shape[3]), ctx.stride, ctx.dilation)
        if ctx.needs_input_grad[1]:
            kernel = weight.shape[2]
            pad = ctx.dilation * (kernel // 2)
            by_weight = weight_gradient(x, g, kernel, ctx.stride, pad, ctx.dilation)
        return by_x, by_weight, None, None
