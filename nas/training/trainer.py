"""Train one network on one data set, on the CPU or a CUDA device. Start with `train` and `evaluate`.

The data stay on the device as one tensor; batches are gathered and augmented many at a time. Nothing waits for the device
within an epoch. The model's initial weights are the caller's; everything random in here comes from `seed`, and the global
generators are as before when it returns. One seed, one thread count and one CPU give one result, bit for bit.

It does not stream data, resume, or choose an epoch: the result is the last epoch's.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.data import Data, Split
from nas.errors import ConfigError, EvaluationFailed
from nas.training.augment import augment
from nas.training.config import TrainConfig
from nas.training.methods import make_method
from nas.training.optim import learning_rate, make_optimizer
from ops.layers import SparseConv2d, SparseLinear

CHUNK_BYTES = 16 << 20
"""Rows are gathered and augmented in pieces of about this size."""


@dataclass(frozen=True)
class Evaluation:
    """Of a network on one part of a data set: accuracy in 0..1, mean cross-entropy in nats."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        history: a row per epoch: epoch (from 1), train_loss, train_accuracy (of the batches as they were seen), val_loss,
            val_accuracy, lr (of the last step), density (kept share of all conv and linear weights), seconds (of this epoch).
        val_accuracy, val_loss: of the last epoch.
    """

    history: list[dict[str, Any]]
    val_accuracy: float
    val_loss: float


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    seed: int,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
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

    Raises:
        EvaluationFailed: the loss is not finite (with epoch and step), or the model's output has the wrong shape.
        ConfigError: CUDA asked for where there is none, or image augmentation of a table.
    """
    device = check_training(config, data)
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(_derive(seed, "layers"))
        if cuda:
            torch.cuda.manual_seed(_derive(seed, "layers"))
        model.to(device)
        if cuda:
            _memory_format(model, torch.channels_last)
        try:
            return _Training(model, data, config, device, seed).run(on_epoch)
        finally:
            if cuda:
                _memory_format(model, torch.contiguous_format)
                model.cpu()
            model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, *, device: str | torch.device = "cpu", batch_size: int = 1024
) -> Evaluation:
    """Accuracy and loss of a network in float32. Its training mode is left as it was; it is moved to `device`."""
    was_training = model.training
    device = torch.device(device)
    model.to(device).eval()
    hits, losses = [], []
    for x, y in zip(split.x.split(batch_size), split.y.split(batch_size)):
        x, y = x.to(device), y.to(device)
        logits = model(x)
        hits.append((logits.argmax(1) == y).sum())
        losses.append(F.cross_entropy(logits, y, reduction="sum"))
    model.train(was_training)
    rows = len(split)
    return Evaluation(int(torch.stack(hits).sum()) / rows, float(torch.stack(losses).double().sum()) / rows)


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


class _Training:
    """One training: what stays the same over its steps."""

    def __init__(self, model: nn.Module, data: Data, config: TrainConfig, device: torch.device, seed: int) -> None:
        self.model, self.config, self.device = model, config, device
        self.x, self.y = data.train.x.to(device), data.train.y.to(device)
        self.val = Split(data.val.x.to(device), data.val.y.to(device))
        self.classes = data.classes
        self.batch = min(config.batch_size, len(self.y))
        self.steps = len(self.y) // self.batch
        self.total = self.steps * config.epochs
        self.warmup = min(round(config.warmup_epochs * self.steps), self.total // 2)
        self.order = torch.Generator().manual_seed(_derive(seed, "order"))
        self.chance = torch.Generator(device).manual_seed(_derive(seed, "augment"))
        self.masks = torch.Generator().manual_seed(_derive(seed, "masks"))
        self.optimizer = make_optimizer(model, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.method = make_method(config.method, config.method_options)
        self.set_progress = getattr(model, "set_progress", None)
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if device.type == "cuda":
            self.autocast = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
        self.losses: list[Tensor] = []

    def run(self, on_epoch: Callable[[dict[str, Any]], None] | None) -> TrainResult:
        history: list[dict[str, Any]] = []
        try:
            self.method.begin(self.model, self.total, self.masks)
            for epoch in range(1, self.config.epochs + 1):
                row = self.epoch(epoch)
                history.append(row)
                if on_epoch is not None:
                    on_epoch(row)
        finally:
            self.method.finish()
        return TrainResult(history, history[-1]["val_accuracy"], history[-1]["val_loss"])

    def epoch(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        self.model.train()
        self.losses = []
        guesses, labels = [], []
        lr = 0.0
        for step, (x, y) in enumerate(self.batches(), start=(epoch - 1) * self.steps):
            lr = learning_rate(step, total=self.total, warmup=self.warmup, peak=self.config.peak_lr)
            try:
                guesses.append(self.step(step, x, y, lr))
            except ValueError:
                self.check_finite(epoch)  # a method that ranks weights finds NaN first
                raise
            labels.append(y)
        self.check_finite(epoch)
        rows = self.steps * self.batch
        hits = int((torch.cat(guesses) == torch.cat(labels)).sum())
        found = evaluate(self.model, self.val, device=self.device)
        if not abs(found.loss) < float("inf"):
            raise EvaluationFailed(f"epoch {epoch}: the validation loss is {found.loss}. {_CURE}")
        return {
            "epoch": epoch,
            "train_loss": float(torch.stack(self.losses).double().mean()),
            "train_accuracy": hits / rows,
            "val_loss": found.loss,
            "val_accuracy": found.accuracy,
            "lr": lr,
            "density": kept_share(self.model),
            "seconds": time.perf_counter() - started,
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

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, in random order; augmented some megabytes at a time."""
        config = self.config
        rows = torch.randperm(len(self.y), generator=self.order)[: self.steps * self.batch].to(self.device)
        row_bytes = self.x[0].numel() * self.x.element_size()
        piece = self.batch * max(1, CHUNK_BYTES // (row_bytes * self.batch))
        for chosen in rows.split(piece):
            x, y = self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            if config.augment:
                x = augment(x, config.augment, padding=config.crop_padding, cutout=config.cutout, generator=self.chance)
            if self.device.type == "cuda" and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            yield from zip(x.split(self.batch), y.split(self.batch))

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


def kept_share(model: nn.Module) -> float:
    """Kept / all weights of the conv and linear layers, by the masks; 1.0 if there are none."""
    kept = total = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel()
            kept += module.nnz if isinstance(module, SparseConv2d | SparseLinear) else module.weight.numel()
    return kept / total if total else 1.0


def _memory_format(model: nn.Module, layout: torch.memory_format) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _derive(seed: int, stream: str) -> int:
    """A seed for one use, unrelated to those of other uses."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=7).digest(), "little")
