"""A supernet holds every architecture of its space: what it computes, what it weighs, what moves its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.errors import ConfigError
from nas.oneshot.alphas import Alphas
from nas.oneshot.choices import EdgeChoice, OpChoice
from nas.oneshot.mixed import Edge, Gate, Gates
from nas.oneshot.supernet import Supernet
from ops.candidates import DARTS_PRIMITIVES
from search_spaces import Architecture, Space, SpaceError, get_space
from search_spaces.open_edges import unread
from tests.nas.supernet_spaces import SPACES, as_numbers, batch, darts, first, nasnet, soft_gates

torch.set_num_threads(1)


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-8 if a.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def doubles() -> Iterator[None]:
    """Everything in double precision, so that only a mistake can make a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def size(net: Supernet) -> int:
    return sum(p.numel() for p in net.weights().values())


def gradients(net: Supernet, gates: Gates, x: Tensor) -> dict[str, Tensor | None]:
    """Of the logits' squares, in every weight and every gate."""
    named = dict(net.by_key())
    named |= {f"gate {name}": gate.weights for name, gate in gates.items() if gate.weights is not None}
    loss = net(x, gates).square().sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", SPACES)
def test_one_hot_gates_give_the_built_architecture_with_the_same_weights(name: str) -> None:
    space = SPACES[name]()
    net = Supernet(space, seed=3, pool_norm=False)
    outputs = []
    for seed in range(6):
        architecture, x = space.sample(seed), batch(space)
        path = net.gates_of(architecture)
        with torch.no_grad():
            output = net(x, path.gates, path.values)
            close(output, first(net.extract(architecture).train()(x)))
        outputs.append(output)
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 3  # other paths, other numbers


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["darts", "nasnet", "nasnet, one block", "nasbench201"])
def test_weights_of_0_and_1_compute_what_a_choice_without_weights_does(name: str, hard: bool) -> None:
    space = SPACES[name]()
    net = Supernet(space, pool_norm=False)
    for seed in range(2):
        chosen = net.gates_of(space.sample(seed)).gates
        numbers = as_numbers(chosen, net, hard=hard)
        with torch.no_grad():
            close(net(batch(space), numbers), net(batch(space), chosen))


def test_drawn_values_take_part() -> None:
    space = SPACES["convnet"]()
    net = Supernet(space)
    path = net.gates_of(space.sample(1))
    with torch.no_grad():
        small, large = (net(batch(space), path.gates, {"stage0.width": w, "stage0.depth": 1}) for w in (8, 16))
        assert not torch.allclose(small, large)
        close(net(batch(space), path.gates), net(batch(space), path.gates, {"stage0.width": 16, "stage1.width": 16}))


def test_the_darts_supernet_has_the_published_weights_and_architecture_parameters() -> None:
    space = get_space("darts", input_shape=(3, 32, 32), channels=16, cells=8, operations=("none", *DARTS_PRIMITIVES))
    net = Supernet(space)
    parameters = Alphas(net.of_kind(OpChoice), generator=torch.Generator())
    assert (size(net), sum(a.numel() for a in parameters.tensors())) == (1_930_618, 224)
    partial = Supernet(space, partial=4)
    edges = Alphas(partial.of_kind(OpChoice | EdgeChoice), generator=torch.Generator())
    assert (size(partial), sum(a.numel() for a in edges.tensors())) == (299_578, 224 + 28)


def test_partial_channels_of_all_channels_are_the_whole() -> None:
    one, two = Supernet(darts(), partial=1), Supernet(darts(), partial=2)
    assert size(one) > size(two)
    gates = soft_gates(two)
    with torch.no_grad():
        assert two(batch(darts()), gates).shape == one(batch(darts()), gates).shape
    with pytest.raises(SpaceError, match=r"4 channels cannot be split by 3; take other channels or another K"):
        Supernet(darts(), partial=3)


@pytest.mark.parametrize("fast", [False, True])
def test_forgetting_activations_changes_neither_numbers_nor_gradients_and_saves_memory(fast: bool) -> None:
    space, x = darts(), batch(darts(), rows=8)
    saved, results = {}, {}
    for checkpointing in (False, True):
        net = Supernet(space, checkpointing=checkpointing, fast=fast)
        gates = soft_gates(net)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = net(x, gates)
        saved[checkpointing] = sum(kept.values())
        results[checkpointing] = (output.detach(), gradients(net, gates, x))
    assert saved[True] < 0.5 * saved[False]
    torch.testing.assert_close(results[True], results[False], rtol=1e-5, atol=1e-5)
    assert sum(g is not None for g in results[True][1].values()) > 100


def test_the_seed_decides_the_weights_and_torch_s_own_generator_is_left_alone() -> None:
    for space in (darts(), SPACES["convnet"]()):
        before = torch.get_rng_state()
        a, b, c = (Supernet(space, seed=seed).by_key() for seed in (1, 1, 2))
        Supernet(space).extract(space.sample(0))
        assert torch.equal(before, torch.get_rng_state())
        assert list(a) == list(b)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


def test_an_edge_that_is_switched_off_passes_nothing_and_learns_nothing() -> None:
    space = darts()
    net = Supernet(space)
    gates = soft_gates(net)
    name = "normal.node1.inputs"
    gates[name] = Gate(None, (0, 2))
    found = gradients(net, gates, batch(space))
    off = [key for key in found if key.startswith("normal.node1.from1.op@1")]
    on = [key for key in found if key.startswith("normal.node1.from0.op@0")]
    assert {found[key] is None for key in off} == {True}
    assert {found[key] is None for key in on} == {False}
    assert found["gate normal.node1.from1.op"] is None
    assert found["gate normal.node1.from0.op"] is not None
    edge = next(m for m in net.modules() if isinstance(m, Edge) and m.name == name and m.j == 1)
    assert edge(torch.ones(1, 4, 2, 2)) is None


def test_the_weight_of_an_edge_multiplies_what_it_passes() -> None:
    net = Supernet(darts())
    edge = next(m for m in net.modules() if isinstance(m, Edge) and m.j == 1)
    x = torch.randn(2, 4, 8, 8)
    choose = {name: Gate(None, (0,)) for name in net.of_kind(OpChoice)}
    net.board.gates = choose
    plain = edge(x)
    net.board.gates = choose | {edge.name: Gate(torch.tensor([0.5, 0.25]))}
    torch.testing.assert_close(edge(x), 0.25 * plain)
    assert float(edge.share()) == 0.25


@pytest.mark.parametrize("space", [darts(operations=DARTS_PRIMITIVES[1:4]), nasnet()], ids=["darts", "nasnet"])
def test_a_hard_choice_with_weights_has_a_gradient_in_every_option(space: Space) -> None:
    net = Supernet(space)
    gates = as_numbers(net.gates_of(space.sample(2)).gates, net, hard=True)
    found = gradients(net, gates, batch(space))
    kept = space.sample(2).as_dict()
    for name, choice in net.of_kind(OpChoice).items():
        gradient = found[f"gate {name}"]
        if name in kept:
            assert gradient is not None
            assert gradient.shape == (len(choice.options),)
            assert bool((gradient != 0).all()), name


def test_a_state_of_a_nasnet_cell_counts_as_far_as_nobody_reads_it() -> None:
    net = Supernet(nasnet())  # two blocks: states 0 to 3
    gates = soft_gates(net)
    kept: dict[str, Any] = {}
    cell = net.network.cells[-1]
    cell.nodes.register_forward_hook(lambda _module, _inputs, states: kept.update(states=states))
    cell.register_forward_hook(lambda _module, _inputs, output: kept.update(output=output))
    net(batch(net.space), gates)
    p = {name: gate.weights for name, gate in gates.items() if name.startswith("normal.") and "input" in name}
    expected = []
    for j, state in enumerate(kept["states"]):
        share = torch.ones(())
        for row in p.values():
            share = share * (1 - row[j] if j < len(row) else 1)
        expected.append(state * share)
    assert float(share) == 1.0  # nobody can read the last one
    torch.testing.assert_close(kept["output"], torch.cat(expected, dim=1))
    kept["output"].square().sum().backward()
    assert all(float(row.grad.abs().min()) > 0 for row in p.values())


def test_states_that_are_concatenated_anyhow_count_whole() -> None:
    net = Supernet(nasnet(concat_normal=(0, 2)))
    net.board.gates = soft_gates(net)
    cell = net.network.cells[-1]
    assert [isinstance(unread(cell.open_edges[j]), Tensor) for j in cell.concat] == [False, True, False, False]
    assert [unread(cell.open_edges[j]) for j in (0, 2, 3)] == [1.0, 1.0, 1.0]


def test_weights_go_from_one_supernet_to_another_by_key() -> None:
    for name in ("darts", "nasnet", "tiny"):
        space = SPACES[name]()
        a, b = Supernet(space, seed=1), Supernet(space, seed=2)
        path = a.gates_of(space.sample(0))
        target = b.by_key()
        assert list(target) == list(a.by_key())
        with torch.no_grad():
            for key, parameter in a.by_key().items():
                target[key].copy_(parameter)
            assert torch.equal(a(batch(space), path.gates, path.values), b(batch(space), path.gates, path.values))


def test_a_deep_copy_computes_the_same_and_shares_nothing() -> None:
    for name in ("darts", "nasnet, one block", "convnet"):
        space = SPACES[name]()
        net = Supernet(space)
        gates, values = soft_gates(net), net.gates_of(space.sample(0)).values
        gates = {name: Gate(gate.weights * 1.0) for name, gate in gates.items() if gate.weights is not None}
        output = net(batch(space), gates, values)  # gates with a history, which torch cannot copy, are on the board now
        twin = copy.deepcopy(net)
        assert torch.equal(twin(batch(space), gates, values), output)
        with torch.no_grad():
            for parameter in twin.by_key().values():
                parameter.zero_()
        assert torch.equal(net(batch(space), gates, values), output)


def test_batch_norms_always_use_the_batch_and_have_parameters_outside_cells_only() -> None:
    for name in ("darts", "nasnet", "nasbench201"):
        net = Supernet(SPACES[name]())
        norms = {p: m for p, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert all(m.running_mean is None for m in norms.values())
        inside = {p for p in norms if ".nodes." in p or ".cells." in p}
        assert {norms[p].affine for p in inside} == {False}
        gates, x = soft_gates(net), batch(net.space)
        with torch.no_grad():
            assert torch.equal(net.train()(x, gates), net.eval()(x, gates))


def test_pooling_is_normalised_in_a_search_and_not_in_what_comes_out() -> None:
    space = darts(operations=("max_pool_3x3",))
    with_norm, without = Supernet(space), Supernet(space, pool_norm=False)
    assert size(with_norm) == size(without)
    architecture, x = space.sample(0), batch(space)
    gates = with_norm.gates_of(architecture).gates
    with torch.no_grad():
        close(without(x, gates), without.extract(architecture).train()(x))
        assert not torch.allclose(with_norm(x, gates), with_norm.extract(architecture).train()(x), atol=1e-3)


def test_an_architecture_whose_density_no_list_offers_is_extracted_too() -> None:
    space = darts()
    net = Supernet(space, pool_norm=False)
    decisions = space.sample(3).as_dict() | {"sparsity.density": 0.1234}
    architecture = space.architecture(decisions | {"sparsity.pattern": "unstructured", "sparsity.rule": "erk"})
    with torch.no_grad():
        close(net(batch(space), net.gates_of(architecture).gates), net.extract(architecture).train()(batch(space)))


def test_what_has_no_decision_or_the_wrong_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes no decision: there is nothing to search"):
        Supernet(Space(lambda c: torch.nn.Linear(2, 2), "fixed"))
    net = Supernet(darts())
    with pytest.raises(SpaceError, match="expected an architecture of space 'darts', got one of 'mlp'"):
        net.extract(Architecture("mlp", (), "0"))


def test_a_decision_without_a_gate_is_named() -> None:
    net = Supernet(darts())
    with pytest.raises(KeyError, match=r"no gate for the decision 'normal\.node0\.from0\.op'"):
        net(batch(net.space), {})
    name = "normal.node0.from0.op"
    gates = soft_gates(net) | {name: Gate(None, (0, 1))}
    with pytest.raises(ValueError, match=f"decision '{name}': several candidates are chosen, but there are no weights"):
        net(batch(net.space), gates)
