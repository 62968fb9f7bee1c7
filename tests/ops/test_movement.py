"""Conversions, halo refresh and copies in the lane layout equal their slow twins, whatever lies where no pixel is."""

from __future__ import annotations

import random
import subprocess
import sys

import numba
import numpy as np
import numpy.typing as npt
import pytest

from ops.kernels.lanes import Layout, default_layout, from_lanes, to_lanes
from ops.kernels.movement import copy_step, from_lanes_step, halo_step, relayout_step, tile_runs, to_lanes_step
from ops.kernels.program import run_step
from ops.kernels.step import KernelStep, aligned

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="compiled kernels have no plain Python form")  # type: ignore[attr-defined]

Floats = npt.NDArray[np.float32]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 28]
CASES = range(100)


def _shape(seed: int) -> tuple[int, int, int, int]:
    pick = random.Random(seed).choice
    if seed % 10 == 0:
        return pick([1, 8, 17]), pick([1, 3, 4, 10, 33]), 1, 1
    return pick([1, 1, 2, 3, 8, 17]), pick([1, 2, 3, 5, 16]), pick(SIZES), pick(SIZES)


def _layout(shape: tuple[int, int, int, int], seed: int) -> Layout:
    """A layout somebody could ask for: the default one, one of other blocks, or one of blocks larger than it needs."""
    pick = random.Random(seed).choice
    images = pick([1, 1, 2, 4])
    most = 16 // images
    grid = pick([g for g in [(1, 1), (1, 3), (2, 2), (2, 7), (4, 1), (3, 5), (4, 4), (1, 16)] if g[0] * g[1] <= most])
    block = tuple(-(-size // g) + pick([0, 0, 0, 1, 2]) for size, g in zip(shape[2:], grid))
    layout = pick([default_layout(*shape), Layout(*shape, images, grid, (block[0], block[1]))])
    layout = layout.with_channels(layout.channels, layout.channels + pick([0, 0, 1, 3]))
    return layout.with_halo((pick([0, 1, 2]), pick([0, 1, 3]), pick([0, 1, 2, 5]), pick([0, 1])))


def _pixels(shape: tuple[int, ...], seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _guarded(size: int, fill: float = np.nan, shift: int = 0) -> tuple[Floats, Floats]:
    """(the whole, a buffer of `size` within it): `fill` in the buffer and in 64 bytes before and after."""
    whole = aligned(np.full(size + 32 + shift, fill, np.float32))
    return whole, whole[16 + shift : 16 + shift + size]


def _poisoned(x: Floats, layout: Layout) -> Floats:
    buffer = _guarded(layout.size)[1]
    buffer[layout.index] = x
    return buffer


def _of_channels(buffer: Floats, layout: Layout) -> Floats:
    """What belongs to the value's channels."""
    return buffer.reshape(-1, layout.pitch, 16)[:, : layout.channels]


def _unharmed_around(whole: Floats, buffer: Floats) -> bool:
    start = (buffer.ctypes.data - whole.ctypes.data) // 4
    return bool(np.isnan(whole[:start]).all() and np.isnan(whole[start + buffer.size :]).all())


def _run(step: KernelStep, x: Floats, out: Floats, seed: int) -> None:
    run_step(step, [x], out, threads=[1, 3, 2, 5][seed % 4])


@pytest.mark.parametrize("seed", CASES)
def test_to_lanes_and_from_lanes_equal_their_twins(seed: int) -> None:
    shape = _shape(seed)
    layout, x = _layout(shape, seed), _pixels(shape, seed)
    plain = _guarded(x.size, shift=seed % 7)[1]
    plain[:] = x.reshape(-1)
    whole, lanes = _guarded(layout.size)
    _run(to_lanes_step(layout), plain, lanes, seed)
    np.testing.assert_array_equal(from_lanes(lanes, layout), x)
    assert _unharmed_around(whole, lanes)
    assert np.isnan(lanes.reshape(-1, layout.pitch, 16)[:, layout.channels :]).all()
    whole, back = _guarded(x.size, shift=seed % 5)
    _run(from_lanes_step(layout), _poisoned(x, layout), back, seed)
    np.testing.assert_array_equal(back.reshape(shape), x)
    assert _unharmed_around(whole, back)


@pytest.mark.parametrize("seed", CASES)
def test_a_halo_is_filled_as_by_the_twin_at_once_or_afterwards(seed: int) -> None:
    shape = _shape(seed)
    layout, x = _layout(shape, seed), _pixels(shape, seed)
    expected = _of_channels(to_lanes(x, layout), layout)
    whole, lanes = _guarded(layout.size)
    lanes[layout.index] = x
    _run(halo_step(layout), lanes, lanes, seed)
    np.testing.assert_array_equal(_of_channels(lanes, layout), expected)
    assert _unharmed_around(whole, lanes)
    assert np.isnan(lanes.reshape(-1, layout.pitch, 16)[:, layout.channels :]).all()
    plain, (whole, lanes) = _guarded(x.size, shift=seed % 3)[1], _guarded(layout.size)
    plain[:] = x.reshape(-1)
    _run(to_lanes_step(layout, fill_halo=True), plain, lanes, seed)
    np.testing.assert_array_equal(_of_channels(lanes, layout), expected)
    assert _unharmed_around(whole, lanes)


@pytest.mark.parametrize("seed", CASES)
def test_relayout_keeps_the_value_in_any_blocking(seed: int) -> None:
    shape = _shape(seed)
    source, target, x = _layout(shape, seed), _layout(shape, seed + 1000), _pixels(shape, seed)
    whole, lanes = _guarded(target.size)
    _run(relayout_step(source, target), _poisoned(x, source), lanes, seed)
    np.testing.assert_array_equal(from_lanes(lanes, target), x)
    assert _unharmed_around(whole, lanes)


@pytest.mark.parametrize("seed", range(20))
def test_copies_fill_a_wider_buffer_part_by_part(seed: int) -> None:
    shape = _shape(seed)
    source, x = _layout(shape, seed), [_pixels(shape, 2 * seed), _pixels(shape, 2 * seed + 1)]
    channels = shape[1]
    wide = source.with_channels(2 * channels).with_halo((1, 0, 0, 1))
    part = wide.with_channels(channels, 2 * channels)
    lanes = _guarded(wide.size)[1]
    for i in (0, 1):
        _run(copy_step(source, part), _poisoned(x[i], source), lanes[16 * channels * i :], seed)
    np.testing.assert_array_equal(from_lanes(lanes, wide), np.concatenate(x, axis=1))


def test_nan_of_a_pixel_moves_with_it_and_goes_nowhere_else() -> None:
    layout = Layout(1, 3, 14, 14, halo=(1, 1, 1, 1))
    x = _pixels((1, 3, 14, 14), 0)
    x[0, 1, 7, 7], x[0, 2, 0, 13] = np.nan, np.inf
    lanes = _poisoned(x, layout)
    _run(halo_step(layout), lanes, lanes, 0)
    np.testing.assert_array_equal(lanes, to_lanes(x, layout))


def test_rows_of_tiles_are_runs_where_the_tiles_are_contiguous() -> None:
    layout = Layout(3, 5, 8, 8, halo=(1, 1, 1, 1))
    assert tile_runs(layout)[0].shape == (3 * 2, 1)
    assert tile_runs(layout)[1] == 2 * 5
    assert tile_runs(layout, layout.with_channels(5, 6))[1] == 5
    assert tile_runs(layout, whole_rows=False)[1] == 5


def test_layouts_that_do_not_belong_together_are_refused() -> None:
    layout = Layout(1, 3, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        relayout_step(layout, Layout(1, 3, 8, 9))
    with pytest.raises(ValueError, match="relayout_step"):
        copy_step(layout, Layout(1, 3, 8, 8, grid=(2, 8)))


OUTSIDE = """
import ctypes, mmap
import numpy as np
from ops.kernels.lanes import Layout, default_layout
from ops.kernels.movement import from_lanes_step, to_lanes_step
from ops.kernels.program import run_step

page = mmap.PAGESIZE
room = mmap.mmap(-1, 66 * page)
start = np.frombuffer(room, np.uint8).ctypes.data
libc = ctypes.CDLL(None, use_errno=True)
for locked in (start, start + 65 * page):
    assert libc.mprotect(ctypes.c_void_p(locked), ctypes.c_size_t(page), 0) == 0
for shape in [(1, 3, 14, 14), (3, 5, 7, 7), (17, 10, 1, 1), (2, 2, 9, 28), (1, 1, 1, 1), (1, 2, 5, 57)]:
    layout = default_layout(*shape).with_halo((1, 2, 3, 4))
    lanes = np.zeros(layout.size + 16, np.float32)
    lanes = lanes[-lanes.ctypes.data % 64 // 4 :][: layout.size]
    size = int(np.prod(shape))
    for first in (page, 65 * page - 4 * size):
        plain = np.frombuffer(room, np.float32, size, first)
        for step in (to_lanes_step(layout), to_lanes_step(layout, fill_halo=True)):
            run_step(step, [plain], lanes)
        run_step(from_lanes_step(layout), [lanes], plain)
print("untouched")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks pages of memory by mprotect")
def test_conversions_touch_no_byte_outside_of_the_plain_tensor() -> None:
    """Before and after the tensor lies memory that cannot be accessed."""
    found = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=False)
    assert found.stdout == "untouched\n", found.stderr[-2000:] or f"died of signal {-found.returncode}"
