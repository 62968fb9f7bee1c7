"""Networks of learned masks: twins, frozen masks, plans, state, and one density spread over their layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ops.allocation import AllocationError, allocate
from ops.layers import SparseConv2d, SparseLinear, draw_masks_, sparsify
from ops.learned import (
    LearnedSparseConv2d,
    LearnedSparseLinear,
    freeze_masks_,
    learn_masks,
    learned_layers,
    set_density_,
    weight_of,
)
from ops.masks import kept_count, topk_mask, zero_count
from ops.patterns import PatternError, parse_pattern
from ops.plan import lower
from ops.rankings import global_densities

torch.set_num_threads(1)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def slow_mask(layer):
    return topk_mask(layer.score.detach().abs(), layer.density, layer.pattern)


class TestNetworks:
    def test_twins_share_parameters_and_places(self):
        net = network()
        shared = nn.Sequential(net, net[4])
        weights = dict(net.named_parameters())
        assert learn_masks(shared, 0.25) is shared
        layers = learned_layers(net)
        assert [name for name, _ in layers] == ["0", "3", "4", "7"]
        for name, layer in layers:
            assert layer.weight is weights[f"{name}.weight"]
            assert torch.equal(layer.mask, topk_mask(layer.weight.detach().abs(), 0.25))
        assert shared[1] is net[4]
        assert learn_masks(shared, 0.5)[0][0].density == 0.25  # learned ones are left
        single = learn_masks(sparsify(nn.Linear(8, 4), 0.5), 0.25, scores="kaiming_normal")
        assert isinstance(single, LearnedSparseLinear)
        assert single.bias is not None

    def test_where_and_illegal_patterns_as_for_fixed_masks(self):
        net = learn_masks(network(), 0.5, "2:4", where=lambda name, layer: name in ("4", "7"))
        assert [name for name, _ in learned_layers(net)] == ["4", "7"]
        net = network()
        with pytest.raises(PatternError, match=r"^0: 2:4 sparsity needs"):
            learn_masks(net, 0.5, "2:4")
        assert not learned_layers(net)

    def test_weight_of_every_kind_of_layer(self):
        plain = nn.Linear(4, 4)
        assert weight_of(plain) is plain.weight
        fixed = SparseLinear(4, 4, density=0.5)
        draw_masks_(fixed, torch.Generator().manual_seed(0))
        assert torch.equal(weight_of(fixed), fixed.weight * fixed.mask)
        learned = learn_masks(plain, 0.25)
        assert torch.equal(weight_of(learned), learned.weight * slow_mask(learned))

    def test_frozen_masks_are_ordinary_layers_of_the_same_output(self):
        net, x = learn_masks(network(), 0.25).eval(), torch.randn(3, 1, 6, 6)
        net[4].set_target(0.5, "2:4")
        net[7].set_target(1.0)
        expected, masks = net(x), [layer.mask for _, layer in learned_layers(net)]
        assert freeze_masks_(net) is net
        assert [type(net[i]) for i in (0, 3, 4, 7)] == [SparseConv2d] * 3 + [SparseLinear]
        for i, mask in zip((0, 3, 4, 7), masks, strict=True):
            assert torch.equal(net[i].mask, mask)
            assert (net[i].weight[~mask] == 0).all()
        assert torch.equal(net(x), expected)
        assert (net[4].density, str(net[4].pattern)) == (0.5, "2:4")
        assert not [key for key in net.state_dict() if "score" in key]
        assert isinstance(freeze_masks_(LearnedSparseConv2d(8, 4, 3, density=0.5)), SparseConv2d)

    def test_lowering_gives_the_plan_of_the_frozen_twin(self):
        learned = learn_masks(network(), 0.25).eval()
        frozen = freeze_masks_(copy.deepcopy(learned))
        learned[4].set_options([(1.0, None)])
        learned[4].gates = torch.ones(1)  # of one step, and no matter of a plan
        plans = [lower(net, torch.zeros(1, 1, 6, 6)) for net in (learned, frozen)]
        assert [str(op) for op in plans[0].ops] == [str(op) for op in plans[1].ops]
        assert plans[0].macs == plans[1].macs < plans[0].dense_macs

    def test_state_dict_deepcopy_pickle_and_dtype_keep_the_masks(self):
        net = learn_masks(network(), 0.25)
        for _, layer in learned_layers(net):
            layer.init_scores("kaiming_normal")
            layer.set_options([(1.0, None), (0.5, None)])
            layer.gates = torch.softmax(torch.zeros(2, requires_grad=True), 0)
        state = net.state_dict()
        assert not [key for key in state if key.endswith("mask")]
        loaded = learn_masks(network(seed=5), 0.25)
        loaded.load_state_dict(state)
        for other in (loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded).double()):
            for (_, a), (_, b) in zip(learned_layers(net), learned_layers(other), strict=True):
                assert torch.equal(a.mask, b.mask)
                assert b.gates is None

    def test_on_the_meta_device(self):
        net = learn_masks(network().to("meta"), 0.25)
        set_density_(net, 0.5, "erk")
        assert net(torch.empty(2, 1, 6, 6, device="meta")).shape == (2, 3)
        assert net[4].planned_nnz == kept_count(net[4].weight.shape, net[4].density)
        with pytest.raises(RuntimeError, match="planned_nnz"):
            _ = net[4].nnz

    def test_masks_cannot_be_set_and_weights_outside_stay(self):
        layer = LearnedSparseConv2d(8, 4, 3, density=0.5)
        with pytest.raises(TypeError, match="freeze_masks_"):
            draw_masks_(layer, torch.Generator())
        before = layer.weight.detach().clone()
        layer.apply_mask_()
        assert torch.equal(layer.weight, before)
        layer.reset_parameters()
        assert not torch.equal(layer.weight, before)


class TestDensityOverLayers:
    def test_uniform_erk_and_exemptions(self):
        net = learn_masks(network())
        assert set_density_(net, 0.25) == dict.fromkeys(["0", "3", "4", "7"], 0.25)
        shapes = {name: tuple(layer.weight.shape) for name, layer in learned_layers(net)}
        assert set_density_(net, 0.25, "erk") == allocate(shapes, 0.25, "erk")
        assert [net[i].density for i in (0, 3, 4, 7)] == list(allocate(shapes, 0.25, "erk").values())
        assert set_density_(net, 0.2, exempt="stem") == {"0": 1, "3": 0.2, "4": 0.2, "7": 0.2}
        assert set_density_(net, 0.2, exempt=("classifier", "depthwise")) == {"0": 0.2, "3": 1, "4": 0.2, "7": 1}
        assert set_density_(net, 0.2, exempt=lambda name, layer: name == "4") == {"0": 0.2, "3": 0.2, "4": 1, "7": 0.2}
        layers = learned_layers(net)
        assert set_density_(layers[:2], 0.3) == {"0": 0.3, "3": 0.3}
        assert set_density_([layer for _, layer in layers[:2]], 0.4, "global").keys() == {"0", "1"}
        assert net[7].density == 0.2
        assert set_density_(net, 1.0, "global") == dict.fromkeys(["0", "3", "4", "7"], 1.0)

    def slow_global(self, layers, density):
        """Every unit as a row (first of its layer?, value, order); taken from the top until the total is met."""
        rows, total = [], 0
        for place, (_, layer) in enumerate(layers):
            scores = layer.score.detach().double().abs()
            flat = (scores / scores.mean()).flatten().tolist()
            best = flat.index(max(flat))
            rows += [(float("inf") if i == best else v, -place, -i) for i, v in enumerate(flat)]
            total += len(flat)
        chosen = sorted(rows, reverse=True)[: total - zero_count(total, density)]
        counts = [sum(1 for row in chosen if row[1] == -place) for place in range(len(layers))]
        return [kept / layer.weight.numel() for kept, (_, layer) in zip(counts, layers, strict=True)]

    @pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.37, 0.9, 0.999])
    def test_one_ranking_over_all_layers_is_exact_in_the_total_and_as_by_hand(self, density):
        net = learn_masks(network(), scores="kaiming_normal")
        layers = learned_layers(net)
        with torch.no_grad():
            net[4].score.mul_(100).pow_(3)
        set_density_(net, density, "global")
        assert [layer.density for _, layer in layers] == self.slow_global(layers, density)
        total = sum(layer.weight.numel() for _, layer in layers)
        assert sum(layer.nnz for _, layer in layers) == total - zero_count(total, density)
        assert all(layer.nnz >= 1 for _, layer in layers)

    def test_masks_of_one_global_ranking_nest_and_do_not_depend_on_a_layers_scale(self):
        net = learn_masks(network(), scores="kaiming_normal")
        layers, smaller = learned_layers(net), None
        with torch.no_grad():
            net[0].score.copy_(net[0].score.sign())  # ties
        for density in (0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
            set_density_(layers, density, "global")
            masks = [layer.mask for _, layer in layers]
            assert smaller is None or not any((a & ~b).any() for a, b in zip(smaller, masks, strict=True))
            smaller = masks
            kept = {name: layer.density for name, layer in layers}
            with torch.no_grad():
                net[3].score.mul_(4.0)
            assert set_density_(net, density, "global") == kept

    def test_blocks_and_channels_are_ranked_by_the_mean_of_their_weights(self):
        patterns = {"a": parse_pattern("unstructured"), "b": parse_pattern("2x1"), "c": parse_pattern("channel")}
        scores = {
            "a": torch.tensor([[4.0, 0.0], [0.0, 0.0]]),  # mean 1
            "b": torch.tensor([[3.0, 1.0], [3.0, 1.0]]),  # mean 2: units 1.5, 0.5
            "c": torch.tensor([[1.0, 2.0], [0.5, 0.5]]),  # mean 1: units 1.5, 0.5
        }
        assert global_densities(scores, 5 / 12, patterns) == {"a": 0.25, "b": 0.5, "c": 0.5}
        assert global_densities(scores, 6 / 12, patterns) == {"a": 0.25, "b": 1.0, "c": 0.5}
        assert global_densities(scores, 8 / 12, patterns) == {"a": 0.25, "b": 1.0, "c": 1.0}
        assert global_densities(scores, 10 / 12, patterns) == {"a": 0.5, "b": 1.0, "c": 1.0}

    def test_layers_of_n_of_m_keep_their_density_and_are_left_out(self):
        net = learn_masks(network())
        net[4].set_target(0.5, "2:4")
        for rule in ("uniform", "erk", "global"):
            assert set_density_(net, 0.25, rule)["4"] == 0.5
        rest = [net[i] for i in (0, 3, 7)]
        total = sum(layer.weight.numel() for layer in rest)
        assert sum(layer.nnz for layer in rest) == total - zero_count(total, 0.25)
        assert set_density_(net, 1.0)["4"] == 1.0

    def test_what_is_impossible_is_refused_and_changes_nothing(self):
        net = learn_masks(network())
        set_density_(net, 0.5)
        cases = [
            ((0.001, "global"), {}, AllocationError, "at least one weight, block or channel in each of the 4 layers"),
            ((0.3, "globl"), {}, AllocationError, 'did you mean "global"'),
            ((0.3, "lamp"), {}, AllocationError, 'unknown rule "lamp"'),
            ((0.3,), {"exempt": ("stm",)}, ValueError, r"unknown exemption \['stm'\]; known: stem"),
            ((0.0,), {}, ValueError, "overall density"),
        ]
        for arguments, keywords, error, text in cases:
            with pytest.raises(error, match=text):
                set_density_(net, *arguments, **keywords)
        net[0].set_target(1.0, "2:4")
        for rule in ("uniform", "global"):
            with pytest.raises(PatternError, match=r"^0: 2:4"):
                set_density_(net, 0.3, rule)
        assert [net[i].density for i in (0, 3, 4, 7)] == [1.0, 0.5, 0.5, 0.5]
        with pytest.raises(TypeError, match="expected learned layers, got Linear"):
            set_density_([nn.Linear(2, 2)], 0.5)
        net[0].set_target(1.0, "unstructured")
        with torch.no_grad():
            net[3].score[0] = torch.inf
        with pytest.raises(ValueError, match="the scores of 3 are not finite"):
            set_density_(net, 0.3, "global")
