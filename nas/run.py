"""A run folder, read: its trials as one table, its front, its networks.

`load_run(path)` works while the search is going on and afterwards, and needs nothing but the folder. It never writes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from nas.artifacts import load_weights, read_plan
from nas.config import RunConfig, load_config
from nas.errors import RunError
from nas.evaluate import make_space
from nas.folder import space_copy
from nas.frames import front_rows, trials_frame
from nas.pareto import hypervolume
from nas.store import Store, Trial
from search_spaces import Architecture, Space


def load_run(path: str | Path) -> Run:
    """Open a run folder for reading.

    Raises:
        RunError: there is no run at `path`, or it cannot be read.
    """
    return Run(path)


class Run:
    """What a search left in its folder.

    Args:
        path: runs/<name>.
        space: the space object, for a run whose space function cannot be imported again (made in a notebook, say).
    """

    def __init__(self, path: str | Path, space: Space | None = None) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise RunError(f"no run folder {self.folder}; a search makes one under runs/, or where --out says")
        if not (self.folder / "run.db").is_file():
            raise RunError(f"{self.folder}: not a run folder (no run.db in it)")
        if not (self.folder / "config.toml").is_file():
            raise RunError(f"{self.folder}: config.toml is missing; restore it, it is written when the run starts")
        self.config: RunConfig = load_config(self.folder / "config.toml", name=self.folder.name)
        if space is not None:
            self.__dict__["space"] = space

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.run.name

    @property
    def objectives(self) -> dict[str, str]:
        """metric -> "max" or "min"."""
        return dict(self.config.objectives)

    @property
    def constraints(self) -> dict[str, str]:
        """metric -> "<= number" or ">= number"."""
        return dict(self.config.constraints)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, CPU and threads the run was made with."""
        path = self.folder / "environment.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def trials(self) -> list[Trial]:
        """All trials as they stand now, in order of their numbers."""
        with Store.open(self.folder / "run.db", read_only=True) as store:
            return store.trials()

    @property
    def finished(self) -> bool:
        """True once the search has done everything it was asked to."""
        return bool(self.meta("finished"))

    def meta(self, key: str, default: Any = None) -> Any:
        """A fact about the run: "data" (shapes and classes), "finished", "front_verified", ..."""
        with Store.open(self.folder / "run.db", read_only=True) as store:
            return store.get_meta(key, default)

    def trial(self, number: int) -> Trial:
        """One trial.

        Raises:
            RunError: there is none of that number.
        """
        with Store.open(self.folder / "run.db", read_only=True) as store:
            try:
                return store.trial(int(number))
            except ValueError as error:
                raise RunError(str(error)) from error

    def frame(self) -> pd.DataFrame:
        """One row per trial, failed and infeasible ones too; fixed dtypes, units in the names."""
        return trials_frame(self.trials)

    def curve(self, trial: int) -> list[dict[str, Any]]:
        """One row per epoch; a copy has its original's."""
        number = self._original(trial)
        with Store.open(self.folder / "run.db", read_only=True) as store:
            return store.curve(number)

    def pareto(self) -> pd.DataFrame:
        """The feasible rows no other dominates, best first objective first; equal networks once."""
        return front_rows(self.frame(), self.objectives).reset_index(drop=True)

    def reference_point(self) -> dict[str, float]:
        """The point hypervolume is measured from: the worst value of each objective over all complete trials."""
        frame = self.frame()
        complete = frame[frame["state"] == "complete"]
        return {
            name: float(complete[name].min() if direction == "max" else complete[name].max())
            for name, direction in self.objectives.items()
        }

    def hypervolume(self, searcher: str | None = None) -> float:
        """Hypervolume of the complete trials (of one searcher) against `reference_point`; 0.0 if there are none."""
        frame = self.frame()
        points = frame[(frame["state"] == "complete") & ((frame["searcher"] == searcher) if searcher else True)]
        if points.empty:
            return 0.0
        values = points[list(self.objectives)].to_numpy(dtype=float)
        reference = np.array(list(self.reference_point().values()))
        return hypervolume(values, reference, list(self.objectives.values()))

    @cached_property
    def space(self) -> Space:
        """The space the run searched, from its config and (for a space file of the user's) the copy kept in the folder."""
        facts = self.meta("data")
        if facts is None:
            raise RunError(f"{self.folder}: the run was stopped before it began; start it again")
        config, copy = self.config, space_copy(self.folder, self.config)
        if copy is not None and copy.is_file():
            function = config.space["name"].rpartition(":")[2]
            config = replace(config, space={**config.space, "name": f"{copy.resolve()}:{function}"})
        return make_space(config, tuple(facts["input_shape"]), facts["classes"], Path(self.meta("space_folder", ".")))

    def example_input(self) -> torch.Tensor:
        """float32[1, *input_shape], deterministic normal noise: an input of the right shape."""
        shape = tuple(self.meta("data")["input_shape"])
        return torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))

    def architecture(self, trial: int) -> Architecture:
        """The architecture of a trial."""
        return self.trial(trial).architecture

    def plan_frame(self, trial: int) -> pd.DataFrame:
        """One row per executed operation of a trial, as it was measured."""
        return read_plan(self.folder, self._original(trial))

    def build(self, trial: int) -> nn.Module:
        """The trained network of a trial, in eval mode, masks and weights loaded.

        Raises:
            RunError: no such trial, or it has no weights.
        """
        number = self._original(trial)
        model = self.space.build(self.architecture(number))
        load_weights(self.folder, number, model)
        return model.eval()

    def export(self, trial: int, folder: str | Path) -> dict[str, Any]:
        """Write a trial's network as a folder that needs nothing of this project; returns the verification.

        Raises:
            RunError: no such trial, or it has no weights.
            ExportError: the network cannot be exported faithfully.
        """
        from nas.finish import export_trial

        return export_trial(self, trial, Path(folder))

    def _original(self, trial: int) -> int:
        found = self.trial(trial)
        return found.trial if found.copy_of is None else found.copy_of
