"""HYDRA's three stages: what moves in each, scores against the formula, weights that return, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nas.errors import ConfigError
from nas.training import TrainConfig, make_method, train
from nas.training.methods.base import targets
from nas.training.methods.hydra import Hydra
from nas.training.optim import make_optimizer
from ops.masks import kept_count, satisfies, topk_mask
from tests.conformance.test_sparsity_methods import OPTIMIZERS, batch, network, run, toy_data

torch.set_num_threads(1)

STEPS, START, END = 50, 25, 35


def recorded(model, method, optimizer):
    """State dict at every step boundary of a run."""
    states = []
    run(model, method, optimizer, lambda _: states.append({k: v.clone() for k, v in model.state_dict().items()}))
    return states


def dense_weights(model, optimizer):
    """Fills with the weights as each step of the optimizer leaves them, before the method sees them."""
    seen, step = [], optimizer.step

    def stepped():
        step()
        seen.append({name: layer.weight.detach().clone() for name, layer in targets(model)})

    optimizer.step = stepped
    return seen


class TestStages:
    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_in_the_middle_weights_stand_still_and_all_else_trains_on(self, optimizer):
        model = network("2x2")
        optimizer = OPTIMIZERS[optimizer](model.parameters())
        dense = dense_weights(model, optimizer)
        states = recorded(model, Hydra(score_lr=30.0), optimizer)
        came = 0
        for name, layer in targets(model):
            weight, mask = f"{name}.weight", f"{name}.mask"
            assert all(state[mask].all() for state in states[:START])
            for before, after in zip(states[START:END], states[START + 1 : END + 1], strict=True):
                assert torch.equal(after[weight], dense[START - 1][name] * after[mask])
                came += int((after[mask] & ~before[mask]).sum())
            assert all(torch.equal(state[mask], states[END][mask]) for state in states[END:])
            assert not torch.equal(states[END][weight], states[-1][weight])
            assert satisfies(layer.mask, layer.pattern)
            assert (layer.weight[~layer.mask] == 0).all()
        assert came > 0
        for key in ("0.bias", "1.weight", "3.bias", "9.weight"):
            assert not torch.equal(states[START][key], states[END][key]), key

    def test_before_it_begins_it_is_dense_training_bit_for_bit(self):
        model, dense = network(), network()
        states = recorded(model, Hydra(), OPTIMIZERS["sgd"](model.parameters()))
        for module in dense.modules():
            if hasattr(module, "set_target"):
                module.set_target(1.0, "unstructured")
        theirs = recorded(dense, make_method("static"), OPTIMIZERS["sgd"](dense.parameters()))
        for ours, other in zip(states[:START], theirs[:START], strict=True):
            assert all(torch.equal(ours[key], other[key]) for key in other)

    def test_the_first_mask_is_that_of_the_largest_weights(self):
        model = network("4x1")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dense = dense_weights(model, optimizer)
        states = recorded(model, Hydra(), optimizer)
        for name, layer in targets(model):
            mask = topk_mask(dense[START - 1][name].abs(), layer.density, layer.pattern)
            assert torch.equal(states[START][f"{name}.mask"], mask)
            assert torch.equal(states[START][f"{name}.weight"], dense[START - 1][name] * mask)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("options", [{"begin": 0}, {"prune_end": 1}, {"begin": 0, "prune_end": 1}])
    def test_a_stage_may_be_missing_in_the_trainer_whose_optimizers_are_fused(self, optimizer, options):
        model, data = network("2:4"), toy_data()
        made = {"epochs": 3, "batch_size": 20, "optimizer": optimizer, "device": "cpu", "lr": 0.01}
        train(model, data, TrainConfig(**made, method="hydra", method_options=options), seed=0)
        for _, layer in targets(model):
            assert layer.nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)
            assert (layer.weight[~layer.mask] == 0).all()


class TestScores:
    def test_they_follow_momentum_along_the_formula_and_a_cosine(self):
        """Against a plain loop over one layer, with gradients from autograd at the masked weight."""
        torch.manual_seed(0)
        model = network(density=1.0)
        for i in (0, 7):
            model[i].set_target(1.0)
        layer = model[3]
        layer.set_target(0.3)
        twin = network(density=1.0)
        twin.load_state_dict(model.state_dict())
        W = layer.weight.detach().clone()
        S = (6 / 72) ** 0.5 * W / W.abs().max()
        V = torch.zeros_like(S)
        method = Hydra(begin=0, prune_end=1, score_lr=0.5, score_momentum=0.8)
        frozen = torch.optim.SGD(model.parameters(), 0.0)

        def check(steps_done):
            nonlocal S, V
            mask = topk_mask(S.abs(), 0.3)
            assert torch.equal(layer.mask, mask)
            assert torch.equal(layer.weight, W * mask)
            if steps_done == 6:
                return
            with torch.no_grad():
                twin[3].weight.copy_(W * mask)
            x, y = batch(steps_done)
            (G,) = torch.autograd.grad(F.cross_entropy(twin.train()(x), y), twin[3].weight)
            lr = 0.5 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * steps_done / 6, dtype=torch.float64)).item())
            V = 0.8 * V + S.sign() * (W * G)
            S = S - lr * V

        run(model, method, frozen, check, steps=6)
        assert not torch.equal(S, W)

    def test_they_find_weights_that_magnitude_would_drop(self):
        """Small weights carry the signal, large ones noise: the scores turn the ranking round."""
        torch.manual_seed(0)
        model = nn.Sequential(network()[7])
        layer = model[0]
        layer.set_target(0.5)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.weight[:, ::2] = -0.5
            layer.bias.zero_()
        method, optimizer = Hydra(begin=0, prune_end=1, score_lr=1.0), torch.optim.SGD(model.parameters(), 0.0)
        method.begin(model, 30, torch.Generator())
        assert not layer.mask[:, ::2].any()
        for step in range(30):
            method.before_step(step)
            x = torch.randn(64, 64)
            optimizer.zero_grad()
            ((model(x) - x[:, ::2].sum(1, keepdim=True) * -0.5) ** 2).mean().backward()
            method.after_backward(step, optimizer)
            assert layer.weight.grad is None
            method.after_step(step, optimizer)
        method.finish()
        assert layer.mask[:, ::2].all()
        assert (layer.weight[:, ::2] == -0.5).all()

    def test_weights_that_diverge_are_an_error(self):
        model, method = network(), Hydra(begin=0)
        method.begin(model, 10, torch.Generator())
        method.before_step(0)
        (model(batch()[0]).sum() * torch.nan).backward()
        with pytest.raises(ValueError, match="scores are NaN"):
            method.after_backward(0, torch.optim.SGD(model.parameters(), 0.1))


def test_nothing_is_left_switched_on_after_an_error_in_the_middle():
    model, method = network(), Hydra(begin=0)
    method.begin(model, 10, torch.Generator())
    method.before_step(0)
    model(batch()[0]).sum().backward()
    assert all(layer.capture_dense_grad for _, layer in targets(model))
    method.finish()
    for _, layer in targets(model):
        assert not layer.capture_dense_grad
        assert layer.dense_grad is None
    Hydra().finish()  # never begun


def test_the_last_stage_begins_with_empty_slots():
    model = network()
    config = TrainConfig(method="hydra", optimizer="adamw", device="cpu")
    optimizer, seen = make_optimizer(model, config), []

    def check(steps_done):
        for _, layer in targets(model):
            if steps_done == END:
                seen.extend(optimizer.state[layer.weight].values())

    run(model, make_method("hydra"), optimizer, check)
    assert len(seen) == 9
    assert int(optimizer.state[model[3].weight]["step"]) == STEPS - END
    assert int(optimizer.state[model[3].bias]["step"]) == STEPS


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"begin": 0.7}, r"begin must be below prune_end, got begin 0\.7 and prune_end 0\.7"),
        ({"begin": -0.1}, "hydra begin: expected a number in"),
        ({"prune_end": 1.5}, "hydra prune_end: expected a number in"),
        ({"score_lr": 0}, "hydra score_lr: expected a number above 0, got 0"),
        ({"score_momentum": 1}, "hydra score_momentum"),
        ({"end": 0.5}, '"hydra" has no option "end"; known: begin, prune_end, score_lr, score_momentum'),
    ],
)
def test_senseless_options_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        make_method("hydra", options)
