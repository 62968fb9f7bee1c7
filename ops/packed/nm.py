"""Exactly n of every m consecutive input channels: the kept weights, and which of the m they are in a few bits each.

Start with `NMPacked.from_dense`; the pattern is `ops.patterns.NM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ops.packed.base import FormatError, Packed, check_array, dense_and_mask, group_text
from ops.packed.csr import CSR, as_csr
from ops.patterns import NM, Pattern

__all__ = ["NMPacked"]


@dataclass(frozen=True, eq=False)
class NMPacked(Packed):
    """A weight by groups of m consecutive input channels at one kernel position, n of them kept, in ascending order.

    Groups of an output channel are numbered like CSR's columns, only that m input channels count as one: group =
    (input channel // m) * kernel size + kernel position. There are G = in / m * kernel size of them.

    The place of a weight within its group takes b = ceil(log2 m) bits, lowest bit first; an output channel's G * n places follow
    each other without gaps, and each output channel begins a new byte (the bits left over are 0). 2:4 takes 2 bits.

    nbytes = 4 * out * G * n + out * ceil(G * n * b / 8), where nnz = out * G * n.

    Attributes:
        shape: [out, in/groups, *kernel].
        n, m: of the pattern.
        values: float32[out, G, n].
        positions: uint8[out, ceil(G * n * b / 8)]; `places` unpacks it.
    """

    shape: tuple[int, ...]
    n: int
    m: int
    values: npt.NDArray[np.float32]
    positions: npt.NDArray[np.uint8]

    @classmethod
    def from_dense(cls, weight: torch.Tensor, mask: torch.Tensor | None = None, *, n: int = 2, m: int = 4) -> NMPacked:
        """Pack a weight.

        Args:
            weight: float[out, in/groups, *kernel] on any device; stored as float32.
            mask: bool like the weight, n true in every group. Without it the entries that are not 0 are stored, and the first
                zeros of a group that has fewer than n of them.
            n, m: of the pattern.

        Raises:
            FormatError: N:M is impossible on the shape, the mask is not bool of that shape, or a group keeps another number.
        """
        pattern = NM(n, m)
        dense, kept = dense_and_mask("NMPacked", weight, mask, pattern)
        grouped = _split(kept, m)
        count = grouped.sum(axis=2)
        if (wrong := count > n if mask is None else count != n).any():
            row, group = (int(k) for k in np.argwhere(wrong)[0])
            what = f"at most {n} weights that are not 0" if mask is None else f"exactly {n} weights kept by the mask"
            raise FormatError(
                f"NMPacked: {pattern} needs {what} in every group of {m} input channels, got {count[row, group]} in output channel "
                f"{row}, {group_text(dense.shape, group, m)} ({int(wrong.sum())} such groups)"
            )
        places = np.sort(np.argsort(~grouped, axis=2, kind="stable")[:, :, :n], axis=2)
        values = np.take_along_axis(_split(dense, m), places, axis=2)
        return cls(tuple(dense.shape), n, m, np.ascontiguousarray(values), _to_bits(places.reshape(len(dense), -1), m))

    @property
    def pattern(self) -> Pattern:
        return NM(self.n, self.m)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """int64[out, G, n]: which of the m channels of its group each value belongs to."""
        bits = _bits(self.m)
        count = prod(self.values.shape[1:])
        single = np.unpackbits(self.positions, axis=1, count=count * bits, bitorder="little")
        places = single.reshape(-1, count, bits).astype(np.int64) @ (1 << np.arange(bits))
        return places.reshape(self.values.shape)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"values": self.values, "positions": self.positions}

    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out, inputs, *kernel = self.shape
        grouped = np.zeros((*self.values.shape[:2], self.m), entries.dtype)
        np.put_along_axis(grouped, self.places, entries, axis=2)
        split = grouped.reshape(out, inputs // self.m, prod(kernel), self.m)
        return np.ascontiguousarray(split.transpose(0, 1, 3, 2)).reshape(self.shape)

    def to_csr(self) -> CSR:
        return as_csr(self)

    def check(self) -> None:
        if reason := self.pattern.illegal(self.shape):
            raise FormatError(f"NMPacked: {reason}")
        out, groups = self.shape[0], prod(self.shape[1:]) // self.m
        length = -(-groups * self.n * _bits(self.m) // 8)
        check_array("NMPacked values", self.values, np.float32, (out, groups, self.n))
        check_array("NMPacked positions", self.positions, np.uint8, (out, length))
        places = self.places
        wrong = (places >= self.m).any(axis=2) | (np.diff(places, axis=2) <= 0).any(axis=2)
        if wrong.any():
            row, group = (int(k) for k in np.argwhere(wrong)[0])
            raise FormatError(
                f"NMPacked output channel {row}, group {group}: places must ascend without repeats within [0, {self.m}), got "
                f"{places[row, group].tolist()}"
            )
        if not np.array_equal(_to_bits(places.reshape(out, -1), self.m), self.positions):
            raise FormatError("NMPacked positions: the bits left over at the end of an output channel must be 0")


def _bits(m: int) -> int:
    """ceil(log2 m)."""
    return (m - 1).bit_length()


def _split(array: npt.NDArray[Any], m: int) -> npt.NDArray[Any]:
    """[out, in, *kernel] as [out, in / m * kernel size, m]."""
    out, inputs, *kernel = array.shape
    return array.reshape(out, inputs // m, m, prod(kernel)).transpose(0, 1, 3, 2).reshape(out, -1, m)


def _to_bits(places: npt.NDArray[Any], m: int) -> npt.NDArray[np.uint8]:
    """[out, count] places as uint8[out, ceil(count * bits / 8)]."""
    single = (places[:, :, None] >> np.arange(_bits(m))) & 1
    return np.packbits(single.astype(np.uint8).reshape(len(places), -1), axis=1, bitorder="little")
