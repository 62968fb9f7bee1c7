"""What a compiled kernel and its packed weights look like to the program that runs them: `KernelStep`.

A kernel is a C function `void(int64 *descriptor, int64 thread, int64 threads)` (`ops.kernels.vector.kernel`). The descriptor
holds everything it needs: byte addresses of buffers and packed weights, sizes, steps. `threads` threads call it with the same
descriptor and different `thread`; each does its share, and all are done before the next step begins. A step is prepared once
per layer and bound once per set of buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KernelStep", "aligned"]


@dataclass(eq=False)
class KernelStep:
    """A kernel prepared for one layer and input shape.

    Attributes:
        address: of the compiled function.
        template: int64[k], the descriptor with 0 where the addresses of buffers go.
        input_slots: places in the descriptor for the address of each input buffer (float 0, 0, 0 of the buffer, halo included;
            for a part of a wider buffer, moved on by its first channel).
        output_slot: likewise for the output.
        scratch_slot: place for the address of `scratch` floats of working memory per step, or -1.
        scratch: floats of working memory, contents undefined before and after.
        arrays: packed weights and tables the descriptor points to; kept alive here.
    """

    address: int
    template: npt.NDArray[np.int64]
    input_slots: tuple[int, ...]
    output_slot: int
    scratch_slot: int = -1
    scratch: int = 0
    arrays: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and tables."""
        return sum(int(a.nbytes) for a in self.arrays) + int(self.template.nbytes)

    def bind(self, inputs: Sequence[int], output: int, scratch: int = 0) -> npt.NDArray[np.int64]:
        """The descriptor for given buffers.

        Args:
            inputs, output, scratch: byte addresses, multiples of 64 (plain tensors: of 4).
        """
        descriptor = self.template.copy()
        for slot, address in zip(self.input_slots, inputs, strict=True):
            descriptor[slot] = address
        descriptor[self.output_slot] = output
        if self.scratch_slot >= 0:
            descriptor[self.scratch_slot] = scratch
        return descriptor


def aligned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A flat, C-contiguous copy whose first byte is at a multiple of 64."""
    flat = np.ascontiguousarray(values).reshape(-1)
    room = np.zeros(flat.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + flat.nbytes].view(flat.dtype)
    copy[:] = flat
    return copy
