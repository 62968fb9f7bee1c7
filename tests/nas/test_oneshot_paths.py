"""Single paths of a supernet: drawing, changing, counting what they keep."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from nas.errors import ConfigError
from nas.oneshot.budget import PathBudget
from nas.oneshot.choices import EdgeChoice, OpChoice
from nas.oneshot.decode import architecture_of
from nas.oneshot.paths import ActiveLayers, Genes, PathSpace
from nas.oneshot.supernet import Supernet
from ops.candidates import DARTS_PRIMITIVES
from ops.counting import count
from search_spaces import get_space

SHAPE = (1, 8, 8)
SMALL = {
    "darts": {"channels": 4, "cells": 3, "operations": ("none", *DARTS_PRIMITIVES)},
    "nasbench201": {"channels": 4, "cells": 1, "dead_operations": True},
    "convnet": {"stages": 2, "widths": (4, 8), "stem": 4, "patterns": ("unstructured",)},
    "mlp": {"widths": (8, 16), "patterns": ("unstructured",)},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def made(name: str, allocation: str = "erk") -> tuple[Supernet, PathSpace, PathBudget]:
    space = get_space(name, input_shape=SHAPE, classes=10, **SMALL[name])
    supernet = Supernet(space, learned=True, pool_norm=False)
    paths = PathSpace(supernet.choices)
    return supernet, paths, PathBudget(supernet, paths, allocation, "unstructured")


def drawn(paths: PathSpace, seed: int) -> Genes:
    return paths.draw({}, torch.Generator().manual_seed(seed))


def architecture(supernet: Supernet, paths: PathSpace, genes: Genes, density: float):
    overall = {n: (density, "unstructured", "erk") for n in supernet.choices if n == "sparsity"}
    return architecture_of(supernet.space, paths.decisions(genes), overall)


@pytest.mark.parametrize("name", SMALL)
def test_a_path_is_an_architecture_of_the_space_with_the_same_output(name: str) -> None:
    supernet, paths, _ = made(name)
    x = torch.randn(6, *SHAPE)
    for seed in range(3):
        genes = drawn(paths, seed)
        architecture_ = architecture(supernet, paths, genes, 1.0)
        values = paths.values(genes)
        for part in supernet.structure(values).parts.parts:
            for layer in part.layers.values():
                layer.gates = None
                layer.set_target(1.0)
        mixed = OpChoice | EdgeChoice  # densities are 1 already
        gates = {n: g for n, g in paths.gates(genes).items() if isinstance(supernet.choices[n], mixed)}
        built = supernet.extract(architecture_).train()
        torch.testing.assert_close(supernet(x, gates, values), built(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_what_a_path_keeps_is_what_its_architecture_keeps(name: str) -> None:
    supernet, paths, budget = made(name)
    for seed in range(4):
        genes = drawn(paths, seed)
        kept = budget.kept(genes, 1.0)
        counted = count(supernet.space.meta(architecture(supernet, paths, genes, 1.0)), SHAPE)
        dense = sum(layer.shape[0] * _rest(layer.shape) for layer in counted.layers)
        assert kept == dense


def _rest(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape[1:]:
        product *= n
    return product


@pytest.mark.parametrize("name", SMALL)
def test_paths_at_one_budget_keep_equally_much(name: str) -> None:
    supernet, paths, budget = made(name)
    wanted = budget.usual_kept(0.3)
    reached = 0
    for seed in range(12):
        genes = drawn(paths, seed)
        density = budget.density_for(genes, wanted)
        if density is None:
            continue
        reached += 1
        assert abs(budget.kept(genes, density) - wanted) <= 0.02 * wanted
        if budget.by_part:
            found = architecture_of(supernet.space, paths.decisions(genes) | budget.part_densities(genes, wanted), {})
        else:
            found = architecture(supernet, paths, genes, round(density, 6))
        kept = sum(layer.nnz for layer in count(supernet.space.meta(found), SHAPE).layers)
        assert abs(kept - wanted) <= 0.025 * wanted
    assert reached >= 4


def test_masks_on_the_path_follow_the_weights_and_nest() -> None:
    _, paths, budget = made("darts")
    genes = drawn(paths, 0)
    budget.refresh_scores()
    masks = {}
    for density in (0.5, 0.2):
        budget.set_density(genes, density)
        layers = budget.active(genes)
        masks[density] = {p: layers.layers[p].mask.clone() for p in layers.on(genes) if p in layers.claimed}
    sparse = 0
    for path, low in masks[0.2].items():
        weight = budget.active(genes).layers[path].weight
        assert bool((masks[0.5][path] | ~low).all())
        if not bool(low.all()):
            sparse += 1
            assert weight.abs()[low].min() >= weight.abs()[~low].max()
    assert sparse > 5


def test_layers_off_the_path_are_not_counted() -> None:
    supernet, paths, _ = made("darts")
    genes = drawn(paths, 1)
    layers = ActiveLayers(supernet.structure({}))
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path, module in supernet.network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    supernet(torch.randn(2, *SHAPE), paths.gates(genes))
    for hook in hooks:
        hook.remove()
    assert ran == set(layers.on(genes))


def test_probabilities_steer_the_draw_and_none_is_never_taken_on_an_edge() -> None:
    _, paths, _ = made("darts")
    name = "normal.node0.from0.op"
    sure = torch.zeros(8)
    sure[3] = 1.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        genes = paths.draw({name: sure}, generator)
        assert genes.taken[name] == (3,)
        for n, choice in paths.choices.items():
            if isinstance(choice, OpChoice):
                assert choice.options[genes.taken[n][0]] != "none"
            if isinstance(choice, EdgeChoice):
                assert len(set(genes.taken[n])) == choice.keep == 2
    assert paths.most_probable({name: sure}).taken[name] == (3,)


def test_draws_of_two_of_three_edges_are_uniform() -> None:
    _, paths, _ = made("darts")
    generator = torch.Generator().manual_seed(0)
    counts = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for _ in range(600):
        counts[paths.draw({}, generator).taken["normal.node1.inputs"]] += 1
    assert min(counts.values()) > 150  # 200 each, standard deviation 11.5


def test_gates_with_probabilities_count_one_and_carry_their_gradient() -> None:
    _, paths, _ = made("darts")
    genes = drawn(paths, 0)
    name = "reduce.node2.from1.op"
    alpha = torch.randn(8, requires_grad=True)
    gate = paths.gates(genes, {name: alpha.softmax(0)})[name]
    index = genes.taken[name][0]
    assert gate.weights[index].item() == pytest.approx(1.0)
    assert float(gate.weights.detach().sum()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(gate.weights[index], alpha)
    p = alpha.detach().softmax(0)
    one = torch.zeros(8)
    one[index] = 1.0
    torch.testing.assert_close(gradient, p[index] * (one - p))


def test_one_ranking_of_all_weights_is_refused_where_weights_are_shared_between_widths() -> None:
    with pytest.raises(ConfigError, match="global"):
        made("mlp", allocation="global")


def test_a_budget_no_path_can_meet_has_no_density() -> None:
    _, paths, budget = made("darts")
    genes = drawn(paths, 0)
    assert budget.density_for(genes, 10**9) is None
    assert budget.density_for(genes, 3) is None


def test_budgets_of_so_few_weights_that_rounding_up_counts_are_met_too() -> None:
    everything = {"sparse_depthwise": True, "sparse_stem": True, "sparse_classifier": True}
    space = get_space("darts", input_shape=SHAPE, classes=10, **SMALL["darts"] | everything)
    supernet = Supernet(space, learned=True)
    paths = PathSpace(supernet.choices)
    budget = PathBudget(supernet, paths, "erk", "unstructured")
    wanted = budget.usual_kept(0.1)
    met = 0
    for seed in range(10):
        genes = drawn(paths, seed)
        density = budget.density_for(genes, wanted)
        met += density is not None and abs(budget.kept(genes, density) - wanted) <= 0.02 * wanted
    assert met >= 8
