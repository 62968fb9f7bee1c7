"""A weight seen as the units that stand or fall together: single weights, blocks, channels, or the groups of N:M.

Start with `unit_sums` and its inverse `expand`; `n_of_m_groups` for N:M, where a group is not kept or dropped as a whole.
"""

from __future__ import annotations

from torch import Tensor

from ops.patterns import Block, Channel, Pattern, Unstructured


def unit_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """Sum over each unit: [out, in, *kernel] -> [units], units in order of their first entry.

    Raises:
        TypeError: a pattern without such units.
    """
    if isinstance(pattern, Unstructured):
        return values.flatten()
    if isinstance(pattern, Channel):
        return values.flatten(1).sum(1)
    if isinstance(pattern, Block):
        out, inner = values.shape[:2]
        blocks = values.reshape(out // pattern.rows, pattern.rows, inner // pattern.cols, pattern.cols, -1)
        return blocks.sum((1, 3)).flatten()
    raise TypeError(f"pattern {pattern} has no units that are kept or dropped as a whole")


def expand(units: Tensor, shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """Repeat each unit's value over its entries: [units] -> [out, in, *kernel].

    Raises:
        TypeError: a pattern without such units.
    """
    if isinstance(pattern, Unstructured):
        return units.reshape(shape)
    if isinstance(pattern, Channel):
        return units.view(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
    if isinstance(pattern, Block):
        out, inner = shape[:2]
        blocks = units.view(out // pattern.rows, 1, inner // pattern.cols, 1, -1)
        whole = blocks.expand(-1, pattern.rows, -1, pattern.cols, -1)
        return whole.reshape(shape)
    raise TypeError(f"pattern {pattern} has no units that are kept or dropped as a whole")


def n_of_m_groups(values: Tensor, m: int) -> Tensor:
    """[out, in, *kernel] -> [groups, m]: groups of m consecutive input channels at one kernel position (a copy)."""
    return values.movedim(1, -1).reshape(-1, m)
