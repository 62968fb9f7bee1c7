"""Depthwise convolution in the lane layout: every output channel reads one input channel, at the taps its mask keeps.

Up to 8 tiles at once, channel after channel: the channels of a tile are contiguous, so that every tap is a stream. Two kernels:

- `depthwise_taps`, for any mask and geometry: each kept tap is one broadcast and one multiply-add per tile.
- `depthwise_full`, where all channels keep all taps, 3 or 5 along one axis of the kernel: tiles that are neighbours along that
  axis share the vectors they read, each of which is loaded once per line of the kernel and not once per tap.

Weights that are not stored are not computed with in either.

Start with `depthwise_step`; its twin is `ops.reference.csr_conv2d` with as many groups as input channels.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import ACTIVATIONS, activated
from ops.kernels.isa import isa
from ops.kernels.lanes import Layout, conv_offsets, conv_source_layout
from ops.kernels.portable import tile_groups, tile_table
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import add, fma, jit, kernel, larger, load, read_i32, read_i64, smaller, splat_at, store, zero

__all__ = ["depthwise_step", "line_groups"]

# Vectors passed to a function that is not inlined go through memory; LLVM's own limit is just too low for these.
inlined: Any = numba.njit(forceinline=True, nogil=True, fastmath={"contract"}, error_model="numpy")

WIDEST = {"avx512": 8, "avx2": 4, "generic": 4}  # tiles at once

_FIELDS = (
    *("x", "y", "residual", "tiles", "pointers", "offsets", "values", "bias", "pieces", "n_pieces", "rows"),
    *("has_residual", "clamps", "highest", "activation", "taps", "along", "across"),
    *("x_along", "x_across", "w_along", "w_across"),
)
X, Y, RESIDUAL, TILES, POINTERS, OFFSETS, VALUES, BIAS, PIECES, N_PIECES, ROWS = range(11)
HAS_RESIDUAL, CLAMPS, HIGHEST, ACTIVATION, TAPS, ALONG, ACROSS = range(11, 18)
X_ALONG, X_ACROSS, W_ALONG, W_ACROSS = range(18, 22)


@inlined
def _addresses(d, table):
    """Of 4 tiles of the input; `table`: address of their rows (x, y, residual) in the tile table."""
    x = d[X]
    return x + read_i64(table), x + read_i64(table + 24), x + read_i64(table + 48), x + read_i64(table + 72)


@inlined
def _tap4(w, o, x0, x1, x2, x3, a0, a1, a2, a3):
    """One tap of 4 tiles: a += w · x."""
    return fma(w, load(x0 + o), a0), fma(w, load(x1 + o), a1), fma(w, load(x2 + o), a2), fma(w, load(x3 + o), a3)


@inlined
def _plus4(d, table, row, a0, a1, a2, a3):
    """The residual of 4 tiles added, if there is one."""
    if d[HAS_RESIDUAL]:
        r = d[RESIDUAL] + 64 * row
        a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
        a2, a3 = add(a2, load(r + read_i64(table + 64))), add(a3, load(r + read_i64(table + 88)))
    return a0, a1, a2, a3


@inlined
def _plus3(d, table, row, a0, a1, a2):
    """As `_plus4`, for 3 tiles."""
    if d[HAS_RESIDUAL]:
        r = d[RESIDUAL] + 64 * row
        a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
        a2 = add(a2, load(r + read_i64(table + 64)))
    return a0, a1, a2


@inlined
def _put4(d, table, row, a0, a1, a2, a3):
    """ReLU or ReLU6 if asked for, and store 4 tiles."""
    if d[CLAMPS]:
        high = splat_at(d[HIGHEST])
        a0, a1, a2, a3 = larger(a0, zero()), larger(a1, zero()), larger(a2, zero()), larger(a3, zero())
        a0, a1, a2, a3 = smaller(a0, high), smaller(a1, high), smaller(a2, high), smaller(a3, high)
    y = d[Y] + 64 * row
    store(y + read_i64(table + 8), a0)
    store(y + read_i64(table + 32), a1)
    store(y + read_i64(table + 56), a2)
    store(y + read_i64(table + 80), a3)


@inlined
def _put3(d, table, row, a0, a1, a2):
    """As `_put4`, for 3 tiles."""
    if d[CLAMPS]:
        high = splat_at(d[HIGHEST])
        a0, a1, a2 = larger(a0, zero()), larger(a1, zero()), larger(a2, zero())
        a0, a1, a2 = smaller(a0, high), smaller(a1, high), smaller(a2, high)
    y = d[Y] + 64 * row
    store(y + read_i64(table + 8), a0)
    store(y + read_i64(table + 32), a1)
    store(y + read_i64(table + 56), a2)


@jit
def _activate(d, table, size, row, end):
    """The other activations, on the stored channels row .. end of a piece: as part of the loops they would spill registers."""
    for tile in range(size):
        y = d[Y] + read_i64(table + 24 * tile + 8)
        for at in range(y + 64 * row, y + 64 * end, 64):
            store(at, activated(load(at), d[ACTIVATION]))


@jit
def _taps8(d, table, row, end):
    """Channels row .. end of 8 tiles."""
    x0, x1, x2, x3 = _addresses(d, table)
    x4, x5, x6, x7 = _addresses(d, table + 96)
    k = np.int64(read_i32(d[POINTERS] + 4 * row))
    while row < end:
        stop = np.int64(read_i32(d[POINTERS] + 4 * row + 4))
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a4 = a5 = a6 = a7 = a0
        while k < stop:
            o, w = np.int64(read_i32(d[OFFSETS] + 4 * k)), splat_at(d[VALUES] + 4 * k)
            a0, a1, a2, a3 = _tap4(w, o, x0, x1, x2, x3, a0, a1, a2, a3)
            a4, a5, a6, a7 = _tap4(w, o, x4, x5, x6, x7, a4, a5, a6, a7)
            k += 1
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        a4, a5, a6, a7 = _plus4(d, table + 96, row, a4, a5, a6, a7)
        _put4(d, table, row, a0, a1, a2, a3)
        _put4(d, table + 96, row, a4, a5, a6, a7)
        row += 1


@jit
def _taps7(d, table, row, end):
    """As `_taps8`, for 7 tiles."""
    x0, x1, x2, x3 = _addresses(d, table)
    x4, x5, x6 = d[X] + read_i64(table + 96), d[X] + read_i64(table + 120), d[X] + read_i64(table + 144)
    k = np.int64(read_i32(d[POINTERS] + 4 * row))
    while row < end:
        stop = np.int64(read_i32(d[POINTERS] + 4 * row + 4))
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a4 = a5 = a6 = a0
        while k < stop:
            o, w = np.int64(read_i32(d[OFFSETS] + 4 * k)), splat_at(d[VALUES] + 4 * k)
            a0, a1, a2, a3 = _tap4(w, o, x0, x1, x2, x3, a0, a1, a2, a3)
            a4, a5, a6 = fma(w, load(x4 + o), a4), fma(w, load(x5 + o), a5), fma(w, load(x6 + o), a6)
            k += 1
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        a4, a5, a6 = _plus3(d, table + 96, row, a4, a5, a6)
        _put4(d, table, row, a0, a1, a2, a3)
        _put3(d, table + 96, row, a4, a5, a6)
        row += 1


@jit
def _taps4(d, table, row, end):
    """As `_taps8`, for 4 tiles."""
    x0, x1, x2, x3 = _addresses(d, table)
    k = np.int64(read_i32(d[POINTERS] + 4 * row))
    while row < end:
        stop = np.int64(read_i32(d[POINTERS] + 4 * row + 4))
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a0
        while k < stop:
            o, w = np.int64(read_i32(d[OFFSETS] + 4 * k)), splat_at(d[VALUES] + 4 * k)
            a0, a1, a2, a3 = _tap4(w, o, x0, x1, x2, x3, a0, a1, a2, a3)
            k += 1
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        _put4(d, table, row, a0, a1, a2, a3)
        row += 1


@jit
def _taps1(d, table, row, end):
    """As `_taps8`, for 1 tile."""
    x, y, r = d[X] + read_i64(table), d[Y] + read_i64(table + 8), d[RESIDUAL] + read_i64(table + 16)
    k = np.int64(read_i32(d[POINTERS] + 4 * row))
    while row < end:
        stop = np.int64(read_i32(d[POINTERS] + 4 * row + 4))
        a = splat_at(d[BIAS] + 4 * row)
        while k < stop:
            a = fma(splat_at(d[VALUES] + 4 * k), load(x + np.int64(read_i32(d[OFFSETS] + 4 * k))), a)
            k += 1
        if d[HAS_RESIDUAL]:
            a = add(a, load(r + 64 * row))
        if d[CLAMPS]:
            a = smaller(larger(a, zero()), splat_at(d[HIGHEST]))
        store(y + 64 * row, a)
        row += 1


@inlined
def _dot3(w0, w1, w2, p0, p1, p2, a):
    return fma(w2, load(p2), fma(w1, load(p1), fma(w0, load(p0), a)))


@inlined
def _dot5(w0, w1, w2, w3, w4, p0, p1, p2, p3, p4, a):
    return fma(w4, load(p4), fma(w3, load(p3), _dot3(w0, w1, w2, p0, p1, p2, a)))


@inlined
def _line4(five, w, v, p, s, a0, a1, a2, a3):
    """One line of the kernel, 3 or 5 taps, for 4 tiles. Equal loads become one.

    Args:
        w, v: address of the line's first weight, bytes to the next.
        p, s: address of the first tap of the first tile, bytes to the next tap, and to the next tile.
    """
    p1, p2, p3, p4, p5 = p + s, p + 2 * s, p + 3 * s, p + 4 * s, p + 5 * s
    w0, w1, w2 = splat_at(w), splat_at(w + v), splat_at(w + 2 * v)
    if five:
        w3, w4, p6, p7 = splat_at(w + 3 * v), splat_at(w + 4 * v), p + 6 * s, p + 7 * s
        a0 = _dot5(w0, w1, w2, w3, w4, p, p1, p2, p3, p4, a0)
        a1 = _dot5(w0, w1, w2, w3, w4, p1, p2, p3, p4, p5, a1)
        a2 = _dot5(w0, w1, w2, w3, w4, p2, p3, p4, p5, p6, a2)
        return a0, a1, a2, _dot5(w0, w1, w2, w3, w4, p3, p4, p5, p6, p7, a3)
    a0, a1 = _dot3(w0, w1, w2, p, p1, p2, a0), _dot3(w0, w1, w2, p1, p2, p3, a1)
    return a0, a1, _dot3(w0, w1, w2, p2, p3, p4, a2), _dot3(w0, w1, w2, p3, p4, p5, a3)


@inlined
def _line7(five, w, v, p, s, a0, a1, a2, a3, a4, a5, a6):
    """As `_line4`, for 7 tiles."""
    p1, p2, p3, p4, p5 = p + s, p + 2 * s, p + 3 * s, p + 4 * s, p + 5 * s
    p6, p7, p8 = p + 6 * s, p + 7 * s, p + 8 * s
    w0, w1, w2 = splat_at(w), splat_at(w + v), splat_at(w + 2 * v)
    if five:
        w3, w4, p9, p10 = splat_at(w + 3 * v), splat_at(w + 4 * v), p + 9 * s, p + 10 * s
        a0 = _dot5(w0, w1, w2, w3, w4, p, p1, p2, p3, p4, a0)
        a1 = _dot5(w0, w1, w2, w3, w4, p1, p2, p3, p4, p5, a1)
        a2 = _dot5(w0, w1, w2, w3, w4, p2, p3, p4, p5, p6, a2)
        a3 = _dot5(w0, w1, w2, w3, w4, p3, p4, p5, p6, p7, a3)
        a4 = _dot5(w0, w1, w2, w3, w4, p4, p5, p6, p7, p8, a4)
        a5 = _dot5(w0, w1, w2, w3, w4, p5, p6, p7, p8, p9, a5)
        return a0, a1, a2, a3, a4, a5, _dot5(w0, w1, w2, w3, w4, p6, p7, p8, p9, p10, a6)
    a0, a1, a2 = _dot3(w0, w1, w2, p, p1, p2, a0), _dot3(w0, w1, w2, p1, p2, p3, a1), _dot3(w0, w1, w2, p2, p3, p4, a2)
    a3, a4, a5 = _dot3(w0, w1, w2, p3, p4, p5, a3), _dot3(w0, w1, w2, p4, p5, p6, a4), _dot3(w0, w1, w2, p5, p6, p7, a5)
    return a0, a1, a2, a3, a4, a5, _dot3(w0, w1, w2, p6, p7, p8, a6)


@jit
def _full8(d, table, row, end):
    """Channels row .. end of two fours of tiles in a line, all taps."""
    s, v, five, next_p, next_w = d[X_ALONG], d[W_ALONG], d[ALONG] == 5, d[X_ACROSS], d[W_ACROSS]
    x, z, w = d[X] + read_i64(table), d[X] + read_i64(table + 96), d[VALUES] + 4 * d[TAPS] * row
    while row < end:
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a4 = a5 = a6 = a7 = a0
        o, u = np.int64(read_i32(d[OFFSETS] + 4 * row)), w
        for _ in range(d[ACROSS]):
            a0, a1, a2, a3 = _line4(five, u, v, x + o, s, a0, a1, a2, a3)
            a4, a5, a6, a7 = _line4(five, u, v, z + o, s, a4, a5, a6, a7)
            o, u = o + next_p, u + next_w
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        a4, a5, a6, a7 = _plus4(d, table + 96, row, a4, a5, a6, a7)
        _put4(d, table, row, a0, a1, a2, a3)
        _put4(d, table + 96, row, a4, a5, a6, a7)
        row, w = row + 1, w + 4 * d[TAPS]


@jit
def _full7(d, table, row, end):
    """As `_full8`, for 7 tiles in a line."""
    s, v, five, next_p, next_w = d[X_ALONG], d[W_ALONG], d[ALONG] == 5, d[X_ACROSS], d[W_ACROSS]
    x, w = d[X] + read_i64(table), d[VALUES] + 4 * d[TAPS] * row
    while row < end:
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a4 = a5 = a6 = a0
        o, u = np.int64(read_i32(d[OFFSETS] + 4 * row)), w
        for _ in range(d[ACROSS]):
            a0, a1, a2, a3, a4, a5, a6 = _line7(five, u, v, x + o, s, a0, a1, a2, a3, a4, a5, a6)
            o, u = o + next_p, u + next_w
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        a4, a5, a6 = _plus3(d, table + 96, row, a4, a5, a6)
        _put4(d, table, row, a0, a1, a2, a3)
        _put3(d, table + 96, row, a4, a5, a6)
        row, w = row + 1, w + 4 * d[TAPS]


@jit
def _full4(d, table, row, end):
    """As `_full8`, for 4 tiles in a line."""
    s, v, five, next_p, next_w = d[X_ALONG], d[W_ALONG], d[ALONG] == 5, d[X_ACROSS], d[W_ACROSS]
    x, w = d[X] + read_i64(table), d[VALUES] + 4 * d[TAPS] * row
    while row < end:
        a0 = splat_at(d[BIAS] + 4 * row)
        a1 = a2 = a3 = a0
        o, u = np.int64(read_i32(d[OFFSETS] + 4 * row)), w
        for _ in range(d[ACROSS]):
            a0, a1, a2, a3 = _line4(five, u, v, x + o, s, a0, a1, a2, a3)
            o, u = o + next_p, u + next_w
        a0, a1, a2, a3 = _plus4(d, table, row, a0, a1, a2, a3)
        _put4(d, table, row, a0, a1, a2, a3)
        row, w = row + 1, w + 4 * d[TAPS]


@jit
def _share(d, thread, threads):
    """(first piece, last piece, first channel, last channel) of a thread: channels are shared out where there are few pieces."""
    if d[N_PIECES] < 4 * threads:
        return 0, d[N_PIECES], d[ROWS] * thread // threads, d[ROWS] * (thread + 1) // threads
    return d[N_PIECES] * thread // threads, d[N_PIECES] * (thread + 1) // threads, 0, d[ROWS]


@kernel
def depthwise_taps(d, thread, threads):
    """This thread's share, kept taps one by one; fields: `_FIELDS`."""
    piece, last, row, end = _share(d, thread, threads)
    while piece < last:
        size, table = read_i64(d[PIECES] + 16 * piece), d[TILES] + 24 * read_i64(d[PIECES] + 16 * piece + 8)
        if size == 8:
            _taps8(d, table, row, end)
        elif size == 7:
            _taps7(d, table, row, end)
        elif size == 4:
            _taps4(d, table, row, end)
        else:
            for tile in range(size):
                _taps1(d, table + 24 * tile, row, end)
        if d[ACTIVATION]:
            _activate(d, table, size, row, end)
        piece += 1


@kernel
def depthwise_full(d, thread, threads):
    """This thread's share, all taps; fields: `_FIELDS`."""
    piece, last, row, end = _share(d, thread, threads)
    while piece < last:
        size, table = read_i64(d[PIECES] + 16 * piece), d[TILES] + 24 * read_i64(d[PIECES] + 16 * piece + 8)
        if size == 8:
            _full8(d, table, row, end)
        elif size == 7:
            _full7(d, table, row, end)
        else:
            _full4(d, table, row, end)
        if d[ACTIVATION]:
            _activate(d, table, size, row, end)
        piece += 1


def line_groups(lines: int, length: int, widest: int) -> npt.NDArray[np.int64] | None:
    """As `portable.tile_groups`, for `lines` lines of `length` tiles: sizes 8, 7 and 4, such that every 7, every 4 and each half
    of an 8 lies on one line; None if there is no such cut."""
    sevens = range(length // 7 + 1) if widest > 4 else (0,)
    fit = [n for n in sevens if (length - 7 * n) % 4 == 0]
    if not fit:
        return None
    n = length // 7 if length % 7 == 0 and widest > 4 else fit[0]
    line = [7] * n + [4] * ((length - 7 * n) // 4)
    sizes: list[int] = []
    for size in line * lines:
        if widest > 4 and size == 4 and sizes and sizes[-1] == 4:
            sizes[-1] = 8
        else:
            sizes.append(size)
    return np.stack([sizes, np.cumsum(sizes) - sizes], axis=1).astype(np.int64)


def depthwise_step(
    weight: CSR,
    kernel_size: tuple[int, int],
    bias: npt.NDArray[np.float32] | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
    activation: str = "none",
    residual: Layout | None = None,
) -> KernelStep:
    """Prepare a depthwise convolution in lanes: act(bias + Σ w · x + residual).

    Args:
        weight: [out, kernel_height * kernel_width], columns in the order (ky, kx); channel o reads input channel
            o // (out / in).
        bias: float32[out] or None.
        stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        source, target: of input and output; see `lanes.conv_source_layout`. The source's halo must be valid.
        residual: of a second input, with the target's blocking.

    Returns:
        The step; inputs are [x] or [x, residual].

    Raises:
        ValueError: sizes that do not belong together.
    """
    rows, taps = weight.shape
    if taps != kernel_size[0] * kernel_size[1] or rows % source.channels or rows != target.channels:
        raise ValueError(
            "a depthwise weight is [out, kernel_height * kernel_width], with out the output's channels and a multiple of the "
            f"input's: got {list(weight.shape)} for a kernel of {kernel_size}, {source.channels} channels in and "
            f"{target.channels} out"
        )
    shape = source.batch, source.channels, source.height, source.width
    needed = conv_source_layout(target, shape, kernel_size, stride, padding, dilation)
    if source.blocking != needed.blocking or any(have < need for have, need in zip(source.halo, needed.halo)):
        raise ValueError(f"the input must be blocked as {needed.blocking} with a halo of {needed.halo}, got {source}")
    if residual is not None and residual.blocking != target.blocking:
        raise ValueError(f"the residual must be blocked as the output, {target.blocking}, got {residual.blocking}")
    numbers = {
        **{"rows": rows, "taps": taps, "has_residual": int(residual is not None)},
        **{"clamps": int(activation in ("relu", "relu6"))},
        **{"activation": ACTIVATIONS[activation] if activation not in ("none", "relu", "relu6") else 0},
    }
    table = tile_table(source, target, residual, stride)
    offsets = 4 * conv_offsets(weight, kernel_size, padding, dilation, source.channels, source)
    lines = _lines(weight, kernel_size, stride, dilation, target)
    if lines is None:
        pieces = tile_groups(target.tiles, WIDEST[isa()])
    else:
        axis, pieces = lines
        offsets = offsets[::taps]
        x_steps, w_steps = (dilation[0] * source.row_step, dilation[1] * source.tile_step), (kernel_size[1], 1)
        numbers |= {"along": kernel_size[axis], "across": kernel_size[1 - axis]}
        numbers |= {"x_along": 4 * x_steps[axis], "x_across": 4 * x_steps[1 - axis]}
        numbers |= {"w_along": 4 * w_steps[axis], "w_across": 4 * w_steps[1 - axis]}
        if axis == 0:
            table = table.reshape(target.groups, *target.block, 3).swapaxes(1, 2)
    packed = {
        "tiles": aligned(table),
        "pieces": aligned(pieces),
        "pointers": aligned(weight.indptr),
        "offsets": aligned(offsets.astype(np.int32)),
        "values": aligned(weight.values),
        "bias": aligned(np.zeros(rows, np.float32) if bias is None else bias.astype(np.float32)),
        "highest": aligned(np.array([6 if activation == "relu6" else np.inf], np.float32)),
    }
    numbers |= {name: array.ctypes.data for name, array in packed.items()} | {"n_pieces": len(pieces)}
    template = np.array([numbers.get(name, 0) for name in _FIELDS], np.int64)
    address = (depthwise_taps if lines is None else depthwise_full).address
    return KernelStep(address, template, (X,) if residual is None else (X, RESIDUAL), Y, arrays=tuple(packed.values()))


def _lines(
    weight: CSR, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], target: Layout
) -> tuple[int, npt.NDArray[np.int64]] | None:
    """The axis along which `depthwise_full` shares loads, and its pieces; None where it does not apply."""
    if weight.nnz == weight.shape[0] * weight.shape[1]:
        for axis in (1, 0):
            pieces = line_groups(target.tiles // target.block[axis], target.block[axis], WIDEST[isa()])
            if pieces is not None and kernel_size[axis] in (3, 5) and dilation[axis] == stride[axis] == 1:
                return axis, pieces
    return None
