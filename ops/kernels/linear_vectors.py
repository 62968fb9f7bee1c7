"""Vector operations only the linear kernels need: 8 lanes, transposition, parts of vectors, table lookup in registers.

As `ops.kernels.vector`: Numba intrinsics on int64 byte addresses, unchecked. `Vec8` is `<8 x float>`, a ymm register where there
is one. `look_up_32` and `look_up_64` need AVX-512 and must not be compiled elsewhere (`ops.kernels.isa`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import types

from ops.kernels.vector import LANES, intrinsic, vec

__all__ = [
    "add8",
    "fma8",
    "load8",
    "load_first",
    "look_up_32",
    "look_up_64",
    "read_u16",
    "splat8_at",
    "store8",
    "store_first",
    "transpose8",
    "vec8",
    "zero8",
]

models: Any = extending.models

_FLOAT, _BIT, _BYTE, _SHORT, _INT = ir.FloatType(), ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_EIGHT, _VECTOR = ir.VectorType(_FLOAT, 8), ir.VectorType(_FLOAT, LANES)
_BITS, _BYTES, _INTS = (ir.VectorType(kind, LANES) for kind in (_BIT, _BYTE, _INT))


class Vec8Type(types.Type):
    """Numba's type of a vector of 8 float32."""

    def __init__(self) -> None:
        super().__init__(name="Vec8f")


vec8 = Vec8Type()


@extending.register_model(Vec8Type)
class _Vec8Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _EIGHT)


def _pointer(builder: Any, address: Any, to: Any) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic
def load8(typingctx: Any, address: Any) -> Any:
    """The 8 floats at an address that is a multiple of 32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _EIGHT), align=32)

    return vec8(types.int64), code


@intrinsic
def store8(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 8 floats to an address that is a multiple of 32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _EIGHT), align=32)
        return context.get_dummy_value()

    return types.void(types.int64, vec8), code


@intrinsic
def splat8_at(typingctx: Any, address: Any) -> Any:
    """The float32 at an address in all 8 lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[0], _FLOAT), align=4)
        first = builder.insert_element(ir.Constant(_EIGHT, ir.Undefined), value, ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, 8), [0] * 8))

    return vec8(types.int64), code


@intrinsic
def zero8(typingctx: Any) -> Any:
    """0 in all 8 lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_EIGHT, [0.0] * 8)

    return vec8(), code


@intrinsic
def fma8(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c with one rounding."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_function(builder, "llvm.fma.v8f32", _EIGHT, [_EIGHT] * 3), args)

    return vec8(vec8, vec8, vec8), code


@intrinsic
def add8(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1])

    return vec8(vec8, vec8), code


@intrinsic
def read_u16(typingctx: Any, address: Any) -> Any:
    """The uint16 at an address, as int64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(_pointer(builder, args[0], _SHORT), align=2), ir.IntType(64))

    return types.int64(types.int64), code


def _first_lanes(builder: Any, count: Any) -> Any:
    """<16 x i1>: lane < count."""
    lane = ir.Constant(_INTS, list(range(LANES)))
    wanted = builder.insert_element(ir.Constant(_INTS, ir.Undefined), builder.trunc(count, _INT), ir.Constant(_INT, 0))
    wanted = builder.shuffle_vector(wanted, wanted, ir.Constant(_INTS, [0] * LANES))
    return builder.icmp_signed("<", lane, wanted)


@intrinsic
def load_first(typingctx: Any, address: Any, count: Any) -> Any:
    """The first `count` of the 16 floats at an address that is a multiple of 4, 0 in the other lanes; nothing else is read."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _VECTOR.as_pointer()
        function = _function(builder, "llvm.masked.load.v16f32.p0", _VECTOR, [pointer, _INT, _BITS, _VECTOR])
        kept, rest = _first_lanes(builder, args[1]), ir.Constant(_VECTOR, [0.0] * LANES)
        return builder.call(function, [_pointer(builder, args[0], _VECTOR), ir.Constant(_INT, 4), kept, rest])

    return vec(types.int64, types.int64), code


@intrinsic
def store_first(typingctx: Any, address: Any, value: Any, count: Any) -> Any:
    """Write the first `count` lanes to an address that is a multiple of 4."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _VECTOR.as_pointer()
        function = _function(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), [_VECTOR, pointer, _INT, _BITS])
        at, kept = _pointer(builder, args[0], _VECTOR), _first_lanes(builder, args[2])
        builder.call(function, [args[1], at, ir.Constant(_INT, 4), kept])
        return context.get_dummy_value()

    return types.void(types.int64, vec, types.int64), code


def _pairs(builder: Any, rows: list[Any], apart: int, low: list[int], high: list[int]) -> list[Any]:
    """Rows i and i + apart replaced by the two shuffles of both."""
    masks = [ir.Constant(ir.VectorType(_INT, 8), mask) for mask in (low, high)]
    done = list(rows)
    for i in range(8):
        if not i & apart:
            done[i], done[i + apart] = (builder.shuffle_vector(rows[i], rows[i + apart], mask) for mask in masks)
    return done


@intrinsic
def transpose8(typingctx: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """target[j, i] = source[i, j] for 8 x 8 floats; steps in bytes from row to row, all multiples of 4."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, at = [], args[0]
        for _ in range(8):
            rows.append(builder.load(_pointer(builder, at, _EIGHT), align=4))
            at = builder.add(at, args[1])
        rows = _pairs(builder, rows, 1, [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15])
        rows = _pairs(builder, rows, 2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
        rows = _pairs(builder, rows, 4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
        at = args[2]
        for i in (0, 2, 1, 3, 4, 6, 5, 7):  # where the two unpacking stages leave the columns
            builder.store(rows[i], _pointer(builder, at, _EIGHT), align=4)
            at = builder.add(at, args[3])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code


def _indices(builder: Any, address: Any) -> tuple[Any, Any]:
    """16 bytes as <16 x i32>, and which of them have their highest bit set."""
    packed = builder.load(_pointer(builder, address, _BYTES), align=16)
    return builder.zext(packed, _INTS), builder.icmp_signed("<", packed, ir.Constant(_BYTES, [0] * LANES))


def _table(builder: Any, low: Any, index: Any, high: Any) -> Any:
    """Lane-wise table[index mod 32] of the 32 floats low, high (vpermi2ps)."""
    name = "llvm.x86.avx512.vpermi2var.ps.512"
    return builder.call(_function(builder, name, _VECTOR, [_VECTOR, _INTS, _VECTOR]), [low, index, high])


@intrinsic
def look_up_32(typingctx: Any, a: Any, b: Any, indices: Any) -> Any:
    """The elements of (a, b) that the low 5 bits of the 16 bytes at `indices` (a multiple of 16) name; 0 where a byte is 0,
    whatever (a, b) hold. A byte that names something has its highest bit set. AVX-512."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, kept = _indices(builder, args[2])
        return builder.select(kept, _table(builder, args[0], index, args[1]), ir.Constant(_VECTOR, [0.0] * LANES))

    return vec(vec, vec, types.int64), code


@intrinsic
def look_up_64(typingctx: Any, a: Any, b: Any, c: Any, d: Any, indices: Any) -> Any:
    """The elements of (a, b, c, d) that the low 6 bits of the 16 bytes at `indices` (a multiple of 16) name; 0 where a byte is
    0, whatever (a, b) hold. AVX-512."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, kept = _indices(builder, args[4])
        bit = builder.and_(index, ir.Constant(_INTS, [32] * LANES))
        upper = builder.icmp_signed("!=", bit, ir.Constant(_INTS, [0] * LANES))
        low, high = _table(builder, args[0], index, args[1]), _table(builder, args[2], index, args[3])
        return builder.select(upper, high, builder.select(kept, low, ir.Constant(_VECTOR, [0.0] * LANES)))

    return vec(vec, vec, vec, vec, types.int64), code
