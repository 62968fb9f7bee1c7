"""DASS on small spaces, step by step with batches that depend on their number alone. Start with `make` and `run`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nas.oneshot.algorithm import At, Setting
from nas.oneshot.darts import Darts
from nas.oneshot.dass import Dass
from nas.oneshot.dass_options import DassOptions
from ops.learned import LearnedLayer
from search_spaces import Space, get_space
from tests.nas.little_spaces import CLASSES, SHAPE, little_space

STEPS = 2
SHORT = {"pretrain_epochs": 1, "prune_epochs": 1, "finetune_epochs": 1, "alpha_lr": 0.05}


def make(space: Space | None = None, shape: tuple[int, ...] = SHAPE, seed: int = 0, **options: Any) -> Dass:
    return Dass(Setting(space or little_space(), shape, CLASSES, seed), DassOptions(**options))


def batch(number: int, shape: tuple[int, ...] = SHAPE, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.arange(rows) % CLASSES
    return torch.randn(rows, *shape, generator=generator) + y.float().view(-1, *[1] * len(shape)), y


def run_phase(
    algorithm: Darts, index: int, shape: tuple[int, ...] = SHAPE, begin: bool = True, steps: int = STEPS
) -> None:
    """All steps of one phase; batches depend on phase, epoch and step alone."""
    if begin:
        algorithm.begin_phase(index, steps)
    epochs = algorithm.phases()[index].epochs
    for epoch in range(epochs):
        for step in range(steps):
            number = (index * 100 + epoch) * 100 + step
            x, y = batch(number, shape)
            algorithm.step(x, y, lambda n=number: batch(10_000_000 + n, shape), At(index, epoch, epochs, step, steps))


def run(algorithm: Darts, shape: tuple[int, ...] = SHAPE) -> None:
    for index in range(len(algorithm.phases())):
        run_phase(algorithm, index, shape)


def weights(algorithm: Darts) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in algorithm.supernet.by_key().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def learned(algorithm: Dass) -> dict[str, LearnedLayer]:
    return {
        path: layer for path, layer in algorithm.supernet.network.named_modules() if isinstance(layer, LearnedLayer)
    }


def spaces() -> dict[str, tuple[Space, tuple[int, ...]]]:
    small = {"classes": CLASSES}
    convnet = get_space(
        "convnet",
        input_shape=SHAPE,
        stages=2,
        stem=4,
        widths=[4, 8],
        depths=[1, 2],
        kernels=[3],
        densities=[1.0, 0.5],
        **small,
    )
    mlp = get_space("mlp", input_shape=(6,), widths=[8, 16], max_depth=2, densities=[1.0, 0.25], **small)
    return {"little": (little_space(), SHAPE), "convnet": (convnet, SHAPE), "mlp": (mlp, (6,))}
