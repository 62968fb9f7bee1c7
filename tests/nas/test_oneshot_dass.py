"""Laws of DASS: what trains and what rests in each phase, its masks, its slow twin, DARTS at density 1, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.oneshot.algorithm import At, Setting
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.darts import Darts, DartsOptions
from nas.oneshot.dass import Dass, norms
from nas.oneshot.living import kept, layers_of
from nas.oneshot.mixed import Gate, MixedOp
from nas.oneshot.supernet import Supernet
from ops.counting import total_kept_weights
from ops.layers import is_depthwise
from ops.masks import kept_count, topk_mask
from search_spaces import Space, get_space
from tests.nas.dass_steps import SHORT, STEPS, batch, learned, make, moved, run, run_phase, spaces, weights
from tests.nas.little_spaces import CLASSES, SHAPE, little_space

torch.set_num_threads(1)


# -- the layer ----------------------------------------------------------------------------------------------------------


def test_law_of_the_published_layer_holds_inside_a_supernet():
    def space(c):
        body = c.op("body", {"one": nn.Identity, "other": nn.Identity})
        return c.allocate("sparsity", nn.Sequential(body, nn.Linear(4, 1)), (1.0, 0.5), ("uniform",))

    supernet = Supernet(Space(space, "vector"), learned=True)
    parts = supernet.structure({}).parts
    assert parts is not None
    (layer,) = parts.layers.values()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0]]))
        layer.bias.zero_()  # type: ignore[union-attr]
        layer.score.copy_(torch.tensor([[0.1, -0.4, 0.3, -0.2]]))
    parts.set_all(0.5, "uniform", "unstructured")
    y = supernet(torch.ones(1, 4), {"body": Gate(None, (0,))})
    by_weight, by_score = torch.autograd.grad(y.sum(), [layer.weight, layer.score])
    assert layer.mask.tolist() == [[False, True, True, False]]
    assert y.item() == 1
    assert by_weight.tolist() == [[0, 1, 1, 0]]
    assert by_score.tolist() == [[1, 2, 3, 4]]


def test_kept_weights_of_the_published_supernet():
    space = get_space(
        "darts",
        channels=16,
        cells=8,
        densities=[1.0, 0.01],
        sparse_stem=True,
        sparse_classifier=True,
        sparse_depthwise=True,
    )
    supernet = Supernet(space, learned=True)
    parts = supernet.structure({}).parts
    assert parts is not None
    parts.set_all(0.01, "uniform", "unstructured")
    layers = layers_of(supernet.network)
    assert len(parts.layers) == len(layers)
    assert sum(layer.weight.numel() for layer in layers) == 1_930_512
    assert sum(kept(layer) for layer in layers) == 19_701
    assert sum(p.numel() for p in supernet.weights().values()) == 1_930_618


# -- phases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha_in_prune", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_each_phase_moves_what_it_trains_and_nothing_else_moves_by_a_bit(alpha_in_prune, order):
    algorithm = make(**SHORT, order=order, alpha_in_prune=alpha_in_prune, momentum=0.9)
    scores = set(algorithm.supernet.scores())
    everything = set(algorithm.supernet.weights())
    of_norms = {"BatchNorm2d#0.weight", "BatchNorm2d#0.bias"} & everything or set(norms(algorithm.supernet.weights()))
    assert len(of_norms) == 2, "the stem's"
    used = {key for key in everything if "none" not in key}
    for index, name in enumerate(("pretrain", "prune", "finetune")):
        algorithm.begin_phase(index, STEPS)
        differentiated = {key for key, p in algorithm.supernet.by_key().items() if p.requires_grad}
        assert differentiated == (scores | of_norms if name == "prune" else everything)
        before, alphas = weights(algorithm), algorithm.alphas.state()
        run_phase(algorithm, index, begin=False)
        changed = moved(before, weights(algorithm))
        if name == "prune":
            assert changed - of_norms == scores
            assert of_norms <= changed
        else:
            assert changed == used
        assert algorithm.phases()[index].name == name
        alphas_moved = any(not torch.equal(alphas[n], v) for n, v in algorithm.alphas.state().items())
        assert alphas_moved == (name != "prune" or alpha_in_prune)


def test_warm_up_rests_the_alphas_in_the_first_phase_alone():
    algorithm = make(pretrain_epochs=2, prune_epochs=1, finetune_epochs=1, order=1, warmup_epochs=1)
    at = [At(phase, epoch, 2, 0, 1) for phase, epoch in ((0, 0), (0, 1), (1, 0), (2, 0))]
    trains = []
    for one in at:
        algorithm.begin_phase(one.phase, 1)
        trains.append(algorithm.trains_alphas(one))
    assert trains == [False, True, False, True]


def test_before_the_prune_phase_nothing_is_masked_and_its_first_masks_keep_the_largest_weights_of_each_layer():
    algorithm = make(**SHORT, order=1, density=0.1)
    run_phase(algorithm, 0)
    assert all(layer.density == 1 for layer in learned(algorithm).values())
    algorithm.begin_phase(1, STEPS)
    algorithm.forward(batch(0)[0])
    assert len(learned(algorithm)) == len(layers_of(algorithm.supernet.network))
    for layer in learned(algorithm).values():
        assert layer.density == 0.1
        assert torch.equal(layer.mask, topk_mask(layer.weight.detach().abs(), 0.1))
    run_phase(algorithm, 1, begin=False)
    masks = {path: layer.mask for path, layer in learned(algorithm).items()}
    assert any(not torch.equal(m, topk_mask(learned(algorithm)[p].weight.abs(), 0.1)) for p, m in masks.items())
    run_phase(algorithm, 2)
    assert all(torch.equal(masks[path], layer.mask) for path, layer in learned(algorithm).items())


@pytest.mark.parametrize("how", ["kaiming_normal", "kaiming_uniform"])
def test_random_scores_come_from_the_seed(how):
    one, same, other = (make(**SHORT, order=1, score_init=how, seed=seed) for seed in (0, 0, 1))
    for algorithm in (one, same, other):
        algorithm.begin_phase(1, STEPS)
    scores = [algorithm.supernet.scores() for algorithm in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(scores[0].values(), scores[1].values()))
    assert not any(torch.equal(a, b) for a, b in zip(scores[0].values(), scores[2].values()))
    spread = float(torch.cat([s.detach().flatten() for s in scores[0].values() if s.numel() > 500]).std())
    fan_in = 8 * 9
    assert spread == pytest.approx((2 / fan_in) ** 0.5 if how == "kaiming_normal" else (1 / 3 / fan_in) ** 0.5, rel=0.1)


def test_scores_begin_once_also_where_a_phase_is_left_out():
    for phases in ({"pretrain_epochs": 0, "prune_epochs": 1}, {"pretrain_epochs": 1, "prune_epochs": 0}):
        algorithm = make(order=1, density=0.1, finetune_epochs=1, **phases)
        first = 0 if phases["pretrain_epochs"] == 0 else 1
        for index in range(first):
            run_phase(algorithm, index)
        algorithm.begin_phase(first, STEPS)
        algorithm.forward(batch(0)[0])
        for layer in learned(algorithm).values():
            assert torch.equal(layer.mask, topk_mask(layer.weight.detach().abs(), 0.1))
        run_phase(algorithm, first, begin=False)
        scores = {key: s.detach().clone() for key, s in algorithm.supernet.scores().items()}
        for index in range(first + 1, len(algorithm.phases())):
            algorithm.begin_phase(index, STEPS)
            assert all(torch.equal(scores[key], s) for key, s in algorithm.supernet.scores().items())


# -- slow twins ---------------------------------------------------------------------------------------------------------


def dense_gradients(
    algorithm: Dass, x: Tensor, y: Tensor, masks: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a supernet without scores whose weights are W * m, and its gradient there."""
    twin = Supernet(algorithm.setting.space, seed=0, fast=False)
    given = algorithm.supernet.by_key()
    with torch.no_grad():
        for key, p in twin.by_key().items():
            p.copy_(given[key] * masks.get(key, torch.ones(())))
    loss = F.cross_entropy(twin(x, algorithm.gates(), {}), y)
    named = twin.by_key()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {k: g for k, g in zip(named, gradients) if g is not None}


def masks_of(algorithm: Dass, density: float) -> dict[str, Tensor]:
    """Key of a weight -> top-k of its |score|, by the definition."""
    return {
        key.replace(".score", ".weight"): topk_mask(s.detach().abs(), density)
        for key, s in algorithm.supernet.scores().items()
    }


def sgd(value: Tensor, gradient: Tensor, scale: float, lr: float) -> Tensor:
    return value.detach() - lr * (scale * gradient + 1e-3 * value.detach())


def clip(gradients: list[Tensor], largest: float) -> float:
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    return min(1.0, largest / (norm + 1e-6))


def test_a_step_of_the_prune_phase_is_the_formula():
    algorithm = make(**SHORT, order=1, density=0.1, grad_clip=0.05)
    run_phase(algorithm, 0)
    algorithm.begin_phase(1, STEPS)
    x, y = batch(7)
    for _ in range(2):
        state, named = weights(algorithm), algorithm.supernet.by_key()
        loss, dense = dense_gradients(algorithm, x, y, masks_of(algorithm, 0.1))
        expected = {}
        for key in algorithm.supernet.scores():
            weight = key.replace(".score", ".weight")
            expected[key] = state[key].sign() * state[weight] * dense[weight]
        expected |= {key: dense[key] for key in norms(algorithm.supernet.weights())}
        scale = clip(list(expected.values()), 0.05)
        assert scale < 1, "the clipping is part of the law"
        report = algorithm.step(x, y, lambda: batch(8), At(1, 0, 1, 0, STEPS))
        assert torch.allclose(report.loss, loss, atol=1e-5)
        for key, gradient in expected.items():
            wanted = sgd(state[key], gradient, scale, algorithm.options.score_lr)
            assert torch.allclose(named[key], wanted, atol=1e-6), key


def test_a_step_of_the_finetune_phase_is_the_formula():
    algorithm = make(**SHORT, order=1, density=0.1)
    run_phase(algorithm, 0)
    run_phase(algorithm, 1)
    algorithm.begin_phase(2, STEPS)
    state, masks = weights(algorithm), masks_of(algorithm, 0.1)
    x, y = batch(7)
    algorithm.architecture_step(x, y, *batch(8), At(2, 0, 1, 0, STEPS))
    _, dense = dense_gradients(algorithm, x, y, masks)
    masked = {key: g * masks[key] if key in masks else g for key, g in dense.items()}
    scale = clip(list(masked.values()), 5.0)
    algorithm.weight_step(x, y, At(2, 0, 1, 0, STEPS))
    named = algorithm.supernet.by_key()
    for key, gradient in masked.items():
        assert torch.allclose(named[key], sgd(state[key], gradient, scale, 0.025), atol=1e-6), key


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_of_one_step_moves_alphas_then_weights_then_scores(order):
    algorithm = make(one_step=True, epochs=1, order=order, density=0.1, alpha_lr=0.05)
    algorithm.begin_phase(0, STEPS)
    at = At(0, 0, 1, 0, STEPS)
    for layer in learned(algorithm).values():
        assert torch.equal(layer.score.sign(), layer.weight.sign()), "scaled"
    x, y = batch(7)
    twin = make(one_step=True, epochs=1, order=order, density=0.1, alpha_lr=0.05)
    twin.begin_phase(0, STEPS)
    twin.architecture_step(x, y, *batch(8), at)
    scores = {key: s.detach().clone() for key, s in twin.supernet.scores().items()}
    twin.weight_step(x, y, at)
    assert all(torch.equal(scores[key], s) for key, s in twin.supernet.scores().items())
    after_weights = weights(twin)
    _, dense = dense_gradients(twin, x, y, masks_of(twin, 0.1))
    gradients = {
        key: s.sign() * after_weights[key.replace(".score", ".weight")] * dense[key.replace(".score", ".weight")]
        for key, s in scores.items()
    }
    scale = clip(list(gradients.values()), 5.0)
    algorithm.step(x, y, lambda: batch(8), at)
    assert all(torch.equal(v, twin.alphas[name]) for name, v in algorithm.alphas.state().items())
    named = algorithm.supernet.by_key()
    for key, weight in algorithm.supernet.weights().items():
        assert torch.equal(weight, after_weights[key]), "weights are those before the score step"
    for key, gradient in gradients.items():
        assert torch.allclose(named[key], sgd(scores[key], gradient, scale, 0.1), atol=1e-6), key
    assert all(layer.density == 0.1 for layer in learned(algorithm).values())


# -- DARTS at density 1 -------------------------------------------------------------------------------------------------


def darts_like(epochs: int, order: int, space: Space | None = None, shape: tuple[int, ...] = SHAPE) -> Darts:
    options = DartsOptions(epochs=epochs, order=order, momentum=0.0, weight_decay=1e-3, batch_size=32, alpha_lr=0.05)
    return Darts(Setting(space or little_space(), shape, CLASSES, 0), options)


def assert_same(one: Darts, two: Darts) -> None:
    assert list(one.alphas) == list(two.alphas)
    assert all(torch.equal(one.alphas[name], two.alphas[name]) for name in one.alphas)
    ours, theirs = one.supernet.weights(), two.supernet.weights()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("order", [1, 2])
def test_pretraining_is_darts(order):
    dass = make(pretrain_epochs=2, prune_epochs=0, finetune_epochs=0, order=order, alpha_lr=0.05, density=0.1)
    darts = darts_like(2, order)
    run(dass)
    run(darts)
    assert_same(dass, darts)


@pytest.mark.parametrize("order", [1, 2])
def test_at_density_1_one_step_is_darts(order):
    dass = make(one_step=True, epochs=2, order=order, alpha_lr=0.05, density=1.0)
    darts = darts_like(2, order)
    run(dass)
    run(darts)
    assert_same(dass, darts)


def test_at_density_1_phases_are_darts_whose_learning_rate_begins_again():
    dass = make(pretrain_epochs=1, prune_epochs=0, finetune_epochs=1, order=2, alpha_lr=0.05, density=1.0)
    run(dass)
    darts = darts_like(1, 2)
    run_phase(darts, 0)
    darts.begin_phase(0, STEPS)
    for step in range(STEPS):
        x, y = batch(10_000 + step)
        darts.step(x, y, lambda n=10_000 + step: batch(10_000_000 + n), At(0, 0, 1, step, STEPS))
    assert_same(dass, darts)


# -- log and checkpoints --------------------------------------------------------------------------------------------------


def test_the_log_counts_what_lives():
    algorithm = make(**SHORT, order=1, density=0.1)
    assert algorithm.log_row()["kept_weights"] == sum(
        layer.weight.numel() for layer in layers_of(algorithm.supernet.network)
    )
    run_phase(algorithm, 0)
    run_phase(algorithm, 1)
    row = algorithm.log_row()
    layers = learned(algorithm)
    assert row["kept_weights"] == sum(int(layer.mask.sum()) for layer in layers.values())
    assert row["kept_weights"] == total_kept_weights(algorithm.supernet.network)
    assert row["kept_weights"] == sum(kept_count(layer.weight.shape, 0.1) for layer in layers.values())
    masks = [layer.mask for layer in layers.values() if is_depthwise(layer)]
    assert row["depthwise_channels"] == sum(len(mask) for mask in masks)
    assert row["dead_depthwise_channels"] == sum(not bool(c.any()) for mask in masks for c in mask) > 0
    separable = [
        layer
        for mixed in algorithm.supernet.network.modules()
        if isinstance(mixed, MixedOp)
        for layer in mixed.candidates[mixed.options.index("sep_conv_3x3")].modules()
        if isinstance(layer, nn.Conv2d)
    ]
    live = sum(int(layer.mask.sum()) for layer in separable)  # type: ignore[union-attr]
    assert row["candidate_density"]["sep_conv_3x3"] == live / sum(layer.weight.numel() for layer in separable)
    assert set(row["candidate_density"]) == {"sep_conv_3x3", "conv_3x3"}
    probabilities = torch.tensor([p for n, p in row["alphas"].items() if n.endswith(".op")])
    assert row["skip_pool_probability"] == pytest.approx(float(probabilities[:, :3].sum(1).mean()))


CUTS = [("little", phase, step) for phase in range(3) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(("name", "phase", "step"), [*CUTS, ("convnet", 1, 1), ("mlp", 2, 1)])
def test_a_search_that_is_continued_ends_in_the_same_state_bit_for_bit(name, phase, step):
    space, shape = spaces()[name]
    options = SHORT | {
        "order": 2,
        "density": 0.2,
        "allocation": "global",
        "momentum": 0.9,
        "score_init": "kaiming_normal",
    }
    whole, first, second = (make(space, shape, **options) for _ in range(3))
    run(whole, shape)
    for index in range(phase):
        run_phase(first, index, shape)
    first.begin_phase(phase, STEPS)
    steps(first, phase, range(step), shape)
    tensors, facts = first.state()
    tensors = {key: value.clone() for key, value in tensors.items()}
    second.begin_phase(phase, STEPS)
    second.load(tensors, facts)
    steps(second, phase, range(step, STEPS), shape)
    for index in range(phase + 1, 3):
        run_phase(second, index, shape)
    assert_same_state(whole, second)


@pytest.mark.parametrize("cut", [1, 3])
def test_one_step_is_continued_bit_for_bit(cut):
    whole, first, second = (make(one_step=True, epochs=1, density=0.1, momentum=0.9, order=1) for _ in range(3))
    for algorithm in (whole, first, second):
        algorithm.begin_phase(0, 4)
    steps(whole, 0, range(4), SHAPE)
    steps(first, 0, range(cut), SHAPE)
    tensors, facts = first.state()
    second.load({key: value.clone() for key, value in tensors.items()}, facts)
    assert any(key.startswith("score_sgd/momentum_buffer/") for key in tensors)
    steps(second, 0, range(cut, 4), SHAPE)
    assert_same_state(whole, second)


def steps(algorithm: Dass, phase: int, numbers: range, shape: tuple[int, ...]) -> None:
    for step in numbers:
        number = phase * 10_000 + step
        held = lambda n=number: batch(10_000_000 + n, shape)  # noqa: E731
        algorithm.step(*batch(number, shape), held, At(phase, 0, 1, step, STEPS))


def assert_same_state(one: Dass, two: Dass) -> None:
    (tensors, facts), (others, other_facts) = one.state(), two.state()
    assert set(tensors) == set(others)
    different = [key for key in tensors if not torch.equal(tensors[key], others[key])]
    assert not different
    assert facts == other_facts
    assert one.found() == two.found()
    x, _ = batch(3, one.setting.input_shape)
    assert torch.equal(one.logits(x), two.logits(x))


def test_it_is_among_the_searchers_and_asks_for_controls():
    assert ALGORITHMS["dass"] is Dass
    assert Dass.sparse
