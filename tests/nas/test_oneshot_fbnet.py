"""FBNet: mixtures, schedules, the loss, what is handed out, latencies in the state; and random search with weight sharing."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nas.errors import ConfigError, EvaluationFailed
from nas.oneshot.algorithm import At
from nas.oneshot.fbnet import FBNetOptions
from nas.oneshot.pcdarts import warmup_of
from nas.oneshot.random_shared import RandomSharedOptions
from tests.nas.oneshot_tiny import STEPS, ByWork, Drive, batch, snapshot, tiny, tiny_space

torch.set_num_threads(1)

AT = At(0, 1, 2, 0, STEPS)


# -- FBNet ------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    o = FBNetOptions()
    assert (o.epochs, o.batch_size, o.lr, o.lr_min, o.momentum, o.weight_decay) == (90, 192, 0.1, 0.0, 0.9, 1e-4)
    assert (o.alpha_lr, o.alpha_weight_decay, o.latency_alpha, o.latency_beta) == (0.01, 5e-4, 0.2, 0.6)
    assert warmup_of(o.warmup_share, o.epochs) == 10
    assert (o.tau, o.tau_decay, o.weight_share) == (5.0, 0.045, 0.8)


def test_architecture_parameters_begin_equal() -> None:
    made = tiny("fbnet", tiny_space("nasbench201"))
    assert all(bool((alpha == 0).all()) for alpha in made.alphas.tensors())


def test_the_temperature_falls_exponentially() -> None:
    made = tiny("fbnet", tiny_space("nasbench201"))
    for epoch in (0, 1, 60):
        assert made.temperature(At(0, epoch, 90, 0, 10)) == pytest.approx(5.0 * math.exp(-0.045 * epoch))


@pytest.mark.parametrize(
    ("steps", "share", "turns"), [(100, 0.8, 25), (4, 0.8, 1), (2, 0.8, 1), (10, 0.5, 10), (1, 0.8, 1)]
)
def test_weights_get_their_share_of_the_steps(steps: int, share: float, turns: int) -> None:
    made = tiny("fbnet", tiny_space("nasbench201"), weight_share=share, epochs=9)
    moves = [[made.trains_alphas(At(0, epoch, 9, step, steps)) for step in range(steps)] for epoch in (0, 1)]
    assert sum(moves[0]) == 0
    assert sum(moves[1]) == turns
    gaps = [step for step, moved in enumerate(moves[1]) if moved]
    assert max((b - a for a, b in itertools.pairwise(gaps)), default=0) <= -(-steps // turns)  # evenly


def test_the_architecture_loss_is_cross_entropy_times_the_latency_factor_of_the_same_draw() -> None:
    made = tiny("fbnet", tiny_space("nasbench201"), latency_alpha=0.3, latency_beta=0.7)
    with torch.no_grad():
        for i, alpha in enumerate(made.alphas.tensors()):
            alpha.copy_(torch.linspace(-1, 1, len(alpha)) * (i % 3))
    x, y = batch(0)
    state = made.generator.get_state()
    found = made.architecture_loss(x, y, AT)
    made.generator.set_state(state)
    gates = made.gates()
    cross_entropy = F.cross_entropy(made.supernet(x, gates), y)
    priced = made.prices.of()
    ms = sum(
        float(gate.weights[c].detach()) * sum(float(priced.grids[name].predict(d)[c]) for d in made.densities)
        for name, gate in gates.items()
        for c in range(len(gate.weights))
    )
    ms = (ms + sum(float(priced.rest.predict(d)[0]) for d in made.densities)) / len(made.densities)
    factor = 0.3 * math.log(1000 * ms) ** 0.7
    assert float(found.detach()) == pytest.approx(float(cross_entropy.detach()) * factor, rel=1e-4)
    assert made.latency_ms == pytest.approx(ms, rel=1e-5)


def test_a_slow_candidate_becomes_less_probable_than_its_equal() -> None:
    """The gradient of the latency factor alone: with a constant cross-entropy only speed counts."""
    made = tiny("fbnet", tiny_space("nasbench201"))
    made.loss = lambda x, y: (torch.tensor(1.0) + 0 * sum(p.sum() for p in made.gates_sum()), None)
    made.gates_sum = lambda: [gate.weights for gate in made.gates().values()]
    made.architecture_step(*batch(0), *batch(0, 1), AT)
    name = "node1.from0"
    skip, conv3 = (made.alphas.choices[name].options.index(o) for o in ("skip_connect", "nor_conv_3x3"))
    assert float(made.alphas[name][skip].detach()) > float(made.alphas[name][conv3].detach())


def test_latencies_are_in_the_state_and_are_believed_again() -> None:
    made = Drive(tiny("fbnet", tiny_space("nasbench201"))).run().algorithm
    tensors, facts = made.state()
    facts = json.loads(json.dumps(facts))
    assert facts["prices"]

    class Other(ByWork):
        def predict_many(self, plans: Any, device: object = None) -> Any:  # type: ignore[override]
            raise AssertionError("priced again")

    fresh = tiny("fbnet", tiny_space("nasbench201"), latency=Other())
    fresh.begin_phase(0, STEPS)
    fresh.load(tensors, facts)
    assert fresh.prices.known == made.prices.known  # type: ignore[attr-defined]
    fresh.architecture_loss(*batch(0), AT)


def test_widths_that_are_drawn_have_latencies_of_their_own() -> None:
    made = tiny("fbnet", tiny_space("mlp"))
    for width in (8, 16):
        made.values = {"depth": 1, "layer0.width": width, "layer1.width": 8}
        kept = 0.5 * 192 * width + 4 * width  # what is handed out has density 0.5, the classifier is dense
        assert float(made.latency({})) == pytest.approx(3 * 0.01 + kept / 1e4, rel=1e-5)
        made.architecture_loss(*batch(0), AT)
        assert made.latency_ms == pytest.approx(3 * 0.01 + kept / 1e4, rel=1e-5)


def test_the_most_probable_architecture_is_handed_out_then_samples() -> None:
    made = tiny("fbnet", tiny_space("nasbench201"), samples=3)
    with torch.no_grad():
        for alpha in made.alphas.tensors():
            alpha[3] = 1.0
    found = made.found()
    assert [one.note["derived"] for one in found] == ["argmax"] * 2 + [
        f"sample {i}" for i in range(3) for _ in range(2)
    ]
    assert {found[0].architecture.as_dict()[n] for n in made.alphas} == {"nor_conv_3x3"}
    assert found == made.found()
    assert len({one.architecture.digest for one in found}) > 2


def test_samples_are_drawn_as_often_as_they_are_probable() -> None:
    made = tiny("fbnet", tiny_space("nasbench201"))
    name = "node1.from0"
    with torch.no_grad():
        made.alphas[name].copy_(torch.tensor([0.1, 0.1, 0.5, 0.2, 0.1]).log())
    drawn = [made.sampled(number)[name] for number in range(300)]
    assert drawn.count("nor_conv_1x1") / 300 == pytest.approx(0.5, abs=0.1)
    assert drawn.count("none") / 300 == pytest.approx(0.1, abs=0.06)


def test_networks_too_fast_for_the_logarithm_are_refused_with_a_cure() -> None:
    class Instant(ByWork):
        def predict_many(self, plans: Any, device: object = None) -> Any:  # type: ignore[override]
            return super().predict_many(plans).assign(ms=1e-9)

    made = tiny("fbnet", tiny_space("nasbench201"), latency=Instant())
    with pytest.raises(EvaluationFailed, match="larger networks"):
        made.architecture_loss(*batch(0), AT)


@pytest.mark.parametrize("options", [{"weight_share": 0.0}, {"tau": 0.0}, {"samples": -1}, {"latency_beta": -0.1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        FBNetOptions(**options)


# -- random search with weight sharing --------------------------------------------------------------------------------


def test_a_step_trains_the_weights_of_one_random_architecture() -> None:
    made = tiny("random_shared", tiny_space("nasbench201"))
    made.begin_phase(0, STEPS)
    before = snapshot(made)
    made.step(*batch(0), lambda: batch(0, 1), AT)
    gates = made.path.gates
    taken = {name: made.supernet.choices[name].options[gate.chosen[0]] for name, gate in gates.items()}
    after = snapshot(made)
    moved = [key.removeprefix("weight/") for key in after if not torch.equal(after[key], before.get(key, after[key]))]
    assert any(key.startswith("node") for key in moved)
    for key in moved:
        if key.startswith("node"):  # "node2.from1#0.nor_conv_3x3/conv.weight"
            assert key.split("#")[1].split("/")[0].split(".", 1)[1] == taken[key.split("#")[0]]
    drawn = set()
    for number in range(6):
        made.step(*batch(number), lambda: batch(0, 1), AT)
        drawn.add(tuple(gate.chosen for gate in made.path.gates.values()))
    assert len(drawn) > 3


def test_the_best_of_the_candidates_are_handed_out_best_first() -> None:
    space = tiny_space("nasbench201")
    made = tiny("random_shared", space, candidates=12, keep=3)
    Drive(made).run()
    judged = {}
    for number in range(12):
        decisions = made.candidate(number)
        network_gates = made.supernet.gates_of(decisions)
        logits = [made.supernet(x, network_gates.gates).detach() for x, _ in made.judged_on]
        hits = sum(int((row.argmax(1) == y).sum()) for row, (_, y) in zip(logits, made.judged_on))
        loss = sum(float(F.cross_entropy(row, y)) for row, (_, y) in zip(logits, made.judged_on)) / 2
        judged[tuple(decisions.items())] = (-hits / 12, loss)
    best = sorted(judged, key=lambda key: judged[key])[:3]
    found = made.found()
    assert len(found) == 6  # three at each of two densities
    for rank, one in enumerate(found[:3]):
        assert one.note["rank"] == rank
        assert one.note["shared_accuracy"] == pytest.approx(-judged[best[rank]][0])
        assert dict(best[rank]).items() <= one.architecture.as_dict().items()
    assert [one.note["density"] for one in found] == [0.5] * 3 + [0.25] * 3


def test_it_says_when_no_candidate_can_be_judged() -> None:
    made = tiny("random_shared", tiny_space("nasbench201"), candidates=2)
    with pytest.raises(RuntimeError, match="compare_on"):
        made.found()
    made.compare_on([(batch(0)[0] * math.nan, batch(0)[1])])
    with pytest.raises(EvaluationFailed, match="finite for none of 2"):
        made.found()


def test_it_has_no_architecture_parameters_to_show() -> None:
    made = tiny("random_shared", tiny_space("mlp"))
    before = made.alphas.state()
    Drive(made).run()
    assert made.log_row() == {"alphas": {}}
    assert all(torch.equal(value, before[name]) for name, value in made.alphas.state().items())
    with pytest.raises(ConfigError, match="keep"):
        RandomSharedOptions(keep=0)
