"""A runtime gives what the masked network gives in eval mode: every kind of network, both kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.layers import draw_masks_, sparsify
from ops.plan import PlannedOp, lower
from ops.runtime import InputError, Runtime

# torch's own remark about even kernels
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def _sparse(op: PlannedOp, kernels: list[str]) -> str:
    return kernels[-1]


def _torch(op: PlannedOp, kernels: list[str]) -> str:
    return "torch"


class Residual(nn.Module):
    """In-place everything, on purpose."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)  # one module, two calls

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


class PreActivation(nn.Module):
    """The shortcut reads the input after it was changed in place, as in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = F.relu(y, True)
        return self.conv(z) + y


class Views(nn.Module):
    """Changes memory that another name looks at."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(y.shape[0], -1)
        y.add_(1)
        flat[:, 0].zero_()
        return flat + y.flatten(1)


class SharedInPlace(nn.Module):
    """One in-place module called twice: once where a view looks on, once where nothing does."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        free = self.relu(self.conv(x))
        watched = x - 0.5
        view = watched.flatten(1)
        self.relu(watched)
        return view + free.flatten(1)


class Cells(nn.Module):
    """Functional calls, concatenation, pooling, keyword arguments, slices."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.b = nn.Conv2d(8, 6, (1, 3), padding=(0, 1), stride=(2, 1))
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = F.avg_pool2d(self.a(F.relu(x)), kernel_size=2, stride=(2, 1), ceil_mode=True, count_include_pad=False)
        a = F.pad(a, (0, 1, 0, 0))
        b = F.relu6(self.b(x))
        both = torch.cat([a * self.scale, b], dim=1)
        gate = torch.sigmoid(F.adaptive_avg_pool2d(both, 1))
        both = (both * gate)[:, 2:, ::2]
        return both.mean((2, 3)).sub(0.5)


class Attention(nn.Module):
    """A module torch keeps closed, and a linear layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.project(x.flatten(2).transpose(1, 2)))
        mixed, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        return mixed.softmax(-1)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) < 1e9 else x


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(
        nn.Conv2d(8, 12, 3, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(True),
        nn.Conv2d(12, 4, 1, groups=2),
        nn.ReLU6(),
    ),
    "same padding": lambda: nn.Sequential(
        nn.Conv2d(8, 6, 4, padding="same"), nn.Conv2d(6, 6, 2, padding="same", dilation=3)
    ),
    "residual": lambda: nn.Sequential(nn.ReLU(), Residual(8), Residual(8)),
    "pre-activation": PreActivation,
    "norm after activation": lambda: nn.Sequential(
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4),
    ),
    "shared in-place": SharedInPlace,
    "views": lambda: nn.Sequential(Views()),
    "cells": Cells,
    "attention": Attention,
    "untraceable": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), Moody(), nn.ReLU(True), nn.Conv2d(8, 2, 1)),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(8 * 81, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(20, 20),
        nn.Linear(20, 3),
    ),
    "identity": nn.Identity,
    "other convolutions": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(8, 4, 3, 2),
        nn.Hardswish(True),
        nn.SiLU(),
    ),
}


def _network(name: str, density: float) -> nn.Module:
    torch.manual_seed(3)
    net = sparsify(NETWORKS[name](), density)
    draw_masks_(net, torch.Generator().manual_seed(0))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


@pytest.mark.parametrize("choose", [_sparse, _torch], ids=["sparse", "torch"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_runtime_equals_the_network(name: str, density: float, batch: int, choose: Any) -> None:
    net = _network(name, density)
    x = torch.randn(batch, 8, 9, 9)
    kept = x.clone()
    with torch.no_grad():
        expected = net(x.clone())
    runtime = Runtime(lower(net, torch.randn_like(x), choose))
    for _ in range(2):
        found = runtime(x)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6
        assert found.is_contiguous() == expected.is_contiguous()
    assert torch.equal(x, kept), "the input was changed"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_input_gives_the_same_bits_in_new_memory(name: str) -> None:
    runtime = Runtime(lower(_network(name, 0.3), torch.randn(2, 8, 9, 9), _sparse))
    x, other = torch.randn(2, 2, 8, 9, 9)
    first = runtime(x)
    kept = first.clone()
    runtime(other)
    assert torch.equal(first, kept), "a later call changed an earlier result"
    assert torch.equal(runtime(x), kept)
    assert runtime(x).data_ptr() not in (first.data_ptr(), x.data_ptr())


def test_non_contiguous_and_channels_last_inputs_are_fine() -> None:
    net = _network("chain", 0.3)
    runtime = Runtime(lower(net, torch.randn(2, 8, 9, 9), _sparse))
    x = torch.randn(2, 9, 9, 8).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(runtime(x), net(x.contiguous()))
    torch.testing.assert_close(runtime(x.contiguous(memory_format=torch.channels_last)), runtime(x))


def test_results_are_ordinary_tensors_and_inputs_may_require_grad() -> None:
    out = Runtime(lower(_network("chain", 0.3), torch.randn(1, 8, 9, 9), _sparse))(
        torch.randn(1, 8, 9, 9, requires_grad=True)
    )
    assert not out.requires_grad
    assert not out.is_inference()
    out += 1  # not allowed on inference tensors


def test_structures_come_back_as_the_network_returns_them() -> None:
    class Pair(NamedTuple):
        logits: Tensor
        features: dict[str, list[Tensor]]

    class Many(nn.Module):
        def forward(self, x: Tensor) -> Any:
            low, high = x.split([3, 5], 1)
            return {"pair": (high, [low + 1]), "input": x, "number": 3}

    x = torch.randn(1, 8, 2, 2)
    found = Runtime(lower(Many(), x))(x)
    torch.testing.assert_close(found, Many()(x))
    assert found["input"].data_ptr() != x.data_ptr()
    assert Pair._fields  # named tuples go through the same road below


def test_an_all_zero_layer_gives_its_bias() -> None:
    net = sparsify(nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(196, 2)), 0.5)
    for layer in (net[0], net[2]):
        layer.set_mask(torch.zeros_like(layer.mask))
    x = torch.randn(1, 8, 9, 9)
    plan = lower(net, x, _sparse)
    assert plan.macs == 0
    torch.testing.assert_close(Runtime(plan)(x)[0], net[2].bias.detach())


def test_weights_are_copied_when_lowered() -> None:
    net = _network("chain", 0.3)
    x = torch.randn(1, 8, 9, 9)
    runtimes = [Runtime(lower(net, x, choose)) for choose in (_sparse, _torch)]
    before = [runtime(x) for runtime in runtimes]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(runtime(x), y) for runtime, y in zip(runtimes, before, strict=True))


@pytest.mark.parametrize(
    ("x", "error", "part"),
    [
        (torch.randn(2, 8, 9, 9), InputError, r"float32\[1, 8, 9, 9\] on the CPU, got float32\[2, 8, 9, 9\]"),
        (torch.randn(1, 8, 9), InputError, r"got float32\[1, 8, 9\]"),
        (torch.zeros(1, 8, 9, 9, dtype=torch.float64), InputError, r"got float64\[1, 8, 9, 9\]"),
        (torch.zeros(1, 8, 9, 9, device="meta"), InputError, "on meta"),
        (np.zeros((1, 8, 9, 9), np.float32), TypeError, "as_tensor"),
    ],
)
def test_wrong_inputs_are_told(x: Any, error: type[Exception], part: str) -> None:
    runtime = Runtime(lower(_network("chain", 0.3), torch.randn(1, 8, 9, 9)))
    with pytest.raises(error, match=part):
        runtime(x)


def test_a_plan_without_weights_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match="meta device"):
        Runtime(lower(net, torch.randn(1, 8, 9, 9)))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_operation_can_be_called_alone(name: str) -> None:
    x = torch.randn(1, 8, 9, 9)
    plan = lower(_network(name, 0.3), x, _sparse)
    runtime = Runtime(plan)
    calls = runtime.calls(x)
    assert len(calls) == len(plan.ops)
    before = runtime(x)
    for call in calls + calls:
        call()
    assert torch.equal(runtime(x), before)


def test_intermediate_values_are_let_go() -> None:
    runtime = Runtime(lower(_network("residual", 0.3), torch.randn(1, 8, 9, 9), _sparse))
    runtime(torch.randn(1, 8, 9, 9))
    assert all(not instance._tensors for instance in runtime._idle)
