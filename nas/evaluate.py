"""Evaluate one architecture: build it, count it, measure its latency, train it, keep its files.

`TrialEvaluator` is what worker processes run; `setup` makes one from plain data, so that it can be made in any process. It never
touches the run's database: it returns what was found and the driver records it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.artifacts import load_initial, write_artifacts
from nas.config import RunConfig
from nas.data import Data
from nas.latency import Pricer, constraints_of, make_pricer
from nas.objectives import feasible, violations
from nas.setup import prepare
from nas.training import train
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
        folder: the run's folder; artifacts go below it.
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
        """Evaluate `payload` = {"trial", "architecture" (JSON text), "seed"}, and "initial" (a safetensors file in the run's
        folder) if training is to start from given weights and masks; the masks then stay as they are.

        Returns:
            "state" ("complete" or "infeasible"), "metrics", "violations" (<= 0 is feasible) and "curve" (rows per epoch).
            A network that breaks a constraint on its cost is not trained.
        """
        trial, seed = int(payload["trial"]), int(payload["seed"])
        architecture = Architecture.from_json(payload["architecture"])
        torch.manual_seed(seed)
        model = self.space.build(architecture)
        config, initial = self.config.train, payload.get("initial")
        if initial:
            load_initial(self.folder / initial, model)
            config = replace(config, method="fixed", method_options={})
        example = self.data.val.x[: self.config.latency.batch]

        report({"stage": "measuring"})
        counts = count(model, self.data.input_shape)
        metrics: dict[str, Any] = {
            "params": counts.params,
            "nnz": counts.nnz,
            "density": counts.density,
            "kept_weights": counts.kept_weights,
            "weight_bytes": counts.weight_bytes,
            "dense_macs": counts.dense_macs,
            "macs": counts.macs,
        }
        masked = copy.deepcopy(model).eval()
        if not initial:
            draw_masks_(masked, torch.Generator().manual_seed(seed))
        priced = self.pricer.price(masked, example)
        metrics |= priced.metrics
        found = violations(metrics, self.constraints, partial=True)
        if not feasible(found):
            write_artifacts(self.folder, trial, architecture, model=None, history=[], plan=priced.plan)
            return {"state": "infeasible", "metrics": metrics, "violations": found, "curve": []}

        epochs = self.config.train.epochs
        result = train(
            model,
            self.data,
            config,
            seed=seed,
            on_epoch=lambda row: report({"stage": "training", "epochs": epochs, **row}),
        )
        metrics |= {"val_accuracy": result.val_accuracy, "val_loss": result.val_loss}
        trained = count(model, self.data.input_shape)
        metrics |= {
            "nnz": trained.nnz,
            "density": trained.density,
            "kept_weights": trained.kept_weights,
            "weight_bytes": trained.weight_bytes,
            "macs": trained.macs,
        }
        metrics |= _collapse(model, self.data.input_shape, self.space, architecture)
        if self.pricer.predicts:  # the masks that training found; asking again costs nothing
            priced = self.pricer.price(model.eval(), example)
            metrics |= priced.metrics
        found = violations(metrics, self.constraints)
        write_artifacts(self.folder, trial, architecture, model=model, history=result.history, plan=priced.plan)
        state = "complete" if feasible(found) else "infeasible"
        return {"state": state, "metrics": metrics, "violations": found, "curve": result.history}


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
