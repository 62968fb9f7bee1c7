"""GDAS: draws, single paths, temperatures, what its own decoding rule would take; and the Gumbel-softmax beneath."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from nas.errors import ConfigError
from nas.oneshot import gumbel
from nas.oneshot.algorithm import At
from nas.oneshot.choices import EdgeChoice, OpChoice
from nas.oneshot.gdas import GdasOptions, best_pairs, strongest_inputs
from nas.oneshot.gumbel import gumbel_softmax, hard_choices
from nas.oneshot.mixed import Gate, MixedOp
from search_spaces.darts import network_from_genotype
from tests.nas.oneshot_tiny import CLASSES, SHAPE, STEPS, Drive, batch, tiny, tiny_space

torch.set_num_threads(1)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- draws ------------------------------------------------------------------------------------------------------------


def test_relaxed_choices_sum_to_one_and_have_a_gradient_whatever_their_lengths() -> None:
    alphas = [torch.randn(n, generator=chance(n), requires_grad=True) for n in (2, 5, 3)]
    soft = gumbel_softmax(alphas, 0.7, chance())
    assert [len(row) for row in soft] == [2, 5, 3]
    for row, alpha in zip(soft, alphas):
        assert float(row.detach().sum()) == pytest.approx(1, abs=1e-6)
        (gradient,) = torch.autograd.grad(row[0], alpha, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
        assert gradient.abs().max() > 0


def test_one_relaxed_choice_is_what_the_formula_says() -> None:
    alpha = torch.tensor([0.3, -1.0, 2.0])
    noise = -torch.empty(1, 3).exponential_(generator=chance(5)).log()[0]
    slow = torch.softmax((torch.log_softmax(alpha, 0) + noise) / 0.4, 0)
    torch.testing.assert_close(gumbel_softmax([alpha], 0.4, chance(5))[0], slow)


def test_options_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    generator, counts = chance(), Counter[int]()
    for _ in range(200):
        soft = gumbel_softmax([probabilities.log()] * 10, 5.0, generator)
        counts.update(index for _, index in hard_choices(soft))
    assert [counts[i] / 2000 for i in range(3)] == pytest.approx(probabilities.tolist(), abs=0.04)


def test_hard_choices_are_exactly_one_hot_with_the_gradient_of_the_relaxed_ones() -> None:
    alpha = torch.tensor([0.1, 0.7, -0.4], requires_grad=True)
    (soft,) = gumbel_softmax([alpha], 0.9, chance(3))
    ((hard, index),) = hard_choices([soft])
    assert hard.tolist() == [1.0 if i == index else 0.0 for i in range(3)]
    weights = torch.tensor([1.0, 3.0, -2.0])
    a = torch.autograd.grad((hard * weights).sum(), alpha, retain_graph=True)[0]
    b = torch.autograd.grad((soft * weights).sum(), alpha)[0]
    torch.testing.assert_close(a, b)


def test_infinite_noise_is_drawn_again_and_parameters_that_are_no_numbers_do_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    real = torch.Tensor.exponential_

    def first_is_zero(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(1)
        drawn = real(self, *args, **kwargs)
        return drawn.zero_() if len(asked) == 1 else drawn

    monkeypatch.setattr(torch.Tensor, "exponential_", first_is_zero)
    (row,) = gumbel_softmax([torch.zeros(3)], 1.0, chance())
    assert len(asked) == 2
    assert torch.isfinite(row).all()
    asked.clear()
    (row,) = gumbel_softmax([torch.full((3,), math.nan)], 1.0, chance())
    assert len(asked) == gumbel.TRIES
    assert row.isnan().all()
    assert 0 <= hard_choices([row])[0][1] < 3


# -- paths ------------------------------------------------------------------------------------------------------------


def count_runs(made: Any) -> Counter[str]:
    """How often each mixed operation ran, and each of its candidates."""
    runs: Counter[str] = Counter()
    for number, mixed in enumerate(m for m in made.supernet.modules() if isinstance(m, MixedOp)):
        for option, candidate in zip(mixed.options, mixed.candidates):
            key = f"{number} {mixed.name} {option}"
            candidate.register_forward_hook(lambda *_, key=key: runs.update([key]))
    return runs


def test_one_candidate_of_each_mixed_operation_runs_and_it_is_the_drawn_one() -> None:
    made = tiny("gdas", tiny_space("darts"))
    runs = count_runs(made)
    gates = made.gates()
    made.supernet(batch(0)[0], gates)
    mixed = [m for m in made.supernet.modules() if isinstance(m, MixedOp)]
    assert sum(runs.values()) == len(runs) == len(mixed)
    for number, m in enumerate(mixed):
        (index,) = gates[m.name].chosen
        assert runs[f"{number} {m.name} {m.options[index]}"] == 1


def test_a_drawn_path_computes_what_the_network_of_its_operations_computes() -> None:
    made = tiny("gdas", tiny_space("nasbench201"))
    gates = made.gates()
    plain = {name: Gate(None, gate.chosen) for name, gate in gates.items()}
    x = batch(0)[0]
    torch.testing.assert_close(made.supernet(x, gates), made.supernet(x, plain))


def test_operations_that_did_not_run_get_a_gradient_too() -> None:
    made = tiny("gdas", tiny_space("nasbench201"))
    loss, _ = made.loss(*batch(0))
    gradients = torch.autograd.grad(loss, made.alphas.tensors())
    assert all(int((gradient != 0).sum()) > 1 for gradient in gradients)


def test_the_two_steps_of_a_step_run_different_draws() -> None:
    made = tiny("gdas", tiny_space("nasbench201"))
    drawn = [tuple(gate.chosen for gate in made.gates().values()) for _ in range(8)]
    assert len(set(drawn)) > 1


def test_where_inputs_are_chosen_apart_one_is_drawn_and_the_others_do_not_run() -> None:
    made = tiny("gdas", tiny_space("nasnet"))
    edges = [name for name, choice in made.alphas.choices.items() if isinstance(choice, EdgeChoice)]
    assert edges
    gates = made.gates()
    assert all(len(gates[name].chosen) == 1 for name in edges)
    runs = count_runs(made)
    made.supernet(batch(0)[0], gates)
    inputs = Counter(key.split(" ", 1)[1].rsplit(" ", 1)[0] for key in runs)
    cells = {"normal": 3, "reduce": 2}
    assert all(inputs[f"{kind}.block0.op1"] == number for kind, number in cells.items())
    loss, _ = made.loss(*batch(0))
    assert torch.autograd.grad(loss, made.alphas[edges[0]], allow_unused=True)[0] is not None


def test_several_inputs_are_those_that_count_most() -> None:
    soft = torch.tensor([0.1, 0.5, 0.15, 0.25], requires_grad=True)
    gate = strongest_inputs(soft, 2)
    assert gate.chosen == (1, 3)
    assert gate.weights is not None
    assert gate.weights.tolist() == [0, 1, 0, 1]
    assert torch.autograd.grad(gate.weights[1], soft)[0].tolist() == [0, 2, 0, 0]


# -- schedule ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    o = GdasOptions()
    assert (o.epochs, o.batch_size, o.lr, o.lr_min, o.weight_decay, o.grad_clip) == (250, 256, 0.025, 0.001, 5e-4, 5.0)
    assert (o.alpha_lr, o.alpha_weight_decay, o.tau_max, o.tau_min) == (3e-4, 1e-3, 10.0, 0.1)
    with pytest.raises(ConfigError, match="tau_min"):
        GdasOptions(tau_max=1.0, tau_min=2.0)


def test_the_temperature_falls_linearly_over_the_epochs() -> None:
    made = tiny("gdas", tiny_space("nasbench201"), epochs=4)
    taus = [made.temperature(At(0, epoch, 4, 0, STEPS)) for epoch in range(4)]
    assert taus == pytest.approx([10.0, 6.7, 3.4, 0.1])
    assert made.temperature(At(0, 0, 1, 0, STEPS)) == 10.0
    Drive(made).run(until=2 * STEPS)
    assert made.log_row()["tau"] == pytest.approx(6.7)


def test_weights_have_nesterovs_momentum() -> None:
    for momentum in (0.9, 0.0):
        made = tiny("gdas", tiny_space("nasbench201"), momentum=momentum)
        made.begin_phase(0, STEPS)
        assert made.weight_optimizer.param_groups[0]["nesterov"] == (momentum > 0)


def test_the_log_shows_the_most_probable_path_without_noise() -> None:
    made = tiny("gdas", tiny_space("nasbench201"))
    x = batch(0)[0]
    before = made.generator.get_state()
    assert torch.equal(made.logits(x), made.logits(x))
    assert torch.equal(made.generator.get_state(), before)
    decided = made.decisions()
    torch.testing.assert_close(made.logits(x), made.supernet(x, made.supernet.gates_of(decided).gates).detach())


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_its_rule_takes_the_best_pairs_of_operation_and_input_which_may_share_an_input() -> None:
    options = ("none", "skip", "conv")
    choices: dict[str, Any] = {f"from{j}": OpChoice(f"from{j}", options) for j in range(3)}
    edge = EdgeChoice("inputs", (0, 1, 2), 2, tuple((f"from{j}",) for j in range(3)))
    p = {"from0": [0.0, 0.45, 0.55], "from1": [0.7, 0.2, 0.1], "from2": [0.5, 0.1, 0.4]}
    tensors = {name: torch.tensor(values) for name, values in p.items()}
    assert best_pairs(edge, choices, tensors) == [("conv", 0), ("skip", 0)]
    equal = {name: torch.tensor([0.2, 0.4, 0.4]) for name in p}
    assert best_pairs(edge, choices, equal) == [("skip", 0), ("conv", 0)]


def test_what_the_space_cannot_hold_is_said_and_written_down() -> None:
    made = tiny("gdas", tiny_space("darts"))
    with torch.no_grad():
        for alpha in made.alphas.tensors():
            alpha.zero_()
        made.alphas["normal.node1.from1.op"].copy_(torch.tensor([-5.0, 3.0, 3.2]))
        made.alphas["normal.node1.from2.op"].copy_(torch.tensor([0.0, 0.3, 0.0]))
    one = made.found()[0]
    decided = one.architecture.as_dict()
    assert decided["normal.node1.inputs"] == "1,2"
    assert (decided["normal.node1.from1.op"], decided["normal.node1.from2.op"]) == ("sep_conv_3x3", "skip_connect")
    assert one.note["gdas_pairs"]["normal.node1.inputs"] == [["sep_conv_3x3", 1], ["skip_connect", 1]]
    assert "normal.node1.inputs" in one.note["not_held"]
    assert "('sep_conv_3x3', 1), ('skip_connect', 1)" in one.note["raw_genotype"]
    network: nn.Module = network_from_genotype(
        one.note["raw_genotype"], channels=4, cells=3, input_shape=SHAPE, classes=CLASSES
    )
    assert network(batch(0)[0]).shape == (6, CLASSES)


def test_where_the_best_pairs_are_on_different_inputs_both_rules_agree() -> None:
    made = tiny("gdas", tiny_space("darts"))
    with torch.no_grad():
        for name, alpha in made.alphas._values.items():
            alpha.zero_()
            alpha[2] = 2.0 + 0.1 * int(name.split("from")[1][0])
    one = made.found()[0]
    assert "not_held" not in one.note
    assert sorted(one.note["raw_genotype"]) == sorted(one.note["genotype"])  # pairs of a node in another order
