"""A one-shot algorithm small enough to look through, with everything a checkpoint must hold; and processes that run it.

`register()` puts it among the algorithms as "fake" and "fake_dense"; `setup` does so in a worker process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.data import Data, from_datasets
from nas.oneshot import algorithm
from nas.oneshot.algorithm import Algorithm, At, Found, Options, Phase, Setting, StepReport
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.job import SupernetTrainer
from nas.oneshot.job import setup as real_setup
from search_spaces import Space


@dataclass(frozen=True)
class FakeOptions(algorithm.Options):
    """nan_at: step over all at which the loss becomes NaN. die_at: where the process is killed, once. error: raised in step 1."""

    epochs: int = 4
    batch_size: int = 8
    nan_at: int = -1
    die_at: int = -1
    error: str = ""


class Fake(Algorithm):
    """A linear network whose features are weighted by softmax(alpha); two phases; momentum, dropout and a generator of its own."""

    name = "fake"
    Options: ClassVar[type[Options]] = FakeOptions
    sparse = True
    marker: ClassVar[Path | None] = None

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        generator = torch.Generator().manual_seed(setting.seed)
        features = int(torch.tensor(setting.input_shape).prod())
        self.net = nn.Linear(features, setting.classes)
        with torch.no_grad():
            self.net.weight.copy_(0.1 * torch.randn(self.net.weight.shape, generator=generator))
            self.net.bias.zero_()
        self.alpha = torch.zeros(features, requires_grad=True)
        self.chance = torch.Generator().manual_seed(setting.seed + 1)
        self.optimizer: torch.optim.SGD | None = None
        self.alpha_optimizer = torch.optim.Adam([self.alpha], lr=0.05)
        self.count = 0
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.seen_held: list[tuple[Tensor, Tensor]] = []

    def phases(self) -> tuple[Phase, ...]:
        first = self.options.epochs // 2
        return (Phase("warm", first), Phase("search", self.options.epochs - first))

    def begin_phase(self, index: int, steps: int) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=self.options.lr / (1 + index), momentum=0.9)

    def _forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1) * torch.softmax(self.alpha, 0) * len(self.alpha))

    def step(self, x: Tensor, y: Tensor, held: Callable[[], tuple[Tensor, Tensor]], at: At) -> StepReport:
        assert self.optimizer is not None
        self.seen.append((x, y))
        if self.count == self.options.die_at and self.marker is not None and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.options.error and self.count == 1:
            raise {"memory": torch.OutOfMemoryError, "other": ValueError}[self.options.error]("tried to allocate 9 GiB")
        if at.phase == 1:
            self.seen_held.append(held())
            loss = F.cross_entropy(self._forward(self.seen_held[-1][0]), self.seen_held[-1][1])
            (self.alpha.grad,) = torch.autograd.grad(loss, [self.alpha])
            self.alpha_optimizer.step()
        noise = 0.01 * torch.randn(x.flatten(1).shape, generator=self.chance)
        logits = self._forward(F.dropout(x.flatten(1) + noise, 0.1))  # dropout: torch's global generator
        loss = F.cross_entropy(logits, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.count += 1
        shown = loss.detach() * (float("nan") if self.count - 1 == self.options.nan_at else 1.0)
        return StepReport(shown, (logits.argmax(1) == y).sum())

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def log_row(self) -> dict[str, Any]:
        return {"alphas": {"all": torch.softmax(self.alpha, 0).tolist()}}

    def found(self) -> list[Found]:
        strongest = int(self.alpha.argmax()) * 1000 + int(self.net.weight.abs().sum() * 1e6) % 1000
        architecture = self.setting.space.sample(strongest)
        return [Found(architecture, {"strongest": strongest})]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert self.optimizer is not None
        slots = self.optimizer.state_dict()["state"]
        adam = self.alpha_optimizer.state_dict()["state"]
        tensors = {
            "weight": self.net.weight,
            "bias": self.net.bias,
            "alpha": self.alpha,
            "chance": self.chance.get_state(),
        }
        tensors |= {f"momentum.{k}": v["momentum_buffer"] for k, v in slots.items()}
        tensors |= {f"adam.{k}.{name}": value for k, v in adam.items() for name, value in v.items()}
        return {k: v.detach() for k, v in tensors.items()}, {"count": self.count}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        with torch.no_grad():
            self.net.weight.copy_(tensors["weight"])
            self.net.bias.copy_(tensors["bias"])
            self.alpha.copy_(tensors["alpha"])
        self.chance.set_state(tensors["chance"])
        for kind, made in (("momentum", self.optimizer), ("adam", self.alpha_optimizer)):
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(kind + "."):
                    slots.setdefault(int(key.split(".")[1]), {})[
                        "momentum_buffer" if kind == "momentum" else key.split(".")[2]
                    ] = value
            made.load_state_dict({"state": slots, "param_groups": made.state_dict()["param_groups"]})
        self.count = int(facts["count"])


class FakeDense(Fake):
    """What stands in for the dense search."""

    name = "fake_dense"
    sparse = False


def register() -> None:
    """Put the fakes among the algorithms of this process."""
    ALGORITHMS["fake"] = Fake
    ALGORITHMS["fake_dense"] = FakeDense


def setup(plain: Mapping[str, Any]) -> SupernetTrainer:
    """`nas.oneshot.job.setup` where the fakes are known; dies where `die_at` says, once, marked by a file in the run's folder."""
    register()
    Fake.marker = Path(plain["folder"]) / "died"
    return real_setup(plain)


def toy_data(rows: int = 72) -> Data:
    """Three classes of 2x2 images; validation and test rows are NaN, so that whoever looks at them is found out."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(rows) % 3
    x = torch.randn(rows, 1, 2, 2, generator=generator)
    x.flatten(1)[torch.arange(rows), y] += 2.0
    made = from_datasets((x, y))
    for part in (made.val, made.test):
        part.x.fill_(float("nan"))
    return made


def make_fake(space: Space, data: Data, seed: int = 0, **options: Any) -> Fake:
    """An untrained fake on these data."""
    return Fake(Setting(space, data.input_shape, data.classes, seed), FakeOptions(**options))
