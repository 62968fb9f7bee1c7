"""Which layers of a supernet may be sparse, and how densities reach them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.errors import ConfigError
from nas.oneshot.choices import Choices, SparsityChoice
from nas.oneshot.chooser import SupernetChooser
from nas.oneshot.mixed import Gate, GateBoard
from nas.oneshot.sparse_parts import SparseParts, layer_kinds
from nas.oneshot.supernet import Supernet
from ops.allocation import AllocationError, allocate
from ops.layers import is_depthwise
from ops.learned import LearnedLayer
from ops.masks import kept_count, topk_mask, zero_count
from search_spaces import Space, get_space
from tests.nas.little_spaces import little, little_space

torch.set_num_threads(1)


def made(space: Space) -> tuple[nn.Module, SparseParts, Choices]:
    choices = Choices()
    chooser = SupernetChooser({}, choices, GateBoard())
    torch.manual_seed(0)
    network = space._call(chooser)
    return network, SparseParts(network, chooser.sparse_parts), choices


def weighted(network: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def learned(network: nn.Module) -> set[str]:
    return {path for path, layer in network.named_modules() if isinstance(layer, LearnedLayer)}


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
def test_layers_with_scores_are_those_the_space_may_make_sparse(stem, classifier, depthwise):
    space = get_space(
        "darts",
        input_shape=(1, 8, 8),
        channels=4,
        cells=3,
        operations=["none", "skip_connect", "sep_conv_3x3"],
        sparse_stem=stem,
        sparse_classifier=classifier,
        sparse_depthwise=depthwise,
    )
    network, parts, _ = made(space)
    wanted = {
        path
        for path, layer in weighted(network).items()
        if (stem or not path.startswith("stem"))
        and (classifier or not path.startswith("classifier"))
        and (depthwise or not is_depthwise(layer))
    }
    assert learned(network) == wanted
    assert list(parts.layers) == [path for path in weighted(network) if path in wanted], "in the order of the modules"
    assert all(layer.density == 1 for layer in parts.layers.values())


def test_modules_that_were_built_and_left_out_are_nobodys():
    def wasteful(c):
        c.sparse("lost", nn.Linear(4, 4), (1.0, 0.5))
        return nn.Sequential(c.sparse("used", nn.Linear(4, 4), (1.0, 0.5)))

    _, parts, _ = made(Space(wasteful, "wasteful"))
    assert [part.choice.name for part in parts.parts] == ["used"]
    assert list(parts.layers) == ["0"]


def test_a_network_that_is_one_layer_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match=r"single Linear.*nn\.Sequential"):
        made(Space(lambda c: c.sparse("all", nn.Linear(4, 4), (1.0, 0.5)), "bare"))


@pytest.mark.parametrize("rule", ["uniform", "erk", "er"])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.033])
def test_a_density_is_spread_as_by_the_rule_over_the_shapes(rule, density):
    _, parts, _ = made(little_space())
    spread = parts.set_all(density, rule, "unstructured")
    assert spread == allocate({p: tuple(layer.weight.shape) for p, layer in parts.layers.items()}, density, rule)
    for path, layer in parts.layers.items():
        assert layer.density == spread[path]
        assert layer.nnz == kept_count(layer.weight.shape, spread[path])
        assert torch.equal(layer.mask, topk_mask(layer.score.abs(), spread[path]))


@pytest.mark.parametrize("density", [0.5, 0.2, 0.071])
def test_global_is_one_ranking_with_an_exact_total(density):
    _, parts, _ = made(little_space())
    with torch.no_grad():
        for i, layer in enumerate(parts.layers.values()):
            layer.score.copy_(torch.rand(layer.score.shape) ** (1 + i % 3))
    parts.set_all(density, "global", "unstructured")
    total = sum(layer.weight.numel() for layer in parts.layers.values())
    assert sum(layer.nnz for layer in parts.layers.values()) == total - zero_count(total, density)
    flat = torch.cat([(layer.score.abs() / layer.score.abs().mean()).flatten() for layer in parts.layers.values()])
    masks = torch.cat([layer.mask.flatten() for layer in parts.layers.values()])
    best = torch.cat(
        [torch.arange(layer.score.numel()) == layer.score.abs().argmax() for layer in parts.layers.values()]
    )
    assert flat[masks & ~best].min() >= flat[~masks].max(), "nothing kept is below what is dropped, but a layer's best"


def test_global_follows_scores_that_moved_when_it_is_set_again():
    _, parts, _ = made(little_space())
    path, layer = next(iter(parts.layers.items()))
    before = parts.set_all(0.2, "global", "unstructured")[path]
    with torch.no_grad():
        layer.score.fill_(1.0)
        layer.score.view(-1)[0] = 1e6  # one weight stands out, so the rest of its layer is far below the mean
    after = parts.set_all(0.2, "global", "unstructured")[path]
    assert after < before
    assert layer.nnz == 1


@pytest.mark.parametrize("pattern", ["4x1", "2:4", "channel"])
@pytest.mark.parametrize("rule", ["uniform", "erk", "global"])
def test_layers_on_which_a_pattern_is_illegal_are_dense_and_the_others_have_it(pattern, rule):
    _, parts, _ = made(little_space(patterns=(pattern, "unstructured")))
    density = 0.5
    following = parts.following(pattern)
    assert set(following) != set(parts.layers) or pattern == "channel"
    parts.set_all(density, rule, pattern)
    for path, layer in parts.layers.items():
        if path in following:
            assert str(layer.pattern) == pattern
            assert layer.nnz == layer.planned_nnz
            assert layer.density < 1 or rule == "erk"
            assert layer.density == 0.5 or pattern != "2:4"
        else:
            assert layer.density == 1
    assert any(layer.density < 1 for layer in parts.layers.values())
    parts.set_all(0.1, "uniform", "unstructured")
    assert all(str(layer.pattern) == "unstructured" and layer.density == 0.1 for layer in parts.layers.values())
    parts.set_all(1.0, "uniform", pattern)
    assert all(layer.density == 1 for layer in parts.layers.values())


def test_kinds_of_layers_by_name_and_where_there_is_no_name_by_order():
    network, _, _ = made(little_space())
    kinds = layer_kinds(network)
    assert kinds["stem"] == {"stem.0"}
    assert kinds["classifier"] == {"classifier"}
    assert kinds["depthwise"] == {p for p, layer in weighted(network).items() if is_depthwise(layer)} != set()
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2))
    assert layer_kinds(plain) == {"stem": {"0"}, "classifier": {"3"}, "depthwise": set()}
    assert layer_kinds(nn.Sequential(nn.ReLU())) == {"stem": set(), "classifier": set(), "depthwise": set()}


@pytest.mark.parametrize("kind", ["stem", "classifier", "depthwise"])
def test_exempt_layers_are_dense_and_the_density_is_of_the_others(kind):
    network, parts, _ = made(little_space())
    spread = parts.set_all(0.1, "erk", "unstructured", exempt=(kind,))
    dense = layer_kinds(network)[kind]
    others = {p: tuple(layer.weight.shape) for p, layer in parts.layers.items() if p not in dense}
    assert {p for p, layer in parts.layers.items() if layer.density == 1} >= dense
    assert {p: spread[p] for p in others} == allocate(others, 0.1, "erk")
    assert set(parts.following("unstructured", (kind,))) == set(others)


def test_an_exempt_stem_is_the_stem_also_where_the_space_keeps_it_dense():
    _, parts, _ = made(little_space(dense=("stem",)))
    spread = parts.set_all(0.1, "uniform", "unstructured", exempt=("stem",))
    assert set(spread.values()) == {0.1}, "not the first of the layers that are left"


def test_wrong_names_are_errors():
    _, parts, _ = made(little_space())
    with pytest.raises(ValueError, match=r"unknown exemption head; known: stem"):
        parts.set_all(0.1, "uniform", "unstructured", exempt=("head",))
    with pytest.raises(AllocationError, match=r"unknown rule"):
        parts.set_all(0.1, "uniforn", "unstructured")


def parted(c, targets=((1.0, 0.5, 0.25), ("unstructured", "2:4"))):
    network = nn.Sequential(
        c.sparse("first", nn.Linear(8, 8), *targets), nn.ReLU(), c.sparse("second", nn.Linear(8, 8), (1.0, 0.1))
    )
    return network


def test_overall_is_of_overall_choices_and_all_is_of_everything():
    def both(c):
        inner = c.sparse("part", nn.Linear(8, 8), (1.0, 0.5))
        rest = c.allocate("sparsity", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (1.0, 0.1))
        return nn.Sequential(inner, rest)

    _, parts, _ = made(Space(both, "both"))
    parts.set_overall(0.1, "uniform", "unstructured")
    assert {path: layer.density for path, layer in parts.layers.items()} == {"0": 1.0, "1.0": 0.1, "1.1": 0.1}
    parts.set_all(0.25, "uniform", "unstructured")
    assert {path: layer.density for path, layer in parts.layers.items()} == {"0": 0.25, "1.0": 0.25, "1.1": 0.25}


def test_a_gate_with_one_choice_sets_the_target_of_its_part_alone():
    _, parts, choices = made(Space(parted, "parted"))
    choice = choices.by_name["first"]
    assert isinstance(choice, SparsityChoice)
    for number, (density, pattern) in enumerate(choice.targets):
        parts.apply({"first": Gate(None, (number,))}, choices.by_name)
        assert parts.layers["0"].density == density
        assert not pattern or str(parts.layers["0"].pattern) == pattern
        assert parts.layers["2"].density == 1
    with pytest.raises(ValueError, match="several densities are chosen"):
        parts.apply({"first": Gate(None, (0, 1))}, choices.by_name)


def test_a_gate_with_weights_mixes_nested_masks_and_is_dropped_by_a_density():
    network, parts, choices = made(Space(parted, "parted"))
    choice = choices.by_name["first"]
    assert isinstance(choice, SparsityChoice)
    weights = torch.rand(len(choice.targets)).softmax(0)
    parts.apply({"first": Gate(weights)}, choices.by_name)
    layer = parts.layers["0"]
    factor = sum(
        w * topk_mask(layer.score.abs(), density, pattern or "unstructured")
        for w, (density, pattern) in zip(weights, choice.targets)
    )
    x = torch.randn(3, 8)
    assert torch.allclose(network[0](x), nn.functional.linear(x, layer.weight * factor, layer.bias), atol=1e-6)
    parts.set_all(0.5, "uniform", "unstructured")
    assert layer.gates is None
    assert torch.equal(layer.effective_weight() != 0, topk_mask(layer.score.abs(), 0.5))


def test_weights_of_targets_that_a_structure_cannot_have_are_left_out_and_the_rest_sum_to_1():
    _, _, wide = made(Space(parted, "parted"))  # 8 inputs: 2:4 is legal

    def narrow(c):
        return nn.Sequential(c.sparse("first", nn.Linear(6, 8), (1.0, 0.5, 0.25), ("unstructured", "2:4")))

    _, parts, _ = made(Space(narrow, "narrow"))
    known = wide.by_name["first"]
    assert isinstance(known, SparsityChoice)
    own = parts.parts[0].choice
    assert isinstance(own, SparsityChoice)
    assert len(own.targets) < len(known.targets)
    weights = torch.rand(len(known.targets)).softmax(0)
    parts.apply({"first": Gate(weights)}, wide.by_name)
    given = parts.layers["0"].gates
    assert given is not None
    kept = torch.stack([weights[known.targets.index(target)] for target in own.targets])
    assert torch.allclose(given, kept / kept.sum())


def test_global_ranks_the_scores_it_is_given_where_weights_are_shared():
    space = get_space("mlp", input_shape=(6,), classes=3, max_depth=2, widths=(4, 8), densities=(1.0, 0.5))
    supernet = Supernet(space, learned=True)
    structure = supernet.structure({"layer0.width": 4, "layer1.width": 8, "depth": 2})
    assert structure.sources
    assert structure.parts is not None
    tensors = supernet.by_key()
    scores = {}
    for path, layer in structure.parts.layers.items():
        assert layer.score.is_meta
        key, part = structure.sources[f"{path}.score"]
        scores[path] = tensors[key] if part is None else tensors[key][part]
    shared = structure.parts.set_all(0.3, "global", "unstructured", scores=scores)

    alone = nn.Sequential(*[nn.Linear(s.shape[1], s.shape[0]) for s in scores.values()])

    def same(c):
        return nn.Sequential(c.allocate("sparsity", alone, (1.0, 0.3)))

    _, parts, _ = made(Space(same, "same"))
    with torch.no_grad():
        for layer, score in zip(parts.layers.values(), scores.values()):
            layer.score.copy_(score)
    assert list(parts.set_all(0.3, "global", "unstructured").values()) == list(shared.values())


def test_the_little_space_draws_and_builds():
    space = Space(little, "little")
    network = space.build(space.sample(0))
    assert network(torch.randn(2, 1, 6, 6)).shape == (2, 3)


def test_scores_are_no_weights_also_where_a_layer_does_not_fit_into_the_shared_one():
    def crossing(c):
        a, b = c.choice("a", (2, 6)), c.choice("b", (2, 6))
        c.op("body", {"one": nn.Identity, "other": nn.Identity})
        middle = (
            nn.Sequential() if a == b else nn.Sequential(nn.Linear(a, b))
        )  # met as 2 to 6 or 6 to 2, never as 6 to 6
        return c.allocate("sparsity", nn.Sequential(nn.Linear(4, a), middle, nn.Linear(b, 3)), (1.0, 0.5))

    supernet = Supernet(Space(crossing, "crossing"), learned=True)
    keys = set()
    for a in (2, 6):
        for b in (2, 6):
            structure = supernet.structure({"a": a, "b": b})
            keys |= {key for path, (key, _) in structure.sources.items() if path.endswith(".score")}
    assert any(" " in key for key in keys)
    assert set(supernet.scores()) == keys
    assert not keys & set(supernet.weights())
