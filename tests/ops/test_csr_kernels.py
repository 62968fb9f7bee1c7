"""The CSR kernels against their slow twins and against torch on the masked dense weight."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ops import reference
from ops.formats import CSR
from ops.kernels import csr
from ops.kernels.csr import DOT_BATCH, CSRConv2d, CSRLinear

ACTIVATIONS = {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6}
NAN = float("nan")


def _masked(shape: tuple[int, ...], density: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, mask = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < density
    if density < 1 and shape[0] > 2:
        mask[0] = False  # an empty row and a full one
        mask[1] = True
    return weight, mask


def _conv_case(seed: int) -> dict:
    pick = random.Random(seed).choice
    while True:
        groups = pick([1, 1, 1, 2, 3])
        case = {
            "batch": pick([1, 2]),
            "groups": groups,
            "inside": groups * pick([1, 2, 4]),
            "outside": groups * pick([1, 2, 3]),
            "kernel": (pick([1, 2, 3, 5]), pick([1, 3, 4])),
            "stride": (pick([1, 2, 3]), pick([1, 2, 3])),
            "padding": tuple(pick([0, 1, 2]) for _ in range(4)),
            "dilation": (pick([1, 2]), pick([1, 1, 3])),
            "size": (pick([1, 5, 7, 8]), pick([3, 6, 9, 16])),
            "density": pick([0.0, 0.1, 0.4, 1.0]),
            "activation": pick(list(ACTIVATIONS)),
            "bias": pick([True, False]),
        }
        padded = [case["size"][i] + case["padding"][2 * i] + case["padding"][2 * i + 1] for i in (0, 1)]
        if all(padded[i] > case["dilation"][i] * (case["kernel"][i] - 1) for i in (0, 1)):
            return case


@pytest.mark.parametrize("seed", range(120))
def test_csr_conv2d_equals_reference_and_torch(seed: int) -> None:
    case = _conv_case(seed)
    weight, mask = _masked((case["outside"], case["inside"] // case["groups"], *case["kernel"]), case["density"], seed)
    x = torch.randn(case["batch"], case["inside"], *case["size"])
    bias = torch.randn(case["outside"]) if case["bias"] else None
    packed = CSR.from_dense(weight.flatten(1), mask.flatten(1))
    flat_bias = None if bias is None else bias.numpy()
    geometry = {k: case[k] for k in ("stride", "padding", "dilation", "groups", "activation")}

    kernel = CSRConv2d(packed, case["kernel"], tuple(x.shape), bias=flat_bias, **geometry)  # type: ignore[arg-type]
    kernel(torch.randn_like(x).numpy())  # whatever ran before leaves no trace
    found = kernel(x.numpy())

    twin = reference.csr_conv2d(x.numpy(), packed, case["kernel"], flat_bias, **geometry)
    np.testing.assert_allclose(found, twin, rtol=1e-4, atol=1e-4)
    top, bottom, left, right = case["padding"]
    dense = F.conv2d(
        F.pad(x, (left, right, top, bottom)), weight * mask, bias, case["stride"], 0, case["dilation"], case["groups"]
    )
    np.testing.assert_allclose(found, ACTIVATIONS[case["activation"]](dense).numpy(), rtol=1e-4, atol=1e-4)


def test_a_large_image_is_computed_in_several_pieces() -> None:
    weight, mask = _masked((2, 3, 3, 3), 0.5, 0)
    x = torch.randn(1, 3, 45, 100)  # more than one piece of csr.PLANE_FLOATS, the last one shorter
    assert 2 * csr.PLANE_FLOATS < 45 * 102
    kernel = CSRConv2d(
        CSR.from_dense(weight.flatten(1), mask.flatten(1)), (3, 3), (1, 3, 45, 100), padding=(1, 1, 1, 1)
    )
    np.testing.assert_allclose(kernel(x.numpy()), F.conv2d(x, weight * mask, padding=1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, DOT_BATCH, DOT_BATCH + 1, 17])
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (20, 33), (40, 1)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_csr_linear_equals_reference_and_torch(
    batch: int, shape: tuple[int, int], density: float, activation: str
) -> None:
    weight, mask = _masked(shape, density, batch)
    x, bias = torch.randn(batch, shape[1]), torch.randn(shape[0])
    packed = CSR.from_dense(weight, mask)
    found = CSRLinear(packed, batch, bias=bias.numpy(), activation=activation)(x.numpy())
    twin = reference.csr_linear(x.numpy(), packed, bias.numpy(), activation)
    np.testing.assert_allclose(found, twin, rtol=1e-4, atol=1e-5)
    dense = ACTIVATIONS[activation](F.linear(x, weight * mask, bias))
    np.testing.assert_allclose(found, dense.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("special", [NAN, float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_outputs_of_kept_weights(special: float) -> None:
    x = torch.zeros(1, 2, 4, 4)
    x[0, 1, 2, 2] = special
    weight = torch.ones(2, 2, 1, 1)
    mask = torch.tensor([[True, False], [True, True]]).view(2, 2, 1, 1)
    packed = CSR.from_dense(weight.flatten(1), mask.flatten(1))
    found = CSRConv2d(packed, (1, 1), (1, 2, 4, 4), activation="relu")(x.numpy())
    assert (found[0, 0] == 0).all()
    expected = torch.zeros(4, 4)
    expected[2, 2] = special
    np.testing.assert_array_equal(found[0, 1], torch.relu(expected).numpy())
    line = CSRLinear(packed, 1, activation="relu6")(np.array([[0.0, special]], np.float32))
    np.testing.assert_array_equal(line, [[0.0, F.relu6(torch.tensor(special)).item()]])


def test_each_kernel_is_compiled_for_one_signature_whatever_it_is_given() -> None:
    weight, mask = _masked((4, 6), 0.5, 0)
    packed = CSR.from_dense(weight.t().contiguous().t(), mask)
    frozen = np.ones((1, 6), np.float32)
    CSRLinear(packed, 1)(np.ones((1, 6), np.float32))
    CSRLinear(packed, 8)(np.ones((8, 6), np.float32))
    CSRConv2d(packed, (1, 1), (2, 6, 3, 3), bias=np.ones(4))(np.ones((2, 6, 3, 3), np.float32))
    CSRConv2d(packed, (2, 3), (1, 1, 3, 3), stride=(2, 1), padding=(1, 0, 0, 1))(np.ones((1, 1, 3, 3), np.float32))
    assert frozen.flags.writeable
    for kernel in (csr.csr_conv2d, csr.csr_linear_dot, csr.csr_linear_plane):
        if hasattr(kernel, "signatures"):  # not with NUMBA_DISABLE_JIT=1
            assert len(kernel.signatures) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"kernel_size": (3, 3), "input_shape": (1, 2, 8, 8)}, "columns"),
        ({"kernel_size": (1, 1), "input_shape": (1, 12, 8, 8), "groups": 2}, "multiple of 2 rows"),
        ({"kernel_size": (3, 2), "input_shape": (1, 1, 2, 8)}, "does not fit"),
        ({"kernel_size": (1, 1), "input_shape": (1, 6, 8, 8), "bias": np.ones(4)}, "one entry per weight row"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        CSRConv2d(CSR.from_dense(torch.ones(3, 6)), **arguments)


def test_every_kernel_has_a_twin() -> None:
    kernels = {name for name in vars(csr) if name.startswith("csr_")}
    twins = {name for name in vars(reference) if name.startswith("csr_")}
    assert {name.removesuffix("_dot").removesuffix("_plane") for name in kernels} == twins


_PROGRAM = """
import numpy as np
from ops.formats import CSR
from ops.kernels.csr import CSRLinear
w = CSR((2, 3), np.array([0, 1, 3], np.int32), np.array([2, 0, 1], np.int32), np.array([1, 2, 3], np.float32))
print(CSRLinear(w)(np.array([[1, 2, 3]], np.float32)).tolist())
"""


@pytest.mark.slow
def test_processes_that_start_at_once_with_an_empty_cache_all_compute(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    for at_once in (3, 1):  # on an empty cache, then on a filled one
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", _PROGRAM],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(at_once)
        ]
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert (process.returncode, out.strip()) == (0, "[[3.0, 8.0]]"), err
        if os.environ.get("NUMBA_DISABLE_JIT", "0") == "0":
            assert len(list(tmp_path.rglob("csr.csr_linear_dot*.nbi"))) == 1, "nothing was cached"
            assert len(list(tmp_path.rglob("csr.csr_linear_dot*.nbc"))) == 1, (
                "the cache was missed: compiled more than once"
            )
