"""Runs one search from its first step to its result: data, epochs, log, checkpoints. The algorithm does the learning.

    train_algorithm(Darts(setting, options), data, folder, seed=0)

A search is a function of its seed (one thread count, one kind of CPU): killed at any moment and started again it ends in the same
result, bit for bit. It reads `data.train` alone, cut in halves (`nas.oneshot.halves`); the validation part is for judging what was
found, and the test part for nobody here. Start with `train_algorithm`; `read_result` and `read_log` read what it leaves.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from nas.checkpoint import Checkpoint, Checkpoints, read_facts, write_bytes, write_json
from nas.data import Data, Split
from nas.errors import EvaluationFailed, NasError, RunError
from nas.oneshot.algorithm import Algorithm, At, Phase
from nas.oneshot.halves import Augmentation, Batches, derive, halves
from nas.oneshot.supernet import Supernet

Report = Callable[[dict[str, Any]], None]

RESULT = "result.json"
EVALUATED_ROWS = 2048
"""Rows of D_a on which the supernet is evaluated after every epoch, at most."""
REPORT_S = 1.0
"""Seconds between two reports within an epoch."""
_CURE = "Lower lr (or lr of the scores and alphas), set grad_clip, or lengthen warmup_epochs in options.{name}"


@dataclass(frozen=True)
class Result:
    """What a finished search left in its folder.

    Attributes:
        found: per architecture {"architecture" (JSON), "note", "initial" (file in the folder, or None)}.
        facts: "algorithm", "seed", "options", "choices" (decision -> options, as the log orders probabilities), "epochs" (of
            all phases), "seconds", "peak_memory_bytes", "device".
        log: one row per epoch.
    """

    found: list[dict[str, Any]]
    facts: dict[str, Any]
    log: list[dict[str, Any]]


def train_algorithm(
    algorithm: Algorithm,
    data: Data,
    folder: Path,
    *,
    seed: int,
    report: Report = lambda info: None,
    augmentation: Augmentation | None = None,
    identity: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Train `algorithm` to its end, from its last checkpoint if there is one, and write its result.

    Every epoch is one row of the log: phase, epoch (from 1, within the phase), train_loss, train_accuracy (of the batches as they
    were seen), supernet_loss, supernet_accuracy (on a part of D_a), seconds, lr (of the last step), and what `algorithm.log_row()`
    gives. Every `options.checkpoint_s` seconds, and after every epoch, everything is saved.

    Args:
        algorithm: just made; its options and its device are used.
        data: only its training part is read.
        folder: of this search alone.
        seed: of halves, batches and augmentation, and of torch's own generators.
        report: called about once a second with {"phase", "epoch", "epochs", "step", "steps", "done" (share of all), "accuracy"}.
        augmentation: of all batches; default `options.augment` with the usual sizes.
        identity: JSON that a checkpoint must share, beside the algorithm's name, options and seed.
        clock: seconds, monotonic.

    Returns:
        The result; the one that is there already, if there is one.

    Raises:
        EvaluationFailed: the loss is not finite, or memory ran out; says where, and the cure. The last checkpoint is kept.
        RunError: a damaged or foreign checkpoint, or a folder that cannot be written.
        DataError: fewer than two rows.
    """
    folder = Path(folder)
    if (folder / RESULT).is_file():
        return read_result(folder)
    device = algorithm.setting.device
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(derive(seed, "global"))
        if cuda:
            torch.cuda.manual_seed(derive(seed, "global"))
            torch.cuda.reset_peak_memory_stats(device)
        how = augmentation or Augmentation(algorithm.options.augment)
        try:
            return _Search(algorithm, data, folder, seed, report, how, identity or {}, clock).run()
        except NasError:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(algorithm, folder, error) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error) or "out of memory" in str(error):
                raise _out_of_memory(algorithm, folder, error) from error
            raise


def read_result(folder: Path) -> Result:
    """What `train_algorithm` left.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = Path(folder) / RESULT
    try:
        content = json.loads(path.read_text())
        return Result(content["found"], content["facts"], content["log"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: expected the result of a search, found a damaged file ({error}); remove it, and the search is finished again "
            "from its last checkpoint"
        ) from error


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log of a search, finished or not: one row per epoch; empty before the first checkpoint."""
    if (Path(folder) / RESULT).is_file():
        return read_result(folder).log
    facts = read_facts(folder)
    return list((facts or {}).get("log", []))


class _Search:
    """One search under way."""

    def __init__(
        self,
        algorithm: Algorithm,
        data: Data,
        folder: Path,
        seed: int,
        report: Report,
        augmentation: Augmentation,
        identity: Mapping[str, Any],
        clock: Callable[[], float],
    ) -> None:
        self.algorithm, self.folder, self.report, self.clock = algorithm, folder, report, clock
        self.options = algorithm.options
        self.device = algorithm.setting.device
        self.seed = seed
        x, y = data.train.x.to(self.device), data.train.y.to(self.device)
        of_weights, of_alphas = (rows.to(self.device) for rows in halves(data.train.y, seed))
        size = self.options.batch_size
        self.training = Batches(
            Split(x[of_weights], y[of_weights]), size, seed=seed, stream="weights", augmentation=augmentation
        )
        held = Split(x[of_alphas], y[of_alphas])
        self.held_out = Batches(held, size, seed=seed, stream="alphas", augmentation=augmentation)
        self.shown = Batches(held, size, seed=seed, stream="evaluation")
        self.steps = self.training.per_round
        self.phases: tuple[Phase, ...] = algorithm.phases()
        self.epochs = sum(phase.epochs for phase in self.phases)
        said = {"algorithm": algorithm.name, "seed": seed, "options": _plain_options(self.options)}
        augmenting = {"augmentation": asdict(augmentation)}
        self.checkpoints = Checkpoints(folder, {**said, **augmenting, **identity})
        self.facts = said
        self.choices: dict[str, list[Any]] = {}
        if isinstance(supernet := getattr(algorithm, "supernet", None), nn.Module):
            channels_last_(supernet)
        if isinstance(supernet, Supernet):
            self.choices = {name: list(choice.options) for name, choice in supernet.choices.items()}
        # Everything below is in the checkpoint.
        self.phase, self.epoch, self.step = 0, 0, 0
        self.drawn = 0
        self.sum, self.hits, self.seconds, self.total_seconds = 0.0, 0, 0.0, 0.0
        self.log: list[dict[str, Any]] = []
        # Steps whose loss was not looked at yet: nothing waits for the device within an epoch.
        self.losses: list[Tensor] = []
        self.guesses: list[Tensor] = []
        self.reported = self.saved = self.since = clock()

    def run(self) -> Result:
        if rows := self.algorithm.compared_rows:
            count = max(1, min(self.shown.per_round, rows // self.shown.batch))
            self.algorithm.compare_on([self.shown[number] for number in range(count)])
        self._resume()
        while self.phase < len(self.phases):
            while self.epoch < self.phases[self.phase].epochs:
                self._epoch()
            self.phase, self.epoch = self.phase + 1, 0
            if self.phase < len(self.phases):
                self.algorithm.begin_phase(self.phase, self.steps)
        return self._finish()

    # -- one epoch --------------------------------------------------------------------------------------------------------

    def _epoch(self) -> None:
        phase = self.phases[self.phase]
        self.since = self.clock()
        before = sum(p.epochs for p in self.phases[: self.phase]) + self.epoch
        while self.step < self.steps:
            at = At(self.phase, self.epoch, phase.epochs, self.step, self.steps)
            x, y = self.training[before * self.steps + self.step]
            try:
                report = self.algorithm.step(x, y, self._held, at)
            except ValueError as error:
                self._look()  # what ranks scores or weights finds NaN before the losses are looked at
                if "NaN" not in str(error):
                    raise
                where = f"phase {phase.name}, epoch {self.epoch + 1} of {phase.epochs}, step {self.step + 1} of {self.steps}"
                raise self._diverged(f"the search diverged in {where}: {error}") from error
            self.losses.append(report.loss)
            self.guesses.append(report.hits)
            self.step += 1
            now = self.clock()
            if self.step < self.steps and now - self.saved >= self.options.checkpoint_s:
                self._save()
            if now - self.reported >= REPORT_S:
                self._tell()
        self._look()
        accuracy, loss = self._evaluate()
        if not math.isfinite(loss):
            raise self._diverged(
                f"after epoch {self.epoch + 1} of phase {phase.name}: the supernet's loss on D_a is {loss}"
            )
        self._clocked()
        rows = self.steps * self.training.batch
        row = {
            "phase": phase.name,
            "epoch": self.epoch + 1,
            "train_loss": self.sum / self.steps,
            "train_accuracy": self.hits / rows,
            "supernet_loss": loss,
            "supernet_accuracy": accuracy,
            "seconds": self.seconds,
        }
        if callable(rate := getattr(self.algorithm, "learning_rate", None)):
            row["lr"] = float(rate(At(self.phase, self.epoch, phase.epochs, self.steps - 1, self.steps)))
        self.log.append(row | json.loads(json.dumps(self.algorithm.log_row())))
        self.sum, self.hits, self.seconds = 0.0, 0, 0.0
        self.epoch, self.step = self.epoch + 1, 0
        self._save()
        self._tell()

    def _held(self) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        return self.held_out[self.drawn - 1]

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Accuracy and mean loss of the supernet on the first batches of D_a, in a fixed order and not augmented."""
        count = max(1, min(self.shown.per_round, EVALUATED_ROWS // self.shown.batch))
        hits, losses = [], []
        for number in range(count):
            x, y = self.shown[number]
            logits = self.algorithm.logits(x).float()
            hits.append((logits.argmax(1) == y).sum())
            losses.append(F.cross_entropy(logits, y))
        accuracy = int(torch.stack(hits).sum()) / (count * self.shown.batch)
        return accuracy, float(torch.stack(losses).double().mean())

    def _look(self) -> None:
        """Add up the losses of the steps since the last look, in their order, and see that all are finite."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).double().tolist()
        first = self.step - len(losses)
        for position, loss in enumerate(losses):
            if not math.isfinite(loss):
                phase = self.phases[self.phase]
                raise self._diverged(
                    f"the search diverged: the loss is {loss} in phase {phase.name}, epoch {self.epoch + 1} of {phase.epochs}, "
                    f"step {first + position + 1} of {self.steps}"
                )
            self.sum += loss
        self.hits += int(torch.stack(self.guesses).sum())
        self.losses, self.guesses = [], []

    def _diverged(self, what: str) -> EvaluationFailed:
        cure = _CURE.format(name=self.algorithm.name)
        return EvaluationFailed(
            f"{what}. {cure}, and start in another folder (--out); the last good checkpoint is kept in {self.folder}"
        )

    def _clocked(self) -> None:
        now = self.clock()
        self.seconds += now - self.since
        self.total_seconds += now - self.since
        self.since = now

    def _tell(self) -> None:
        self.reported = self.clock()
        phase = self.phases[self.phase]
        before = sum(p.epochs for p in self.phases[: self.phase]) + self.epoch
        self.report(
            {
                "phase": phase.name,
                "epoch": min(self.epoch + 1, phase.epochs),
                "epochs": phase.epochs,
                "step": self.step,
                "steps": self.steps,
                "done": (before + self.step / self.steps) / self.epochs,
                "accuracy": self.log[-1]["supernet_accuracy"] if self.log and phase.of_supernet else None,
            }
        )

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._look()
        self._clocked()
        tensors, facts = self.algorithm.state()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                phase = self.phases[self.phase]
                raise self._diverged(
                    f"the search diverged: {name} holds NaN in phase {phase.name}, epoch {self.epoch + 1} of {phase.epochs}, "
                    f"after step {self.step} of {self.steps}"
                )
        ours = {"torch_rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            ours["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        self.checkpoints.save(
            {f"algorithm.{name}": tensor for name, tensor in tensors.items()} | ours,
            {
                "phase": self.phase,
                "epoch": self.epoch,
                "step": self.step,
                "drawn": self.drawn,
                "sum": self.sum,
                "hits": self.hits,
                "seconds": self.seconds,
                "total_seconds": self.total_seconds,
                "log": self.log,
                "choices": self.choices,
                "algorithm": facts,
            },
        )
        self.saved = self.clock()

    def _resume(self) -> None:
        checkpoint = self.checkpoints.load()
        if checkpoint is None:
            self.algorithm.begin_phase(0, self.steps)
            return
        facts = checkpoint.facts
        self.phase, self.epoch, self.step = facts["phase"], facts["epoch"], facts["step"]
        self.drawn, self.sum, self.hits = facts["drawn"], facts["sum"], facts["hits"]
        self.seconds, self.total_seconds, self.log = facts["seconds"], facts["total_seconds"], facts["log"]
        self.algorithm.begin_phase(self.phase, self.steps)
        self._take_over(checkpoint)
        self._tell()

    def _take_over(self, checkpoint: Checkpoint) -> None:
        tensors = {
            name.removeprefix("algorithm."): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith("algorithm.")
        }
        try:
            self.algorithm.load(tensors, checkpoint.facts["algorithm"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise self.checkpoints.misfit(checkpoint.path, error) from error
        torch.set_rng_state(checkpoint.tensors["torch_rng"])
        if self.device.type == "cuda" and "cuda_rng" in checkpoint.tensors:
            torch.cuda.set_rng_state(checkpoint.tensors["cuda_rng"], self.device)

    # -- the end ----------------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        found = []
        for number, one in enumerate(self.algorithm.found()):
            name = None
            if one.initial is not None:
                name = f"initial-{number:03d}.safetensors"
                plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in one.initial.items()}
                write_bytes(self.folder / name, save(plain), "the weights that a trial is to start from")
            found.append({"architecture": json.loads(one.architecture.to_json()), "note": one.note, "initial": name})
        facts = self.facts | {
            "choices": self.choices,
            "epochs": self.epochs,
            "seconds": self.total_seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "device": self.device.type,
        }
        write_json(self.folder / RESULT, {"found": found, "facts": facts, "log": self.log}, "the result of the search")
        return read_result(self.folder)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of a CUDA device what torch allocated there, else of this process altogether."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def channels_last_(module: nn.Module) -> None:
    """Put the convolution weights of a module on a CUDA device into the layout that is fast there, in place."""
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.is_cuda:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _plain_options(options: Any) -> dict[str, Any]:
    """Options as JSON, without those that decide nothing about the result."""
    plain = json.loads(json.dumps(asdict(options)))
    return {key: value for key, value in plain.items() if key not in ("seeds", "controls", "checkpoint_s")}


def _out_of_memory(algorithm: Algorithm, folder: Path, error: BaseException) -> EvaluationFailed:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    name, options = algorithm.name, algorithm.options
    more = "" if options.checkpointing else f" or options.{name}.checkpointing = true (slower, less memory),"
    return EvaluationFailed(
        f"memory ran out while the supernet of {name} was trained ({first}). Set options.{name}.batch_size below "
        f"{options.batch_size},{more} or search a smaller space, and start in another folder (--out); on a CPU, fewer workers "
        f"help too. The last checkpoint is kept in {folder}"
    )
