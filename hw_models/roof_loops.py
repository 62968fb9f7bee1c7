"""Two loops in machine code: one of nothing but multiply-adds, one of nothing but loads. See `hw_models.roofs`.

Written as LLVM code and compiled for this machine by llvmlite. Start with `peak_loop` and `read_loop`; both raise ImportError where
there is no llvmlite.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = ["READ_UNROLL", "peak_loop", "read_loop", "shape"]

READ_UNROLL = 8  # vectors in a chunk


def peak_loop() -> Any:
    """float peak(int64 rounds, float x): see `_peak_source`; two flops x lanes x accumulators each round."""
    return _compiled("peak", _peak_source(*shape()), ctypes.c_int64, ctypes.c_float)


def read_loop() -> Any:
    """float read(void *p, int64 chunks): see `_read_source`; a chunk is `READ_UNROLL` vectors, p is aligned to a vector."""
    return _compiled("read", _read_source(shape()[0]), ctypes.c_void_p, ctypes.c_int64)


def shape() -> tuple[int, int]:
    """Lanes of the widest vector and accumulators that fill the pipelines within the registers there are."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 24
    return (8, 12) if features.get("avx2") else (4, 12)


_KEEP: list[Any] = []  # code lives as long as its engine


@functools.cache
def _compiled(name: str, source: str, *arguments: Any) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), machine)
    engine.finalize_object()
    _KEEP.append(engine)
    return ctypes.CFUNCTYPE(ctypes.c_float, *arguments)(engine.get_function_address(name))


def _peak_source(lanes: int, accumulators: int) -> str:
    """float peak(int64 rounds, float x): acc = acc * x + x in every accumulator, `rounds` times; their sum's first lane."""
    v = f"<{lanes} x float>"
    fma = f"llvm.fma.v{lanes}f32"
    count = range(accumulators)
    lines = [
        f"declare {v} @{fma}({v}, {v}, {v})",
        'define float @peak(i64 %n, float %x) "prefer-vector-width"="512" {',
        "entry:",
        f"  %one = insertelement {v} undef, float %x, i32 0",
        f"  %z0 = shufflevector {v} %one, {v} undef, <{lanes} x i32> zeroinitializer",
        # Different starts, or LLVM sees that all accumulators are the same.
        *[f"  %z{k} = fadd {v} %z{k - 1}, %z0" for k in count[1:]],
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%i1, %loop]",
        *[f"  %a{k} = phi {v} [%z{k}, %entry], [%b{k}, %loop]" for k in count],
        *[f"  %b{k} = call {v} @{fma}({v} %a{k}, {v} %z0, {v} %z0)" for k in count],
        *_end_of_loop(v, accumulators),
    ]
    return "\n".join(lines)


def _read_source(lanes: int) -> str:
    """float read(float *p, int64 chunks): every accumulator adds a vector of each chunk of `READ_UNROLL` vectors; their sum."""
    v = f"<{lanes} x float>"
    count = range(READ_UNROLL)
    lines = [
        'define float @read(ptr %p, i64 %n) "prefer-vector-width"="512" {',
        "entry:",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%i1, %loop]",
        *[f"  %a{k} = phi {v} [zeroinitializer, %entry], [%b{k}, %loop]" for k in count],
        f"  %first = mul i64 %i, {READ_UNROLL}",
        *[f"  %at{k} = add i64 %first, {k}" for k in count],
        *[f"  %q{k} = getelementptr {v}, ptr %p, i64 %at{k}" for k in count],
        *[f"  %x{k} = load {v}, ptr %q{k}, align 64" for k in count],
        *[f"  %b{k} = fadd {v} %a{k}, %x{k}" for k in count],
        *_end_of_loop(v, READ_UNROLL),
    ]
    return "\n".join(lines)


def _end_of_loop(v: str, accumulators: int) -> list[str]:
    """Count to n; return the first lane of the sum of the accumulators b0, b1, ..., so that none can be left out."""
    lines = [
        "  %i1 = add i64 %i, 1",
        "  %more = icmp slt i64 %i1, %n",
        "  br i1 %more, label %loop, label %done",
        "done:",
    ]
    total = "%b0"
    for k in range(1, accumulators):
        lines.append(f"  %s{k} = fadd {v} {total}, %b{k}")
        total = f"%s{k}"
    return [*lines, f"  %r = extractelement {v} {total}, i32 0", "  ret float %r", "}"]
