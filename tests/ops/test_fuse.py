"""What directly follows a layer becomes a part of it, where that changes nothing; everything else stays as it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.layers import draw_masks_, sparsify
from ops.plan import Plan, PlannedOp, lower
from ops.runtime import Runtime

X = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two convolutions and a function of them and the input."""

    def __init__(self, function: Callable[[nn.Module, nn.Module, Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        if norm:
            self.a, self.b = (nn.Sequential(conv, nn.BatchNorm2d(6)) for conv in (self.a, self.b))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.a, self.b, x)


def _dense(op: PlannedOp, kernels: list[str]) -> str:
    return "torch"


def _plan(net: nn.Module, x: Tensor = X) -> Plan:
    """The plan of a network, after its result was compared to the network's."""
    net.eval()
    plan = lower(net, x, _dense)
    assert not plan.opaque
    kept = x.clone()
    with torch.no_grad():
        expected = net(x.clone())
    for _ in range(2):
        torch.testing.assert_close(Runtime(plan)(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)
    return plan


def _said(plan: Plan) -> list[str]:
    """Per operation its name if it is a layer, else its kind; with what was fused into it."""
    return [" ".join([op.name if op.layer else op.kind, *["+"] * op.residual, *op.post_ops]).strip() for op in plan.ops]


def _in_place(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = a(x)
    y += x
    return y


def _added(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    return a(x).add_(x)


SPELLINGS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "layer + other": lambda a, b, x: a(x) + x,
    "other + layer": lambda a, b, x: x + a(x),
    "torch.add": lambda a, b, x: torch.add(x, a(x)),
    "torch.add by name": lambda a, b, x: torch.add(input=a(x), other=x, alpha=1),
    "Tensor.add": lambda a, b, x: a(x).add(x),
    "+=": _in_place,
    "add_": _added,
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_addition_is_folded_however_it_is_written(spelling: str, norm: bool) -> None:
    plan = _plan(Two(SPELLINGS[spelling], norm))
    assert _said(plan) == ["a.0 +" if norm else "a +"]
    (op,) = plan.ops
    assert op.inputs == (0, 0)
    assert op.input_shapes == ((2, 6, 7, 7), (2, 6, 7, 7))


def _changed_before_it_is_read(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    flat = y.flatten(1)
    z = a(y)
    flat.add_(1)  # changes what `a` has read already
    return z + flat.view_as(y)


NOT_FOLDED: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "scaled": lambda a, b, x: torch.add(a(x), x, alpha=2),
    "scaled method": lambda a, b, x: x.add(a(x), alpha=2),
    "a number": lambda a, b, x: a(x) + 1,
    "broadcast over the image": lambda a, b, x: a(x) + x.mean((2, 3), keepdim=True),
    "broadcast to more images": lambda a, b, x: a(x[:1]) + x,
    "a constant": lambda a, b, x: a(x) + torch.arange(588.0).view(2, 6, 7, 7),
    "itself": lambda a, b, x: (lambda y: y + y)(a(x)),
    "its own descendant": lambda a, b, x: (lambda y: y + F.max_pool2d(y, 3, 1, 1))(a(x)),
    "read elsewhere": lambda a, b, x: (lambda y: torch.cat([y + x, y]))(a(x)),
    "another type": lambda a, b, x: a(x) + x.double(),
    "difference": lambda a, b, x: a(x) - x,
    "after an activation": lambda a, b, x: F.relu(a(x)) + x,
    "input changed in between": _changed_before_it_is_read,
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_other_additions_stay(name: str) -> None:
    plan = _plan(Two(NOT_FOLDED[name]))
    assert not any(op.residual for op in plan.ops)


@pytest.mark.parametrize("norm", [False, True])
def test_of_two_layers_the_later_one_takes_the_addition(norm: bool) -> None:
    names = ("a.0", "b.0") if norm else ("a", "b")
    for function in (lambda a, b, x: a(x) + b(x), lambda a, b, x: (lambda y: b(x) + y)(a(x))):
        plan = _plan(Two(function, norm))
        assert _said(plan) == [names[0], f"{names[1]} +"]
        assert plan.ops[1].inputs == (0, 1)


def test_a_layer_without_activation_takes_the_addition_even_if_it_is_the_earlier_one() -> None:
    plan = _plan(Two(lambda a, b, x: a(x) + F.relu(b(x.flip(2)))))
    assert _said(plan) == ["flip", "b relu", "a +"]
    assert plan.ops[2].inputs == (0, 2)


def test_a_layer_takes_one_addition_and_no_norm_after_it() -> None:
    assert _said(_plan(Two(lambda a, b, x: a(x) + x + x.flip(2)))) == ["a +", "flip", "add"]

    class Normed(Two):
        def __init__(self) -> None:
            super().__init__(lambda a, b, x: a(x) + x)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    assert _said(_plan(Normed())) == ["a +", "batch_norm2d"]


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (lambda: nn.ReLU(True), F.relu),
    "relu6": (nn.ReLU6, lambda x: F.relu6(x, inplace=True)),
    "hardswish": (lambda: nn.Hardswish(inplace=True), F.hardswish),
    "silu": (nn.SiLU, lambda x: F.silu(x, inplace=True)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_fused_with_and_without_an_addition(name: str) -> None:
    module, function = ACTIVATIONS[name]
    assert _said(_plan(Two(lambda a, b, x: function(b(function(a(x) + x)))))) == [f"a + {name}", f"b {name}"]
    assert _said(_plan(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), module(), nn.ReLU()))) == [
        f"0 {name}",
        "relu",
    ]
    assert _said(_plan(nn.Sequential(nn.Linear(7, 5), module()))) == [f"0 {name}"]


def test_a_linear_layer_takes_an_addition_of_any_number_of_axes() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x + F.linear(self.mix(x) + x, self.mix.weight))

    plan = _plan(Tokens())
    assert [(op.kind, op.residual, op.post_ops) for op in plan.ops] == [
        ("linear", True, ()),
        ("linear", True, ("silu",)),
    ]


def test_a_chain_of_blocks_reads_the_right_shortcuts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.two(self.relu(self.one(x))))
            y += x
            return self.relu(y)

    plan = _plan(nn.Sequential(Block(), Block()))
    assert _said(plan) == ["0.one relu", "0.two + relu", "1.one relu", "1.two + relu"]
    assert [op.inputs for op in plan.ops] == [(0,), (1, 0), (2,), (3, 2)]


def test_pre_activation_norms_and_shared_activations_stay() -> None:
    class PreActivation(Two):
        def __init__(self) -> None:
            super().__init__(lambda a, b, x: a(x))
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.norm(x))
            return self.a(y) + self.b(y)

    assert _said(_plan(PreActivation())) == ["batch_norm2d", "relu", "a", "b +"]
    assert _said(_plan(Two(lambda a, b, x: b(F.relu(x)) + a(F.relu(x))))) == ["relu", "b", "a +"]


def test_sparse_layers_keep_mask_and_counts() -> None:
    net = sparsify(Two(SPELLINGS["+="], norm=True), 0.3)
    draw_masks_(net, torch.Generator().manual_seed(0))
    (op,) = _plan(net).ops
    alone = lower(net.a, X, _dense).ops[0]
    assert torch.equal(op.layer.mask, net.a[0].mask)
    assert not op.layer.weight[~op.layer.mask].any()
    assert (op.nnz, op.macs, op.dense_macs) == (alone.nnz, alone.macs, alone.dense_macs)


def test_keys_and_tables_tell_a_layer_with_a_residual() -> None:
    plain, shortcut = lower(Two(lambda a, b, x: a(x)), X), lower(Two(lambda a, b, x: F.relu(a(x) + x)), X)
    assert plain.ops[0].key != shortcut.ops[0].key
    assert '"residual":true' in str(shortcut.ops[0].key)
    assert list(shortcut.frame()["post_ops"]) == ["+ relu"]
    assert list(shortcut.frame()["inputs"]) == ["0 0"]


def test_meta_networks_are_fused_alike() -> None:
    with torch.device("meta"):
        net = Two(SPELLINGS["+="], norm=True)
    assert [op.key for op in lower(net, X).ops] == [op.key for op in _plan(Two(SPELLINGS["+="], norm=True)).ops]
