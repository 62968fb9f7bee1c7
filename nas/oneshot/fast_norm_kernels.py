"""Sums of batch-normalised images on the CPU, forward and backward, in vectors of 16 floats.

An image batch in torch.channels_last is one array of pixels times channels. It is read in blocks of `BLOCK` vectors per 16 channels
(or, where there are fewer channels, of 16 / channels pixels side by side); a block is summed in float32, blocks in float64. What
is left over at the end is done one by one. Start with `forward` and `backward`; `nas.oneshot.fast_norms` says what they compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from ops.kernels.vector import (
    add,
    fma,
    intrinsic,
    jit,
    larger,
    load_any,
    read_f32,
    store_any,
    subtract,
    vec,
    write_f32,
    zero,
)

BLOCK = 64
"""Vectors that are summed in float32."""


@intrinsic
def where_positive(typingctx: Any, a: Any, b: Any) -> Any:
    """b where a > 0, else 0, per lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing = ir.Constant(args[0].type, [0.0] * 16)
        return builder.select(builder.fcmp_ordered(">", args[0], nothing), args[1], nothing)

    return vec(vec, vec), code


@jit
def forward(
    inputs: Any,
    normed: Any,
    y: Any,
    sizes: Any,
    scale: Any,
    shift: Any,
    eps: Any,
    relu: Any,
    mean: Any,
    rstd: Any,
) -> None:
    """y = sum_i scale_i (x_i - mean_i) rstd_i + shift, at least 0 with `relu`; writes mean and rstd.

    Args:
        inputs: int64[m], addresses of float32[pixels, channels] each.
        normed: bool[m]; where it is False mean is 0 and rstd is 1.
        y: address of float32[pixels, channels], the result.
        sizes: (pixels, channels).
        scale: float32[m, channels].
        shift: float32[channels].
        eps: added to the variance.
        relu: whether negative results become 0.
        mean, rstd: float64[m, channels], results.
    """
    pixels, c = sizes
    lanes = max(c, 16)
    constants = np.empty((2 * len(inputs) + 1, lanes), np.float32)  # means, factors, shift
    total = np.empty((2, lanes))
    scratch = np.empty(32, np.float32)
    for i in range(len(inputs)):
        if not normed[i]:
            mean[i, :], rstd[i, :] = 0, 1
            continue
        _moments(inputs[i], sizes, total, constants[0], scratch, mean[i], rstd[i])
        for k in range(c):
            rstd[i, k] = 1 / np.sqrt(rstd[i, k] + eps)
    for i in range(len(inputs)):
        for lane in range(lanes):
            constants[2 * i, lane] = mean[i, lane % c]
            constants[2 * i + 1, lane] = scale[i, lane % c] * rstd[i, lane % c]
    for lane in range(lanes):
        constants[2 * len(inputs), lane] = shift[lane % c]
    count, step = (pixels, 4 * c) if c >= 16 else (pixels * c // 16, 64)
    base = _address(constants)
    for first in range(0, count, BLOCK):
        steps = min(BLOCK, count - first)
        for tile in range(0, 4 * lanes, 64):
            at = first * step + tile
            _scaled(inputs[0] + at, y + at, steps, step, base + tile, 4 * lanes, base + 8 * len(inputs) * lanes + tile)
            for i in range(1, len(inputs)):
                _add_scaled(inputs[i] + at, y + at, steps, step, base + 8 * i * lanes + tile, 4 * lanes)
            if relu:
                _clamp(y + at, steps, step)
    for f in range(count * 16 if c < 16 else pixels * c, pixels * c):
        value = constants[2 * len(inputs), f % c]
        for i in range(len(inputs)):
            value += constants[2 * i + 1, f % c] * (read_f32(inputs[i] + 4 * f) - constants[2 * i, f % c])
        write_f32(y + 4 * f, max(value, np.float32(0)) if relu else value)


@jit
def backward(
    inputs: Any,
    normed: Any,
    summed: Any,
    g: Any,
    outputs: Any,
    sizes: Any,
    scale: Any,
    shift: Any,
    relu: Any,
    mean: Any,
    rstd: Any,
    by_scale: Any,
    by_shift: Any,
) -> None:
    """Gradients of `forward`: of its inputs, scale and shift.

    Args:
        inputs, normed, sizes, scale, shift, relu, mean, rstd: as of `forward`; `relu` with one input only.
        summed: bool[m], whether the gradient of scale_i is wanted, or needed because the input is normalised.
        g: address of the gradient of y, float32[pixels, channels].
        outputs: int64[m], addresses of the gradients of the inputs; 0 where none is wanted.
        by_scale, by_shift: float32[m, channels] and float32[channels], results.
    """
    pixels, c = sizes
    lanes = max(c, 16)
    constants = np.empty((6, lanes), np.float32)  # mean, factor and shift of the forward pass; of g, of x - mean, alone
    total = np.empty((2, lanes))
    scratch = np.empty(32, np.float32)
    count, step = (pixels, 4 * c) if c >= 16 else (pixels * c // 16, 64)
    base = _address(constants)
    for i in range(len(inputs)):
        for lane in range(lanes):
            constants[0, lane] = mean[i, lane % c]
            constants[1, lane] = scale[i, lane % c] * rstd[i, lane % c]
            constants[2, lane] = shift[lane % c]
        if summed[i]:
            _all_products(g, inputs[i], sizes, constants, relu, total, scratch)
            for k in range(c):
                by_shift[k] = total[0, k]
                by_scale[i, k] = total[1, k] * rstd[i, k]
        if outputs[i] == 0:
            continue
        for lane in range(lanes):
            k = lane % c
            factor = scale[i, k] * rstd[i, k]
            constants[3, lane] = factor
            constants[4, lane] = -factor * rstd[i, k] * rstd[i, k] * total[1, k] / pixels if normed[i] else 0.0
            constants[5, lane] = -factor * total[0, k] / pixels if normed[i] else 0.0
        for first in range(0, count, BLOCK):
            steps = min(BLOCK, count - first)
            for tile in range(0, 4 * lanes, 64):
                at = first * step + tile
                _input_gradient(g + at, inputs[i] + at, outputs[i] + at, steps, step, base + tile, 4 * lanes, relu)
        for f in range(count * 16 if c < 16 else pixels * c, pixels * c):
            k = f % c
            centred = read_f32(inputs[i] + 4 * f) - constants[0, k]
            arrived = read_f32(g + 4 * f)
            if relu and constants[1, k] * centred + constants[2, k] <= 0:
                arrived = np.float32(0)
            write_f32(outputs[i] + 4 * f, constants[3, k] * arrived + constants[4, k] * centred + constants[5, k])


@jit
def _all_products(g: Any, x: Any, sizes: Any, constants: Any, relu: Any, total: Any, scratch: Any) -> None:
    """Sums of g and of g (x - mean) over all pixels, of what passed the ReLU if there is one, into total float64[2, lanes]."""
    pixels, c = sizes
    lanes = max(c, 16)
    count, step = (pixels, 4 * c) if c >= 16 else (pixels * c // 16, 64)
    base = _address(constants)
    total[:] = 0
    for first in range(0, count, BLOCK):
        steps = min(BLOCK, count - first)
        for tile in range(0, lanes, 16):
            at = first * step + 4 * tile
            _products(g + at, x + at, steps, step, base + 4 * tile, 4 * lanes, relu, _address(scratch))
            for lane in range(16):
                total[0, tile + lane] += scratch[lane]
                total[1, tile + lane] += scratch[16 + lane]
    for f in range(count * 16 if c < 16 else pixels * c, pixels * c):
        centred = read_f32(x + 4 * f) - constants[0, f % c]
        if not relu or constants[1, f % c] * centred + constants[2, f % c] > 0:
            total[0, f % c] += read_f32(g + 4 * f)
            total[1, f % c] += np.float64(read_f32(g + 4 * f)) * centred
    for lane in range(c, lanes if c < 16 else c):
        total[0, lane % c] += total[0, lane]
        total[1, lane % c] += total[1, lane]


@jit
def _address(array: Any) -> Any:
    return np.int64(array.ctypes.data)


@jit
def _moments(x: Any, sizes: Any, total: Any, centre: Any, scratch: Any, mean: Any, variance: Any) -> None:
    """Mean and variance (of the batch: over n) of every channel, in two passes."""
    pixels, c = sizes
    lanes = max(c, 16)
    count, step = (pixels, 4 * c) if c >= 16 else (pixels * c // 16, 64)
    centre[:] = 0
    for squares in range(2):
        total[:] = 0
        for first in range(0, count, BLOCK):
            steps = min(BLOCK, count - first)
            for tile in range(0, lanes, 16):
                at = x + first * step + 4 * tile
                if squares:
                    _squares(at, steps, step, _address(centre) + 4 * tile, _address(scratch))
                else:
                    _sums(at, steps, step, _address(scratch))
                for lane in range(16):
                    total[0, tile + lane] += scratch[lane]
        for f in range(count * 16 if c < 16 else pixels * c, pixels * c):
            value = np.float64(read_f32(x + 4 * f)) - centre[f % c]
            total[0, f % c] += value * value if squares else value
        for lane in range(c, lanes if c < 16 else c):
            total[0, lane % c] += total[0, lane]
        for k in range(c):
            if squares:
                variance[k] = max(0.0, total[0, k] / pixels - (mean[k] - centre[k]) ** 2)
            else:
                mean[k] = total[0, k] / pixels
        for lane in range(lanes):
            centre[lane] = mean[lane % c]


@jit
def _sums(x: Any, steps: Any, step: Any, to: Any) -> None:
    a = b = zero()
    for _ in range(steps // 2):
        a, b = add(a, load_any(x)), add(b, load_any(x + step))
        x += 2 * step
    if steps % 2:
        a = add(a, load_any(x))
    store_any(to, add(a, b))


@jit
def _squares(x: Any, steps: Any, step: Any, centre: Any, to: Any) -> None:
    a = b = zero()
    m = load_any(centre)
    for _ in range(steps // 2):
        v, w = subtract(load_any(x), m), subtract(load_any(x + step), m)
        a, b = fma(v, v, a), fma(w, w, b)
        x += 2 * step
    if steps % 2:
        v = subtract(load_any(x), m)
        a = fma(v, v, a)
    store_any(to, add(a, b))


@jit
def _scaled(x: Any, y: Any, steps: Any, step: Any, constants: Any, apart: Any, shift: Any) -> None:
    m, a, b = load_any(constants), load_any(constants + apart), load_any(shift)
    for i in range(0, steps * step, step):
        store_any(y + i, fma(a, subtract(load_any(x + i), m), b))


@jit
def _add_scaled(x: Any, y: Any, steps: Any, step: Any, constants: Any, apart: Any) -> None:
    m, a = load_any(constants), load_any(constants + apart)
    for i in range(0, steps * step, step):
        store_any(y + i, fma(a, subtract(load_any(x + i), m), load_any(y + i)))


@jit
def _clamp(y: Any, steps: Any, step: Any) -> None:
    for i in range(0, steps * step, step):
        store_any(y + i, larger(load_any(y + i), zero()))


@jit
def _products(g: Any, x: Any, steps: Any, step: Any, constants: Any, apart: Any, relu: Any, to: Any) -> None:
    """Sums of g and of g (x - mean), of what passed the ReLU if there is one."""
    m, a, b = load_any(constants), load_any(constants + apart), load_any(constants + 2 * apart)
    s = t = zero()
    if relu:
        for i in range(0, steps * step, step):
            v = subtract(load_any(x + i), m)
            w = where_positive(fma(a, v, b), load_any(g + i))
            s, t = add(s, w), fma(w, v, t)
    else:
        for i in range(0, steps * step, step):
            w = load_any(g + i)
            s, t = add(s, w), fma(w, subtract(load_any(x + i), m), t)
    store_any(to, s)
    store_any(to + 64, t)


@jit
def _input_gradient(g: Any, x: Any, to: Any, steps: Any, step: Any, constants: Any, apart: Any, relu: Any) -> None:
    m, a, b = load_any(constants), load_any(constants + apart), load_any(constants + 2 * apart)
    p, q, r = load_any(constants + 3 * apart), load_any(constants + 4 * apart), load_any(constants + 5 * apart)
    if relu:
        for i in range(0, steps * step, step):
            v = subtract(load_any(x + i), m)
            w = where_positive(fma(a, v, b), load_any(g + i))
            store_any(to + i, fma(p, w, fma(q, v, r)))
    else:
        for i in range(0, steps * step, step):
            store_any(to + i, fma(p, load_any(g + i), fma(q, subtract(load_any(x + i), m), r)))
