"""Sparse convolution of any geometry in the lane layout, without code of its own per weight: the portable path.

For up to 8 tiles at once and one output channel after another, every kept weight is one broadcast and one multiply-add per
tile, `acc[t] += w · X[tile_t + offset]`, with accumulators in registers. In the lane layout the offset of a tap is the same for
all tiles and every load is aligned, so that one kernel serves 1x1, k x k, strided, dilated and grouped convolutions. Input
channels are taken in chunks whose vectors stay in the first-level cache; between chunks the sums wait in the output.

The loop is that of Fast Sparse ConvNets (Elsen et al. 2020, arXiv:1911.09723, §3.1); layout and blocking are ours.

Start with `portable_conv_step`; its twin is `ops.reference.csr_conv2d`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import ACTIVATIONS, activated
from ops.kernels.isa import isa
from ops.kernels.lanes import LANES, Layout, conv_offsets
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import add, fma, jit, kernel, load, read_i32, read_i64, splat_at, store, zero

__all__ = ["channel_chunks", "portable_conv_step", "tile_table"]

# Tiles at once, by what the registers hold: 32 zmm, 16 ymm (two per vector), 16 xmm (four per vector).
WIDEST = {"avx512": 8, "avx2": 4, "generic": 2}
L1_BYTES = 20 * 1024  # of input vectors per chunk: leaves a third of a 32 KB cache to weights and sums
LEAST_PER_ROW = 10  # kept weights per output channel and chunk that pay for reloading the sums

_FIELDS = (
    *("x", "y", "residual", "tiles", "pointers", "offsets", "values", "bias"),
    *("n_groups", "rows", "chunks", "activation", "has_residual", "groups"),
)


@jit
def _span8(d, table, row, end, chunk):
    """Output channels row .. end of 8 tiles in one chunk; `table`: address of their (x, y, residual) byte offsets."""
    x0, x1, x2, x3 = (
        d[0] + read_i64(table),
        d[0] + read_i64(table + 24),
        d[0] + read_i64(table + 48),
        d[0] + read_i64(table + 72),
    )
    x4, x5, x6, x7 = (
        d[0] + read_i64(table + 96),
        d[0] + read_i64(table + 120),
        d[0] + read_i64(table + 144),
        d[0] + read_i64(table + 168),
    )
    first, last = chunk == 0, chunk == d[10] - 1
    pointers = d[4] + 4 * chunk * d[9]
    while row < end:
        k, stop = np.int64(read_i32(pointers + 4 * row)), np.int64(read_i32(pointers + 4 * row + 4))
        if k < stop or first or last:
            y = d[1] + 64 * row
            if first:
                a0 = splat_at(d[7] + 4 * row)
                a1 = a2 = a3 = a4 = a5 = a6 = a7 = a0
                if d[12]:
                    r = d[2] + 64 * row
                    a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
                    a2, a3 = add(a2, load(r + read_i64(table + 64))), add(a3, load(r + read_i64(table + 88)))
                    a4, a5 = add(a4, load(r + read_i64(table + 112))), add(a5, load(r + read_i64(table + 136)))
                    a6, a7 = add(a6, load(r + read_i64(table + 160))), add(a7, load(r + read_i64(table + 184)))
            else:
                a0, a1 = load(y + read_i64(table + 8)), load(y + read_i64(table + 32))
                a2, a3 = load(y + read_i64(table + 56)), load(y + read_i64(table + 80))
                a4, a5 = load(y + read_i64(table + 104)), load(y + read_i64(table + 128))
                a6, a7 = load(y + read_i64(table + 152)), load(y + read_i64(table + 176))
            while k < stop:
                o = np.int64(read_i32(d[5] + 4 * k))
                w = splat_at(d[6] + 4 * k)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
                a2 = fma(w, load(x2 + o), a2)
                a3 = fma(w, load(x3 + o), a3)
                a4 = fma(w, load(x4 + o), a4)
                a5 = fma(w, load(x5 + o), a5)
                a6 = fma(w, load(x6 + o), a6)
                a7 = fma(w, load(x7 + o), a7)
                k += 1
            if last and d[11]:
                act = d[11]
                a0, a1, a2, a3 = activated(a0, act), activated(a1, act), activated(a2, act), activated(a3, act)
                a4, a5, a6, a7 = activated(a4, act), activated(a5, act), activated(a6, act), activated(a7, act)
            store(y + read_i64(table + 8), a0)
            store(y + read_i64(table + 32), a1)
            store(y + read_i64(table + 56), a2)
            store(y + read_i64(table + 80), a3)
            store(y + read_i64(table + 104), a4)
            store(y + read_i64(table + 128), a5)
            store(y + read_i64(table + 152), a6)
            store(y + read_i64(table + 176), a7)
        row += 1


@jit
def _span7(d, table, row, end, chunk):
    """Output channels row .. end of 7 tiles, as `_span8`: images of 14, 28 or 56 make multiples of 7."""
    x0, x1, x2, x3 = (
        d[0] + read_i64(table),
        d[0] + read_i64(table + 24),
        d[0] + read_i64(table + 48),
        d[0] + read_i64(table + 72),
    )
    x4, x5, x6 = (
        d[0] + read_i64(table + 96),
        d[0] + read_i64(table + 120),
        d[0] + read_i64(table + 144),
    )
    first, last = chunk == 0, chunk == d[10] - 1
    pointers = d[4] + 4 * chunk * d[9]
    while row < end:
        k, stop = np.int64(read_i32(pointers + 4 * row)), np.int64(read_i32(pointers + 4 * row + 4))
        if k < stop or first or last:
            y = d[1] + 64 * row
            if first:
                a0 = splat_at(d[7] + 4 * row)
                a1 = a2 = a3 = a4 = a5 = a6 = a0
                if d[12]:
                    r = d[2] + 64 * row
                    a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
                    a2, a3 = add(a2, load(r + read_i64(table + 64))), add(a3, load(r + read_i64(table + 88)))
                    a4, a5 = add(a4, load(r + read_i64(table + 112))), add(a5, load(r + read_i64(table + 136)))
                    a6 = add(a6, load(r + read_i64(table + 160)))
            else:
                a0, a1 = load(y + read_i64(table + 8)), load(y + read_i64(table + 32))
                a2, a3 = load(y + read_i64(table + 56)), load(y + read_i64(table + 80))
                a4, a5 = load(y + read_i64(table + 104)), load(y + read_i64(table + 128))
                a6 = load(y + read_i64(table + 152))
            while k < stop:
                o = np.int64(read_i32(d[5] + 4 * k))
                w = splat_at(d[6] + 4 * k)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
                a2 = fma(w, load(x2 + o), a2)
                a3 = fma(w, load(x3 + o), a3)
                a4 = fma(w, load(x4 + o), a4)
                a5 = fma(w, load(x5 + o), a5)
                a6 = fma(w, load(x6 + o), a6)
                k += 1
            if last and d[11]:
                act = d[11]
                a0, a1, a2, a3 = activated(a0, act), activated(a1, act), activated(a2, act), activated(a3, act)
                a4, a5, a6 = activated(a4, act), activated(a5, act), activated(a6, act)
            store(y + read_i64(table + 8), a0)
            store(y + read_i64(table + 32), a1)
            store(y + read_i64(table + 56), a2)
            store(y + read_i64(table + 80), a3)
            store(y + read_i64(table + 104), a4)
            store(y + read_i64(table + 128), a5)
            store(y + read_i64(table + 152), a6)
        row += 1


@jit
def _span4(d, table, row, end, chunk):
    """As `_span8`, for 4 tiles."""
    x0, x1, x2, x3 = (
        d[0] + read_i64(table),
        d[0] + read_i64(table + 24),
        d[0] + read_i64(table + 48),
        d[0] + read_i64(table + 72),
    )
    first, last = chunk == 0, chunk == d[10] - 1
    pointers = d[4] + 4 * chunk * d[9]
    while row < end:
        k, stop = np.int64(read_i32(pointers + 4 * row)), np.int64(read_i32(pointers + 4 * row + 4))
        if k < stop or first or last:
            y = d[1] + 64 * row
            if first:
                a0 = splat_at(d[7] + 4 * row)
                a1 = a2 = a3 = a0
                if d[12]:
                    r = d[2] + 64 * row
                    a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
                    a2, a3 = add(a2, load(r + read_i64(table + 64))), add(a3, load(r + read_i64(table + 88)))
            else:
                a0, a1 = load(y + read_i64(table + 8)), load(y + read_i64(table + 32))
                a2, a3 = load(y + read_i64(table + 56)), load(y + read_i64(table + 80))
            b0 = b1 = b2 = b3 = zero()
            while k + 2 <= stop:  # two sums per tile, so that no multiply-add waits for the one before
                o, p = np.int64(read_i32(d[5] + 4 * k)), np.int64(read_i32(d[5] + 4 * k + 4))
                w, v = splat_at(d[6] + 4 * k), splat_at(d[6] + 4 * k + 4)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
                a2 = fma(w, load(x2 + o), a2)
                a3 = fma(w, load(x3 + o), a3)
                b0 = fma(v, load(x0 + p), b0)
                b1 = fma(v, load(x1 + p), b1)
                b2 = fma(v, load(x2 + p), b2)
                b3 = fma(v, load(x3 + p), b3)
                k += 2
            if k < stop:
                o = np.int64(read_i32(d[5] + 4 * k))
                w = splat_at(d[6] + 4 * k)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
                a2 = fma(w, load(x2 + o), a2)
                a3 = fma(w, load(x3 + o), a3)
            a0, a1, a2, a3 = add(a0, b0), add(a1, b1), add(a2, b2), add(a3, b3)
            if last and d[11]:
                act = d[11]
                a0, a1, a2, a3 = activated(a0, act), activated(a1, act), activated(a2, act), activated(a3, act)
            store(y + read_i64(table + 8), a0)
            store(y + read_i64(table + 32), a1)
            store(y + read_i64(table + 56), a2)
            store(y + read_i64(table + 80), a3)
        row += 1


@jit
def _span2(d, table, row, end, chunk):
    """As `_span8`, for 2 tiles."""
    x0, x1 = d[0] + read_i64(table), d[0] + read_i64(table + 24)
    first, last = chunk == 0, chunk == d[10] - 1
    pointers = d[4] + 4 * chunk * d[9]
    while row < end:
        k, stop = np.int64(read_i32(pointers + 4 * row)), np.int64(read_i32(pointers + 4 * row + 4))
        if k < stop or first or last:
            y = d[1] + 64 * row
            if first:
                a0 = a1 = splat_at(d[7] + 4 * row)
                if d[12]:
                    r = d[2] + 64 * row
                    a0, a1 = add(a0, load(r + read_i64(table + 16))), add(a1, load(r + read_i64(table + 40)))
            else:
                a0, a1 = load(y + read_i64(table + 8)), load(y + read_i64(table + 32))
            b0 = b1 = zero()
            while k + 2 <= stop:
                o, p = np.int64(read_i32(d[5] + 4 * k)), np.int64(read_i32(d[5] + 4 * k + 4))
                w, v = splat_at(d[6] + 4 * k), splat_at(d[6] + 4 * k + 4)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
                b0 = fma(v, load(x0 + p), b0)
                b1 = fma(v, load(x1 + p), b1)
                k += 2
            if k < stop:
                o = np.int64(read_i32(d[5] + 4 * k))
                w = splat_at(d[6] + 4 * k)
                a0 = fma(w, load(x0 + o), a0)
                a1 = fma(w, load(x1 + o), a1)
            a0, a1 = add(a0, b0), add(a1, b1)
            if last and d[11]:
                a0, a1 = activated(a0, d[11]), activated(a1, d[11])
            store(y + read_i64(table + 8), a0)
            store(y + read_i64(table + 32), a1)
        row += 1


@jit
def _span1(d, table, row, end, chunk):
    """As `_span8`, for 1 tile."""
    x = d[0] + read_i64(table)
    first, last = chunk == 0, chunk == d[10] - 1
    pointers = d[4] + 4 * chunk * d[9]
    while row < end:
        k, stop = np.int64(read_i32(pointers + 4 * row)), np.int64(read_i32(pointers + 4 * row + 4))
        if k < stop or first or last:
            y = d[1] + 64 * row + read_i64(table + 8)
            if first:
                a = splat_at(d[7] + 4 * row)
                if d[12]:
                    a = add(a, load(d[2] + 64 * row + read_i64(table + 16)))
            else:
                a = load(y)
            b = c = e = zero()
            while k + 4 <= stop:
                o, v = d[5] + 4 * k, d[6] + 4 * k
                a = fma(splat_at(v), load(x + np.int64(read_i32(o))), a)
                b = fma(splat_at(v + 4), load(x + np.int64(read_i32(o + 4))), b)
                c = fma(splat_at(v + 8), load(x + np.int64(read_i32(o + 8))), c)
                e = fma(splat_at(v + 12), load(x + np.int64(read_i32(o + 12))), e)
                k += 4
            while k < stop:
                a = fma(splat_at(d[6] + 4 * k), load(x + np.int64(read_i32(d[5] + 4 * k))), a)
                k += 1
            a = add(add(a, b), add(c, e))
            if last and d[11]:
                a = activated(a, d[11])
            store(y, a)
        row += 1


@kernel
def portable_conv(d, thread, threads):
    """This thread's share of the tiles, or of the output channels where there are few tiles; fields: `_FIELDS`."""
    groups, rows, chunks = d[8], d[9], d[10]
    group, last_group, row, last_row = 0, groups, 0, rows
    if groups < 4 * threads:
        row, last_row = rows * thread // threads, rows * (thread + 1) // threads
    else:
        group, last_group = groups * thread // threads, groups * (thread + 1) // threads
    while group < last_group:
        at_once = read_i64(d[13] + 16 * group)
        table = d[3] + 24 * read_i64(d[13] + 16 * group + 8)
        for chunk in range(chunks):
            if at_once == 8:
                _span8(d, table, row, last_row, chunk)
            elif at_once == 7:
                _span7(d, table, row, last_row, chunk)
            elif at_once == 4:
                _span4(d, table, row, last_row, chunk)
            elif at_once == 2:
                _span2(d, table, row, last_row, chunk)
            else:
                _span1(d, table, row, last_row, chunk)
        group += 1


def tile_groups(tiles: int, widest: int) -> npt.NDArray[np.int64]:
    """int64[groups, 2]: how many tiles to take at once (8, 7, 4, 2 or 1; sevens where they come out even) and the first."""
    groups, first = [], 0
    while first < tiles:
        left = tiles - first
        sizes = [n for n in (8, 7, 4, 2, 1) if n <= min(left, widest)]
        seven = 7 in sizes and (left % 7 == 0 or left % 8 == 7)
        groups.append((7 if seven else sizes[0], first))
        first += groups[-1][0]
    return np.array(groups, np.int64)


def tile_table(
    source: Layout, target: Layout, residual: Layout | None, stride: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """int64[tiles, 3]: byte offsets in the input, the output and the residual of each tile of the target, row by row."""
    group, row, column = (
        axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, (target.groups, *target.block)), indexing="ij")
    )

    def offsets(layout: Layout, step: tuple[int, int]) -> npt.NDArray[np.int64]:
        place = layout.origin + group * layout.group_step
        return 4 * (place + row * step[0] * layout.row_step + column * step[1] * layout.tile_step)

    columns = [offsets(source, stride), offsets(target, (1, 1)), offsets(residual or target, (1, 1))]
    return np.stack(columns, axis=1).astype(np.int64)


def channel_chunks(weight: CSR, taps: int, groups: int, vectors: int) -> int:
    """Into how many chunks of input channels to cut: few enough that each output channel keeps `LEAST_PER_ROW` weights per
    chunk, and as many as it takes for a chunk's vectors (`vectors` per channel) to fit into `L1_BYTES`."""
    rows, cols = weight.shape
    channels = cols // taps * groups
    wanted = -(-channels * vectors * 4 * LANES // L1_BYTES)
    most = weight.nnz // max(1, rows * LEAST_PER_ROW)
    return max(1, min(wanted, most, channels))


def portable_conv_step(
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
    chunks: int = 0,
) -> KernelStep:
    """Prepare a convolution in lanes: act(bias + Σ w · x + residual).

    Args:
        weight: [out, in/groups * kernel_height * kernel_width], columns in the order (in, ky, kx).
        bias: float32[out] or None.
        padding: (top, bottom, left, right).
        source, target: of input and output; see `lanes.conv_source_layout`. The source's halo must be valid.
        residual: of a second input, with the target's blocking.
        chunks: of input channels; 0 chooses.

    Returns:
        The step; inputs are [x] or [x, residual].
    """
    rows = weight.shape[0]
    widest = min(WIDEST[isa()], target.tiles)
    taps = kernel_size[0] * kernel_size[1]
    vectors = kernel_size[0] * (widest + kernel_size[1] - 1) if stride == (1, 1) else taps * widest
    if not chunks:
        chunks = channel_chunks(weight, taps, groups, min(vectors, taps * widest))
    offsets = conv_offsets(weight, kernel_size, padding, dilation, groups, source) * 4
    row = np.repeat(np.arange(rows), np.diff(weight.indptr))
    channel = weight.indices // taps + row // (rows // groups) * (weight.shape[1] // taps)
    chunk = channel * chunks // (weight.shape[1] // taps * groups)
    order = np.lexsort((offsets, row, chunk)) if chunks > 1 else np.lexsort((offsets, row))
    counts = np.bincount(chunk * rows + row, minlength=chunks * rows)
    pointers = np.zeros(chunks * rows + 1, np.int32)
    np.cumsum(counts, out=pointers[1:])
    packed = {
        "tiles": aligned(tile_table(source, target, residual, stride)),
        "groups": aligned(many := tile_groups(target.tiles, WIDEST[isa()])),
        "pointers": aligned(pointers),
        "offsets": aligned(offsets[order].astype(np.int32)),
        "values": aligned(weight.values[order]),
        "bias": aligned(np.zeros(rows, np.float32) if bias is None else bias.astype(np.float32)),
    }
    numbers = {
        **{name: array.ctypes.data for name, array in packed.items()},
        **{"n_groups": len(many), "rows": rows, "chunks": chunks, "activation": ACTIVATIONS[activation]},
        **{
            "has_residual": int(residual is not None),
        },
    }
    template = np.array([numbers.get(name, 0) for name in _FIELDS], np.int64)
    slots = (0,) if residual is None else (0, 2)
    return KernelStep(portable_conv.address, template, slots, 1, arrays=tuple(packed.values()))
