"""What a run keeps on the disk: checkpoints of open trials only, and trained weights as run.keep_weights says.

Removes files and nothing else; never fails because one cannot be removed. Start with `Keeper`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.artifacts import checkpoint_folder, remove_weights
from nas.objectives import number, objective_values
from nas.store import Store, Trial

Point = NDArray[np.float64]
"""Objectives to be minimised."""


class Keeper:
    """Removes the files of finished trials that nobody will ask for; used by the driver, who alone knows what is finished.

    With keep_weights "front", trained weights stay of trials that no other dominates, of replicates (those of one-shot searches and
    their controls, which are all tested) and of the originals of such copies. An original that was dominated before its first
    such copy was proposed has lost them. While a run is under way latencies are intervals, because the front is measured again
    before it is handed out: a trial is dominated only where it would be with the lower end of its interval against the upper end
    of the other's. `begin` on a finished run takes latencies as they are.

    Args:
        folder: the run's.
        store: its database; only read.
        objectives: metric -> "max" or "min".
        keep_weights: "all" or "front".
    """

    def __init__(self, folder: Path, store: Store, objectives: Mapping[str, str], keep_weights: str) -> None:
        self.folder, self.store = Path(folder), store
        self.objectives = dict(objectives)
        self.weights = keep_weights == "front"
        self._points: dict[int, tuple[Point, Point]] = {}  # original that may be on the front -> at best, at worst
        self._needed: set[int] = set()

    def begin(self) -> None:
        """Bring the folder to what its database says: at every start, and once more when the run is finished."""
        trials = {trial.trial: trial for trial in self.store.trials()}
        for folder in (self.folder / "checkpoints").glob("[0-9]*"):
            known = trials.get(int(folder.name)) if folder.name.isdecimal() else None
            if known is None or known.finished:
                shutil.rmtree(folder, ignore_errors=True)
        if self.weights:
            exact = bool(self.store.get_meta("finished"))
            finished = [trial for trial in trials.values() if trial.finished]
            self._points, self._needed = {}, set()
            for trial in finished:  # first who is needed, then who is not
                self._note(trial, exact)
            for trial in finished:
                self._judge(trial)

    def finished(self, trial: Trial) -> None:
        """A trial is final, copies too: its checkpoints go, and the weights of those that it leaves without a use."""
        shutil.rmtree(checkpoint_folder(self.folder, trial.trial), ignore_errors=True)
        if self.weights:
            for number_ in self._note(trial, exact=False):
                self._remove(number_)
            self._judge(trial)

    def _note(self, trial: Trial, exact: bool) -> list[int]:
        """Take a finished trial into account; returns those that it pushes off the front."""
        original = trial.trial if trial.copy_of is None else trial.copy_of
        if "replicate" in trial.sampler:
            self._needed.add(original)
        point = self._point(trial, exact)
        if point is None or original in self._points or self._dominated(point):
            return []
        gone = [other for other, (best, _) in self._points.items() if _dominates(point[1], best)]
        for other in gone:
            del self._points[other]
        self._points[original] = point
        return gone

    def _judge(self, trial: Trial) -> None:
        if trial.copy_of is None and trial.trial not in self._points:
            self._remove(trial.trial)

    def _remove(self, trial: int) -> None:
        if trial not in self._needed:
            remove_weights(self.folder, trial)

    def _dominated(self, point: tuple[Point, Point]) -> bool:
        return any(_dominates(worst, point[0]) for _, worst in self._points.values())

    def _point(self, trial: Trial, exact: bool) -> tuple[Point, Point] | None:
        """A trial at best and at worst; None if it cannot be on the front."""
        if trial.state != "complete" or objective_values(trial.metrics, self.objectives) is None:
            return None
        ends = []
        for bound in ("latency_lo_ms", "latency_hi_ms"):
            metrics, end = dict(trial.metrics), number(trial.metrics, bound)
            ms, energy = number(metrics, "latency_ms"), number(metrics, "energy_mj")
            if not exact and end is not None and ms is not None and ms > 0:
                metrics |= dict.fromkeys(("latency_ms", "latency_lo_ms", "latency_hi_ms"), end)
                if energy is not None:
                    metrics["energy_mj"] = energy * end / ms
            values = [number(metrics, name) for name in self.objectives]
            signs = [-1.0 if direction == "max" else 1.0 for direction in self.objectives.values()]
            ends.append(np.array(values, dtype=np.float64) * signs)
        return ends[0], ends[1]


def _dominates(one: Point, other: Point) -> bool:
    return bool((one <= other).all() and (one < other).any())
