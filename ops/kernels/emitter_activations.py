"""The activations as machine code: what the specialised kernels do to a finished accumulator.

Each is a short table of instructions that `emit_activation` writes out for one accumulator after another, with constants that
stand in front of every function's weights. They are, rounding for rounding, `ops.kernels.activations.activated`.

Start with `activation_table`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ops.kernels import assembler as asm
from ops.kernels.vector import jit

__all__ = ["CONSTANTS", "N_CONSTANTS", "X0", "activation_table", "emit_activation", "emit_bounds"]

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # as in ops.kernels.activations
CONSTANTS = np.array(
    [0, 6, 3, 1 / 6, -1, -87, 87, np.log2(np.e), 0.5, -_LN2_HIGH, -_LN2_LOW, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1],
    np.float32,
)
N_CONSTANTS = 32  # floats in front of each function's weights; a multiple of 16
_ZERO, _SIX, _THREE, _SIXTH, _MINUS_ONE, _LOWEST, _HIGHEST, _LOG2_E, _HALF, _HIGH, _LOW, _C6 = range(12)
_ONE = 16
X0, X1, _SPARE = map(np.int64, (31, 30, 29))
_ACC, _CONSTANT = -1, 100  # in a table of instructions: the accumulator; from 100 on, a constant

# What is done to each accumulator, by activation: (operation, register, second, third). `emit_bounds` has put 0 into zmm31 and
# 6 into zmm30; "silu" is x / (1 + e^-x), the exponential as in ops.kernels.activations.
_RELU = [(asm.MAXIMUM, _ACC, X0, _ACC)]
_HARDSWISH = [
    (asm.ADD, X0, _ACC, _CONSTANT + _THREE),
    (asm.MAXIMUM, X0, X0, _CONSTANT + _ZERO),
    (asm.MINIMUM, X0, X0, _CONSTANT + _SIX),
    (asm.MULTIPLY, _ACC, _ACC, X0),
    (asm.MULTIPLY, _ACC, _ACC, _CONSTANT + _SIXTH),
]
_SILU = [
    (asm.MULTIPLY, X0, _ACC, _CONSTANT + _MINUS_ONE),
    (asm.MAXIMUM, X0, X0, _CONSTANT + _LOWEST),
    (asm.MINIMUM, X0, X0, _CONSTANT + _HIGHEST),
    (asm.BROADCAST, X1, 0, _CONSTANT + _LOG2_E),
    (asm.FMA213, X1, X0, _CONSTANT + _HALF),
    (asm.ROUND, X1, 0, X1),
    (asm.FMA231, X0, X1, _CONSTANT + _HIGH),
    (asm.FMA231, X0, X1, _CONSTANT + _LOW),
    (asm.BROADCAST, _SPARE, 0, _CONSTANT + _C6),
    *((asm.FMA213, _SPARE, X0, _CONSTANT + k) for k in (*range(_C6 + 1, _ONE + 1), _ONE)),
    (asm.SCALE, _SPARE, _SPARE, X1),
    (asm.ADD, _SPARE, _SPARE, _CONSTANT + _ONE),
    (asm.DIVIDE, _ACC, _ACC, _SPARE),
]
_INSTRUCTIONS = {
    **{"none": [], "relu": _RELU, "relu6": [*_RELU, (asm.MINIMUM, _ACC, X1, _ACC)]},
    **{"hardswish": _HARDSWISH, "silu": _SILU},
}
_NONE, _SIX_BYTES = map(np.int64, (0, 4 * _SIX))


def activation_table(activation: str) -> npt.NDArray[np.int64]:
    """int64[instructions, 4]: an activation as `emit` wants it."""
    return np.array(_INSTRUCTIONS[activation], np.int64).reshape(-1, 4)


@jit
def emit_activation(code, at, acc, table):
    """The activation of accumulator `acc`."""
    for i in range(table.shape[0]):
        register = acc if table[i, 1] == _ACC else table[i, 1]
        second = acc if table[i, 2] == _ACC else table[i, 2]
        third = acc if table[i, 3] == _ACC else table[i, 3]
        if third >= _CONSTANT:
            at = asm.scalar(code, at, table[i, 0], register, second, asm.RDX, 4 * (third - _CONSTANT))
        else:
            at = asm.registers(code, at, table[i, 0], register, second, third)
    return at


@jit
def emit_bounds(code, at):
    """0 into zmm31 and 6 into zmm30, for the activations that compare with them."""
    at = asm.registers(code, at, asm.XOR, X0, X0, X0)
    return asm.scalar(code, at, asm.BROADCAST, X1, _NONE, asm.RDX, _SIX_BYTES)
