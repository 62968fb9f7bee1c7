"""One training, epoch by epoch, that can be left after any epoch and gone on with in another process. Start with `Training`.

Nothing waits for the device within an epoch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.data import Data, Split
from nas.errors import EvaluationFailed
from nas.training.batches import Batches
from nas.training.config import TrainConfig
from nas.training.evaluation import evaluate, kept_share
from nas.training.methods import make_method
from nas.training.optim import learning_rate, make_optimizer
from nas.training.resume import (
    Chance,
    TrainingState,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    parameters_of,
)

FACTORS = {"lr": "lr_scale", "weight_decay": "weight_decay_scale"}
"""Settings that may be changed on the way, by a factor on the config's value, and their columns in the history."""


class Training:
    """One training of one model, in place; used in a `with` block, inside of which the model is on the device.

        with Training(model, data, config, device, seed=0) as training:
            training.load_state(state)  # if it is to go on from somewhere
            training.run(until=5)
            state = training.state()

    A training interrupted after any epoch and gone on with, by a fresh object on a fresh model, gives the bits of one that never
    was: weights, masks, optimizer slots, history (but for `seconds`); on one kind of CPU with one thread count. After the block the
    model is on the CPU, in eval mode, and torch's generators are as before.

    Args:
        model: its initial weights are the caller's.
        data: the test part is not looked at.
        config: the settings.
        device: where to train.
        seed: of batches, augmentation, masks and dropout.
        settle_epochs: masks have their final density from the end of this epoch on (see `SparsityMethod.begin`); None: by the
            method's own schedule.

    Attributes:
        history: one row per epoch so far.
        notes: further columns of the next row.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainConfig,
        device: torch.device,
        *,
        seed: int,
        settle_epochs: int | None = None,
    ) -> None:
        self.model, self.config, self.device, self.seed = model, config, device, seed
        self.batches = Batches(data.train, config, device)
        self.val = Split(data.val.x.to(device), data.val.y.to(device))
        self.classes = data.classes
        self.steps = self.batches.steps
        self.total = self.steps * config.epochs
        self.settle_by = None if settle_epochs is None else settle_epochs * self.steps
        self.warmup = min(round(config.warmup_epochs * self.steps), self.total // 2)
        self.method = make_method(config.method, config.method_options)
        self.set_progress = getattr(model, "set_progress", None)
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if device.type == "cuda":
            self.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
        self.history: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.factors: dict[str, float] = {}
        self.losses: list[Tensor] = []

    def __enter__(self) -> Self:
        cuda = self.device.type == "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if cuda else []))
            stack.callback(self.model.eval)
            if cuda:
                stack.callback(self.model.cpu)
                stack.callback(_memory_format, self.model, torch.contiguous_format)
            stack.callback(self.method.finish)
            self.chance = Chance(self.seed, self.device)
            self.model.to(self.device)
            if cuda:
                _memory_format(self.model, torch.channels_last)
            self.optimizer = make_optimizer(self.model, self.config)
            self.parameters = parameters_of(self.optimizer)
            self.decays = [group["weight_decay"] for group in self.optimizer.param_groups]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # -- going on ---------------------------------------------------------------------------------------------------------

    def state(self) -> TrainingState:
        """Everything that the next epoch depends on. Between two epochs only."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "chance": self.chance.state(),
            "method": self.method.state(),
        }
        tensors = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        facts = {"history": list(self.history), "factors": dict(self.factors), "device": self.device.type}
        return TrainingState(tensors, facts)

    def load_state(self, state: TrainingState) -> None:
        """Go on from where a training of the same model, data, config and seed was. Before the first epoch only.

        Raises:
            ValueError, KeyError, RuntimeError: the state does not fit the model or the method.
        """
        load_model_state(self.model, state.part("model"))
        load_optimizer_state(self.optimizer, state.part("optimizer"))
        self.chance.load_state(state.part("chance"), state.facts["device"], state.epochs)
        self.history = [dict(row) for row in state.facts["history"]]
        self.set_factors(state.facts["factors"])
        if self.history:
            self.method.load_state(self.model, self.total, state.part("method"), self.settle_by)

    def take_weights(self, state: TrainingState) -> bool:
        """Take over weights, masks and optimizer slots of another training of an equal model, and nothing else of it. After
        `load_state`, before `run`; not while a method knows more than its masks.

        Returns:
            Whether they fit and were taken.
        """
        mine, theirs = self.state(), state.part("model")
        fits = mine.part("model").keys() == theirs.keys() and all(
            tensor.shape == theirs[name].shape for name, tensor in mine.part("model").items()
        )
        if not (fits and self.history and state.epochs) or mine.part("method") or state.part("method"):
            return False
        load_model_state(self.model, theirs)
        load_optimizer_state(self.optimizer, state.part("optimizer"))
        return True

    def set_factors(self, factors: Mapping[str, float]) -> None:
        """Multiply settings of the config by these from now on; those not named stay as they are.

        Args:
            factors: of "lr" and "weight_decay", each above 0; not multiplied with earlier ones.

        Raises:
            ValueError: another name, or a factor that is no number above 0.
        """
        for name, factor in factors.items():
            if name not in FACTORS or not 0 < factor < math.inf:
                raise ValueError(f"expected factors above 0 of {', '.join(FACTORS)}; got {name} = {factor!r}")
            self.factors[name] = float(factor)
        for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
            group["weight_decay"] = decay * self.factors.get("weight_decay", 1.0)

    # -- training ---------------------------------------------------------------------------------------------------------

    def run(self, until: int | None = None, on_epoch: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        """Train on to the end of epoch `until`; None: to the end of the training.

        Args:
            until: an epoch, from 1; nothing happens if it has been trained already.
            on_epoch: called after each epoch with its row of the history; it may ask for the state.

        Raises:
            EvaluationFailed: the loss is not finite (with epoch and step), or the model's output has the wrong shape.
        """
        last = self.config.epochs if until is None else min(until, self.config.epochs)
        if not self.history:
            self.method.begin(self.model, self.total, self.chance.masks, self.settle_by)
        for epoch in range(len(self.history) + 1, last + 1):
            row = self.epoch(epoch)
            self.history.append(row)
            on_epoch(row)

    def epoch(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        self.model.train()
        self.losses = []
        guesses, labels = [], []
        lr, scale = 0.0, self.factors.get("lr", 1.0)
        batches = self.batches.epoch(self.chance.order, self.chance.augment)
        for step, (x, y) in enumerate(batches, start=(epoch - 1) * self.steps):
            lr = learning_rate(step, total=self.total, warmup=self.warmup, peak=self.config.peak_lr) * scale
            try:
                guesses.append(self.step(step, x, y, lr))
            except ValueError:
                self.check_finite(epoch)  # a method that ranks weights finds NaN first
                raise
            labels.append(y)
        self.check_finite(epoch)
        rows = self.steps * self.batches.size
        hits = int((torch.cat(guesses) == torch.cat(labels)).sum())
        found = evaluate(self.model, self.val, device=self.device)
        if not abs(found.loss) < float("inf"):
            raise EvaluationFailed(f"epoch {epoch}: the validation loss is {found.loss}. {_CURE}")
        notes, self.notes = self.notes, {}
        return {
            "epoch": epoch,
            "train_loss": float(torch.stack(self.losses).double().mean()),
            "train_accuracy": hits / rows,
            "val_loss": found.loss,
            "val_accuracy": found.accuracy,
            "lr": lr,
            "density": kept_share(self.model),
            "seconds": time.perf_counter() - started,
            **{FACTORS[name]: factor for name, factor in self.factors.items()},
            **notes,
        }

    def step(self, step: int, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """One step; returns the guessed classes int64[n] without waiting for them."""
        config, optimizer, method = self.config, self.optimizer, self.method
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self.set_progress is not None:
            self.set_progress(step / self.total)
        method.before_step(step)
        with self.autocast():
            output = self.model(x)
        logits, auxiliary = output if isinstance(output, tuple) else (output, None)
        if step == 0 and tuple(logits.shape) != (len(x), self.classes):
            raise EvaluationFailed(
                f"the network gives {list(logits.shape)} for a batch of {len(x)}, expected [{len(x)}, {self.classes}]: "
                f"one value per class, of which the data have {self.classes}."
            )
        loss = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
        self.losses.append(loss.detach())
        if auxiliary is not None and config.aux_weight > 0:
            extra = F.cross_entropy(auxiliary.float(), y, label_smoothing=config.label_smoothing)
            loss = loss + config.aux_weight * extra
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        if not method.after_backward(step, optimizer):
            if config.grad_clip > 0:
                nn.utils.clip_grad_norm_(self.parameters, config.grad_clip, foreach=True)
            optimizer.step()
        method.after_step(step, optimizer)
        return logits.detach().argmax(1)

    def check_finite(self, epoch: int) -> None:
        """Raise if a loss of this epoch so far is not finite."""
        if not self.losses:
            return
        finite = torch.isfinite(torch.stack(self.losses))
        if not finite.all():
            step = int(torch.argmin(finite.int()))
            raise EvaluationFailed(
                f"training diverged: the loss is {float(self.losses[step])} in epoch {epoch}, "
                f"step {step + 1} of {self.steps}. {_CURE}"
            )


_CURE = "Lower train.lr, lengthen train.warmup_epochs or set train.grad_clip = 1."


def _memory_format(model: nn.Module, layout: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
