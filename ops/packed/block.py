"""Blocks of `rows` output x `cols` input channels at one kernel position, kept or dropped whole: one number per block.

Start with `BlockCSR.from_dense`; the pattern is `ops.patterns.Block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ops.packed.base import FormatError, Packed, check_array, check_rows, dense_and_mask, group_text
from ops.packed.csr import CSR, as_csr
from ops.patterns import Block, Pattern

__all__ = ["BlockCSR"]


@dataclass(frozen=True, eq=False)
class BlockCSR(Packed):
    """A weight by compressed rows of blocks, ascending within a row, none twice.

    A block row is `rows` output channels. Its block columns are numbered like CSR's columns, input channels first and then the
    kernel, only that `cols` input channels count as one: column = (input channel // cols) * kernel size + kernel position.
    There are no ragged edges: the pattern is impossible where the channels are no multiple of the block.

    nbytes = 4 * (out / rows + 1 + blocks * (1 + rows * cols)), where nnz = blocks * rows * cols.

    Attributes:
        shape: [out, in/groups, *kernel].
        rows, cols: of a block.
        indptr: int32[out / rows + 1]; block row i owns the blocks indptr[i] .. indptr[i + 1].
        indices: int32[blocks], the block column of each.
        values: float32[blocks, rows, cols].
    """

    shape: tuple[int, ...]
    rows: int
    cols: int
    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, mask: torch.Tensor | None = None, *, rows: int = 4, cols: int = 1
    ) -> BlockCSR:
        """Pack a weight.

        Args:
            weight: float[out, in/groups, *kernel] on any device; stored as float32.
            mask: bool like the weight, blocks all true or all false. Without it every block that has an entry that is not 0 is
                stored.
            rows, cols: output and input channels of a block.

        Raises:
            FormatError: blocks are impossible on the shape, the mask is not bool of that shape, or it cuts a block.
        """
        pattern = Block(rows, cols)
        dense, kept = dense_and_mask("BlockCSR", weight, mask, pattern)
        kept_blocks = _split(kept, rows, cols)
        stored = kept_blocks.any((2, 3))
        if mask is not None and (cut := stored & ~kept_blocks.all((2, 3))).any():
            row, column = (int(n) for n in np.argwhere(cut)[0])
            raise FormatError(
                f"BlockCSR: the mask must keep or drop {pattern} blocks whole, but it keeps {kept_blocks[row, column].sum()} of "
                f"{rows * cols} weights in the block of output channels {row * rows} to {(row + 1) * rows - 1} and "
                f"{group_text(dense.shape, column, cols)} ({int(cut.sum())} such blocks)"
            )
        indptr = np.zeros(stored.shape[0] + 1, np.int32)
        np.cumsum(stored.sum(axis=1), out=indptr[1:])
        values = np.ascontiguousarray(_split(dense, rows, cols)[stored])
        return cls(tuple(dense.shape), rows, cols, indptr, np.nonzero(stored)[1].astype(np.int32), values)

    @property
    def pattern(self) -> Pattern:
        return Block(self.rows, self.cols)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"indptr": self.indptr, "indices": self.indices, "values": self.values}

    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out, inputs, *kernel = self.shape
        block_rows, wide = out // self.rows, inputs // self.cols
        blocks = np.zeros((block_rows, wide * prod(kernel), self.rows, self.cols), entries.dtype)
        blocks[np.repeat(np.arange(block_rows), np.diff(self.indptr)), self.indices] = entries
        split = blocks.reshape(block_rows, wide, prod(kernel), self.rows, self.cols)
        return np.ascontiguousarray(split.transpose(0, 3, 1, 4, 2)).reshape(self.shape)

    def to_csr(self) -> CSR:
        return as_csr(self)

    def check(self) -> None:
        if reason := self.pattern.illegal(self.shape):
            raise FormatError(f"BlockCSR: {reason}")
        out, inputs, *kernel = self.shape
        check_rows("BlockCSR", self.indptr, self.indices, out // self.rows, inputs // self.cols * prod(kernel))
        check_array("BlockCSR values", self.values, np.float32, (self.indices.size, self.rows, self.cols))


def _split(array: npt.NDArray[Any], rows: int, cols: int) -> npt.NDArray[Any]:
    """[out, in, *kernel] as [out / rows, in / cols * kernel size, rows, cols]."""
    out, inputs, *kernel = array.shape
    split = array.reshape(out // rows, rows, inputs // cols, cols, prod(kernel)).transpose(0, 2, 4, 1, 3)
    return split.reshape(out // rows, -1, rows, cols)
