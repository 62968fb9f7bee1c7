"""The settings of one training. Start with `TrainConfig`; every value is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nas.errors import ConfigError
from nas.training.methods import make_method

OPTIMIZERS = {"sgd": (0.05, 5e-4), "adamw": (0.003, 0.01)}
"""Known optimizers with their default lr and weight decay."""

AUGMENTATIONS = ("crop", "flip", "cutout")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training part.
        batch_size: rows per step. The rows that do not fill a last batch are left out of that epoch (other ones each time);
            a training part smaller than one batch is one batch.
        optimizer: "sgd" or "adamw".
        lr: peak learning rate; default 0.05 for sgd, 0.003 for adamw. It follows a cosine to zero, step by step.
        momentum, nesterov: of sgd.
        weight_decay: of weights only, never of biases and norms (tensors with one axis); default 5e-4 for sgd, 0.01 for adamw.
        warmup_epochs: linear rise of the learning rate; at most half the training.
        label_smoothing: in [0, 1).
        grad_clip: largest gradient norm; 0 for no limit.
        augment: of "crop" (shift by up to `crop_padding` pixels), "flip" (left-right, half of the images), "cutout" (blank a
            square of `cutout` pixels). Images only.
        cutout: side of the square in pixels.
        crop_padding: largest shift in pixels.
        method: how masks are found: "static", "gradual", "rigl" or "hydra" (`nas.training.methods.METHODS`); "fixed" is for masks
            that are given, and no run file can ask for it.
        method_options: options of the method, e.g. {"end": 0.6}.
        device: "cpu", "cuda", or "auto" (CUDA if there is a device).
        aux_weight: weight of the loss of an auxiliary head, for networks that have one.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float | None = None
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    grad_clip: float = 0.0
    augment: tuple[str, ...] = ()
    cutout: int = 8
    crop_padding: int = 4
    method: str = "static"
    method_options: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    aux_weight: float = 0.4

    def __post_init__(self) -> None:
        _whole("epochs", self.epochs, 1)
        _whole("batch_size", self.batch_size, 1)
        _one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        if self.lr is not None:
            _number("lr", self.lr, 0.0, math.inf, above=True)
        if self.weight_decay is not None:
            _number("weight_decay", self.weight_decay, 0.0, math.inf)
        _number("momentum", self.momentum, 0.0, 1.0)
        _number("warmup_epochs", self.warmup_epochs, 0.0, math.inf)
        _number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _number("grad_clip", self.grad_clip, 0.0, math.inf)
        _number("aux_weight", self.aux_weight, 0.0, math.inf)
        _whole("cutout", self.cutout, 1)
        _whole("crop_padding", self.crop_padding, 1)
        if isinstance(self.augment, str):
            raise ConfigError(f'augment: expected a list of names, got the text "{self.augment}"')
        for name in self.augment:
            _one_of("augment", name, AUGMENTATIONS)
        object.__setattr__(self, "augment", tuple(self.augment))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        make_method(self.method, self.method_options)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return OPTIMIZERS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """The weight decay of tensors with two or more axes."""
        return OPTIMIZERS[self.optimizer][1] if self.weight_decay is None else self.weight_decay


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}: expected a whole number >= {low}, got {value!r}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not (low < value if above else low <= value) or not (value < high):
        bounds = f"{'>' if above else '>='} {low:g}" + ("" if high == math.inf else f" and < {high:g}")
        raise ConfigError(f"{name}: expected a number {bounds}, got {value!r}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
