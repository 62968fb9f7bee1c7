"""A convolution and the 1x1 convolution that alone reads it, as one step: `fuse_pairs`.

The values in between exist for a few tiles at a time, in a scratch memory that never leaves the first-level cache
(`ops.kernels.specialised.specialised_pair_step`). That pays where they are wide; it costs that the code of both is fetched for
every few tiles, so it is done where each wide channel has few weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ops.schedule import Copy, Step

__all__ = ["WEIGHTS_PER_CHANNEL", "fuse_pairs"]

# Kept weights of both layers per channel between them. At 64 -> 256 -> 64 on 56x56 (measured in chains, one AVX-512 thread).
WEIGHTS_PER_CHANNEL = 64


def fuse_pairs(steps: list[Step], refreshed: Collection[Copy]) -> list[Step]:
    """The steps with every such pair of specialised convolutions as one step of kind "pair".

    Args:
        steps: in order.
        refreshed: copies whose halo is read; they have to exist as a whole.
    """
    readers: dict[Copy, int] = {}
    for step in steps:
        for copy in step.reads:
            readers[copy] = readers.get(copy, 0) + 1
    result: list[Step] = []
    for step in steps:
        before = result[-1] if result else None
        if before is not None and _fits(before, step, readers, refreshed):
            reads = (before.reads[0], *step.reads[1:])
            fused = replace(step, kind="pair", reads=reads, layer=before.layer, parameters={"second": step.layer})
            result[-1] = fused
        else:
            result.append(step)
    return result


def _fits(first: Step, second: Step, readers: dict[Copy, int], refreshed: Collection[Copy]) -> bool:
    both = all(step.kind == "conv" and step.kernel == "specialised" for step in (first, second))
    if not both or first.writes is None or first.writes is not second.reads[0] or readers[first.writes] != 1:
        return False
    a, b = first.layer, second.layer
    if a is None or b is None or first.writes in refreshed or first.writes is second.writes:
        return False
    pointwise = b.weight.shape[2:] == (1, 1) and b.stride == (1, 1) and not any(b.padding) and b.groups == 1
    if not pointwise or a.residual or a.groups != 1:
        return False
    wide = a.weight.shape[0]
    return wide >= b.weight.shape[0] and a.nnz + b.nnz <= WEIGHTS_PER_CHANNEL * wide
