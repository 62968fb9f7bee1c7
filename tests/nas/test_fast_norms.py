"""Our sums of batch norms against torch's batch norm in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.fast_norms import is_fast, normalised_sum

EPS = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twin(xs: list[Tensor], scale: Tensor, shift: Tensor, normed: list[bool], relu: bool) -> Tensor:
    total = shift.view(-1, 1, 1)
    for x, factor, norm in zip(xs, scale, normed, strict=True):
        value = F.batch_norm(x, None, None, training=True, eps=EPS) if norm else x
        total = total + value * factor.view(-1, 1, 1)
    return total.relu() if relu else total


def ours(xs: list[Tensor], scale: Tensor, shift: Tensor, normed: list[bool], relu: bool) -> Tensor:
    return normalised_sum(xs, scale, shift, eps=EPS, relu=relu, normed=normed)


Run = Callable[[list[Tensor], Tensor, Tensor, list[bool], bool], Tensor]


def results(run: Run, dtype: torch.dtype, shape: tuple[int, ...], normed: list[bool], relu: bool) -> list[Tensor]:
    """The value, and its gradients in inputs, scale and shift."""
    generator = torch.Generator().manual_seed(len(normed))
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    given = [3 * draw(*shape) + 2 for _ in normed]
    inputs = [t.to(dtype).requires_grad_() for t in (*given, draw(len(normed), shape[1]), draw(shape[1]))]
    y = run(inputs[:-2], inputs[-2], inputs[-1], normed, relu)
    return [y.detach(), *torch.autograd.grad(y, inputs, draw(*shape).to(dtype))]


SHAPES = [(3, 1, 5, 7), (2, 4, 3, 3), (1, 8, 1, 3), (5, 8, 14, 14), (2, 16, 9, 9), (3, 48, 5, 4), (2, 64, 1, 1 + 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("normed", "relu"),
    [
        ([True], False),
        ([True], True),
        ([False], False),
        ([True, True, True], False),
        ([False, True, False, True], False),
    ],
)
def test_a_sum_of_norms_and_its_gradients(shape: tuple[int, ...], normed: list[bool], relu: bool) -> None:
    expected = results(twin, torch.float64, shape, normed, relu)
    for a, b in zip(results(ours, torch.float32, shape, normed, relu), expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max()) <= 2e-5 * (1 + float(b.abs().max()))


def test_statistics_are_as_exact_as_torch_s_where_the_mean_is_large() -> None:
    x = 100 + torch.randn(16, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = F.batch_norm(x.double(), None, None, training=True)
    error = lambda y: float((y - exact).abs().max())  # noqa: E731
    mine = normalised_sum([x], torch.ones(1, 16), eps=EPS)
    assert error(mine) <= 2 * error(F.batch_norm(x, None, None, training=True))
    assert error(mine) < 2e-5


def test_results_are_in_channels_last_whatever_comes_in() -> None:
    x, g = torch.randn(2, 16, 4, 4, requires_grad=True), torch.randn(2, 16, 4, 4)
    y = normalised_sum([x[:, :, ::1, :]], torch.ones(1, 16), eps=EPS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (from_plain,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (from_last,) = torch.autograd.grad(y, x, g.contiguous(memory_format=torch.channels_last))
    assert torch.equal(from_plain, from_last)


def test_gradients_that_nobody_wants_are_left_out_and_the_others_stay() -> None:
    xs = [torch.randn(2, 16, 4, 4) for _ in range(3)]
    scale = torch.rand(3, 16)
    normed = [True, False, False]
    every = [t.clone().requires_grad_() for t in (*xs, scale)]
    expected = torch.autograd.grad(normalised_sum(every[:3], every[3], eps=EPS, normed=normed).square().sum(), every)
    for wanted in range(4):
        some = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((*xs, scale))]
        y = normalised_sum(some[:3], some[3], eps=EPS, normed=normed)
        (gradient,) = torch.autograd.grad(y.square().sum(), some[wanted])
        assert torch.equal(gradient, expected[wanted])


def test_nan_and_infinity_are_passed_on() -> None:
    x = torch.randn(2, 16, 4, 4)
    x[0, 3, 1, 1] = float("nan")
    for relu in (False, True):
        y = normalised_sum([x], torch.ones(1, 16), eps=EPS, relu=relu)
        assert bool(y[:, 3].isnan().all())
        assert bool(y[:, :3].isfinite().all())


def test_what_there_is_no_code_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 16, 3, 3)
    assert is_fast(x)
    assert not is_fast(x.double())
    assert not is_fast(x[:, :12])
    assert not is_fast(x[:1, :, :1, :1])  # one pixel: torch's own error is the one to see
    assert not is_fast(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="one input only, got 2"):
        normalised_sum([x, x], torch.ones(2, 16), eps=EPS, relu=True)
    monkeypatch.setattr("ops.kernels.isa.config.DISABLE_JIT", 1)
    assert not is_fast(x)


def test_it_is_what_a_norm_and_a_relu_compute() -> None:
    x = torch.randn(3, 8, 6, 6)
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    y = normalised_sum([x], norm.weight[None], norm.bias, eps=norm.eps, relu=True)
    torch.testing.assert_close(y, norm(x).relu(), rtol=1e-5, atol=1e-5)
