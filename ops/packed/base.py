"""What all packed weights have in common: the interface `Packed`, and the checks of what is packed.

Start with `Packed`; the formats are in the files beside this one, the choice among them in `ops.formats.pack`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ops.patterns import Pattern

if TYPE_CHECKING:
    from ops.packed.csr import CSR

__all__ = ["FormatError", "Packed", "check_array", "check_rows", "dense_and_mask", "group_text"]


class FormatError(ValueError):
    """Packed arrays that do not describe a matrix, or a weight and mask a format cannot hold; says what does not fit and where."""


class Packed(ABC):
    """Weights without those that are dropped. The mask decides what is stored: a kept weight that is 0.0 keeps its place.

    Attributes:
        shape: of the weight.
        values: float32, the kept weights; the last axes and their order are the format's.
    """

    shape: tuple[int, ...]
    values: npt.NDArray[np.float32]

    @property
    @abstractmethod
    def pattern(self) -> Pattern:
        """The pattern every mask of this format has."""

    @abstractmethod
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What is stored, by name."""

    @abstractmethod
    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array of the weight's shape with `entries` (like `values`, any type) in their places and 0 elsewhere."""

    @abstractmethod
    def to_csr(self) -> CSR:
        """The same kept weights as a matrix [out, in/groups * kernel_height * kernel_width] by compressed rows."""

    @abstractmethod
    def check(self) -> None:
        """Raise FormatError unless the arrays are canonical: types, lengths, and places in range, ascending, none twice."""

    @property
    def nnz(self) -> int:
        """Number of stored weights, kept zeros included."""
        return int(self.values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the class says what that comes to."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    def to_dense(self) -> torch.Tensor:
        """Unpack to float32 of the weight's shape, zero where nothing is stored."""
        return torch.from_numpy(self.spread(self.values))

    def mask(self) -> torch.Tensor:
        """bool of the weight's shape, true where a weight is stored."""
        return torch.from_numpy(self.spread(np.ones(self.values.shape, bool)))


def dense_and_mask(
    name: str, weight: torch.Tensor, mask: torch.Tensor | None, pattern: Pattern | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """(the weight as float32, what is kept: the mask, or without one what is not 0) in the main memory, after checks.

    Raises:
        FormatError: the mask is not bool of the weight's shape, the pattern is impossible on that shape, the weight has no values
            (meta device) or more than 2^31 - 1 of them.
    """
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise FormatError(
            f"the mask must be bool{list(weight.shape)} like the weight, got {mask.dtype}{list(mask.shape)}"
        )
    reason = pattern.illegal(tuple(weight.shape)) if pattern is not None else None
    if reason is not None:
        raise FormatError(f"{name}: {reason}")
    if weight.is_meta or (mask is not None and mask.is_meta):
        raise FormatError(f"{name} cannot pack a weight {list(weight.shape)} on the meta device, which has no values")
    if weight.numel() > np.iinfo(np.int32).max:
        raise FormatError(f"{name} indices are int32; a weight of {weight.numel()} entries is too large")
    dense = weight.detach().to("cpu", torch.float32).numpy()
    return dense, dense != 0 if mask is None else mask.detach().cpu().numpy()


def check_array(name: str, array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless the array is contiguous, of that type and shape."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not contiguous"
        raise FormatError(
            f"{name} must be a contiguous {np.dtype(dtype)}{list(shape)}, got {array.dtype}{list(array.shape)}{layout}"
        )


def check_rows(
    name: str, indptr: npt.NDArray[np.int32], indices: npt.NDArray[np.int32], rows: int, columns: int
) -> None:
    """Raise FormatError unless these are compressed rows: indptr rises from 0, columns ascend within a row and are in range."""
    check_array(f"{name} indices", indices, np.int32, (indices.size,))
    check_array(f"{name} indptr", indptr, np.int32, (rows + 1,))
    if indptr[0] != 0 or indptr[-1] != indices.size:
        raise FormatError(
            f"{name} indptr must run from 0 to {indices.size}, the number of indices, got {indptr[0]} to {indptr[-1]}"
        )
    if (np.diff(indptr) < 0).any():
        raise FormatError(f"{name} indptr must not fall; it does after row {int((np.diff(indptr) < 0).argmax())}")
    wrong = (indices < 0) | (indices >= columns)
    falls = np.zeros(indices.size, bool)
    falls[1:] = np.diff(indices) <= 0
    falls[indptr[:-1][indptr[:-1] < indices.size]] = False  # the first of a row may be anything
    if (wrong | falls).any():
        row = _row_of(indptr, int((wrong | falls).argmax()))
        found = indices[indptr[row] : indptr[row + 1]]
        raise FormatError(
            f"{name} row {row}: columns must ascend without repeats within [0, {columns}), got {found[:8].tolist()}"
        )


def group_text(shape: tuple[int, ...], group: int, width: int) -> str:
    """ "input channels 4 to 7 at kernel position (0, 2)": a group of `width` input channels, numbered as CSR's columns are."""
    channel, position = divmod(group, prod(shape[2:]))
    channels = f"{channel * width} to {(channel + 1) * width - 1}" if width > 1 else f"{channel}"
    at = tuple(int(n) for n in np.unravel_index(position, shape[2:]))
    return f"input channel{'s' if width > 1 else ''} {channels}" + (f" at kernel position {at}" if at else "")


def _row_of(indptr: npt.NDArray[np.int32], entry: int) -> int:
    """The row an entry belongs to."""
    return int(np.searchsorted(indptr, entry, side="right")) - 1
