"""What an algorithm that trains a supernet is: its options, its phases, its step, and what it found.

The engine (`nas.oneshot.engine`) owns data, epochs, logs and checkpoints; an `Algorithm` owns the supernet, the architecture
parameters and the optimizers. Start with `Algorithm`; `nas.oneshot.darts.Darts` is the plainest one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nas.errors import ConfigError
from search_spaces import Architecture, Space

if TYPE_CHECKING:
    from hw_models.model import LatencyModel

Batch = tuple[Tensor, Tensor]
"""float[n, *input_shape] and int64[n]."""


@dataclass(frozen=True)
class Options:
    """What every one-shot searcher can be told; algorithms add their own.

    Attributes:
        seeds: replicates, each a supernet of its own with seed run.seed, run.seed + 1, ...
        controls: also train random architectures and those of a dense search, at matched kept weights.
        epochs: of the search, warm-up included.
        batch_size: rows per step.
        lr, lr_min: of the weights, from the first to the second along a cosine.
        momentum, weight_decay: of the weights' SGD.
        grad_clip: largest norm of the weights' gradient; 0 for no limit.
        alpha_lr, alpha_betas, alpha_weight_decay: of the architecture parameters' Adam.
        warmup_epochs: epochs before the architecture parameters move.
        augment: of "crop", "flip", "cutout"; default the run's train.augment.
        checkpointing: forget activations inside mixed operations and compute them again in the backward pass: slower, less memory.
        checkpoint_s: seconds between checkpoints within an epoch.
    """

    seeds: int = 1
    controls: bool = True
    epochs: int = 50
    batch_size: int = 64
    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_weight_decay: float = 1e-3
    warmup_epochs: int = 0
    augment: tuple[str, ...] = ()
    checkpointing: bool = False
    checkpoint_s: float = 60.0

    def __post_init__(self) -> None:
        for name, low in (("seeds", 1), ("epochs", 1), ("batch_size", 2), ("warmup_epochs", 0)):
            check_whole(name, getattr(self, name), low)
        for name in ("lr", "alpha_lr"):
            check_number(name, getattr(self, name), 0.0, above=True)
        for name in ("lr_min", "weight_decay", "grad_clip", "alpha_weight_decay", "checkpoint_s"):
            check_number(name, getattr(self, name), 0.0)
        check_number("momentum", self.momentum, 0.0, 1.0)
        if self.lr_min > self.lr:
            raise ConfigError(
                f"lr_min: expected at most lr = {self.lr:g}, from which the rate falls, got {self.lr_min:g}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs: expected fewer than the {self.epochs} epochs of the search, got {self.warmup_epochs}: nothing "
                "would be searched"
            )
        betas = tuple(self.alpha_betas)
        if len(betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            raise ConfigError(f"alpha_betas: expected two numbers in [0, 1), got {self.alpha_betas!r}")
        object.__setattr__(self, "alpha_betas", betas)
        if isinstance(self.augment, str):
            raise ConfigError(f'augment: expected a list of names, got the text "{self.augment}"')
        object.__setattr__(self, "augment", tuple(self.augment))
        for name in self.augment:
            check_one_of("augment", name, ("crop", "flip", "cutout"))


@dataclass(frozen=True)
class Setting:
    """Where an algorithm works.

    Attributes:
        space: what is searched.
        input_shape, classes: of the data.
        seed: of this replicate.
        device: where the supernet is.
        latency: prices plans, for algorithms that weigh latency; None if nobody knows latencies yet.
        constraints: the run's limits, metric -> "<= number".
        objectives: the run's, metric -> "max" or "min".
    """

    space: Space
    input_shape: tuple[int, ...]
    classes: int
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    latency: LatencyModel | None = None
    constraints: Mapping[str, str] = field(default_factory=dict)
    objectives: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A part of the search.

    Attributes:
        name: for logs.
        epochs: how many.
        of_supernet: whether the supernet is trained in it (not single networks, which cost much less).
    """

    name: str
    epochs: int
    of_supernet: bool = True


@dataclass(frozen=True)
class At:
    """Where in its phase the search is: epoch of `epochs`, step of `steps` in it, all from 0."""

    phase: int
    epoch: int
    epochs: int
    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Share of the phase that is done, in [0, 1)."""
        return (self.epoch + self.step / self.steps) / self.epochs


@dataclass(frozen=True)
class StepReport:
    """Loss (scalar) and right guesses (int64 scalar) of one step on the training half; detached, still on the device."""

    loss: Tensor
    hits: Tensor


@dataclass(frozen=True)
class Found:
    """An architecture that a search found.

    Attributes:
        architecture: a value of the space.
        note: JSON about how it came about: "genotype", "density", "group" (what it may be compared with), ...
        initial: weights and masks (names of the built network's state dict) that training must start from; None: from scratch.
    """

    architecture: Architecture
    note: dict[str, Any] = field(default_factory=dict)
    initial: dict[str, Tensor] | None = None


class Algorithm(abc.ABC):
    """Trains a supernet and reads architectures from it. All chance comes from `setting.seed`.

    Args:
        setting: where it works.
        options: of its own `Options` class.

    Raises:
        ConfigError: the space has nothing that this algorithm could search.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]]
    sparse: ClassVar[bool] = False
    """Whether what it finds is sparse, so that random and dense-search controls at matched kept weights belong beside it."""

    def __init__(self, setting: Setting, options: Any) -> None:
        self.setting = setting
        self.options: Any = options

    def phases(self) -> tuple[Phase, ...]:
        """The phases, in order."""
        return (Phase("search", self.options.epochs),)

    @abc.abstractmethod
    def begin_phase(self, index: int, steps: int) -> None:
        """Make what phase `index` of `steps` steps per epoch needs. Deterministic; `load` may follow."""

    @abc.abstractmethod
    def step(self, x: Tensor, y: Tensor, held: Callable[[], Batch], at: At) -> StepReport:
        """One step on a batch of the weights' half; `held()` draws a fresh batch of the architecture's half."""

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Of the supernet as it stands, without gradients: float[n, classes]."""

    @abc.abstractmethod
    def log_row(self) -> dict[str, Any]:
        """JSON for the log of an epoch: "alphas" (decision -> probabilities) and what else is worth a curve."""

    @property
    def compared_rows(self) -> int:
        """How many fixed rows of the architecture's half it compares architectures on; 0 if it looks at none."""
        return 0

    def compare_on(self, batches: list[Batch]) -> None:  # noqa: B027 - may do nothing
        """Called once, first of all, if `compared_rows` says so: fixed rows, not augmented, as many as there are up to that."""

    @abc.abstractmethod
    def found(self) -> list[Found]:
        """What was found, at the end; at least one."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `step` and `found` depend on: tensors and JSON facts."""

    @abc.abstractmethod
    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `state` gave, after `begin_phase` of the same phase."""


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise a ConfigError unless `value` is a whole number in [low, high]."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not fits:
        raise ConfigError(
            f"{name}: expected a whole number >= {low}"
            + (f" and <= {high}" if high is not None else "")
            + f", got {value!r}"
        )


def check_number(name: str, value: Any, low: float, high: float = float("inf"), *, above: bool = False) -> None:
    """Raise a ConfigError unless `value` is a number in [low, high), or (low, high) if `above`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if above else low <= value) or not value < high:
        bounds = f"{'>' if above else '>='} {low:g}" + ("" if high == float("inf") else f" and < {high:g}")
        raise ConfigError(f"{name}: expected a number {bounds}, got {value!r}")


def check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise a ConfigError unless `value` is among `known`."""
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
