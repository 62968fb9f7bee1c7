"""Packed weights: what a kernel reads instead of the dense weight and its mask.

One format so far: `CSR`, compressed sparse rows. A convolution's weight is packed as the matrix
[out, in/groups * kernel_height * kernel_width]. The mask decides what is stored, never the value: a kept weight that happens
to be 0.0 keeps its place. This file packs, unpacks and checks; it computes nothing with the weights.

Start with `CSR.from_dense`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["CSR", "FormatError"]


class FormatError(ValueError):
    """Packed arrays that do not describe a matrix; says which invariant is broken and where."""


@dataclass(frozen=True, eq=False)
class CSR:
    """A sparse matrix of float32 by compressed rows, columns ascending within a row, no position twice.

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
        if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise FormatError(
                f"the mask must be bool{list(weight.shape)} like the weight, got {mask.dtype}{list(mask.shape)}"
            )
        dense = weight.detach().to("cpu", torch.float32).numpy()
        kept = dense != 0 if mask is None else mask.detach().cpu().numpy()
        if dense.size > np.iinfo(np.int32).max:
            raise FormatError(f"CSR indices are int32; a matrix of {dense.size} entries is too large")
        indptr = np.zeros(dense.shape[0] + 1, np.int32)
        np.cumsum(kept.sum(axis=1), out=indptr[1:])
        indices = np.nonzero(kept)[1].astype(np.int32)
        return cls((dense.shape[0], dense.shape[1]), indptr, indices, np.ascontiguousarray(dense[kept]))

    @property
    def nnz(self) -> int:
        """Number of stored entries, kept zeros included."""
        return int(self.indices.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays: 8 * nnz + 4 * (rows + 1)."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.values.nbytes)

    def to_dense(self) -> torch.Tensor:
        """Unpack to float32[rows, cols], zero where nothing is stored."""
        dense = np.zeros(self.shape, np.float32)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.values
        return torch.from_numpy(dense)

    def mask(self) -> torch.Tensor:
        """bool[rows, cols], true where an entry is stored."""
        kept = np.zeros(self.shape, bool)
        kept[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = True
        return torch.from_numpy(kept)

    def check(self) -> None:
        """Raise FormatError unless the arrays are canonical: right types and lengths, columns in range and ascending."""
        rows, cols = self.shape
        for name, array, dtype in (
            ("indptr", self.indptr, np.int32),
            ("indices", self.indices, np.int32),
            ("values", self.values, np.float32),
        ):
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise FormatError(
                    f"CSR {name} must be a contiguous {np.dtype(dtype)} vector, got {array.dtype}{array.shape}"
                )
        if self.indptr.size != rows + 1 or self.indptr[0] != 0 or self.indptr[-1] != self.indices.size:
            raise FormatError(
                f"CSR indptr must have {rows + 1} entries from 0 to nnz = {self.indices.size}, got {self.indptr.size} "
                f"entries from {self.indptr[0]} to {self.indptr[-1]}"
            )
        if self.values.size != self.indices.size:
            raise FormatError(f"CSR has {self.indices.size} indices but {self.values.size} values")
        if (np.diff(self.indptr) < 0).any():
            raise FormatError(f"CSR indptr must not fall; it does after row {int((np.diff(self.indptr) < 0).argmax())}")
        for row in range(rows):
            columns = self.indices[self.indptr[row] : self.indptr[row + 1]]
            if columns.size and (columns[0] < 0 or columns[-1] >= cols or (np.diff(columns) <= 0).any()):
                raise FormatError(
                    f"CSR row {row}: columns must ascend without repeats within [0, {cols}), got {columns[:8].tolist()}"
                )
