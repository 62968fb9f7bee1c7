"""Atomic numbers, pauses and the floating-point mode, for code that several threads run: Numba intrinsics."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import types

from ops.kernels.vector import intrinsic

__all__ = [
    "X86",
    "atomic_add",
    "atomic_read",
    "atomic_write",
    "flush_subnormals",
    "pause",
    "restore_mode",
    "yield_core",
]

X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
_NUMBER, _INT = ir.IntType(64), ir.IntType(32)
FLUSH = 0x8040  # of MXCSR: results that are subnormal become 0, and so do operands


def _declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


@intrinsic
def atomic_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address; returns what was there before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _NUMBER.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def atomic_read(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, as other threads wrote it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _NUMBER.as_pointer()), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def atomic_write(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64 so that whoever reads it also sees everything written before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _NUMBER.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if X86:
            builder.call(_declared(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def yield_core(typingctx: Any) -> Any:
    """Let another thread have the core."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_declared(builder, "sched_yield", _INT, []), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def flush_subnormals(typingctx: Any) -> Any:
    """Treat subnormal numbers as 0 from now on in this thread (they can be 20 times slower); returns the mode before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not X86:
            return ir.Constant(_INT, 0)
        room = builder.alloca(_INT)
        place = builder.bitcast(room, ir.IntType(8).as_pointer())
        pointer = [ir.IntType(8).as_pointer()]
        builder.call(_declared(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), pointer), [place])
        before = builder.load(room)
        builder.store(builder.or_(before, ir.Constant(_INT, FLUSH)), room)
        builder.call(_declared(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer), [place])
        return before

    return types.int32(), code


@intrinsic
def restore_mode(typingctx: Any, mode: Any) -> Any:
    """Put back what `flush_subnormals` returned."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if X86:
            room = builder.alloca(_INT)
            builder.store(args[0], room)
            place = builder.bitcast(room, ir.IntType(8).as_pointer())
            pointer = [ir.IntType(8).as_pointer()]
            builder.call(_declared(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer), [place])
        return context.get_dummy_value()

    return types.void(types.int32), code
