"""Depthwise convolution in lanes against its twin and torch, with NaN in every place a kernel must not let into the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from ops.formats import CSR
from ops.kernels import depthwise
from ops.kernels.depthwise import depthwise_step, line_groups
from ops.kernels.lanes import LANES, Layout, conv_source_layout, covered, default_layout, from_lanes, to_lanes
from ops.kernels.program import run_step
from ops.kernels.step import aligned
from ops.reference import csr_conv2d

ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


def _buffer(x: torch.Tensor, layout: Layout) -> npt.NDArray[np.float32]:
    """x in lanes with a valid halo; NaN in lanes of no image, in foreign channels, and beyond the image if there is no halo."""
    values = to_lanes(x.numpy(), layout).reshape(-1, layout.pitch, LANES)
    values[:, :, layout.images * layout.grid[0] * layout.grid[1] :] = np.nan
    values[:, layout.channels :] = np.nan
    values = values.reshape(-1)
    if not any(layout.halo):
        known = np.zeros(layout.size, bool)
        known[layout.index] = True
        values[~known] = np.nan
    return aligned(values)


def _run(step, inputs, layout: Layout, threads: int = 1) -> npt.NDArray[np.float32]:
    """The result as [batch, channels, height, width]; nothing may be written outside the output's tiles and channels."""
    output = aligned(np.full(layout.size, np.nan, np.float32))
    run_step(step, inputs, output, threads)
    (top, _, left, _), (height, width) = layout.halo, layout.block
    places = output.reshape(layout.groups, layout.rows, layout.columns, layout.pitch, LANES).copy()
    places[:, top : top + height, left : left + width, : layout.channels] = np.nan
    assert np.isnan(places).all(), "written outside the output"
    return from_lanes(output, layout)


def _weight(rows: int, taps: int, density: float) -> tuple[torch.Tensor, CSR]:
    weight, mask = torch.randn(rows, taps), torch.rand(rows, taps) < density
    if 0 < density < 1:
        mask[0], mask[rows // 2] = False, True  # an empty channel and a full one
    return weight * mask, CSR.from_dense(weight, mask)


def _case(
    *, channels=6, multiplier=1, batch=1, size=(8, 8), kernel=(3, 3), stride=(1, 1), dilation=(1, 1), density=1.0,
    activation="none", bias=True, residual=False, threads=1, pitch=0, halo=0,
) -> None:  # fmt: skip
    rows = channels * multiplier
    dense, csr = _weight(rows, kernel[0] * kernel[1], density)
    x, b = torch.randn(batch, channels, *size), torch.randn(rows) if bias else None
    pad = [d * (k - 1) // 2 for d, k in zip(dilation, kernel)]
    expected = F.conv2d(x, dense.reshape(rows, 1, *kernel), b, stride, pad, dilation, channels)
    target = default_layout(batch, rows, *expected.shape[2:], covered(size, stride))
    padding = (pad[0], pad[0], pad[1], pad[1])
    source = conv_source_layout(target, tuple(x.shape), kernel, stride, padding, dilation)
    source = replace(source, halo=tuple(h + halo for h in source.halo), pitch=channels + pitch)
    other = target.with_channels(rows, rows + pitch).with_halo((0, 1, 1, 0))
    target = target.with_channels(rows, rows + pitch).with_halo((halo,) * 4)
    inputs = [_buffer(x, source)]
    if residual:
        r = torch.randn_like(expected)
        expected = expected + r
        inputs.append(_buffer(r, other))
    step = depthwise_step(
        csr, kernel, None if b is None else b.numpy(), stride, padding, dilation, source, target, activation,
        other if residual else None,
    )  # fmt: skip
    result = _run(step, inputs, target, threads)
    np.testing.assert_allclose(result, ACTIVATIONS[activation](expected).numpy(), rtol=2e-5, atol=2e-5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 1), (7, 7), (3, 1), (1, 5)])
def test_depthwise_equals_torch_for_every_kernel_and_density(kernel, density):
    for size in ((7, 7), (8, 8), (28, 14)):
        _case(kernel=kernel, density=density, size=size)


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (7, 7), (14, 14), (16, 16), (28, 28), (11, 30), (44, 13)])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 17])
def test_depthwise_equals_torch_for_every_size_and_batch(size, batch):
    for density in (1.0, 0.4):
        _case(size=size, batch=batch, channels=5, density=density)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 3)])
def test_strides_and_dilations_equal_torch(stride, dilation):
    for size in ((16, 16), (15, 28)):
        for density in (1.0, 0.3):
            _case(stride=stride, dilation=dilation, size=size, density=density)
            _case(stride=stride, dilation=dilation, size=size, density=density, kernel=(5, 5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_residual_bias_and_activation_apply_in_that_order(activation, threads, density):
    for size, batch in (((8, 8), 1), ((14, 14), 2), ((28, 28), 1), ((5, 9), 3)):
        for residual in (False, True):
            _case(
                size=size, batch=batch, residual=residual, activation=activation, threads=threads, density=density,
                pitch=3, halo=1, bias=batch != 2,
            )  # fmt: skip


@pytest.mark.parametrize("multiplier", [2, 3])
def test_several_outputs_may_read_one_input_channel(multiplier):
    for density in (1.0, 0.5):
        _case(multiplier=multiplier, density=density, size=(14, 14), residual=True)


def test_uneven_padding_equals_reference():
    _, csr = _weight(4, 8, 0.7)
    x, padding = torch.randn(1, 4, 9, 10), (1, 0, 2, 3)
    expected = csr_conv2d(x.numpy(), csr, (2, 4), None, (1, 1), padding, (1, 1), 4, "relu6")
    target = default_layout(1, 4, *expected.shape[2:], (9, 10))
    source = conv_source_layout(target, tuple(x.shape), (2, 4), (1, 1), padding, (1, 1))
    step = depthwise_step(csr, (2, 4), None, (1, 1), padding, (1, 1), source, target, "relu6")
    np.testing.assert_allclose(_run(step, [_buffer(x, source)], target), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_nan_reaches_only_results_of_kept_taps(density):
    _, csr = _weight(3, 9, density)
    x = torch.randn(1, 3, 8, 8)
    x[0, :, 4, 4] = torch.nan
    target = default_layout(1, 3, 8, 8)
    source = conv_source_layout(target, (1, 3, 8, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    step = depthwise_step(csr, (3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), source, target)
    result = _run(step, [_buffer(x, source)], target)
    reached = np.zeros((1, 3, 8, 8), bool)
    reached[0, :, 3:6, 3:6] = np.flip(csr.mask().numpy().reshape(3, 3, 3), (1, 2))
    assert (np.isnan(result) == reached).all()


def test_one_thread_and_several_give_the_same_bits(monkeypatch):
    """Also with the narrower pieces of machines without AVX-512."""
    for widest in (8, 4):
        monkeypatch.setitem(depthwise.WIDEST, depthwise.isa(), widest)
        for size in ((8, 8), (14, 14), (28, 28)):
            for density in (1.0, 0.5):
                _, csr = _weight(7, 9, density)
                x, target = torch.randn(1, 7, *size), default_layout(1, 7, *size)
                source = conv_source_layout(target, (1, 7, *size), (3, 3), (1, 1), (1,) * 4, (1, 1))
                step = depthwise_step(csr, (3, 3), None, (1, 1), (1,) * 4, (1, 1), source, target, "silu")
                one, *more = [_run(step, [_buffer(x, source)], target, threads) for threads in (1, 2, 3, 5)]
                assert all((one == other).all() for other in more)
                expected = F.silu(F.conv2d(x, csr.to_dense().reshape(7, 1, 3, 3), padding=1, groups=7))
                np.testing.assert_allclose(one, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widest", [8, 4])
def test_pieces_cover_the_tiles_and_no_four_or_seven_leaves_its_line(widest):
    for length in range(1, 40):
        for lines in (1, 2, 5):
            pieces = line_groups(lines, length, widest)
            reachable = any((length - 7 * n) >= 0 and (length - 7 * n) % 4 == 0 for n in range(8 if widest > 4 else 1))
            assert (pieces is not None) == reachable
            if pieces is None:
                continue
            assert pieces[:, 0].sum() == lines * length
            assert pieces[:, 0].max() <= widest
            ends = np.cumsum(pieces[:, 0])
            assert (pieces[:, 1] == ends - pieces[:, 0]).all()
            for size, first in pieces:
                for part, start in ((4, first), (4, first + 4)) if size == 8 else ((size, first),):
                    assert part in (4, 7)
                    assert start // length == (start + part - 1) // length


def test_sizes_that_do_not_belong_together_are_refused():
    _, csr = _weight(4, 9, 1.0)
    target = default_layout(1, 4, 8, 8)
    source = conv_source_layout(target, (1, 4, 8, 8), (3, 3), (1, 1), (1,) * 4, (1, 1))
    geometry = ((1, 1), (1,) * 4, (1, 1))
    with pytest.raises(ValueError, match="depthwise weight"):
        depthwise_step(csr, (5, 5), None, *geometry, source, target)
    with pytest.raises(ValueError, match="depthwise weight"):
        depthwise_step(csr, (3, 3), None, *geometry, source.with_channels(3), target)
    with pytest.raises(ValueError, match="with a halo of"):
        depthwise_step(csr, (3, 3), None, *geometry, source.with_halo((0, 0, 0, 0)), target)
    with pytest.raises(ValueError, match="residual must be blocked"):
        depthwise_step(csr, (3, 3), None, *geometry, source, target, residual=default_layout(1, 4, 16, 16))
