"""Pooling in lanes against torch, with NaN in every place a kernel must not let into the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from ops.kernels.lanes import LANES, Layout, conv_source_layout, covered, default_layout, from_lanes, to_lanes
from ops.kernels.pooling import avg_pool_step, global_average_step, max_pool_step
from ops.kernels.program import run_step
from ops.kernels.step import aligned

WINDOWS = [  # kernel, stride, padding
    ((2, 2), (2, 2), 0),
    ((3, 3), (1, 1), 1),
    ((3, 3), (2, 2), 1),
    ((5, 5), (1, 1), 2),
    ((3, 2), (1, 2), 1),
    ((7, 7), (1, 1), 3),
]
SIZES = [(1, 1), (5, 5), (7, 7), (8, 8), (14, 14), (16, 28), (30, 11)]


def _buffer(x: torch.Tensor, layout: Layout, halo_is_valid: bool) -> npt.NDArray[np.float32]:
    """x in lanes; NaN in lanes of no image, in foreign channels, and beyond the image unless the halo is valid."""
    values = to_lanes(x.numpy(), layout).reshape(-1, layout.pitch, LANES)
    values[:, :, layout.images * layout.grid[0] * layout.grid[1] :] = np.nan
    values[:, layout.channels :] = np.nan
    values = values.reshape(-1)
    if not halo_is_valid:
        known = np.zeros(layout.size, bool)
        known[layout.index] = True
        values[~known] = np.nan
    return aligned(values)


def _run(step, x, layout: Layout, threads: int = 1) -> npt.NDArray[np.float32]:
    """The result as [batch, channels, height, width]; nothing may be written outside the output's tiles and channels."""
    output = aligned(np.full(layout.size, np.nan, np.float32))
    run_step(step, [x], output, threads)
    (top, _, left, _), (height, width) = layout.halo, layout.block
    places = output.reshape(layout.groups, layout.rows, layout.columns, layout.pitch, LANES).copy()
    places[:, top : top + height, left : left + width, : layout.channels] = np.nan
    assert np.isnan(places).all(), "written outside the output"
    return from_lanes(output, layout)


def _layouts(
    x: torch.Tensor, expected: torch.Tensor, kernel, stride, padding, dilation, more=0
) -> tuple[Layout, Layout]:
    """Of input and output, with `more` channels between tiles and more halo than needed."""
    target = default_layout(*expected.shape, covered(tuple(x.shape[2:]), stride))
    source = conv_source_layout(target, tuple(x.shape), kernel, stride, padding, dilation)
    source = replace(source, halo=tuple(h + more for h in source.halo), pitch=source.channels + more)
    return source, replace(target, halo=(more,) * 4, pitch=target.channels + more)


def _possible(size, kernel, dilation, pad) -> bool:
    return all(s + 2 * pad >= d * (k - 1) + 1 and 2 * pad <= k for s, k, d in zip(size, kernel, dilation))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17])
@pytest.mark.parametrize(("kernel", "stride", "pad"), WINDOWS)
def test_max_pooling_equals_torch(batch, kernel, stride, pad):
    for size in SIZES if batch <= 3 else SIZES[:4]:
        for dilation in ((1, 1), (2, 1)):
            if not _possible(size, kernel, dilation, pad):
                continue
            x = -torch.rand(batch, 5, *size) - 1  # all negative: a zero from the halo would win
            expected = F.max_pool2d(x, kernel, stride, pad, dilation)
            source, target = _layouts(x, expected, kernel, stride, (pad,) * 4, dilation, more=batch % 2)
            step = max_pool_step(kernel, stride, (pad,) * 4, dilation, source, target)
            for threads in (1, 3):
                assert (
                    _run(step, _buffer(x, source, pad > 0 or dilation != (1, 1)), target, threads) == expected.numpy()
                ).all()


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "pad"), WINDOWS)
def test_average_pooling_equals_torch(batch, include, kernel, stride, pad):
    for size in SIZES if batch <= 3 else SIZES[:4]:
        if not _possible(size, kernel, (1, 1), pad):
            continue
        x = torch.randn(batch, 5, *size)
        expected = F.avg_pool2d(x, kernel, stride, pad, count_include_pad=include)
        source, target = _layouts(x, expected, kernel, stride, (pad,) * 4, (1, 1), more=batch % 2)
        step = avg_pool_step(kernel, stride, (pad,) * 4, include, source, target)
        values = _buffer(x, source, pad > 0)
        for threads in (1, 3):
            result = _run(step, values, target, threads)
            np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_a_maximum_never_sees_what_lies_beyond_the_image_whatever_it_is():
    """Here the halo is not valid at all; only pixels of neighbouring blocks are there."""
    x = torch.randn(1, 3, 13, 9)
    expected = F.max_pool2d(x, 3, 1, 1)
    source, target = _layouts(x, expected, (3, 3), (1, 1), (1,) * 4, (1, 1))
    ones = _buffer(torch.ones_like(x), source, True)
    values = _buffer(x, source, True)
    values[ones != 1] = np.nan
    step = max_pool_step((3, 3), (1, 1), (1,) * 4, (1, 1), source, target)
    assert (_run(step, values, target) == expected.numpy()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_reaches_the_windows_it_is_in(value):
    x = torch.randn(1, 2, 12, 12)
    x[0, 0, 5, 6] = float(value)
    x[0, 1] = float(value)
    source, target = _layouts(x, x, (3, 3), (1, 1), (1,) * 4, (1, 1))
    geometry = (3, 3), (1, 1), (1,) * 4
    for step, expected in (
        (max_pool_step(*geometry, (1, 1), source, target), F.max_pool2d(x, 3, 1, 1)),
        (avg_pool_step(*geometry, True, source, target), F.avg_pool2d(x, 3, 1, 1)),
    ):
        result = _run(step, _buffer(x, source, True), target)
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17])
def test_global_average_counts_the_pixels_of_the_image_only(size, batch):
    for channels, more in ((1, 0), (6, 1), (17, 0)):
        x = torch.randn(batch, channels, *size) + 1
        layout = default_layout(batch, channels, *size)
        layout = replace(layout, halo=(more,) * 4, pitch=channels + more)
        step = global_average_step(layout)
        for threads in (1, 3):
            result = np.full(batch * channels + 2, np.nan, np.float32)
            run_step(step, [_buffer(x, layout, False)], result[1:-1], threads)
            assert np.isnan(result[[0, -1]]).all()
            np.testing.assert_allclose(
                result[1:-1].reshape(batch, channels), x.mean((2, 3)).numpy(), rtol=1e-5, atol=1e-6
            )


def test_a_result_of_ceil_mode_and_other_misfits_are_refused():
    x = torch.randn(1, 4, 7, 7)
    expected = F.max_pool2d(x, 2, 2, ceil_mode=True)
    source, target = _layouts(x, expected, (2, 2), (2, 2), (0,) * 4, (1, 1))
    with pytest.raises(ValueError, match="ceil_mode"):
        max_pool_step((2, 2), (2, 2), (0,) * 4, (1, 1), source, target)
    source, target = _layouts(x, x, (3, 3), (1, 1), (1,) * 4, (1, 1))
    with pytest.raises(ValueError, match="with a halo of"):
        avg_pool_step((3, 3), (1, 1), (1,) * 4, True, source.with_halo((0, 0, 0, 0)), target)
    with pytest.raises(ValueError, match="channels"):
        avg_pool_step((3, 3), (1, 1), (1,) * 4, True, source.with_channels(5), target)
