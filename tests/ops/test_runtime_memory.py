"""What the runtime hands out and leaves alone: memory of its own, other types, global state of torch, changes in place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.layers import draw_masks_, sparsify
from ops.plan import lower
from ops.runtime import Runtime


class Net(nn.Module):
    """A sparse convolution and a function of its result."""

    def __init__(self, function: Callable[[Tensor], Any], kernel: int = 3) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, kernel, padding=kernel // 2), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def _sparse(net: nn.Module) -> nn.Module:
    net = sparsify(net, 0.3)
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net.eval()


def _last(op: Any, kernels: list[str]) -> str:
    return kernels[-1]


X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))

MIXED = {
    "bool": lambda y: y * (y > 0),
    "int": lambda y: y + y.int(),
    "half": lambda y: torch.cat([y, y.half()], 1),
    "byte": lambda y: torch.cat([y, y.abs().byte()], 1),
}
IN_PLACE = {
    "sigmoid_": lambda y: (torch.sigmoid_(y), y * 1.5)[1],
    "selu_": lambda y: (F.selu_(y), y * 1.5)[1],
    "out": lambda y: (torch.mul(y, 2.0, out=y), y + 1)[1],
    "foreach": lambda y: (torch._foreach_add_([y], 1.0), y * 2)[1],
    "view": lambda y: (y.view(2, -1).mul_(2), y + 1)[1],
    "part": lambda y: (y[:, :4].add_(1), y * 2)[1],
}


@pytest.mark.parametrize("name", [*MIXED, *IN_PLACE])
@pytest.mark.parametrize("kernel", [1, 3])
def test_other_types_and_changes_in_place_are_as_in_torch(name: str, kernel: int) -> None:
    net = _sparse(Net({**MIXED, **IN_PLACE}[name], kernel))
    with torch.no_grad():
        expected = net(X)
    atol = 1e-2 if name == "half" else 1e-5  # a rounding error may tip a half
    torch.testing.assert_close(Runtime(lower(net, X, _last))(X), expected, rtol=1e-4, atol=atol)


def test_parts_of_a_concatenation_that_is_changed_afterwards() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.a(x), self.b(x)
            c = torch.cat([b, a], 1)
            a.view(-1).mul_(2)
            return c, a

    net = _sparse(Parts())
    with torch.no_grad():
        expected = net(X)
    torch.testing.assert_close(Runtime(lower(net, X, _last))(X), expected, rtol=1e-4, atol=1e-5)


def test_global_settings_of_torch_change_nothing() -> None:
    net = _sparse(Net(torch.relu))
    runtime = Runtime(lower(net, X, _last))
    expected = runtime(X)
    torch.set_default_dtype(torch.float64)
    try:
        found = runtime(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with torch.device("meta"):
        assert torch.equal(runtime(X), expected)


def test_results_are_ordinary_tensors_that_later_calls_leave_alone() -> None:
    runtime = Runtime(lower(_sparse(Net(torch.relu)), X, _last))
    first = runtime(X)
    kept = first.clone()
    runtime(2 * X)
    assert torch.equal(first, kept)
    assert not first.is_inference()
    (first.requires_grad_() * 2).sum().backward()


@pytest.mark.parametrize("shape", [(0, 8, 9, 9), (0, 12)])
def test_empty_batches_are_as_in_torch(shape: tuple[int, ...]) -> None:
    net = _sparse(Net(torch.relu)) if len(shape) == 4 else _sparse(nn.Sequential(nn.Linear(12, 4)))
    x = torch.zeros(shape)
    with torch.no_grad():
        assert Runtime(lower(net, x, _last))(x).shape == net(x).shape


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_a_wrong_number_of_threads_is_one_clear_error(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be a whole number"):
        Runtime(lower(_sparse(Net(torch.relu)), X), threads=threads)


INTERRUPTED = """
import signal
import torch
from tests.ops.test_runtime_memory import Net, X, _last, _sparse
from ops.plan import lower
from ops.runtime import Runtime

runtime = Runtime(lower(_sparse(Net(torch.relu)), X, _last), threads=2)
expected = runtime(X)

def stop(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, stop)
for k in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-6 * k)
        for _ in range(1000):
            runtime(X)
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
assert torch.equal(runtime(X), expected)
"""


def test_an_interrupted_call_does_not_stop_later_ones() -> None:
    """In a process of its own: the exception may come anywhere, in a callback of the tests' machinery too."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, found.stderr[-2000:]
