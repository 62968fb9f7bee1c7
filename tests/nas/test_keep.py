"""Laws of what stays on the disk: checkpoints of open trials, weights of what may still be handed out."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

from nas.artifacts import checkpoint_folder, clean_scratch, load_weights, trial_folder, write_artifacts
from nas.errors import RunError
from nas.keep import Keeper
from nas.pareto import nondominated
from nas.store import Store, Trial
from search_spaces import get_space

SPACE = get_space("mlp", input_shape=(8,), classes=3)
OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}
PLAN = pd.DataFrame([{"op": "0", "kind": "linear"}])


class Folder:
    """A run folder with trials that have files but no networks to speak of."""

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, Store.create(path / "run.db")

    def keeper(self, keep: str = "front") -> Keeper:
        return Keeper(self.path, self.store, OBJECTIVES, keep)

    def propose(self, *, copy_of: int | None = None, sampler: dict[str, Any] | None = None) -> Trial:
        index = len(self.store.trials("s"))
        return self.store.propose(
            searcher="s",
            index=index,
            architecture=SPACE.sample(index if copy_of is None else copy_of),
            seed=0,
            epochs=1,
            sampler=sampler or {},
            copy_of=copy_of,
        )

    def train(self, trial: Trial) -> None:
        write_artifacts(
            self.path, trial.trial, trial.architecture, model=nn.Linear(1, 1), history=[{"epoch": 1}], plan=PLAN
        )
        folder = checkpoint_folder(self.path, trial.trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint-000001.safetensors").touch()

    def add(self, accuracy: float, ms: float, *, state: str = "complete", **more: Any) -> Trial:
        """A finished trial with its files."""
        metrics = {"val_accuracy": accuracy, "latency_ms": ms} | more.pop("metrics", {})
        trial = self.propose(**more)
        if trial.copy_of is None:
            self.store.start(trial.trial)
            self.train(trial)
        attempt = self.store.trial(trial.trial).attempts
        assert self.store.finish(trial.trial, attempt, state, metrics=metrics)  # type: ignore[arg-type]
        return self.store.trial(trial.trial)

    def weights(self) -> set[int]:
        return {int(path.parent.name) for path in self.path.glob("artifacts/*/weights.safetensors")}

    def checkpoints(self) -> set[int]:
        return {int(path.name) for path in self.path.glob("checkpoints/*")}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_only_open_trials_have_checkpoints(folder: Folder) -> None:
    keeper = folder.keeper("all")
    keeper.begin()
    started, proposed = folder.propose(), folder.propose()
    folder.store.start(started.trial)
    for trial in (started, proposed):
        folder.train(trial)
    for state in ("complete", "infeasible", "stopped", "failed"):
        keeper.finished(folder.add(0.5, 1.0, state=state))
    assert folder.checkpoints() == {started.trial, proposed.trial}
    assert folder.weights() == set(range(6))


def test_what_a_killed_driver_did_not_remove_goes_at_the_next_start(folder: Folder) -> None:
    for accuracy in (0.5, 0.6):
        folder.add(accuracy, 1.0)
    open_one = folder.propose()
    folder.train(open_one)
    checkpoint_folder(folder.path, 77).mkdir()  # of a database that is no more
    folder.keeper("front").begin()
    assert folder.checkpoints() == {open_one.trial}
    assert folder.weights() == {1, open_one.trial}


@pytest.mark.parametrize("seed", range(5))
def test_weights_left_are_those_of_the_front_in_whatever_order_trials_come(tmp_path: Path, seed: int) -> None:
    draw, points = random.Random(seed), []
    folder = Folder(tmp_path)
    keeper = folder.keeper()
    keeper.begin()
    for _ in range(25):
        points.append((draw.randrange(6) / 6, 1.0 + draw.randrange(6)))
        keeper.finished(folder.add(*points[-1]))
        front = set(np.flatnonzero(nondominated(np.array(points), ("max", "min"))).tolist())
        assert folder.weights() == front
    folder.keeper().begin()
    assert folder.weights() == front


@pytest.mark.parametrize("state", ["infeasible", "stopped", "failed"])
def test_what_is_never_on_the_front_keeps_nothing_and_pushes_nobody_off(folder: Folder, state: str) -> None:
    keeper = folder.keeper()
    keeper.begin()
    keeper.finished(folder.add(0.5, 2.0))
    keeper.finished(folder.add(0.9, 1.0, state=state))
    keeper.finished(folder.add(float("nan"), 1.0))
    assert folder.weights() == {0}


def test_replicates_and_the_originals_of_copies_that_are_replicates_stay(folder: Folder) -> None:
    trials = [
        folder.add(0.9, 1.0),
        folder.add(0.5, 2.0, sampler={"replicate": 0}),
        folder.add(0.4, 2.0),
        folder.add(0.4, 2.0, copy_of=2, sampler={"replicate": 1}),
        folder.add(0.3, 2.0),
        folder.add(0.3, 2.0, copy_of=4),
    ]
    keeper = folder.keeper()
    keeper.begin()
    assert folder.weights() == {0, 1, 2}
    for trial in trials:
        keeper.finished(trial)
    assert folder.weights() == {0, 1, 2}


def test_the_original_of_a_copy_on_the_front_stays(folder: Folder) -> None:
    folder.add(0.9, 1.0)
    folder.add(0.9, 1.0, copy_of=0)
    keeper = folder.keeper()
    keeper.begin()
    keeper.finished(folder.add(0.8, 2.0))
    assert folder.weights() == {0}


def test_while_latencies_are_not_final_what_may_come_onto_the_front_stays(folder: Folder) -> None:
    """The front is measured again, and what a limit or a new value takes off it gives way to others: these must be there."""
    keeper = folder.keeper()
    keeper.begin()
    interval = lambda lo, hi: {"metrics": {"latency_lo_ms": lo, "latency_hi_ms": hi}}  # noqa: E731
    keeper.finished(folder.add(0.9, 1.0, **interval(0.8, 1.2)))
    keeper.finished(folder.add(0.8, 1.3, **interval(1.1, 1.5)))  # may be the faster one
    keeper.finished(folder.add(0.7, 1.6, **interval(1.3, 1.9)))  # may not
    assert folder.weights() == {0, 1}
    folder.keeper().begin()
    assert folder.weights() == {0, 1}
    folder.store.set_meta("finished", True)
    folder.keeper().begin()
    assert folder.weights() == {0}


def test_all_weights_stay_where_all_are_wanted(folder: Folder) -> None:
    keeper = folder.keeper("all")
    keeper.begin()
    for accuracy, ms in itertools.product((0.1, 0.2), (1.0, 2.0)):
        keeper.finished(folder.add(accuracy, ms))
    assert folder.weights() == {0, 1, 2, 3}


def test_weights_that_were_not_kept_are_said_to_be(folder: Folder) -> None:
    for accuracy in (0.5, 0.6):
        folder.add(accuracy, 1.0)
    folder.keeper().begin()
    with pytest.raises(
        RunError, match=r"trial 0 was trained, but its weights were not kept.*run.keep_weights = \"all\""
    ):
        load_weights(folder.path, 0, nn.Linear(1, 1))
    load_weights(folder.path, 1, nn.Linear(1, 1))
    with pytest.raises(RunError, match=r"trial 9 has no weights .* it failed or was never trained"):
        load_weights(folder.path, 9, nn.Linear(1, 1))
    assert {path.name for path in trial_folder(folder.path, 0).iterdir()} == {
        "architecture.json",
        "history.csv",
        "plan.csv",
    }


def test_what_a_killed_process_was_writing_is_cleaned_and_checkpoints_are_not(folder: Folder) -> None:
    trial = folder.propose()
    folder.train(trial)
    inside = checkpoint_folder(folder.path, trial.trial)
    scratch = [inside / ".checkpoint-000002.safetensors.17", inside / ".checkpoint-000001.safetensors.damaged"]
    scratch.append(inside.parent / ".00003.17")
    for path in scratch:
        path.touch()
    clean_scratch(folder.path)
    assert not any(path.exists() for path in scratch)
    assert (inside / "checkpoint-000001.safetensors").is_file()
