"""dass2: what moves when, what is masked, who races, and what is handed out."""

from __future__ import annotations

import pytest
import torch

from nas.errors import ConfigError
from nas.oneshot.algorithm import At, Setting
from nas.oneshot.choices import OpChoice
from nas.oneshot.dass2 import Dass2
from nas.oneshot.dass2_options import Dass2Options
from ops.candidates import DARTS_PRIMITIVES
from ops.counting import count
from search_spaces import get_space

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(densities=(0.4, 0.2), patterns=("unstructured",), **options) -> Dass2:
    space = get_space(
        "darts",
        input_shape=SHAPE,
        classes=10,
        channels=4,
        cells=3,
        operations=("none", *DARTS_PRIMITIVES),
        densities=[*densities],
        patterns=[*patterns],
        sparse_depthwise=True,
    )
    settings = {"epochs": 4, "candidates": 2, "race_epochs": 1, "selection_rows": 16, "warmup": 0.5, "dense": 0.25}
    made = Dass2(Setting(space, SHAPE, 10, 0), Dass2Options(**(settings | options)))
    made.begin_phase(0, 2)
    made.compare_on([batch(7)])
    return made


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, *SHAPE, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def step(search: Dass2, epoch: int, number: int = 0) -> None:
    search.step(*batch(2 * epoch + number), lambda: batch(100 + 2 * epoch + number), At(0, epoch, 4, number, 2))


def race(search: Dass2) -> None:
    search.begin_phase(1, 2)
    epochs = search.phases()[1].epochs
    for epoch in range(epochs):
        for number in range(2):
            search.step(*batch(number), lambda: batch(9), At(1, epoch, epochs, number, 2))


def kept_of(search: Dass2, architecture) -> int:
    return sum(layer.nnz for layer in count(search.setting.space.meta(architecture), SHAPE).layers)


def test_architecture_parameters_rest_in_the_warm_up_and_move_after_it() -> None:
    search = small()
    before = search.alphas.state()
    step(search, 0)
    step(search, 1)
    assert all(torch.equal(search.alphas[name], value) for name, value in before.items())
    step(search, 2)
    assert any(not torch.equal(search.alphas[name], value) for name, value in before.items())


def test_only_the_densitys_own_and_the_shared_parameters_move() -> None:
    search = small()
    before = search.alphas.state()
    step(search, 2)
    other = next(f"@{d:g}" for d in search.densities if d != search.now)
    moved = {name for name, value in before.items() if not torch.equal(search.alphas[name], value)}
    assert not any(name.endswith(other) for name in moved)
    assert any(name.endswith(f"@{search.now:g}") for name in moved)
    assert any("@" not in name for name in moved)


def test_nothing_is_masked_in_the_dense_start_and_the_drawn_density_is_kept_after_it() -> None:
    search = small()
    step(search, 0)
    layers = search.supernet.structure({}).parts.layers
    assert all(layer.density == 1 for layer in layers.values())
    step(search, 3)
    kept = sum(int(layer.mask.sum()) for layer in layers.values())
    total = sum(layer.weight.numel() for layer in layers.values())
    assert total * search.now <= kept <= total * search.now + len(layers)


def test_masks_are_those_of_the_largest_weights_and_nest_over_densities() -> None:
    search = small()
    search.budget.refresh_scores()
    layers = search.supernet.structure({}).parts.layers
    masks = {}
    for density in (0.4, 0.2):
        search.budget.set_all({}, density)
        masks[density] = {path: layer.mask.clone() for path, layer in layers.items()}
    checked = 0
    for path, low in masks[0.2].items():
        assert bool((masks[0.4][path] | ~low).all())
        if not bool(low.all()):
            weight = layers[path].weight.abs()
            assert weight[low].min() >= weight[~low].max()
            checked += 1
    assert checked > 20


def test_the_extra_skip_counts_at_the_start_and_is_gone_at_the_end() -> None:
    search = small(skip_guard=0.8)
    name = next(n for n, c in search.searched.items() if isinstance(c, OpChoice))
    index = search.searched[name].options.index("skip_connect")
    step(search, 0)
    assert search.guard == pytest.approx(0.8)
    extra = (search.gates()[name].weights - search._probabilities(search.now)[name]).detach()
    assert extra[index].item() == pytest.approx(0.8)
    assert float(extra.sum()) == pytest.approx(0.8)
    search.guard = 0.0
    torch.testing.assert_close(search.gates()[name].weights, search._probabilities(search.now)[name])


def test_every_density_gets_one_architecture_on_its_budget() -> None:
    search = small()
    step(search, 0)
    race(search)
    found = search.found()
    assert [one.note["group"] for one in found] == ["0.4", "0.2"]
    for one in found:
        wanted = one.note["kept_wanted"]
        assert abs(kept_of(search, one.architecture) - wanted) <= 0.03 * wanted
        assert one.note["raced"] == 2
    assert found[0].note["kept_wanted"] > found[1].note["kept_wanted"]


def test_all_who_race_are_on_budget_and_the_winner_is_handed_out() -> None:
    search = small(candidates=3)
    race(search)
    for number, density in enumerate(search.densities):
        wanted = search.budget.usual_kept(density)
        for genes in search.entered[number].values():
            kept = kept_of(search, search._architecture(density, genes))
            assert abs(kept - wanted) <= 0.03 * wanted
        losses = search.races[number].losses
        assert search.races[number].winner == min(losses, key=losses.get)
        winner = search.entered[number][search.races[number].winner]
        assert search.found()[number].architecture == search._architecture(density, winner)


def test_candidates_start_with_the_weights_of_the_supernet() -> None:
    search = small()
    step(search, 0)
    search.begin_phase(1, 2)
    search._enter()
    genes = next(iter(search.entered[0].values()))
    built = search.supernet.extract(search._architecture(search.densities[0], genes))
    runner = next(iter(search.races[0].runners.values()))
    for (name, ours), theirs in zip(runner.network.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_without_a_race_the_most_probable_is_handed_out() -> None:
    search = small(race_epochs=0)
    assert len(search.phases()) == 1
    name = "normal.node0.from0.op"
    with torch.no_grad():
        search.alphas[name][3] = 5.0
        search.alphas["normal.node0.inputs"][0] = 5.0
    for one in search.found():
        assert one.architecture[name] == search.searched[name].options[3]


def test_at_equal_latency_every_path_costs_what_random_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    search = small(budget="latency", latency_weight=0.5)
    cost = {"none": 0.0, "skip_connect": 0.0, "max_pool_3x3": 1.0, "avg_pool_3x3": 1.0}

    class Table:
        """1 ms for the rest, 1 for a pool, 10 x density for anything else."""

        def of(self, values):
            return self

        def of_path(self, path, density):
            total = 1.0
            for name, gate in path.gates.items():
                choice = search.supernet.choices[name]
                if isinstance(choice, OpChoice):
                    total += cost.get(str(choice.options[gate.chosen[0]]), 10.0 * density)
            return total

    monkeypatch.setattr(search, "prices", Table())
    genes = search.paths.draw({}, torch.Generator().manual_seed(1))
    usual = search._usual(0.2)
    density = search._density_for(genes, usual)
    assert search._ms(genes, density) == pytest.approx(usual, rel=1e-3)
    assert search._density_for(genes, 0.5) is None
    assert "latency_wanted_ms" in search.found()[0].note


def test_latency_cannot_be_the_budget_where_parts_have_their_own_density() -> None:
    space = get_space("mlp", input_shape=SHAPE, classes=10)
    with pytest.raises(ConfigError, match="part by part"):
        Dass2(Setting(space, SHAPE, 10, 0), Dass2Options(budget="latency"))


def test_a_space_without_sparse_densities_is_refused() -> None:
    with pytest.raises(ConfigError, match="no density below 1"):
        small(densities=(1.0,))


def test_a_space_of_fixed_densities_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="fixed density"):
        small(densities=(1.0, 0.5), patterns=("2:4",))


@pytest.mark.parametrize("bad", [{"allocation": "erq"}, {"densities": [0.0]}, {"warmup": 2.0}, {"candidates": 0}])
def test_options_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Dass2Options(**bad)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"pattern": "foo"}, "pattern: .*foo"),
        ({"pattern": "2:4"}, "free density"),
        ({"densities": [0.2, 0.2000001]}, "different"),
        ({"warmup_epochs": 30}, "nothing would be searched"),
        ({"lr_min": 0.5}, "lr_min: expected at most"),
    ],
)
def test_options_that_would_be_found_out_late_or_never_are_refused_at_once(bad: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Dass2Options(**bad)


def test_the_log_of_the_race_is_about_the_candidate_that_ran() -> None:
    search = small()
    race(search)
    assert search.running is not None
    x, _ = batch(1)
    network = search.running.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(search.logits(x), network(x))
