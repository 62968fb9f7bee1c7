"""The slow twins of the kernels equal torch, in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ops.formats import CSR
from ops.reference import activate, csr_conv2d, csr_linear

ACTIVATIONS = {
    "none": lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch_and_let_nan_through(name: str) -> None:
    values = torch.cat([torch.linspace(-9, 9, 73), torch.tensor([-1e4, 1e4, math.inf, -0.0])]).double()
    found = [activate(float(value), name) for value in values]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), ACTIVATIONS[name](values))
    assert math.isnan(activate(math.nan, name))


def test_unknown_activations_are_told() -> None:
    with pytest.raises(ValueError, match='unknown activation "gelu"; known: none, relu'):
        activate(1.0, "gelu")


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_adds_the_residual_before_the_activation(activation: str) -> None:
    x, weight, bias, other = _random(3, 7), torch.from_numpy(_random(5, 7)), _random(5), _random(3, 5)
    found = csr_linear(x, CSR.from_dense(weight), bias, activation, other)
    y = F.linear(torch.from_numpy(x).double(), weight.double(), torch.from_numpy(bias).double())
    torch.testing.assert_close(torch.from_numpy(found), ACTIVATIONS[activation](y + torch.from_numpy(other)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution_adds_the_residual_before_the_activation(activation: str) -> None:
    x, weight, bias, other = _random(2, 4, 6, 5), torch.from_numpy(_random(6, 2, 3, 2)), _random(6), _random(2, 6, 3, 5)
    packed = CSR.from_dense(weight.flatten(1))
    found = csr_conv2d(x, packed, (3, 2), bias, (2, 1), (1, 1, 1, 0), (1, 1), 2, activation, other)
    padded = F.pad(torch.from_numpy(x).double(), (1, 0, 1, 1))
    y = F.conv2d(padded, weight.double(), torch.from_numpy(bias).double(), (2, 1), 0, 1, 2)
    torch.testing.assert_close(torch.from_numpy(found), ACTIVATIONS[activation](y + torch.from_numpy(other)))
