"""What a supernet learns of a space by running its function once: choices, and which weight belongs to which decision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.oneshot.choices import Choices, EdgeChoice, OpChoice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.chooser import SupernetChooser, Tagging, default_value, parameter_keys, takes_affine
from nas.oneshot.mixed import Edge, GateBoard, MixedOp
from nas.oneshot.supernet import Supernet
from ops.candidates import Zero, candidates
from search_spaces import Space, SpaceError
from tests.nas.supernet_spaces import SPACES, batch, darts, nasnet

torch.set_num_threads(1)

CONVOLUTIONS = {
    "conv3": lambda channels: nn.Conv2d(channels, channels, 3, padding=1),
    "conv1": lambda channels: nn.Conv2d(channels, channels, 1),
}


def supernet_of(function, **options) -> Supernet:
    return Supernet(Space(function, "own", options))


@pytest.mark.parametrize("name", SPACES)
def test_every_weight_of_every_architecture_has_the_key_it_has_in_the_supernet(name: str) -> None:
    space = SPACES[name]()
    known = set(Supernet(space, affine=True).by_key())
    for seed in range(4):
        architecture = space.sample(seed)
        decisions = architecture.as_dict()
        chooser = Tagging(lambda name, _, decisions=decisions: decisions[name])
        network = space.function(chooser, **space.options)
        keys = parameter_keys(network, chooser.tags)
        assert len(set(keys.values())) == len(keys) == len(dict(network.named_parameters()))
        assert {key.partition(" ")[0] for key in keys.values()} <= {key.partition(" ")[0] for key in known}


def test_choices_are_those_of_the_space_in_its_order() -> None:
    choices = Supernet(darts(densities=(1.0, 0.1), patterns=("unstructured",))).choices
    assert list(choices)[:3] == ["normal.node0.from0.op", "normal.node0.from1.op", "normal.node0.inputs"]
    kinds = [type(choice) for choice in choices.values()]
    assert (kinds.count(OpChoice), kinds.count(EdgeChoice), kinds.count(OverallChoice)) == (28, 8, 1)
    edges = choices["reduce.node2.inputs"]
    assert (edges.options, edges.keep) == ((0, 1, 2, 3), 2)
    assert edges.operations == tuple((f"reduce.node2.from{j}.op",) for j in range(4))
    assert choices["sparsity"].offers == ((1.0, ("unstructured",)), (0.1, ("unstructured",)))


def test_inputs_have_operations_of_their_own_or_share_them() -> None:
    assert all(choice.own for choice in Supernet(darts()).of_kind(EdgeChoice).values())
    shared = Supernet(nasnet()).of_kind(EdgeChoice)
    assert set(shared) == {
        f"{kind}.block{b}.input{side}" for kind in ("normal", "reduce") for b in (0, 1) for side in (1, 2)
    }
    assert not any(choice.own for choice in shared.values())


def test_numbers_that_shape_the_network_and_sparsity_are_choices_too() -> None:
    choices = Supernet(SPACES["tiny"]()).choices
    assert choices["width"] == ValueChoice("width", (16, 32, 64))
    assert choices["depth"] == ValueChoice("depth", (1, 2, 3))
    assert choices["block2.op"] == OpChoice("block2.op", ("conv3", "conv1"))
    sparse = choices["block0"]
    assert isinstance(sparse, SparsityChoice)
    assert sparse.targets == ((1.0, ""), (0.2, "unstructured"), (0.2, "4x1"), (0.1, "unstructured"), (0.1, "4x1"))
    assert sparse.options == ("1", "0.2 unstructured", "0.2 4x1", "0.1 unstructured", "0.1 4x1")


def test_a_sparsity_met_with_other_targets_gets_the_union() -> None:
    choices = Choices()
    choices.add(SparsityChoice.of("a", ((1.0, ""), (0.5, "2:4"))))
    choices.add(SparsityChoice.of("a", ((1.0, ""), (0.5, "unstructured"))))
    assert choices.by_name["a"].targets == ((1.0, ""), (0.5, "2:4"), (0.5, "unstructured"))


def test_a_subset_that_the_function_unpacks_is_drawn_like_any_value() -> None:
    def space(c) -> nn.Module:
        first, second = c.subset("pair", 3, 2)
        assert first < second
        return nn.Sequential(nn.Linear(4, first + 2 * second), nn.Linear(first + 2 * second, 2))

    net = supernet_of(space)
    assert net.choices == {"pair": ValueChoice("pair", ("0,1", "0,2", "1,2"))}
    x = torch.randn(5, 4)
    outputs = [net(x, {}, {"pair": pair}) for pair in ("0,1", "0,2", "1,2")]
    assert not torch.allclose(outputs[0], outputs[2])
    path = net.gates_of({"pair": "1,2"})
    assert torch.equal(net(x, path.gates, path.values), outputs[2])


def test_a_function_that_looks_into_what_was_chosen_is_told_where_it_failed() -> None:
    def space(c) -> nn.Module:
        width = c.choice("width", [4, 8])
        op = c.op("op", CONVOLUTIONS, channels=width)
        return nn.Sequential(op, nn.Conv2d(op.out_channels, 2, 1))

    with pytest.raises(
        SpaceError, match=r"space 'own': its function raised AttributeError.*MixedOp.*out_channels.*width="
    ):
        supernet_of(space)


def test_an_operation_without_candidates_and_impossible_inputs_are_refused() -> None:
    with pytest.raises(SpaceError, match="decision 'op': no options"):
        supernet_of(lambda c: c.op("op", {}))
    with pytest.raises(SpaceError, match="decision 'e': expected 0 < k <= n, got k=3, n=2"):
        supernet_of(lambda c: nn.Sequential(*[m for _, m in c.edges("e", 2, 3, lambda j: nn.Identity())]))


def test_a_single_input_is_no_choice() -> None:
    made: list[tuple[int, nn.Module]] = []

    def space(c) -> nn.Module:
        made[:] = c.edges("e", 1, 1, lambda j: c.op("op", CONVOLUTIONS, channels=4))
        return made[0][1]

    net = supernet_of(space)
    assert list(net.choices) == ["op"]
    assert isinstance(made[0][1], Edge)


@pytest.mark.parametrize("how", ["sparse", "allocate"])
def test_a_candidate_that_is_a_bare_layer_keeps_its_key_when_it_is_made_sparse(how: str) -> None:
    def space(c) -> nn.Module:
        op = c.op("op", CONVOLUTIONS, channels=4)
        if how == "sparse":
            return nn.Sequential(c.sparse("part", op, [1, 0.5]))
        return c.allocate("whole", nn.Sequential(op), [1, 0.5])

    own = Space(space, "own")
    net = Supernet(own)
    for architecture in own.enumerate():
        x = torch.randn(2, 4, 5, 5)
        with torch.no_grad():
            built = net.extract(architecture)
            torch.testing.assert_close(net(x, net.gates_of(architecture).gates), built(x))


def test_the_same_operation_at_two_places_has_two_weights_and_one_choice() -> None:
    def space(c) -> nn.Module:
        return nn.Sequential(*[c.op("op", CONVOLUTIONS, channels=4) for _ in range(2)])

    net = supernet_of(space)
    assert list(net.choices) == ["op"]
    assert sorted(net.by_key()) == sorted(
        f"op#{place}.{name}/.{part}" for place in (0, 1) for name in CONVOLUTIONS for part in ("weight", "bias")
    )


def test_layers_outside_decisions_are_named_by_kind_and_order() -> None:
    def space(c) -> nn.Module:
        deep = c.choice("deep", [False, True])
        layers = [nn.Linear(4, 4)] + ([nn.Linear(4, 4)] if deep else []) + [nn.LayerNorm(4), nn.Linear(4, 2)]
        return nn.Sequential(*layers)

    net = supernet_of(space)
    shallow = net.structure({"deep": False}).keys
    assert list(shallow.values()) == [
        *("Linear#0.weight", "Linear#0.bias", "LayerNorm#0.weight", "LayerNorm#0.bias"),
        *("Linear#1.weight", "Linear#1.bias"),
    ]


def test_norms_of_candidates_get_no_parameters_where_their_factory_can_be_told() -> None:
    offered = candidates(("sep_conv_3x3",)) | {"own": lambda in_channels, out_channels, stride, odd: nn.BatchNorm2d(4)}
    assert takes_affine(offered["sep_conv_3x3"])
    assert not takes_affine(offered["own"])
    board = GateBoard()
    for affine in (False, True):
        chooser = SupernetChooser({}, Choices(), board, affine=affine)
        mixed = chooser.op("op", offered, in_channels=4, out_channels=4, stride=1, odd=False)
        assert isinstance(mixed, MixedOp)
        norms = [m for m in mixed.candidates[0].modules() if isinstance(m, nn.BatchNorm2d)]
        assert {norm.affine for norm in norms} == {affine}
        assert mixed.candidates[1].affine
        assert chooser.affine == affine


def test_a_norm_follows_pooling_candidates_only() -> None:
    chooser = SupernetChooser({}, Choices(), GateBoard())
    offered = candidates(("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"))
    mixed = chooser.op("op", offered, in_channels=4, out_channels=4, stride=1, odd=False)
    kinds = [[type(part).__name__ for part in c] if isinstance(c, nn.Sequential) else type(c) for c in mixed.candidates]
    assert kinds == [Zero, ["MaxPool2d", "BatchNorm2d"], ["AvgPool2d", "BatchNorm2d"], nn.Identity]


def test_values_default_to_the_largest_number_or_the_first_word() -> None:
    assert default_value((3, 7, 5)) == 7
    assert default_value(("relu", "gelu")) == "relu"
    assert default_value((False, True)) is True
    space = SPACES["convnet"]()
    net = Supernet(space)
    largest = {name: default_value(choice.options) for name, choice in net.of_kind(ValueChoice).items()}
    gates = net.gates_of(space.sample(0)).gates
    with torch.no_grad():
        assert torch.equal(net(batch(space), gates), net(batch(space), gates, largest))
