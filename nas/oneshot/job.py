"""Trains one supernet in whatever process it is put: what executors run before the trials of one-shot searches.

`setup` makes a `SupernetTrainer` from plain data, as `nas.evaluate.setup` does for trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nas.config import RunConfig
from nas.data import Data
from nas.errors import ConfigError
from nas.latency import open_model
from nas.oneshot.algorithm import Algorithm, Setting
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.engine import train_algorithm
from nas.oneshot.halves import Augmentation
from nas.oneshot.searcher import make_options
from nas.setup import prepare
from nas.training.trainer import resolve_device
from search_spaces import Space

Report = Callable[[dict[str, Any]], None]


class SupernetTrainer:
    """Callable that trains one supernet to its end, from its last checkpoint.

    Args:
        config: the run's.
        folder: the run's folder; searches have folders below oneshot/.
        data: the training part is looked at, nothing else.
        space: what is searched.
    """

    def __init__(self, config: RunConfig, folder: Path, data: Data, space: Space) -> None:
        self.config = config
        self.folder = folder
        self.data = data
        self.space = space

    def __call__(self, payload: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """Train `payload` = {"job" (folder), "algorithm", "seed", "options"}.

        Returns:
            {"found": number of architectures, "seconds"}; everything else is in the folder's result.json.
        """
        device = resolve_device(self.config.train.device)
        name, seed = str(payload["algorithm"]), int(payload["seed"])
        algorithm = make_algorithm(name, payload["options"], self.config, self.data, self.space, seed, device)
        train = self.config.train
        result = train_algorithm(
            algorithm,
            self.data,
            job_folder(self.folder, payload["job"]),
            seed=seed,
            report=report,
            augmentation=Augmentation(algorithm.options.augment, train.crop_padding, train.cutout),
            identity={"space": dict(self.config.space), "rows": len(self.data.train), "data": self.data.name},
        )
        return {"found": len(result.found), "seconds": result.facts["seconds"]}


def make_algorithm(
    name: str,
    options: Mapping[str, Any],
    config: RunConfig,
    data: Data,
    space: Space,
    seed: int,
    device: torch.device | None = None,
) -> Algorithm:
    """An algorithm on the run's space and data; its augmentation is the run's where it names none.

    Raises:
        ConfigError: an option is wrong, or the space has nothing that it could search.
    """
    chosen = make_options(name, options)
    if not chosen.augment:
        chosen = replace(chosen, augment=config.train.augment)
    if chosen.augment and len(data.input_shape) != 3:
        raise ConfigError(
            f"options.{name}.augment: {', '.join(chosen.augment)} are for images, but rows of {data.name} are {data.input_shape}"
        )
    latency = open_model(config.latency.threads) if config.latency.model == "predict" else None
    setting = Setting(
        space,
        data.input_shape,
        data.classes,
        seed,
        device or torch.device("cpu"),
        latency,
        dict(config.constraints),
        dict(config.objectives),
    )
    return ALGORITHMS[name](setting, chosen)


def job_folder(run_folder: Path, job: str) -> Path:
    """Where a search has its checkpoints and its result, whether they exist or not."""
    return run_folder / "oneshot" / job


def setup(plain: Mapping[str, Any]) -> SupernetTrainer:
    """Make the trainer of a worker process from what `nas.setup.prepare` takes."""
    config, folder, data, space = prepare(plain)
    return SupernetTrainer(config, folder, data, space)
