"""DARTS: both orders of the gradient, decoding, what a search may look at, and its state."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import ConfigError
from nas.oneshot import supernet as supernets
from nas.oneshot.algorithm import At, Setting
from nas.oneshot.choices import EdgeChoice, OpChoice, ValueChoice
from nas.oneshot.darts import Darts, DartsOptions
from nas.oneshot.decode import decode
from search_spaces import Space, get_space
from search_spaces.genotypes import Genotype
from tests.nas.oneshot_tiny import CLASSES, SHAPE, STEPS, Drive, batch, differing, snapshot, tiny, tiny_space

torch.set_num_threads(1)

AT = At(0, 0, 2, 0, STEPS)


# -- the second-order gradient ----------------------------------------------------------------------------------------


def in_double(**options: Any) -> Darts:
    """A small second-order search in float64 whose optimizer has momentum already."""
    space = tiny_space("nasbench201", operations=["skip_connect", "nor_conv_1x1", "avg_pool_3x3"])
    made: Darts = tiny("darts", space, order=2, **options)
    made.supernet.double()
    made.supernet.board.fast = False
    for module in list(made.supernet.modules()):  # smooth, so that there are second derivatives everywhere
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta=2))
    generator = torch.Generator().manual_seed(3)
    for name, alpha in made.alphas._values.items():
        random = 0.5 * torch.randn(len(alpha), generator=generator, dtype=torch.float64)
        made.alphas._values[name] = random.requires_grad_()
    made.begin_phase(0, STEPS)
    assert made.weight_optimizer is not None
    for weight in made.trained_weights():
        momentum = 0.01 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        made.weight_optimizer.state[weight]["momentum_buffer"] = momentum
    return made


def exactly(made: Darts, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient through the step by differentiating twice, no finite differences."""
    assert made.weight_optimizer is not None
    options, xi = made.options, made.learning_rate(AT)
    named = dict(made.supernet.named_parameters())
    alphas = made.alphas.tensors()

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(made.supernet, weights, (x, made.gates()))
        return F.cross_entropy(logits, y)

    gradients = torch.autograd.grad(loss(named, *train), list(named.values()), create_graph=True)
    moved = {}
    for (name, w), g in zip(named.items(), gradients):
        v = made.weight_optimizer.state[w]["momentum_buffer"]
        moved[name] = w - xi * (options.momentum * v + g + options.weight_decay * w)
    result = torch.autograd.grad(loss(moved, *held), alphas)
    return dict(zip(made.alphas, result))


def double(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].double(), pair[1]


@pytest.mark.parametrize(("perturbation", "error"), [(None, 0.05), (1e-4, 1e-5)])
def test_the_second_order_gradient_is_that_of_the_unrolled_step(perturbation: float | None, error: float) -> None:
    """With the published perturbation about, with a small one nearly exactly."""
    made = in_double(lr=0.02)
    made.perturbation = perturbation or made.perturbation
    train, held = double(batch(0)), double(batch(0, 1))
    found = made.unrolled(*train, *held, AT)[1]
    first = torch.autograd.grad(made.loss(*held)[0], made.alphas.tensors())
    exact = exactly(made, train, held)
    a, b, c = (torch.cat([t.flatten() for t in v]) for v in (found.values(), exact.values(), first))
    assert float((a - b).norm() / b.norm()) < error
    assert float((c - b).norm() / b.norm()) > 0.2  # which the first-order gradient is not


def test_the_second_order_gradient_leaves_the_weights_bit_for_bit() -> None:
    made: Darts = tiny("darts", tiny_space("nasbench201"), order=2)
    drive = Drive(made).run(until=1)
    before = snapshot(made)
    made.unrolled(*batch(5), *batch(5, 1), drive.places[1])
    assert differing(before, snapshot(made)) == []


def test_the_loss_at_the_unrolled_weights_is_what_is_reported() -> None:
    made = in_double(lr=0.1)
    train, held = double(batch(0)), double(batch(0, 1))
    loss, _ = made.unrolled(*train, *held, AT)
    assert loss.item() != pytest.approx(made.loss(*held)[0].item(), rel=1e-3)
    made.options = DartsOptions(lr=1e-12, lr_min=0.0, order=2)
    assert made.unrolled(*train, *held, AT)[0].item() == pytest.approx(made.loss(*held)[0].item(), rel=1e-9)


def test_without_a_learning_rate_both_orders_are_the_same() -> None:
    made = in_double(lr=1e-12, lr_min=0.0)
    train, held = double(batch(0)), double(batch(0, 1))
    found = made.unrolled(*train, *held, AT)[1]
    first = torch.autograd.grad(made.loss(*held)[0], made.alphas.tensors())
    for a, b in zip(found.values(), first):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# -- what it looks at -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_the_architecture_step_learns_from_the_held_out_half_and_the_weight_step_from_the_other(order: int) -> None:
    """Labels of one half are turned about; what should not depend on them does not change."""

    def after(train_labels: int, held_labels: int) -> dict[str, Tensor]:
        made = tiny("darts", tiny_space("nasbench201"), order=order, alpha_lr=0.1)
        made.begin_phase(0, STEPS)
        x, y = batch(0)
        held_x, held_y = batch(0, 1)
        made.step(x, (y + train_labels) % 4, lambda: (held_x, (held_y + held_labels) % 4), AT)
        return snapshot(made)

    plain, other_held, other_train = after(0, 0), after(0, 1), after(1, 0)
    moved = differing(plain, other_held)
    assert any(name.startswith("alpha/") for name in moved)
    by_train = [name for name in differing(plain, other_train) if name.startswith("alpha/")]
    assert bool(by_train) == (order == 2)  # only the unrolled step knows of the training half


def test_a_space_that_lists_none_has_it_among_the_candidates() -> None:
    operations = ["none", "skip_connect", "sep_conv_3x3"]
    made = tiny("darts", tiny_space("darts", operations=operations))
    operation_choices = [c for c in made.supernet.choices.values() if isinstance(c, OpChoice)]
    assert operation_choices
    assert all(choice.options == tuple(operations) for choice in operation_choices)
    assert all(len(made.alphas[choice.name]) == 3 for choice in operation_choices)
    with torch.no_grad():
        for name in made.alphas:
            made.alphas[name][0] = 9.0
    decided = made.found()[0].architecture.as_dict()
    assert "none" not in decided.values()
    assert float(made.alphas.probabilities("normal.node0.from0.op")[0].detach()) > 0.99


def test_published_supernet_and_architecture_parameters_are_counted_right() -> None:
    operations = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"]
    operations += ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
    space = get_space("darts", channels=16, cells=8, operations=operations, densities=[1.0])
    made = Darts(Setting(space, (3, 32, 32), 10, 0), DartsOptions())
    assert sum(w.numel() for w in made.supernet.weights().values()) == 1_930_618
    assert sum(a.numel() for a in made.alphas.tensors()) == 224


# -- decoding ---------------------------------------------------------------------------------------------------------

OPS = ("none", "skip", "conv")


def node(n: int, keep: int = 2) -> dict[str, Any]:
    names = tuple((f"from{j}",) for j in range(n))
    choices: dict[str, Any] = {f"from{j}": OpChoice(f"from{j}", OPS) for j in range(n)}
    return {**choices, "inputs": EdgeChoice("inputs", tuple(range(n)), keep, names)}


def decoded(choices: dict[str, Any], **probabilities: list[float]) -> dict[str, Any]:
    return dict(decode(choices, {name: torch.tensor(p) for name, p in probabilities.items()}))


def test_the_inputs_whose_best_operation_is_most_probable_are_kept() -> None:
    found = decoded(node(3), from0=[0.2, 0.3, 0.5], from1=[0.1, 0.8, 0.1], from2=[0.1, 0.2, 0.7])
    assert found == {"inputs": "1,2", "from1": "skip", "from2": "conv"}


def test_none_is_never_taken_on_an_input_though_it_has_its_share() -> None:
    found = decoded(node(3), from0=[0.9, 0.06, 0.04], from1=[0.8, 0.05, 0.15], from2=[0.2, 0.3, 0.5])
    assert found == {"inputs": "1,2", "from1": "conv", "from2": "conv"}


def test_of_equals_the_lower_input_and_the_earlier_operation_are_taken() -> None:
    third = [1 / 3, 1 / 3, 1 / 3]
    assert decoded(node(4), from0=third, from1=third, from2=third, from3=third) == {
        "inputs": "0,1",
        "from0": "skip",
        "from1": "skip",
    }


def test_a_choice_that_stands_alone_may_be_none_and_values_are_the_most_probable() -> None:
    choices = {"edge": OpChoice("edge", OPS), "width": ValueChoice("width", (8, 16, 32))}
    assert decoded(choices, edge=[0.6, 0.3, 0.1], width=[0.2, 0.5, 0.3]) == {"edge": "none", "width": 16}


def test_where_none_is_all_there_is_it_is_taken() -> None:
    choices = {"from0": OpChoice("from0", ("none",)), "inputs": EdgeChoice("inputs", (0,), 1, (("from0",),))}
    assert decoded(choices, from0=[1.0]) == {"inputs": "0", "from0": "none"}


def test_a_genotype_goes_with_what_is_found() -> None:
    made = tiny("darts", tiny_space("darts"))
    for one in made.found():
        genotype = Genotype.parse(one.note["genotype"])
        assert len(genotype.normal) == len(genotype.reduce) == 8
        assert one.note["density"] == one.architecture.as_dict()["sparsity.density"]


# -- values that are drawn, and state ---------------------------------------------------------------------------------


def test_weights_that_were_met_on_the_way_survive_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structure that nobody looked at before brings new weights; they come back with the state, in the same order."""
    monkeypatch.setattr(supernets, "LOOKED_AT", 0)

    def kinds(c: Any, *, input_shape: Any, classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(192, 8), nn.ReLU()]
        for i in range(4):
            if c.choice(f"layer{i}", ("none", "linear", "bottleneck")) == "linear":
                layers.append(nn.Linear(8, 8))
            elif c.made[f"layer{i}"] == "bottleneck":
                layers += [nn.Linear(8, 2), nn.Linear(2, 8)]
        return nn.Sequential(*layers, nn.Linear(8, classes))

    space = Space(kinds, "kinds", {"input_shape": SHAPE, "classes": CLASSES})
    whole = Drive(tiny("darts", space, epochs=6)).run()
    stopped = Drive(tiny("darts", space, epochs=6)).run(until=7)
    assert stopped.algorithm.met  # type: ignore[attr-defined]
    resumed = stopped.resumed_by(tiny("darts", space, epochs=6)).run(resumed=True)
    assert differing(snapshot(whole.algorithm), snapshot(resumed.algorithm)) == []
    keys = [list(drive.algorithm.supernet.by_key()) for drive in (whole, resumed)]  # type: ignore[attr-defined]
    assert keys[0] == keys[1]


def test_values_that_lower_the_loss_become_more_probable() -> None:
    """The score function, by itself: the loss is the value's own number."""
    made = tiny("darts", tiny_space("mlp"), alpha_lr=0.05, alpha_weight_decay=0.0)
    for _ in range(300):
        made.values = made.draw_values()
        for name in made.alphas:
            made.alphas[name].grad = torch.zeros_like(made.alphas[name])
        made.score_function(torch.tensor(float(made.values["layer0.width"])))  # type: ignore[arg-type]
        made.alpha_optimizer.step()
    widths = made.alphas.choices["layer0.width"].options
    assert made.best_values()["layer0.width"] == min(widths)
    assert float(made.alphas.probabilities("layer0.width").detach().max()) > 0.9


def test_state_is_json_and_tensors() -> None:
    made = Drive(tiny("darts", tiny_space("mlp"))).run(until=2).algorithm
    tensors, facts = made.state()
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"order": 3}, "order"), ({"order": True}, "order"), ({"lr": 0.0}, "lr"), ({"alpha_betas": (0.5, 1.0)}, "betas")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DartsOptions(**options)
