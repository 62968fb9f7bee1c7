"""The designs of sparse linear layers against their slow twin and torch, on whatever the machine has."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ops import reference
from ops.formats import CSR, FormatError
from ops.kernels.crew import run_alone
from ops.kernels.isa import isa
from ops.kernels.linear import DESIGNS, linear_step
from ops.kernels.linear_batch import TILES, batch_step, batch_tile, linear_batch
from ops.kernels.linear_dot import dot
from ops.kernels.linear_lookup import lookup_32, lookup_64, lookup_step
from ops.kernels.program import run_step
from ops.kernels.step import KernelStep, aligned

SHAPES = [(1, 1), (3, 9), (20, 33), (40, 1), (18, 64), (35, 150)]
BATCHES = [1, 2, 3, 8, 15, 16, 17, 64]
ROOT = Path(__file__).parents[2]
GUARD = np.float32(123.5)
ACTIVATIONS = {
    "none": lambda t: t,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
needs_avx512 = pytest.mark.skipif(isa() != "avx512", reason="the lookup design needs AVX-512")


def _weight(rows: int, cols: int, density: float, seed: int = 0) -> CSR:
    """Random, with an empty first and a full second row."""
    generator = torch.Generator().manual_seed(seed)
    weight, mask = torch.randn(rows, cols, generator=generator), torch.rand(rows, cols, generator=generator) < density
    if 0 < density < 1 and rows > 2:
        mask[0], mask[1] = False, True
    return CSR.from_dense(weight, mask)


def _random(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _shifted(values: np.ndarray, floats: int) -> np.ndarray:
    """A copy whose address is a multiple of 64 bytes plus so many floats."""
    room = aligned(np.zeros(values.size + 16, np.float32))
    room[floats : floats + values.size] = values.reshape(-1)
    return room[floats : floats + values.size].reshape(values.shape)


def _run(
    step: KernelStep,
    x: np.ndarray,
    rows: int,
    residual: np.ndarray | None = None,
    threads: int = 1,
    shift: int = 0,
) -> np.ndarray:
    """The output, poisoned before; fails if anything beyond it is written."""
    batch = x.shape[0]
    room = aligned(np.full(batch * rows + 48, GUARD, np.float32))
    out = room[16 + shift : 16 + shift + batch * rows]
    out[:] = np.nan
    inputs = [_shifted(a, shift) for a in (x, residual) if a is not None]
    run_step(step, inputs, out, threads)
    assert (room[: 16 + shift] == GUARD).all()
    assert (room[16 + shift + batch * rows :] == GUARD).all()
    return out.reshape(batch, rows).copy()


def _steps(weight: CSR, batch: int, bias: np.ndarray, activation: int = 0, residual: bool = False) -> list[KernelStep]:
    """Every design and width that can run here, whether sensible or not."""
    common = (weight, batch, bias, activation, residual)
    steps = [linear_step(weight, batch, bias, list(ACTIVATIONS)[activation], residual, "dot")]
    steps += [batch_step(*common, tile) for tile in TILES]
    steps += [lookup_step(*common, window) for window in (32, 64) if isa() == "avx512" and weight.shape[1] >= window]
    return steps


def _run_elsewhere(code: str, **environment: str) -> None:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_design_equals_reference(rows: int, cols: int, density: float) -> None:
    weight, bias, most = _weight(rows, cols, density), _random(rows), _random(64, cols)
    expected = reference.csr_linear(most, weight, bias)
    for batch in BATCHES:
        for step in _steps(weight, batch, bias):
            found = _run(step, most[:batch], rows)
            np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(_run(step, most[:batch], rows, threads=3), found)


@pytest.mark.parametrize("batch", [1, 8, 70])
def test_chosen_design_equals_torch_on_a_large_layer(batch: int) -> None:
    weight, bias, x = _weight(1000, 1024, 0.1), _random(1000), _random(batch, 1024)
    expected = F.linear(torch.from_numpy(x), weight.to_dense(), torch.from_numpy(bias)).numpy()
    for threads in (1, 3, 40):
        np.testing.assert_allclose(
            _run(linear_step(weight, batch, bias), x, 1000, threads=threads), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("residual", [False, True])
def test_bias_residual_and_activation_at_any_alignment(activation: str, residual: bool) -> None:
    weight = _weight(37, 70, 0.2)
    for batch in (1, 3, 19):
        x, extra, bias = _random(batch, 70), 3 * _random(batch, 37, seed=2) if residual else None, _random(37, seed=3)
        value = torch.from_numpy(reference.csr_linear(x, weight, bias))
        expected = ACTIVATIONS[activation](value if extra is None else value + torch.from_numpy(extra))
        for step in _steps(weight, batch, bias, list(ACTIVATIONS).index(activation), residual):
            for shift in (0, 1):
                found = _run(step, x, 37, extra, threads=2, shift=shift)
                np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_reach_the_outputs_of_kept_weights_only() -> None:
    weight, x = _weight(50, 130, 0.1), _random(17, 130)
    x[:, 5], x[:, 64], x[3, 40], x[0, 129] = np.nan, np.inf, -np.inf, np.nan
    expected = reference.csr_linear(x, weight)
    assert np.isfinite(expected).any()
    for batch in (1, 8, 17):
        for step in _steps(weight, batch, np.zeros(50, np.float32)):
            found = _run(step, x[:batch], 50)
            np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-4)


BEFORE_A_FORBIDDEN_PAGE = """
import ctypes, mmap
import tests.ops.test_linear_kernels as here

np, page = here.np, mmap.PAGESIZE


def at_the_end(values):
    room = mmap.mmap(-1, 4 * page)
    whole = np.frombuffer(room, np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + 3 * page), ctypes.c_size_t(page), 0) == 0
    place = whole[3 * page - values.nbytes : 3 * page].view(np.float32)
    place[:] = values.reshape(-1)
    return place


for rows, cols in ((20, 33), (35, 69), (16, 64)):
    weight = here._weight(rows, cols, 0.3)
    for batch in (1, 3, 9):
        x, extra, bias = here._random(batch, cols), here._random(batch, rows), here._random(rows)
        expected = here.reference.csr_linear(x, weight, bias) + extra
        for step in here._steps(weight, batch, bias, residual=True):
            out = at_the_end(np.zeros((batch, rows), np.float32))
            here.run_step(step, [at_the_end(x), at_the_end(extra)], out)
            np.testing.assert_allclose(out.reshape(batch, rows), expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forbids a page with mprotect")
def test_nothing_behind_inputs_and_output_is_touched() -> None:
    _run_elsewhere(BEFORE_A_FORBIDDEN_PAGE)


def test_rows_of_very_different_lengths_equal_reference() -> None:
    mask = torch.arange(200)[None] < torch.randperm(45, generator=torch.Generator().manual_seed(0))[:, None] ** 2 // 9
    weight = CSR.from_dense(torch.randn(45, 200), mask)
    x = _random(9, 200)
    expected = reference.csr_linear(x, weight)
    for step in _steps(weight, 9, np.zeros(45, np.float32)):
        for threads in (1, 3):
            np.testing.assert_allclose(_run(step, x, 45, threads=threads), expected, rtol=1e-4, atol=1e-4)


def test_threads_at_the_same_time_do_not_disturb_each_other() -> None:
    weight, x = _weight(300, 400, 0.2), _random(17, 400)
    expected = reference.csr_linear(x, weight)
    inputs, out, barrier = aligned(x), aligned(np.zeros(17 * 300, np.float32)), threading.Barrier(3)
    for step in _steps(weight, 17, np.zeros(300, np.float32)):
        scratch = aligned(np.zeros(step.scratch, np.float32))
        descriptor = step.bind([inputs.ctypes.data], out.ctypes.data, scratch.ctypes.data)
        pair = np.array([step.address, descriptor.ctypes.data] * 10, np.int64)

        def work(thread: int, pair: np.ndarray = pair) -> None:
            barrier.wait()
            run_alone(pair, thread, 3)

        out[:] = np.nan
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_allclose(out.reshape(17, 300), expected, rtol=1e-4, atol=1e-4)


@needs_avx512
def test_single_inputs_are_looked_up_where_windows_fit() -> None:
    assert linear_step(_weight(100, 100, 0.2), 1).address == lookup_32.address
    assert linear_step(_weight(100, 100, 0.01), 1).address == lookup_64.address
    assert linear_step(_weight(100, 50, 0.01), 1).address == lookup_32.address
    assert linear_step(_weight(100, 20, 0.2), 1).address == dot.address
    assert linear_step(_weight(100, 100, 0.2), 16).address == linear_batch.address


def test_tile_width_follows_the_batch() -> None:
    assert [batch_tile(n, 1000) for n in (2, 8, 9, 16, 32, 64, 128)] == [8, 8, 16, 16, 32, 64, 64]
    assert batch_tile(64, 4096) == 32


@pytest.mark.parametrize("design", DESIGNS)
def test_packed_weights_are_small(design: str) -> None:
    if design == "lookup" and isa() != "avx512":
        pytest.skip("the lookup design needs AVX-512")
    weight = _weight(256, 512, 0.1)
    assert linear_step(weight, 8, design=design).nbytes < 1.5 * weight.nbytes


def test_wrong_arguments_are_named() -> None:
    weight = _weight(4, 6, 0.5)
    with pytest.raises(ValueError, match="activation must be one of none, relu"):
        linear_step(weight, 1, activation="tanh")
    with pytest.raises(ValueError, match="design must be one of lookup, batch, dot"):
        linear_step(weight, 1, design="gather")
    with pytest.raises(ValueError, match="one entry per weight row"):
        linear_step(weight, 1, np.zeros(6, np.float32))
    with pytest.raises(ValueError, match="positive size and batch"):
        linear_step(weight, 0)
    with pytest.raises(ValueError, match="at least 32 inputs"):
        linear_step(weight, 1, design="lookup")


@pytest.mark.parametrize("wrong", [[0, 0], [1, 0], [0, 9], [-1, 2]])
def test_damaged_weights_are_refused(wrong: list[int]) -> None:
    indices = np.array([3, 1, *wrong], np.int32)
    weight = CSR((3, 4), np.array([0, 1, 2, 4], np.int32), indices, np.ones(4, np.float32))
    with pytest.raises(FormatError, match="row 2"):
        linear_step(weight, 1)


WITHOUT_AVX512 = """
import tests.ops.test_linear_kernels as here

assert here.isa() == "avx2"
weight, x = here._weight(20, 100, 0.2), here._random(9, 100)
for batch in (1, 9):
    found, expected = here._run(here.linear_step(weight, batch), x[:batch], 20), here.reference.csr_linear(x[:batch], weight)
    here.np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
with here.pytest.raises(ValueError, match="needs AVX-512"):
    here.linear_step(weight, 1, design="lookup")
"""


@pytest.mark.skipif(isa() == "generic", reason="needs AVX2")
def test_without_avx512_another_design_is_chosen() -> None:
    _run_elsewhere(WITHOUT_AVX512, NAS_ISA="avx2")
