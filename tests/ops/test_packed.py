"""Every packed format, one law: weight, mask and places come back, and broken arrays are told from good ones."""

import dataclasses
import re
from math import ceil, log2, prod
from typing import Any

import numpy as np
import pytest
import torch

from ops.formats import CSR, BlockCSR, ChannelPacked, FormatError, NMPacked, Packed, pack
from ops.masks import random_mask, satisfies
from ops.patterns import NM, Block, Channel, Pattern, PatternError, parse_pattern

PATTERNS = ("unstructured", "4x1", "1x4", "2x3", "1x1", "16x8", "2:4", "1:4", "4:4", "3:5", "1:2", "2:3", "channel")
SHAPES = ((16, 24), (2, 4), (12, 20), (16, 24, 3, 3), (8, 15, 1, 3), (32, 16, 2, 1), (4, 60, 1, 1), (6, 8, 5))
DENSITIES = (0.01, 0.3, 0.75, 1.0)


def _cases() -> list[tuple[str, tuple[int, ...], float]]:
    cases = []
    for text in PATTERNS:
        pattern = parse_pattern(text)
        for shape in SHAPES:
            for density in DENSITIES if pattern.fixed_density is None else (pattern.fixed_density,):
                if pattern.illegal(shape) is None:
                    cases.append((text, shape, density))
    return cases


def _drawn(text: str, shape: tuple[int, ...], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with zeros everywhere, and a mask of the pattern."""
    generator = torch.Generator().manual_seed(prod(shape))
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.2] = 0
    return weight, random_mask(shape, density, text, generator)


def _bytes(pattern: Pattern, shape: tuple[int, ...], nnz: int) -> int:
    """The formulas of the docstrings, written again from the pattern."""
    out = shape[0]
    match pattern:
        case NM(_, m):
            return 4 * nnz + out * ceil(nnz // out * ceil(log2(m)) / 8)
        case Block(rows, cols):
            return 4 * nnz + 4 * (nnz // (rows * cols)) + 4 * (out // rows + 1)
        case Channel():
            return 4 * nnz + 4 * (nnz // prod(shape[1:]))
    return 8 * nnz + 4 * (out + 1)


@pytest.mark.parametrize(("text", "shape", "density"), _cases())
def test_every_format_gives_back_weight_and_mask(text: str, shape: tuple[int, ...], density: float) -> None:
    pattern = parse_pattern(text)
    weight, mask = _drawn(text, shape, density)
    packed = pack(weight, mask, text)
    packed.check()
    own = (shape[0], prod(shape[1:])) if text == "unstructured" else shape
    assert packed.shape == own
    assert torch.equal(packed.mask(), mask.view(own)), "kept zeros must keep their place"
    assert torch.equal(packed.to_dense(), (weight * mask).view(own))
    assert packed.to_dense().is_contiguous()
    assert packed.pattern == pattern
    assert satisfies(packed.mask(), packed.pattern)
    assert packed.nnz == int(mask.sum())
    assert (
        packed.nbytes == sum(array.nbytes for array in packed.arrays().values()) == _bytes(pattern, shape, packed.nnz)
    )
    assert torch.equal(pack(packed.to_dense(), packed.mask(), pattern).to_dense(), packed.to_dense())
    rows = packed.to_csr()
    rows.check()
    expected = CSR.from_dense(weight.flatten(1), mask.flatten(1))
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(rows.arrays()[name], array)


@pytest.mark.parametrize("text", ["4x1", "2:4", "channel"])
def test_nothing_outside_the_mask_is_looked_at_and_nothing_inside_is_lost(text: str) -> None:
    weight, mask = _drawn(text, (8, 8, 3, 3), 0.5)
    weight[~mask] = float("nan")
    packed = pack(weight, mask, text)
    assert torch.equal(packed.to_dense(), torch.where(mask, weight, 0.0))
    weight[mask] = float("-inf")
    assert torch.equal(pack(weight, mask, text).to_dense() == float("-inf"), mask)
    assert torch.equal(pack(torch.zeros(8, 8, 3, 3), mask, text).mask(), mask)


@pytest.mark.parametrize("text", ["unstructured", "4x1", "channel"])
def test_a_mask_that_keeps_nothing_is_held(text: str) -> None:
    packed = pack(torch.ones(8, 4, 3, 3), torch.zeros(8, 4, 3, 3, dtype=torch.bool), text)
    packed.check()
    assert packed.nnz == 0
    assert not packed.to_dense().any()
    assert packed.nbytes == _bytes(parse_pattern(text), (8, 4, 3, 3), 0)


def test_where_the_arrays_put_what() -> None:
    weight = torch.arange(32.0).view(4, 4, 1, 2)
    mask = torch.zeros(4, 4, 1, 2, dtype=torch.bool)
    mask[2:, 2:, 0, 1] = True
    block = BlockCSR.from_dense(weight, mask, rows=2, cols=2)
    assert block.indptr.tolist() == [0, 0, 1]
    assert block.indices.tolist() == [3]  # second pair of input channels, second kernel position
    assert block.values.tolist() == [[[21, 23], [29, 31]]]

    keep = torch.tensor([[True, False, False, True], [False, True, True, False], [False, False, True, True]])
    two_of_four = NMPacked.from_dense(torch.arange(12.0).view(3, 4), keep)
    assert two_of_four.values.tolist() == [[[0, 3]], [[5, 6]], [[10, 11]]]
    assert two_of_four.places.tolist() == [[[0, 3]], [[1, 2]], [[2, 3]]]
    assert two_of_four.positions.tolist() == [[0b1100], [0b1001], [0b1110]]

    channel = ChannelPacked.from_dense(weight[:, :1], mask.any(1, keepdim=True).any(3, keepdim=True).expand(4, 1, 1, 2))
    assert channel.channels.tolist() == [2, 3]
    assert channel.values.tolist() == [[[[16, 17]]], [[[24, 25]]]]


def test_without_a_mask_units_that_are_not_all_zero_are_stored() -> None:
    weight = torch.zeros(4, 4)
    weight[1, 2] = weight[3, 0] = 1
    assert BlockCSR.from_dense(weight, rows=2, cols=2).mask().int().tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert ChannelPacked.from_dense(weight).channels.tolist() == [1, 3]
    filled = NMPacked.from_dense(weight)  # the first zeros fill up
    filled.check()
    assert filled.mask().int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert torch.equal(filled.to_dense(), weight)


def test_other_types_and_strides_become_contiguous_float32() -> None:
    weight = torch.randn(3, 3, 8, 8, dtype=torch.float64).permute(3, 2, 0, 1)
    mask = random_mask((8, 8, 3, 3), 0.5, "2:4", torch.Generator().manual_seed(0)).permute(0, 1, 3, 2)
    for text in ("2:4", "1x1", "unstructured"):
        packed = pack(weight, mask, text)
        packed.check()
        assert torch.equal(packed.to_dense().view(8, 8, 3, 3), torch.where(mask, weight, 0.0).float())


def _mask(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _with(mask: torch.Tensor, *place: int) -> torch.Tensor:
    mask[place] = ~mask[place]
    return mask


@pytest.mark.parametrize(
    ("text", "shape", "mask", "part"),
    [
        ("4x1", (8, 4, 3, 3), _with(_mask(8, 4, 3, 3), 5, 2, 0, 1),
         "4x1 blocks whole, but it keeps 3 of 4 weights in the block of output channels 4 to 7 and input channel 2 at kernel "
         "position (0, 1) (1 such blocks)"),
        ("1x2", (8, 4), _with(_mask(8, 4), 5, 2), "output channels 5 to 5 and input channels 2 to 3 (1 such blocks)"),
        ("2:4", (2, 8, 1, 3), _with(_mask(2, 8, 1, 3), 1, 6, 0, 2),
         "exactly 2 weights kept by the mask in every group of 4 input channels, got 4 in output channel 0, input channels 0 to 3 "
         "at kernel position (0, 0) (12 such groups)"),
        ("4:4", (2, 8), _with(_mask(2, 8), 1, 6), "got 3 in output channel 1, input channels 4 to 7 (1 such groups)"),
        ("channel", (4, 2, 3, 3), _with(_mask(4, 2, 3, 3), 2, 0, 0, 0), "17 of 18 weights of channel 2 (1 such channels)"),
        ("4x1", (8, 4), _mask(8, 3), "bool[8, 4] like the weight, got torch.bool[8, 3]"),
        ("channel", (8, 4), torch.ones(8, 4), "bool[8, 4] like the weight, got torch.float32[8, 4]"),
        ("unstructured", (8, 2, 2), _mask(8, 4), "bool[8, 2, 2] like the weight, got [8, 4]"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused_by_name(
    text: str, shape: tuple[int, ...], mask: torch.Tensor, part: str
) -> None:
    with pytest.raises(FormatError, match=re.escape(part)):
        pack(torch.ones(shape), mask, text)


@pytest.mark.parametrize(
    ("text", "shape", "part"),
    [
        ("4x1", (6, 4), "output channels divisible by 4, got weight [6, 4]"),
        ("2:4", (4, 6, 3, 3), "axis 1 has length 6"),
        ("channel", (1, 4), "at least 2 output channels"),
        ("diagonal", (4, 4), "unknown pattern"),
    ],
)
def test_shapes_a_pattern_cannot_have_are_refused(text: str, shape: tuple[int, ...], part: str) -> None:
    with pytest.raises(PatternError, match=re.escape(part)):
        pack(torch.ones(shape), _mask(*shape), text)


def test_each_format_refuses_a_shape_its_pattern_cannot_have() -> None:
    with pytest.raises(FormatError, match=r"BlockCSR: 4x1 blocks need .* divisible by 4, got weight \[6, 4\]"):
        BlockCSR.from_dense(torch.ones(6, 4), rows=4, cols=1)
    with pytest.raises(FormatError, match=r"NMPacked: 2:4 sparsity needs .*axis 1 has length 6"):
        NMPacked.from_dense(torch.ones(4, 6, 3, 3))
    with pytest.raises(FormatError, match="ChannelPacked: channel sparsity needs at least 2"):
        ChannelPacked.from_dense(torch.ones(1, 4))


def test_more_than_n_of_m_and_weights_without_values_are_refused() -> None:
    with pytest.raises(FormatError, match="at most 2 weights that are not 0 in every group of 4 input channels, got 4"):
        NMPacked.from_dense(torch.ones(2, 4))
    for text in ("unstructured", "4x1", "2:4", "channel"):
        with pytest.raises(FormatError, match="on the meta device, which has no values"):
            pack(torch.ones(4, 4, device="meta"), _mask(4, 4), text)


_BLOCK = BlockCSR.from_dense(torch.ones(6, 4, 2), rows=3, cols=2)
_NM = NMPacked.from_dense(torch.eye(3).repeat(1, 2), n=2, m=3)
_CHANNEL = ChannelPacked.from_dense(torch.tensor([[1.0, 1], [0, 0], [1, 1]]))


@pytest.mark.parametrize(
    ("good", "change"),
    [
        (_BLOCK, {"shape": (6, 5, 2)}),
        (_BLOCK, {"shape": (9, 4, 2)}),
        (_BLOCK, {"rows": 2}),
        (_BLOCK, {"indptr": np.array([0, 5, 4], np.int32)}),
        (_BLOCK, {"indptr": np.array([1, 4, 8], np.int32)}),
        (_BLOCK, {"indptr": np.array([0, 3, 8], np.int32)}),
        (_BLOCK, {"indices": np.array([0, 1, 2, 3, 0, 1, 2, 4], np.int32)}),
        (_BLOCK, {"indices": np.array([0, 1, 1, 3, 0, 1, 2, 3], np.int32)}),
        (_BLOCK, {"indices": np.array([-1, 1, 2, 3, 0, 1, 2, 3], np.int32)}),
        (_BLOCK, {"values": np.ones((8, 2, 3), np.float32)}),
        (_BLOCK, {"values": np.ones((8, 3, 2))}),
        (_NM, {"shape": (3, 7)}),
        (_NM, {"n": 1}),
        (_NM, {"values": np.ones((3, 2, 2), np.float32).transpose(0, 2, 1)}),
        (_NM, {"positions": np.zeros((3, 1), np.uint8)}),  # the same place twice
        (_NM, {"positions": np.full((3, 1), 0b11_01_11_01, np.uint8)}),  # place 3 of 3
        (_NM, {"positions": np.full((3, 1), 0b00_01_00_01, np.uint8)}),  # falling
        (_NM, {"positions": np.full((3, 2), 0b10_01_10_01, np.uint8)}),
        (_CHANNEL, {"channels": np.array([2, 0], np.int32)}),
        (_CHANNEL, {"channels": np.array([0, 3], np.int32)}),
        (_CHANNEL, {"channels": np.array([0, 2])}),
        (_CHANNEL, {"shape": (3, 1)}),
        (_CHANNEL, {"shape": (3,)}),
    ],
)
def test_check_refuses_arrays_of_every_format_that_are_not_canonical(good: Packed, change: dict[str, Any]) -> None:
    good.check()
    with pytest.raises(FormatError):
        dataclasses.replace(good, **change).check()  # type: ignore[type-var]


def test_bits_left_over_are_zero() -> None:
    packed = NMPacked.from_dense(torch.eye(3), n=1, m=3)
    packed.check()
    assert packed.positions.tolist() == [[0], [1], [2]]
    with pytest.raises(FormatError, match="bits left over"):
        dataclasses.replace(packed, positions=packed.positions + np.uint8(4)).check()
