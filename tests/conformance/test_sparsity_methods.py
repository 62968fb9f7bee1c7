"""Laws of every sparsity method: exact counts, pruned weights that stay zero, one result per seed, dense means untouched, and a
training that is interrupted and gone on with like one that never was.

A new method in `METHODS` is tested without a line here. Only a method whose counts change on the way adds a plan to `PLANS`, and
one that is given its masks has them drawn by `given`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nas.checkpoint import Checkpoints
from nas.data import Data, from_datasets
from nas.training import METHODS, TrainConfig, TrainResult, make_method, train
from nas.training.methods import SparsityMethod
from nas.training.methods.base import slots_of, targets
from nas.training.methods.fixed import Fixed
from nas.training.methods.gradual import cubic_sparsity
from ops.layers import SparseConv2d, SparseLinear, draw_masks_
from ops.masks import kept_count, satisfies
from ops.patterns import NM, parse_pattern

STEPS = 50
PATTERNS = ["unstructured", "2:4", "4x1", "2x2", "channel"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-3),
}


def gradual_plan(layer: SparseConv2d | SparseLinear, steps_done: int, total: int) -> int:
    """Kept weights after so many steps under the default schedule: 0.75 of 50 is 37 steps, one update each."""
    end = int(0.75 * total)
    if steps_done >= end:
        return kept_count(layer.weight.shape, layer.density, layer.pattern)
    if isinstance(layer.pattern, NM):
        return layer.weight.numel()
    sparsity = cubic_sparsity(steps_done, final=1 - layer.density, start=0, interval=1, updates=end)
    return kept_count(layer.weight.shape, 1 - sparsity, layer.pattern)


def hydra_plan(layer: SparseConv2d | SparseLinear, steps_done: int, total: int) -> int:
    """Everything until half of the steps are done, then the target."""
    dense = steps_done < int(0.5 * total)
    return layer.weight.numel() if dense else kept_count(layer.weight.shape, layer.density, layer.pattern)


PLANS = {"gradual": gradual_plan, "hydra": hydra_plan}


def planned(method: str, layer: SparseConv2d | SparseLinear, steps_done: int, total: int) -> int:
    """Kept weights after so many steps; constant unless the method has a plan of its own."""
    if method in PLANS:
        return PLANS[method](layer, steps_done, total)
    return kept_count(layer.weight.shape, layer.density, layer.pattern)


def network(
    pattern: str = "unstructured", density: float = 0.3, *, sparse: bool = True, seed: int = 0
) -> nn.Sequential:
    """A small network with an input layer, one layer under `pattern`, a linear one and a dense head; or its plain twin."""
    density = parse_pattern(pattern).fixed_density or density
    torch.manual_seed(seed)
    conv = lambda i, o, **kw: (SparseConv2d if sparse else nn.Conv2d)(i, o, 3, padding=1, **(kw if sparse else {}))  # noqa: E731
    linear = lambda i, o, **kw: (SparseLinear if sparse else nn.Linear)(i, o, **(kw if sparse else {}))  # noqa: E731
    return nn.Sequential(
        conv(1, 8, density=0.6),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 16, density=density, pattern=pattern),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        linear(64, 12, density=0.1),
        nn.ReLU(),
        linear(12, 3),
    )


def dense_twin(model: nn.Sequential) -> nn.Sequential:
    """The same weights in torch's own layers."""
    twin = network(sparse=False)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("mask")})
    return twin


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def given(name: str, model: nn.Module, seed: int) -> nn.Module:
    """The model, with masks drawn if the method wants to find some."""
    if name == "fixed":
        draw_masks_(model, torch.Generator().manual_seed(seed))
    return model


def run(
    model: nn.Module,
    method: SparsityMethod,
    optimizer: torch.optim.Optimizer,
    check: Callable[[int], None] = lambda steps_done: None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    settle_by: int | None = None,
) -> None:
    """A bare training loop, as the interface prescribes it; `check` sees the model at every step boundary."""
    given("fixed" if isinstance(method, Fixed) else "", model, seed)
    method.begin(model, steps, torch.Generator().manual_seed(seed), settle_by)
    check(0)
    for step in range(steps):
        step_once(model, method, optimizer, step)
        check(step + 1)
    method.finish()


def step_once(model: nn.Module, method: SparsityMethod, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step as the interface prescribes it."""
    x, y = batch(step)
    method.before_step(step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    if not method.after_backward(step, optimizer):
        optimizer.step()
    method.after_step(step, optimizer)


def toy_data() -> Data:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(120, 1, 6, 6, generator=generator), torch.arange(120) % 3
    x[torch.arange(120), 0, y, y] += 3.0
    return from_datasets((x, y))


EPOCHS = 8
"""Of 7 steps: under the default schedule hydra's scores are trained from step 28 to 39, in epochs 5 and 6."""


def training(name: str, optimizer: str) -> TrainConfig:
    return TrainConfig(
        epochs=EPOCHS, batch_size=16, optimizer=optimizer, method=name, device="cpu", lr=0.01, augment=("crop", "flip")
    )


def fresh(name: str) -> nn.Module:
    """A network with dropout and batch norm, both of which a training must go on with as they were."""
    model = given(name, network("2x2", seed=4), seed=3)
    model.insert(9, nn.Dropout(0.3))
    return model


def compared(result: TrainResult, model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """All that must be equal: the history but for its times, and every tensor of the model."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]
    return rows, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: tuple[Any, dict[str, torch.Tensor]], two: tuple[Any, dict[str, torch.Tensor]]) -> None:
    assert one[0] == two[0]
    for key in one[1]:
        assert torch.equal(one[1][key], two[1][key]), key


def trained_in_parts(name: str, optimizer: str, pauses: list[int], **more: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train with a fresh model and a fresh trainer after every pause."""
    state, data = None, toy_data()
    for until in [*pauses, None]:
        model = fresh(name)
        with torch.no_grad():
            for parameter in model.parameters() if state is not None else ():
                parameter.fill_(torch.nan)  # what the state does not bring back is seen
        torch.manual_seed(17)
        result = train(model, data, training(name, optimizer), seed=3, until=until, resume=state, **more)
        state = result.state
    assert state is None
    return compared(result, model)


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestSparsityMethodLaws:
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_counts_are_exactly_as_planned_at_every_step_boundary(self, name, pattern):
        model = network(pattern)
        layers = targets(model)
        assert [n for n, _ in layers] == ["0", "3", "7"]

        def check(steps_done):
            for layer_name, layer in layers:
                assert layer.nnz == planned(name, layer, steps_done, STEPS), (layer_name, steps_done)

        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), check)
        for _, layer in layers:
            assert satisfies(layer.mask, layer.pattern)
            assert layer.nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)

    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_pruned_weights_and_their_optimizer_slots_are_exactly_zero_after_every_step(self, name, optimizer):
        model = network("4x1")
        made = OPTIMIZERS[optimizer](model.parameters())
        slots_seen = set()

        def check(steps_done):
            for _, layer in targets(model):
                outside = ~layer.mask
                assert (layer.weight[outside] == 0).all()
                for slot_name, slot in slots_of(made, layer.weight).items():
                    slots_seen.add(slot_name)
                    assert (slot[outside] == 0).all(), (slot_name, steps_done)

        run(model, make_method(name), made, check)
        assert slots_seen == ({"momentum_buffer"} if optimizer == "sgd" else {"exp_avg", "exp_avg_sq"})
        for _, layer in targets(model):
            assert (layer.weight[layer.mask] != 0).any()

    def test_at_density_one_it_trains_bit_for_bit_like_the_plain_network(self, name):
        model = network(density=1.0)
        for module in model.modules():
            if isinstance(module, SparseConv2d | SparseLinear):
                module.set_target(1.0, "unstructured")
        plain = dense_twin(model)
        for net, method in ((model, make_method(name)), (plain, make_method("static"))):
            run(net, method, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-3))
        for (key, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(a, b), key

    def test_layers_of_density_one_are_never_masked(self, name):
        model = network()
        head = model[9]
        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1), lambda _: _all_true(head.mask))

    def test_one_seed_gives_one_result_and_another_seed_other_masks(self, name):
        results = []
        for seed in (1, 1, 2):
            model = network()
            run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), seed=seed)
            results.append(model.state_dict())
        assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
        if name not in ("gradual", "hydra"):  # which have nothing random
            assert any(not torch.equal(results[0][key], results[2][key]) for key in results[0])

    def test_masks_survive_state_dict_and_deepcopy_even_where_kept_weights_are_zero(self, name):
        model = network("2:4")
        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1))
        layer = targets(model)[0][1]
        with torch.no_grad():
            layer.weight.zero_()
        loaded = network("2:4", seed=9)
        loaded.load_state_dict(model.state_dict())
        for (_, a), (_, b), (_, c) in zip(targets(model), targets(loaded), targets(copy.deepcopy(model)), strict=True):
            assert torch.equal(a.mask, b.mask)
            assert torch.equal(a.mask, c.mask)

    @pytest.mark.parametrize("steps", [1, 2, 3, 7])
    def test_the_shortest_trainings_still_end_at_the_exact_counts(self, name, steps):
        model = network("channel")
        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1), steps=steps)
        for _, layer in targets(model):
            assert layer.nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)

    def test_a_network_without_sparse_layers_is_trained_like_any_other(self, name):
        plain = network(sparse=False)
        run(plain, make_method(name), torch.optim.SGD(plain.parameters(), 0.1), steps=5)

    def test_nothing_is_left_switched_on(self, name):
        model = network()
        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1), steps=20)
        for _, layer in targets(model):
            assert not layer.capture_dense_grad
            assert layer.dense_grad is None

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_trainer_keeps_the_laws(self, name, optimizer):
        data = toy_data()
        config = TrainConfig(epochs=5, batch_size=16, optimizer=optimizer, method=name, device="cpu", lr=0.01)
        results = []
        for _ in range(2):
            model = given(name, network("2x2", seed=4), seed=3)
            outcome = train(model, data, config, seed=3)
            results.append((outcome.history[-1]["train_loss"], model.state_dict()))
            for _, layer in targets(model):
                assert layer.nnz == kept_count(layer.weight.shape, layer.density, layer.pattern)
                assert (layer.weight[~layer.mask] == 0).all()
        assert results[0][0] == results[1][0]
        assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])

    def test_in_the_trainer_density_one_equals_the_plain_network_bit_for_bit(self, name):
        data = toy_data()
        model = network()
        for module in model.modules():
            if isinstance(module, SparseConv2d | SparseLinear):
                module.set_target(1.0, "unstructured")
        plain = dense_twin(model)
        config = TrainConfig(epochs=3, batch_size=32, method=name, device="cpu", augment=("crop", "flip"))
        ours, theirs = (train(net, data, config, seed=1) for net in (model, plain))
        assert ours.val_loss == theirs.val_loss
        for (key, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(a, b), key

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_interrupted_after_any_epoch_it_ends_as_if_it_never_was(self, name, optimizer):
        whole = trained_in_parts(name, optimizer, [])
        for pause in range(1, EPOCHS):
            assert_same(whole, trained_in_parts(name, optimizer, [pause]))

    @pytest.mark.parametrize("settle", [None, 3])
    def test_interrupted_after_every_epoch_it_ends_as_if_it_never_was(self, name, settle):
        whole = trained_in_parts(name, "adamw", [], settle_epochs=settle)
        assert_same(whole, trained_in_parts(name, "adamw", list(range(1, EPOCHS)), settle_epochs=settle))

    def test_its_state_between_two_steps_is_all_it_needs(self, name):
        """The bare loop, left after every single step: schedules are in steps, and no step is special."""
        whole, steps = network("2x2"), 20
        optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9)
        states: list[Any] = []
        method = make_method(name)

        def keep(steps_done):
            states.append(copy.deepcopy((whole.state_dict(), optimizer.state_dict(), method.state())))

        run(whole, method, optimizer, keep, steps=steps)
        for left in range(1, steps):
            model = network("2x2", seed=9)
            model.load_state_dict(states[left][0])
            made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            made.load_state_dict(copy.deepcopy(states[left][1]))
            other = make_method(name)
            other.load_state(model, steps, states[left][2])
            step_once(model, other, made, left)
            for mine, theirs in ((model.state_dict(), states[left + 1][0]), (other.state(), states[left + 1][2])):
                assert mine.keys() == theirs.keys()
                for key, value in theirs.items():
                    assert torch.equal(value, mine[key]), (left, key)
            other.finish()

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
    @pytest.mark.parametrize("settle", [1, 2, 4, EPOCHS])
    def test_masks_have_their_final_density_by_the_epoch_that_was_asked_for(self, name, settle, pattern):
        model, seen = given(name, network(pattern), seed=3), []
        counts = lambda: [layer.nnz for _, layer in targets(model)]  # noqa: E731
        result = train(
            model,
            toy_data(),
            training(name, "sgd"),
            seed=3,
            settle_epochs=settle,
            on_epoch=lambda row: seen.append(counts()),
        )
        wanted = [kept_count(layer.weight.shape, layer.density, layer.pattern) for _, layer in targets(model)]
        for epoch in range(settle, EPOCHS + 1):
            assert seen[epoch - 1] == wanted, epoch
            assert result.history[epoch - 1]["density"] == result.history[-1]["density"], epoch

    @pytest.mark.parametrize("settle_by", range(1, 50, 6))
    def test_masks_settle_by_any_step(self, name, settle_by):
        model = network("4x1")

        def check(steps_done):
            if steps_done >= settle_by:
                for layer_name, layer in targets(model):
                    assert layer.nnz == layer.planned_nnz, (layer_name, steps_done)

        run(model, make_method(name), torch.optim.SGD(model.parameters(), 0.1), check, settle_by=settle_by)


OTHER_PROCESS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nas.checkpoint import Checkpoints
from nas.training import METHODS, TrainingState, train
from tests.conformance.test_sparsity_methods import fresh, toy_data, training
for name in METHODS:
    folder = Path(sys.argv[1]) / name
    found = Checkpoints(folder, {}).load()
    model = fresh(name)
    result = train(model, toy_data(), training(name, "sgd"), seed=3, resume=TrainingState(found.tensors, found.facts))
    Checkpoints(folder, {}).save(model.state_dict(), {"history": result.history})
"""


def test_an_interrupted_training_goes_on_in_a_fresh_process(tmp_path):
    for name in METHODS:  # one process for all: starting it is what takes long
        state = train(fresh(name), toy_data(), training(name, "sgd"), seed=3, until=5).state
        assert state is not None
        Checkpoints(tmp_path / name, {}).save(state.tensors, state.facts)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_PROCESS, str(tmp_path)], check=True, timeout=300, cwd=root
    )
    for name in METHODS:
        back = Checkpoints(tmp_path / name, {}).load()
        assert back is not None
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in back.facts["history"]]
        assert_same(trained_in_parts(name, "sgd", []), (rows, back.tensors))


def _all_true(mask: torch.Tensor) -> None:
    assert mask.all()
