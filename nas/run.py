"""A run folder, read: its trials as one table, its front, its networks.

`load_run(path)` works while the search is going on and afterwards, and needs nothing but the folder (and the server that the
folder's storage.json names, if there is one). It never writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from nas.artifacts import load_weights, read_plan
from nas.config import RunConfig, load_config
from nas.errors import RunError
from nas.folder import space_copy
from nas.frames import complete, front_rows, trials_frame
from nas.report.history import reference_box, relative_hypervolume
from nas.setup import make_space
from nas.storage import DATABASE, Storage, is_run, run_storage
from nas.store import Store, Trial
from nas.transactions import PATIENCE_S
from search_spaces import Architecture, Space
from search_spaces.space import SpaceFunction

GIVEN = "(given as object)"
"""How the name of a space begins in the config of a run that was given the space as an object."""


def load_run(path: str | Path, space: Space | SpaceFunction | None = None) -> Run:
    """Open a run folder for reading.

    Args:
        path: runs/<name>.
        space: the space object or function the run was made with, if it was given as an object (`search(space=...)`):
            nobody else can build its networks again.

    Raises:
        RunError: there is no run at `path`, or it cannot be read.
    """
    return Run(path, space)


class Run:
    """What a search left in its folder.

    Args:
        path: runs/<name>.
        space: as in `load_run`.
        storage: its database, where the caller knows more than the folder does (a password).
    """

    def __init__(
        self, path: str | Path, space: Space | SpaceFunction | None = None, storage: Storage | None = None
    ) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise RunError(f"no run folder {self.folder}; a search makes one under runs/, or where --out says")
        if not is_run(self.folder):
            raise RunError(f"{self.folder}: not a run folder (no run.db in it)")
        if not (self.folder / "config.toml").is_file():
            raise RunError(f"{self.folder}: config.toml is missing; restore it, it is written when the run starts")
        self.config: RunConfig = load_config(self.folder / "config.toml", name=self.folder.name)
        self._given_space = space
        self._storage = storage
        self._patience_s = 0.0

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
        try:
            facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(facts, dict):
                raise ValueError(f"expected an object, found {type(facts).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f"{path}: damaged: {error}; the run's results do not depend on it, it may be removed"
            ) from error
        return facts

    @property
    def trials(self) -> list[Trial]:
        """All trials as they stand now, in order of their numbers."""
        with self._open() as store:
            return store.trials()

    @property
    def finished(self) -> bool:
        """True once the search has done everything it was asked to."""
        return bool(self.meta("finished"))

    def meta(self, key: str, default: Any = None) -> Any:
        """A fact about the run: "data" (shapes and classes), "finished", "front_verified", ..."""
        with self._open() as store:
            return store.get_meta(key, default)

    def trial(self, number: int) -> Trial:
        """One trial.

        Raises:
            RunError: there is none of that number.
        """
        with self._open() as store:
            try:
                return store.trial(int(number))
            except (ValueError, OverflowError) as error:
                text = str(error) if isinstance(error, ValueError) else f"no trial {number}"
                raise RunError(text) from error

    def frame(self) -> pd.DataFrame:
        """One row per trial, failed and infeasible ones too; fixed dtypes, units in the names."""
        return trials_frame(self.trials)

    def curve(self, trial: int) -> list[dict[str, Any]]:
        """One row per epoch; a copy has its original's."""
        number = self._original(trial)
        with self._open() as store:
            return store.curve(number)

    def curves(self, trials: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
        """Trial -> one row per epoch, of many trials in one look; a copy has none of its own."""
        with self._open() as store:
            return {number: store.curve(number) for number in trials}

    def pareto(self) -> pd.DataFrame:
        """The feasible rows no other dominates, best first objective first; equal networks once."""
        return front_rows(self.frame(), self.objectives).reset_index(drop=True)

    def hypervolume(self, searcher: str | None = None) -> float:
        """Share of the box between the run's worst and best feasible values that its networks dominate, in [0, 1].

        The number of the searcher table and the report; it has no unit and compares searchers of one run. NaN where no two
        feasible trials differ in every objective. `nas.pareto.hypervolume` takes points and a reference in real units.

        Args:
            searcher: count its trials only; default all.
        """
        frame = self.frame()
        chosen = frame if searcher is None else frame[frame["searcher"] == searcher]
        rows = complete(chosen, self.objectives)
        return relative_hypervolume(rows, self.objectives, reference_box(frame, self.objectives))

    @cached_property
    def space(self) -> Space:
        """The space the run searched, from its config and (for a space file of the user's) the copy kept in the folder."""
        given = self._given_space
        if isinstance(given, Space):
            return given
        facts = self.meta("data")
        if facts is None:
            raise RunError(f"{self.folder}: the run was stopped before it began; start it again")
        if given is None and self.config.space["name"].startswith(GIVEN):
            raise RunError(
                f"{self.folder}: its space was given as an object, {self.config.space['name'].removeprefix(GIVEN).strip()}; "
                "give it again: load_run(path, space=...)"
            )
        config, copy = self.config, space_copy(self.folder, self.config)
        if copy is not None and copy.is_file():
            function = config.space["name"].rpartition(":")[2]
            config = replace(config, space={**config.space, "name": f"{copy.resolve()}:{function}"})
        return make_space(
            config, tuple(facts["input_shape"]), facts["classes"], Path(self.meta("space_folder", ".")), function=given
        )

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

    def _open(self) -> Store:
        storage = self._storage or run_storage(self.folder)
        if not storage.url:
            return Store.open(self.folder / DATABASE, read_only=True)
        store = Store.open(storage.url, read_only=True, run=storage.run, patience_s=self._patience_s)
        self._patience_s = PATIENCE_S  # a server that answered once is waited for
        return store

    def _original(self, trial: int) -> int:
        found = self.trial(trial)
        return found.trial if found.copy_of is None else found.copy_of
