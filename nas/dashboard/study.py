"""The trials of a run as trials of an Optuna study. Reads no files and serves nothing; start with `StudyView`.

    complete     COMPLETE
    stopped      PRUNED, with the values of its last epoch; never among the best
    infeasible   COMPLETE with constraints, if all objectives were measured; else FAIL
    failed       FAIL, with the last line of its error
    running      RUNNING
    proposed     WAITING

A decision is a categorical whose choices are the values that some trial of the run has: Optuna wants the same choices in every
trial, and in a space they may depend on other decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.objectives import number, objective_values
from nas.report.tables import last_line
from nas.schema import plain_scalar
from nas.store import Trial
from search_spaces.architecture import Value

METRIC_NAMES = "study:metric_names"
"""Where Optuna keeps the names of objectives, among a study's system attributes."""
CONSTRAINTS = "constraints"
"""Where optuna-dashboard looks for constraints, among a trial's system attributes; Optuna 5 itself keeps them by name."""
UNKNOWN = datetime(1970, 1, 1)
"""Optuna wants to know when a trial began."""

Curves = Callable[[Sequence[int]], Mapping[int, Sequence[Mapping[str, Any]]]]

_STATES = {
    "complete": TrialState.COMPLETE,
    "infeasible": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "proposed": TrialState.WAITING,
}


def directions(objectives: Mapping[str, str]) -> list[StudyDirection]:
    """Of each objective, in order."""
    return [StudyDirection.MAXIMIZE if way == "max" else StudyDirection.MINIMIZE for way in objectives.values()]


class StudyView:
    """Converts a run's trials, each only when it has changed.

    Args:
        objectives: metric -> "max" or "min".
        curves: trials -> their learning curves, one row per epoch; asked for finished trials of runs with one objective, whose
            intermediate values are that objective's column. Optuna knows none where there are several objectives.
    """

    def __init__(self, objectives: Mapping[str, str], curves: Curves = lambda trials: {}) -> None:
        self.objectives = dict(objectives)
        self._curves = curves
        self._choices: dict[str, dict[Any, None]] = {}
        self._kinds: dict[str, CategoricalDistribution] = {}
        self._shown: list[tuple[Trial, FrozenTrial]] = []

    def update(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """All trials of the run as they are now, in order of their numbers, which are Optuna's, too."""
        if self._learn(trials):
            self._shown = []
        changed = {
            position: trial
            for position, trial in enumerate(trials)
            if position >= len(self._shown) or self._shown[position][0] != trial
        }
        curves = self._curves_of(changed.values())
        del self._shown[len(trials) :]
        for position, trial in changed.items():
            self._shown[position : position + 1] = [
                (trial, self._convert(position, trial, curves.get(trial.trial, {})))
            ]
        return [frozen for _, frozen in self._shown]

    def _learn(self, trials: Sequence[Trial]) -> bool:
        """Note the values that decisions have; returns whether any is new."""
        new = set()
        for trial in trials[len(self._shown) :]:
            for name, value in trial.architecture.decisions:
                known = self._choices.setdefault(name, {})
                key = (isinstance(value, bool), value)  # True is no 1
                if key not in known:
                    known[key] = None
                    new.add(name)
        for name in new:
            self._kinds[name] = CategoricalDistribution(_ordered([value for _, value in self._choices[name]]))
        return bool(new)

    def _convert(self, position: int, trial: Trial, intermediate: dict[int, float]) -> FrozenTrial:
        state, values = _STATES[trial.state], objective_values(trial.metrics, self.objectives)
        if state == TrialState.COMPLETE and values is None:
            state = TrialState.FAIL
        if state not in (TrialState.COMPLETE, TrialState.PRUNED):
            values = None
        violated = {name: _bounded(value) for name, value in trial.violations.items()}
        if state != TrialState.COMPLETE:
            violated = {}
        begun, ended = _local(trial.started_at or trial.proposed_at) or UNKNOWN, _local(trial.finished_at)
        params = {name: self._param(name, value) for name, value in trial.architecture.decisions}
        kinds: dict[str, BaseDistribution] = {name: self._kinds[name] for name in params}
        frozen = FrozenTrial(
            number=position,
            trial_id=position,
            state=state,
            value=None,
            values=values,
            datetime_start=None if state == TrialState.WAITING else begun,
            datetime_complete=(ended or begun) if state.is_finished() else None,
            params=params,
            distributions=kinds,
            user_attrs=_notes(trial),
            system_attrs={CONSTRAINTS: list(violated.values())} if violated else {},
            intermediate_values=intermediate,
        )
        for name, value in violated.items():
            frozen.set_constraint(name, value)
        return frozen

    def _param(self, name: str, value: Value) -> Value:
        return value if value in self._kinds[name].choices else str(value)

    def _curves_of(self, trials: Iterable[Trial]) -> dict[int, dict[int, float]]:
        """Trial -> epoch -> value of the objective."""
        if len(self.objectives) != 1:
            return {}
        (metric,) = self.objectives
        wanted = [trial.trial for trial in trials if trial.finished and trial.copy_of is None]
        found = {}
        for trial, rows in (self._curves(wanted) if wanted else {}).items():
            values = {int(row["epoch"]): number(row, metric) for row in rows if "epoch" in row}
            found[trial] = {epoch: value for epoch, value in values.items() if value is not None}
        return found


def _ordered(values: list[Any]) -> list[Any]:
    """Choices as Optuna can tell them apart: numbers by size, or all as text where True and 1 are both among them."""
    mixed = any(isinstance(value, bool) for value in values) and not all(isinstance(value, bool) for value in values)
    if mixed:
        return sorted({str(value) for value in values})
    if any(isinstance(value, str) for value in values):
        return sorted(values, key=lambda value: (isinstance(value, str), value))
    return sorted(values)


def _notes(trial: Trial) -> dict[str, Any]:
    """What the pages show of a trial beside parameters and values; JSON, numbers finite."""
    notes: dict[str, Any] = {"searcher": trial.searcher, "state": trial.state, "digest": trial.digest}
    notes |= {name: _plain(value) for name, value in trial.metrics.items()}
    notes |= {"epochs": trial.epochs, "seed": trial.seed, "attempts": trial.attempts}
    if trial.copy_of is not None:
        notes["copy_of"] = trial.copy_of
    if trial.duration_s is not None:
        notes["duration_s"] = trial.duration_s
    if trial.error:
        notes["error"] = last_line(trial.error)
    return notes


def _plain(value: Any) -> Any:
    value = plain_scalar(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _bounded(violation: float) -> float:
    """Optuna takes no NaN, and JSON no infinity."""
    return (
        violation if math.isfinite(violation) else math.copysign(1e308, violation) if violation == violation else 1e308
    )


def _local(moment: datetime | None) -> datetime | None:
    """Optuna's times are those of this machine's clock, without a zone."""
    return None if moment is None else moment.astimezone().replace(tzinfo=None)
