"""Train one network on one data set, on the CPU or a CUDA device. Start with `train`.

The model's initial weights are the caller's; everything random in here comes from `seed`, and the global generators are as before
when it returns. One seed, one thread count and one CPU give one result, bit for bit, in one go or in parts.

It does not stream data or choose an epoch: the result is the last epoch's. The work is `nas.training.session`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.data import Data
from nas.errors import ConfigError
from nas.training.config import TrainConfig
from nas.training.resume import TrainingState
from nas.training.session import Training


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        history: a row per epoch: epoch (from 1), train_loss, train_accuracy (of the batches as they were seen), val_loss,
            val_accuracy, lr (of the last step), density (kept share of all conv and linear weights), seconds (of this epoch).
        val_accuracy, val_loss: of the last epoch.
        state: to go on from; None if the training came to its end.
    """

    history: list[dict[str, Any]]
    val_accuracy: float
    val_loss: float
    state: TrainingState | None = None


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    seed: int,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    until: int | None = None,
    resume: TrainingState | None = None,
    settle_epochs: int | None = None,
) -> TrainResult:
    """Train `model` in place; it ends on the CPU, in eval mode, its masks set.

    In training mode the model may return (logits, auxiliary logits). If it has `set_progress`, that is called before every
    step with the share of the training done, in [0, 1).

    Args:
        model: takes float32[n, *data.input_shape], gives logits float[n, data.classes].
        data: what to train on; the test part is not looked at.
        config: the settings.
        seed: of batches, augmentation, masks and dropout.
        on_epoch: called with each row of the history.
        until: pause after this epoch, from 1; None: train to the end.
        resume: state of a paused training of the same model, data, config and seed, to go on from; the model's weights are then
            replaced by those in it.
        settle_epochs: masks have their final density from the end of this epoch on, whatever the method; None: by its own schedule.

    Raises:
        EvaluationFailed: the loss is not finite (with epoch and step), or the model's output has the wrong shape.
        ConfigError: CUDA asked for where there is none, or image augmentation of a table.
        ValueError, KeyError, RuntimeError: `resume` does not fit the model.
    """
    device = check_training(config, data)
    with Training(model, data, config, device, seed=seed, settle_epochs=settle_epochs) as training:
        if resume is not None:
            training.load_state(resume)
        training.run(until, on_epoch)
        state = training.state() if len(training.history) < config.epochs else None
        if state is not None:
            state = TrainingState({name: t.to("cpu", copy=True) for name, t in state.tensors.items()}, state.facts)
    last = training.history[-1]
    return TrainResult(training.history, last["val_accuracy"], last["val_loss"], state)


def check_training(config: TrainConfig, data: Data) -> torch.device:
    """See that this machine and these data allow what `config` asks for; returns the device.

    Raises:
        ConfigError: CUDA asked for where there is none, or image augmentation of a table.
    """
    if config.augment and len(data.input_shape) != 3:
        raise ConfigError(
            f"augment: {', '.join(config.augment)} are for images, but rows of {data.name} are {data.input_shape}"
        )
    return resolve_device(config.device)


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a device, else the CPU.

    Raises:
        ConfigError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'device: "cuda" was asked for, but this machine has no CUDA device (or torch is a CPU build); use "auto" or "cpu"'
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
