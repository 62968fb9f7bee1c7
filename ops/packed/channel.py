"""Whole output channels kept or dropped: the numbers of those kept, and their weights as a smaller dense weight.

Start with `ChannelPacked.from_dense`; the pattern is `ops.patterns.Channel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ops.packed.base import FormatError, Packed, check_array, dense_and_mask
from ops.packed.csr import CSR, as_csr
from ops.patterns import Channel, Pattern

__all__ = ["ChannelPacked"]


@dataclass(frozen=True, eq=False)
class ChannelPacked(Packed):
    """A dense weight of fewer output channels. Input channels are all there.

    nbytes = 4 * kept * (1 + in/groups * kernel size), where nnz = kept * in/groups * kernel size.

    Attributes:
        shape: [out, in/groups, *kernel].
        channels: int32[kept], the output channels kept, ascending.
        values: float32[kept, in/groups, *kernel].
    """

    shape: tuple[int, ...]
    channels: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    @classmethod
    def from_dense(cls, weight: torch.Tensor, mask: torch.Tensor | None = None) -> ChannelPacked:
        """Pack a weight.

        Args:
            weight: float[out, in/groups, *kernel] on any device; stored as float32.
            mask: bool like the weight, each output channel all true or all false. Without it every channel that has an entry that
                is not 0 is stored.

        Raises:
            FormatError: the pattern is impossible on the shape, the mask is not bool of that shape, or it cuts a channel.
        """
        dense, kept = dense_and_mask("ChannelPacked", weight, mask, Channel())
        flat = kept.reshape(len(kept), -1)
        stored = flat.any(axis=1)
        if mask is not None and (cut := stored & ~flat.all(axis=1)).any():
            first = int(cut.argmax())
            raise FormatError(
                f"ChannelPacked: the mask must keep or drop output channels whole, but it keeps {flat[first].sum()} of "
                f"{flat.shape[1]} weights of channel {first} ({int(cut.sum())} such channels)"
            )
        return cls(tuple(dense.shape), np.flatnonzero(stored).astype(np.int32), np.ascontiguousarray(dense[stored]))

    @property
    def pattern(self) -> Pattern:
        return Channel()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"channels": self.channels, "values": self.values}

    def spread(self, entries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        dense = np.zeros(self.shape, entries.dtype)
        dense[self.channels] = entries
        return dense

    def to_csr(self) -> CSR:
        return as_csr(self)

    def check(self) -> None:
        if len(self.shape) < 2 or prod(self.shape) < 1:
            raise FormatError(f"ChannelPacked holds weights [out, in/groups, *kernel], got shape {list(self.shape)}")
        check_array("ChannelPacked channels", self.channels, np.int32, (self.channels.size,))
        check_array("ChannelPacked values", self.values, np.float32, (self.channels.size, *self.shape[1:]))
        found = self.channels
        if found.size and (found[0] < 0 or found[-1] >= self.shape[0] or (np.diff(found) <= 0).any()):
            raise FormatError(
                f"ChannelPacked channels must ascend without repeats within [0, {self.shape[0]}), got {found[:8].tolist()}"
            )
