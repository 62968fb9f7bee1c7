"""The same list of kernel steps as `ops.kernels.program.Program`, with the clock read after each: `TimedProgram`.

A step is timed in its place: its input was just written by the step before, its weights were last used one network ago. Reading the
clock costs some 20 ns, which is part of the time of each step.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types

from ops.kernels.atomics import flush_subnormals, restore_mode
from ops.kernels.crew import crew
from ops.kernels.step import KernelStep
from ops.kernels.vector import call_kernel, intrinsic, jit

__all__ = ["TimedProgram"]


class TimedProgram:
    """Bound steps; calling it runs them in order and writes what each took.

    Args:
        steps: as for `Program`.
        threads: that share the work of every step. With more than one, the time of a step holds a meeting of the threads.
        out: int64[len(steps)], nanoseconds of each step of the last call.
    """

    def __init__(
        self, steps: Sequence[tuple[KernelStep, npt.NDArray[np.int64]]], threads: int, out: npt.NDArray[np.int64]
    ) -> None:
        self._steps = list(steps)  # keeps weights and descriptors alive
        pairs = [(step.address, descriptor.ctypes.data) for step, descriptor in self._steps]
        self._program = np.array(pairs, np.int64).reshape(-1)
        self._single = [self._program[2 * i : 2 * i + 2] for i in range(len(pairs))]
        self._threads = threads
        self._out = out
        self._stamps = np.zeros(len(pairs) + 1, np.int64)
        self._room = np.zeros(2, np.int64)  # a struct timespec

    def __call__(self) -> None:
        if self._threads == 1:
            _run(self._program, self._stamps, _clock(), self._room.ctypes.data)
            np.subtract(self._stamps[1:], self._stamps[:-1], out=self._out)
            return
        team, now = crew(self._threads), time.perf_counter_ns
        for i, single in enumerate(self._single):
            start = now()
            team.run(single)
            self._out[i] = now() - start


@functools.cache
def _clock() -> int:
    """Address of the C library's `int clock_gettime(clockid_t, struct timespec *)`."""
    function = ctypes.CDLL(None).clock_gettime
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@intrinsic
def _now(typingctx: Any, clock: Any, room: Any) -> Any:
    """Nanoseconds of the monotonic clock."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, small = ir.IntType(64), ir.IntType(32)
        kind = ir.FunctionType(small, [small, number.as_pointer()])
        place = builder.inttoptr(args[1], number.as_pointer())
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [small(time.CLOCK_MONOTONIC), place])
        seconds = builder.load(place)
        nanoseconds = builder.load(builder.gep(place, [number(1)]))
        return builder.add(builder.mul(seconds, number(10**9)), nanoseconds)

    return types.int64(types.int64, types.int64), code


@jit
def _run(program, stamps, clock, room):
    """`ops.kernels.crew.run_alone` for one thread, with the time before the first step and after each."""
    mode = flush_subnormals()
    stamps[0] = _now(clock, room)
    for i in range(program.shape[0] // 2):
        call_kernel(program[2 * i], program[2 * i + 1], 0, 1)
        stamps[i + 1] = _now(clock, room)
    restore_mode(mode)
