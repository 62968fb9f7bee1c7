"""DASS as it is told: spaces, densities, patterns, rules, exemptions, epochs; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import nn

from nas.errors import ConfigError
from nas.oneshot.algorithm import At
from nas.oneshot.dass_options import DassOptions, shared_out
from ops.layers import is_depthwise
from ops.masks import zero_count
from search_spaces import Space, get_space
from tests.nas.dass_steps import SHORT, STEPS, batch, learned, make, moved, run, run_phase, spaces, weights
from tests.nas.little_spaces import little_space

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["little", "convnet", "mlp"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_space_runs_through_all_phases_and_hands_out_its_density(name, allocation):
    space, shape = spaces()[name]
    algorithm = make(space, shape, **SHORT, order=2, density=0.2, allocation=allocation)
    run(algorithm, shape)
    (found,) = algorithm.found()
    decisions = found.architecture.as_dict()
    densities = {value for key, value in decisions.items() if key.endswith(".density")}
    assert densities == {0.2}
    assert found.note["density"] == 0.2
    assert found.note["allocation"] == allocation
    assert found.note["phases"] == {"pretrain": 1, "prune": 1, "finetune": 1}
    assert space.architecture(decisions) == found.architecture
    assert (
        sum(layer.density == 0.2 for layer in space.build(found.architecture).modules() if hasattr(layer, "density"))
        > 0
    )
    row = algorithm.log_row()
    assert row["kept_weights"] > 0
    assert set(row["alphas"]) == set(algorithm.alphas)


def test_a_global_ranking_follows_the_scores_in_every_step():
    algorithm = make(**SHORT, order=1, density=0.2, allocation="global", score_lr=1.0)
    run_phase(algorithm, 0)
    algorithm.begin_phase(1, STEPS)
    seen = set()
    for step in range(3):
        algorithm.step(*batch(step), lambda: batch(9), At(1, 0, 1, 0, STEPS))
        algorithm.logits(batch(0)[0])
        layers = learned(algorithm)
        total = sum(layer.weight.numel() for layer in layers.values())
        assert sum(layer.nnz for layer in layers.values()) == total - zero_count(total, 0.2)
        densities = tuple(layer.density for layer in layers.values())
        parts = algorithm.supernet.structure({}).parts
        assert parts is not None
        assert tuple(parts.set_all(0.2, "global", "unstructured").values()) == densities
        seen.add(densities)
    assert len(seen) > 1


def test_exempt_layers_stay_dense_and_their_scores_rest():
    algorithm = make(**SHORT, order=1, density=0.1, exempt=("stem", "depthwise"))
    run_phase(algorithm, 0)
    algorithm.begin_phase(1, STEPS)
    before = weights(algorithm)
    run_phase(algorithm, 1, begin=False)
    changed = moved(before, weights(algorithm))
    for path, layer in learned(algorithm).items():
        exempt = path.startswith("stem") or is_depthwise(layer)
        assert layer.density == (1.0 if exempt else 0.1)
        key = next(k for k, p in algorithm.supernet.scores().items() if p is layer.score)
        assert (key in changed) != exempt
    assert algorithm.found()[0].note["exempt"] == ["stem", "depthwise"]


def test_a_pattern_of_one_density_is_searched_and_found_at_it():
    space = little_space(patterns=("unstructured", "2:4"))
    algorithm = make(space, **SHORT, order=1, pattern="2:4")
    assert algorithm.density == 0.5
    run(algorithm)
    following = [layer for layer in learned(algorithm).values() if layer.density < 1]
    assert following
    for layer in following:
        groups = layer.mask.movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
    decisions = algorithm.found()[0].architecture.as_dict()
    assert (decisions["sparsity.density"], decisions["sparsity.pattern"]) == (0.5, "2:4")


def test_blocks_leave_what_they_do_not_fit_dense():
    space = little_space(patterns=("4x1",), densities=(1.0, 0.25))
    algorithm = make(space, **SHORT, order=1)
    assert (algorithm.density, algorithm.pattern) == (0.25, "4x1")
    run_phase(algorithm, 0)
    run_phase(algorithm, 1)
    densities = {is_depthwise(layer): layer.density for p, layer in learned(algorithm).items() if p != "classifier"}
    assert densities == {True: 1.0, False: 0.25}


# -- what is asked for ---------------------------------------------------------------------------------------------------


def test_the_default_density_is_the_lowest_offered_below_1_with_a_pattern_that_can_have_it():
    assert make().density == 0.1
    assert make(little_space(densities=(0.5, 1.0, 0.25))).density == 0.25
    offered = little_space(densities=(1.0, 0.5, 0.1), patterns=("2:4", "channel", "unstructured"))
    assert (make(offered).density, make(offered).pattern) == (0.1, "channel")
    assert make(offered, density=0.03).pattern == "channel"
    assert make(offered, density=0.5).pattern == "2:4"
    assert make(offered, density=0.5, pattern="unstructured").pattern == "unstructured"


def test_rules_that_the_space_does_not_have_are_replaced_by_its_first():
    assert make(allocation="erk").found()[0].architecture["sparsity.rule"] == "erk"
    assert make(allocation="global").found()[0].architecture["sparsity.rule"] == "uniform"
    only = make(little_space(rules=("erk",)))
    assert only.found()[0].architecture["sparsity.rule"] == "erk"
    assert only.found()[0].note["rule"] == "erk"


def test_parts_that_cannot_have_the_density_get_the_nearest_offered():
    def space(c):
        body = c.op("body", {"one": nn.Identity, "other": nn.Identity})
        first = c.sparse("first", nn.Linear(6, 8), (1.0, 0.5, 0.25), ("4x1",))
        return nn.Sequential(body, first, nn.ReLU(), c.sparse("second", nn.Linear(8, 3), (1.0, 0.5)))

    algorithm = make(Space(space, "mixed"), (6,), density=0.3, pattern="unstructured")
    decisions = algorithm.found()[0].architecture.as_dict()
    assert decisions["first.density"] == 0.25
    assert decisions["second.density"] == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(little_space(densities=(1.0,))), "offers no density below 1; offer some"),
        (lambda: make(little_space(densities=(0.5, 0.1)), density=1.0), "density 1 with pattern .* is not possible"),
        (lambda: make(density=0.3, pattern="2:4"), "pattern 2:4 has density 0.5, got density 0.3"),
        (lambda: make(pattern="2:4"), "is not possible in space"),
        (lambda: make(density=1e-7, allocation="global"), "is not possible in space"),
        (lambda: make(little_space(dense=("stem", "nodes")), exempt=("classifier",)), "no layer is left"),
        (lambda: make(get_space("darts", channels=4, cells=3), density=0.0), "density: expected a number > 0"),
        (lambda: make(density=1.5), "density: expected a number"),
        (lambda: make(pattern="3x"), "pattern: "),
        (lambda: make(allocation="erc"), "allocation: expected one of"),
        (lambda: make(exempt=("head",)), "exempt: expected one of"),
        (lambda: make(exempt="stem"), "exempt: expected a list"),
        (lambda: make(score_init="zeros"), "score_init: expected one of"),
        (lambda: make(prune_epochs=-1), "prune_epochs: expected a whole number"),
        (lambda: make(epochs=3, prune_epochs=3), "epochs: expected at least 5"),
        (lambda: make(pretrain_epochs=0, prune_epochs=0, finetune_epochs=0), "at least one epoch"),
        (lambda: make(one_step=True, prune_epochs=3), "prune_epochs: with one_step"),
    ],
)
def test_what_is_not_possible_is_an_error_before_anything_is_trained(build: Callable[[], object], message: str):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_space_that_decides_no_sparsity_is_an_error():
    def space(c):
        return nn.Sequential(c.op("body", {"one": nn.Identity, "other": nn.Identity}), nn.Linear(6, 3))

    with pytest.raises(ConfigError, match=r"no layer that may be sparse; .*Chooser\.allocate"):
        make(Space(space, "plain"), (6,))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (100, 50, 100)),
        ({"epochs": 5}, (2, 1, 2)),
        ({"epochs": 3}, (1, 1, 1)),
        ({"epochs": 4}, (2, 1, 1)),
        ({"epochs": 120}, (48, 24, 48)),
        ({"epochs": 120, "prune_epochs": 20}, (50, 20, 50)),
        ({"epochs": 10, "pretrain_epochs": 4}, (4, 2, 4)),
        ({"epochs": 7, "pretrain_epochs": 0}, (0, 2, 5)),
        ({"pretrain_epochs": 3, "prune_epochs": 0, "finetune_epochs": 1}, (3, 0, 1)),
    ],
)
def test_phases_share_the_epochs(given, expected):
    options = DassOptions(**given)
    own = (options.pretrain_epochs, options.prune_epochs, options.finetune_epochs)
    assert own == expected
    assert options.epochs == sum(expected)
    assert DassOptions(**asdict(options)) == options, "written down and read again it is the same"


def test_shares_are_whole_at_least_1_and_sum_up():
    shares = {"a": 2, "b": 1, "c": 2}
    for total in range(3, 60):
        got = shared_out(total, shares)
        assert sum(got.values()) == total
        assert min(got.values()) >= 1
        assert all(abs(got[name] - total * share / 5) < 1 for name, share in shares.items())


def test_learning_rates_of_the_phases():
    algorithm = make(pretrain_epochs=4, prune_epochs=2, finetune_epochs=4)
    rates = []
    for phase, epochs in ((0, 4), (1, 2), (2, 4)):
        algorithm.begin_phase(phase, 1)
        assert algorithm.weight_optimizer is not None
        rates.append([round(algorithm.learning_rate(At(phase, epoch, epochs, 0, 1)), 6) for epoch in range(epochs)])
        algorithm.step(*batch(0), lambda: batch(1), At(phase, epochs - 1, epochs, 0, 1))
        assert algorithm.weight_optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1][-1], abs=1e-6)
    assert [r[0] for r in rates] == [0.025, 0.1, 0.025]
    assert rates[0] == rates[2]
    assert rates[0][2] == pytest.approx((0.025 + 0.001) / 2)
    assert rates[1][1] == pytest.approx((0.1 + 0.001) / 2)
