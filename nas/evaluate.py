"""Evaluate one architecture: build it, count it, measure its latency, train it, keep its files.

`TrialEvaluator` is what worker processes run; `setup` makes one from plain data, so that it can be made in any process. It never
touches the run's database: it returns what was found and the driver records it.

A training goes on from its last checkpoint, so a job that died repeats little; and it may be left half-way ("until"), with its
checkpoint and its files as they are then, and gone on with by a later job: that is how trainings are stopped early.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.artifacts import checkpoint_folder, load_initial, plan_text, write_artifacts
from nas.checkpoint import Checkpoint, Checkpoints, read_newest
from nas.config import RunConfig
from nas.data import Data
from nas.latency import Pricer, constraints_of, make_pricer
from nas.objectives import feasible, violations
from nas.setup import prepare
from nas.training import Training, TrainingState, check_training
from ops.counting import count
from ops.dead import dead_channels
from ops.layers import draw_masks_
from search_spaces import Architecture, Space
from search_spaces.skips import skip_pool_share

Report = Callable[[dict[str, Any]], None]


class TrialEvaluator:
    """Callable that evaluates one architecture; holds what all trials share.

    Args:
        config: the run's.
        folder: the run's folder; artifacts and checkpoints go below it.
        data: what to train and validate on. The test part is not looked at here.
        space: builds the networks.
        pricer: finds their latency; default the config's.
    """

    def __init__(self, config: RunConfig, folder: Path, data: Data, space: Space, pricer: Pricer | None = None) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.space = space
        self.constraints = constraints_of(config)
        self.pricer = pricer or make_pricer(config)

    def __call__(self, payload: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """Evaluate, or go on with it.

        Args:
            payload: "trial", "architecture" (JSON text) and "seed"; and where wanted

                initial     a safetensors file below the run's folder: training starts from these weights and masks, and the masks
                            stay as they are
                until       pause after this epoch if the training has more
                settings    {"lr": factor, "weight_decay": factor} on the config's values, from where the training is on
                donor       folder of another trial's checkpoints below the run's: weights, masks and optimizer slots are taken over
                            from the newest once per segment, if the architecture is the same; a donor that is gone or another
                            network changes nothing

            report: is told of the stage and every epoch.

        Returns:
            "state" ("complete", "infeasible" or "paused"), "metrics", "violations" (<= 0 is feasible) and "curve" (rows per epoch).
            A network that breaks a constraint on its cost is not trained. A paused one has the metrics that it would have if this
            were all of its training, and "trained_epochs".

        Raises:
            EvaluationFailed: it cannot be trained.
            RunError: the run's folder cannot be written, or holds another trial's checkpoints.
        """
        return _Evaluation(self, payload, report).run()


class _Evaluation:
    """One job: a trial, or a part of its training."""

    def __init__(self, shared: TrialEvaluator, payload: Mapping[str, Any], report: Report) -> None:
        self.config, self.folder, self.data, self.space = shared.config, shared.folder, shared.data, shared.space
        self.pricer, self.constraints = shared.pricer, shared.constraints
        self.payload, self.report = payload, report
        self.trial, self.seed = int(payload["trial"]), int(payload["seed"])
        self.architecture = Architecture.from_json(payload["architecture"])
        self.initial = payload.get("initial")
        self.train = self.config.train
        if self.initial:
            self.train = replace(self.train, method="fixed", method_options={})
        until = payload.get("until")
        self.until = self.train.epochs if until is None else min(int(until), self.train.epochs)
        stopping = self.config.stopping
        self.settle_epochs = None if stopping.rule == "none" else stopping.min_epochs
        identity = {
            "architecture": self.architecture.digest,
            "seed": self.seed,
            "initial": self.initial,
            "settle_epochs": self.settle_epochs,
            "train": self.config.as_dict()["train"],
        }
        folder = checkpoint_folder(self.folder, self.trial)
        self.checkpoints = Checkpoints(folder, identity, of="training", network="network")
        self.segment = {"until": self.until, "donor": payload.get("donor")}
        self.example = self.data.val.x[: self.config.latency.batch]
        self.metrics: dict[str, Any] = {}
        self.plan = ""
        self.saved = 0

    def run(self) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        self.model = self.space.build(self.architecture)
        checkpoint = self.checkpoints.load_whole()
        if checkpoint is not None:
            self.metrics, self.plan = dict(checkpoint.facts["metrics"]), checkpoint.facts["plan"]
        else:
            if self.initial:
                load_initial(self.folder / self.initial, self.model)
            self.measure()
            found = violations(self.metrics, self.constraints, partial=True)
            if not feasible(found):
                self.write(None, [])
                return {"state": "infeasible", "metrics": self.metrics, "violations": found, "curve": []}
        return self.answer(self.learn(checkpoint))

    def measure(self) -> None:
        """What is known of the network before it is trained."""
        self.report({"stage": "measuring"})
        counts = count(self.model, self.data.input_shape)
        masked = copy.deepcopy(self.model).eval()
        if not self.initial:
            draw_masks_(masked, torch.Generator().manual_seed(self.seed))
        priced = self.pricer.price(masked, self.example)
        self.metrics = {
            "params": counts.params,
            "nnz": counts.nnz,
            "density": counts.density,
            "kept_weights": counts.kept_weights,
            "weight_bytes": counts.weight_bytes,
            "dense_macs": counts.dense_macs,
            "macs": counts.macs,
            **priced.metrics,
        }
        self.plan = plan_text(priced.plan)

    # -- training ---------------------------------------------------------------------------------------------------------

    def learn(self, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
        """Train to the end of the segment, from the checkpoint if there is one; returns the history."""
        device = check_training(self.train, self.data)
        with Training(
            self.model, self.data, self.train, device, seed=self.seed, settle_epochs=self.settle_epochs
        ) as training:
            if checkpoint is not None:
                self.go_on(training, checkpoint)
            if len(training.history) >= self.until:
                return training.history
            training.set_factors(self.payload.get("settings") or {})
            self.since = time.monotonic()
            training.run(self.until, lambda row: self.after_epoch(training, row))
            if self.until < self.train.epochs and self.saved < self.until:
                self.save(training)
            return training.history

    def go_on(self, training: Training, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        try:
            training.load_state(TrainingState(checkpoint.tensors, facts["training"]))
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise self.checkpoints.misfit(checkpoint.path, error) from error
        self.saved = len(training.history)
        donor = self.payload.get("donor")
        if donor and self.saved < self.until and facts["segment"] != self.segment:
            self.take_weights(training, self.folder / donor)

    def take_weights(self, training: Training, donor: Path) -> None:
        found = read_newest(donor)
        if found is None:
            return
        checkpoint, identity = found
        if identity.get("architecture") == self.architecture.digest and training.take_weights(
            TrainingState(checkpoint.tensors, checkpoint.facts["training"])
        ):
            training.notes = {"donor": int(donor.name)}

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        epoch = row["epoch"]
        if epoch < self.until and time.monotonic() - self.since >= self.config.run.checkpoint_s:
            self.save(training)
        self.report({"stage": "training", "epochs": self.train.epochs, **row})

    def save(self, training: Training) -> None:
        state = training.state()
        facts = {"training": state.facts, "metrics": self.metrics, "plan": self.plan, "segment": self.segment}
        self.checkpoints.save(state.tensors, facts)
        self.saved, self.since = state.epochs, time.monotonic()

    # -- the answer -------------------------------------------------------------------------------------------------------

    def answer(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """What the training found, and the files of the network as it is now: also after a job that died between the two."""
        model, shape = self.model, self.data.input_shape
        curve = history[: self.until]
        trained = count(model, shape)
        metrics = self.metrics | {
            "val_accuracy": curve[-1]["val_accuracy"],
            "val_loss": curve[-1]["val_loss"],
            "nnz": trained.nnz,
            "density": trained.density,
            "kept_weights": trained.kept_weights,
            "weight_bytes": trained.weight_bytes,
            "macs": trained.macs,
        }
        metrics |= _collapse(model, shape, self.space, self.architecture)
        if self.pricer.predicts:  # the masks that training found; asking again costs nothing
            priced = self.pricer.price(model.eval(), self.example)
            metrics |= priced.metrics
            self.plan = plan_text(priced.plan)
        found = violations(metrics, self.constraints)
        self.write(model, history)
        if self.until < self.train.epochs:
            state = "paused"
            metrics["trained_epochs"] = self.until
        else:
            state = "complete" if feasible(found) else "infeasible"
        return {"state": state, "metrics": metrics, "violations": found, "curve": curve}

    def write(self, model: nn.Module | None, history: list[dict[str, Any]]) -> None:
        write_artifacts(self.folder, self.trial, self.architecture, model=model, history=history, plan=self.plan)


def _collapse(
    model: nn.Module, input_shape: tuple[int, ...], space: Space, architecture: Architecture
) -> dict[str, Any]:
    """What shows how little of a network computes: its dead channels, and the share of it that skips or pools, if it has such.

    A network that cannot be looked at so (it does not run on ones, or not on the meta device) stands without the numbers.
    """
    found: dict[str, Any] = {}
    with suppress(ValueError):
        channels = dead_channels(model, input_shape)
        found |= {"dead_channels": channels.dead, "channels": channels.channels}
    with suppress(ValueError):
        share = skip_pool_share(space, architecture)
        found |= {} if share is None else {"skip_pool_share": share}
    return found


def setup(plain: Mapping[str, Any]) -> TrialEvaluator:
    """Make the evaluator of a worker process from what `nas.setup.prepare` takes."""
    config, folder, data, space = prepare(plain)
    return TrialEvaluator(config, folder, data, space)
