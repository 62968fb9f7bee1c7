"""Controls of one-shot searches: matched, seeded like what they control, deterministic, and never left out in silence."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from nas.oneshot.controls import TRIES, FoundTrial, control_proposals, kept_by
from nas.searchers.base import Proposal
from ops.counting import total_kept_weights
from search_spaces import Architecture, Chooser, Space, get_space

torch.set_num_threads(1)

DARTS = get_space(
    "darts", channels=4, cells=1, input_shape=(1, 8, 8), sparse_depthwise=True, patterns=("unstructured",)
)
MLP = get_space("mlp", input_shape=(30,), widths=(16, 32), max_depth=2, patterns=("unstructured", "4x1"))
CONVNET = get_space("convnet", input_shape=(1, 8, 8), stages=1, widths=(8, 12), stem=4, depthwise=True)


def towers(c: Chooser) -> nn.Module:
    """A space with one overall density that is quick to build: three layers, each a choice."""
    ops = {
        "narrow_conv": lambda: nn.Conv2d(16, 16, 1, groups=2),
        "wide_conv": lambda: nn.Conv2d(16, 16, 3),
        "skip": nn.Identity,
    }
    network = nn.Sequential(*(c.op(f"layer{i}.op", ops) for i in range(3)), nn.Conv2d(16, 16, 3))
    return c.allocate("sparsity", network, (1.0, 0.5), ("erk", "uniform"))


TOWERS = Space(towers, "towers")


def dense_of(space: Space, seed: int) -> Architecture:
    """A dense architecture, as a dense search finds them."""

    def decide(name: str, options: tuple) -> object:
        convolutions = [o for o in options if "conv" in str(o)] or list(options)
        return 1.0 if name.endswith("density") else convolutions[(seed * 7 + len(name)) % len(convolutions)]

    return space.draw(decide)  # type: ignore[arg-type]


def sparse(space: Space, seed: int, density: float) -> Architecture:
    drawn = space.sample(seed)
    given = {name: density for name in drawn.as_dict() if name.endswith("density")}
    mine = drawn.as_dict()
    return space.draw(lambda n, options: mine[n] if mine.get(n) in options else options[-1], given)


def found_of(space: Space, density: float = 0.1) -> dict[str, list[FoundTrial]]:
    return {
        "dass": [FoundTrial(r, 100 + r, sparse(space, r, density), {"density": density}) for r in range(2)],
        "mine": [FoundTrial(0, 100, sparse(space, 9, density))],
    }


def dense_for(space: Space) -> dict[str, list[FoundTrial]]:
    return {name: [FoundTrial(r, 100 + r, dense_of(space, r)) for r in range(2)] for name in ("dass", "mine")}


@pytest.mark.parametrize("space", [DARTS, MLP, CONVNET], ids=lambda space: space.name)
def test_controls_keep_as_many_weights_and_train_with_the_same_seed(space: Space) -> None:
    found = found_of(space) if space is not DARTS else {"dass": found_of(space)["dass"][:1]}
    count = 1 if space is DARTS else 2
    said: list[str] = []
    made = control_proposals(space, found, dense_for(space), seed=5, count=count, tolerance=0.03, message=said.append)
    wanted = {
        f"{searcher}/{kind}": count if kind == "random" else 1
        for searcher in found
        for kind in ("random", "dense", *(other for other in found if other != searcher))
    }
    assert set(made) <= set(wanted)
    for name, each in wanted.items():
        searcher, _, kind = name.partition("/")
        why = "no random control" if kind == "random" else f"no control from the {kind} search"
        left_out = sum(text.startswith(f"{searcher},") and why in text for text in said)
        assert len(made.get(name, [])) + left_out == each * len(found[searcher])
    for name, proposals in made.items():
        searcher, _, kind = name.partition("/")
        for proposal in proposals:
            own = found[searcher][proposal.sampler["found_index"]]
            kept = total_kept_weights(space.meta(proposal.architecture))
            assert proposal.sampler["kept_wanted"] == kept_by(space, own)
            assert abs(kept - kept_by(space, own)) <= 0.03 * kept_by(space, own)
            assert (proposal.seed, proposal.sampler["replicate"]) == (own.seed, own.replicate)
            assert proposal.sampler["control_of"] == searcher
            assert proposal.sampler.get("group") == own.note.get("density")
            assert json.loads(json.dumps(proposal.sampler)) == proposal.sampler
            assert space.architecture(proposal.architecture.as_dict()) == proposal.architecture
    assert any(made.values())


def test_the_dense_control_has_the_cells_of_the_dense_search_of_its_replicate() -> None:
    dense = dense_for(TOWERS)
    made = control_proposals(TOWERS, found_of(TOWERS), dense, seed=0)
    for proposal in made["dass/dense"]:
        theirs = dense["dass"][proposal.sampler["replicate"]].architecture.as_dict()
        cells = {n: v for n, v in proposal.architecture.decisions if not n.startswith("sparsity")}
        assert cells == {n: v for n, v in theirs.items() if not n.startswith("sparsity")}
        own = found_of(TOWERS)["dass"][proposal.sampler["found_index"]].architecture
        assert proposal.architecture["sparsity.rule"] == own["sparsity.rule"]
    assert len(made["dass/dense"]) == 2


def test_equal_arguments_give_equal_controls_and_another_seed_others() -> None:
    first, again, other = (
        control_proposals(TOWERS, found_of(TOWERS), dense_for(TOWERS), seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert [p.architecture for p in first["dass/random"]] != [p.architecture for p in other["dass/random"]]
    assert first["dass/dense"] == other["dass/dense"]


def test_controls_of_one_searcher_do_not_depend_on_the_others() -> None:
    found = found_of(TOWERS)
    alone = control_proposals(TOWERS, {"mine": found["mine"]}, dense_for(TOWERS), seed=1)
    together = control_proposals(TOWERS, found, dense_for(TOWERS), seed=1)
    assert alone["mine/random"] == together["mine/random"]


def test_what_cannot_be_matched_is_left_out_with_a_message() -> None:
    trial = FoundTrial(0, 0, sparse(MLP, 0, 0.3), {"kept_weights": 10_000_000})
    said: list[str] = []
    made = control_proposals(MLP, {"dass": [trial]}, {}, seed=0, message=said.append)
    assert made == {"dass/random": [], "dass/dense": []}
    assert f"none of {TRIES} random architectures can keep 10,000,000 weights" in said[0]
    assert "dass, replicate 0, architecture 0: no control from the dense search" in said[1]


def test_without_somebody_to_tell_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        control_proposals(MLP, {"dass": [FoundTrial(3, 0, sparse(MLP, 0, 0.5))]}, {}, seed=0)
    assert "dass, replicate 3" in caplog.text


def test_random_controls_that_cannot_be_matched_are_drawn_again() -> None:
    """Most random networks of this space are too small for the found one: the largest is 30 x 32 + 32 x 32 + 32 x 10."""
    big = MLP.architecture(
        {
            "depth": 2,
            **{"layer0.width": 32, "layer0.density": 1.0},
            **{"layer1.width": 32, "layer1.density": 0.9, "layer1.pattern": "unstructured"},
        }
    )
    made = control_proposals(MLP, {"dass": [FoundTrial(0, 0, big)]}, {"dass": []}, seed=3, message=lambda _: None)
    (proposal,) = made["dass/random"]
    assert isinstance(proposal, Proposal)
    assert proposal.architecture["depth"] == 2


def test_searches_of_one_run_are_controls_of_each_other_at_the_nearest_density() -> None:
    space = DARTS
    mine, high, low = (sparse(space, seed, density) for seed, density in ((1, 0.2), (2, 0.4), (3, 0.15)))
    found = {
        "dass": [FoundTrial(0, 5, mine, {"density": 0.2})],
        "dass2": [FoundTrial(0, 5, high, {"density": 0.4}), FoundTrial(0, 5, low, {"density": 0.15})],
    }
    made = control_proposals(space, found, {}, seed=0, message=lambda _: None)
    (against,) = made["dass/dass2"]
    wanted = kept_by(space, found["dass"][0])
    cells = {name: value for name, value in low.decisions if not name.startswith("sparsity.")}
    assert {name: against.architecture[name] for name in cells} == cells
    assert against.seed == 5
    assert against.sampler["control_of"] == "dass"
    kept = total_kept_weights(space.meta(against.architecture))
    assert abs(kept - wanted) <= 0.02 * wanted
    assert len(made["dass2/dass"]) == 2


def test_a_control_that_is_the_found_network_again_becomes_its_copy() -> None:
    found = sparse(DARTS, 1, 0.2)
    same = FoundTrial(0, 5, sparse(DARTS, 1, 0.9))
    made = control_proposals(
        DARTS, {"dass": [FoundTrial(0, 5, found, {"density": 0.2})]}, {"dass": [same]}, seed=0, message=lambda _: None
    )
    assert made["dass/dense"][0].architecture.digest == found.digest
