"""Compressed sparse rows: any mask, one column number per kept weight. What the kernels of unstructured layers read.

Start with `CSR.from_dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ops.packed.base import FormatError, Packed, check_array, check_rows, dense_and_mask
from ops.patterns import Pattern, Unstructured

__all__ = ["CSR", "as_csr"]


@dataclass(frozen=True, eq=False)
class CSR(Packed):
    """A sparse matrix of float32 by compressed rows, columns ascending within a row, no position twice.

    The only format that holds matrices alone: a convolution's weight is packed as the matrix
    [out, in/groups * kernel_height * kernel_width], `weight.flatten(1)`.

    nbytes = 8 * nnz + 4 * (rows + 1).

    Attributes:
        shape: (rows, cols).
        indptr: int32[rows + 1]; row i owns the entries indptr[i] .. indptr[i + 1].
        indices: int32[nnz], the column of each entry.
        values: float32[nnz].
    """

    shape: tuple[int, int]
    indptr: npt.NDArray[np.int32]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    @classmethod
    def from_dense(cls, weight: torch.Tensor, mask: torch.Tensor | None = None) -> CSR:
        """Pack a matrix.

        Args:
            weight: float[rows, cols] on any device; stored as float32.
            mask: bool[rows, cols], true where an entry is kept (kept zeros are stored). Without it every entry that is
                not 0 is stored, NaN included.

        Raises:
            FormatError: the weight is not a matrix, or the mask is not bool of the same shape.
        """
        if weight.ndim != 2:
            raise FormatError(
                f"CSR packs a matrix [rows, cols], got a weight of shape {list(weight.shape)}; flatten the kernel axes "
                "first: weight.flatten(1)"
            )
        dense, kept = dense_and_mask("CSR", weight, mask)
        indptr = np.zeros(dense.shape[0] + 1, np.int32)
        np.cumsum(kept.sum(axis=1), out=indptr[1:])
        indices = np.nonzero(kept)[1].astype(np.int32)
        return cls((dense.shape[0], dense.shape[1]), indptr, indices, np.ascontiguousarray(dense[kept]))

    @property
    def pattern(self) -> Pattern:
        return Unstructured()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"indptr": self.indptr, "indices": self.indices, "values": self.values}

    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        dense = np.zeros(self.shape, entries.dtype)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = entries
        return dense

    def to_csr(self) -> CSR:
        return self

    def check(self) -> None:
        check_rows("CSR", self.indptr, self.indices, *self.shape)
        check_array("CSR values", self.values, np.float32, (self.indices.size,))


def as_csr(packed: Packed) -> CSR:
    """Any packed weight by compressed rows, kernel axes flattened; kept zeros stay."""
    return CSR.from_dense(packed.to_dense().flatten(1), packed.mask().flatten(1))
