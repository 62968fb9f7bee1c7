"""Every one-shot algorithm obeys the laws. A new algorithm needs a line in `SMALL`."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nas.errors import ConfigError, NasError
from nas.oneshot.algorithm import Algorithm, At
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.gradient import GradientSearch
from search_spaces import Space
from tests.nas.oneshot_tiny import CLASSES, SHAPE, STEPS, Drive, batch, differing, snapshot, tiny, tiny_space

torch.set_num_threads(1)

SMALL: dict[str, dict[str, Any]] = {
    "darts": {"warmup_epochs": 1},
    "pcdarts": {"k": 2, "warmup_share": 0.5},
    "gdas": {"warmup_epochs": 1},
    "fbnet": {"warmup_share": 0.5, "weight_share": 0.5},
    "random_shared": {"candidates": 3},
    "dass": {"epochs": 4, "warmup_epochs": 1, "order": 1},
    "dass2": {"candidates": 2, "warmup": 0.5, "race_epochs": 1},
    "node_masks": {"draws": 4, "criterion_rows": 12, "node_sparsities": (0.5,)},
}
"""Options of a small run: few epochs, alphas at rest in the first."""

OURS = sorted(name for name, cls in ALGORITHMS.items() if cls.__module__.startswith("nas."))
GRADIENT = [name for name in OURS if issubclass(ALGORITHMS[name], GradientSearch)]
LEARNING = [name for name in GRADIENT if name != "random_shared"]
"""Those with architecture parameters that move."""
UNMASKED = [name for name in GRADIENT if not ALGORITHMS[name].sparse]
PAIRS = [(name, space) for name in OURS for space in ("nasbench201", "mlp")] + [
    (name, space)
    for space, names in (
        ("darts", ("darts", "pcdarts", "gdas")),
        ("convnet", ("fbnet", "random_shared", "dass")),
    )
    for name in names
    if name in OURS
]
"""Every algorithm on a space of operations and on one of widths; every kind of space with several algorithms."""


def small(name: str, space: str | Space = "nasbench201", seed: int = 0, **changes: Any) -> Any:
    made = tiny_space(space) if isinstance(space, str) else space
    return tiny(name, made, seed, **{**SMALL[name], **changes})


@lru_cache
def finished(name: str, space: str) -> Drive:
    """A search that ran to its end, once for all laws that only look at it."""
    return Drive(small(name, space)).run()


@lru_cache
def end_state(name: str, space: str) -> dict[str, torch.Tensor]:
    """Its state before anything was asked of it."""
    return snapshot(finished(name, space).algorithm)


def ends(name: str, algorithm: Algorithm) -> list[str]:
    """What was found, as text."""
    return [f"{one.architecture.to_json()} {json.dumps(one.note)}" for one in algorithm.found()]


def test_every_algorithm_has_small_options() -> None:
    assert set(OURS) <= set(SMALL)
    assert all(ALGORITHMS[name].name == name for name in OURS)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_a_search_that_was_stopped_anywhere_ends_as_one_that_was_not(name: str, space: str) -> None:
    whole = finished(name, space)
    half = len(whole.places) // 2 + 1
    stopped = Drive(small(name, space)).run(until=half)
    resumed = stopped.resumed_by(small(name, space)).run(resumed=whole.places[half].step > 0)
    assert differing(end_state(name, space), snapshot(resumed.algorithm)) == []
    assert [float(r.loss) for r in whole.reports[half:]] == [float(r.loss) for r in resumed.reports]
    assert ends(name, whole.algorithm) == ends(name, resumed.algorithm)


@pytest.mark.parametrize("name", OURS)
def test_another_seed_is_another_search(name: str) -> None:
    other = Drive(small(name, seed=1)).run()
    assert differing(end_state(name, "nasbench201"), snapshot(other.algorithm)) != []


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_what_is_found_belongs_to_the_space_and_can_be_built(name: str, space: str) -> None:
    found = finished(name, space).algorithm.found()
    assert found
    for one in found:
        made = tiny_space(space)
        assert made.architecture(one.architecture.as_dict()) == one.architecture
        network = made.build(one.architecture).eval()
        assert network(batch(0)[0]).shape == (6, CLASSES)
        json.dumps(one.note, allow_nan=False)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_reports_and_log_rows_are_numbers(name: str, space: str) -> None:
    drive = finished(name, space)
    for report in drive.reports:
        assert torch.isfinite(report.loss)
        assert not report.loss.requires_grad
        assert report.hits.dtype == torch.int64
        assert 0 <= int(report.hits) <= 6
    row = drive.algorithm.log_row()
    assert json.loads(json.dumps(row, allow_nan=False)) is not None
    for name_, probabilities in row["alphas"].items():
        assert sum(probabilities) == pytest.approx(1, abs=1e-5), name_
    logits = drive.algorithm.logits(batch(0, 2)[0])
    assert logits.shape == (6, CLASSES)
    assert not logits.requires_grad


@pytest.mark.parametrize("name", GRADIENT)
def test_a_space_without_choices_is_refused(name: str) -> None:
    def fixed(c: Any, *, input_shape: Any, classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, classes))

    with pytest.raises(ConfigError):
        small(name, Space(fixed, "fixed", {"input_shape": SHAPE, "classes": CLASSES}))


@pytest.mark.parametrize("name", UNMASKED)
def test_a_space_that_decides_nothing_but_its_sparsity_is_refused(name: str) -> None:
    def masked(c: Any, *, input_shape: Any, classes: int) -> nn.Module:
        network = c.build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, classes)))
        return c.allocate("sparsity", network, (1.0, 0.5), ("uniform",))

    with pytest.raises(ConfigError, match="no choice that it could search"):
        small(name, Space(masked, "masked", {"input_shape": SHAPE, "classes": CLASSES}))


@pytest.mark.parametrize(
    ("name", "space"), [(name, "nasbench201") for name in OURS] + [("darts", "mlp"), ("random_shared", "mlp")]
)
def test_rows_that_are_not_numbers_end_the_search_and_do_not_hang_it(name: str, space: str) -> None:
    drive = Drive(small(name, space), nan=True)
    try:
        drive.run()
    except (NasError, ValueError) as error:
        if isinstance(error, NasError) or "diverge" in str(error):  # the latter where masks are drawn from scores
            return
        raise
    assert len(drive.reports) == len(drive.places)


@pytest.mark.parametrize("space", ["nasbench201", "mlp"])
@pytest.mark.parametrize("name", GRADIENT)
def test_architecture_parameters_are_no_weights(name: str, space: str) -> None:
    algorithm = finished(name, space).algorithm
    alphas = {id(alpha) for alpha in algorithm.alphas.tensors()}
    assert alphas
    assert not alphas & {id(p) for p in algorithm.supernet.parameters()}
    assert not alphas & {id(p) for p in algorithm.supernet.by_key().values()}
    assert not alphas & {id(p) for o in weight_optimizers(algorithm) for g in o.param_groups for p in g["params"]}


def weight_optimizers(algorithm: Any) -> list[torch.optim.Optimizer]:
    """All optimizers but that of the architecture parameters."""
    made = [o for o in vars(algorithm).values() if isinstance(o, torch.optim.Optimizer)]
    return [o for o in made if o is not algorithm.alpha_optimizer]


@pytest.mark.parametrize(
    ("name", "space"),
    [(name, "nasbench201") for name in [*LEARNING, "darts, second order"]] + [("darts", "mlp"), ("fbnet", "mlp")],
)
def test_the_architecture_step_moves_no_weight_and_the_weight_step_no_architecture_parameter(
    name: str, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, order = name.partition(", ")
    changes = {"order": 2} if order else {}
    for still in ("weights", "alphas"):
        algorithm = small(name, space, **changes)
        drive = Drive(algorithm)
        phase = 0 if name == "dass2" else len(algorithm.phases()) - 1  # a race moves no architecture parameters
        end = max(number for number, at in enumerate(drive.places) if at.phase == phase) + 1
        drive.run(until=end - STEPS)
        before = snapshot(algorithm)
        stopped = weight_optimizers(algorithm) if still == "weights" else [algorithm.alpha_optimizer]
        for optimizer in stopped:
            monkeypatch.setattr(optimizer, "step", lambda: None)
        last = drive.places[drive.done].phase != drive.places[drive.done - 1].phase
        if last:  # a phase makes its optimizers when it begins
            algorithm.begin_phase(drive.places[drive.done].phase, STEPS)
            for optimizer in weight_optimizers(algorithm) if still == "weights" else [algorithm.alpha_optimizer]:
                monkeypatch.setattr(optimizer, "step", lambda: None)
        drive.run(until=end, resumed=last)
        moved = differing(before, snapshot(algorithm))
        weights = [key for key in moved if key.startswith("weight/") and not key.endswith(".score")]
        alphas = [key for key in moved if key.startswith("alpha/")]
        if still == "weights":
            assert weights == []
            assert alphas
        else:
            assert alphas == []
            assert weights


@pytest.mark.parametrize("name", LEARNING)
def test_architecture_parameters_rest_while_weights_warm_up(name: str) -> None:
    algorithm = small(name)
    before = snapshot(algorithm)
    drive = Drive(algorithm).run(until=STEPS)
    early = differing(before, snapshot(algorithm))
    assert not [key for key in early if key.startswith("alpha/")]
    assert [key for key in early if key.startswith("weight/")]
    assert drive.drawn == 0  # nothing of the held-out half was looked at
    drive.run()
    assert [key for key in differing(before, snapshot(algorithm)) if key.startswith("alpha/")]
    assert drive.drawn > 0


@pytest.mark.parametrize("name", UNMASKED)
def test_with_one_candidate_per_choice_a_search_is_the_training_of_that_network(name: str) -> None:
    space = tiny_space("nasbench201", operations=["nor_conv_3x3"], densities=[1.0])
    options = {"k": 1} if name == "pcdarts" else {}
    algorithm = small(name, space, lr=0.05, **options)
    network = algorithm.supernet.extract(
        algorithm.found()[0].architecture if name != "random_shared" else space.sample(0)
    )
    for cell in (part for part in network.body if type(part).__name__ == "BenchCell"):
        for module in cell.modules():
            if isinstance(module, nn.BatchNorm2d):  # has no parameters in a supernet
                module.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    o = algorithm.options
    optimizer = torch.optim.SGD(
        trained, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=name == "gdas"
    )
    drive = Drive(algorithm).run()
    for number, at in enumerate(drive.places):
        for group in optimizer.param_groups:
            group["lr"] = algorithm.learning_rate(At(0, at.epoch, at.epochs, at.step, at.steps))
        x, y = batch(number)
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, o.grad_clip)
        optimizer.step()
        assert float(drive.reports[number].loss) == pytest.approx(float(loss.detach()), rel=2e-3), number
