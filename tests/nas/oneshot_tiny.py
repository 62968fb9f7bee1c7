"""One-shot algorithms small enough to run in milliseconds: spaces, batches, a driver, a latency model by formula."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hw_models.model import Estimate, LatencyModel
from nas.oneshot.algorithm import Algorithm, At, Setting, StepReport
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.searcher import make_options
from ops.plan import Plan
from search_spaces import Space, get_space

SHAPE, CLASSES, BATCH, STEPS = (3, 8, 8), 4, 6, 2

SPACES: dict[str, dict[str, Any]] = {
    "darts": {
        **{"channels": 4, "cells": 3, "densities": (1.0, 0.5, 0.25), "patterns": ("unstructured",)},
        "operations": ("none", "skip_connect", "sep_conv_3x3"),
    },
    "nasbench201": {"channels": 4, "cells": 1, "densities": (1.0, 0.5, 0.25), "patterns": ("unstructured",)},
    "convnet": {
        **{"stages": 1, "stem": 4, "widths": (4, 8), "depths": (1,), "kernels": (3,), "blocks": ("conv", "separable")},
        **{"densities": (1.0, 0.5), "patterns": ("unstructured",)},
    },
    "mlp": {"max_depth": 2, "widths": (8, 16), "densities": (1.0, 0.5), "patterns": ("unstructured",)},
    "nasnet": {
        **{"channels": 4, "cells": 1, "blocks": 2, "densities": (1.0, 0.5), "patterns": ("unstructured",)},
        "operations": ("skip_connect", "max_pool_3x3", "sep_conv_3x3"),
    },
}


class ByWork(LatencyModel):
    """0.01 ms per operation and 0.1 ms per thousand kept multiply-adds, whatever the kernel."""

    def predict(self, plan: Plan, device: object = None) -> Estimate:
        ms = sum(0.01 + op.macs / 1e4 for op in plan.ops)
        return Estimate(ms, ms, ms, "analytical", pd.DataFrame())

    def predict_many(self, plans: Sequence[Plan], device: object = None) -> pd.DataFrame:  # type: ignore[override]
        return pd.DataFrame({"ms": [self.predict(plan).ms for plan in plans], "source": "analytical"})


def tiny_space(name: str, **changes: Any) -> Space:
    """A shipped space of a few hundred weights."""
    return get_space(name, **{"input_shape": SHAPE, "classes": CLASSES, **SPACES[name], **changes})


def tiny(name: str, space: Space, seed: int = 0, latency: LatencyModel | None = None, **options: Any) -> Any:
    """An untrained algorithm."""
    setting = Setting(space, SHAPE, CLASSES, seed, latency=latency or ByWork())
    return ALGORITHMS[name](setting, make_options(name, {"epochs": 2, "batch_size": BATCH, **options}))


def batch(number: int, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Batch `number` of a stream: random images, classes by their brightness."""
    generator = torch.Generator().manual_seed(1000 * stream + number)
    x = torch.randn(BATCH, *SHAPE, generator=generator)
    y = torch.arange(BATCH) % CLASSES
    return x + y.view(-1, 1, 1, 1) - 1.5, y


class Drive:
    """Runs an algorithm as the engine does, on batches that are functions of their number; stops anywhere.

    Args:
        algorithm: untrained.
        nan: give it batches that are not numbers.
    """

    def __init__(self, algorithm: Algorithm, nan: bool = False) -> None:
        self.algorithm = algorithm
        self.nan = nan
        self.places = [
            At(p, e, phase.epochs, s, STEPS)
            for p, phase in enumerate(algorithm.phases())
            for e in range(phase.epochs)
            for s in range(STEPS)
        ]
        self.done, self.drawn = 0, 0
        self.reports: list[StepReport] = []
        if algorithm.compared_rows:
            algorithm.compare_on([batch(n, 3) for n in range(2)])

    def held(self) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        x, y = batch(self.drawn, 1)
        return (x * float("nan") if self.nan else x), y

    def run(self, until: int | None = None, resumed: bool = False) -> Drive:
        """Steps up to number `until`; default all."""
        for number in range(self.done, len(self.places) if until is None else until):
            at = self.places[number]
            if (number == 0 or at.phase != self.places[number - 1].phase) and not resumed:
                self.algorithm.begin_phase(at.phase, STEPS)
            resumed = False
            x, y = batch(number)
            self.reports.append(self.algorithm.step(x * float("nan") if self.nan else x, y, self.held, at))
            self.done = number + 1
            if at.step == STEPS - 1:
                self.algorithm.logits(batch(0, 2)[0])
        return self

    def resumed_by(self, fresh: Algorithm) -> Drive:
        """Another algorithm that goes on from this one's state, which went through a file."""
        tensors, facts = self.algorithm.state()
        other = Drive(fresh)
        other.done, other.drawn = self.done, self.drawn
        at = other.places[min(self.done, len(other.places) - 1)]
        fresh.begin_phase(at.phase, STEPS)
        fresh.load({name: tensor.detach().clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))
        return other


def snapshot(algorithm: Algorithm) -> dict[str, Tensor]:
    """A copy of all tensors of its state."""
    return {name: tensor.detach().clone() for name, tensor in algorithm.state()[0].items()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit (NaN equals NaN)."""
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name]))
    )
