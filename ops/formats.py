"""Packed weights: what a kernel reads instead of the dense weight and its mask. One format per sparsity pattern:

    pattern         format           stored besides the kept weights
    unstructured    CSR              a column number per weight, and where rows begin
    4x1             BlockCSR         a column number per block, and where rows of blocks begin
    2:4             NMPacked         2 bits per weight (ceil(log2 m))
    channel         ChannelPacked    a number per kept channel

The mask decides what is stored, never the value: a kept weight that happens to be 0.0 keeps its place. The formats pack, unpack
and check; they compute nothing with the weights. They are written in `ops.packed`, one file each.

Start with `pack`, or with `CSR.from_dense`.
"""

from __future__ import annotations

import torch

from ops.packed.base import FormatError, Packed
from ops.packed.block import BlockCSR
from ops.packed.channel import ChannelPacked
from ops.packed.csr import CSR
from ops.packed.nm import NMPacked
from ops.patterns import NM, Block, Channel, Pattern, Unstructured, check_pattern

__all__ = ["CSR", "BlockCSR", "ChannelPacked", "FormatError", "NMPacked", "Packed", "pack"]


def pack(weight: torch.Tensor, mask: torch.Tensor, pattern: str | Pattern) -> Packed:
    """Pack a weight in the format of its pattern.

    Args:
        weight: float[out, in/groups, *kernel] on any device; stored as float32.
        mask: bool like the weight, true where a weight is kept, of the structure of the pattern.
        pattern: the pattern or its text.

    Returns:
        The format of the pattern. All hold the weight's shape but CSR, which holds the matrix `weight.flatten(1)`;
        `to_csr()` gives that for each.

    Raises:
        PatternError: no such pattern, or it is impossible on the shape.
        FormatError: the mask is not bool of the weight's shape, or does not have the pattern; says where.
    """
    pattern = check_pattern(pattern, tuple(weight.shape))
    match pattern:
        case NM(n, m):
            return NMPacked.from_dense(weight, mask, n=n, m=m)
        case Block(rows, cols):
            return BlockCSR.from_dense(weight, mask, rows=rows, cols=cols)
        case Channel():
            return ChannelPacked.from_dense(weight, mask)
        case Unstructured():
            if mask.shape != weight.shape:  # told in the weight's own shape
                raise FormatError(f"the mask must be bool{list(weight.shape)} like the weight, got {list(mask.shape)}")
            return CSR.from_dense(weight.reshape(len(weight), -1), mask.reshape(len(weight), -1))
    raise TypeError(f"no packed format for the pattern {pattern}")
