"""From probabilities to one architecture: hand-made cells, what ties do, and the way there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas.oneshot.alphas import Alphas
from nas.oneshot.choices import Choice, EdgeChoice, OpChoice, SparsityChoice, ValueChoice
from nas.oneshot.decode import architecture_of, decode, edge_strength, genotype_text, largest, strongest, without_none
from nas.oneshot.supernet import Supernet
from ops.candidates import DARTS_PRIMITIVES
from search_spaces import SpaceError, get_space
from search_spaces.genotype_conversion import architecture_from_genotype
from search_spaces.genotypes import GENOTYPES, Genotype
from tests.nas.supernet_spaces import SPACES, darts

torch.set_num_threads(1)

OPERATIONS = ("none", "skip", "conv")


def node(keep: int = 2, n: int = 3) -> dict[str, Choice]:
    """A node that sums `keep` of n inputs, an operation of its own on each."""
    operations = {f"from{j}": OpChoice(f"from{j}", OPERATIONS) for j in range(n)}
    return {**operations, "inputs": EdgeChoice("inputs", tuple(range(n)), keep, tuple((name,) for name in operations))}


def given(*rows: list[float]) -> dict[str, Tensor]:
    return {f"from{j}": torch.tensor(row) for j, row in enumerate(rows)}


def test_the_strongest_operation_decides_an_edge_and_none_is_never_taken() -> None:
    p = given([0.98, 0.01, 0.01], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4])
    assert edge_strength(node()["inputs"], node(), p).tolist() == pytest.approx([0.01, 0.5, 0.4])
    assert decode(node(), p) == {"inputs": "1,2", "from1": "skip", "from2": "conv"}


def test_none_takes_its_share_of_the_probability() -> None:
    """Edge 0 prefers its convolution more clearly, but spends most of its probability on none."""
    p = given([0.7, 0.05, 0.25], [0.3, 0.3, 0.4], [0.0, 0.4, 0.6])
    assert decode(node(), p) == {"inputs": "1,2", "from1": "conv", "from2": "conv"}


def test_weights_of_edges_multiply_the_strength_of_operations() -> None:
    p = given([0.0, 0.5, 0.5], [0.0, 0.4, 0.6], [0.0, 0.1, 0.9]) | {"inputs": torch.tensor([0.6, 0.3, 0.1])}
    assert edge_strength(node()["inputs"], node(), p).tolist() == pytest.approx([0.3, 0.18, 0.09])
    assert strongest(node()["inputs"], node(), p) == (0, 1)
    del p["inputs"]
    assert strongest(node()["inputs"], node(), p) == (1, 2)


def test_ties_go_to_the_lower_index() -> None:
    even = given(*[[0.4, 0.3, 0.3]] * 3)
    assert decode(node(), even) == {"inputs": "0,1", "from0": "skip", "from1": "skip"}
    assert largest(torch.tensor([1.0, 3.0, 3.0])) == 1
    many = node(keep=5, n=500)
    assert isinstance(many["inputs"], EdgeChoice)
    assert strongest(many["inputs"], many, given(*[[0.4, 0.3, 0.3]] * 500)) == (0, 1, 2, 3, 4)


def test_operations_that_inputs_share_do_not_speak_for_one_of_them() -> None:
    shared: dict[str, Choice] = {
        "op": OpChoice("op", OPERATIONS),
        "input": EdgeChoice("input", (0, 1, 2), 1, (("op",), ("op",), ("op",))),
    }
    p = {"op": torch.tensor([0.1, 0.2, 0.7]), "input": torch.tensor([0.2, 0.3, 0.5])}
    assert decode(shared, p) == {"input": "2", "op": "conv"}


def test_an_operation_that_stands_alone_may_be_none() -> None:
    alone: dict[str, Choice] = {"op": OpChoice("op", OPERATIONS), "width": ValueChoice("width", (16, 32))}
    p = {"op": torch.tensor([0.5, 0.3, 0.2]), "width": torch.tensor([0.1, 0.9])}
    assert decode(alone, p) == {"op": "none", "width": 32}


def test_none_is_left_where_it_is_the_only_one() -> None:
    values = torch.tensor([0.3])
    assert without_none(("none",), values) is values
    assert without_none(OPERATIONS, torch.tensor([0.9, 0.1, 0.0])).tolist() == pytest.approx([-1.0, 0.1, 0.0])


def test_sparsity_of_a_part_becomes_its_two_decisions() -> None:
    choice = SparsityChoice.of("part", ((1.0, ""), (0.5, "2:4")))
    assert decode({"part": choice}, {"part": torch.tensor([0.4, 0.6])}) == {
        "part.density": 0.5,
        "part.pattern": "2:4",
    }
    assert decode({"part": choice}, {"part": torch.tensor([0.6, 0.4])}) == {"part.density": 1.0}
    assert decode({"part": choice}, {}) == {}  # not searched: the caller's to add


def test_probabilities_may_need_gradients_and_are_not_changed() -> None:
    p = {name: row.requires_grad_() for name, row in given([0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]).items()}
    before = {name: row.detach().clone() for name, row in p.items()}
    decode(node(), p)
    assert all(torch.equal(p[name], before[name]) for name in p)


@pytest.mark.parametrize("name", SPACES)
def test_whatever_the_parameters_an_architecture_of_the_space_comes_out(name: str) -> None:
    space = SPACES[name]()
    choices = Supernet(space).choices
    searched = {n: c for n, c in choices.items() if isinstance(c, OpChoice | EdgeChoice | ValueChoice | SparsityChoice)}
    found = set()
    for seed in range(5):
        alphas = Alphas(searched, generator=torch.Generator().manual_seed(seed), scale=3.0)
        decisions = decode(choices, {n: alphas.probabilities(n) for n in alphas})
        architecture = architecture_of(space, decisions)
        assert space.architecture(architecture.as_dict()) == architecture
        assert {n: v for n, v in architecture.as_dict().items() if n in decisions}.items() <= decisions.items()
        found.add(architecture.digest)
    assert len(found) > 1


@pytest.mark.parametrize("name", SPACES)
def test_certain_parameters_give_back_the_architecture_they_speak_for(name: str) -> None:
    space = SPACES[name]()
    net = Supernet(space)
    for seed in range(3):
        architecture = space.sample(seed)
        path = net.gates_of(architecture)
        wanted = architecture.as_dict()
        p: dict[str, Tensor] = {}
        for n, choice in net.choices.items():
            row = torch.full((len(choice.options),), 1e-3)
            if isinstance(choice, EdgeChoice) and n in wanted:
                row[[int(j) for j in str(wanted[n]).split(",")]] = 1.0
            elif isinstance(choice, OpChoice | ValueChoice) and n in wanted:
                row[choice.options.index(wanted[n])] = 1.0
            elif isinstance(choice, SparsityChoice) and n in path.gates:
                row[list(path.gates[n].chosen or ())] = 1.0
            p[n] = row
        decisions = decode(net.choices, p)
        assert architecture_of(space, decisions, path.overall) == with_none_replaced(space, architecture, decisions)


def with_none_replaced(space, architecture, decisions):
    """The same, where "none" on an edge that is kept is the operation that decoding takes instead."""
    changed = {
        n: decisions[n] if v == "none" and n.startswith(("normal.", "reduce.")) else v
        for n, v in architecture.as_dict().items()
    }
    return space.architecture(changed)


def test_the_cells_of_darts_come_out_of_parameters_that_prefer_them() -> None:
    space = get_space("darts", input_shape=(3, 32, 32), channels=4, cells=6, operations=("none", *DARTS_PRIMITIVES))
    choices = Supernet(space).choices
    genotype = GENOTYPES["DARTS_V2"]
    wanted = architecture_from_genotype(space, genotype)
    p = {}
    for name, choice in choices.items():
        if isinstance(choice, OpChoice):
            row = torch.full((8,), 0.05)
            row[0] = 0.5  # "none" is the favourite everywhere, as DARTS has it in the end
            if name in wanted.as_dict():
                row[choice.options.index(wanted.as_dict()[name])] = 0.15
            p[name] = row
    found = architecture_of(space, decode(choices, p), {"sparsity": (1.0, "unstructured", "erk")})
    text = genotype_text(space, found)
    assert text is not None
    assert Genotype.parse(text).normal_concat == genotype.normal_concat
    assert architecture_from_genotype(space, Genotype.parse(text)) == wanted
    assert found.digest == wanted.digest


def test_spaces_without_cells_have_no_genotype() -> None:
    space = SPACES["convnet"]()
    assert genotype_text(space, space.sample(0)) is None


def test_decisions_that_were_never_met_get_their_first_option() -> None:
    space = darts(densities=(1.0, 0.5), patterns=("unstructured",))
    made = architecture_of(space, {"normal.node0.from0.op": "max_pool_3x3"})
    assert made.as_dict()["normal.node0.from0.op"] == "max_pool_3x3"
    first = space.draw(lambda _, options: options[0]).as_dict()
    assert {n: v for n, v in made.as_dict().items() if v != first[n]} == {"normal.node0.from0.op": "max_pool_3x3"}


def test_a_density_that_no_list_offers_is_kept_exactly() -> None:
    space = darts(densities=(1.0, 0.5), patterns=("unstructured",), rules=("uniform", "erk"))
    made = architecture_of(space, {}, {"sparsity": (0.0731, "unstructured", "erk")}).as_dict()
    assert (made["sparsity.density"], made["sparsity.pattern"], made["sparsity.rule"]) == (
        0.0731,
        "unstructured",
        "erk",
    )


def test_parts_of_a_density_that_no_list_offers_too() -> None:
    space = SPACES["mlp"]()
    made = architecture_of(
        space, {"depth": 1, "layer0.width": 16, "layer0.density": 0.3, "layer0.pattern": "unstructured"}
    )
    assert made.as_dict()["layer0.density"] == 0.3
    with pytest.raises(SpaceError, match="layer0"):
        architecture_of(space, {"depth": 1, "layer0.density": 1.3, "layer0.pattern": "unstructured"})
