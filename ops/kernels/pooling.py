"""Pooling in the lane layout: maxima and averages of windows, and the average of the whole image.

A window's tap is a constant offset from the tile, as in a convolution, so that 4 tiles at a time are reduced tap by tap. Pixels
beyond the image are 0 in a valid halo; that is right for sums, but a maximum must not see them: tiles with such a tap carry a
lane mask for each of their taps.

Start with `max_pool_step`, `avg_pool_step` and `global_average_step`; their twins are torch's functions of the same names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from ops.kernels.lanes import LANES, Layout, conv_source_layout
from ops.kernels.portable import tile_table
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import (
    add,
    intrinsic,
    jit,
    keep,
    kernel,
    load,
    multiply,
    read_i32,
    read_i64,
    splat,
    store,
    sum_lanes,
    types,
    vec,
    write_f32,
    zero,
)

__all__ = ["avg_pool_step", "global_average_step", "max_pool_step"]

_LOWEST = np.float32(-np.inf)
_MASK = ir.VectorType(ir.IntType(32), LANES)

_WINDOW_FIELDS = (
    "x",
    "y",
    "tiles",
    "n_pieces",
    "channels",
    "offsets",
    "taps",
    "borders",
    "mask_places",
    "masks",
    "scales",
)
_GLOBAL_FIELDS = ("x", "y", "groups", "group_step", "images", "batch", "channels", "tiles", "n_tiles", "masks", "count")


@intrinsic
def larger_or_nan(typingctx: Any, a: Any, b: Any) -> Any:
    """max(a, b) per lane; NaN if either is NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        highest = builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])  # keeps a NaN in a
        return builder.select(builder.fcmp_unordered("uno", args[1], args[1]), args[1], highest)

    return vec(vec, vec), code


@intrinsic
def inside(typingctx: Any, value: Any, mask: Any) -> Any:
    """The lanes whose int32 at the address `mask` (a multiple of 64) is -1; minus infinity where it is 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.load(builder.inttoptr(args[1], _MASK.as_pointer()), align=64)
        kept = builder.icmp_signed("!=", bits, ir.Constant(_MASK, [0] * LANES))
        return builder.select(kept, args[0], ir.Constant(args[0].type, [-np.inf] * LANES))

    return vec(vec, types.int64), code


@jit
def _share(pieces, channels, thread, threads):
    """(first piece, last piece, first channel, last channel) of a thread: channels are shared out where there are few pieces."""
    if pieces < 4 * threads:
        return 0, pieces, channels * thread // threads, channels * (thread + 1) // threads
    return pieces * thread // threads, pieces * (thread + 1) // threads, 0, channels


@jit
def _max4(d, piece, channel, end):
    """Maxima of 4 tiles, channels channel .. end."""
    table, offsets, taps, border, masks = d[2] + 96 * piece, d[5], d[6], read_i32(d[7] + 4 * piece), d[9]
    x0, x1, x2, x3 = read_i64(table), read_i64(table + 24), read_i64(table + 48), read_i64(table + 72)
    y0, y1, y2, y3 = read_i64(table + 8), read_i64(table + 32), read_i64(table + 56), read_i64(table + 80)
    places = d[8] + 16 * taps * piece
    while channel < end:
        a0 = a1 = a2 = a3 = splat(_LOWEST)
        for tap in range(taps):
            x = d[0] + read_i64(offsets + 8 * tap) + 64 * channel
            v0, v1, v2, v3 = load(x + x0), load(x + x1), load(x + x2), load(x + x3)
            if border:
                m = places + 16 * tap
                v0, v1 = inside(v0, masks + np.int64(read_i32(m))), inside(v1, masks + np.int64(read_i32(m + 4)))
                v2, v3 = inside(v2, masks + np.int64(read_i32(m + 8))), inside(v3, masks + np.int64(read_i32(m + 12)))
            a0, a1, a2, a3 = larger_or_nan(a0, v0), larger_or_nan(a1, v1), larger_or_nan(a2, v2), larger_or_nan(a3, v3)
        y = d[1] + 64 * channel
        store(y + y0, a0)
        store(y + y1, a1)
        store(y + y2, a2)
        store(y + y3, a3)
        channel += 1


@jit
def _sum4(d, piece, channel, end):
    """Sums of 4 tiles times their scales, channels channel .. end."""
    table, offsets, taps = d[2] + 96 * piece, d[5], d[6]
    x0, x1, x2, x3 = read_i64(table), read_i64(table + 24), read_i64(table + 48), read_i64(table + 72)
    y0, y1, y2, y3 = read_i64(table + 8), read_i64(table + 32), read_i64(table + 56), read_i64(table + 80)
    s = d[10] + 256 * piece
    s0, s1, s2, s3 = load(s), load(s + 64), load(s + 128), load(s + 192)
    while channel < end:
        a0 = a1 = a2 = a3 = zero()
        for tap in range(taps):
            x = d[0] + read_i64(offsets + 8 * tap) + 64 * channel
            a0, a1 = add(a0, load(x + x0)), add(a1, load(x + x1))
            a2, a3 = add(a2, load(x + x2)), add(a3, load(x + x3))
        y = d[1] + 64 * channel
        store(y + y0, multiply(a0, s0))
        store(y + y1, multiply(a1, s1))
        store(y + y2, multiply(a2, s2))
        store(y + y3, multiply(a3, s3))
        channel += 1


@kernel
def max_pool(d, thread, threads):
    """This thread's share of the maxima; fields: `_WINDOW_FIELDS`."""
    piece, last, channel, end = _share(d[3], d[4], thread, threads)
    while piece < last:
        _max4(d, piece, channel, end)
        piece += 1


@kernel
def avg_pool(d, thread, threads):
    """This thread's share of the averages; fields: `_WINDOW_FIELDS`."""
    piece, last, channel, end = _share(d[3], d[4], thread, threads)
    while piece < last:
        _sum4(d, piece, channel, end)
        piece += 1


@jit
def _write_means(d, group, channel, total):
    """The average of each image whose blocks are in the lanes of `total`."""
    for image in range(d[4]):
        n = group * d[4] + image
        if n < d[5]:
            mean = sum_lanes(keep(total, d[9] + 64 * image)) / np.float32(d[10])
            write_f32(d[1] + 4 * (n * d[6] + channel), mean)


@kernel
def global_average(d, thread, threads):
    """This thread's share of the channels; fields: `_GLOBAL_FIELDS`."""
    first, end = d[6] * thread // threads, d[6] * (thread + 1) // threads
    for group in range(d[2]):
        channel = first
        while channel < end:
            x = d[0] + group * d[3] + 64 * channel
            four = channel + 4 <= end
            a0 = a1 = a2 = a3 = zero()
            for tile in range(d[8]):
                p, mask = x + read_i64(d[7] + 16 * tile), read_i64(d[7] + 16 * tile + 8)
                if four and mask < 0:
                    a0, a1 = add(a0, load(p)), add(a1, load(p + 64))
                    a2, a3 = add(a2, load(p + 128)), add(a3, load(p + 192))
                elif four:
                    m = d[9] + mask
                    a0, a1 = add(a0, keep(load(p), m)), add(a1, keep(load(p + 64), m))
                    a2, a3 = add(a2, keep(load(p + 128), m)), add(a3, keep(load(p + 192), m))
                elif mask < 0:
                    a0 = add(a0, load(p))
                else:
                    a0 = add(a0, keep(load(p), d[9] + mask))
            _write_means(d, group, channel, a0)
            if four:
                _write_means(d, group, channel + 1, a1)
                _write_means(d, group, channel + 2, a2)
                _write_means(d, group, channel + 3, a3)
            channel += 4 if four else 1


def max_pool_step(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
) -> KernelStep:
    """Prepare max pooling: the largest pixel of each window, NaN if there is one; padding never wins.

    Args:
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        source, target: see `lanes.conv_source_layout`.

    Raises:
        ValueError: layouts that do not belong together, a result that torch would only give with ceil_mode, or windows that lie
            in the padding altogether.
    """
    return _window_step(max_pool.address, kernel_size, stride, padding, dilation, source, target, True)


def avg_pool_step(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    count_include_pad: bool,
    source: Layout,
    target: Layout,
) -> KernelStep:
    """Prepare average pooling: the sum of each window divided by the window's size, or by its pixels within the image.

    Args:
        kernel_size, stride: (vertical, horizontal).
        padding: (top, bottom, left, right).
        count_include_pad: whether pixels of the padding count.
        source, target: see `lanes.conv_source_layout`. The source's halo must be valid.

    Raises:
        ValueError: as `max_pool_step`.
    """
    return _window_step(avg_pool.address, kernel_size, stride, padding, (1, 1), source, target, count_include_pad)


def global_average_step(source: Layout) -> KernelStep:
    """Prepare the average of all pixels of each image and channel: lanes to plain float32[batch, channels]."""
    lane_y, lane_x = np.ogrid[: source.grid[0], : source.grid[1]]
    rows, columns = np.ogrid[: source.block[0], : source.block[1]]
    inside_y = lane_y * source.block[0] + rows[..., None, None] < source.height
    inside_x = lane_x * source.block[1] + columns[..., None, None] < source.width
    lanes = source.grid[0] * source.grid[1]
    known = np.logical_and(inside_y, inside_x).reshape(-1, lanes)
    of_image = np.zeros((source.images, LANES), bool)
    for image in range(source.images):
        of_image[image, image * lanes : (image + 1) * lanes] = True
    tile_masks = np.zeros((source.block[0] * source.block[1], LANES), bool)
    tile_masks[:, : source.images * lanes] = np.tile(known, source.images)
    tiles = 4 * (source.origin + rows * source.row_step + columns * source.tile_step).reshape(-1)
    places = 64 * (source.images + np.arange(tiles.size))
    places[known.all(axis=1)] = -1
    packed = {
        "tiles": aligned(np.stack([tiles, places], axis=1)),
        "masks": aligned(np.negative(np.concatenate([of_image, tile_masks]), dtype=np.int32)),
    }
    numbers = {name: array.ctypes.data for name, array in packed.items()}
    numbers |= {"groups": source.groups, "group_step": 4 * source.group_step, "images": source.images}
    numbers |= {"batch": source.batch, "channels": source.channels, "n_tiles": tiles.size}
    numbers |= {"count": source.height * source.width}
    template = np.array([numbers.get(name, 0) for name in _GLOBAL_FIELDS], np.int64)
    return KernelStep(global_average.address, template, (0,), 1, arrays=tuple(packed.values()))


def _window_step(
    address: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
    count_include_pad: bool,
) -> KernelStep:
    """Both poolings: `count_include_pad` matters to averages only."""
    _check(kernel_size, stride, padding, dilation, source, target)
    taken = _taken(kernel_size, stride, padding, dilation, source, target)
    border = (taken == 0).any(axis=(1, 2))
    group, row = np.divmod(np.arange(target.tiles), target.block[0] * target.block[1])
    order = np.lexsort((border[row], row // target.block[1], group))  # tiles of one kind side by side, row by row
    order = np.append(order, np.repeat(order[-1:], -target.tiles % 4))  # the last piece computes its last tile again
    tile = row[order]
    bits, place = np.unique(taken @ (1 << np.arange(LANES)), return_inverse=True)  # few different masks
    places = 64 * place.reshape(taken.shape[:2])[tile].reshape(-1, 4, taken.shape[1]).swapaxes(1, 2)
    counts = np.full(taken.shape[::2], taken.shape[1]) if count_include_pad else taken.sum(axis=1)
    dy, dx = np.divmod(np.arange(taken.shape[1]), kernel_size[1])
    offsets = (dy * dilation[0] - padding[0]) * source.row_step + (dx * dilation[1] - padding[2]) * source.tile_step
    packed = {
        "tiles": aligned(tile_table(source, target, None, stride)[order]),
        "offsets": aligned(4 * offsets.astype(np.int64)),
        "borders": aligned(border[tile].reshape(-1, 4).any(axis=1).astype(np.int32)),
        "mask_places": aligned(places.astype(np.int32)),
        "masks": aligned(-(bits[:, None] >> np.arange(LANES) & 1).astype(np.int32)),
        "scales": aligned((1 / np.maximum(counts, 1)).astype(np.float32)[tile]),
    }
    numbers = {name: array.ctypes.data for name, array in packed.items()}
    numbers |= {"n_pieces": order.size // 4, "channels": target.channels, "taps": taken.shape[1]}
    template = np.array([numbers.get(name, 0) for name in _WINDOW_FIELDS], np.int64)
    return KernelStep(address, template, (0,), 1, arrays=tuple(packed.values()))


def _taken(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
) -> npt.NDArray[np.bool_]:
    """bool[tiles of a group, taps, 16]: whether the tap is within the image. True where the result is in no image."""
    axes = []
    for i, size in enumerate(((source.height, target.height), (source.width, target.width))):
        block, tap, lane = np.ogrid[: target.block[i], : kernel_size[i], : target.grid[i]]
        out = lane * target.block[i] + block
        at = out * stride[i] + tap * dilation[i] - padding[2 * i]
        axes.append(((at >= 0) & (at < size[0]) | (out >= size[1]), np.broadcast_to(out >= size[1], at.shape)))
    (ok_y, out_y), (ok_x, out_x) = axes
    ok = ok_y[:, None, :, None, :, None] & ok_x[None, :, None, :, None, :]
    ok |= out_y[:, None, :, None, :, None] | out_x[None, :, None, :, None, :]
    tiles, taps, lanes = (
        target.block[0] * target.block[1],
        kernel_size[0] * kernel_size[1],
        target.grid[0] * target.grid[1],
    )
    taken = np.ones((tiles, taps, LANES), bool)
    taken[:, :, : target.images * lanes] = np.tile(ok.reshape(tiles, taps, lanes), target.images)
    return taken


def _check(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
) -> None:
    shape = source.batch, source.channels, source.height, source.width
    needed = conv_source_layout(target, shape, kernel_size, stride, padding, dilation)
    if source.blocking != needed.blocking or any(have < need for have, need in zip(source.halo, needed.halo)):
        raise ValueError(f"the input must be blocked as {needed.blocking} with a halo of {needed.halo}, got {source}")
    for i, (name, size, given) in enumerate(
        (("height", source.height, target.height), ("width", source.width, target.width))
    ):
        reach = dilation[i] * (kernel_size[i] - 1) + 1
        expected = (size + padding[2 * i] + padding[2 * i + 1] - reach) // stride[i] + 1
        if given != expected or source.channels != target.channels or source.batch != target.batch:
            raise ValueError(
                f"pooling {source.channels} channels of {name} {size} gives {source.channels} of {name} {expected} (ceil_mode "
                f"is not supported), the output has {target.channels} of {name} {given}"
            )
        if max(padding[2 * i : 2 * i + 2]) >= reach:
            raise ValueError(f"padding {padding} must be smaller than the window, {reach} pixels of {name}")
