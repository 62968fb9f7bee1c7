"""Vectors of 16 floats as 4 quarters of 4: pieces of 16 bytes put together, taken apart and transposed, for Numba code.

As in `ops.kernels.vector`, these exist inside compiled functions only. Start with `transposed`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ops.kernels.vector import LANES, intrinsic, jit, vec

__all__ = ["PIECE", "load_quarters", "store_quarters", "transposed"]

PIECE = 4  # floats of a quarter

_QUARTER = ir.VectorType(ir.FloatType(), PIECE)


def _order(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


def _joined(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors end to end."""
    return builder.shuffle_vector(low, high, _order(list(range(2 * low.type.count))))


@intrinsic
def load_quarters(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """4 floats from each of 4 addresses (multiples of 4), end to end."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q = [builder.load(builder.inttoptr(at, _QUARTER.as_pointer()), align=4) for at in args]
        return _joined(builder, _joined(builder, q[0], q[1]), _joined(builder, q[2], q[3]))

    return vec(types.int64, types.int64, types.int64, types.int64), code


@intrinsic
def store_quarters(typingctx: Any, value: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Write the 4 quarters of a vector to 4 addresses (multiples of 4), the last one first."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i in reversed(range(LANES // PIECE)):
            quarter = builder.shuffle_vector(args[0], args[0], _order(list(range(PIECE * i, PIECE * i + PIECE))))
            builder.store(quarter, builder.inttoptr(args[1 + i], _QUARTER.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(vec, types.int64, types.int64, types.int64, types.int64), code


def _shuffle(places: list[int]) -> Any:
    """Within every quarter, 4 of its 8 floats in the two arguments; 4 and up are of the second."""
    order = [p % PIECE + PIECE * i + (LANES if p >= PIECE else 0) for i in range(LANES // PIECE) for p in places]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.shuffle_vector(args[0], args[1], _order(order))

    return vec(vec, vec), code


@intrinsic
def mixed_low(typingctx: Any, a: Any, b: Any) -> Any:
    """a0 b0 a1 b1 of every quarter."""
    return _shuffle([0, 4, 1, 5])


@intrinsic
def mixed_high(typingctx: Any, a: Any, b: Any) -> Any:
    """a2 b2 a3 b3 of every quarter."""
    return _shuffle([2, 6, 3, 7])


@intrinsic
def halves_low(typingctx: Any, a: Any, b: Any) -> Any:
    """a0 a1 b0 b1 of every quarter."""
    return _shuffle([0, 1, 4, 5])


@intrinsic
def halves_high(typingctx: Any, a: Any, b: Any) -> Any:
    """a2 a3 b2 b3 of every quarter."""
    return _shuffle([2, 3, 6, 7])


@jit
def transposed(a, b, c, d):
    """Each quarter of 4 vectors as a 4 x 4 matrix, transposed."""
    ab, cd, ef, gh = mixed_low(a, b), mixed_low(c, d), mixed_high(a, b), mixed_high(c, d)
    return halves_low(ab, cd), halves_high(ab, cd), halves_low(ef, gh), halves_high(ef, gh)
