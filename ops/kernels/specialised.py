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
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from ops.formats import CSR
from ops.kernels.activations import ACTIVATIONS
from ops.kernels.emitter import CODE_PER_ROW, CODE_PER_WEIGHT, ROWS_AT_ONCE, emit
from ops.kernels.emitter_activations import activation_table
from ops.kernels.executable import Executable, executable_available
from ops.kernels.isa import isa
from ops.kernels.lanes import LANES, Layout, conv_offsets, conv_source_layout
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import intrinsic, jit, kernel, read_i64

__all__ = [
    "MAX_THREADS",
    "SPECIALISED_ACTIVATIONS",
    "Tuning",
    "specialised_available",
    "specialised_conv_step",
    "specialised_pair_step",
]

SPECIALISED_ACTIVATIONS = frozenset(ACTIVATIONS)
MAX_THREADS = 64  # that work on a pair; each has a scratch of its own
PAIR_TILES = (2, 4)  # at once where the code of a pair fits into `PAIR_CODE` bytes, and where it does not
PAIR_CODE = 32 * 1024

_HEAD = (
    *("x", "y", "residual", "scratch", "groups", "tile_rows", "tiles"),
    *(f"{value}_{step}" for value in "xyr" for step in ("origin", "group", "row", "tile")),
)
_CONV_FIELDS = (*_HEAD, "table", "starts", "ranges", "rows_outside")
_PAIR_FIELDS = (*_HEAD, "table1", "functions1", "table2", "functions2", "share", "at_once")


@dataclass(frozen=True)
class Tuning:
    """How a layer is cut into functions. The defaults are the best found for 20 layer shapes on AMD Zen 4.

    Attributes:
        range_rows: output channels of a function, at most.
        code_bytes: of a function, roughly.
        vectors: of the output, and of the input per row block, that a function touches, roughly; they should stay in the
            first-level cache beside the weights.
        prefetch_from: kept weights from which code and weights are fetched in advance: where they come from beyond the second-
            level cache it makes a layer 10 to 15 % faster, elsewhere it costs 3 %.
        rows_outside: finish a tile row before the next one is begun (True), or a function (False).
    """

    range_rows: int = 150
    code_bytes: int = 1 << 20
    vectors: int = 360
    prefetch_from: int = 150_000
    rows_outside: bool = False


def specialised_available() -> bool:
    """Whether this machine and process can run specialised steps."""
    if os.environ.get("NAS_SPECIALISED", "1") == "0" or os.name != "posix":
        return False
    return platform.machine().lower() in ("x86_64", "amd64") and isa() == "avx512" and executable_available()


@intrinsic
def call_code(typingctx: Any, address: Any, x: Any, y: Any, weights: Any, tiles: Any, residual: Any) -> Any:
    """Call emitted code: `void(x, y, weights, tiles, residual)`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [number] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), code


@jit
def place(d, value, group, row, tile):
    """Address of a tile of x (value 0), y (1) or the residual (2)."""
    k = 7 + 4 * value
    return d[value] + d[k] + group * d[k + 1] + row * d[k + 2] + tile * d[k + 3]


@jit
def call(d, table, f, line):
    """Function f on all tiles of a tile row; `line` counts the tile rows of all groups of images."""
    group, row = line // d[5], line % d[5]
    x, y, residual = place(d, 0, group, row, 0), place(d, 1, group, row, 0), place(d, 2, group, row, 0)
    call_code(read_i64(table + 16 * f), x, y, read_i64(table + 16 * f + 8), d[6], residual)


@kernel
def specialised_conv(d, thread, threads):
    """This thread's share of (range, tile row); fields: `_CONV_FIELDS`."""
    lines, ranges = d[4] * d[5], d[21]
    item, end = lines * ranges * thread // threads, lines * ranges * (thread + 1) // threads
    while item < end:
        if d[22]:
            r, first, last = item % ranges, item // ranges, item // ranges + 1
        else:
            r, first = item // lines, item % lines
            last = min(lines, first + end - item)
        for f in range(read_i64(d[20] + 8 * r), read_i64(d[20] + 8 * r + 8)):
            for line in range(first, last):
                call(d, d[19], f, line)
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


@dataclass(frozen=True, eq=False)
class _Code:
    """A layer's functions. table: int64[functions, 2], addresses of code and weights; starts: int64[ranges + 1], the first
    function of each range."""

    code: Executable
    stream: npt.NDArray[np.float32]
    table: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.code, self.stream, self.table, self.starts


def _ranges(rows: int, groups: int, most: int) -> npt.NDArray[np.int64]:
    """Rows at which ranges of at most about `most` rows begin: whole groups, or equal parts of one that make for few and full
    row blocks."""
    per_group = rows // groups
    if per_group <= most:
        together = max(1, most // per_group)
        together = -(-groups // -(-groups // together))
        return np.append(np.arange(0, groups, together) * per_group, rows).astype(np.int64)
    fewest = -(-per_group // most)
    parts = min(range(fewest, 2 * fewest + 1), key=lambda n: n * ceil(ceil(per_group / n) / ROWS_AT_ONCE))
    inside = np.arange(parts) * per_group // parts
    return np.append((np.arange(groups)[:, None] * per_group + inside).reshape(-1), rows).astype(np.int64)


def _assemble(
    weight: CSR,
    bias: npt.NDArray[np.float32] | None,
    offsets: npt.NDArray[np.int64],
    taps: int,
    groups: int,
    steps: tuple[int, int, int],
    activation: str,
    has_residual: bool,
    tuning: Tuning,
) -> _Code:
    """Code for a layer. offsets: floats to each column, group by group; steps: floats to the next tile of x, y and residual."""
    rows, nnz = weight.shape[0], weight.nnz
    ranges = _ranges(rows, groups, tuning.range_rows)
    at_once = ROWS_AT_ONCE - (activation == "silu")
    cuts = 16 * nnz // tuning.code_bytes + 4 * nnz // tuning.vectors
    most = 2 * ranges.size + cuts  # functions; see emitter._cut
    code = np.empty(nnz * CODE_PER_WEIGHT + rows * CODE_PER_ROW + most * 128 + 4096, np.uint8)
    stream = np.empty(nnz + rows + most * 64, np.float32)
    table = np.zeros((most, 3), np.int64)
    functions, size, floats = emit(
        np.array(weight.indptr, np.int32),
        np.array(weight.indices, np.int32),
        np.array(weight.values, np.float32),
        np.array([] if bias is None else bias, np.float32),
        offsets * 4,
        np.argsort(offsets, kind="stable"),
        ranges,
        np.array([groups, taps, at_once], np.int64),
        np.array([tuning.code_bytes, tuning.vectors], np.int64),
        np.array(steps, np.int64) * 4,
        activation_table(activation),
        np.array([has_residual, nnz >= tuning.prefetch_from], np.int64),
        code,
        stream,
        table,
    )
    executable = Executable(code[:size])
    stream = aligned(stream[:floats])
    table = table[:functions]
    starts = np.searchsorted(table[:, 0], np.arange(ranges.size)).astype(np.int64)
    addresses = np.stack([table[:, 1] + executable.address, table[:, 2] * 4 + stream.ctypes.data], axis=1)
    return _Code(executable, stream, np.ascontiguousarray(addresses), starts)


def _check(
    weight: CSR,
    kernel_size: tuple[int, int],
    bias: npt.NDArray[np.float32] | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    source: Layout,
    target: Layout,
    activation: str,
    residual: Layout | None,
) -> None:
    """Raise ValueError unless the arguments of a convolution fit together."""
    rows, cols = weight.shape
    taps = kernel_size[0] * kernel_size[1]
    if rows != target.channels or rows % groups or cols % taps or cols // taps * groups != source.channels:
        raise ValueError(
            f"a weight [{rows}, {cols}] of {kernel_size[0]}x{kernel_size[1]} taps in {groups} groups does not lead from "
            f"{source.channels} to {target.channels} channels"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias must have one entry per weight row, float[{rows}], got {bias.dtype}{bias.shape}")
    if activation not in SPECIALISED_ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; known: {', '.join(sorted(SPECIALISED_ACTIVATIONS))}")
    if residual is not None and (residual.blocking != target.blocking or residual.channels != rows):
        raise ValueError(f"the residual must be blocked like the output with {rows} channels, got {residual}")
    shape = (source.batch, source.channels, source.height, source.width)
    needed = conv_source_layout(target, shape, kernel_size, stride, padding, dilation)
    if source.blocking != needed.blocking or any(a < b for a, b in zip(source.halo, needed.halo, strict=True)):
        raise ValueError(f"the input must be blocked {needed.blocking} with a halo of {needed.halo}, got {source}")


def _columns(
    cols: int,
    kernel_size: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    source: Layout,
) -> npt.NDArray[np.int64]:
    """int64[groups * cols]: floats from a source tile to the vector of each column of each group."""
    indptr, indices = np.arange(groups + 1) * cols, np.tile(np.arange(cols), groups)
    full = CSR((groups, cols), indptr.astype(np.int32), indices.astype(np.int32), np.zeros(groups * cols, np.float32))
    return conv_offsets(full, kernel_size, padding, dilation, groups, source)


def _geometry(
    source: Layout, target: Layout, residual: Layout | None, stride: tuple[int, int]
) -> tuple[dict[str, int], tuple[int, int, int]]:
    """The head of the descriptor (bytes), and the floats to the next tile of x, y and residual."""
    entries = {"groups": target.groups, "tile_rows": target.block[0], "tiles": target.block[1]}
    steps = []
    for name, layout, (down, right) in (("x", source, stride), ("y", target, (1, 1)), ("r", residual, (1, 1))):
        if layout is None:
            steps.append(0)
            continue
        steps.append(layout.tile_step * right)
        entries |= {f"{name}_origin": 4 * layout.origin, f"{name}_group": 4 * layout.group_step}
        entries |= {f"{name}_row": 4 * layout.row_step * down, f"{name}_tile": 4 * steps[-1]}
    return entries, (steps[0], steps[1], steps[2])


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
    _check(weight, kernel_size, bias, stride, padding, dilation, groups, source, target, activation, residual)
    tuning = tuning or Tuning()
    entries, steps = _geometry(source, target, residual, stride)
    offsets = _columns(weight.shape[1], kernel_size, padding, dilation, groups, source)
    taps = kernel_size[0] * kernel_size[1]
    layer = _assemble(weight, bias, offsets, taps, groups, steps, activation, residual is not None, tuning)
    entries |= {"table": layer.table.ctypes.data, "starts": layer.starts.ctypes.data, "ranges": layer.starts.size - 1}
    entries["rows_outside"] = int(tuning.rows_outside)
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
    _check(first, kernel_size, first_bias, stride, padding, dilation, 1, source, wide, activations[0], None)
    _check(second, (1, 1), second_bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, wide, target, activations[1], residual)
    taps = kernel_size[0] * kernel_size[1]
    entries, (x_step, y_step, r_step) = _geometry(source, target, residual, stride)
    offsets = _columns(first.shape[1], kernel_size, padding, dilation, 1, source)
    one = _assemble(first, first_bias, offsets, taps, 1, (x_step, wide.tile_step, 0), activations[0], False, tuning)
    offsets, has_residual = np.arange(second.shape[1]) * LANES, residual is not None
    steps = (wide.tile_step, y_step, r_step)
    two = _assemble(second, second_bias, offsets, 1, 1, steps, activations[1], has_residual, tuning)
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
