"""Run a list of kernel steps, one after another, on one thread or several: `Program`.

The whole list is executed inside one compiled function, so that a step costs nanoseconds of calling, not microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ops.kernels.crew import crew, run_alone
from ops.kernels.step import KernelStep

__all__ = ["Program", "run_step"]


class Program:
    """Bound steps; calling it runs them in order.

    Args:
        steps: prepared kernels, with the descriptor each was bound to.
        threads: that share the work of every step.
    """

    def __init__(self, steps: Sequence[tuple[KernelStep, npt.NDArray[np.int64]]], threads: int = 1) -> None:
        self._steps = list(steps)  # keeps weights and descriptors alive
        pairs = [(step.address, descriptor.ctypes.data) for step, descriptor in self._steps]
        self._program = np.array(pairs, np.int64).reshape(-1)
        self._threads = threads

    def __call__(self) -> None:
        if self._threads == 1:
            run_alone(self._program, 0, 1)
        else:
            crew(self._threads).run(self._program)  # asked for anew: a forked child has to make its own


def run_step(
    step: KernelStep, inputs: Sequence[npt.NDArray[np.float32]], output: npt.NDArray[np.float32], threads: int = 1
) -> None:
    """Run one step on arrays (flat or not, 64-byte aligned where the kernel wants vectors): for tests and benchmarks.

    The shares of `threads` threads are run one after another on the calling thread.
    """
    scratch = np.zeros(step.scratch + 16, np.float32)
    room = scratch.ctypes.data + -scratch.ctypes.data % 64
    descriptor = step.bind([a.ctypes.data for a in inputs], output.ctypes.data, room)
    pair = np.array([step.address, descriptor.ctypes.data], np.int64)
    for thread in range(threads):
        run_alone(pair, thread, threads)
