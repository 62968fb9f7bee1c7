"""The fast way through a supernet computes what the plain one does: values, gradients, in every space and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.oneshot import fast
from nas.oneshot.fast import weighted_sum
from nas.oneshot.fast_depthwise import depthwise, is_fast
from nas.oneshot.fast_kernels import supports, weight_gradient
from nas.oneshot.fast_norms import constant
from nas.oneshot.mixed import Gate, GateBoard, Gates, MixedOp, PartialMixedOp, plain_sum, shuffle_channels
from nas.oneshot.supernet import Supernet
from ops.candidates import DARTS_PRIMITIVES, NASNET_PRIMITIVES, OPERATIONS
from ops.layers import sparsify
from ops.learned import LearnedSparseConv2d, learn_masks
from search_spaces import Space, get_space
from tests.nas.supernet_spaces import SPACES, batch, soft_gates

Make = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a: Any, b: Any) -> None:
    """To the rounding of doubles; of floats as far as batch norms of few values leave it."""
    tolerance = 1e-9 if isinstance(a, Tensor) and a.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def everything(net: Supernet, gates: Gates, x: Tensor) -> dict[str, Tensor | None]:
    """Logits, and the gradients of their squares in the input, all weights, scores and gates."""
    x = x.detach().requires_grad_()
    named: dict[str, Tensor] = {"input": x, **net.by_key()}
    named |= {f"gate {name}": gate.weights for name, gate in gates.items() if gate.weights is not None}
    logits = net(x, gates)
    found = torch.autograd.grad(logits.square().sum(), list(named.values()), allow_unused=True)
    return {"logits": logits.detach(), **dict(zip(named, found, strict=True))}


def assert_same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            tolerance = 1e-8 if value.dtype == torch.float64 else 1e-3
            scale = float(value.abs().max()) + 1e-6
            assert float((other - value).abs().max()) <= tolerance * scale, name


def pair(space: Space, **how: Any) -> tuple[Supernet, Supernet]:
    return Supernet(space, seed=1, fast=False, **how), Supernet(space, seed=1, **how)


MIXED = [
    name for name in SPACES if name not in ("mlp", "nasnet, one pixel", "nasnet, imagenet stem")
]  # dropout, one pixel


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", [*MIXED, "mlp"])
def test_fast_and_plain_supernets_have_the_same_logits_and_gradients(name: str) -> None:
    plain, quick = pair(SPACES[name]())
    gates, x = soft_gates(plain), batch(plain.space)
    x = x.to(torch.get_default_dtype())
    assert_same(everything(plain, gates, x), everything(quick, gates, x))


def little_darts(**options: Any) -> Space:
    given: dict[str, Any] = {"channels": 8, "cells": 3, "classes": 4, "input_shape": (3, 8, 8)}
    return get_space("darts", **given | options)


MODES: dict[str, tuple[Space, dict[str, Any]]] = {
    "odd sizes": (little_darts(input_shape=(1, 9, 7)), {}),
    "affine": (little_darts(), {"affine": True}),
    "pooling without norm": (little_darts(), {"pool_norm": False}),
    "part of the channels": (little_darts(), {"partial": 2}),
    "part of the channels, odd": (little_darts(input_shape=(3, 7, 9)), {"partial": 4}),
    "learned masks": (little_darts(), {"learned": True}),
    "checkpointing": (little_darts(), {"checkpointing": True}),
}


IN_FLOATS = ("odd sizes", "part of the channels, odd", "learned masks")  # where our own kernels take part


@pytest.mark.parametrize(("mode", "double"), [*((m, True) for m in MODES), *((m, False) for m in IN_FLOATS)])
def test_fast_and_plain_agree_in_every_mode(mode: str, double: bool, request: pytest.FixtureRequest) -> None:
    if double:
        request.getfixturevalue("doubles")
    space, how = MODES[mode]
    plain, quick = pair(space, **how)
    gates, x = soft_gates(plain), batch(space)
    assert_same(everything(plain, gates, x), everything(quick, gates, x))


OPS: dict[str, Make] = {name: OPERATIONS[name] for name in {"none", *DARTS_PRIMITIVES, *NASNET_PRIMITIVES}}


def mixed(names: tuple[str, ...], *, channels: int = 16, **arguments: Any) -> MixedOp:
    torch.manual_seed(0)
    made = {n: OPS[n](in_channels=channels, out_channels=channels, **arguments) for n in names}
    net = MixedOp("op", made, GateBoard())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


def both(net: MixedOp, x: Tensor, chosen: tuple[int, ...] | None = None) -> None:
    """Assert that both sums of `net` on x are equal, with their gradients."""
    weights = torch.linspace(0.1, 0.9, len(net.candidates), dtype=x.dtype, requires_grad=True)
    chosen = tuple(range(len(net.candidates))) if chosen is None else chosen
    results = []
    for run in (plain_sum, weighted_sum):
        y = run(net, x, weights, chosen)
        toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
        inputs = [x, weights, *net.parameters()]
        results.append((y, *torch.autograd.grad((y * toward).sum(), inputs, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        close(b, a)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [4, 6, 32])
def test_one_mixed_operation_of_all_candidates(channels: int, stride: int, size: tuple[int, int]) -> None:
    odd = bool(size[0] % 2 or size[1] % 2)
    net = mixed(tuple(OPS), channels=channels, stride=stride, odd=odd)
    both(net, torch.randn(5, channels, *size, requires_grad=True))


@pytest.mark.parametrize("chosen", [(0, 2), (1, 4, 5), (0,)])
def test_a_part_of_the_candidates(chosen: tuple[int, ...]) -> None:
    both(mixed(("none", *DARTS_PRIMITIVES)), torch.randn(2, 16, 6, 6, requires_grad=True), chosen)


def test_sparse_layers_are_run_with_their_effective_weight() -> None:
    net = mixed(DARTS_PRIMITIVES)
    sparsify(net.candidates, 0.5)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.set_mask(torch.rand_like(layer.weight) < 0.5)  # type: ignore[operator]
    both(net, torch.randn(2, 16, 6, 6, requires_grad=True))
    learn_masks(net.candidates, 0.3)
    assert any(type(layer) is LearnedSparseConv2d for layer in net.modules())
    both(net, torch.randn(2, 16, 6, 6, requires_grad=True))


class Users(nn.Module):
    """Somebody's operation, which is particular about its input and counts how often it is called."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.view(len(x), -1).view(x.shape) * self.scale


class LoudReLU(nn.ReLU):
    """Not torch's ReLU, though it is a subclass of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_modules_that_are_not_known_are_called_as_they_are() -> None:
    candidates = {
        "users": Users(8),
        "inside": nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), Users(8)),
        "loud": nn.Sequential(LoudReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        "known": OPERATIONS["sep_conv_5x5"](8, 8),
    }
    net = MixedOp("op", candidates, GateBoard())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    both(net, torch.randn(3, 8, 6, 6, requires_grad=True))
    assert candidates["users"].calls == 2


def test_hooks_are_called() -> None:
    net, seen = mixed(("sep_conv_3x3", "dil_conv_5x5")), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ReLU | nn.Sequential):
            module.register_forward_hook(lambda _m, _i, y: seen.append(y.shape))
    both(net, torch.randn(2, 16, 6, 6, requires_grad=True))
    assert len(seen) == 2 * (9 + 4)


def test_networks_with_modules_of_others_get_their_images_as_they_came() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert fast.laid_out(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), x).is_contiguous(
        memory_format=torch.channels_last
    )
    assert fast.laid_out(nn.Sequential(nn.Conv2d(3, 8, 1), Users(8)), x) is x
    assert fast.laid_out(nn.Sequential(nn.Linear(3, 8)), x[:, :, 0, 0]).shape == (2, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sum_has_the_memory_format_of_its_input(layout: torch.memory_format) -> None:
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=layout)
    y = weighted_sum(mixed(DARTS_PRIMITIVES), x, torch.ones(7), tuple(range(7)))
    assert y.is_contiguous(memory_format=layout)


def test_what_depends_on_a_state_alone_is_computed_once_and_forgotten() -> None:
    board = GateBoard()
    nets = [mixed(DARTS_PRIMITIVES) for _ in range(3)]
    for net in nets:
        net.board = board
    x, weights = torch.randn(2, 16, 6, 6), torch.ones(7)
    for net in nets:
        weighted_sum(net, x, weights, tuple(range(7)))
    assert [place[2] for place in board.memo].count("relu") == 1
    known = len(board.memo)
    weighted_sum(nets[0], x, weights, tuple(range(7)))
    assert len(board.memo) == known
    x.add_(1)  # another value in the same tensor
    torch.testing.assert_close(
        weighted_sum(nets[0], x, weights, tuple(range(7))), plain_sum(nets[0], x, weights, tuple(range(7)))
    )
    for i in range(100):
        board.once(torch.zeros(1), str(i), lambda: torch.ones(1))
    assert len(board.memo) == board.SHARED
    supernet = Supernet(SPACES["darts"]())
    supernet(batch(supernet.space), soft_gates(supernet))
    assert not supernet.board.memo


def test_shuffling_channels_is_the_same_in_both_layouts() -> None:
    x = torch.randn(2, 12, 3, 5)
    y = shuffle_channels(x.contiguous(memory_format=torch.channels_last), 4)
    assert torch.equal(y, shuffle_channels(x, 4))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
def test_part_of_the_channels(stride: int) -> None:
    torch.manual_seed(0)
    made = {n: OPS[n](in_channels=4, out_channels=4, stride=stride) for n in DARTS_PRIMITIVES}
    for module in (m for c in made.values() for m in c.modules() if isinstance(m, nn.BatchNorm2d)):
        module.running_mean = module.running_var = None
    gates = {"op": Gate(torch.linspace(0.1, 0.7, 7))}
    x = torch.randn(2, 16, 6, 8)
    outputs = [PartialMixedOp("op", made, GateBoard(gates, fast=f), 4, stride)(x) for f in (False, True)]
    close(outputs[1], outputs[0])


WINDOWS = [(k, d, s) for k in (3, 5, 7) for d in (1, 2) for s in (1, 2)]


@pytest.mark.parametrize(("kernel", "dilation", "stride"), WINDOWS)
@pytest.mark.parametrize(
    ("n", "c", "h", "w"), [(3, 16, 9, 8), (2, 48, 5, 7), (4, 8, 14, 14), (2, 4, 7, 5), (1, 1, 3, 2), (2, 2, 1, 1)]
)
def test_depthwise_convolution_and_its_gradients(
    n: int, c: int, h: int, w: int, kernel: int, dilation: int, stride: int
) -> None:
    torch.manual_seed(kernel)
    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(c, 1, kernel, kernel, requires_grad=True)
    y = depthwise(x, weight, stride, dilation)
    expected = torch.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation, c)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn(y.shape)  # as it may come: in the other memory format
    for a, b in zip(torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_window_s_weight_is_its_definition() -> None:
    x, g = torch.randn(2, 3 + 1, 5, 6), torch.randn(2, 4, 5, 6)
    expected = torch.zeros(4, 1, 3, 3)
    for c in range(4):
        for i in range(3):
            for j in range(3):
                for y in range(5):
                    for column in range(6):
                        down, right = y + 2 * i - 2, column + 2 * j - 2
                        if 0 <= down < 5 and 0 <= right < 6:
                            expected[c, 0, i, j] += (x[:, c, down, right] * g[:, c, y, column]).sum()
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    torch.testing.assert_close(weight_gradient(x, g, 3, 1, 2, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("doubles")
def test_what_is_made_on_the_way_does_not_depend_on_where_it_was_first_made() -> None:
    x = torch.randn(2, 16, 5, 5, dtype=torch.float32)
    net = mixed(DARTS_PRIMITIVES, affine=False).float()
    constant.cache_clear()
    with torch.inference_mode():
        weighted_sum(net, x, torch.ones(7), tuple(range(7)))
    both(net, x.requires_grad_())


def test_what_there_is_no_code_for_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 16, 8, 8)
    conv = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)
    assert is_fast(conv, x)
    assert not is_fast(conv, x.double())
    assert not is_fast(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), x)
    assert not is_fast(nn.Conv2d(16, 16, 5, padding=2, groups=16), x)
    assert not is_fast(nn.Conv2d(16, 16, 5, padding=2, groups=8, bias=False), x)
    assert not is_fast(nn.Conv2d(16, 16, 5, padding=0, groups=16, bias=False), x)
    assert not is_fast(nn.Conv2d(16, 16, (5, 3), padding=(2, 1), groups=16, bias=False), x)
    assert not supports(24, 5)
    assert not supports(16, 9)
    monkeypatch.setattr("ops.kernels.isa.config.DISABLE_JIT", 1)
    assert not is_fast(conv, x)


@pytest.mark.usefixtures("doubles")
def test_numbers_stay_finite_where_torch_s_batch_norm_would_read_beyond_an_expanded_scale() -> None:
    space = get_space("nasbench201", channels=8, cells=1, classes=4, input_shape=(3, 9, 9))
    net = Supernet(space)
    found = everything(net, soft_gates(net), batch(space))
    assert all(bool(value.isfinite().all()) for value in found.values() if value is not None)
