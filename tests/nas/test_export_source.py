"""Laws of the generated source: it computes what the network computes, reads well, and needs torch only."""

from __future__ import annotations

import keyword
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.export.errors import ExportError
from nas.export.members import attribute_name
from tests.nas.export_networks import Everything, forward_of, randomised, run_here


class Function(nn.Module):
    """A network that is one function of its inputs."""

    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


class One(nn.Module):
    """The same with one named input."""

    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_a_network_with_most_of_what_users_write_comes_back_equal() -> None:
    source, network = run_here(randomised(Everything()), torch.randn(1, 3, 16, 16))
    assert isinstance(network.layers_0_conv1, nn.Conv2d)
    assert source.inputs == ("x",)
    assert "self.class_ = nn.Linear(10, 10)" in source.text  # a keyword
    assert "unused" not in source.text


def test_a_chain_of_layers_reads_like_one() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 2)
    )
    source, _ = run_here(randomised(model), torch.randn(2, 3, 8, 8))
    assert forward_of(source.text).splitlines() == [*(f"x = self.layer{i}(x)" for i in range(5)), "return x"]


def test_a_bare_layer_is_exported_as_a_network_of_one_layer() -> None:
    source, _ = run_here(nn.Linear(3, 4), torch.randn(2, 3))
    assert "self.layer = nn.Linear(3, 4)" in source.text


def test_a_shared_layer_is_one_layer_called_twice() -> None:
    source, _ = run_here(One(lambda self, x: self.a(F.relu(self.a(x))), a=nn.Linear(4, 4)), torch.randn(2, 4))
    assert source.text.count("nn.Linear(4, 4)") == 1
    assert forward_of(source.text).count("self.a(") == 2


def test_tied_weights_stay_one_tensor() -> None:
    embed, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    source, network = run_here(
        One(lambda self, x: self.head(self.embed(x)), embed=embed, head=head), torch.arange(11).view(1, 11)
    )
    assert network.head.weight is network.embed.weight
    assert set(source.state) == {"embed.weight"}


def test_a_weight_with_a_second_name_stays_one_tensor() -> None:
    layer = nn.Linear(4, 4)
    source, network = run_here(One(lambda self, x: self.a(x) @ self.w, a=layer, w=layer.weight), torch.randn(2, 4))
    assert network.w is network.a.weight
    assert set(source.state) == {"a.weight", "a.bias"}


def test_a_weight_used_by_a_function_belongs_to_its_layer() -> None:
    model = One(lambda self, x: F.linear(self.embed(x), self.embed.weight), embed=nn.Embedding(11, 6))
    source, _ = run_here(model, torch.arange(11).view(1, 11))
    assert "F.linear(x, self.embed.weight)" in source.text


def test_in_place_changes_reach_every_name_of_the_tensor() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        a = x * 1.0
        b = a
        b += 1
        a.mul_(3)
        b[:, 0] = 7.0
        F.relu(a, inplace=True)
        c = b - 2
        c -= b
        return a + b + c

    source, _ = run_here(One(forward), torch.randn(2, 4))
    assert "[:, 0] = 7.0" in source.text


def test_a_sum_in_place_of_a_tensor_that_lives_on_keeps_both_names_apart() -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            x = a * 2
            b = a
            b += x
            return a * b

    source, _ = run_here(Net(), torch.randn(2, 4))
    assert forward_of(source.text).splitlines()[:3] == ["x = a * 2", "x_2 = a", "x_2 += x"]


def test_a_size_is_read_before_the_tensor_changes_its_size() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = x * 1
        n = x.size(0)
        x.unsqueeze_(0)
        return x.view(n, -1)

    run_here(One(forward), torch.randn(2, 4))


def test_a_size_outlives_its_tensor_by_a_name_of_its_own() -> None:
    source, _ = run_here(
        One(lambda self, x: (lambda b, y: y.sum(2).view(b, -1))(x.size(0), x * 2)), torch.randn(2, 3, 4)
    )
    assert forward_of(source.text).splitlines() == [
        "size = x.size(0)",
        "x = x * 2",
        "x = x.sum(2)",
        "x = x.view(size, -1)",
        "return x",
    ]


def test_sizes_are_numbers_again() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        b, n, c = x.shape
        n += 1
        heads = x.view(b, n - 1, 2, c // 2).transpose(1, 2)
        x = (heads @ heads.mT) / math.sqrt(heads.size(-1))
        if x.shape[1] > 1 and len(x.shape) == 4 and x.dim() == 4:
            x = x.softmax(-1)
        for i in range(x.shape[1]):
            x = x + i
        a, d = x.chunk(2, dim=1)
        for part in torch.split(x, 1, dim=1):
            a = a + part
        return (a - d).reshape(b, -1) + n + torch.arange(a[0].numel(), device=x.device)

    run_here(One(forward), torch.randn(2, 3, 4))


def test_an_unpacked_shape_is_read_where_it_is_used() -> None:
    source, _ = run_here(One(lambda self, x: x.view(x.size(0), -1)), torch.randn(2, 3, 4))
    assert forward_of(source.text) == "x = x.view(x.size(0), -1)\nreturn x"


def test_functions_constants_and_literals_of_torch_are_written_as_one_writes_them() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        x = torch.where(x > 0, x, torch.tensor([0.5, 2.0]))
        x = x.masked_fill(x < -1, float("-inf")).clamp(min=-3.0).to(torch.float64).float()
        x = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + torch.fft.rfft(x).real[..., :1] - (-x) ** 2
        x, _ = x.max(dim=1)
        x = F.interpolate(x[:, None], scale_factor=2.0, mode="linear")
        return torch.einsum("bij,bkj->bik", x, x) * torch.ones(1, dtype=torch.float32)

    source, _ = run_here(One(forward), torch.randn(2, 3, 2))
    assert 'float("-inf")' in source.text
    assert 'torch.einsum("bij,bkj->bik", x, x)' in source.text
    assert "_VariableFunctions" not in source.text
    assert "torch._C" not in source.text


def test_several_inputs_and_arguments_left_at_their_defaults() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(
            self, tokens: Tensor, other: Tensor, scale: float = 2.0, flag: bool = False, mask: Any = None
        ) -> tuple[Tensor, list[Tensor]]:
            return self.embed(tokens).sum(1) * scale, [other if flag else -other]

    source, _ = run_here(Two(), torch.randint(0, 7, (2, 5)), torch.randn(2, 4))
    assert source.inputs == ("tokens", "other")
    assert "def forward(self, tokens, other):" in source.text
    with pytest.raises(ExportError, match=r"found 1 of at least 2: other has no default; pass a tuple"):
        run_here(Two(), torch.randint(0, 7, (2, 5)))


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False),
        One(
            lambda self, x: self.att(x, x, x, need_weights=False)[0], att=nn.MultiheadAttention(8, 2, batch_first=True)
        ),
        One(lambda self, x: self.rnn(x)[1][0], rnn=nn.LSTM(8, 3, batch_first=True, bidirectional=True)),
        One(
            lambda self, x: [self.gru(x)[0][:, -1], self.p[0]],
            gru=nn.GRU(8, 3, batch_first=True),
            p=nn.ParameterList([torch.ones(1)]),
        ),
    ],
    ids=["transformer", "attention", "lstm", "gru"],
)
def test_sequence_layers_come_back_equal(model: nn.Module) -> None:
    run_here(model, torch.randn(2, 5, 8))


def test_parametrised_and_subclassed_layers_become_plain_ones() -> None:
    class Same(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1)

    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), Same(4), Standardised(4, 2, 3))
    source, network = run_here(model, torch.randn(2, 3, 8, 8))
    assert "self.layer0 = nn.Conv2d(3, 4, 1)" in source.text
    assert "self.layer1 = nn.Conv2d(4, 4, 3, padding=1)" in source.text
    assert sum(p.numel() for p in network.parameters()) == 12 + 4 + 144 + 4 + 72 + 2


def test_names_that_python_or_torch_already_use_are_changed() -> None:
    for path in (
        "class",
        "half",
        "load_state_dict",
        "T_destination",
        "__dict__",
        "3.1",
        "",
        "größe.ß",
        "a-b",
        "_parameters",
    ):
        name = attribute_name(path, set())
        assert name.isidentifier()
        assert name.isascii()
        assert not keyword.iskeyword(name)
        assert not hasattr(nn.Module(), name)
    members = {"import_": nn.Linear(2, 2), "parameters_": nn.Linear(2, 2)}
    model = One(lambda self, x: [layer(x) for layer in self.children()], **members)
    for awkward in ("lambda", "9", "größe", "a-b", "input", "self"):
        model._modules[awkward] = nn.Linear(2, 2)
    _, network = run_here(model, torch.randn(3, 2))
    assert len(list(network.children())) == 8


def test_layers_whose_flat_names_collide_stay_apart() -> None:
    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(2, 2)
            self.a = nn.Sequential()
            self.a.add_module("b", nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a_b(self.a(x))

    source, _ = run_here(Nest(), torch.randn(3, 2))
    assert {"a_b.weight", "a_b_2.weight"} <= set(source.state)


def test_the_same_network_gives_the_same_text() -> None:
    model = randomised(Everything())
    texts = {run_here(model, torch.randn(1, 3, 16, 16))[0].text for _ in range(2)}
    assert len(texts) == 1


def test_long_calls_are_broken_into_lines() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        parts = [x * float(i) for i in range(40)]
        return torch.cat(parts, 1)

    source, _ = run_here(One(forward), torch.randn(2, 1))
    assert max(len(line) for line in source.text.splitlines()) <= 132


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class BatchDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 2 else -x


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(2, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (DataDependent(), "value of the tensor gt, which depends on the data"),
        (BatchDependent(), "depends on the size of the batch"),
        (Hidden(), "not installed as a submodule"),
        (Opaque(), "expected np.ndarray"),
    ],
    ids=["data", "batch", "hidden", "opaque"],
)
def test_a_module_that_cannot_be_recorded_is_named_with_the_cure(module: nn.Module, says: str) -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(2, 2))
    model.add_module("gate", module)
    with pytest.raises(
        ExportError, match=rf"in gate \({type(module).__name__}\).*{says}.*|.*{says}.*in gate.*"
    ) as caught:
        run_here(model, torch.randn(3, 2))
    assert 'formats=("onnx", "pt2")' in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(2, 2).double(), r"expected float32 parameters, found weight of torch.float64; call \.float\(\)"),
        (nn.Linear(2, 2, device="meta"), "meta device: weight"),
    ],
    ids=["float64", "meta"],
)
def test_networks_that_are_not_trained_float32_ones_are_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        run_here(model, torch.randn(3, 2))
