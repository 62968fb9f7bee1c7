"""What `lower` promises: only what is executed, counted exactly, named, and never a crash."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ops.kernels.specialised import specialised_available
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparsify
from ops.plan import Plan, PlanError, PlannedOp, lower

# torch's own remark about even kernels
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def _kinds(plan: Plan) -> list[str]:
    return [op.kind for op in plan.ops]


def _sparse(module: nn.Module, density: float = 0.3) -> nn.Module:
    module = sparsify(module, density)
    draw_masks_(module, torch.Generator().manual_seed(0))
    return module


def _norm(norm: nn.Module) -> nn.Module:
    """A batch norm that has seen data."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_batch_norm_and_activation_disappear_into_the_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), _norm(nn.BatchNorm2d(6)), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)
    )
    plan = lower(net, X)
    assert _kinds(plan) == ["conv2d", "conv2d"]
    assert (plan.ops[0].name, plan.ops[0].post_ops, plan.ops[0].bias) == ("0", ("relu",), True)


def test_folding_keeps_the_mask_and_the_user_s_module() -> None:
    net = nn.Sequential(_sparse(nn.Conv2d(4, 6, 3)), _norm(nn.BatchNorm2d(6)))
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    op = lower(net, X).ops[0]
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert op.nnz == net[0].nnz
    assert torch.equal(op.layer.mask, net[0].mask)
    assert not op.layer.weight[~op.layer.mask].any()


def test_batch_norm_stays_where_it_cannot_be_folded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    assert _kinds(lower(Branching(), X)) == ["conv2d", "batch_norm2d", "add"]
    # over the tokens of a sequence the channels are not the layer's outputs
    tokens = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(3))
    assert _kinds(lower(tokens, torch.randn(2, 3, 8))) == ["linear", "batch_norm1d"]
    assert _kinds(lower(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), X))[1:] == [
        "batch_norm2d"
    ]


def test_dead_code_is_gone() -> None:
    class WithAuxiliaryHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.aux = nn.Conv2d(4, 4, 1), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.stem(x).mean((2, 3))
            unused = self.aux(x)
            return (self.head(x), unused) if self.training else self.head(x)

    net = WithAuxiliaryHead().train()
    plan = lower(net, X)
    assert [op.name for op in plan.ops] == ["stem", "mean", "head"]
    assert plan.dense_macs == 4 * 4 * 64 + 4 * 3


def test_what_does_nothing_in_eval_mode_is_gone() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, 0.5, training=self.training)
            if self.training:  # drop-path
                x = x * torch.rand(x.shape[0], 1, 1, 1)
            return x

    net = nn.Sequential(nn.Dropout(0.5), Functional(), nn.Identity(), nn.Conv2d(4, 4, 1), nn.Dropout2d(0.1), nn.ReLU())
    plan = lower(net, X)
    assert [(op.name, op.post_ops) for op in plan.ops] == [("3", ("relu",))]


def test_equal_calls_are_made_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
            self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)])

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([conv(relu(x)) for relu, conv in zip(self.relus, self.convs, strict=True)], 1)
            y = torch.cat([pool(y) for pool in self.pools], 1)
            return y + torch.rand_like(y) * 0 + torch.rand_like(y) * 0 + y.sum(1, keepdim=True) + y.sum((1,), True)

    kinds = _kinds(lower(Branches(), X))
    assert [kinds.count(kind) for kind in ("relu", "conv2d", "max_pool2d", "rand_like", "sum")] == [1, 3, 2, 2, 2]


def test_what_depends_on_no_input_is_computed_once() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            share = torch.softmax(self.alpha, 0)
            return share[0] * x + share[1] * x.flip(2)

    assert _kinds(lower(Mixed(), X)) == ["mul", "flip", "mul", "add"]


def test_shapes_are_concrete_while_tracing() -> None:
    class Shapely(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels = x.size(0), x.shape[1]
            if x.dim() == 4 and x.shape[-1] > 4:
                x = F.max_pool2d(x, 2)
            halves = [half.reshape(batch, channels // 2, -1) for half in x.chunk(2, dim=1)]
            return torch.cat(halves, 1).view(batch, -1)

    plan = lower(Shapely(), X)
    assert _kinds(plan)[:2] == ["max_pool2d", "chunk"]
    assert plan.ops[-1].output_shape == (1, 64)
    assert not plan.opaque


class Moody(nn.Module):
    """Branches on values, so it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 1e9 else -x


def test_a_submodule_that_cannot_be_traced_is_one_named_operation() -> None:
    plan = lower(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(Moody()), nn.Conv2d(4, 2, 1)), X)
    assert [(op.name, op.kind) for op in plan.ops] == [("0", "conv2d"), ("1.0 (Moody)", "torch"), ("2", "conv2d")]
    assert plan.ops[1].key is None
    assert "not traced: 1.0" in str(plan)


def test_a_network_that_cannot_be_traced_at_all_is_one_operation() -> None:
    assert [(op.name, op.kind) for op in lower(Moody(), X).ops] == [("network (Moody)", "torch")]


def test_a_network_whose_trace_would_be_wrong_is_not_traced() -> None:
    class Suspicious(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if isinstance(x, Tensor) else x + 1  # a proxy is no Tensor

    assert _kinds(lower(Suspicious(), X)) == ["torch"]


def test_a_layer_alone_is_a_plan_of_one() -> None:
    assert [(op.name, op.kind) for op in lower(nn.Linear(3, 2), torch.randn(1, 3)).ops] == [("linear", "linear")]


def test_the_same_layer_called_twice_is_two_operations() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    plan = lower(nn.Sequential(conv, nn.ReLU(), conv), X)
    assert [(op.name, op.post_ops) for op in plan.ops] == [("0", ("relu",)), ("0#2", ())]


def test_counts_are_exact_and_per_input() -> None:
    conv = _sparse(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), 0.25)
    plan = lower(nn.Sequential(conv, nn.Flatten(), _sparse(nn.Linear(128, 10), 0.1)), X.repeat(3, 1, 1, 1))
    first, _, last = plan.ops
    assert (first.nnz, first.macs, first.dense_macs) == (36, 36 * 16, 144 * 16)
    assert (first.density, first.pattern, first.groups, first.stride) == (0.25, "unstructured", 2, (2, 2))
    assert (last.nnz, last.macs, last.dense_macs) == (128, 128, 1280)
    assert plan.macs == 36 * 16 + 128


def test_a_depthwise_convolution_is_named_so_and_same_padding_is_resolved() -> None:
    op = lower(nn.Conv2d(4, 8, 4, padding="same", groups=4), X).ops[0]
    assert (op.kind, op.padding) == ("depthwise_conv2d", (1, 2, 1, 2))


def test_functional_layers_with_constant_weights_are_layers() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.matrix = nn.Parameter(torch.randn(2, 4, 3, 3)), nn.Parameter(torch.randn(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.conv2d(x, self.weight, None, 1, padding=(1, 0)))
            return F.linear(x.mean((2, 3)), self.matrix)

    plan = lower(Functional(), X)
    assert [(op.kind, op.macs, op.post_ops) for op in plan.ops if op.macs] == [
        ("conv2d", 72 * 8 * 6, ("relu",)),
        ("linear", 10, ()),
    ]


def test_layers_out_of_the_ordinary_stay_modules() -> None:
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    net = nn.Sequential(hooked, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(4, 4, 2))
    assert all(op.layer is None for op in lower(net, X).ops)


def test_kernels_are_offered_to_sparse_layers_and_checked() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(4, 4, 1), _sparse(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten()),
        *(_sparse(nn.Linear(144, 4)), nn.Linear(4, 2)),
    )
    asked: dict[str, list[str]] = {}

    def choose(op: PlannedOp, kernels: list[str]) -> str:
        asked[op.name] = kernels
        return "portable" if op.kind == "linear" else "torch"

    plan = lower(net, X, choose)
    assert {name: kernels[:2] for name, kernels in asked.items()} == {n: ["torch", "portable"] for n in "0125"}
    special = ["torch", "portable", *(["specialised"] if specialised_available() else [])]
    assert (asked["0"], asked["1"], asked["2"], asked["5"]) == (special, special, special[:2], special[:2])
    assert [op.kernel for op in plan.ops] == ["torch", "torch", "torch", "torch", "portable", "torch"]
    assert plan.with_kernels({"1": "portable"}).ops[1].kernel == "portable"
    with pytest.raises(PlanError, match='0: kernel "mkl" cannot run this conv2d; legal: torch, portable'):
        lower(net, X, lambda op, kernels: "mkl")
    assert all(op.kernel == "torch" for op in lower(net.double(), X.double(), lambda op, kernels: kernels[-1]).ops)


def test_by_default_layers_up_to_half_density_are_sparse() -> None:
    for density, kernel in ((0.5, "portable"), (0.51, "torch")):
        assert lower(_sparse(nn.Linear(100, 10), density), torch.randn(1, 100)).ops[0].kernel == kernel


def test_by_default_depthwise_convolutions_and_stems_are_in_lanes_even_if_dense() -> None:
    def default(layer: nn.Module) -> str:
        return lower(layer, torch.randn(2, layer.in_channels, 8, 8)).ops[0].kernel

    assert default(nn.Conv2d(4, 8, 3, groups=4)) == "portable"
    assert default(nn.Conv2d(3, 8, 7)) != "torch"
    assert default(nn.Conv2d(64, 8, 3)) == "torch"


def test_a_dense_layer_that_somebody_pruned_is_sparse() -> None:
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    conv.weight[:, ::2] = 0
    (op,) = lower(conv, torch.randn(1, 8, 8, 8)).ops
    assert (op.density, op.nnz, op.pattern) == (0.5, 288, "unstructured")
    conv.weight[conv.weight == 0] = 1.0
    conv.weight[0, 0] = 0  # a few zeros are chance
    assert lower(conv, torch.randn(1, 8, 8, 8)).ops[0].density == 1


def test_a_layer_of_density_one_is_dense() -> None:
    plan = lower(
        nn.Sequential(SparseConv2d(4, 4, 1), nn.Flatten(), SparseLinear(256, 2)), X, lambda op, kernels: kernels[-1]
    )
    assert plan.macs == plan.dense_macs
    assert [op.pattern for op in plan.ops] == [""] * 3
    assert plan.ops[2].kernel == "torch"


def test_subnormal_weights_are_flushed() -> None:
    conv = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        conv.weight[0] = 1e-40
    assert not lower(conv, X).ops[0].layer.weight[0].any()


def test_keys_tell_apart_what_costs_differently_and_nothing_else() -> None:
    def key(module: nn.Module, x: Tensor = X) -> str:
        text = lower(module, x).ops[0].key
        assert text is not None
        return text

    convs = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        _sparse(nn.Conv2d(4, 4, 3), 0.5),
        _sparse(nn.Conv2d(4, 4, 3), 0.2),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
    ]
    keys = [key(conv) for conv in convs] + [key(convs[0], X.repeat(2, 1, 1, 1))]
    assert len(set(keys)) == len(keys)
    assert key(nn.Conv2d(4, 4, 3)) == keys[0]
    assert all(isinstance(json.loads(text), dict) for text in keys)


def test_a_network_on_the_meta_device_is_counted_by_its_target_density() -> None:
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(), nn.Linear(288, 10)
        )
    plan = lower(sparsify(net, 0.1), X)
    real = lower(_sparse(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(),
                                       nn.Linear(288, 10)), 0.1), X)  # fmt: skip
    assert [op.key for op in plan.ops] == [op.key for op in real.ops]
    assert plan.frame().equals(real.frame())


def test_the_frame_has_a_row_per_operation_and_prints() -> None:
    plan = lower(nn.Sequential(_sparse(nn.Conv2d(4, 4, 1)), nn.Flatten()), X)
    frame = plan.frame()
    assert list(frame["op"]) == ["0", "1"]
    assert frame["macs"].sum() == plan.macs
    assert frame["macs"].dtype == "int64"
    assert "2 operations" in str(plan)
    assert lower(nn.Identity(), X).frame().empty
    assert "0 operations" in str(lower(nn.Identity(), X))


def test_wrong_inputs_are_told() -> None:
    with pytest.raises(PlanError, match=r"Conv2d fails on an input float32\[1, 4, 8, 8\]"):
        lower(nn.Conv2d(3, 3, 1), X)
    with pytest.raises(PlanError, match="one tensor with a batch axis, got tuple"):
        lower(nn.Conv2d(3, 3, 1), (X,))  # type: ignore[arg-type]
