"""The searcher node_masks: parent, draws, criterion, what is found, and that a stopped search goes on to the same end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import ConfigError, EvaluationFailed
from nas.oneshot.algorithm import At, Setting
from nas.oneshot.engine import train_algorithm
from nas.oneshot.node_masks import NodeMaskOptions, NodeMasks
from nas.oneshot.node_parent import dense_parent, sparse_parts
from nas.oneshot.nodes import apply_node_mask_
from ops.counting import count
from ops.layers import sparse_layers
from search_spaces import Space, get_space

FEATURES, CLASSES = 12, 4
MLP = {"input_shape": (FEATURES,), "classes": CLASSES, "max_depth": 2, "widths": [4, 10]}
CONVNET = {
    **{"input_shape": (2, 6, 6), "classes": CLASSES, "stages": 2, "stem": 8, "widths": [4, 8]},
    **{"depths": [1, 2], "kernels": [3], "blocks": ["conv", "mbconv"]},
}


def mlp(**changes: Any) -> Space:
    return get_space("mlp", **(MLP | changes))


def convnet(**changes: Any) -> Space:
    return get_space("convnet", **(CONVNET | changes))


def rows(n: int, shape: tuple[int, ...] = (FEATURES,), seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=chance), torch.randint(CLASSES, (n,), generator=chance)


def search(space: Space | None = None, seed: int = 0, **options: Any) -> NodeMasks:
    space = space or mlp()
    given = {"draws": 12, "criterion_rows": 16, "node_sparsities": (0.5, 0.8), **options}
    return NodeMasks(Setting(space, tuple(space.options["input_shape"]), CLASSES, seed), NodeMaskOptions(**given))


def never() -> tuple[Tensor, Tensor]:
    raise AssertionError("node masks look at the training half only")


def run(algorithm: NodeMasks, *, epochs: int = 1, steps: int = 2, batch: int = 16, first: int = 0) -> NodeMasks:
    """The steps from `first` on."""
    if first == 0:
        algorithm.begin_phase(0, steps)
    for number in range(first, epochs * steps):
        x, y = rows(batch, algorithm.setting.input_shape, seed=number)
        epoch, step = divmod(number, steps)
        algorithm.step(x, y, never, At(0, epoch, epochs, step, steps))
    return algorithm


# -- the parent -----------------------------------------------------------------------------------------------------------


def test_the_parent_has_every_number_at_its_largest_and_density_one() -> None:
    assert dense_parent(mlp()).as_dict() == {
        **{"depth": 2, "layer0.width": 10, "layer0.density": 1.0, "layer1.width": 10, "layer1.density": 1.0}
    }


def test_the_parents_operations_are_those_with_most_weights() -> None:
    space = convnet(densities=[1.0])
    parent = dense_parent(space)
    weights = {a: count(space.meta(a), (2, 6, 6)).params for a in space.enumerate()}
    assert weights[parent] == max(weights.values())


def test_the_parent_is_dense_where_density_one_is_not_offered() -> None:
    parent = dense_parent(mlp(densities=[0.5, 0.1], patterns=["unstructured"]))
    assert parent["layer0.density"] == parent["layer1.density"] == 1


def test_given_decisions_stand_and_the_rest_is_the_largest() -> None:
    assert dense_parent(mlp(), {"depth": 1, "layer0.width": 4}).as_dict() == {
        **{"depth": 1, "layer0.width": 4, "layer0.density": 1.0}
    }
    with pytest.raises(ConfigError, match=r"layer1.width: no such decision; this network decides: depth, layer0.width"):
        dense_parent(mlp(), {"depth": 1, "layer1.width": 4})
    with pytest.raises(ConfigError, match=r"expected one of \[4, 10\], got 5"):
        dense_parent(mlp(), {"layer0.width": 5})
    with pytest.raises(ConfigError, match="the parent is dense"):
        dense_parent(mlp(), {"layer0.density": 0.5})


def test_a_density_decides_its_own_layers() -> None:
    assert sparse_parts(mlp(), dense_parent(mlp())) == {"layer0.density": ("1",), "layer1.density": ("4",)}
    space = convnet(blocks=["mbconv"], depths=[1])
    assert sparse_parts(space, dense_parent(space)) == {
        "stage0.density": ("1.0.body.0.0", "1.0.body.2.0"),
        "stage1.density": ("2.0.body.0.0", "2.0.body.2.0"),
    }


# -- draws and criterion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [mlp(), mlp(dropout=0.5), convnet(), convnet(blocks=["mbconv"])], ids=str)
def test_the_criterion_is_the_loss_of_the_masked_network_on_the_fixed_batch(space: Space) -> None:
    algorithm = run(search(space))
    x, y = rows(16, algorithm.setting.input_shape)
    for sparsity in (0.5, 0.8):
        for number in (0, 7):
            mask = algorithm.drawn(sparsity, number)
            torch.manual_seed(0)
            slow = space.build(algorithm.parent).eval()
            for module in slow.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.train()
            apply_node_mask_(slow, mask)
            assert algorithm.criterion(mask) == pytest.approx(F.cross_entropy(slow(x), y).item(), abs=1e-5)
            position = algorithm.options.node_sparsities.index(sparsity)
            assert algorithm.criteria[position, number] == algorithm.criterion(mask)


def test_the_searched_mask_is_the_best_of_all_draws() -> None:
    algorithm = run(search())
    assert algorithm.done == 12
    for i, sparsity in enumerate((0.5, 0.8)):
        losses = [algorithm.criterion(algorithm.drawn(sparsity, number)) for number in range(12)]
        assert algorithm.criteria[i].tolist() == losses
        assert algorithm.best(sparsity) == losses.index(min(losses))
    searched = [one.note for one in algorithm.found() if one.note["role"] == "searched"]
    assert [note["criterion"] for note in searched] == algorithm.criteria.min(1).values.tolist()


@pytest.mark.parametrize(("batch", "steps", "epochs"), [(16, 1, 1), (5, 7, 2), (40, 3, 1), (4, 2, 3)])
def test_all_draws_are_made_whatever_the_steps_and_on_the_first_rows_once(batch: int, steps: int, epochs: int) -> None:
    algorithm = run(search(epochs=epochs), epochs=epochs, steps=steps, batch=batch)
    seen = torch.cat([rows(batch, seed=number)[0] for number in range(steps)])
    assert algorithm.done == 12
    assert torch.isfinite(algorithm.criteria).all()
    assert algorithm.x is not None
    assert torch.equal(algorithm.x, seen[:16])  # no row twice: a smaller epoch gives a smaller batch
    other = run(search())
    assert torch.equal(algorithm.drawn(0.5, 3).kept[0], other.drawn(0.5, 3).kept[0])


def test_draws_do_not_depend_on_the_grid_and_differ_from_the_controls() -> None:
    one, two = search(), search(node_sparsities=(0.9, 0.5), draws=40)
    assert all(torch.equal(a, b) for a, b in zip(one.drawn(0.5, 4).kept, two.drawn(0.5, 4).kept))
    masks = [one.drawn(0.5, i) for i in range(3)] + [one.control(0.5, i) for i in range(3)]
    assert len({tuple(torch.cat(mask.kept).tolist()) for mask in masks}) == 6
    other = search(seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(one.drawn(0.5, 0).kept, other.drawn(0.5, 0).kept))


def test_a_loss_that_is_not_finite_is_the_worst_and_an_error_where_it_is_all() -> None:
    algorithm = run(search())
    algorithm.criteria[0, :5] = torch.inf
    assert algorithm.best(0.5) == 5 + int(algorithm.criteria[0, 5:].argmin())
    algorithm.criteria[0] = torch.inf
    with pytest.raises(EvaluationFailed, match=r"finite for none of 12 masks of node sparsity 0\.5"):
        algorithm.best(0.5)


# -- what is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [mlp(), convnet(), convnet(blocks=["mbconv"]), convnet(depthwise=True)], ids=str)
def test_what_is_found_starts_from_one_theta_with_exact_counts_and_masks_that_fit(space: Space) -> None:
    algorithm = run(search(space, random_masks=2))
    found = algorithm.found()
    assert [(one.note["role"], one.note["node_sparsity"]) for one in found] == [
        ("dense", 0.0),
        *(("searched", 0.5), ("random", 0.5), ("random", 0.5)),
        *(("searched", 0.8), ("random", 0.8), ("random", 0.8)),
    ]
    torch.manual_seed(0)
    theta = space.build(algorithm.parent).state_dict()
    x, _ = rows(5, algorithm.setting.input_shape)
    for one in found:
        network = space.build(one.architecture)
        network.load_state_dict(one.initial)  # strict: every name, and no zeros in a mask of density 1
        kept = 0
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nonzero = module.weight != 0
                kept += int(nonzero.sum())
                assert torch.equal(module.weight, theta[f"{name}.weight"] * nonzero)
        for name, layer in sparse_layers(network):
            assert torch.equal(layer.mask, layer.weight != 0), name
        assert kept == one.note["kept_weights"]
        assert one.note["weight_sparsity"] == pytest.approx(1 - kept / one.note["weights"])
        if one.note["role"] == "searched":
            mask = algorithm.drawn(one.note["node_sparsity"], one.note["draw"])
            twin = space.build(algorithm.parent)
            twin.load_state_dict(theta)
            apply_node_mask_(twin, mask)
            torch.testing.assert_close(network.eval()(x), twin.eval()(x), rtol=0, atol=0)
    assert found[0].architecture == algorithm.parent


def test_the_density_of_the_architecture_is_the_share_that_the_masks_keep() -> None:
    found = run(search()).found()
    sparse = found[1].architecture.as_dict()
    assert sparse["layer0.density"] == 0.5
    assert sparse["layer1.density"] == 0.25  # both ends: 5 of 10 nodes each
    assert sparse["layer0.pattern"] == sparse["layer1.pattern"] == "unstructured"
    network = mlp().build(found[1].architecture)
    assert [layer.planned_nnz for _, layer in sparse_layers(network)] == [60, 25]
    assert found[1].note["nodes"] == {"1": 5, "4": 5}


def test_searched_and_random_masks_have_equal_counts_and_can_be_paired() -> None:
    found = run(search(random_masks=2)).found()
    for sparsity in (0.5, 0.8):
        group = [one for one in found if one.note["node_sparsity"] == sparsity]
        assert len({one.architecture.digest for one in group}) == 1
        assert len({one.note["kept_weights"] for one in group}) == 1
        assert {one.note["group"] for one in group} == {f"node sparsity {sparsity:g}"}
        masks = [one.initial["4.mask"] for one in group]
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[1], masks[2])
    assert {one.note["replicate_seed"] for one in found} == {0}


def test_sparsity_too_small_to_drop_a_node_is_the_dense_parent() -> None:
    found = run(search(node_sparsities=(0.05,))).found()
    assert found[1].architecture == found[0].architecture
    assert found[1].note["weight_sparsity"] == 0


# -- as an algorithm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "stop"), [(mlp(), 1), (mlp(), 5), (convnet(), 3)], ids=str)
def test_a_stopped_search_goes_on_to_the_same_end(space: Space, stop: int) -> None:
    whole = run(search(space, draws=9), steps=6, batch=8)
    part = search(space, draws=9)
    part.begin_phase(0, 6)
    for number in range(stop):
        x, y = rows(8, part.setting.input_shape, seed=number)
        part.step(x, y, never, At(0, 0, 1, number, 6))
    tensors, facts = part.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.manual_seed(99)  # the weights are the state's, not those that are drawn again
    again = search(space, draws=9)
    with torch.no_grad():
        for parameter in again.network.parameters():
            parameter.zero_()
    again.begin_phase(0, 6)
    again.load(tensors, facts)
    run(again, steps=6, batch=8, first=stop)
    assert torch.equal(again.criteria, whole.criteria)
    for one, two in zip(whole.found(), again.found(), strict=True):
        assert (one.architecture, one.note) == (two.architecture, two.note)
        assert one.initial.keys() == two.initial.keys()
        assert all(torch.equal(one.initial[name], two.initial[name]) for name in one.initial)


def test_the_state_of_theta_does_not_move() -> None:
    algorithm = search(convnet())
    before = {name: tensor.clone() for name, tensor in algorithm.state()[0].items() if name.startswith("theta")}
    run(algorithm)
    algorithm.found()
    after = algorithm.state()[0]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_making_and_running_it_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run(search()).found()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_engine_runs_it_to_a_result_on_a_real_data_set(tmp_path: Path) -> None:
    from nas.data import load_data

    data = load_data("digits", validation=0.2, limit=300)
    space = get_space("mlp", input_shape=data.input_shape, classes=data.classes, max_depth=1, widths=[16])
    options = NodeMaskOptions(draws=20, batch_size=32, criterion_rows=64, node_sparsities=(0.5,))
    setting = Setting(space, data.input_shape, data.classes, 3)
    result = train_algorithm(NodeMasks(setting, options), data, tmp_path / "one", seed=3)
    again = train_algorithm(NodeMasks(setting, options), data, tmp_path / "two", seed=3)
    assert result.found == again.found
    assert [one["note"]["role"] for one in result.found] == ["dense", "searched", "random"]
    assert result.log[-1]["draws"] == 20
    assert result.log[-1]["criterion"]["0.5"]["best"] == result.found[1]["note"]["criterion"]
    assert result.found[1]["note"]["criterion"] < result.found[1]["note"]["criterion_median"]


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws: expected a whole number >= 1"),
        ({"node_sparsities": ()}, "node_sparsities: expected at least one"),
        ({"node_sparsities": (0.5, 1.0)}, "node_sparsities: expected a number > 0 and < 1, got 1.0"),
        ({"node_sparsities": (0.5, 0.5)}, "node_sparsities: a value repeats"),
        ({"criterion_rows": 1}, "criterion_rows: expected a whole number >= 2"),
        ({"random_masks": -1}, "random_masks: expected a whole number >= 0"),
    ],
)
def test_senseless_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodeMaskOptions(**options)


def test_options_are_plain_data() -> None:
    import json

    options = NodeMaskOptions(parent={"depth": 2})
    assert json.loads(json.dumps(dataclasses.asdict(options)))["parent"] == {"depth": 2}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (get_space("darts", input_shape=(3, 8, 8), classes=4, cells=1, channels=4), "it is not known what becomes"),
        (mlp(patterns=["4x1"], widths=[8]), r"need the pattern 'unstructured' here, the space .* '?4x1"),
        (mlp(patterns=["2:4"], densities=[0.5], widths=[8]), "expected a dense parent"),
        (Space(lambda c: nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "linear"), "no hidden nodes"),
    ],
    ids=["darts", "no unstructured", "no dense", "no hidden layer"],
)
def test_spaces_that_cannot_have_node_masks_say_why(space: Space, message: str) -> None:
    shape = tuple(space.options.get("input_shape", (12,)))
    with pytest.raises(ConfigError, match=message):
        NodeMasks(Setting(space, shape, 4, 0), NodeMaskOptions())
