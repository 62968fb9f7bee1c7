"""Matching kept weights and latency: exact, monotone, and clear where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.oneshot.matching import MatchError, Scaled, match, match_latency
from ops.counting import count, total_kept_weights
from search_spaces import Architecture, Chooser, Space, get_space

torch.set_num_threads(1)

SPACES = [
    get_space("darts", channels=4, cells=1, input_shape=(1, 8, 8), sparse_depthwise=True, densities=(0.05,)),
    get_space("darts", channels=4, cells=1, input_shape=(1, 8, 8), sparse_depthwise=True),
    get_space("nasbench201", channels=4, cells=1, input_shape=(1, 8, 8)),
    get_space("convnet", input_shape=(1, 8, 8), stages=2, widths=(8, 12), stem=4, depthwise=True),
    get_space("mlp", input_shape=(30,), widths=(16, 32)),
]


def kept(space: Space, architecture: Architecture) -> int:
    return total_kept_weights(space.meta(architecture))


def two_layers(c: Chooser, *, densities: tuple[float, ...] = (1.0, 0.5)) -> nn.Module:
    c.choice("colour", ["red", "blue"])
    first = c.sparse("first", nn.Linear(10, 10, bias=False), densities)
    return nn.Sequential(first, c.sparse("second", nn.Linear(10, 20, bias=False), densities))


def whole(c: Chooser, *, patterns: tuple[str, ...] = ("2:4", "unstructured"), rule: str = "uniform") -> nn.Module:
    network = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False))
    return c.allocate("sparsity", network, (1.0, 0.5), (rule, "erk"), patterns)


def test_parts_are_scaled_by_one_factor_and_capped_at_one() -> None:
    space = Space(two_layers, "two", {"densities": (1.0, 0.5, 0.125)})
    start = space.architecture(
        {
            "colour": "blue",
            "first.density": 0.125,
            "first.pattern": "unstructured",
            "second.density": 0.5,
            "second.pattern": "unstructured",
        }
    )
    half = match(
        space, start, kept_weights=56, tolerance=0
    )  # half of both: 6.25 -> 7 (an eighth is 13 of 100), 25 % of 200
    assert half["second.density"] == pytest.approx(4 * half["first.density"])  # type: ignore[operator]
    assert half["colour"] == "blue"
    capped = match(space, start, kept_weights=250, tolerance=0)
    assert (capped["first.density"], capped["second.density"]) == (pytest.approx(0.5, abs=0.01), 1.0)
    assert kept(space, match(space, start, kept_weights=300)) == 300


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_the_match_is_as_close_as_any_density(space: Space) -> None:
    """Against a slow twin that tries every density of a fine grid; and a network's counts are those that training will have."""
    checked = 0
    for seed in range(3):
        architecture = space.sample(seed)
        scaled = Scaled(space, architecture)
        full, least = kept(space, scaled.at(1.0)), kept(space, scaled.at(1e-9))
        wanted = least + (full - least) // 3
        try:
            found = match(space, architecture, kept_weights=wanted)
        except MatchError:
            continue
        checked += 1
        grid = [kept(space, scaled.at(i / 20)) for i in range(1, 21)]
        assert abs(kept(space, found) - wanted) <= min(0.02 * wanted, *(abs(k - wanted) for k in grid))
        assert space.architecture(found.as_dict()) == found
        shape = space.options["input_shape"]
        assert count(space.build(found), shape).kept_weights == kept(space, found)
    assert checked


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_more_density_never_keeps_fewer_weights(space: Space) -> None:
    scaled = Scaled(space, space.sample(1))
    counts = [kept(space, scaled.at(t)) for t in (1e-9, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)]
    assert counts == sorted(counts)


def test_everything_but_sparsity_stays_and_the_same_is_found_again() -> None:
    space = SPACES[1]
    architecture = space.sample(3)
    wanted = kept(space, Scaled(space, architecture).at(0.6))
    found = match(space, architecture, kept_weights=wanted)
    cells = {name: value for name, value in architecture.decisions if not name.startswith("sparsity")}
    assert {name: value for name, value in found.decisions if not name.startswith("sparsity")} == cells
    assert match(space, architecture, kept_weights=wanted) == found
    assert match(space, found, kept_weights=kept(space, found)).digest == found.digest


def test_a_pattern_of_fixed_density_gives_way() -> None:
    space = Space(whole, "whole")
    start = space.architecture({"sparsity.density": 0.5, "sparsity.pattern": "2:4"})
    found = match(space, start, kept_weights=80)
    assert found["sparsity.pattern"] == "unstructured"
    assert kept(space, found) == 80
    at_its_density = match(space, start, kept_weights=160)
    assert (at_its_density["sparsity.density"], at_its_density["sparsity.pattern"]) == (0.5, "unstructured")


def test_patterns_and_rules_are_taken_from_another_architecture() -> None:
    space = Space(whole, "whole", {"patterns": ("unstructured", "4x1")})
    dense = space.architecture({"sparsity.density": 1.0})
    like = space.architecture({"sparsity.density": 0.5, "sparsity.pattern": "4x1", "sparsity.rule": "erk"})
    found = match(space, dense, kept_weights=80, like=like)
    assert (found["sparsity.pattern"], found["sparsity.rule"]) == ("4x1", "erk")
    assert match(space, dense, kept_weights=80)["sparsity.pattern"] == "unstructured"


def test_a_part_the_other_does_not_have_takes_its_usual_pattern() -> None:
    space = get_space("mlp", input_shape=(32,), widths=(32,), max_depth=2)
    shallow = space.architecture({"depth": 1, "layer0.width": 32, "layer0.density": 0.5, "layer0.pattern": "4x1"})
    deep = space.architecture(
        {"depth": 2, "layer0.width": 32, "layer0.density": 1.0, "layer1.width": 32, "layer1.density": 1.0}
    )
    found = match(space, deep, kept_weights=1300, like=shallow)
    assert (found["layer0.pattern"], found["layer1.pattern"]) == ("4x1", "4x1")


def test_what_cannot_be_matched_says_what_there_is() -> None:
    space = Space(two_layers, "two")
    architecture = space.sample(0)
    with pytest.raises(MatchError, match=r"expected 400 kept weights, but it has 300 even at density 1"):
        match(space, architecture, kept_weights=400)
    with pytest.raises(MatchError, match=r"expected 1 kept weights, but it has 2 at the lowest density"):
        match(space, architecture, kept_weights=1)
    even = Space(whole, "whole", {"patterns": ("4x1",)})
    with pytest.raises(MatchError, match=r"closest it can have is \d+; allow a larger tolerance"):
        match(even, even.architecture({"sparsity.density": 1.0}), kept_weights=82, tolerance=0.001)
    bare = Space(lambda c: nn.Linear(c.choice("n", [2, 3]), 2), "bare")
    with pytest.raises(MatchError, match="decides no density"):
        match(bare, bare.sample(0), kept_weights=4)
    with pytest.raises(ValueError, match="kept_weights >= 1"):
        match(space, architecture, kept_weights=0)
    with pytest.raises(ValueError, match="tolerance"):
        match(space, architecture, kept_weights=10, tolerance=1.0)


def price(network: nn.Module) -> float:
    return 0.1 + total_kept_weights(network) / 1000


def test_a_latency_is_matched_through_its_price() -> None:
    space = SPACES[3]
    scaled = Scaled(space, space.sample(2))
    low, high = price(space.build(scaled.at(1e-9))), price(space.build(scaled.at(1.0)))
    wanted = (2 * low + high) / 3
    state = torch.get_rng_state()
    found = match_latency(space, scaled.architecture, wanted, price, tolerance=0.03)
    assert torch.equal(torch.get_rng_state(), state)
    assert price(space.build(found)) == pytest.approx(wanted, rel=0.03)
    with pytest.raises(MatchError, match=r"ms, but it has .* even at density 1"):
        match_latency(space, scaled.architecture, 2 * high, price)
    with pytest.raises(MatchError, match="at the lowest density"):
        match_latency(space, scaled.architecture, 0.05, price)
    with pytest.raises(ValueError, match="latency_ms"):
        match_latency(space, scaled.architecture, float("nan"), price)


@pytest.mark.parametrize(("wanted", "nearest"), [(80, 80), (81, 80), (83, 84)])
def test_between_two_counts_the_nearer_is_taken(wanted: int, nearest: int) -> None:
    def one(c: Chooser) -> nn.Module:
        return c.sparse("layer", nn.Linear(16, 16, bias=False), (1.0, 0.5), ("4x1",))  # blocks: kept by fours

    space = Space(one, "one")
    assert kept(space, match(space, space.sample(0), kept_weights=wanted)) == nearest
