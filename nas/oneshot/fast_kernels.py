"""Gradient of a depthwise convolution's weight on the CPU, in vectors of 16 floats.

The libraries under torch have no fast code for it where the window is 5x5 or dilated. Each image is copied into a padded buffer
that holds the columns of every row by their remainder modulo the stride; then a tap is a shift, and the taps of one row are
running sums that stay in registers. Start with `weight_gradient`; its twin is torch's own `convolution_backward`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ops.kernels.isa import compiles
from ops.kernels.vector import LANES, fma, jit, load_any, read_f32, store_any, write_f32

TAPS = (3, 5, 7)
"""Window sides there is code for."""


def supports(channels: int, kernel: int) -> bool:
    """Whether `weight_gradient` takes such a convolution: channels that fill vectors or share them evenly, a window of `TAPS`."""
    return kernel in TAPS and (channels % LANES == 0 or LANES % channels == 0) and compiles()


def weight_gradient(x: Tensor, g: Tensor, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Gradient of a square depthwise convolution's weight.

    Args:
        x: the convolution's input, float32[n, c, h, w], contiguous in torch.channels_last.
        g: gradient of its output, float32[n, c, h', w'], contiguous in torch.channels_last.
        kernel, stride, padding, dilation: of the convolution.

    Returns:
        float32[c, 1, kernel, kernel].
    """
    n, c, height, width = x.shape
    rows, columns = g.shape[2:]
    reach = (kernel - 1) * dilation
    tall = (rows - 1) * stride + reach + 1
    line = (-(-(columns + reach // stride) * c // LANES) + 1) * LANES  # floats per remainder of a buffer's row
    filled = -(-columns * c // LANES) * LANES  # floats of a row of g, filled up with zeros
    floats = partial(torch.zeros, dtype=torch.float32)
    buffer, row, total = floats(tall * stride * line + LANES), floats(filled), floats(kernel, kernel, max(c, LANES))
    _accumulate(
        (x.data_ptr(), g.data_ptr(), buffer.data_ptr(), row.data_ptr(), total.data_ptr()),
        (n, c, height, width, rows, columns),
        (kernel, stride, padding, dilation),
        (tall, line),
    )
    if c < LANES:  # lanes are neighbouring pixels
        total = total.view(kernel, kernel, LANES // c, c).sum(2)
    return total.permute(2, 0, 1).unsqueeze(1).contiguous()


@jit
def _accumulate(addresses: Any, sizes: Any, window: Any, padded: Any) -> None:
    x, g, buffer, row, total = addresses
    n, c, height, width, rows, columns = sizes
    kernel, stride, padding, dilation = window
    line = padded[1]
    flat = columns * c
    vectors = (flat + 15) // 16
    for image in range(n):
        _fill(x + 4 * image * height * width * c, (c, height, width), buffer, padded, (stride, padding))
        for y in range(rows):
            source = g + 4 * (image * rows + y) * flat
            if flat % 16:
                _copy(source, row, flat)
                source = row
            for i in range(kernel):
                taps = buffer + 4 * (y * stride + i * dilation) * stride * line
                if c < 16:
                    _row(source, taps, (vectors, 64), total + 64 * kernel * i, 64, (c, line), window)
                else:
                    for tile in range(0, 4 * c, 64):
                        sums = total + 4 * c * kernel * i + tile
                        _row(source + tile, taps + tile, (columns, 4 * c), sums, 4 * c, (c, line), window)


@jit
def _copy(source: Any, target: Any, floats: Any) -> None:
    i = 0
    while i + 16 <= floats:
        store_any(target + 4 * i, load_any(source + 4 * i))
        i += 16
    while i < floats:
        write_f32(target + 4 * i, read_f32(source + 4 * i))
        i += 1


@jit
def _fill(x: Any, sizes: Any, buffer: Any, padded: Any, window: Any) -> None:
    """One image [h, w, c] into buffer[tall, stride, line]; what lies beyond the image stays 0."""
    c, height, width = sizes
    tall, line = padded
    stride, padding = window
    for row in range(max(0, padding), min(tall, height + padding)):
        for remainder in range(stride):
            target = buffer + 4 * (row * stride + remainder) * line
            place = max(0, (padding - remainder + stride - 1) // stride)  # the first with a column inside
            end = min(line // c, (width - 1 + padding - remainder) // stride + 1)
            source = x + 4 * ((row - padding) * width + place * stride + remainder - padding) * c
            if stride == 1:
                _copy(source, target + 4 * place * c, (end - place) * c)
            else:
                for p in range(place, end):
                    _copy(source, target + 4 * p * c, c)
                    source += 4 * stride * c


@jit
def _row(g: Any, x: Any, steps: Any, sums: Any, apart: Any, sizes: Any, window: Any) -> None:
    """Add one row of g times one row of taps. Addresses and distances in bytes; `apart`: between the sums of neighbouring taps."""
    count, step = steps
    if window[0] == 3:
        _taps3(g, x, count, step, sums, apart, sizes, window)
    elif window[0] == 5:
        _taps5(g, x, count, step, sums, apart, sizes, window)
    else:
        _taps7(g, x, count, step, sums, apart, sizes, window)


@jit
def _shift(tap: Any, sizes: Any, window: Any) -> Any:
    """Bytes from a float of the first tap to that of another one."""
    c, line = sizes
    column = tap * window[3]
    return 4 * ((column % window[1]) * line + (column // window[1]) * c)


@jit
def _taps3(g: Any, x: Any, count: Any, step: Any, sums: Any, apart: Any, sizes: Any, window: Any) -> None:
    x1 = x + _shift(1, sizes, window)
    x2 = x + _shift(2, sizes, window)
    a0 = load_any(sums)
    a1 = load_any(sums + apart)
    a2 = load_any(sums + 2 * apart)
    for i in range(0, count * step, step):
        v = load_any(g + i)
        a0 = fma(v, load_any(x + i), a0)
        a1 = fma(v, load_any(x1 + i), a1)
        a2 = fma(v, load_any(x2 + i), a2)
    store_any(sums, a0)
    store_any(sums + apart, a1)
    store_any(sums + 2 * apart, a2)


@jit
def _taps5(g: Any, x: Any, count: Any, step: Any, sums: Any, apart: Any, sizes: Any, window: Any) -> None:
    x1 = x + _shift(1, sizes, window)
    x2 = x + _shift(2, sizes, window)
    x3 = x + _shift(3, sizes, window)
    x4 = x + _shift(4, sizes, window)
    a0 = load_any(sums)
    a1 = load_any(sums + apart)
    a2 = load_any(sums + 2 * apart)
    a3 = load_any(sums + 3 * apart)
    a4 = load_any(sums + 4 * apart)
    for i in range(0, count * step, step):
        v = load_any(g + i)
        a0 = fma(v, load_any(x + i), a0)
        a1 = fma(v, load_any(x1 + i), a1)
        a2 = fma(v, load_any(x2 + i), a2)
        a3 = fma(v, load_any(x3 + i), a3)
        a4 = fma(v, load_any(x4 + i), a4)
    store_any(sums, a0)
    store_any(sums + apart, a1)
    store_any(sums + 2 * apart, a2)
    store_any(sums + 3 * apart, a3)
    store_any(sums + 4 * apart, a4)


@jit
def _taps7(g: Any, x: Any, count: Any, step: Any, sums: Any, apart: Any, sizes: Any, window: Any) -> None:
    x1 = x + _shift(1, sizes, window)
    x2 = x + _shift(2, sizes, window)
    x3 = x + _shift(3, sizes, window)
    x4 = x + _shift(4, sizes, window)
    x5 = x + _shift(5, sizes, window)
    x6 = x + _shift(6, sizes, window)
    a0 = load_any(sums)
    a1 = load_any(sums + apart)
    a2 = load_any(sums + 2 * apart)
    a3 = load_any(sums + 3 * apart)
    a4 = load_any(sums + 4 * apart)
    a5 = load_any(sums + 5 * apart)
    a6 = load_any(sums + 6 * apart)
    for i in range(0, count * step, step):
        v = load_any(g + i)
        a0 = fma(v, load_any(x + i), a0)
        a1 = fma(v, load_any(x1 + i), a1)
        a2 = fma(v, load_any(x2 + i), a2)
        a3 = fma(v, load_any(x3 + i), a3)
        a4 = fma(v, load_any(x4 + i), a4)
        a5 = fma(v, load_any(x5 + i), a5)
        a6 = fma(v, load_any(x6 + i), a6)
    store_any(sums, a0)
    store_any(sums + apart, a1)
    store_any(sums + 2 * apart, a2)
    store_any(sums + 3 * apart, a3)
    store_any(sums + 4 * apart, a4)
    store_any(sums + 5 * apart, a5)
    store_any(sums + 6 * apart, a6)
