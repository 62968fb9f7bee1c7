"""PC-DARTS: partial channels, edge weights, warm-up, and when it is DARTS."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nas.errors import ConfigError
from nas.oneshot.algorithm import At, Setting
from nas.oneshot.choices import EdgeChoice
from nas.oneshot.mixed import Gate, PartialMixedOp
from nas.oneshot.pcdarts import PCDarts, PCDartsOptions, warmup_of
from search_spaces import get_space
from tests.nas.oneshot_tiny import Drive, batch, tiny, tiny_space

torch.set_num_threads(1)


def edges_of(made: PCDarts) -> dict[str, EdgeChoice]:
    return {name: choice for name, choice in made.alphas.choices.items() if isinstance(choice, EdgeChoice)}


def test_published_supernet_and_architecture_parameters_are_counted_right() -> None:
    operations = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"]
    operations += ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]
    space = get_space("darts", channels=16, cells=8, operations=operations, densities=[1.0])
    made = PCDarts(Setting(space, (3, 32, 32), 10, 0), PCDartsOptions())
    assert sum(w.numel() for w in made.supernet.weights().values()) == 299_578
    assert sum(a.numel() for a in made.alphas.tensors()) == 252


def test_defaults_are_the_published_ones() -> None:
    o = PCDartsOptions()
    assert (o.k, o.batch_size, o.lr, o.lr_min, o.momentum, o.weight_decay) == (4, 256, 0.1, 0.0, 0.9, 3e-4)
    assert (o.epochs, o.alpha_lr, o.alpha_weight_decay, o.alpha_betas) == (50, 6e-4, 1e-3, (0.5, 0.999))
    assert warmup_of(o.warmup_share, o.epochs) == 15
    assert [warmup_of(0.3, epochs) for epochs in (1, 2, 10)] == [0, 1, 3]
    assert warmup_of(0.99, 4) == 3


def test_the_weights_of_a_nodes_inputs_sum_to_one_whatever_is_kept() -> None:
    made = tiny("pcdarts", tiny_space("darts"), k=2)
    gates = made.gates()
    edges = edges_of(made)
    assert len(edges) == 8
    for name, choice in edges.items():
        assert gates[name].chosen is None
        assert gates[name].weights.shape == (len(choice.options),)
        assert float(gates[name].weights.detach().sum()) == pytest.approx(1, abs=1e-6)


def test_with_k_1_and_every_input_counting_1_it_is_darts() -> None:
    """At uniform beta a node is DARTS' sum divided by its n inputs: with n times the edge weights, logits and all gradients are
    those of DARTS with the same weights and alphas."""
    space = tiny_space("darts")
    plain, partial = tiny("darts", space), tiny("pcdarts", space, k=1)
    mine, others = dict(plain.supernet.named_parameters()), dict(partial.supernet.named_parameters())
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    with torch.no_grad():
        for name in partial.alphas:
            partial.alphas[name].copy_(plain.alphas[name] if name in plain.alphas else torch.zeros(1))
    gates = partial.gates()
    for name, choice in edges_of(partial).items():
        gates[name] = Gate(gates[name].weights * len(choice.options))
    x, y = batch(0)
    results = []
    for made, given in ((plain, plain.gates()), (partial, gates)):
        logits = made.supernet(x, given)
        loss = torch.nn.functional.cross_entropy(logits, y)
        shared = [made.alphas[name] for name in plain.alphas]
        results.append((logits, *torch.autograd.grad(loss, [*made.supernet.parameters(), *shared])))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mixed_operations_see_a_part_of_the_channels() -> None:
    made = tiny("pcdarts", tiny_space("darts"), k=4)
    mixed = [m for m in made.supernet.modules() if isinstance(m, PartialMixedOp)]
    assert mixed
    assert all(m.k == 4 for m in mixed)
    dense = tiny("pcdarts", tiny_space("darts"), k=1)
    weights = [sum(w.numel() for w in m.supernet.weights().values()) for m in (made, dense)]
    assert weights[0] < weights[1]


def test_betas_decide_which_inputs_are_kept() -> None:
    made = tiny("pcdarts", tiny_space("darts"), k=2)
    name = "normal.node2.inputs"
    assert made.decisions()[name] != "1,3" or made.decisions()["normal.node3.inputs"] != "1,4"
    with torch.no_grad():
        made.alphas[name][[1, 3]] = 5.0
    assert made.decisions()[name] == "1,3"


def test_an_operation_twice_as_probable_makes_up_for_half_the_beta() -> None:
    """Strength of an input is softmax(alpha) of its best operation times softmax(beta)."""
    made = tiny("pcdarts", tiny_space("darts"), k=2)
    with torch.no_grad():
        for alpha in made.alphas.tensors():
            alpha.zero_()
        made.alphas["normal.node1.inputs"].copy_(torch.tensor([0.5, 0.3, 0.2]).log())
        made.alphas["normal.node1.from2.op"].copy_(torch.tensor([0.02, 0.02, 0.96]).log())
    assert made.decisions()["normal.node1.inputs"] == "0,2"  # .333 * .5, .333 * .3, .96 * .2
    with torch.no_grad():
        made.alphas["normal.node1.inputs"].zero_()
        made.alphas["normal.node1.from2.op"].zero_()
    assert made.decisions()["normal.node1.inputs"] == "0,1"


def test_alphas_and_betas_move_after_the_warm_up() -> None:
    made = tiny("pcdarts", tiny_space("darts"), k=2, epochs=2, warmup_share=0.5)
    before = made.alphas.state()
    drive = Drive(made).run(until=2)
    assert all(torch.equal(value, before[name]) for name, value in made.alphas.state().items())
    drive.run()
    moved = {name for name, value in made.alphas.state().items() if not torch.equal(value, before[name])}
    assert {"normal.node2.inputs", "normal.node2.from0.op"} <= moved


def test_the_longer_warm_up_counts() -> None:
    made = tiny("pcdarts", tiny_space("nasbench201"), k=2, epochs=10, warmup_share=0.3, warmup_epochs=5)
    assert [made.trains_alphas(At(0, epoch, 10, 0, 2)) for epoch in (2, 3, 4, 5)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 0}, "k"), ({"warmup_share": 1.0}, "warmup_share"), ({"k": 3}, "k = 3")]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny("pcdarts", tiny_space("darts"), **options)
