"""Convolutions by specialised machine code against torch on the masked dense weight, with NaN in every undefined place."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from ops.formats import CSR
from ops.kernels import specialised
from ops.kernels.lanes import LANES, Layout, conv_source_layout, default_layout, from_lanes, to_lanes
from ops.kernels.program import run_step
from ops.kernels.specialised import (
    SPECIALISED_ACTIVATIONS,
    Tuning,
    specialised_available,
    specialised_conv_step,
    specialised_pair_step,
)
from ops.kernels.step import aligned

pytestmark = pytest.mark.skipif(not specialised_available(), reason="needs x86-64 with AVX-512 and executable memory")

ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}
TINY = Tuning(range_rows=40, code_bytes=600, vectors=12)


def _weight(rows: int, cols: int, density: float, edges: bool = True) -> tuple[torch.Tensor, CSR]:
    weight, mask = torch.randn(rows, cols) / (cols * density + 1) ** 0.5, torch.rand(rows, cols) < density
    if edges and 0 < density < 1:
        mask[0], mask[rows // 2] = False, True  # an empty row and a full one
    return weight * mask, CSR.from_dense(weight, mask)


def _poisoned(x: torch.Tensor, layout) -> np.ndarray:
    """x in lanes with a valid halo, and NaN in lanes that belong to no image."""
    buffer = to_lanes(x.numpy(), layout)
    undefined = layout.images * layout.grid[0] * layout.grid[1]
    buffer.reshape(-1, LANES)[:, undefined:] = np.nan
    if not any(layout.halo):  # nothing reads beyond a block: what lies beyond the image may be anything
        known = np.zeros(layout.size, bool)
        known[layout.index] = True
        buffer[~known] = np.nan
    if layout.pitch > layout.channels:
        buffer.reshape(-1, layout.pitch, LANES)[:, layout.channels :] = np.nan
    return aligned(buffer)


def _run(step, inputs, layout, threads=1) -> np.ndarray:
    output = aligned(np.full(layout.size, np.nan, np.float32))
    run_step(step, inputs, output, threads)
    outside = np.ones(layout.size, bool)
    group, row, column, channel, lane = np.ix_(*map(np.arange, (layout.groups, *layout.block, layout.channels, LANES)))
    place = layout.origin + group * layout.group_step + row * layout.row_step + column * layout.tile_step
    outside[place + channel * LANES + lane] = False
    assert np.isnan(output[outside]).all(), "written outside the output"
    return from_lanes(output, layout)


def _compare(
    *, batch=1, inside=8, outside=8, size=8, kernel=1, stride=1, dilation=1, groups=1, density=0.3, activation="none",
    bias=True, residual=False, threads=1, tuning=None, pitch=0, halo=0,
) -> None:  # fmt: skip
    dense, csr = _weight(outside, inside // groups * kernel**2, density)
    dense = dense.reshape(outside, inside // groups, kernel, kernel)
    x, b = torch.randn(batch, inside, size, size), torch.randn(outside) if bias else None
    pad = dilation * (kernel - 1) // 2
    expected = F.conv2d(x, dense, b, stride, pad, dilation, groups)
    target = default_layout(batch, outside, *expected.shape[2:])
    geometry = (kernel, kernel), (stride, stride), (pad,) * 4, (dilation, dilation)
    source = conv_source_layout(target, tuple(x.shape), *geometry)
    source = replace(source, halo=tuple(h + halo for h in source.halo), pitch=inside + pitch)
    other = target.with_channels(outside, outside + pitch).with_halo((0, 1, 1, 0))
    target = target.with_channels(outside, outside + pitch).with_halo((halo,) * 4)
    inputs = [_poisoned(x, source)]
    if residual:
        r = torch.randn_like(expected)
        expected = expected + r
        inputs.append(aligned(to_lanes(r.numpy(), other)))
    step = specialised_conv_step(
        csr, geometry[0], None if b is None else b.numpy(), *geometry[1:], groups, source, target, activation,
        other if residual else None, tuning,
    )  # fmt: skip
    np.testing.assert_allclose(
        _run(step, inputs, target, threads), ACTIVATIONS[activation](expected).numpy(), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("density", [0, 0.02, 0.1, 0.5, 1])
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_density_equals_dense(kernel, density):
    _compare(inside=24, outside=70, size=14, kernel=kernel, density=density, activation="relu", residual=True)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_comes_last(activation, residual):
    _compare(inside=40, outside=61, activation=activation, residual=residual, tuning=TINY, pitch=3)
    _compare(inside=40, outside=61, activation=activation, residual=residual, bias=False)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        {"kernel": 3, "stride": 2, "size": 16},
        {"kernel": 3, "dilation": 2, "size": 28},
        {"kernel": 5, "size": 7, "batch": 3},
        {"kernel": 1, "stride": 2, "size": 14, "batch": 17},
        {"kernel": 3, "size": 1, "batch": 8},
        {"kernel": 3, "size": 5, "batch": 2, "halo": 2, "pitch": 5},
        {"kernel": 3, "groups": 4, "inside": 32, "outside": 96},
        {"kernel": 3, "groups": 48, "inside": 48, "outside": 48, "size": 14},
        {"kernel": 1, "groups": 2, "inside": 128, "outside": 136},
    ],
    ids=str,
)
def test_every_geometry_equals_dense(case, threads):
    for tuning in (None, TINY):
        _compare(
            **{"inside": 8, "outside": 36, "activation": "relu", "residual": True} | case,
            threads=threads,
            tuning=tuning,
        )


def test_many_functions_equal_one():
    _, csr = _weight(100, 90 * 9, 0.2)
    x, b = torch.randn(1, 90, 8, 8), np.random.default_rng(0).normal(size=100).astype(np.float32)
    target = default_layout(1, 100, 8, 8)
    geometry = (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    source = conv_source_layout(target, tuple(x.shape), *geometry)
    buffer = _poisoned(x, source)
    functions, results = [], []
    for tuning in (Tuning(1000, 1 << 30, 10**6), Tuning(150, 1 << 30), Tuning(64, 24 * 1024), Tuning(30, 1000, 36)):
        step = specialised_conv_step(csr, (3, 3), b, *geometry[1:], 1, source, target, "silu", None, tuning)
        functions.append(len(step.arrays[2]))
        results.append(_run(step, [buffer], target))
    assert functions[0] == 1
    assert functions == sorted(functions)
    assert functions[-1] > 50
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_threads():
    _, csr = _weight(70, 32 * 9, 0.1)
    target = default_layout(1, 70, 14, 14)
    source = conv_source_layout(target, (1, 32, 14, 14), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    buffer = _poisoned(torch.randn(1, 32, 14, 14), source)
    step = specialised_conv_step(csr, (3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1, source, target, tuning=TINY)
    once = _run(step, [buffer], target)
    for threads in (2, 3, 5, 64):
        np.testing.assert_array_equal(_run(step, [buffer], target, threads), once)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_nan_and_infinity_reach_outputs_of_kept_weights_only(activation):
    weight = np.zeros((3, 4), np.float32)
    weight[0, 0] = weight[1, 1] = weight[2, 2] = 1
    x = torch.ones(1, 4, 4, 4)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 3] = float("nan"), float("inf"), float("nan")
    layout = default_layout(1, 4, 4, 4)
    target = layout.with_channels(3)
    step = specialised_conv_step(
        CSR.from_dense(torch.from_numpy(weight)), (1, 1), None, (1, 1), (0,) * 4, (1, 1), 1, layout, target, activation
    )
    expected = ACTIVATIONS[activation](x[:, :3])
    np.testing.assert_allclose(_run(step, [_poisoned(x, layout)], target), expected.numpy(), rtol=1e-6)


def _pair(
    *, kernel=1, stride=1, size=14, batch=1, wide=96, residual=True, at_once=0, threads=1, tuning=None, density=0.2
):
    one, first = _weight(wide, 20 * kernel**2, density)
    two, second = _weight(24, wide, density)
    x, b1, b2 = torch.randn(batch, 20, size, size), torch.randn(wide), torch.randn(24)
    between = F.relu6(F.conv2d(x, one.reshape(wide, 20, kernel, kernel), b1, stride, kernel // 2))
    expected = F.conv2d(between, two[:, :, None, None], b2)
    target = default_layout(batch, 24, *expected.shape[2:])
    geometry = (kernel, kernel), (stride, stride), (kernel // 2,) * 4, (1, 1)
    source = conv_source_layout(target, tuple(x.shape), *geometry)
    inputs = [_poisoned(x, source)]
    if residual:
        r = torch.randn_like(expected)
        expected = expected + r
        inputs.append(aligned(to_lanes(r.numpy(), target)))
    step = specialised_pair_step(
        first, second, geometry[0], b1.numpy(), b2.numpy(), *geometry[1:], source, target, ("relu6", "silu"),
        target if residual else None, at_once, tuning,
    )  # fmt: skip
    result = _run(step, inputs, target, threads)
    np.testing.assert_allclose(result, F.silu(expected).numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("at_once", [0, 1, 3, 100])
@pytest.mark.parametrize("threads", [1, 3, 70])
def test_pairs_equal_two_dense_convolutions(at_once, threads):
    _pair(at_once=at_once, threads=threads)
    _pair(at_once=at_once, threads=threads, batch=3, size=7, residual=False, tuning=TINY)
    _pair(at_once=at_once, threads=threads, kernel=3, stride=2, size=28, density=0.05)


def test_bad_arguments_are_told():
    layout = default_layout(1, 8, 8, 8)
    _, csr = _weight(8, 8, 0.5)
    good = [csr, (1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1, layout, layout]

    def with_(place, value):
        return [*good[:place], value, *good[place + 1 :]]

    for arguments, message in (
        (with_(8, layout.with_channels(9)), "does not lead from 8 to 9 channels"),
        (with_(2, np.zeros(3, np.float32)), "one entry per weight row"),
        ([*good, "gelu"], "no activation 'gelu'"),
        ([*good, "none", layout.with_channels(4)], "residual must be blocked"),
        (with_(7, Layout(1, 8, 8, 8, grid=(2, 4))), "must be blocked"),
    ):
        with pytest.raises(ValueError, match=message):
            specialised_conv_step(*arguments)
    wide = CSR.from_dense(torch.ones(8, 72))
    with pytest.raises(ValueError, match="halo of"):
        specialised_conv_step(wide, (3, 3), None, (1, 1), (1,) * 4, (1, 1), 1, layout, layout)


def test_it_is_switched_off_and_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("NAS_SPECIALISED", "0")
    assert not specialised_available()
    monkeypatch.delenv("NAS_SPECIALISED")
    assert specialised_available()
    for name, value in (("executable_available", lambda: False), ("isa", lambda: "avx2")):
        with monkeypatch.context() as patch:
            patch.setattr(specialised, name, value)
            assert not specialised_available()
    with monkeypatch.context() as patch:
        patch.setattr(specialised.platform, "machine", lambda: "aarch64")
        assert not specialised_available()


def test_every_activation_is_offered():
    assert set(ACTIVATIONS) == SPECIALISED_ACTIVATIONS


def test_a_new_mask_compiles_nothing():
    script = """
import numpy as np, torch
from ops.formats import CSR
from ops.kernels.lanes import default_layout
from ops.kernels.specialised import specialised_conv_step
from numba.core import event
layout = default_layout(1, 32, 8, 8)
def step(density):
    csr = CSR.from_dense(torch.randn(32, 32), torch.rand(32, 32) < density)
    return specialised_conv_step(csr, (1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1, layout, layout)
step(0.5)
with event.install_recorder("numba:compile") as recorder:
    step(0.1), step(0.0)
print(len(recorder.buffer))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
