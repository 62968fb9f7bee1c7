"""One layer as machine code: how its rows and columns are cut into functions, and where its tiles are.

Shared by the steps of `ops.kernels.specialised`. The code of a layer is a list of functions, each for a range of output channels
and a chunk of input channels and for any number of tiles in a row (`ops.kernels.emitter`).

Start with `assemble`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from ops.formats import CSR
from ops.kernels.activations import ACTIVATIONS
from ops.kernels.emitter import CODE_PER_ROW, CODE_PER_WEIGHT, ROWS_AT_ONCE, emit
from ops.kernels.emitter_activations import activation_table
from ops.kernels.executable import Executable
from ops.kernels.lanes import Layout, conv_offsets, conv_source_layout
from ops.kernels.step import aligned
from ops.kernels.vector import intrinsic, jit

__all__ = [
    *("HEAD", "SPECIALISED_ACTIVATIONS", "Layer", "Tuning"),
    *("assemble", "call_code", "check", "column_offsets", "geometry", "place"),
]

SPECIALISED_ACTIVATIONS = frozenset(ACTIVATIONS)
# how the descriptor of every step begins; `place` reads it
HEAD = (
    *("x", "y", "residual", "scratch", "groups", "tile_rows", "tiles"),
    *(f"{value}_{step}" for value in "xyr" for step in ("origin", "group", "row", "tile")),
)


@dataclass(frozen=True)
class Tuning:
    """How a layer is cut into functions. The defaults are the best found for seven layer shapes at five densities on AMD
    Zen 4.

    Attributes:
        range_rows: output channels of a function, at most.
        code_bytes: of a function, roughly; 0 chooses: 24 KB, so that it stays in the first-level cache (found best on Intel
            Cascade Lake), but without a limit on AMD Zen, which fetches straight-line code from further away at full speed.
        vectors: of the output, and of the input per row block, that a function touches, roughly; they should stay in the
            first-level cache beside the weights.
        prefetch_from: kept weights from which code and weights are fetched in advance: where they come from beyond the second-
            level cache it makes a layer 10 to 15 % faster, elsewhere it costs 3 %.
    """

    range_rows: int = 150
    code_bytes: int = 0
    vectors: int = 360
    prefetch_from: int = 150_000


@dataclass(frozen=True, eq=False)
class Layer:
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


@lru_cache(maxsize=1)
def _code_bytes() -> int:
    return 1 << 30 if llvm.get_host_cpu_name().startswith("znver") else 24 * 1024


def assemble(
    weight: CSR,
    bias: npt.NDArray[np.float32] | None,
    offsets: npt.NDArray[np.int64],
    taps: int,
    groups: int,
    steps: tuple[int, int, int],
    activation: str,
    has_residual: bool,
    tuning: Tuning,
) -> Layer:
    """Code for a layer. offsets: floats to each column, group by group; steps: floats to the next tile of x, y and residual."""
    rows, nnz = weight.shape[0], weight.nnz
    ranges = _ranges(rows, groups, tuning.range_rows)
    at_once = ROWS_AT_ONCE - (activation == "silu")
    code_bytes = tuning.code_bytes or _code_bytes()
    most = 2 * ranges.size + 16 * nnz // code_bytes + nnz // max(1, tuning.vectors // 4)  # functions; see emitter._cut
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
        np.array([code_bytes, tuning.vectors], np.int64),
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
    return Layer(executable, stream, np.ascontiguousarray(addresses), starts)


def check(
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


def column_offsets(
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


def geometry(
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
