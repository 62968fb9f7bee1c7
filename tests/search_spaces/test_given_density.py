"""A density may be given that no list offers: everything but drawing works with it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from ops.layers import sparse_layers
from search_spaces import Architecture, Chooser, Space, SpaceError, get_space


def one_layer(
    c: Chooser, *, densities: tuple[float, ...] = (1.0, 0.5), patterns: tuple[str, ...] = ("unstructured",)
) -> nn.Module:
    return c.sparse("layer", nn.Linear(8, 8, bias=False), densities, patterns)


def overall(c: Chooser, *, densities: tuple[float, ...] = (0.1,)) -> nn.Module:
    width = c.choice("width", [8, 16])
    network = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
    return c.allocate("sparsity", network, densities, ("uniform", "erk"), ("unstructured", "4x1"))


@pytest.mark.parametrize("density", [1.0, 0.3, 1 / 64, 1e-9])
@pytest.mark.parametrize("offered", [(0.5,), (0.5, 0.25)])
def test_any_density_above_zero_can_be_given(density: float, offered: tuple[float, ...]) -> None:
    space = Space(one_layer, "one", {"densities": offered})
    decisions = {"layer.density": density} | ({"layer.pattern": "unstructured"} if density < 1 else {})
    given = space.architecture(decisions)
    assert given.as_dict() == decisions
    assert given == Architecture.from_json(given.to_json())
    assert space.offers(given)["layer.density"] == offered
    layers = [layer for _, layer in sparse_layers(space.build(given))]
    assert [layer.density for layer in layers] == ([density] if density < 1 else [])


@pytest.mark.parametrize("bad", [0, 0.0, -0.1, 1.5, float("nan"), float("inf"), "0.3", True])
@pytest.mark.parametrize("offered", [(0.5,), (0.5, 0.25)])
def test_what_is_no_density_is_an_error_that_names_decision_and_value(bad: object, offered: tuple[float, ...]) -> None:
    space = Space(one_layer, "one", {"densities": offered})
    with pytest.raises(SpaceError, match=r"layer\.density.*expected.*0\.5"):
        space.architecture({"layer.density": bad, "layer.pattern": "unstructured"})  # type: ignore[dict-item]


def test_a_given_density_has_the_patterns_of_free_density_only() -> None:
    space = Space(one_layer, "one", {"patterns": ("unstructured", "2:4", "4x1", "16x1")})
    given = space.architecture({"layer.density": 0.3, "layer.pattern": "4x1"})
    assert space.offers(given)["layer.pattern"] == ("unstructured", "4x1")  # 16x1 is illegal on 8 rows
    with pytest.raises(SpaceError, match=r"layer\.pattern"):
        space.architecture({"layer.density": 0.3, "layer.pattern": "2:4"})


def test_without_a_pattern_of_free_density_only_the_list_is_possible() -> None:
    space = Space(one_layer, "one", {"patterns": ("2:4",)})
    with pytest.raises(SpaceError, match=r"layer\.density.*expected one of"):
        space.architecture({"layer.density": 0.3, "layer.pattern": "2:4"})
    assert space.architecture({"layer.density": 0.5, "layer.pattern": "2:4"})["layer.density"] == 0.5


def test_an_overall_density_off_the_list_reaches_the_layers() -> None:
    space = Space(overall, "overall")
    given = space.architecture(
        {"width": 16, "sparsity.density": 0.375, "sparsity.pattern": "unstructured", "sparsity.rule": "uniform"}
    )
    assert [layer.density for _, layer in sparse_layers(space.meta(given))] == [0.375, 0.375]


@pytest.mark.parametrize(
    "space",
    [
        Space(overall, "overall"),
        Space(overall, "overall", {"densities": (0.2, 0.1)}),
        get_space("darts", channels=4, cells=3, input_shape=(3, 8, 8)),
        get_space("mlp", input_shape=(8,), widths=(8, 16), max_depth=2),
    ],
)
def test_children_of_a_given_density_are_of_the_offered_ones(space: Space) -> None:
    rng = random.Random(0)
    while True:
        parent = space.sample(rng)
        densities = [name for name in parent.as_dict() if name.endswith("density") and parent[name] != 1]
        if densities:
            break
    wanted = {**parent.as_dict(), **dict.fromkeys(densities, 0.123)}
    wanted |= {n.replace("density", "pattern"): "unstructured" for n in densities}
    for name in densities:
        if (rule := name.replace("density", "rule")) not in wanted and name == "sparsity.density":
            wanted[rule] = "erk"
    odd = space.architecture(wanted)
    assert odd.digest != parent.digest
    other = space.sample(rng)
    for child in [*(space.mutate(odd, rng) for _ in range(10)), *(space.crossover(odd, other, rng) for _ in range(10))]:
        assert 0.123 not in child.as_dict().values()
        assert space.architecture(child.as_dict()) == child
        assert all(value in space.offers(child)[name] for name, value in child.decisions)


def test_drawing_never_leaves_the_list_and_the_size_is_that_of_the_list() -> None:
    space = Space(overall, "overall")
    assert space.size() == 2 * 2 * 2 == len(list(space.enumerate()))
    assert {space.sample(seed)["sparsity.density"] for seed in range(20)} == {0.1}


def test_draw_takes_what_is_given_and_asks_for_the_rest() -> None:
    space = Space(overall, "overall")
    asked: list[str] = []

    def decide(name: str, options: tuple) -> object:
        asked.append(name)
        return options[-1]

    made = space.draw(decide, {"sparsity.density": 0.05})  # type: ignore[arg-type]
    assert made.as_dict() == {
        "width": 16,
        "sparsity.density": 0.05,
        "sparsity.pattern": "4x1",
        "sparsity.rule": "erk",
    }
    assert asked == ["width", "sparsity.pattern", "sparsity.rule"]


def test_a_given_density_on_the_list_is_the_same_architecture() -> None:
    space = Space(overall, "overall", {"densities": (0.2, 0.1)})
    drawn = space.sample(1)
    assert space.architecture(drawn.as_dict()) == drawn
    assert space.architecture(drawn.as_dict()).digest == drawn.digest


def test_building_a_given_density_twice_gives_the_same_network() -> None:
    space = Space(overall, "overall")
    given = space.draw(lambda _, options: options[0], {"sparsity.density": 0.33})
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(space.build(given).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
