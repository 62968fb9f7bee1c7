"""This machine's peak: fused multiply-adds per second of one core, by a loop of nothing else.

Twelve or more independent accumulators of the widest vector, written as LLVM code and compiled by llvmlite, which Numba brings.
Start with `fma_peak_gflops`.
"""

from __future__ import annotations

import ctypes
import functools

import llvmlite.binding as llvm

from benchmarks.kernels.clock import InProcess, Settings

__all__ = ["fma_peak_gflops"]

ROUNDS = 200  # iterations of the loop per call


@functools.cache
def fma_peak_gflops() -> float:
    """GFLOP/s (1e9 per second; a multiply-add is two) of one core, best of a few bursts; takes about 0.1 s."""
    features = llvm.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
    accumulators = 24 if lanes == 16 else 12
    call = _compiled(lanes, accumulators)
    timed = InProcess(lambda: call(ROUNDS, 1.0))
    settings = Settings(burst_ms=5.0, warm_ms=5.0, percentile=5.0)
    timed.burst(settings)
    seconds = min(timed.burst(settings) for _ in range(4))
    # The cost of the call itself, some 0.5 us, goes out with a call of one iteration.
    empty = InProcess(lambda: call(1, 1.0))
    empty.burst(settings)
    seconds -= min(empty.burst(settings) for _ in range(2))
    return 2.0 * lanes * accumulators * (ROUNDS - 1) / seconds / 1e9


_KEEP: list[llvm.ExecutionEngine] = []  # code lives as long as its engine


def _compiled(lanes: int, accumulators: int) -> ctypes._CFunctionType:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_source(lanes, accumulators)), machine)
    engine.finalize_object()
    _KEEP.append(engine)
    signature = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float)
    return signature(engine.get_function_address("peak"))


def _source(lanes: int, accumulators: int) -> str:
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
        "  %i1 = add i64 %i, 1",
        "  %more = icmp slt i64 %i1, %n",
        "  br i1 %more, label %loop, label %done",
        "done:",
    ]
    total = "%b0"
    for k in count[1:]:
        lines.append(f"  %s{k} = fadd {v} {total}, %b{k}")
        total = f"%s{k}"
    lines += [f"  %r = extractelement {v} {total}, i32 0", "  ret float %r", "}"]
    return "\n".join(lines)
