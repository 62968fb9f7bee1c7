"""What is particular to each sparsity method: schedules against published values, swaps by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nas.data import from_datasets
from nas.errors import ConfigError, EvaluationFailed, UnknownName
from nas.training import TrainConfig, train
from nas.training.methods import make_method
from nas.training.methods.base import Holder
from nas.training.methods.gradual import cubic_sparsity
from nas.training.methods.rigl import cosine_drop, swap
from nas.training.methods.units import expand, n_of_m_groups, unit_sums
from ops.layers import SparseConv2d, SparseLinear
from ops.patterns import NM, Block, Channel, Unstructured
from tests.conformance.test_sparsity_methods import batch, network, run


@pytest.mark.parametrize(
    ("final", "values"), [(0.5, [0.0, 0.2890625, 0.4375, 0.4921875, 0.5]), (0.8, [0.0, 0.4625, 0.7, 0.7875, 0.8])]
)
def test_the_cubic_schedule_has_the_values_of_the_formula(final, values):
    for t, expected in zip((0, 5, 10, 15, 20), values):
        assert cubic_sparsity(t, final=final, start=0, interval=5, updates=4) == pytest.approx(expected, abs=1e-12)
    assert cubic_sparsity(-3, final=final, start=0, interval=5, updates=4) == 0.0
    assert cubic_sparsity(999, final=final, start=0, interval=5, updates=4) == final
    assert cubic_sparsity(10, final=0.5, start=10, interval=5, updates=4, initial=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("t", "value"), [(0, 0.3), (100, 0.299868), (2000, 0.250370), (5000, 0.075), (7500, 0.0), (9000, 0.0)]
)
def test_the_cosine_of_rigl_has_its_known_values(t, value):
    assert cosine_drop(t, zeta=0.3, t_end=7500) == pytest.approx(value, abs=5e-7)


def _linear(
    weight: list[list[float]], mask: list[list[int]], density: float, pattern: str = "unstructured"
) -> SparseLinear:
    w = torch.tensor(weight)
    layer = SparseLinear(w.shape[1], w.shape[0], bias=False, density=density, pattern=pattern)
    with torch.no_grad():
        layer.weight.copy_(w)
    layer.set_mask(torch.tensor(mask, dtype=torch.bool))
    return layer


def test_a_rigl_swap_drops_the_smallest_and_grows_the_largest_gradients():
    # kept: 5, -1, 3, 2; k = int(.5 * 4) = 2 drops -1 and 2; candidates outside {5, 3} by |g|: g=9 (new), g=7 (just dropped -1)
    layer = _linear([[5.0, -1.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0]], [[1, 1, 0, 0], [0, 1, 1, 0]], 0.5)
    gradient = torch.tensor([[100.0, -7.0, 0.5, 1.0], [-9.0, 100.0, 6.0, 2.0]])
    swap(layer, gradient, 0.5)
    assert layer.mask.tolist() == [[True, True, False, False], [True, True, False, False]]
    assert layer.weight.tolist() == [[5.0, -1.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]  # -1 came back and kept its value


def test_a_rigl_swap_of_too_few_units_changes_nothing():
    layer = _linear([[5.0, -1.0, 0.0, 3.0]], [[1, 1, 0, 1]], 0.75)
    swap(layer, torch.tensor([[0.0, 0.0, 99.0, 0.0]]), 0.3)  # int(.3 * 3) = 0
    assert layer.mask.tolist() == [[True, True, False, True]]


def test_ties_go_to_the_lower_index():
    layer = _linear([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]], [[1, 1, 1, 1, 0, 0]], 4 / 6)
    swap(
        layer, torch.zeros(1, 6), 0.5
    )  # the last two are dropped; of four equal gradients the lower two grow: the same again
    assert layer.mask.tolist() == [[True, True, True, True, False, False]]
    swap(layer, torch.tensor([[0.0, 0, 0, 0, 1, 1]]), 0.5)
    assert layer.mask.tolist() == [[True, True, False, False, True, True]]
    wide = _linear([[1.0] * 2000], [[1] * 1000 + [0] * 1000], 0.5)  # long enough for an unstable sort to shuffle
    swap(wide, torch.ones(1, 2000), 0.5)
    assert wide.mask[0].nonzero().flatten().tolist() == list(range(1000))


def test_rigl_moves_whole_blocks():
    # 2x1 blocks: columns of a 2 x 4 weight; kept columns 0 (sum 3) and 1 (sum 8); the largest gradient sum outside is column 3
    layer = _linear([[1.0, 4.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0]], [[1, 1, 0, 0], [1, 1, 0, 0]], 0.5, "2x1")
    swap(layer, torch.tensor([[1.0, 0.0, 5.0, -3.0], [1.0, 0.0, 0.0, 3.0]]), 0.5)
    assert layer.mask.tolist() == [[False, True, False, True]] * 2


def test_rigl_moves_whole_channels():
    layer = _linear([[1.0, -2.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]], [[1, 1], [0, 0], [1, 1], [0, 0]], 0.5, "channel")
    swap(layer, torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 1.0]]), 0.5)
    assert layer.mask.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]


def test_rigl_swaps_within_the_groups_of_n_of_m():
    # groups of 4; k = int(.3 * 4) = 1: only the group with the smallest kept weight (.5 in the second) changes
    layer = _linear([[3.0, 2.0, 0.0, 0.0, 0.5, 0.0, 9.0, 0.0]], [[1, 1, 0, 0, 1, 0, 1, 0]], 0.5, "2:4")
    swap(layer, torch.tensor([[0.0, 0.0, 99.0, 99.0, 0.0, 2.0, 50.0, 1.0]]), 0.3)
    assert layer.mask.tolist() == [[True, True, False, False, False, True, True, False]]


def test_groups_of_n_of_m_run_along_input_channels_at_one_kernel_position():
    layer = SparseConv2d(4, 3, 3, density=0.25, pattern="1:4")
    mask = torch.zeros(3, 4, 3, 3, dtype=torch.bool)
    mask[:, 0] = True
    layer.set_mask(mask)
    gradient = torch.zeros(3, 4, 3, 3)
    gradient[1, 2, 0, 1] = 1.0
    with torch.no_grad():
        layer.weight[1, 0, 0, 1] = 1e-6  # the weakest
        swap(layer, gradient, 1.5 / 27)
    expected = mask.clone()
    expected[1, 0, 0, 1], expected[1, 2, 0, 1] = False, True
    assert torch.equal(layer.mask, expected)


def test_a_weight_that_grows_starts_at_zero_whatever_was_left_there():
    layer = _linear([[5.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], 0.5)
    with torch.no_grad():
        layer.weight[0, 3] = 7.0
    swap(layer, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 0.5)
    assert layer.mask.tolist() == [[True, False, False, True]]
    assert layer.weight.tolist() == [[5.0, 0.0, 0.0, 0.0]]


def test_the_holder_finds_slots_that_the_optimizer_makes_later():
    layer = _linear([[5.0, 1.0, 0.0, 0.0]], [[1, 1, 0, 0]], 0.5)
    optimizer = torch.optim.Adam(layer.parameters())
    holder = Holder([("layer", layer)])
    holder.hold(optimizer)
    layer.weight.grad = torch.ones(1, 4)  # not masked, as after a change of mask
    optimizer.step()
    holder.hold(optimizer)
    assert layer.weight[0, 2:].tolist() == [0.0, 0.0]
    assert optimizer.state[layer.weight]["exp_avg"][0, 2:].tolist() == [0.0, 0.0]
    assert optimizer.state[layer.weight]["exp_avg"][0, 0] > 0


def test_rigl_refuses_to_rank_what_is_not_finite():
    layer = _linear([[5.0, -1.0, 0.0, 0.0]], [[1, 1, 0, 0]], 0.5)
    with pytest.raises(ValueError, match="not finite"):
        swap(layer, torch.tensor([[1.0, float("nan"), 0.0, 0.0]]), 0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_rigl_update_replaces_the_step_grows_at_the_true_gradient_and_empties_slots(optimizer):
    model, method = network("unstructured"), make_method("rigl", {"interval": 10})
    made = (
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.Adam(model.parameters())
    )
    layer = model[3]
    before = {}

    def check(steps_done):
        if steps_done == 10:
            before.update(
                mask=layer.mask.clone(), weight=layer.weight.detach().clone(), bias=layer.bias.detach().clone()
            )
            x, y = batch(10)
            dense = layer.weight.detach().clone().requires_grad_()
            layer_input = model[:3](x)
            F.cross_entropy(model[4:](F.conv2d(layer_input, dense, layer.bias, padding=1)), y).backward()
            before["gradient"] = dense.grad
            model.zero_grad()
        if steps_done == 11:
            old, new = before["mask"], layer.mask
            grown, gone = new & ~old, old & ~new
            assert int(grown.sum()) == int(gone.sum()) > 0
            assert (layer.weight[grown] == 0).all()
            assert torch.equal(layer.weight[new & old], before["weight"][new & old])  # no optimizer step
            assert torch.equal(layer.bias, before["bias"])
            for slot in ("momentum_buffer",) if optimizer == "sgd" else ("exp_avg", "exp_avg_sq"):
                assert (made.state[layer.weight][slot][grown] == 0).all()
                assert (made.state[layer.weight][slot][gone] == 0).all()
            weakest_grown = before["gradient"].abs()[grown].min()
            strongest_left = before["gradient"].abs()[~old & ~new].max()
            assert weakest_grown >= strongest_left * (1 - 1e-5)

    run(model, method, made, check, steps=30)
    assert before


def test_rigl_makes_about_ten_updates_whatever_the_length_and_none_after_its_end():
    for total in (40, 210, 2000, 100000):
        method = make_method("rigl")
        method.begin(network(), total, torch.Generator())
        updates = [step for step in range(total) if method.is_update(step)]
        assert len(updates) >= 10
        assert updates[-1] < 0.75 * total
        assert updates[0] <= 100


def test_what_gradual_pruning_pruned_stays_pruned_and_the_smallest_go_first():
    model, method = network(), make_method("gradual", {"begin": 0.2, "end": 0.8, "updates": 4})
    layer, masks = model[3], []
    run(model, method, torch.optim.SGD(model.parameters(), 0.1), lambda _: masks.append(layer.mask.clone()), steps=50)
    changes = [t for t in range(1, 51) if not torch.equal(masks[t - 1], masks[t])]
    assert changes == [17, 24, 31, 38]  # from 10 to 40: four intervals of 7 steps
    for earlier, later in itertools.pairwise(masks):
        assert not (later & ~earlier).any()
    kept = [int(mask.sum()) / mask.numel() for mask in masks]
    for n, t in enumerate(changes, start=1):
        assert kept[t] == pytest.approx(1 - cubic_sparsity(n, final=0.7, start=0, interval=1, updates=4), abs=1 / 1152)


def test_gradual_pruning_never_revives_a_weight_when_kept_ones_are_zero():
    layer = SparseLinear(8, 4, density=0.25)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 33.0).view(4, 8))  # the first update keeps the higher indices
    method = make_method("gradual")
    method.begin(layer, 10, torch.Generator())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    seen = layer.mask.clone()
    for step in range(10):
        method.after_step(step, optimizer)
        assert not (layer.mask & ~seen).any()
        seen = layer.mask.clone()
        with torch.no_grad():
            layer.weight.zero_()
    assert layer.nnz == 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gradual", {"begin": 0.8}, "begin must be below end"),
        ("gradual", {"end": 1.5}, r"end: expected a number in \[0, 1\], got 1.5"),
        ("gradual", {"updates": 0}, "updates: expected a whole number >= 1"),
        ("rigl", {"zeta": 0}, 'zeta: expected a number above 0, got 0; method "static"'),
        ("rigl", {"interval": 2.5}, "interval: expected a whole number"),
        ("rigl", {"alpha": 1}, '"rigl" has no option "alpha"; known: zeta, end, interval'),
        ("static", {"x": 1}, '"static" has no option "x"; known: none'),
    ],
)
def test_senseless_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_method(name, options)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownName, match='did you mean "rigl"'):
        make_method("rigll")


@pytest.mark.parametrize("pattern", [Unstructured(), Channel(), Block(2, 1), Block(1, 2), Block(4, 2)])
@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3, 3)])
def test_expanding_unit_sums_of_ones_gives_the_unit_size_everywhere(pattern, shape):
    sums = unit_sums(torch.ones(shape), pattern)
    size = torch.ones(shape).numel() // len(sums)
    assert torch.equal(expand(sums, shape, pattern), torch.full(shape, float(size)))


def test_block_sums_equal_plain_loops():
    values = torch.arange(2 * 4 * 4 * 3, dtype=torch.float64).reshape(8, 4, 1, 3)
    slow = [
        sum(float(values[o + a, i + b, 0, k]) for a in range(2) for b in range(2))
        for o in range(0, 8, 2)
        for i in range(0, 4, 2)
        for k in range(3)
    ]
    assert unit_sums(values, Block(2, 2)).tolist() == slow


def test_n_of_m_has_no_whole_units():
    with pytest.raises(TypeError, match="2:4 has no units"):
        unit_sums(torch.ones(4, 4), NM(2, 4))
    with pytest.raises(TypeError, match="2:4 has no units"):
        expand(torch.ones(4), (4, 4), NM(2, 4))
    assert n_of_m_groups(torch.arange(8).reshape(1, 8), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


class TestFixed:
    def test_any_mask_stays_as_it_was_given_whatever_its_count(self):
        torch.manual_seed(0)
        model = nn.Sequential(SparseLinear(8, 6, density=0.5), nn.ReLU(), SparseLinear(6, 3, density=0.5))
        masks = [torch.rand(layer.weight.shape) < 0.2 for layer in (model[0], model[2])]
        for layer, mask in zip((model[0], model[2]), masks, strict=True):
            layer.mask.copy_(mask)  # the weights outside are not zero yet
        data = from_datasets((torch.randn(60, 8), torch.arange(60) % 3))
        train(model, data, TrainConfig(epochs=2, batch_size=16, method="fixed", device="cpu"), seed=1)
        for layer, mask in zip((model[0], model[2]), masks, strict=True):
            assert torch.equal(layer.mask, mask)
            assert (layer.weight[~mask] == 0).all()
            assert (layer.weight[mask] != 0).any()

    def test_a_network_without_masks_is_refused(self):
        model = nn.Sequential(SparseLinear(8, 3, density=0.5))
        with pytest.raises(EvaluationFailed, match=r'expected masks.*train.method = "static"'):
            make_method("fixed").begin(model, 10, torch.Generator())
