"""Sparse linear layers on the CPU: chooses the design and prepares the step.

x float32[batch, in] and out float32[batch, out] are plain tensors. Three designs, each in a file of its own:

    lookup  16 rows in the lanes, inputs looked up in registers       one input, AVX-512      ops.kernels.linear_lookup
    batch   inputs of the batch in the lanes                          several inputs          ops.kernels.linear_batch
    dot     scalar dot products                                       one input, anywhere     ops.kernels.linear_dot

Start with `linear_step`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ops.formats import CSR
from ops.kernels.activations import ACTIVATIONS
from ops.kernels.isa import isa
from ops.kernels.linear_batch import batch_step, batch_tile
from ops.kernels.linear_dot import dot_step
from ops.kernels.linear_lookup import lookup_step, lookup_window
from ops.kernels.step import KernelStep

__all__ = ["DESIGNS", "linear_step"]

DESIGNS = ("lookup", "batch", "dot")
_CACHED = 2**21  # entries of a layer whose packed windows stay in the second-level cache at any density below 0.01


def linear_step(
    weight: CSR,
    batch: int,
    bias: npt.NDArray[Any] | None = None,
    activation: str = "none",
    residual: bool = False,
    design: str | None = None,
) -> KernelStep:
    """Prepare out = act(x · weightᵀ + bias + residual).

    Args:
        weight: [out, in].
        batch: rows of x.
        bias: float[out] or None.
        activation: one of `ops.kernels.activations.ACTIVATIONS`.
        residual: is there a second input, float32[batch, out], added before the activation?
        design: one of `DESIGNS` instead of the one that should be fastest.

    Returns:
        A step with inputs [x] or [x, residual]; x float32[batch, in], output float32[batch, out], contiguous.

    Raises:
        ValueError: an argument is none of those, or the machine or the layer is not fit for the wanted design.
        FormatError: the weight is damaged.
    """
    if not _is_canonical(weight):
        weight.check()  # says what is wrong
    rows, cols = weight.shape
    if min(rows, cols, batch) < 1:
        raise ValueError(f"a linear layer needs a positive size and batch, got {cols} -> {rows}, batch {batch}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias must have one entry per weight row, float[{rows}], got {bias.dtype}{bias.shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if design not in (None, *DESIGNS):
        raise ValueError(f"design must be one of {', '.join(DESIGNS)} or None, got {design!r}")
    vector = np.zeros(rows, np.float32) if bias is None else np.array(bias, np.float32)
    number, window = ACTIVATIONS[activation], lookup_window(weight)
    if design == "lookup" and (isa() != "avx512" or window == 0):
        raise ValueError(
            f"design 'lookup' needs AVX-512 and at least 32 inputs; this is {isa()} with {cols} inputs: leave design out"
        )
    design = design or _design(weight, batch, window)
    if design == "lookup":
        return lookup_step(weight, batch, vector, number, residual, window)
    if design == "dot":
        return dot_step(weight, batch, vector, number, residual)
    return batch_step(weight, batch, vector, number, residual, batch_tile(batch, rows))


def _is_canonical(weight: CSR) -> bool:
    """`CSR.check` without its loop over the rows: packing must not take longer than that."""
    indptr, columns = weight.indptr, weight.indices
    if indptr.size != weight.shape[0] + 1 or indptr[0] != 0 or not columns.size == weight.values.size == indptr[-1]:
        return False
    if (np.diff(indptr) < 0).any() or (columns.size and (columns.min() < 0 or columns.max() >= weight.shape[1])):
        return False
    rises = np.diff(columns, prepend=-1) > 0
    rises[indptr[:-1][indptr[:-1] < columns.size]] = True
    return bool(rises.all())


def _design(weight: CSR, batch: int, window: int) -> str:
    """The design that should be fastest.

    Measured on one core of a Zen 4, microseconds of lookup / batch: 1024 -> 1000 at density 0.2 15 / 73 per input / up to 8 inputs,
    at 0.1 10 / 38, at 0.05 7 / 22, at 0.02 5 / 13, at 0.01 4 / 8. Lookup / dot for one input: 4096 -> 4096 at 0.01 62 / 69, at
    0.005 52 / 42, while 1024 -> 1000 at 0.005 takes 4 / 5.
    """
    rows, cols = weight.shape
    density = weight.nnz / (rows * cols)
    if batch == 1 and density < 0.006 and rows * cols > _CACHED:
        return "dot"
    singly = 3 if density >= 0.05 else 2 if density >= 0.015 else 1
    if isa() == "avx512" and window and batch <= singly:
        return "lookup"
    return "dot" if batch == 1 else "batch"
