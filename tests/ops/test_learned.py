"""Layers with learned masks: exact counts, straight-through gradients, mixtures, replaced tensors, nothing stale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ops.learned import (
    LearnedSparseConv2d,
    LearnedSparseLinear,
)
from ops.masks import kept_count, satisfies, topk_mask
from ops.patterns import PatternError, parse_pattern
from ops.rankings import Remembered, Target, select, select_many

torch.set_num_threads(1)

TARGETS = [
    (0.3, "unstructured"),
    (0.5, "2:4"),
    (0.25, "1:4"),
    (0.3, "4x1"),
    (0.4, "2x2"),
    (0.3, "channel"),
    (1.0, "unstructured"),
]


def conv(density=0.3, pattern="unstructured", seed=0, **keywords):
    torch.manual_seed(seed)
    keywords = {"padding": 1, "bias": False, **keywords}
    return LearnedSparseConv2d(8, 16, 3, density=density, pattern=pattern, **keywords)


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


class TestMasks:
    def test_the_vector_of_the_method(self):
        layer = LearnedSparseLinear(4, 1, density=0.5)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, -2, 3, -4]]))
            layer.bias.zero_()
            layer.score.copy_(torch.tensor([[0.1, -0.4, 0.3, -0.2]]))
        y = layer(torch.ones(4))
        y.backward()
        assert y.item() == 1
        assert layer.mask.tolist() == [[False, True, True, False]]
        assert layer.weight.grad.tolist() == [[0, 1, 1, 0]]
        assert layer.score.grad.tolist() == [[1, 2, 3, 4]]

    @pytest.mark.parametrize(
        ("n", "kept"),
        [
            (144, (2, 8, 15)),
            (256, (3, 13, 26)),
            (324, (4, 17, 33)),
            (900, (9, 45, 90)),
            (1296, (13, 65, 130)),
            (2916, (30, 146, 292)),
            (5184, (52, 260, 519)),
        ],
    )
    def test_counts_are_those_of_dass(self, n, kept):
        layer = LearnedSparseLinear(n // 4, 4)
        for density, expected in zip((0.01, 0.05, 0.1), kept, strict=True):
            layer.set_target(density)
            assert layer.nnz == layer.planned_nnz == expected == int((layer.effective_weight() != 0).sum())

    @pytest.mark.parametrize(("density", "pattern"), TARGETS)
    @pytest.mark.parametrize("kind", ["random", "ties", "equal", "infinite", "float64", "channels_last", "view"])
    def test_selecting_gives_the_mask_of_the_definition(self, density, pattern, kind):
        torch.manual_seed(1)
        scores = torch.randn(16, 8, 3, 3)
        if kind == "ties":
            scores = scores.round()
        elif kind == "equal":
            scores = torch.ones_like(scores)
        elif kind == "infinite":
            scores[scores > 1] = -torch.inf
        elif kind == "float64":
            scores = scores.double()
        elif kind == "channels_last":
            scores = scores.contiguous(memory_format=torch.channels_last)
        elif kind == "view":
            scores = torch.randn(20, 12, 3, 3)[:16, 2:10]
        target, free = Target(density, parse_pattern(pattern)), parse_pattern("unstructured")
        expected = topk_mask(scores.abs(), density, pattern)
        assert torch.equal(select(scores, target), expected)
        both = select_many(scores, [Target(1.0, free), target, Target(0.1, free)])
        assert both[0].all()
        assert torch.equal(both[1], expected)
        assert torch.equal(both[2], topk_mask(scores.abs(), 0.1))
        factor = Remembered(scores).factors(target)
        assert torch.equal(factor.bool(), expected)
        assert (factor.dtype, factor.shape) == (scores.dtype, scores.shape)
        assert kind == "view" or factor.stride() == scores.stride()

    def test_by_hand_ties_keep_the_lower_index_and_the_sign_does_not_count(self):
        layer = LearnedSparseLinear(4, 2, density=0.5)
        for scores, pattern, kept in [
            ([[1, -1, 1, 1], [-1, 1, 1, 1]], "unstructured", [[1, 1, 1, 1], [0, 0, 0, 0]]),
            ([[1, -9, 2, 3], [4, 1, -5, 0]], "unstructured", [[0, 1, 0, 1], [1, 0, 1, 0]]),
            ([[1, -9, 2, 3], [4, 1, -5, 0]], "2:4", [[0, 1, 0, 1], [1, 0, 1, 0]]),
            ([[7, -9, 2, 3], [0, 1, -5, 0]], "2:4", [[1, 1, 0, 0], [0, 1, 1, 0]]),
            ([[1, -9, 2, 3], [4, 1, -5, 0]], "2x1", [[0, 1, 1, 0], [0, 1, 1, 0]]),
            ([[1, -9, 2, 3], [4, 1, -5, 0]], "1x2", [[1, 1, 0, 0], [0, 0, 0, 0]]),
            ([[1, -9, 2, 3], [4, 1, -5, 0]], "channel", [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ]:
            density = 0.25 if pattern == "1x2" else 0.5
            layer.set_target(density, pattern)
            with torch.no_grad():
                layer.score.copy_(torch.tensor(scores))
            assert layer.mask.int().tolist() == kept, pattern

    @pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x2", "channel"])
    def test_masks_of_one_score_nest(self, pattern):
        layer, smaller = conv(pattern=pattern), None
        for density in (0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
            layer.set_target(density)
            assert smaller is None or not (smaller & ~layer.mask).any()
            smaller = layer.mask
            assert satisfies(smaller, pattern)
            assert layer.nnz == kept_count(layer.weight.shape, density, pattern)

    @pytest.mark.parametrize(("density", "pattern"), TARGETS)
    def test_with_scaled_scores_the_first_mask_is_that_of_the_largest_weights(self, density, pattern):
        layer = conv(density, pattern)
        layer.init_scores("scaled")
        assert float(layer.score.detach().abs().max()) == pytest.approx((6 / 72) ** 0.5)
        assert torch.equal(layer.score.sign(), layer.weight.sign())
        assert torch.equal(layer.mask, topk_mask(layer.weight.detach().abs(), density, pattern))

    def test_initial_scores_have_their_spread_and_one_seed_gives_one_result(self):
        layer, again = conv(), conv(seed=9)
        for how, largest in (("kaiming_uniform", (1 / 72) ** 0.5), ("kaiming_normal", 5 * (2 / 72) ** 0.5)):
            for one in (layer, again):
                one.init_scores(how, torch.Generator().manual_seed(3))
            assert torch.equal(layer.score, again.score)
            assert 0.7 * largest < float(layer.score.detach().abs().max()) <= largest
        assert float(layer.score.detach().std()) == pytest.approx((2 / 72) ** 0.5, rel=0.1)
        with torch.no_grad():
            layer.weight.zero_()
        layer.init_scores("scaled")
        assert (layer.score == 0).all()
        with pytest.raises(ValueError, match='"xavier"; known: kaiming_uniform'):
            layer.init_scores("xavier")

    def test_nan_scores_are_an_error(self):
        layer = conv()
        with torch.no_grad():
            layer.score[3, 2, 1, 1] = torch.nan
        with pytest.raises(ValueError, match="1 of 1152 scores are NaN"):
            layer(torch.ones(1, 8, 4, 4))
        layer.set_options([(0.5, None)])
        layer.gates = torch.ones(1)
        with pytest.raises(ValueError, match="1 of 1152 scores are NaN"):
            layer(torch.ones(1, 8, 4, 4))


class TestGradients:
    @pytest.mark.parametrize(("density", "pattern"), TARGETS)
    @pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
    def test_they_are_those_of_the_formula(self, density, pattern, kind):
        torch.manual_seed(0)
        if kind == "linear":
            layer, x = LearnedSparseLinear(8, 16, density=density, pattern=pattern), torch.randn(5, 8)
            apply = lambda w: F.linear(x, w, layer.bias)  # noqa: E731
        elif kind == "conv":
            layer, x = conv(density, pattern, stride=2), torch.randn(2, 8, 6, 6)
            apply = lambda w: F.conv2d(x, w, None, 2, 1)  # noqa: E731
        else:
            if pattern not in ("unstructured", "channel"):
                pytest.skip("not possible on a depthwise layer")
            layer = LearnedSparseConv2d(8, 16, 3, groups=8, bias=False, density=density, pattern=pattern)
            x = torch.randn(2, 8, 6, 6)
            apply = lambda w: F.conv2d(x, w, groups=8)  # noqa: E731
        effective = (layer.weight * slow_mask(layer)).detach().requires_grad_()
        expected = apply(effective)
        loss = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        (G,) = torch.autograd.grad((expected * loss).sum(), effective)
        y = layer(x)
        (y * loss).sum().backward()
        assert torch.equal(y, expected)
        assert torch.equal(layer.weight.grad, G * slow_mask(layer))
        assert torch.equal(layer.score.grad, layer.score.sign() * (layer.weight * G))
        assert (layer.score.grad[~slow_mask(layer)] != 0).any() or density == 1

    def test_with_the_mask_held_they_are_the_finite_differences(self):
        layer = conv(0.4, "unstructured", dtype=torch.float64)
        x = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, w: functional_call(layer, {"weight": w}, x), (x, layer.weight), fast_mode=True
        )
        layer.set_options([(1.0, None), (0.5, "2:4"), (0.1, None)])
        gates = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)

        def mixed(gates, w):
            layer.gates = gates
            return functional_call(layer, {"weight": w}, x.detach())

        assert torch.autograd.gradcheck(mixed, (gates, layer.weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(mixed, (gates, layer.weight), fast_mode=True)

    def test_no_sign_at_zero(self):
        layer = LearnedSparseLinear(2, 1, density=0.5)
        with torch.no_grad():
            layer.score.zero_()
        layer(torch.ones(2)).sum().backward()
        assert layer.score.grad.tolist() == [[0, 0]]
        assert layer.mask.tolist() == [[True, False]]

    @pytest.mark.parametrize("train_scores", [False, True])
    def test_density_one_is_torchs_layer_bit_for_bit(self, train_scores):
        torch.manual_seed(0)
        plain = nn.Conv2d(8, 16, 3, padding=1)
        layer = conv(1.0, seed=0, bias=True)
        layer.train_scores(train_scores)
        x = torch.randn(2, 8, 5, 5, requires_grad=True)
        results = []
        for one in (plain, layer):
            y = one(x)
            results.append([y, *torch.autograd.grad((y**2).sum(), [x, one.weight, one.bias])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert train_scores or layer.effective_weight() is layer.weight

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_the_dense_gradient_is_that_at_the_effective_weight(self, density, gated):
        layer, x = conv(density), torch.randn(2, 8, 4, 4)
        layer.set_options([(1.0, None), (0.2, None)])
        layer.gates = torch.tensor([0.25, 0.75]) if gated else None
        layer.capture_dense_grad = True
        (layer(x) ** 2).sum().backward()
        W = layer.effective_weight().detach().requires_grad_()
        (F.conv2d(x, W, padding=1) ** 2).sum().backward()
        assert torch.equal(layer.dense_grad, W.grad)

    def test_switches_say_what_is_trained_and_drop_gradients(self):
        layer = conv(bias=True)
        for weights, scores in [(True, False), (False, True), (True, True), (False, False)]:
            layer.train_weights(weights)
            layer.train_scores(scores)
            y = layer(torch.ones(1, 8, 3, 3, requires_grad=True)).sum()
            y.backward()
            assert (layer.weight.grad is not None, layer.bias.grad is not None) == (weights, weights)
            assert (layer.score.grad is not None) == scores


class TestMixtures:
    OPTIONS = ((1.0, None), (0.5, "2:4"), (0.25, None), (0.25, "channel"), (0.05, None))

    def masks(self, layer):
        return [topk_mask(layer.score.detach().abs(), d, p or "unstructured") for d, p in self.OPTIONS]

    def test_the_weight_and_all_gradients_are_those_of_the_sum(self):
        layer, x = conv(0.3), torch.randn(2, 8, 5, 5)
        layer.set_options(self.OPTIONS)
        gates = torch.softmax(torch.arange(5.0), 0).requires_grad_()
        layer.gates = gates
        effective = layer.weight * sum(g * m for g, m in zip(gates.detach(), self.masks(layer)))
        assert torch.allclose(layer.effective_weight(), effective, rtol=1e-6, atol=0)
        effective = effective.detach().requires_grad_()
        (G,) = torch.autograd.grad((F.conv2d(x, effective, padding=1) ** 2).sum(), effective)
        (layer(x) ** 2).sum().backward()
        close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
        assert close(layer.weight.grad, G * sum(g * m for g, m in zip(gates.detach(), self.masks(layer))))
        assert close(layer.score.grad, layer.score.sign() * layer.weight * G)
        expected = torch.stack([(m * layer.weight * G).sum() for m in self.masks(layer)])
        assert close(gates.grad, expected)

    def test_one_gate_of_one_is_that_option_alone_bit_for_bit(self):
        layer = conv(0.3)
        layer.set_options(self.OPTIONS)
        for i, mask in enumerate(self.masks(layer)):
            layer.gates = F.one_hot(torch.tensor(i), 5).float()
            assert torch.equal(layer.effective_weight(), layer.weight * mask)
        layer.gates = None
        assert torch.equal(layer.effective_weight(), layer.weight * slow_mask(layer))

    def test_masks_are_selected_once_while_nothing_changes(self, monkeypatch):
        calls = []
        monkeypatch.setattr("ops.rankings.select_many", lambda *a: calls.append(a) or select_many(*a))
        monkeypatch.setattr("ops.rankings.select", lambda *a: calls.append(a) or select(*a))
        layer = conv(0.3)
        layer.set_options(self.OPTIONS)
        for gates in (torch.ones(5), torch.zeros(5), None, torch.ones(5), None):
            layer.gates = gates
            layer(torch.ones(1, 8, 3, 3))
            with torch.no_grad():
                layer.weight.mul_(1.1)  # which the masks do not depend on
        assert len(calls) == 2
        layer.set_target(0.2)
        layer(torch.ones(1, 8, 3, 3))
        assert len(calls) == 3
        with torch.no_grad():
            layer.score.add_(1)
        layer(torch.ones(1, 8, 3, 3))
        assert len(calls) == 4

    def test_what_does_not_fit_is_refused(self):
        layer = conv(0.3)
        with pytest.raises(ValueError, match=r"expected one gate for each of the 0 options, got shape \[2\]"):
            layer.gates = torch.ones(2)
        with pytest.raises(ValueError, match=r"density 0\.5"):
            layer.set_options([(0.3, "2:4")])
        with pytest.raises(PatternError, match="divisible by 3"):
            layer.set_options([(0.3, "3x1")])
        layer.set_options([(0.3, None)])
        layer.gates = torch.ones(1)
        layer.set_options([(0.3, None), (0.2, None)])
        assert layer.gates is None


class TestNothingIsStale:
    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s.neg_().add_(0.01),
            lambda s: s.data.add_(torch.linspace(-1, 1, s.numel()).view(s.shape)),
            lambda s: setattr(s, "data", torch.linspace(-1, 1, s.numel()).view(s.shape)),
            lambda s: torch._foreach_mul_([s], [torch.linspace(-1, 1, s.numel()).view(s.shape)]),
        ],
    )
    @torch.no_grad()
    def test_after_changes_in_place(self, change):
        layer = conv(0.3)
        before = layer.mask
        change(layer.score)
        assert torch.equal(layer.effective_weight(), layer.weight * slow_mask(layer))
        assert not torch.equal(before, layer.mask)

    @pytest.mark.parametrize("kind", ["sgd", "fused sgd", "fused adamw", "foreach adam"])
    def test_after_a_step_of_an_optimizer(self, kind):
        layer = conv(0.3)
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind.split()[-1]]
        ways = {"fused": True} if kind.startswith("fused") else {"foreach": True} if "foreach" in kind else {}
        optimizer = make([layer.score], lr=0.1, **ways)
        for _ in range(3):
            before = layer.mask
            optimizer.zero_grad()
            (layer(torch.randn(2, 8, 4, 4)) ** 2).sum().backward()
            optimizer.step()
            assert torch.equal(layer.effective_weight(), layer.weight * slow_mask(layer))
            assert not torch.equal(layer.mask, before)

    def test_with_weight_and_score_replaced_by_views_of_larger_tensors(self):
        layer = LearnedSparseConv2d(8, 16, 3, padding=1, bias=False, density=0.3)
        W = torch.randn(24, 12, 3, 3, requires_grad=True)
        S = torch.randn(24, 12, 3, 3, requires_grad=True)
        for out, width in [(16, 8), (24, 12), (8, 4), (16, 8), (20, 12), (12, 12), (8, 8)] * 2:
            for start in (0, 1):
                view = lambda t, a=start, o=out, i=width: t[a : a + o, :i]  # noqa: E731
                x = torch.randn(1, width, 4, 4)
                y = functional_call(layer, {"weight": view(W), "score": view(S)}, x)
                mask = topk_mask(view(S).detach().abs(), 0.3)
                assert torch.equal(y, F.conv2d(x, view(W) * mask, padding=1))
                gW, gS = torch.autograd.grad((y**2).sum(), (W, S))
                assert ((view(gW) != 0) == (mask & (view(gW) != 0))).all()
                assert (gS != 0).sum() > mask.sum()  # also outside the mask
            with torch.no_grad():
                S.mul_(torch.randn_like(S))
        assert len(layer._remembered) <= 4
        assert torch.equal(layer.effective_weight(), layer.weight * slow_mask(layer))

    def test_memory_given_to_another_tensor_is_not_taken_for_the_same(self):
        layer, weight = conv(0.3), torch.randn(16, 8, 3, 3)
        for seed in range(20):
            score = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
            mask = topk_mask(score.abs(), 0.3)
            got = functional_call(layer, {"weight": weight, "score": score}, torch.ones(1, 8, 3, 3))
            assert torch.equal(got, F.conv2d(torch.ones(1, 8, 3, 3), weight * mask, padding=1))
            del score

    @torch.no_grad()
    def test_without_looking_at_the_content_it_remembers_frozen_scores_of_one_place_only(self):
        score = torch.randn(4, 4)
        known = Remembered(score, by_content=False)
        assert known.still(score)
        assert known.still(score.detach())
        assert not known.still(score.clone())
        assert not known.still(score.t())
        assert not known.still(score[:2])
        assert not known.still(score.double())
        score.add_(1)
        assert not known.still(score)
        trained = nn.Parameter(score)
        known = Remembered(trained, by_content=False)
        assert not known.still(trained)
        assert not Remembered(trained[:2], by_content=False).still(trained[:2])
        with torch.inference_mode():
            inside = torch.randn(4, 4)
            assert not Remembered(inside, by_content=False).still(inside)

    def test_what_was_remembered_in_inference_can_be_trained_with(self):
        layer = conv(0.3)
        with torch.inference_mode():
            layer(torch.ones(1, 8, 3, 3))
        layer(torch.ones(1, 8, 3, 3)).sum().backward()
        assert layer.score.grad is not None

    def test_small_steps_back_and_forth_in_place_change_nothing(self):
        layer, x = conv(0.3), torch.randn(2, 8, 4, 4)
        y = layer(x)
        vectors = [torch.randn_like(p) * 1e-3 for p in layer.parameters()]
        saved = [p.detach().clone() for p in layer.parameters()]
        with torch.no_grad():
            for sign in (1, -2):
                torch._foreach_add_(list(layer.parameters()), vectors, alpha=sign)
                assert torch.equal(layer(x), F.conv2d(x, layer.weight * slow_mask(layer), padding=1))
            for parameter, before in zip(layer.parameters(), saved):
                parameter.copy_(before)
        assert torch.equal(layer(x), y)

    @pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it does itself
    def test_in_a_compiled_graph(self):
        layer, x = conv(0.3), torch.randn(2, 8, 4, 4)
        compiled = torch.compile(layer, backend="eager")
        for _ in range(2):
            y = compiled(x)
            assert torch.equal(y, layer(x))
            with torch.no_grad():
                layer.score.data.mul_(torch.randn(layer.score.shape))
