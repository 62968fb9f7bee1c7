"""The race of candidates: who runs when, who is dropped, what is pruned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from nas.oneshot.race import Leg, Race, Runner, schedule
from ops.layers import SparseLinear, sparse_layers
from ops.masks import kept_count


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(width: int = 16, density: float = 0.25, seed: int = 0, pattern: str = "unstructured") -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(SparseLinear(8, width, density=density, pattern=pattern), nn.ReLU(), nn.Linear(width, 2))


def batch(seed: int = 0, rows: int = 64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator)
    return x, (x[:, 0] > 0).long()


def run(race: Race, candidates: int, epochs: int = 1, steps: int = 6) -> None:
    for leg in schedule(candidates, epochs):
        for step in range(steps):
            race.run(leg, *batch(leg.epoch * steps + step), step=step, steps=steps, lr=0.01)
        if leg.last:
            race.finish(leg, [batch(999, 256)])


@pytest.mark.parametrize(("candidates", "turns"), [(1, 1), (2, 2), (3, 3), (4, 4 + 2), (8, 8 + 4 + 2), (7, 7 + 3)])
def test_the_schedule_halves_the_field(candidates: int, turns: int) -> None:
    legs = schedule(candidates, 3)
    assert len(legs) == 3 * turns
    assert sum(leg.last for leg in legs) == turns
    for number in range(max(leg.round for leg in legs) + 1):
        places = {leg.place for leg in legs if leg.round == number}
        assert places == set(range(candidates >> number))


def test_the_better_half_stays_and_the_best_wins() -> None:
    runners = {str(i): Runner(network(seed=i), 0.01, 0.0) for i in range(4)}
    race = Race(runners, {}, [])
    quality = {"0": 3.0, "1": 1.0, "2": 4.0, "3": 2.0}
    for key, runner in runners.items():
        runner.judge = lambda rows, key=key: quality[key]
    for leg in schedule(4, 1):
        if leg.round == 1:
            assert list(race.runners) == ["1", "3"]
        race.finish(leg, [])
    assert race.winner == "1"
    assert race.losses == quality


def test_a_candidate_that_diverges_loses() -> None:
    race = Race({str(i): Runner(network(seed=i), 0.01, 0.0) for i in range(2)}, {}, [])
    with torch.no_grad():
        race.runners["0"].network[2].weight.fill_(float("nan"))
    for leg in schedule(2, 1):
        race.finish(leg, [batch()])
    assert race.winner == "1"


@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_masks_are_exact_after_the_first_leg_and_do_not_change_then(pattern: str) -> None:
    race = Race({str(i): Runner(network(seed=i, pattern=pattern), 0.01, 0.0) for i in range(4)}, {}, [])
    legs = schedule(4, 2)
    masks = {}
    for leg in legs:
        for step in range(5):
            race.run(leg, *batch(step), step=step, steps=5, lr=0.01)
        key = list(race.runners)[leg.place]
        ((_, layer),) = sparse_layers(race.runners[key].network)
        if leg.round == 0 and leg.last:
            assert layer.nnz == kept_count(layer.weight.shape, 0.25, pattern)
            masks[key] = layer.mask.clone()
        if leg.round == 1:
            assert torch.equal(layer.mask, masks[key])
        assert not bool(layer.weight[~layer.mask].any())
        if leg.last:
            race.finish(leg, [batch(99)])


def test_masks_close_little_by_little_and_what_is_pruned_stays_pruned() -> None:
    runner = Runner(network(), 0.01, 0.0)
    race = Race({"only": runner}, {}, [])
    ((_, layer),) = sparse_layers(runner.network)
    kept = [layer.mask.clone()]
    for step in range(30):
        race.run(Leg(0, 0, 0, 1), *batch(step), step=step, steps=30, lr=0.01)
        kept.append(layer.mask.clone())
    counts = [int(mask.sum()) for mask in kept]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 4
    assert all(bool((before | ~after).all()) for before, after in pairwise(kept))


def test_an_interrupted_race_ends_as_an_uninterrupted_one() -> None:
    def fresh() -> Race:
        return Race({str(i): Runner(network(seed=i), 0.01, 0.01) for i in range(4)}, {}, [])

    whole, first = fresh(), fresh()
    run(whole, 4, epochs=2)
    legs = schedule(4, 2)
    for number, leg in enumerate(legs):
        if number == 9:  # killed and made again
            states = {key: runner.state() for key, runner in first.runners.items()}
            states = {key: {n: t.clone() for n, t in state.items()} for key, state in states.items()}
            facts = first.facts()
            again = {key: Runner(network(seed=int(key)), 0.01, 0.01) for key in facts["runners"]}
            for key, runner in again.items():
                runner.load(states[key])
            first = Race(again, dict(facts["losses"]), list(facts["judged"]))
        for step in range(6):
            first.run(leg, *batch(leg.epoch * 6 + step), step=step, steps=6, lr=0.01)
        if leg.last:
            first.finish(leg, [batch(999, 256)])
    assert first.losses == whole.losses
    assert first.winner == whole.winner


def test_a_candidate_that_cannot_learn_loses() -> None:
    good, bad = network(16, 0.5), network(16, 0.5, seed=1)
    with torch.no_grad():
        bad[0].weight.zero_()
        bad[0].bias.zero_()
        bad[0].weight.requires_grad_(False)
        bad[0].bias.requires_grad_(False)
    race = Race({"bad": Runner(bad, 0.01, 0.0), "good": Runner(good, 0.01, 0.0)}, {}, [])
    run(race, 2, epochs=4)
    assert race.winner == "good"
