"""Vectors of 16 floats for Numba code, and the few operations on them the kernels are written in.

A `Vec` is one LLVM value `<16 x float>`: a zmm register with AVX-512, two ymm with AVX2, whatever LLVM makes of it elsewhere.
LLVM keeps local variables of this type in registers, so register tiles are written as plain local variables. Addresses are
int64 byte addresses; nothing is checked, so the callers own the bounds.

These are Numba intrinsics: they exist inside `numba.njit` functions only. Start with `load`, `fma` and `store`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba.core import types

import ops.kernels.isa  # noqa: F401  (decides what Numba compiles for, before anything is compiled)
from ops.kernels.lanes import LANES

__all__ = [
    "LANES",
    "Kernel",
    "add",
    "call_kernel",
    "divide",
    "floor",
    "fma",
    "jit",
    "keep",
    "kernel",
    "larger",
    "load",
    "load_any",
    "multiply",
    "power_of_two",
    "read_f32",
    "read_i32",
    "read_i64",
    "smaller",
    "splat",
    "splat_at",
    "store",
    "store_any",
    "subtract",
    "sum_lanes",
    "vec",
    "write_f32",
    "write_i64",
    "zero",
]

intrinsic: Any = extending.intrinsic  # typed as if its first argument were the caller's
models: Any = extending.models
njit: Any = numba.njit

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_MASK = ir.VectorType(_INT, LANES)


class VecType(types.Type):
    """Numba's type of a vector of 16 float32."""

    def __init__(self) -> None:
        super().__init__(name="Vec16f")


vec = VecType()


@extending.register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


_OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}


def jit(function: Callable[..., Any]) -> Any:
    """numba.njit for building blocks of kernels, which LLVM inlines; compiled at the first call, cached on disk where possible."""
    try:
        return njit(cache=True, nogil=True, **_OPTIONS)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return njit(nogil=True, **_OPTIONS)(function)


class Kernel:
    """A function `(descriptor, thread, threads)` that becomes a C function of (int64 *, int64, int64) when it is first needed;
    `descriptor` is indexed like an array. Use as a decorator."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._compiled: Any = None

    @property
    def address(self) -> int:
        """Where the compiled function is. The first time it is compiled, or loaded from Numba's on-disk cache."""
        with self._lock:
            if self._compiled is None:
                signature = types.void(types.CPointer(types.int64), types.int64, types.int64)
                try:
                    self._compiled = numba.cfunc(signature, cache=True, **_OPTIONS)(self.function)
                except RuntimeError:
                    self._compiled = numba.cfunc(signature, **_OPTIONS)(self.function)
            return int(self._compiled.address)


kernel = Kernel


def _pointer(builder: Any, address: Any, to: Any) -> Any:
    return builder.inttoptr(address, to.as_pointer())


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The 16 floats at an address that is a multiple of 64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _VECTOR), align=64)

    return vec(types.int64), code


@intrinsic
def load_any(typingctx: Any, address: Any) -> Any:
    """The 16 floats at any address that is a multiple of 4."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _VECTOR), align=4)

    return vec(types.int64), code


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 floats to an address that is a multiple of 64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _VECTOR), align=64)
        return context.get_dummy_value()

    return types.void(types.int64, vec), code


@intrinsic
def store_any(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 floats to any address that is a multiple of 4."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vec), code


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_MASK, [0] * LANES))


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """A float32 in all lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return vec(types.float32), code


@intrinsic
def splat_at(typingctx: Any, address: Any) -> Any:
    """The float32 at an address in all lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, builder.load(_pointer(builder, args[0], _FLOAT), align=4))

    return vec(types.int64), code


@intrinsic
def zero(typingctx: Any) -> Any:
    """0 in all lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_VECTOR, [0.0] * LANES)

    return vec(), code


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c with one rounding."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        function = builder.module.globals.get("llvm.fma.v16f32") or ir.Function(builder.module, kind, "llvm.fma.v16f32")
        return builder.call(function, args)

    return vec(vec, vec, vec), code


def _binary(name: str) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, name)(args[0], args[1])

    return vec(vec, vec), code


@intrinsic
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return _binary("fadd")


@intrinsic
def subtract(typingctx: Any, a: Any, b: Any) -> Any:
    """a - b."""
    return _binary("fsub")


@intrinsic
def multiply(typingctx: Any, a: Any, b: Any) -> Any:
    """a · b."""
    return _binary("fmul")


@intrinsic
def divide(typingctx: Any, a: Any, b: Any) -> Any:
    """a / b."""
    return _binary("fdiv")


def _choose(comparison: str) -> Any:
    """b where `a <comparison> b` holds, else a: one x86 instruction, and a NaN in a stays."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # "bound < value ? bound : value" with the value second is exactly what minps and maxps compute
        return builder.select(builder.fcmp_ordered(comparison, args[1], args[0]), args[1], args[0])

    return vec(vec, vec), code


@intrinsic
def larger(typingctx: Any, a: Any, bound: Any) -> Any:
    """max(a, bound) per lane; NaN in a stays NaN."""
    return _choose(">")


@intrinsic
def smaller(typingctx: Any, a: Any, bound: Any) -> Any:
    """min(a, bound) per lane; NaN in a stays NaN."""
    return _choose("<")


def _unary(name: str) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        known = builder.module.globals.get(name)
        return builder.call(known or ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), name), args)

    return vec(vec), code


@intrinsic
def floor(typingctx: Any, a: Any) -> Any:
    """The largest whole number not above a."""
    return _unary("llvm.floor.v16f32")


@intrinsic
def power_of_two(typingctx: Any, n: Any) -> Any:
    """2^n for whole n in [-126, 127]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _MASK), ir.Constant(_MASK, [127] * LANES))
        return builder.bitcast(builder.shl(biased, ir.Constant(_MASK, [23] * LANES)), _VECTOR)

    return vec(vec), code


@intrinsic
def keep(typingctx: Any, value: Any, mask: Any) -> Any:
    """The lanes whose int32 at the address `mask` (a multiple of 64) is -1, bit by bit; 0 where it is 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.load(_pointer(builder, args[1], _MASK), align=64)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], _MASK), bits), _VECTOR)

    return vec(vec, types.int64), code


@intrinsic
def sum_lanes(typingctx: Any, value: Any) -> Any:
    """The sum of the 16 lanes, pairwise."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, width = args[0], LANES
        while width > 1:
            width //= 2
            low, high = [ir.Constant(ir.VectorType(_INT, width), list(range(k, k + width))) for k in (0, width)]
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        return builder.extract_element(total, ir.Constant(_INT, 0))

    return types.float32(vec), code


def _reader(kind: Any, to: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], kind), align=4)

    return to(types.int64), code


@intrinsic
def read_f32(typingctx: Any, address: Any) -> Any:
    """The float32 at an address."""
    return _reader(_FLOAT, types.float32)


@intrinsic
def read_i32(typingctx: Any, address: Any) -> Any:
    """The int32 at an address."""
    return _reader(_INT, types.int32)


@intrinsic
def read_i64(typingctx: Any, address: Any) -> Any:
    """The int64 at an address."""
    return _reader(ir.IntType(64), types.int64)


@intrinsic
def write_f32(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), code


@intrinsic
def write_i64(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _pointer(builder, args[0], ir.IntType(64)), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def call_kernel(typingctx: Any, address: Any, descriptor: Any, thread: Any, threads: Any) -> Any:
    """Call a compiled kernel: `void(int64 *descriptor, int64 thread, int64 threads)` at `address`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [number.as_pointer(), number, number])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(args[1], number.as_pointer()), args[2], args[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code
