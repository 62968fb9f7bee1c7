"""Linear layers on single inputs as dot products of floats: portable, and for layers too small or too sparse for anything else.

Eight partial sums per row, so that the additions do not wait for each other. Start with `dot_step`; twin:
`ops.reference.csr_linear`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import activated_one
from ops.kernels.step import KernelStep, aligned
from ops.kernels.vector import kernel, read_f32, read_i32, write_f32

__all__ = ["dot_step"]

# Places in the descriptor.
X, RESIDUAL, OUT, BIAS, STARTS, OFFSETS, VALUES, ROWS, COLS, BATCH, ACTIVATION = range(11)


@kernel
def dot(d, thread, threads):
    """Rows are split evenly; a row meets all inputs of the batch while its weights are near."""
    offsets, values = d[OFFSETS], d[VALUES]
    for i in range(d[ROWS] * thread // threads, d[ROWS] * (thread + 1) // threads):
        begin, end = np.int64(read_i32(d[STARTS] + 4 * i)), np.int64(read_i32(d[STARTS] + 4 * i + 4))
        for n in range(d[BATCH]):
            x = d[X] + 4 * n * d[COLS]
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
            k = begin
            while k + 8 <= end:
                s0 += read_f32(values + 4 * k) * read_f32(x + read_i32(offsets + 4 * k))
                s1 += read_f32(values + 4 * k + 4) * read_f32(x + read_i32(offsets + 4 * k + 4))
                s2 += read_f32(values + 4 * k + 8) * read_f32(x + read_i32(offsets + 4 * k + 8))
                s3 += read_f32(values + 4 * k + 12) * read_f32(x + read_i32(offsets + 4 * k + 12))
                s4 += read_f32(values + 4 * k + 16) * read_f32(x + read_i32(offsets + 4 * k + 16))
                s5 += read_f32(values + 4 * k + 20) * read_f32(x + read_i32(offsets + 4 * k + 20))
                s6 += read_f32(values + 4 * k + 24) * read_f32(x + read_i32(offsets + 4 * k + 24))
                s7 += read_f32(values + 4 * k + 28) * read_f32(x + read_i32(offsets + 4 * k + 28))
                k += 8
            while k < end:
                s0 += read_f32(values + 4 * k) * read_f32(x + read_i32(offsets + 4 * k))
                k += 1
            total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + read_f32(d[BIAS] + 4 * i)
            at = 4 * (n * d[ROWS] + i)
            if d[RESIDUAL] != 0:
                total += read_f32(d[RESIDUAL] + at)
            write_f32(d[OUT] + at, activated_one(total, d[ACTIVATION]))


def dot_step(weight: CSR, batch: int, bias: npt.NDArray[np.float32], activation: int, residual: bool) -> KernelStep:
    """Prepare act(x · weightᵀ + bias + residual), inputs [x, residual]; any shape, the work is proportional to the batch.

    Args:
        weight: [rows, cols].
        batch: inputs of one call; x float32[batch, cols], output and residual float32[batch, rows].
        bias: float32[rows].
        activation: its number.
    """
    rows, cols = weight.shape
    arrays = tuple(aligned(a) for a in (weight.indptr, 4 * weight.indices, weight.values, bias))
    template = np.zeros(11, np.int64)
    template[[STARTS, OFFSETS, VALUES, BIAS]] = [a.ctypes.data for a in arrays]
    template[[ROWS, COLS, BATCH, ACTIVATION]] = rows, cols, batch, activation
    return KernelStep(dot.address, template, (X, RESIDUAL) if residual else (X,), OUT, arrays=arrays)
