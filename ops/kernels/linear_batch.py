"""Linear layers on several inputs, the inputs of the batch in the lanes.

The batch is cut into tiles of 8, 16, 32 or 64 inputs, the columns into blocks. A block of a tile is transposed into a small buffer
that stays in the first-level cache, [columns + 1][inputs]; then every row adds its weights of that block, each times a vector
of inputs, to its accumulators: in registers during the block, in scratch [rows][inputs] between blocks. The weights are read
once per tile. Where a tile is few vectors wide, several partial sums per row hide the latency of the additions; for that rows are
filled up to a multiple of `UNROLL` with weights 0 on the last line of the buffer, which is 0 itself, so that no input takes
part that no weight is kept for.

Packed: values float32 and places uint16 (bytes from the buffer's start), by blocks, then rows. The blocks of one tile cost 4.8 to
5.3 cycles per weight and 64 inputs on a core that loads one vector a cycle.

Start with `batch_step`; `batch_tile` chooses the width. Twin: `ops.reference.csr_linear`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import activated
from ops.kernels.linear_vectors import (
    add8,
    fma8,
    load8,
    load_first,
    read_u16,
    splat8_at,
    store8,
    store_first,
    transpose8,
    zero8,
)
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import (
    LANES,
    add,
    fma,
    jit,
    kernel,
    load,
    read_f32,
    read_i32,
    splat_at,
    store,
    write_f32,
    zero,
)

__all__ = ["TILES", "batch_step", "batch_tile"]

# Places in the descriptor.
X, RESIDUAL, OUT, SCRATCH, BIAS, ENDS, PLACES, VALUES, ROWS, COLS, BATCH, ACTIVATION, TILE, BLOCK, PRIVATE = range(15)
MOST_THREADS = 16  # that have a buffer of their own in scratch; more would find no work anyway
TILES = (8, 16, 32, 64)
UNROLL = {8: 4, 16: 4, 32: 2, 64: 1}
_TILE_COST = {8: 37, 16: 57, 32: 96, 64: 182}  # microseconds for 1024 -> 1000 at density 0.1
_CACHED = 2048 * 64  # accumulators
_BUFFER = 32 * 1024  # bytes of a block, for rows with enough weights in it; 8 inputs want half
_LARGEST = 65536 - 256  # bytes a place can address
_ENOUGH = 12  # weights of a row in a block, so that its accumulators are not loaded and stored too often


@jit
def rows_8(x, total, start, ends, begin, end, places, values):
    """Add one block to the accumulators of the rows begin .. end, 8 inputs. The first block, that with
    `start`, the address of the bias, sets them."""
    k = np.int64(read_i32(ends + 4 * begin))
    for row in range(begin, end):
        last = np.int64(read_i32(ends + 4 * row + 4))
        at = total + 32 * row
        a = splat8_at(start + 4 * row) if start != 0 else load8(at)
        b, c, d = zero8(), zero8(), zero8()
        while k < last:
            place, value = places + 2 * k, values + 4 * k
            a = fma8(splat8_at(value), load8(x + read_u16(place)), a)
            b = fma8(splat8_at(value + 4), load8(x + read_u16(place + 2)), b)
            c = fma8(splat8_at(value + 8), load8(x + read_u16(place + 4)), c)
            d = fma8(splat8_at(value + 12), load8(x + read_u16(place + 6)), d)
            k += 4
        store8(at, add8(add8(a, b), add8(c, d)))


@jit
def rows_16(x, total, start, ends, begin, end, places, values):
    """The same, 16 inputs."""
    k = np.int64(read_i32(ends + 4 * begin))
    for row in range(begin, end):
        last = np.int64(read_i32(ends + 4 * row + 4))
        at = total + 64 * row
        a = splat_at(start + 4 * row) if start != 0 else load(at)
        b, c, d = zero(), zero(), zero()
        while k < last:
            place, value = places + 2 * k, values + 4 * k
            a = fma(splat_at(value), load(x + read_u16(place)), a)
            b = fma(splat_at(value + 4), load(x + read_u16(place + 2)), b)
            c = fma(splat_at(value + 8), load(x + read_u16(place + 4)), c)
            d = fma(splat_at(value + 12), load(x + read_u16(place + 6)), d)
            k += 4
        store(at, add(add(a, b), add(c, d)))


@jit
def rows_32(x, total, start, ends, begin, end, places, values):
    """The same, 32 inputs."""
    k = np.int64(read_i32(ends + 4 * begin))
    for row in range(begin, end):
        last = np.int64(read_i32(ends + 4 * row + 4))
        at = total + 128 * row
        if start != 0:
            a = splat_at(start + 4 * row)
            b = a
        else:
            a, b = load(at), load(at + 64)
        c, d = zero(), zero()
        while k < last:
            place, value = places + 2 * k, values + 4 * k
            w, from_ = splat_at(value), x + read_u16(place)
            a, b = fma(w, load(from_), a), fma(w, load(from_ + 64), b)
            w, from_ = splat_at(value + 4), x + read_u16(place + 2)
            c, d = fma(w, load(from_), c), fma(w, load(from_ + 64), d)
            k += 2
        store(at, add(a, c))
        store(at + 64, add(b, d))


@jit
def rows_64(x, total, start, ends, begin, end, places, values):
    """The same, 64 inputs."""
    k = np.int64(read_i32(ends + 4 * begin))
    for row in range(begin, end):
        last = np.int64(read_i32(ends + 4 * row + 4))
        at = total + 256 * row
        if start != 0:
            a = splat_at(start + 4 * row)
            b, c, d = a, a, a
        else:
            a, b, c, d = load(at), load(at + 64), load(at + 128), load(at + 192)
        while k < last:
            w, from_ = splat_at(values + 4 * k), x + read_u16(places + 2 * k)
            a, b = fma(w, load(from_), a), fma(w, load(from_ + 64), b)
            c, d = fma(w, load(from_ + 128), c), fma(w, load(from_ + 192), d)
            k += 1
        store(at, a)
        store(at + 64, b)
        store(at + 128, c)
        store(at + 192, d)


@jit
def spread(x, cols, count, width, tile, buffer):
    """buffer[column, input] = x[input, column] for `width` columns and `tile` inputs of which `count` exist (the others are
    copies of the first)."""
    step = 4 * cols
    for n in range(0, tile, 8):
        whole = np.int64(0)
        if n + 8 <= count:
            whole = width // 8 * 8
            for column in range(0, whole, 8):
                transpose8(x + n * step + 4 * column, step, buffer + 4 * (column * tile + n), 4 * tile)
        for m in range(n, n + 8):
            source = x + step * (m if m < count else 0)
            for column in range(whole, width):
                write_f32(buffer + 4 * (column * tile + m), read_f32(source + 4 * column))


@jit
def collect(total, tile, begin, end, count, rows, residual, out, activation, room):
    """out[input, row] = act(total[row, input] + residual) for the rows begin .. end (of 16, those that exist) and `count` inputs;
    `room`: 128 floats."""
    for row in range(begin, end, LANES):
        for n in range(0, count, 8):
            source = total + 4 * (row * tile + n)
            transpose8(source, 4 * tile, room, 64)
            transpose8(source + 32 * tile, 4 * tile, room + 32, 64)
            for m in range(n, min(n + 8, count)):
                value = load(room + 64 * (m - n))
                at = 4 * (m * rows + row)
                if residual != 0:
                    value = add(value, load_first(residual + at, rows - row))
                store_first(out + at, activated(value, activation), rows - row)


@kernel
def linear_batch(d, thread, threads):
    """Rows are split in pieces of 16; every thread transposes the inputs for itself."""
    threads = min(threads, MOST_THREADS)
    if thread >= threads:
        return
    rows, cols, tile, block = d[ROWS], d[COLS], d[TILE], d[BLOCK]
    pieces = (rows + LANES - 1) // LANES
    begin, end = LANES * (pieces * thread // threads), LANES * (pieces * (thread + 1) // threads)
    total = d[SCRATCH]
    room = total + 4 * (pieces * LANES * tile + thread * d[PRIVATE])
    buffer = room + 512
    for i in range(tile):
        write_f32(buffer + 4 * (block * tile + i), np.float32(0))
    for first in range(0, d[BATCH], tile):
        count = min(tile, d[BATCH] - first)
        ends, start = d[ENDS], d[BIAS]
        for column in range(0, cols, block):
            spread(d[X] + 4 * (first * cols + column), cols, count, min(block, cols - column), tile, buffer)
            if tile == 8:
                rows_8(buffer, total, start, ends, begin, end, d[PLACES], d[VALUES])
            elif tile == 16:
                rows_16(buffer, total, start, ends, begin, end, d[PLACES], d[VALUES])
            elif tile == 32:
                rows_32(buffer, total, start, ends, begin, end, d[PLACES], d[VALUES])
            else:
                rows_64(buffer, total, start, ends, begin, end, d[PLACES], d[VALUES])
            ends, start = ends + 4 * pieces * LANES, np.int64(0)
        shift = 4 * first * rows
        residual = d[RESIDUAL] + shift if d[RESIDUAL] != 0 else np.int64(0)
        collect(total, tile, begin, end, count, rows, residual, d[OUT] + shift, d[ACTIVATION], room)


def batch_tile(batch: int, rows: int) -> int:
    """The width of the tiles that takes the least time: 8, 16, 32 or 64 inputs. The accumulators of a wide tile with many rows
    would not stay in the second-level cache."""
    tiles = [tile for tile in TILES if tile <= 32 or rows * tile <= _CACHED]
    return min(tiles, key=lambda tile: -(-batch // tile) * _TILE_COST[tile])


def batch_step(
    weight: CSR, batch: int, bias: npt.NDArray[np.float32], activation: int, residual: bool, tile: int
) -> KernelStep:
    """Prepare act(x · weightᵀ + bias + residual), inputs [x, residual].

    Args:
        weight: [rows, cols].
        batch: inputs of one call; x float32[batch, cols], output and residual float32[batch, rows].
        bias: float32[rows].
        activation: its number.
        tile: inputs side by side, one of `TILES`.
    """
    rows, cols = weight.shape
    pieces = -(-rows // LANES)
    block = _block(weight, tile)
    ends, places, values = _pack(weight, block, tile, pieces * LANES)
    by_row = np.zeros(pieces * LANES, np.float32)
    by_row[:rows] = bias
    arrays = tuple(aligned(a) for a in (ends, places, values, by_row))
    private = 128 + -(-(block + 1) * tile // LANES) * LANES  # floats of a thread: `room` and its buffer
    template = np.zeros(15, np.int64)
    template[[ENDS, PLACES, VALUES, BIAS]] = [a.ctypes.data for a in arrays]
    template[[ROWS, COLS, BATCH, ACTIVATION, TILE, BLOCK, PRIVATE]] = (
        rows,
        cols,
        batch,
        activation,
        tile,
        block,
        private,
    )
    scratch = pieces * LANES * tile + MOST_THREADS * private
    inputs = (X, RESIDUAL) if residual else (X,)
    return KernelStep(linear_batch.address, template, inputs, OUT, SCRATCH, scratch, arrays)


def _block(weight: CSR, tile: int) -> int:
    """Columns of a block: even parts of the matrix that fit the first-level cache, larger ones for very sparse rows."""
    rows, cols = weight.shape
    wanted = _BUFFER // (8 * tile if tile == 8 else 4 * tile)
    wanted = max(wanted, -(-_ENOUGH * rows * cols // max(weight.nnz, 1)))
    blocks = -(-cols // min(wanted, _LARGEST // (4 * tile)))
    return -(-cols // blocks)


def _pack(
    weight: CSR, block: int, tile: int, rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """ends int32[blocks * rows + 1], where the weights of each (block, row) begin and end; places and values of the weights."""
    unroll, blocks = UNROLL[tile], -(-weight.shape[1] // block)
    which, column = np.divmod(weight.indices, np.int32(block))
    cell = which * np.int32(rows) + np.repeat(np.arange(weight.shape[0], dtype=np.int32), np.diff(weight.indptr))
    counts = np.bincount(cell, minlength=blocks * rows)
    ends = np.zeros(blocks * rows + 1, np.int64)
    np.cumsum(-(-counts // unroll) * unroll, out=ends[1:])
    order = np.argsort(cell, kind="stable")
    firsts = np.cumsum(counts) - counts
    at = np.arange(order.size) + np.repeat(ends[:-1] - firsts, counts)
    places = np.full(ends[-1], 4 * block * tile, np.uint16)
    values = np.zeros(ends[-1], np.float32)
    places[at] = 4 * tile * column[order]
    values[at] = weight.values[order]
    return ends.astype(np.int32), places, values
