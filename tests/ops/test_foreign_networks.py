"""Networks nobody here had in mind, pruned by torch's own tools: a runtime equals them, whatever is in them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from ops.plan import PlannedOp, lower
from ops.runtime import Runtime
from tests.ops.foreign_networks import NETWORKS, PRUNERS, network, zeros


def _last(op: PlannedOp, kernels: list[str]) -> str:
    return kernels[-1]


def _portable(op: PlannedOp, kernels: list[str]) -> str:
    return "portable"


def _equal(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7)


def _cases() -> list[tuple[str, str]]:
    pruners = list(PRUNERS)
    return [(name, pruners[(i + k) % len(pruners)]) for i, name in enumerate(NETWORKS) for k in (0, 2)]


@pytest.mark.parametrize("choose", [None, _last, _portable], ids=["default", "last", "portable"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "pruner"), _cases())
def test_runtime_equals_the_pruned_network(name: str, pruner: str, batch: int, choose: Any) -> None:
    net = network(name, pruner)
    x = torch.randn(batch, 3, *NETWORKS[name][1])
    with torch.no_grad():
        expected = net(x)
    plan = lower(net, torch.randn_like(x), choose)
    assert _equal(Runtime(plan)(x), expected)
    assert _equal(Runtime(plan, threads=2)(x), expected)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_everybody_elses_masks_are_found(pruner: str) -> None:
    plan = lower(network("resnet", pruner), torch.randn(1, 3, 37, 45), _last)
    layers = [op for op in plan.ops if op.layer is not None]
    assert len(layers) == 13
    assert {op.pattern for op in layers} == {"unstructured"}
    assert {op.kernel for op in layers} <= {"portable", "specialised"}
    assert all(op.density < 0.8 for op in layers)


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "unet"])
def test_two_callers_at_once_get_their_own_bits(name: str) -> None:
    inputs = torch.randn(4, 1, 3, *NETWORKS[name][1])
    runtime = Runtime(lower(network(name, "l1"), inputs[0], _last), threads=2)
    expected = [runtime(x) for x in inputs]
    wrong: list[int] = []

    def call(first: int) -> None:
        for turn in range(30):
            i = (first + turn) % len(inputs)
            if not torch.equal(runtime(inputs[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def _pruned_convolutions() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    for layer in (net[0], net[2]):
        zeros(layer)
    return net


def test_networks_are_lowered_as_pruning_left_them_with_gradients() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    prune.l1_unstructured(net[0], "weight", 0.8)
    x = torch.randn(1, 3, 9, 9)
    assert _equal(Runtime(lower(net, x, _last))(x), net(x))


class Moody(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) < 1e9 else 2 * x


def test_what_cannot_be_looked_into_may_follow_a_convolution_that_reads_neighbours() -> None:
    net, x = nn.Sequential(_pruned_convolutions(), Moody()).eval(), torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        assert _equal(Runtime(lower(net, x, _last))(x), net(x))


class ViewsOfTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x[:, :, :, 1:])) + x[:, :1, :, 1:]


def test_the_input_is_left_alone_even_where_the_network_changes_it() -> None:
    x = torch.randn(1, 3, 9, 9)
    kept = x.clone()
    Runtime(lower(ViewsOfTheInput().eval(), x.clone(), _last))(x)
    assert torch.equal(x, kept)


def test_layers_whose_bias_is_pruned_too_stay_sparse() -> None:
    net = _pruned_convolutions()
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", 0.8)
        prune.l1_unstructured(layer, "bias", 0.5)
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        expected = net(x)
    plan = lower(net, x, _last)
    assert _equal(Runtime(plan)(x), expected)
    assert {op.kernel for op in plan.ops} <= {"portable", "specialised"}


@pytest.mark.parametrize("squashed", [False, True])
def test_masks_of_torch_ao_are_found_before_and_after_squashing(squashed: bool) -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    sparsifier = WeightNormSparsifier(sparsity_level=0.8, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    if squashed:
        sparsifier.squash_mask()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = net(x)
    plan = lower(net, x)
    assert [op.kernel for op in plan.ops] == ["portable", "portable"]
    assert all(abs(op.density - 0.2) < 0.01 for op in plan.ops)
    assert _equal(Runtime(plan)(x), expected)


def test_an_earlier_nan_leaves_nothing_behind() -> None:
    x = torch.randn(3, 3, *NETWORKS["densenet"][1])
    runtime = Runtime(lower(network("densenet", "zeros"), x, _last))
    expected = runtime(x)
    for value in (float("nan"), float("inf"), -1e30):
        runtime(torch.full_like(x, value))
        assert torch.equal(runtime(x), expected)
    x[0] = float("nan")
    assert torch.equal(runtime(x)[1:], expected[1:])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_modules_run_through_torch() -> None:
    x = torch.randn(1, 3, 9, 9)
    net = nn.Sequential(torch.jit.trace(_pruned_convolutions(), x), nn.ReLU()).eval()
    with torch.no_grad():
        assert _equal(Runtime(lower(net, x, _last))(x), net(x))
