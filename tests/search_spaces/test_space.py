"""The chooser and the space object on toy spaces whose answers are known by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from ops.layers import SparseConv2d, SparseLinear, sparse_layers
from search_spaces import Chooser, Space, SpaceError, get_space


def dependent(c: Chooser) -> nn.Module:
    """a in {1, 2}; if 2 then b in 3 values: 1 + 3 = 4 architectures."""
    if c.choice("a", [1, 2]) == 2:
        c.choice("b", ["x", "y", "z"])
    return nn.Identity()


def subsets(c: Chooser) -> nn.Module:
    c.subset("inputs", 4, 2)
    return nn.Identity()


def test_enumeration_follows_dependent_choices_in_order() -> None:
    space = Space(dependent, "dependent")
    assert [a.decisions for a in space.enumerate()] == [
        (("a", 1),),
        (("a", 2), ("b", "x")),
        (("a", 2), ("b", "y")),
        (("a", 2), ("b", "z")),
    ]
    assert space.size() == 4


def test_the_size_estimate_is_unbiased_on_a_lopsided_tree() -> None:
    mean, error = Space(dependent, "dependent").estimate_size(samples=4000, seed=0)
    assert error > 0
    assert abs(mean - 4) < 4 * error


def test_a_subset_is_k_of_n_ascending() -> None:
    space = Space(subsets, "subsets")
    assert space.size() == 6
    assert [a["inputs"] for a in space.enumerate()] == ["0,1", "0,2", "0,3", "1,2", "1,3", "2,3"]


def test_sampling_draws_each_option_equally_often() -> None:
    rng = random.Random(0)
    space = Space(dependent, "dependent")
    count = sum(space.sample(rng)["a"] == 1 for _ in range(4000))
    assert abs(count - 2000) < 5 * (4000 * 0.25) ** 0.5


TINY_SPACES = [
    ("mlp", {"input_shape": (12,), "widths": [6, 8], "max_depth": 2, "patterns": ["unstructured", "4x1", "2:4"]}),
    (
        "convnet",
        {"stages": 1, "stem": 6, "widths": [6, 8], "depths": [1, 2], "kernels": [3], "blocks": ["conv", "mbconv"]},
    ),
    ("convnet", {"stages": 2, "stem": 4, "widths": [4], "depths": [1], "kernels": [3], "densities": [1, 0.5]}),
]


@pytest.mark.parametrize(("space_name", "options"), TINY_SPACES)
def test_closed_form_size_equals_enumeration(space_name: str, options: dict) -> None:
    space = get_space(space_name, **options)
    assert space.size() == sum(1 for _ in space.enumerate())


def test_a_pattern_is_offered_only_where_it_is_legal_on_all_layers() -> None:
    def fn(c: Chooser) -> nn.Module:
        return c.sparse("layer", nn.Linear(6, 8), [1.0, 0.5], ["unstructured", "4x1", "2:4"])

    space = Space(fn, "one_layer")
    half = space.architecture({"layer.density": 0.5, "layer.pattern": "4x1"})
    assert space.offers(half)["layer.pattern"] == ("unstructured", "4x1")  # 6 inputs are not divisible by 4
    with pytest.raises(SpaceError, match=r"layer\.pattern"):
        space.architecture({"layer.density": 0.5, "layer.pattern": "2:4"})


def test_nothing_legal_is_an_error_that_names_layer_and_cure() -> None:
    def fn(c: Chooser) -> nn.Module:
        return c.sparse("layer", nn.Linear(6, 8), [0.5], ["2:4"])

    with pytest.raises(SpaceError, match=r"layer.*2:4.*6"):
        Space(fn, "impossible").sample(0)


def test_a_fixed_density_pattern_needs_its_density() -> None:
    def fn(c: Chooser) -> nn.Module:
        return c.sparse("layer", nn.Linear(8, 8), [1.0, 0.25], ["2:4"])

    with pytest.raises(SpaceError, match=r"2:4 has density 0\.5"):
        Space(fn, "mistaken").sample(0)


def test_a_module_without_weights_takes_no_sparsity_decision() -> None:
    def fn(c: Chooser) -> nn.Module:
        return c.sparse("pool", c.op("op", {"pool": nn.MaxPool2d}, kernel_size=2), [0.5], ["unstructured"])

    assert Space(fn, "pool").sample(0).decisions == (("op", "pool"),)


def test_depthwise_layers_stay_dense_unless_asked() -> None:
    def fn(c: Chooser, depthwise: bool = False) -> nn.Module:
        body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
        return c.sparse("body", body, [0.5], ["unstructured"], depthwise=depthwise)

    def kinds(space: Space) -> list[type]:
        return [type(m) for m in space.build(space.sample(0))]

    assert kinds(Space(fn, "a")) == [nn.Conv2d, SparseConv2d]
    assert kinds(Space(fn, "b", {"depthwise": True})) == [SparseConv2d, SparseConv2d]


def test_an_overall_density_is_met_by_the_layers_together() -> None:
    def fn(c: Chooser) -> nn.Module:
        net = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 80), nn.Linear(80, 10))
        return c.allocate("all", net, [0.2], ["uniform", "erk"], skip=lambda name, _: name == "2")

    space = Space(fn, "allocated")
    for rule in ("uniform", "erk"):
        built = space.build(space.architecture({"all.density": 0.2, "all.pattern": "unstructured", "all.rule": rule}))
        layers = dict(sparse_layers(built))
        assert list(layers) == ["0", "1"]
        assert isinstance(layers["0"], SparseLinear)
        kept = sum(layer.density * layer.weight.numel() for layer in layers.values())
        assert kept == pytest.approx(0.2 * (40 * 60 + 60 * 80), abs=2)


def test_the_same_name_twice_gives_the_same_decision_and_other_options_are_refused() -> None:
    def same(c: Chooser) -> nn.Module:
        assert c.choice("w", [1, 2]) == c.choice("w", [1, 2])
        return nn.Identity()

    def other(c: Chooser) -> nn.Module:
        c.choice("w", [1, 2])
        c.choice("w", [1, 2, 3])
        return nn.Identity()

    Space(same, "same").sample(0)
    with pytest.raises(SpaceError, match="'w'"):
        Space(other, "other").sample(0)


@pytest.mark.parametrize("options", [[], [1, 1], [(1, 2)], [None]])
def test_options_must_be_different_json_scalars(options: list) -> None:
    def fn(c: Chooser) -> nn.Module:
        c.choice("w", options)
        return nn.Identity()

    with pytest.raises(SpaceError, match="'w'"):
        Space(fn, "bad").sample(0)


def test_a_function_that_returns_no_module_is_told_so() -> None:
    with pytest.raises(SpaceError, match="must return a torch"):
        Space(lambda c: 3, "three").sample(0)


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(SpaceError, match='did you mean "widths"'):
        get_space("mlp", width=[3])


def test_unknown_spaces_and_files_are_named() -> None:
    with pytest.raises(SpaceError, match='did you mean "convnet"'):
        get_space("convnets")
    with pytest.raises(SpaceError, match="no file"):
        get_space("nowhere.py:fn")
    with pytest.raises(SpaceError, match="no_such_module"):
        get_space("no_such_module:fn")


def test_a_space_in_a_users_file_gets_the_shape_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def tiny(c, input_shape, classes, widths=(4,)):\n"
        "    w = c.choice('w', list(widths))\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], w), nn.Linear(w, classes))\n"
    )
    space = get_space("mine.py:tiny", input_shape=(7,), classes=3, folder=tmp_path, widths=[5, 6])
    assert space.build(space.sample(0))(torch.zeros(2, 7)).shape == (2, 3)
    with pytest.raises(SpaceError, match="tiny"):
        get_space("mine.py:tinny", folder=tmp_path)


def test_a_user_file_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(SpaceError, match=r"broken\.py.*ZeroDivisionError"):
        get_space("broken.py:fn", folder=tmp_path)
