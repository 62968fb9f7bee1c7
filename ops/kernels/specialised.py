"""Sparse convolution by machine code that knows the places of the kept weights: the fastest path where most weights are gone.

Every layer gets code of its own (`ops.kernels.emitter`), assembled in well under 0.2 us per kept weight: no compiler runs for a
new mask. One such step serves 1x1, k x k, strided, dilated and grouped convolutions in the lane layout; `specialised_pair_step`
joins two convolutions, the second 1x1, so that the values between them never leave the caches.

A layer's code is a list of functions, each for a range of output channels and a chunk of input channels and for any number of
tiles in a row; the drivers here are ordinary kernels that call them by address for all tile rows.

It needs x86-64 with AVX-512, a POSIX system and executable memory: ask `specialised_available` first. `NAS_SPECIALISED=0` in the
environment switches it off.

Start with `specialised_conv_step`; the twin is `ops.reference.csr_conv2d`.
"""

from __future__ import annotations

import os
import platform

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.executable import executable_available
from ops.kernels.isa import isa
from ops.kernels.lanes import LANES, Layout
from ops.kernels.specialised_layer import (
    HEAD,
    SPECIALISED_ACTIVATIONS,
    Tuning,
    assemble,
    call_code,
    check,
    column_offsets,
    geometry,
    place,
)
from ops.kernels.step import KernelStep
from ops.kernels.vector import jit, kernel, read_i64

__all__ = [
    "MAX_THREADS",
    "SPECIALISED_ACTIVATIONS",
    "Tuning",
    "specialised_available",
    "specialised_conv_step",
    "specialised_pair_step",
]

MAX_THREADS = 64  # that work on a pair; each has a scratch of its own
PAIR_TILES = (2, 4)  # at once where the code of a pair fits into `PAIR_CODE` bytes, and where it does not
PAIR_CODE = 32 * 1024

_CONV_FIELDS = (*HEAD, "table", "starts", "ranges")
_PAIR_FIELDS = (*HEAD, "table1", "functions1", "table2", "functions2", "share", "at_once")


def specialised_available() -> bool:
    """Whether this machine and process can run specialised steps."""
    if os.environ.get("NAS_SPECIALISED", "1") == "0" or os.name != "posix":
        return False
    return platform.machine().lower() in ("x86_64", "amd64") and isa() == "avx512" and executable_available()


@jit
def call(d, table, f, first, last):
    """Function f on the tiles first .. last, counted through all tile rows of all groups of images; one call per tile row."""
    code, weights = read_i64(table + 16 * f), read_i64(table + 16 * f + 8)
    while first < last:
        line, tile = first // d[6], first % d[6]
        group, row, tiles = line // d[5], line % d[5], min(d[6] - tile, last - first)
        x, y, residual = place(d, 0, group, row, tile), place(d, 1, group, row, tile), place(d, 2, group, row, tile)
        call_code(code, x, y, weights, tiles, residual)
        first += tiles


@kernel
def specialised_conv(d, thread, threads):
    """This thread's share of (range, tile), function by function; fields: `_CONV_FIELDS`."""
    tiles = d[4] * d[5] * d[6]
    item, end = tiles * d[21] * thread // threads, tiles * d[21] * (thread + 1) // threads
    while item < end:
        r, first = item // tiles, item % tiles
        last = min(tiles, first + end - item)
        for f in range(read_i64(d[20] + 8 * r), read_i64(d[20] + 8 * r + 8)):
            call(d, d[19], f, first, last)
        item += last - first


@kernel
def specialised_pair(d, thread, threads):
    """This thread's share of the groups of tiles, each through both convolutions; fields: `_PAIR_FIELDS`."""
    threads, at_once = min(threads, MAX_THREADS), d[24]
    pieces = -(-d[6] // at_once)
    items, scratch = d[4] * d[5] * pieces, d[3] + thread * d[23]
    if thread < threads:
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            line, tile = item // pieces, item % pieces * at_once
            group, row, tiles = line // d[5], line % d[5], min(at_once, d[6] - tile)
            x, y, residual = (
                place(d, 0, group, row, tile),
                place(d, 1, group, row, tile),
                place(d, 2, group, row, tile),
            )
            for f in range(d[20]):
                call_code(read_i64(d[19] + 16 * f), x, scratch, read_i64(d[19] + 16 * f + 8), tiles, residual)
            for f in range(d[22]):
                call_code(read_i64(d[21] + 16 * f), scratch, y, read_i64(d[21] + 16 * f + 8), tiles, residual)


def specialised_conv_step(
    weight: CSR,
    kernel_size: tuple[int, int],
    bias: npt.NDArray[np.float32] | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    source: Layout,
    target: Layout,
    activation: str = "none",
    residual: Layout | None = None,
    tuning: Tuning | None = None,
) -> KernelStep:
    """Prepare a convolution in lanes: act(bias + residual + sum of w · x), with code of its own.

    Args:
        weight: [out, in/groups * kernel_height * kernel_width], columns in the order (in, ky, kx).
        bias: float32[out] or None.
        padding: (top, bottom, left, right).
        source, target: of input and output; see `lanes.conv_source_layout`. The source's halo must be valid.
        residual: of a second input, with the target's blocking.
        tuning: how to cut the layer into functions.

    Returns:
        The step; inputs are [x] or [x, residual].

    Raises:
        ValueError: the arguments do not fit together.
        ExecutableError: the system gives no executable memory; take the portable step.
    """
    check(weight, kernel_size, bias, stride, padding, dilation, groups, source, target, activation, residual)
    tuning = tuning or Tuning()
    entries, steps = geometry(source, target, residual, stride)
    offsets = column_offsets(weight.shape[1], kernel_size, padding, dilation, groups, source)
    taps = kernel_size[0] * kernel_size[1]
    layer = assemble(weight, bias, offsets, taps, groups, steps, activation, residual is not None, tuning)
    entries |= {"table": layer.table.ctypes.data, "starts": layer.starts.ctypes.data, "ranges": layer.starts.size - 1}
    template = np.array([entries.get(name, 0) for name in _CONV_FIELDS], np.int64)
    return KernelStep(specialised_conv.address, template, (0,) if residual is None else (0, 2), 1, arrays=layer.arrays)


def specialised_pair_step(
    first: CSR,
    second: CSR,
    kernel_size: tuple[int, int],
    first_bias: npt.NDArray[np.float32] | None,
    second_bias: npt.NDArray[np.float32] | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    source: Layout,
    target: Layout,
    activations: tuple[str, str] = ("none", "none"),
    residual: Layout | None = None,
    tiles_at_once: int = 0,
    tuning: Tuning | None = None,
) -> KernelStep:
    """Prepare a convolution followed by a 1x1 convolution: act2(bias2 + residual + second · act1(bias1 + sum of first · x)).

    The values between them exist for `tiles_at_once` tiles at a time, in scratch memory of which every thread has its own
    (`MAX_THREADS` of them; more threads than that idle).

    Args:
        first: [wide, in * kernel_height * kernel_width], columns in the order (in, ky, kx); kernel_size, stride, padding,
            dilation are its.
        second: [out, wide].
        first_bias, second_bias: float32[wide], float32[out], or None.
        source, target: of the input of `first` and the output of `second`, as for `specialised_conv_step`.
        activations: after the first and after the second.
        residual: of a second input, added before the second activation; the target's blocking.
        tiles_at_once: 0 chooses: few while the code of both fits into the first-level cache, else more, so that code is
            fetched once for all of them.

    Returns:
        The step; inputs are [x] or [x, residual].

    Raises:
        As `specialised_conv_step`.
    """
    tuning = tuning or Tuning()
    wide = target.with_channels(first.shape[0]).with_halo((0, 0, 0, 0))
    check(first, kernel_size, first_bias, stride, padding, dilation, 1, source, wide, activations[0], None)
    check(second, (1, 1), second_bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, wide, target, activations[1], residual)
    taps = kernel_size[0] * kernel_size[1]
    entries, (x_step, y_step, r_step) = geometry(source, target, residual, stride)
    offsets = column_offsets(first.shape[1], kernel_size, padding, dilation, 1, source)
    one = assemble(first, first_bias, offsets, taps, 1, (x_step, wide.tile_step, 0), activations[0], False, tuning)
    offsets, has_residual = np.arange(second.shape[1]) * LANES, residual is not None
    steps = (wide.tile_step, y_step, r_step)
    two = assemble(second, second_bias, offsets, 1, 1, steps, activations[1], has_residual, tuning)
    if not tiles_at_once:
        size = one.code.nbytes + two.code.nbytes + one.stream.nbytes + two.stream.nbytes
        tiles_at_once = PAIR_TILES[size > PAIR_CODE]
    share = min(tiles_at_once, target.block[1]) * wide.tile_step
    entries |= {"table1": one.table.ctypes.data, "functions1": len(one.table)}
    entries |= {"table2": two.table.ctypes.data, "functions2": len(two.table)}
    entries |= {"share": 4 * share, "at_once": min(tiles_at_once, target.block[1])}
    template = np.array([entries.get(name, 0) for name in _PAIR_FIELDS], np.int64)
    slots = (0,) if residual is None else (0, 2)
    arrays = (*one.arrays, *two.arrays)
    return KernelStep(specialised_pair.address, template, slots, 1, 3, MAX_THREADS * share, arrays)
