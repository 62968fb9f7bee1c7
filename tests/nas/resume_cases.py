"""A small trial that can be evaluated in parts, here and in a process that is killed."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from nas.config import RunConfig, load_config
from nas.evaluate import TrialEvaluator
from nas.latency import Priced
from nas.setup import make_data, make_space
from search_spaces import Architecture

torch.set_num_threads(1)

EPOCHS = 6
PLAN = pd.DataFrame({"op": ["0", "1"], "kind": ["linear", "linear"], "ms": [0.1, 1 / 3]})


class Counting:
    """Measures nothing, and counts how often it was asked."""

    predicts = False

    def __init__(self) -> None:
        self.asked = 0

    def price(self, model: Any, example: Any) -> Priced:
        self.asked += 1
        return Priced({"latency_ms": 1 / 3, "latency_source": "measured"}, PLAN)


def make_config(**sections: Any) -> RunConfig:
    plain: dict[str, Any] = {
        "run": {"checkpoint_s": 0.0},
        "data": {"name": "digits", "limit": 200},
        "space": {"name": "mlp", "widths": [16], "max_depth": 1, "densities": [0.3], "patterns": ["unstructured"]},
        "train": {"epochs": EPOCHS, "batch_size": 32, "device": "cpu", "augment": ["crop"], "crop_padding": 1},
    }
    for name, values in sections.items():
        plain[name] = plain.get(name, {}) | values
    return load_config(plain)


class Trial:
    """One trial of a run folder; every call is a job in a fresh evaluator."""

    def __init__(self, folder: Path, number: int = 0, *, seed: int = 0, **sections: Any) -> None:
        self.folder, self.number, self.seed = folder, number, seed
        self.config = make_config(**sections)
        self.data = make_data(self.config)
        self.space = make_space(self.config, self.data.input_shape, self.data.classes, None)
        self.pricer = Counting()
        self.reports: list[dict[str, Any]] = []
        self.architecture: Architecture = self.space.sample(0)

    def __call__(self, until: int | None = None, **more: Any) -> dict[str, Any]:
        payload = {"trial": self.number, "architecture": self.architecture.to_json(), "seed": self.seed, **more}
        if until is not None:
            payload["until"] = until
        evaluator = TrialEvaluator(self.config, self.folder, self.data, self.space, self.pricer)  # type: ignore[arg-type]
        return evaluator(payload, self.report)

    def report(self, info: dict[str, Any]) -> None:
        self.reports.append(info)

    def with_checkpoints_every(self, seconds: float) -> Trial:
        self.config = replace(self.config, run=replace(self.config.run, checkpoint_s=seconds))
        return self

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints" / f"{self.number:05d}"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts" / f"{self.number:05d}"


if __name__ == "__main__":  # FOLDER EPOCH: train, and die after that epoch, as nothing can see coming
    trial, last = Trial(Path(sys.argv[1]), train={"method": sys.argv[3]}), int(sys.argv[2])

    def die(info: dict[str, Any]) -> None:
        if info.get("epoch") == last:
            os.kill(os.getpid(), signal.SIGKILL)

    trial.report = die  # type: ignore[method-assign]
    trial()
