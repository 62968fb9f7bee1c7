"""What is executed for a plan: fewest conversions, fused blocks with the same results, memory that is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ops import chunks
from ops.kernels.specialised import specialised_available
from ops.layers import draw_masks_, sparsify
from ops.plan import Plan, lower
from ops.runtime import CONVERSIONS, Runtime
from ops.schedule import Schedule, schedule


def _sparse(net: nn.Module, density: float = 0.2) -> nn.Module:
    net = sparsify(net, density)
    draw_masks_(net, torch.Generator().manual_seed(0))
    return net.eval()


def _plan(net: nn.Module, x: Tensor, kernel: str = "portable") -> Plan:
    return lower(net, x, lambda op, kernels: kernel if kernel in kernels else kernels[-1])


def _kinds(plan: Schedule) -> list[str]:
    return [step.kind for step in plan.steps]


def _same(net: nn.Module, x: Tensor, plan: Plan) -> None:
    with torch.no_grad():
        torch.testing.assert_close(Runtime(plan)(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_run_of_sparse_layers_is_converted_once_each_way() -> None:
    net = _sparse(nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))))
    x = torch.randn(1, 8, 16, 16)
    kinds = _kinds(schedule(_plan(net, x)))
    assert [kind for kind in kinds if kind in CONVERSIONS] == ["to_lanes", "from_lanes"]
    assert kinds.count("conv") == 4


def test_halving_the_resolution_needs_no_conversion_for_powers_of_two() -> None:
    layers = [nn.Conv2d(8, 8, 3, stride, 1) for stride in (1, 2, 1, 2, 1)]
    net, x = _sparse(nn.Sequential(*layers)), torch.randn(1, 8, 32, 32)
    assert "relayout" not in _kinds(schedule(_plan(net, x)))
    _same(net, x, _plan(net, x))


def test_a_dense_layer_in_the_middle_is_left_and_entered_again() -> None:
    net, x = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3))), torch.randn(1, 8, 8, 8)
    plan = lower(net, x, lambda op, kernels: "torch" if op.name == "1" else "portable")
    kinds = _kinds(schedule(plan))
    assert kinds == ["to_lanes", "conv", "from_lanes", "torch", "to_lanes", "conv", "from_lanes"]
    _same(net, x, plan)


class Concatenation(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(16 if again else 12, 4, 3, padding=1)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b, c = self.b(a), self.c(a)
        return self.last(torch.cat([a, b, c, a] if self.again else [a, b, c], 1)) + b


@pytest.mark.parametrize("again", [False, True])
def test_inputs_of_a_concatenation_are_written_in_place(again: bool) -> None:
    net, x = _sparse(Concatenation(again), 0.5), torch.randn(2, 4, 9, 9)
    plan = _plan(net, x)
    assert _kinds(schedule(plan)).count("copy") == (2 if again else 0)  # what is there twice has no single place
    _same(net, x, plan)


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels)),
        )
        self.shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x) if self.shortcut else self.body(x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", ["portable", "specialised"])
@pytest.mark.parametrize("size", [14, 15])
def test_inverted_residuals_in_chunks_give_the_same(
    stride: int, kernel: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _sparse(nn.Sequential(nn.Conv2d(3, 8, 1), InvertedResidual(8, 50, stride), InvertedResidual(8, 48)), 0.3)
    x = torch.randn(2, 3, size, size)
    whole = schedule(_plan(net, x, kernel))
    monkeypatch.setattr(chunks, "CACHE_BYTES", 40_000)
    plan = _plan(net, x, kernel)
    cut = schedule(plan)
    assert _kinds(cut).count("depthwise") > _kinds(whole).count("depthwise") == 2
    assert cut.arena < whole.arena
    _same(net, x, plan)


@pytest.mark.skipif(not specialised_available(), reason="needs AVX-512 and executable memory")
def test_a_pair_of_pointwise_convolutions_is_one_step() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 32, 3, 2, 1), nn.Conv2d(32, 8, 1)
            self.beside = nn.Conv2d(8, 8, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.second(torch.relu(self.first(x))) + self.beside(x))

    net, x = _sparse(Pair(), 0.1), torch.randn(3, 8, 14, 14)
    plan = _plan(net, x, "specialised")
    assert "pair" in _kinds(schedule(plan))
    _same(net, x, plan)
    assert "pair" not in _kinds(schedule(_plan(net, x, "portable")))


def test_buffers_are_shared_over_time() -> None:
    def arena(depth: int) -> int:
        net = _sparse(nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))))
        return schedule(_plan(net, torch.randn(1, 8, 32, 32))).arena

    assert arena(3) == arena(20)


def test_the_table_names_every_step_and_says_what_torch_runs() -> None:
    net = _sparse(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)), 0.5)
    plan = schedule(_plan(net, torch.randn(1, 4, 8, 8)))
    frame = plan.frame()
    assert len(frame) == len(plan.steps)
    assert frame.loc[frame.step == "torch", "op"].tolist() == ["1"]
    assert "working memory" in str(plan)


def test_keys_tell_steps_of_different_cost_apart() -> None:
    x = torch.randn(1, 8, 16, 16)
    keys = []
    for density in (0.1, 0.2):
        plan = schedule(_plan(_sparse(nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))), density), x))
        keys.append([plan.key(step) for step in plan.steps if step.kind == "conv"])
    first, second, last = keys[0]
    assert first == second  # the same work
    assert last != first  # nobody reads its halo
    assert not set(keys[0]) & set(keys[1])
