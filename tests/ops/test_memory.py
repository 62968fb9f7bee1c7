"""Buffers that are alive together never overlap, and the block is no larger than it has to be in cases one can see through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.memory import ALIGNMENT, Interval, allocate

INTERVALS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 500)).map(
        lambda t: Interval(t[0], t[0] + t[1], t[2])
    ),
    max_size=14,
)


@given(INTERVALS)
def test_buffers_alive_together_do_not_overlap(intervals: list[Interval]) -> None:
    offsets, size = allocate(intervals)
    for i, a in enumerate(intervals):
        assert offsets[i] % ALIGNMENT == 0
        assert offsets[i] + a.size <= size
        for j, b in enumerate(intervals[:i]):
            if a.first <= b.last and b.first <= a.last:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0),
        ([Interval(0, 1, 64), Interval(1, 2, 64), Interval(2, 3, 64)], 128),  # a chain needs two buffers
        ([Interval(0, 9, 64), Interval(0, 1, 128), Interval(2, 3, 128)], 192),  # a skip connection stays
        ([Interval(0, 0, 640), Interval(1, 1, 64), Interval(1, 1, 576)], 640),
        ([Interval(0, 0, 1)], ALIGNMENT),
    ],
)
def test_simple_plans_have_the_least_size(intervals: list[Interval], expected: int) -> None:
    assert allocate(intervals)[1] == expected
