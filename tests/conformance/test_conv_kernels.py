"""Laws that every convolution kernel in lanes obeys. A new kernel is one line in `KERNELS`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ops import reference
from ops.formats import CSR
from ops.kernels.lanes import conv_source_layout, covered, default_layout, from_lanes, padded_pitch, to_lanes
from ops.kernels.portable import portable_conv_step
from ops.kernels.program import run_step
from ops.kernels.specialised import SPECIALISED_ACTIVATIONS, specialised_available, specialised_conv_step
from ops.kernels.step import KernelStep, aligned
from ops.masks import random_mask
from ops.patterns import parse_pattern

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="compiled kernels have no plain Python form")  # type: ignore[attr-defined]

KERNELS: dict[str, tuple[Callable[..., KernelStep], tuple[str, ...]]] = {
    "portable": (portable_conv_step, ("none", "relu", "relu6", "hardswish", "silu")),
    "specialised": (specialised_conv_step, tuple(SPECIALISED_ACTIVATIONS)),
}
ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "specialised" and not specialised_available():
        pytest.skip("needs AVX-512 and executable memory")
    return str(request.param)


def _case(seed: int, activations: tuple[str, ...]) -> dict[str, Any]:
    pick = random.Random(seed).choice
    while True:
        groups = pick([1, 1, 1, 2, 3])
        case = {
            "batch": pick([1, 1, 2, 5, 17]),
            "groups": groups,
            "inside": groups * pick([1, 2, 5, 9]),
            "outside": groups * pick([1, 3, 17, 40]),
            "kernel": (pick([1, 2, 3, 5]), pick([1, 1, 3, 4])),
            "stride": (pick([1, 1, 2, 3]), pick([1, 1, 2, 3])),
            "padding": tuple(pick([0, 1, 2]) for _ in range(4)),
            "dilation": (pick([1, 2]), pick([1, 1, 3])),
            "size": (pick([1, 5, 7, 8, 14, 28]), pick([3, 6, 7, 9, 16])),
            "density": pick([0.0, 0.02, 0.1, 0.5, 1.0]),
            "activation": pick(activations),
            "bias": pick([True, False]),
            "residual": pick([True, False]),
        }
        padded = [case["size"][i] + case["padding"][2 * i] + case["padding"][2 * i + 1] for i in (0, 1)]
        if all(padded[i] > case["dilation"][i] * (case["kernel"][i] - 1) for i in (0, 1)):
            return case


def _run(
    kernel: str, case: dict[str, Any], x: torch.Tensor, packed: CSR, bias: Any, residual: Any, threads: int
) -> Any:
    """The kernel's result for plain tensors; whatever is undefined in its buffers is NaN."""
    top, bottom, left, right = case["padding"]
    height, width = case["size"]
    out_height = (height + top + bottom - case["dilation"][0] * (case["kernel"][0] - 1) - 1) // case["stride"][0] + 1
    out_width = (width + left + right - case["dilation"][1] * (case["kernel"][1] - 1) - 1) // case["stride"][1] + 1
    cover = covered(case["size"], case["stride"])
    target = default_layout(case["batch"], case["outside"], out_height, out_width, cover)
    target = target.with_channels(case["outside"], padded_pitch(case["outside"])).with_halo((1, 0, 0, 2))
    source = conv_source_layout(
        target, tuple(x.shape), case["kernel"], case["stride"], case["padding"], case["dilation"]
    )
    source = source.with_channels(case["inside"], padded_pitch(case["inside"]))
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    buffers = [aligned(_poisoned(x.numpy(), source, halo=any(source.halo) or any(case["padding"])))]
    beside = None
    if residual is not None:
        beside = target.with_halo((0, 1, 1, 0))
        buffers.append(aligned(_poisoned(residual.numpy(), beside, halo=False)))
    make = KERNELS[kernel][0]
    flat = None if bias is None else bias.numpy()
    step = make(packed, case["kernel"], flat, *geometry, source, target, case["activation"], beside)
    result = aligned(np.full(target.size, np.nan, np.float32))
    run_step(step, buffers, result, threads)
    return from_lanes(result, target)


def _poisoned(x: Any, layout: Any, halo: bool) -> Any:
    """In lanes; NaN wherever a kernel must not look (a valid halo is zeros and neighbours)."""
    buffer = to_lanes(x, layout)
    if not halo:
        kept = buffer[layout.index].copy()
        buffer[:] = np.nan
        buffer[layout.index] = kept
    gaps = buffer.reshape(-1, layout.pitch, 16)[:, layout.channels :]
    gaps[:] = np.nan
    return buffer


@pytest.mark.parametrize("seed", range(60))
def test_equals_reference_and_torch(kernel: str, seed: int) -> None:
    case = _case(seed, KERNELS[kernel][1])
    generator = torch.Generator().manual_seed(seed)
    shape = (case["outside"], case["inside"] // case["groups"], *case["kernel"])
    weight, mask = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < case["density"]
    if shape[0] > 2 and 0 < case["density"] < 1:
        mask[0], mask[1] = False, True  # an empty row and a full one
    x = torch.randn(case["batch"], case["inside"], *case["size"], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if case["bias"] else None
    top, bottom, left, right = case["padding"]
    dense = F.conv2d(
        F.pad(x, (left, right, top, bottom)), weight * mask, bias, case["stride"], 0, case["dilation"], case["groups"]
    )
    residual = torch.randn(dense.shape, generator=generator) if case["residual"] else None
    if residual is not None:
        dense = dense + residual
    expected = ACTIVATIONS[case["activation"]](dense).numpy()
    packed = CSR.from_dense(weight.flatten(1), mask.flatten(1))
    found = _run(kernel, case, x, packed, bias, residual, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    np.testing.assert_array_equal(_run(kernel, case, x, packed, bias, residual, 3), found)  # threads change nothing
    if dense.numel() * packed.nnz < 60_000:
        geometry = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
        twin = reference.csr_conv2d(
            x.numpy(), packed, case["kernel"], None if bias is None else bias.numpy(), **geometry
        )
        twin = twin if residual is None else twin + residual.numpy()
        np.testing.assert_allclose(ACTIVATIONS[case["activation"]](torch.tensor(twin)), found, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "16x1", "2:4", "1:4", "channel"])
def test_patterns_of_masks(kernel: str, pattern: str) -> None:
    parsed = parse_pattern(pattern)
    weight = torch.randn(32, 16, 3, 3)
    density = parsed.fixed_density or 0.25
    mask = random_mask(tuple(weight.shape), density, parsed, torch.Generator().manual_seed(0))
    case = {
        **{"batch": 1, "inside": 16, "outside": 32, "groups": 1, "kernel": (3, 3), "stride": (1, 1), "size": (8, 8)},
        **{"padding": (1, 1, 1, 1), "dilation": (1, 1), "activation": "relu"},
    }
    x = torch.randn(1, 16, 8, 8)
    found = _run(kernel, case, x, CSR.from_dense(weight.flatten(1), mask.flatten(1)), None, None, 1)
    np.testing.assert_allclose(found, F.relu(F.conv2d(x, weight * mask, padding=1)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_outputs_of_kept_weights(kernel: str, special: float) -> None:
    x = torch.zeros(1, 2, 8, 8)
    x[0, 1, 2, 2] = special
    weight = torch.ones(2, 2, 1, 1)
    mask = torch.tensor([[True, False], [True, True]]).view(2, 2, 1, 1)
    case = {
        **{"batch": 1, "inside": 2, "outside": 2, "groups": 1, "kernel": (1, 1), "stride": (1, 1), "size": (8, 8)},
        **{"padding": (0, 0, 0, 0), "dilation": (1, 1), "activation": "relu"},
    }
    found = _run(kernel, case, x, CSR.from_dense(weight.flatten(1), mask.flatten(1)), None, None, 1)
    assert (found[0, 0] == 0).all()
    expected = torch.zeros(8, 8)
    expected[2, 2] = special
    np.testing.assert_array_equal(found[0, 1], torch.relu(expected).numpy())
