"""Linear layers on single inputs, 16 output rows in the lanes, the input looked up in registers (AVX-512).

16 rows form a slice and walk through the input together. A *group* is a window of 32 (or 64) neighbouring inputs, loaded into two
(four) registers, and 3 (2) *steps*; in a step every lane multiplies one of its weights with the input of its own that an index
byte names within the window (`vpermi2ps`), so nothing is gathered from memory. The next window starts at the foremost input
any lane still needs: lanes that are behind hold it back, lanes that are ahead pause. A pausing lane has the index byte and the
weight 0; a working lane's byte has the highest bit set, and by that bit the pausing lanes get 0 instead of an input, so that a
NaN in the window does not reach them. Rows are ordered by their number of weights, so that the lanes of a slice end together.

Bytes per kept weight: 5 / fill + 4 per group; fill is 0.9 at density 0.5, 0.63 at 0.1 (32), 0.67 at 0.05 (64), 0.30 at 0.01.
After table lookup by `vpermi2ps` per fixed block of columns, with sliding windows instead of blocks, which fill better
(0.50 at density 0.1).

Start with `lookup_step`; twin: `ops.reference.csr_linear`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import activated
from ops.kernels.linear_vectors import look_up_32, look_up_64
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import (
    LANES,
    add,
    fma,
    jit,
    kernel,
    load,
    load_any,
    read_f32,
    read_i32,
    store,
    write_f32,
    zero,
)

__all__ = ["lookup_step", "lookup_window"]

# Places in the descriptor.
X, RESIDUAL, OUT, SCRATCH, BIAS, STARTS, WINDOWS, INDICES, VALUES, TARGETS, ROWS, COLS, BATCH, ACTIVATION, GROUPS = (
    range(15)
)
STEPS = {32: 3, 64: 2}  # per group, by inputs of a window
_WORKS = 128  # highest bit of an index byte
# Windows of 64 fill better but cost one lookup more: they pay below a density, a higher one for layers that do not stay in the
# second-level cache. Microseconds of 32 / 64: 1024 -> 1000 at density 0.1 9 / 12, at 0.05 6.4 / 7.1, at 0.02 5.1 / 4.4;
# 4096 -> 4096 at 0.2 775 / 717 from memory and 359 / 364 from the third-level cache, at 0.1 494 / 442 and 196 / 200.
_SPARSE, _SPARSE_OF_MANY, _MANY = 0.04, 0.3, 2**19


@jit
def finish(total, place, residual, out, targets, count, activation):
    """Write act(total + residual) of one slice to where its rows belong. `place`: 16 floats of scratch, `targets`: int32[16],
    bytes from the first output."""
    if residual != 0:
        store(place, total)
        for lane in range(count):
            at = place + 4 * lane
            write_f32(at, read_f32(at) + read_f32(residual + read_i32(targets + 4 * lane)))
        total = load(place)
    store(place, activated(total, activation))
    if count == LANES:  # the usual case, unrolled by LLVM
        for lane in range(LANES):
            write_f32(out + read_i32(targets + 4 * lane), read_f32(place + 4 * lane))
        return
    for lane in range(count):
        write_f32(out + read_i32(targets + 4 * lane), read_f32(place + 4 * lane))


@jit
def mine(d, begin, thread, threads):
    """Is the slice whose first group is `begin` one of this thread's?"""
    first, last = d[GROUPS] * thread // threads, d[GROUPS] * (thread + 1) // threads
    return begin >= first and (begin < last or thread + 1 == threads)


@jit
def slice_32(x, bias, windows, indices, values, begin, end):
    """bias + the weighted sum of 16 rows, groups begin .. end of windows of 32 inputs."""
    a, b, c = load(bias), zero(), zero()
    indices, values = indices + 48 * begin, values + 192 * begin
    for group in range(begin, end):
        at = x + read_i32(windows + 4 * group)
        x0, x1 = load_any(at), load_any(at + 64)
        a = fma(look_up_32(x0, x1, indices), load(values), a)
        b = fma(look_up_32(x0, x1, indices + 16), load(values + 64), b)
        c = fma(look_up_32(x0, x1, indices + 32), load(values + 128), c)
        indices += 48
        values += 192
    return add(a, add(b, c))


@jit
def slice_64(x, bias, windows, indices, values, begin, end):
    """bias + the weighted sum of 16 rows, groups begin .. end of windows of 64 inputs."""
    a, b = load(bias), zero()
    indices, values = indices + 32 * begin, values + 128 * begin
    for group in range(begin, end):
        at = x + read_i32(windows + 4 * group)
        x0, x1, x2, x3 = load_any(at), load_any(at + 64), load_any(at + 128), load_any(at + 192)
        a = fma(look_up_64(x0, x1, x2, x3, indices), load(values), a)
        b = fma(look_up_64(x0, x1, x2, x3, indices + 16), load(values + 64), b)
        indices += 32
        values += 128
    return add(a, b)


@kernel
def lookup_32(d, thread, threads):
    """Windows of 32 inputs."""
    for s in range((d[ROWS] + LANES - 1) // LANES):
        begin, end = np.int64(read_i32(d[STARTS] + 4 * s)), np.int64(read_i32(d[STARTS] + 4 * s + 4))
        if mine(d, begin, thread, threads):
            count = min(np.int64(LANES), d[ROWS] - LANES * s)
            for n in range(d[BATCH]):
                x, shift = d[X] + 4 * n * d[COLS], 4 * n * d[ROWS]
                total = slice_32(x, d[BIAS] + 64 * s, d[WINDOWS], d[INDICES], d[VALUES], begin, end)
                residual = d[RESIDUAL] + shift if d[RESIDUAL] != 0 else np.int64(0)
                targets, place = d[TARGETS] + 64 * s, d[SCRATCH] + 64 * s
                finish(total, place, residual, d[OUT] + shift, targets, count, d[ACTIVATION])


@kernel
def lookup_64(d, thread, threads):
    """Windows of 64 inputs."""
    for s in range((d[ROWS] + LANES - 1) // LANES):
        begin, end = np.int64(read_i32(d[STARTS] + 4 * s)), np.int64(read_i32(d[STARTS] + 4 * s + 4))
        if mine(d, begin, thread, threads):
            count = min(np.int64(LANES), d[ROWS] - LANES * s)
            for n in range(d[BATCH]):
                x, shift = d[X] + 4 * n * d[COLS], 4 * n * d[ROWS]
                total = slice_64(x, d[BIAS] + 64 * s, d[WINDOWS], d[INDICES], d[VALUES], begin, end)
                residual = d[RESIDUAL] + shift if d[RESIDUAL] != 0 else np.int64(0)
                targets, place = d[TARGETS] + 64 * s, d[SCRATCH] + 64 * s
                finish(total, place, residual, d[OUT] + shift, targets, count, d[ACTIVATION])


@jit
def _pack(indptr, columns, weights, order, cols, window, steps, starts, windows, indices, values):
    """Cut the rows in `order` into groups; returns their number. With empty `windows` nothing is written but `starts`.

    starts: int32[slices + 1], first group of each slice; windows: int32[groups], first input in bytes; indices:
    uint8[groups * steps * 16]; values: float32, the same length.
    """
    groups = 0
    at, end = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    for s in range(starts.shape[0] - 1):
        for lane in range(LANES):
            row = order[s * LANES + lane] if s * LANES + lane < order.shape[0] else -1
            at[lane], end[lane] = (indptr[row], indptr[row + 1]) if row >= 0 else (0, 0)
        while True:
            first = cols
            for lane in range(LANES):
                if at[lane] < end[lane]:
                    first = min(first, np.int64(columns[at[lane]]))
            if first == cols:
                break
            first = min(first, cols - window)
            for lane in range(LANES):
                for step in range(steps):
                    if at[lane] < end[lane] and columns[at[lane]] < first + window:
                        if windows.shape[0] > 0:
                            place = (groups * steps + step) * LANES + lane
                            indices[place] = _WORKS + columns[at[lane]] - first
                            values[place] = weights[at[lane]]
                        at[lane] += 1
            if windows.shape[0] > 0:
                windows[groups] = 4 * first
            groups += 1
        starts[s + 1] = groups
    return groups


def lookup_window(weight: CSR) -> int:
    """How many neighbouring inputs a window should have, 32 or 64; 0: fewer inputs than a window, the design is not for it."""
    rows, cols = weight.shape
    if cols < 32:
        return 0
    limit = _SPARSE_OF_MANY if weight.nnz > _MANY else _SPARSE
    return 64 if cols >= 64 and weight.nnz < limit * rows * cols else 32


def lookup_step(
    weight: CSR, batch: int, bias: npt.NDArray[np.float32], activation: int, residual: bool, window: int
) -> KernelStep:
    """Prepare act(x · weightᵀ + bias + residual), inputs [x, residual]; the work is proportional to the batch.

    Args:
        weight: [rows, cols], cols >= window.
        batch: inputs of one call; x float32[batch, cols], output and residual float32[batch, rows].
        bias: float32[rows].
        activation: its number.
        window: 32 or 64, see `lookup_window`.
    """
    rows, cols = weight.shape
    steps, slices = STEPS[window], -(-rows // LANES)
    order = np.argsort(-np.diff(weight.indptr), kind="stable")
    sparse = [np.require(a, t, ["C", "W"]) for a, t in zip((weight.indptr, weight.indices), (np.int32, np.int32))]
    sparse.append(np.require(weight.values, np.float32, ["C", "W"]))
    starts, packed = aligned(np.zeros(slices + 1, np.int32)), _arrays(0, steps)
    groups = _pack(*sparse, order, cols, window, steps, starts, *packed)
    packed = _arrays(groups, steps)
    if groups:
        _pack(*sparse, order, cols, window, steps, starts, *packed)
    by_lane = np.zeros(slices * LANES, np.float32)
    by_lane[:rows] = bias[order]
    targets = np.zeros(slices * LANES, np.int32)
    targets[:rows] = 4 * order
    arrays = (starts, *packed, aligned(by_lane), aligned(targets))
    template = np.zeros(15, np.int64)
    template[[STARTS, WINDOWS, INDICES, VALUES, BIAS, TARGETS]] = [a.ctypes.data for a in arrays]
    template[[ROWS, COLS, BATCH, ACTIVATION, GROUPS]] = rows, cols, batch, activation, groups
    address = (lookup_32 if window == 32 else lookup_64).address
    inputs = (X, RESIDUAL) if residual else (X,)
    return KernelStep(address, template, inputs, OUT, SCRATCH, slices * LANES, arrays)


def _arrays(groups: int, steps: int) -> tuple[npt.NDArray[Any], ...]:
    """windows, indices and values of so many groups, every lane pausing."""
    size = groups * steps * LANES
    kinds = ((groups, np.int32), (size, np.uint8), (size, np.float32))
    return tuple(aligned(np.zeros(n, kind)) for n, kind in kinds)
