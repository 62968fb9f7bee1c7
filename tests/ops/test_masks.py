"""Masks: exact counts for every pattern, shape and density; ties; nesting; hand tables; a slow twin in plain loops."""

from __future__ import annotations

import itertools
from decimal import Decimal
from fractions import Fraction
from math import floor, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.masks import check_density, kept_count, random_mask, satisfies, topk_mask, zero_count
from ops.patterns import NM, Block, Channel, Pattern, PatternError, Unstructured, parse_pattern

SHAPES = [(4, 8), (30, 4), (1, 16), (12, 1), (8, 12, 3, 3), (6, 8, 1, 1), (4, 4, 2, 3), (8, 1, 3, 3), (5, 7), (3, 4, 5)]
PATTERNS = ["unstructured", "2:4", "1:4", "3:4", "4:4", "1:2", "4x1", "1x4", "2x2", "2x3", "1x1", "channel"]
DENSITIES = [1.0, 0.9, 0.7, 0.5, 1 / 3, 0.25, 0.2, 0.1, 0.05, 0.01, 1e-6]

laws = settings(deadline=None, derandomize=True)

CASES = [
    pytest.param(shape, pattern, density, id=f"{shape}-{pattern}-{density:.3g}")
    for shape, pattern, density in itertools.product(SHAPES, map(parse_pattern, PATTERNS), DENSITIES)
    if pattern.illegal(shape) is None and (pattern.fixed_density is None or density in (1.0, pattern.fixed_density))
]


def units_by_loop(shape: tuple[int, ...], pattern: Pattern) -> list[list[tuple[int, ...]]]:
    """The weights of every unit, in order of the unit's index. Not for N:M."""
    everywhere = list(itertools.product(*map(range, shape)))
    if isinstance(pattern, Channel):
        return [[i for i in everywhere if i[0] == o] for o in range(shape[0])]
    if isinstance(pattern, Block):
        r, c = pattern.rows, pattern.cols
        blocks = itertools.product(range(shape[0] // r), range(shape[1] // c), *map(range, shape[2:]))
        return [
            [(b[0] * r + i, b[1] * c + j, *b[2:]) for i in range(r) for j in range(c)] for b in blocks
        ]  # fmt: skip
    return [[i] for i in everywhere]


def topk_by_loop(scores: Tensor, density: float, pattern: Pattern) -> Tensor:
    """The definition in plain loops: best units first, lower index first among equals."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    if density == 1:
        return ~mask
    if isinstance(pattern, NM):
        out, width, *kernel = scores.shape
        for o, first, *position in itertools.product(range(out), range(0, width, pattern.m), *map(range, kernel)):
            ranked = sorted(range(first, first + pattern.m), key=lambda i: (-float(scores[(o, i, *position)]), i))
            for i in ranked[: pattern.n]:
                mask[(o, i, *position)] = True
        return mask
    units = units_by_loop(tuple(scores.shape), pattern)
    ranked = sorted(range(len(units)), key=lambda u: (-sum(float(scores[i]) for i in units[u]), u))
    zeros = min(floor((1 - Fraction(Decimal(repr(density)))) * len(units)), len(units) - 1)
    for u in ranked[: len(units) - zeros]:
        for i in units[u]:
            mask[i] = True
    return mask


@pytest.mark.parametrize(("shape", "pattern", "density"), CASES)
def test_every_mask_keeps_exactly_the_requested_count_and_has_the_structure(shape, pattern, density):
    expected = kept_count(shape, density, pattern)
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(shape, generator=generator)
    ties = torch.randint(0, 3, shape, generator=generator).float()
    masks = [topk_mask(scores, density, pattern) for scores in (many, ties, torch.zeros(shape), -torch.ones(shape))]
    masks.append(random_mask(shape, density, pattern, generator))
    for mask in masks:
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == shape
        assert mask.is_contiguous()
        assert int(mask.sum()) == expected
        if density < 1:
            assert satisfies(mask, pattern)
    if density == 1:
        assert expected == prod(shape)


@pytest.mark.parametrize(("shape", "pattern", "density"), CASES)
def test_topk_mask_equals_the_loop(shape, pattern, density):
    generator = torch.Generator().manual_seed(2)
    for scores in (torch.randint(-4, 5, shape, generator=generator).float(), torch.zeros(shape)):
        assert torch.equal(topk_mask(scores, density, pattern), topk_by_loop(scores, density, pattern))


@pytest.mark.parametrize(("shape", "sparsity", "ones"), [((30, 4), 0.5, 60), ((1, 2, 1, 4), 0.8, 2), ((30,), 0.1, 27)])
def test_counts_of_the_rigl_reference_code(shape, sparsity, ones):
    assert kept_count(shape, 1 - sparsity) == ones
    assert int(topk_mask(torch.zeros(shape), 1 - sparsity).sum()) == ones


@pytest.mark.parametrize(
    ("units", "density", "kept"),
    [
        (30, 0.9, 27),
        (10, 1 - 0.7, 3),
        (10, 0.3, 3),
        (10, 0.29, 3),
        (10, 0.31, 4),
        (7, 4 / 7, 4),
        (3, 1 / 3, 1),
        (3, 0.34, 2),
        (1000, 0.001, 1),
        (10, 0.001, 1),
        (1, 0.5, 1),
        (25_502_912, 0.2, 5_100_583),
        (100, 1.0, 100),
        (10, 1e-15, 1),
    ],
)
def test_counts_are_exact_where_floats_are_not(units, density, kept):
    assert units - zero_count(units, density) == kept


@laws
@given(st.integers(1, 5000), st.data())
def test_a_density_of_k_over_n_keeps_exactly_k(units, data):
    kept = data.draw(st.integers(1, units))
    assert units - zero_count(units, kept / units) == kept
    assert units - zero_count(units, 1 - (units - kept) / units) == kept


@laws
@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_a_decimal_density_gives_the_decimal_floor(units, hundred_thousandths):
    zeros = min((100_000 - hundred_thousandths) * units // 100_000, units - 1)
    assert zero_count(units, hundred_thousandths / 100_000) == zeros


@laws
@given(st.integers(1, 3000), st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_more_density_never_keeps_less_and_nothing_is_emptied(units, a, b):
    low, high = sorted((a, b))
    assert 0 <= zero_count(units, high) <= zero_count(units, low) < units


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x2", "1x4", "channel"])
def test_masks_of_growing_density_nest(pattern):
    shape = (16, 8, 3, 3)
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(3))
    draws = {
        "topk": lambda d: topk_mask(scores, d, pattern),
        "random": lambda d: random_mask(shape, d, pattern, torch.Generator().manual_seed(4)),
    }
    for draw in draws.values():
        masks = [draw(d) for d in (0.01, 0.1, 0.25, 0.5, 0.9, 1.0)]
        for smaller, larger in itertools.pairwise(masks):
            assert not bool((smaller & ~larger).any())


def test_nm_masks_nest_over_n():
    scores = torch.randint(0, 3, (4, 8, 3, 3))
    masks = [topk_mask(scores, n / 4, NM(n, 4)) for n in (1, 2, 3, 4)]
    for smaller, larger in itertools.pairwise(masks):
        assert not bool((smaller & ~larger).any())


def rows(text: str) -> Tensor:
    return torch.tensor([[c == "1" for c in line] for line in text.split()])


def test_two_of_four_by_hand():
    scores = torch.tensor([[3, 1, 2, 0.5, 1, 1, 1, 1], [0, 0, 0, 0, -4, -3, -2, -1], [0, 7, 7, 7, 9, 0, 0, 9]])
    assert torch.equal(topk_mask(scores, 0.5, "2:4"), rows("10101100 11000011 01101001"))


def test_nm_groups_run_along_input_channels_and_not_across_kernel_positions():
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])  # at position 0 the last two channels win,
    scores[0, :, 0, 1] = torch.tensor([40.0, 30, 20, 10])  # at position 1 the first two
    mask = topk_mask(scores, 0.5, NM(2, 4))
    assert mask[0, :, 0, 0].tolist() == [False, False, True, True]
    assert mask[0, :, 0, 1].tolist() == [True, True, False, False]


def test_blocks_by_hand():
    scores = torch.tensor([[1, 5, 0, 0], [1, 0, 0, 9], [2, 2, 4, 0], [2, 2, 0, 0.0]])
    # 2x1: sums [2, 5, 0, 9; 4, 4, 4, 0]; half of the eight: 9, 5, and the first two of the three fours
    assert torch.equal(topk_mask(scores, 0.5, Block(2, 1)), rows("0101 0101 1100 1100"))
    # 1x2: sums [6, 0; 1, 9; 4, 4; 4, 0]; half of the eight: 9, 6, and the first two of the three fours
    assert torch.equal(topk_mask(scores, 0.5, Block(1, 2)), rows("1100 0011 1111 0000"))
    # 2x2: sums [7, 9; 8, 4]
    assert torch.equal(topk_mask(scores, 0.5, Block(2, 2)), rows("0011 0011 1100 1100"))
    # channel: sums 6, 10, 8, 4
    assert torch.equal(topk_mask(scores, 0.5, Channel()), rows("0000 1111 1111 0000"))


def test_blocks_do_not_cross_kernel_positions():
    scores = torch.zeros(4, 1, 1, 2)
    scores[..., 1] = 1
    mask = topk_mask(scores, 0.5, "4x1")
    assert bool(mask[..., 1].all())
    assert not bool(mask[..., 0].any())


def test_ties_keep_the_lower_index():
    assert topk_mask(torch.ones(10), 0.3).tolist() == [True] * 3 + [False] * 7
    assert topk_mask(torch.tensor([0.0, -0.0, 0.0, -0.0]), 0.5).tolist() == [True, True, False, False]
    assert torch.equal(topk_mask(torch.ones(4, 4), 0.25, "2x2"), rows("1100 1100 0000 0000"))


def test_degenerate_patterns_equal_the_plain_ones():
    scores = torch.randn(8, 8, 3, 3)
    for density in (0.1, 0.5, 0.75):
        assert torch.equal(topk_mask(scores, density, "1x1"), topk_mask(scores, density))
    linear = torch.randn(8, 8).double()
    assert torch.equal(topk_mask(linear, 0.5, Block(1, 8)), topk_mask(linear, 0.5, Channel()))
    assert bool(topk_mask(scores, 1.0, NM(4, 4)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_any_real_dtype_and_layout_of_scores_gives_the_same_mask(dtype):
    scores = torch.randint(0, 2 if dtype == torch.bool else 9, (8, 4, 3, 3))
    for pattern in ("unstructured", "4x1", "channel"):
        expected = topk_mask(scores.double(), 0.5, pattern)
        assert torch.equal(topk_mask(scores.to(dtype), 0.5, pattern), expected)
        assert torch.equal(topk_mask(scores.to(memory_format=torch.channels_last).to(dtype), 0.5, pattern), expected)
    nm = topk_mask(scores.to(memory_format=torch.channels_last).to(dtype), 0.5, "2:4")
    assert torch.equal(nm, topk_mask(scores.double(), 0.5, "2:4"))


def test_scores_that_need_gradients_are_read_without_them():
    scores = torch.randn(4, 4, requires_grad=True)
    assert not topk_mask(scores, 0.5).requires_grad


def test_infinite_scores_are_ranked():
    scores = torch.tensor([float("-inf"), 1.0, float("inf"), 2.0])
    assert topk_mask(scores, 0.5).tolist() == [False, False, True, True]


def test_nan_scores_are_an_error():
    for pattern in ("unstructured", "2:4", "2x1", "channel"):
        scores = torch.ones(4, 4)
        scores[1, 2] = float("nan")
        with pytest.raises(ValueError, match="1 of 16 scores are NaN"):
            topk_mask(scores, 0.5, pattern)
    scores = torch.tensor([[float("inf"), float("-inf")], [0.0, 0.0]])
    with pytest.raises(ValueError, match="no sum"):
        topk_mask(scores, 0.5, "channel")
    with pytest.raises(TypeError, match="real scores"):
        topk_mask(torch.ones(2, 2, dtype=torch.complex64), 0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_density_out_of_range_is_an_error(density):
    for ask in (
        lambda: kept_count((4, 4), density),
        lambda: topk_mask(torch.ones(4, 4), density),
        lambda: zero_count(9, density),
    ):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            ask()


@pytest.mark.parametrize("density", [True, "0.5", None])
def test_a_density_that_is_no_number_is_a_type_error(density):
    with pytest.raises(TypeError, match="as a number"):
        check_density(density)


def test_nm_refuses_another_density():
    with pytest.raises(ValueError, match=r"2:4 has density 0\.5 .* got density 0\.25"):
        kept_count((4, 4), 0.25, "2:4")
    assert kept_count((4, 6), 1 / 3, "1:3") == 8
    assert kept_count((4, 6), 0.333333333333, "1:3") == 8


def test_an_impossible_pattern_is_an_error_everywhere():
    with pytest.raises(PatternError, match="divisible by 4"):
        kept_count((4, 6), 0.5, "2:4")
    with pytest.raises(PatternError, match="divisible by 4"):
        topk_mask(torch.ones(6, 4), 0.5, "4x1")
    with pytest.raises(PatternError, match="at least 2"):
        random_mask((1, 4), 0.5, "channel", torch.Generator())


def test_random_masks_repeat_with_the_seed_and_differ_without_it():
    draws = [
        random_mask((32, 16), 0.25, p, torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
        for p in ("unstructured", "1:4")
    ]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[4])
    assert not torch.equal(draws[1], draws[5])


@pytest.mark.parametrize("pattern", ["unstructured", "1:4", "2x1", "channel"])
def test_random_masks_keep_every_weight_equally_often(pattern):
    generator = torch.Generator().manual_seed(5)
    n = 4000
    often = sum(random_mask((8, 4), 0.25, pattern, generator).double() for _ in range(n)) / n
    assert float((often - 0.25).abs().max()) < 0.035  # five standard deviations of a share of 1/4 among 4000


def test_a_random_mask_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    random_mask((8, 8), 0.5, "2:4", torch.Generator().manual_seed(0))
    random_mask((8, 8), 0.5, "unstructured", torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_satisfies_sees_one_wrong_weight():
    for text in ("2:4", "4x1", "1x4", "channel"):
        mask = topk_mask(torch.randn(8, 8, 3, 3), 0.5, text)
        assert satisfies(mask, text)
        mask[5, 3, 1, 2] = ~mask[5, 3, 1, 2]
        assert not satisfies(mask, text)
        assert satisfies(mask, Unstructured())
    assert not satisfies(torch.ones(4, 6, dtype=torch.bool), "2:4")  # impossible on this shape
    assert not satisfies(torch.ones(4, 8, dtype=torch.bool), "2:4")  # four of four, not two
    with pytest.raises(TypeError, match="bool"):
        satisfies(torch.ones(4, 4), "unstructured")
