"""The lane layout: every pixel has one place, conversions invert each other, and convolution taps are constant offsets."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ops.formats import CSR
from ops.kernels.lanes import (
    LANES,
    Layout,
    conv_offsets,
    conv_source_layout,
    covered,
    default_layout,
    from_lanes,
    padded_pitch,
    to_lanes,
)


def _layout(seed: int) -> Layout:
    pick = random.Random(seed).choice
    layout = default_layout(pick([1, 2, 3, 17]), pick([1, 3, 5]), pick([1, 5, 7, 8, 14]), pick([1, 4, 7, 9, 28]))
    layout = layout.with_channels(layout.channels, layout.channels + pick([0, 2]))
    return layout.with_halo((pick([0, 1]), pick([0, 2]), pick([0, 1]), pick([0, 3])))


@pytest.mark.parametrize("seed", range(40))
def test_every_pixel_has_one_place_of_its_own_and_comes_back(seed: int) -> None:
    layout = _layout(seed)
    assert np.unique(layout.index).size == layout.index.size
    assert layout.index.min() >= 0
    assert layout.index.max() < layout.size
    x = np.random.default_rng(seed).normal(size=layout.index.shape).astype(np.float32)
    np.testing.assert_array_equal(from_lanes(to_lanes(x, layout), layout), x)


@pytest.mark.parametrize("seed", range(40))
def test_taps_are_constant_offsets_with_zeros_beyond_the_image(seed: int) -> None:
    pick = random.Random(seed).choice
    groups, kernel = pick([1, 1, 2]), (pick([1, 3, 5]), pick([1, 2, 3]))
    stride, dilation = (pick([1, 2]), pick([1, 2])), (pick([1, 2]), pick([1, 3]))
    padding = (pick([0, 1, 3]), pick([0, 2]))
    shape = (pick([1, 3]), 2 * groups, pick([11, 14]), pick([10, 16]))
    x, weight = torch.randn(shape), torch.randn(2 * groups, 2, *kernel)
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    target = default_layout(*expected.shape, cover=covered(shape[2:], stride))
    sides = (padding[0], padding[0], padding[1], padding[1])
    source = conv_source_layout(target, shape, kernel, stride, sides, dilation)
    packed = CSR.from_dense(weight.flatten(1))
    offsets = conv_offsets(packed, kernel, sides, dilation, groups, source)
    buffer, result = to_lanes(x.numpy(), source), np.zeros(target.size, np.float32)
    for group, ty, tx in np.ndindex(target.groups, *target.block):
        place = source.origin + group * source.group_step
        place += ty * stride[0] * source.row_step + tx * stride[1] * source.tile_step
        out = target.origin + group * target.group_step + ty * target.row_step + tx * target.tile_step
        for row in range(packed.shape[0]):
            for k in range(packed.indptr[row], packed.indptr[row + 1]):
                start = place + offsets[k]
                vector = packed.values[k] * buffer[start : start + LANES]
                result[out + row * LANES : out + (row + 1) * LANES] += vector
    np.testing.assert_allclose(from_lanes(result, target), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1, 8, 56, 56), 196),
        ((1, 8, 28, 28), 49),
        ((1, 8, 14, 14), 14),
        ((1, 8, 7, 7), 4),
        ((64, 8, 1, 1), 4),
        ((1, 8, 1, 1), 1),
    ],
)
def test_the_default_layout_wastes_as_little_as_16_lanes_allow(shape: tuple[int, int, int, int], tiles: int) -> None:
    assert default_layout(*shape).tiles == tiles


def test_powers_of_two_keep_one_grid_from_resolution_to_resolution() -> None:
    assert {default_layout(1, 8, n, n).grid for n in (4, 8, 16, 32, 64, 128)} == {(4, 4)}


@pytest.mark.parametrize("channels", range(1, 200))
def test_the_pitch_is_odd_and_just_above_the_channels(channels: int) -> None:
    assert channels <= padded_pitch(channels) <= channels + 7
    assert padded_pitch(channels) % 2 == 1


def test_a_layout_that_does_not_cover_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="does not cover"):
        Layout(1, 3, 9, 9, 1, (4, 4), (2, 2))
    with pytest.raises(ValueError, match="1 to 16 lanes"):
        Layout(1, 3, 9, 9, 2, (4, 4))
