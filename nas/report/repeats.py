"""Finds what repeats in a list of operations, so that 200 of them can be drawn as a dozen rows.

A network repeats where several operations in a row do the same as the ones before: the same kinds, shapes, patterns and
kernels; names, and how dense each is, may differ. Start with `rows_of`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from nas.report.plans import Operation

LONGEST_PERIOD = 64


@dataclass(frozen=True)
class Row:
    """One row of a drawing: an operation, and those of later repetitions that do the same.

    Attributes:
        members: indices into the operations, the first repetition's first.
        block: number of the repeated block the row belongs to, -1 for none.
        times: how often that block is repeated; 1 for none.
    """

    members: tuple[int, ...]
    block: int = -1
    times: int = 1


def rows_of(operations: Sequence[Operation], *, at_least: int = 24) -> list[Row]:
    """The rows to draw, in order; every operation is a member of exactly one.

    Args:
        operations: in order of execution.
        at_least: with fewer operations than this nothing is collapsed.
    """
    if len(operations) < at_least:
        return [Row((i,)) for i in range(len(operations))]
    signs = [signature(op) for op in operations]
    rows: list[Row] = []
    start, block = 0, 0
    while start < len(signs):
        period, times = _best_repeat(signs, start)
        later = _aligned(operations, signs, start, period, times)
        if times == 1 or later > start:
            rows.append(Row((start,)))
            start += 1
            continue
        for offset in range(period):
            rows.append(Row(tuple(start + offset + period * k for k in range(times)), block, times))
        block += 1
        start += period * times
    return rows


def signature(op: Operation) -> Hashable:
    """What two operations must share to count as the same."""
    return op.kind, op.what, op.pattern, op.kernel, op.after, op.output


def _aligned(operations: Sequence[Operation], signs: Sequence[Hashable], start: int, period: int, times: int) -> int:
    """Where the repeated block rather begins: with a module, if that is a few operations later and saves as much."""

    def begins(k: int) -> bool:
        return k == 0 or _parent(operations[k].name) != _parent(operations[k - 1].name)

    if times == 1 or begins(start):
        return start
    for later in range(start + 1, start + period):
        other, again = _best_repeat(signs, later)
        if begins(later) and (again - 1) * other >= (times - 1) * period:
            return later
    return start


def _parent(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[0]


def _best_repeat(signs: Sequence[Hashable], start: int) -> tuple[int, int]:
    """(length of the block, how often it stands there) that saves most rows; (1, 1) if nothing repeats."""
    best, saved = (1, 1), 0
    for period in range(1, min(LONGEST_PERIOD, (len(signs) - start) // 2) + 1):
        block = signs[start : start + period]
        times = 1
        while signs[start + times * period : start + (times + 1) * period] == block:
            times += 1
        if (times - 1) * period > saved:
            best, saved = (period, times), (times - 1) * period
    return best
