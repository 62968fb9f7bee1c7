"""Straight-line code of a sparse convolution: which instructions, in which order, for a given set of kept weights.

    per row block (up to 30 output channels, one zmm accumulator each)
        accumulators := bias (+ residual), or what an earlier function left in Y
        per column (input channel and tap) with a kept weight in the block
            vmovups zmm31, [X + constant]
            per kept weight: vfmadd231ps accumulator, zmm31, [weights]{1to16}
        activation where the sum is complete; Y := accumulators

No index is loaded and no loop is run but the one over the tiles of a tile row, which surrounds the whole. A *function* holds
all row blocks of a range of rows for a chunk of the columns; chunks keep its code and its part of a tile of X small enough to
stay in the first-level caches. Weights are stored in program order behind a moving base register, so that an instruction is 7
bytes long; columns are visited in ascending address for the same reason, and loaded two at a time (+20 % where most columns
have one weight, AMD Zen 4).

The idea of machine code for one set of weights is that of SparseDNN (Wang 2021, arXiv:2101.07948) and JitSpMM (Fu et al. 2024,
arXiv:2312.05639). Calling convention of a function, System V: rdi = X tile, rsi = Y tile, rdx = weights, rcx = number of tiles
(at least 1), r8 = residual tile.

Start with `emit`.
"""

from __future__ import annotations

import numpy as np

from ops.kernels import assembler as asm
from ops.kernels.emitter_activations import CONSTANTS, N_CONSTANTS, X0, emit_activation, emit_bounds
from ops.kernels.vector import jit

__all__ = ["CODE_AHEAD", "CODE_PER_ROW", "CODE_PER_WEIGHT", "ROWS_AT_ONCE", "WEIGHTS_AHEAD", "emit"]

ROWS_AT_ONCE = 30  # two of the 32 registers hold X; "silu" needs a third for itself
CODE_PER_WEIGHT, CODE_PER_ROW = 80, 400  # bytes no emitted code exceeds, per kept weight and per row

_NONE = np.int64(0)
CODE_AHEAD, WEIGHTS_AHEAD = map(np.int64, (32 * 1024, 16 * 1024))  # bytes fetched in advance, where it is asked for
_BYTES = 64  # of a vector, and of a cache line
_WINDOW = 128  # units an 8-bit displacement reaches in either direction
_UNSET = -(1 << 40)


@jit
def _weight(code, at, stream, start, state, value):
    """Append a weight to the stream; [rax + the returned displacement] is its address. state: (stream position, float rax
    points to)."""
    position = state[0]
    stream[position] = value
    state[0] = position + 1
    place = position - start
    if place - state[1] >= _WINDOW or place < state[1] - _WINDOW:
        state[1] = place + _WINDOW
        at = asm.lea(code, at, asm.RAX, asm.RDX, 4 * state[1])
    return at, 4 * (place - state[1])


@jit
def _emit_column(code, at, state, offset, register):
    """Load the vector at byte `offset` of the X tile; state[2]: byte r10 points to."""
    if offset - state[2] >= _WINDOW * _BYTES or offset < state[2] - _WINDOW * _BYTES:
        state[2] = offset + _WINDOW * _BYTES
        at = asm.lea(code, at, asm.R10, asm.RDI, state[2])
    return asm.vector(code, at, asm.LOAD, register, _NONE, asm.R10, offset - state[2])


@jit
def _emit_prefetch(code, at, start, state, displacement):
    """Fetch, where it is time, a line of weights and of code the functions to come will need; state[3]: where code was
    fetched from last."""
    if (state[0] - start) % 16 == 0:
        at = asm.prefetch(code, at, asm.RAX, displacement + WEIGHTS_AHEAD)
    if at - state[3] >= _BYTES:
        state[3] = at
        at = asm.prefetch_ahead(code, at, CODE_AHEAD)
    return at


@jit
def _emit_block(
    code,
    at,
    stream,
    start,
    state,
    rows,
    flags,
    columns,
    offsets,
    entry,
    ends,
    entry_row,
    entry_value,
    bias,
    activation,
    kind,
):
    """One row block. rows: its output channels; flags: 1 the sum begins here, 2 it ends here; columns: those of the chunk, in
    order; entry[c] .. ends[c]: what is left of a column's weights; kind: (has residual, prefetch)."""
    for k in range(rows.size):
        row, acc = rows[k], k
        if flags[k] & 1 == 0:
            at = asm.vector(code, at, asm.LOAD, acc, _NONE, asm.RSI, row * _BYTES)
            continue
        if bias.size:
            at, displacement = _weight(code, at, stream, start, state, bias[row])
            at = asm.scalar(code, at, asm.BROADCAST, acc, _NONE, asm.RAX, displacement)
        else:
            at = asm.registers(code, at, asm.XOR, acc, acc, acc)
        if kind[0]:
            at = asm.vector(code, at, asm.ADD, acc, acc, asm.R8, row * _BYTES)
    last_row = rows[-1]
    state[2] = _UNSET
    i, n = 0, columns.size
    while i < n:
        held = 0  # columns loaded and not yet used, up to two
        begin = i
        while i < n and held < 2:
            c = columns[i]
            if entry[c] < ends[c] and entry_row[entry[c]] <= last_row:
                at = _emit_column(code, at, state, offsets[c], X0 - held)
                held += 1
            i += 1
        held = 0
        for j in range(begin, i):
            c = columns[j]
            e, end = entry[c], ends[c]
            if e < end and entry_row[e] <= last_row:
                k = 0
                while e < end and entry_row[e] <= last_row:
                    while rows[k] != entry_row[e]:
                        k += 1
                    at, displacement = _weight(code, at, stream, start, state, entry_value[e])
                    at = asm.scalar(code, at, asm.FMA231, k, X0 - held, asm.RAX, displacement)
                    if kind[1]:
                        at = _emit_prefetch(code, at, start, state, displacement)
                    e += 1
                entry[c] = e
                held += 1
    if activation.shape[0]:
        at = emit_bounds(code, at)
    for k in range(rows.size):
        if flags[k] & 2:
            at = emit_activation(code, at, k, activation)
        at = asm.vector(code, at, asm.STORE, k, _NONE, asm.RSI, rows[k] * _BYTES)
    return at


@jit
def _cut(count, taps, blocks, loads, code_bytes, reads, chunk_of):
    """Chunk of each channel, so that chunks are alike in code bytes; returns their number.

    count: kept weights per column (channel, tap); loads: of vectors of X by all blocks; code_bytes, reads: of a chunk, the
    latter vectors of X per block."""
    total = 0
    for c in range(count.size):
        total += 8 * (count[c] + min(count[c], blocks))
    chunks = max(1, max(-(-total // code_bytes), (2 * loads + blocks * reads) // (2 * blocks * reads)))
    done = 0
    for channel in range(count.size // taps):
        size = 0
        for c in range(channel * taps, (channel + 1) * taps):
            size += 8 * (count[c] + min(count[c], blocks))
        chunk_of[channel] = min(chunks - 1, (2 * done + size) * chunks // max(1, 2 * total))
        done += size
    return chunks


@jit
def emit(
    indptr, indices, values, bias, offsets, order, ranges, shape, budget, steps, activation, kind, code, stream, table
):
    """Write the functions of a layer.

    Args:
        indptr, indices, values: of the CSR weight.
        bias: float32[rows], or empty for none.
        offsets: int64[groups * columns], bytes from the X tile to each column's vector.
        order: int64[groups * columns], the columns in ascending order of their offsets.
        ranges: int64[n + 1], rows at which the ranges begin; a range has whole groups or lies within one.
        shape: int64 (groups, taps, rows at once).
        budget: int64 (code bytes, vectors of Y and of X a row block touches) of a function, roughly.
        steps: int64, bytes to the next tile of X, Y and the residual.
        activation: int64[instructions, 4], see `emitter_activations.activation_table`.
        kind: int64 (has residual, prefetch).
        code: uint8, room for all code.
        stream: float32, room for the weights.
        table: int64[room, 3], gets (range, first byte in code, first float in stream) of each function.

    Returns:
        Numbers of functions, bytes and floats.
    """
    rows_per_group, cols, taps = (indptr.size - 1) // shape[0], offsets.size // shape[0], shape[1]
    count, entry, ends = (
        np.zeros(offsets.size, np.int64),
        np.zeros(offsets.size, np.int64),
        np.zeros(offsets.size, np.int64),
    )
    seen, chunk_of, visit = (
        np.empty(offsets.size, np.int64),
        np.zeros(offsets.size // taps, np.int64),
        np.zeros(offsets.size, np.int64),
    )
    state = np.zeros(4, np.int64)
    at, functions = 0, 0
    for r in range(ranges.size - 1):
        first, last = ranges[r], ranges[r + 1]
        low, high = first // rows_per_group * cols, -(-last // rows_per_group) * cols
        n_rows, nnz = last - first, indptr[last] - indptr[first]
        blocks, loads = -(-n_rows // shape[2]), 0
        for c in range(low, high):
            count[c], seen[c] = 0, -1
        for row in range(first, last):
            base, block = row // rows_per_group * cols, (row - first) * blocks // n_rows
            for e in range(indptr[row], indptr[row + 1]):
                c = base + indices[e]
                count[c] += 1
                loads += seen[c] != block
                seen[c] = block
        reads = max(1, max(budget[1] // 4, budget[1] - n_rows))
        chunks = _cut(count[low:high], taps, blocks, loads, budget[0], reads, chunk_of[low // taps : high // taps])
        # columns by chunk, then offset
        heads = np.zeros(chunks + 1, np.int64)
        for c in range(low, high):
            heads[chunk_of[c // taps] + 1] += count[c] > 0
        for k in range(chunks):
            heads[k + 1] += heads[k]
        fill = heads[:-1].copy()
        for i in range(order.size):
            c = order[i]
            if low <= c < high and count[c]:
                visit[fill[chunk_of[c // taps]]] = c
                fill[chunk_of[c // taps]] += 1
        # weights by column in that order, then row
        entry_row, entry_value = np.empty(nnz, np.int64), np.empty(nnz, np.float32)
        total = 0
        for i in range(heads[chunks]):
            c = visit[i]
            entry[c], ends[c] = total, total
            total += count[c]
        for row in range(first, last):
            base = row // rows_per_group * cols
            for e in range(indptr[row], indptr[row + 1]):
                c = base + indices[e]
                entry_row[ends[c]], entry_value[ends[c]] = row, values[e]
                ends[c] += 1
        left = np.empty(n_rows, np.int64)
        for row in range(first, last):
            left[row - first] = indptr[row + 1] - indptr[row]
        begun = np.zeros(n_rows, np.bool_)
        rows, flags = np.empty(n_rows, np.int64), np.empty(n_rows, np.int64)
        for chunk in range(chunks):
            columns = visit[heads[chunk] : heads[chunk + 1]]
            here = np.zeros(n_rows, np.int64)
            if columns.size:
                for e in range(entry[columns[0]], ends[columns[-1]]):
                    here[entry_row[e] - first] += 1
            active = 0
            for k in range(n_rows):
                if here[k] or (chunk == 0 and left[k] == 0):
                    left[k] -= here[k]
                    rows[active], flags[active] = first + k, (not begun[k]) + 2 * (left[k] == 0)
                    begun[k] = True
                    active += 1
            if active == 0:
                continue
            at = -(-at // _BYTES) * _BYTES
            start = -(-state[0] // 16) * 16
            table[functions, 0], table[functions, 1], table[functions, 2] = r, at, start
            functions += 1
            for k in range(CONSTANTS.size):
                stream[start + k] = CONSTANTS[k]
            state[0], top = start + N_CONSTANTS, at
            n_blocks = -(-active // shape[2])
            state[1] = _UNSET
            for b in range(n_blocks):
                x, z = b * active // n_blocks, (b + 1) * active // n_blocks
                at = _emit_block(
                    code, at, stream, start, state, rows[x:z], flags[x:z], columns, offsets, entry, ends, entry_row,
                    entry_value, bias, activation, kind,
                )  # fmt: skip
            at = asm.add_immediate(code, at, asm.RDI, steps[0])
            at = asm.add_immediate(code, at, asm.RSI, steps[1])
            if kind[0]:
                at = asm.add_immediate(code, at, asm.R8, steps[2])
            at = asm.decrement(code, at, asm.RCX)
            at = asm.jump_back(code, at, top)
            at = asm.return_(code, at)
    return functions, at, state[0]
