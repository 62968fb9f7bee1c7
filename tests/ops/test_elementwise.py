"""Elementwise kernels equal torch on the pixels, in lanes of any pitch and halo, and for plain tensors of any length."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from ops.kernels.elementwise import (
    ELEMENTWISE,
    activate_step,
    add_step,
    affine_step,
    gate_step,
    multiply_step,
    plain_activate_step,
    plain_add_step,
)
from ops.kernels.lanes import Layout, default_layout, from_lanes
from ops.kernels.program import run_step
from ops.kernels.step import KernelStep, aligned

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="compiled kernels have no plain Python form")  # type: ignore[attr-defined]

Floats = npt.NDArray[np.float32]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
SPECIAL = [np.nan, np.inf, 0.0, -3.0, 3.0, 6.0, 80.0, -80.0, 1e30, -1e30, -np.inf]
AT_MOST = {"silu": 9}  # values of SPECIAL: e^-x is bounded by e^87, so that silu is not exact below -87


def test_every_activation_is_tested() -> None:
    assert set(ACTIVATIONS) == set(ELEMENTWISE)


def _close(found: Floats, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy().reshape(found.shape), rtol=2e-6, atol=1e-30)


def _layout(seed: int) -> Layout:
    pick = random.Random(seed).choice
    sizes = [1, 2, 5, 7, 8, 14, 16, 28]
    return default_layout(pick([1, 1, 2, 3, 8, 17]), pick([1, 2, 3, 5, 16, 40]), pick(sizes), pick(sizes))


def _varied(layout: Layout, seed: int) -> Layout:
    """The same blocking with other pitch and halo."""
    pick = random.Random(seed).choice
    varied = layout.with_channels(layout.channels, layout.channels + pick([0, 0, 1, 3]))
    return varied.with_halo((pick([0, 1, 2]), pick([0, 1]), pick([0, 2]), pick([0, 1])))


def _tensor(layout: Layout) -> torch.Tensor:
    return 3 * torch.randn(layout.batch, layout.channels, layout.height, layout.width)


def _buffer(x: torch.Tensor, layout: Layout) -> Floats:
    buffer = aligned(np.full(layout.size, np.nan, np.float32))
    buffer[layout.index] = x.numpy()
    return buffer


def _run(step: KernelStep, inputs: list[Floats], target: Layout, seed: int) -> Floats:
    """The value computed; asserts that the halo and channels of others were left alone."""
    lanes = aligned(np.full(target.size, 7.0, np.float32))
    run_step(step, inputs, lanes, threads=[1, 3, 2, 7][seed % 4])
    tiles = lanes.reshape(target.groups, target.rows, target.columns, target.pitch, 16)
    top, left, (bh, bw) = target.halo[0], target.halo[2], target.block
    others = np.ones(tiles.shape, bool)
    others[:, top : top + bh, left : left + bw, : target.channels] = False
    assert (tiles[others] == 7).all()
    return from_lanes(lanes, target)


@pytest.mark.parametrize("seed", range(28))
def test_add_and_activate_equal_torch(seed: int) -> None:
    layout = _layout(seed)
    a, b, target = (_varied(layout, 3 * seed + i) for i in range(3))
    x, y, name = _tensor(layout), _tensor(layout), list(ACTIVATIONS)[seed % 7]
    step = add_step(a, b, target, name)
    _close(_run(step, [_buffer(x, a), _buffer(y, b)], target, seed), ACTIVATIONS[name](x + y))
    _close(_run(activate_step(a, target, name), [_buffer(x, a)], target, seed), ACTIVATIONS[name](x))


@pytest.mark.parametrize("seed", range(21))
def test_affine_equals_a_batch_norm(seed: int) -> None:
    layout = _layout(seed)
    source, target = _varied(layout, seed), _varied(layout, seed + 100)
    x, scale, shift = _tensor(layout), torch.randn(layout.channels), torch.randn(layout.channels)
    name = list(ACTIVATIONS)[seed % 7]
    step = affine_step(source, target, scale.numpy(), shift.numpy(), name)
    mean, one = torch.zeros_like(scale), torch.ones_like(scale)
    expected = ACTIVATIONS[name](
        F.batch_norm(x.double(), mean.double(), one.double(), scale.double(), shift.double(), eps=0)
    )
    found = _run(step, [_buffer(x, source)], target, seed)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("seed", range(24))
def test_products_and_gates_equal_torch(seed: int) -> None:
    layout = _layout(seed)
    a, b, target = (_varied(layout, 3 * seed + i) for i in range(3))
    x, y, gate = _tensor(layout), _tensor(layout), torch.rand(layout.batch, layout.channels)
    _close(_run(multiply_step(a, b, target), [_buffer(x, a), _buffer(y, b)], target, seed), x * y)
    plain = np.concatenate([np.zeros(seed % 3, np.float32), gate.numpy().reshape(-1)])[seed % 3 :]
    _close(_run(gate_step(a, target), [_buffer(x, a), plain], target, seed), x * gate[:, :, None, None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 5, 15, 16, 17, 40, 100])
def test_plain_kernels_equal_torch_and_write_nothing_else(activation: str, count: int) -> None:
    values = (3 * np.random.default_rng(count).normal(size=(2, count))).astype(np.float32)
    special = SPECIAL[: min(count, AT_MOST.get(activation, count))]
    values[0, : len(special)] = special
    for shift in (0, 1, 3):
        room = aligned(np.full(3 * (count + 40), np.nan, np.float32)).reshape(3, -1)
        a, b, out = (r[shift : shift + count] for r in room)
        a[:], b[:] = values
        for threads in (1, 3):
            for step, inputs, x in [
                (plain_activate_step(count, activation), [a], values[0]),
                (plain_add_step(count, activation), [a, b], values[0] + values[1]),
            ]:
                out[:] = np.nan
                run_step(step, inputs, out, threads=threads)
                expected = ACTIVATIONS[activation](torch.from_numpy(x).double())
                np.testing.assert_allclose(out, expected.float().numpy(), rtol=4e-6, atol=1e-37)
                assert np.isnan(room[2][:shift]).all()
                assert np.isnan(room[2][shift + count :]).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_target_may_be_the_buffer_of_an_input(threads: int) -> None:
    layout = Layout(2, 5, 14, 14, halo=(1, 1, 1, 1))
    x, y = _tensor(layout), _tensor(layout)
    lanes = _buffer(x, layout)
    run_step(add_step(layout, layout, layout, "relu"), [lanes, _buffer(y, layout)], lanes, threads)
    np.testing.assert_array_equal(from_lanes(lanes, layout), F.relu(x + y).numpy())
    plain = x.flatten().numpy().copy()
    run_step(plain_activate_step(plain.size, "relu"), [plain], plain, threads)
    np.testing.assert_array_equal(plain, F.relu(x).flatten().numpy())


def test_what_does_not_belong_together_is_refused() -> None:
    layout = Layout(1, 4, 8, 8)
    with pytest.raises(ValueError, match="blocking"):
        add_step(layout, Layout(1, 4, 8, 8, grid=(2, 8)), layout)
    with pytest.raises(ValueError, match="blocking"):
        multiply_step(layout, Layout(1, 3, 8, 8), layout)
    with pytest.raises(ValueError, match=r"\[4\], got \[3\]"):
        affine_step(layout, layout, np.ones(3, np.float32), np.ones(4, np.float32))
    with pytest.raises(ValueError, match="known: hardsigmoid, hardswish"):
        activate_step(layout, layout, "gelu")


OUTSIDE = """
import ctypes, mmap
import numpy as np
from ops.kernels.elementwise import gate_step, plain_activate_step, plain_add_step
from ops.kernels.lanes import default_layout
from ops.kernels.program import run_step

page = mmap.PAGESIZE
room = mmap.mmap(-1, 4 * page)
start = np.frombuffer(room, np.uint8).ctypes.data
libc = ctypes.CDLL(None, use_errno=True)
for locked in (start, start + 3 * page):
    assert libc.mprotect(ctypes.c_void_p(locked), ctypes.c_size_t(page), 0) == 0
for batch, channels in [(1, 1), (3, 7), (17, 40)]:
    layout = default_layout(batch, channels, 3, 3)
    lanes = np.zeros(layout.size + 16, np.float32)
    lanes = lanes[-lanes.ctypes.data % 64 // 4 :][: layout.size]
    size = batch * channels
    for first in (page, 3 * page - 4 * size):
        plain = np.frombuffer(room, np.float32, size, first)
        run_step(gate_step(layout, layout), [lanes, plain], lanes)
        run_step(plain_activate_step(size, "relu"), [plain], plain)
        run_step(plain_add_step(size), [plain, plain], plain)
print("untouched")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks pages of memory by mprotect")
def test_no_byte_outside_of_a_plain_tensor_is_touched() -> None:
    """Before and after the tensor lies memory that cannot be accessed."""
    found = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=False)
    assert found.stdout == "untouched\n", found.stderr[-2000:] or f"died of signal {-found.returncode}"
