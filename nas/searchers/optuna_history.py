"""A search history as an Optuna study: read-only trials made from ours, without Optuna's own bookkeeping.

Optuna samplers read a study through a storage. `HistoryStorage` is one that serves a list of finished and pending
trials and remembers nothing else, so a sampler sees exactly the history and no leftovers of earlier proposals. It does
not run, save or change studies. Start with `OptunaHistory`; this is the only file that has to know how Optuna stores
things.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.searchers.base import Outcome, TrialLike
from search_spaces.architecture import Architecture
from search_spaces.space import Space

STUDY_ID = 0
STUDY_NAME = "history"
Encoded = tuple[dict[str, int], dict[str, Any]]
"""params: parameter -> code; distributions: parameter -> its distribution."""


class Codes(CategoricalDistribution):
    """The categorical 0 ... n-1: a value that is never copied and compares by identity first, which Optuna does often."""

    def __init__(self, n: int) -> None:
        super().__init__(range(n))

    def to_internal_repr(self, param_value_in_external_repr: Any) -> int:
        return param_value_in_external_repr

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    __hash__ = CategoricalDistribution.__hash__


class HistoryTrial(FrozenTrial):
    """A frozen trial whose constraints are a plain attribute; Optuna reads them several times per trial and proposal."""

    def __init__(
        self,
        number: int,
        state: TrialState,
        encoded: Encoded,
        values: Sequence[float] | None,
        constraints: dict[str, float],
    ) -> None:
        super().__init__(
            number=number,
            state=state,
            value=None,
            values=values,
            datetime_start=None,
            datetime_complete=None,
            params=encoded[0],
            distributions=encoded[1],
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=number,
        )
        self._constraints = constraints

    @property
    def constraints(self) -> dict[str, float]:
        return self._constraints


class HistoryStorage(BaseStorage):
    """Serves `trials`, number = position; accepts no change but notes about trials and the study, which it drops."""

    def __init__(self, directions: Sequence[StudyDirection]) -> None:
        self.trials: list[FrozenTrial] = []
        self.directions = list(directions)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self.trials[trial_id]

    def get_study_id_from_name(self, study_name: str) -> int:
        return STUDY_ID

    def get_study_name_from_id(self, study_id: int) -> str:
        return STUDY_NAME

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self.directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        pass

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        pass

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a history is read-only; change it through the run's store")

    create_new_study = delete_study = set_study_user_attr = get_all_studies = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = _refuse
    set_trial_intermediate_value = set_trial_user_attr = _refuse


class OptunaHistory:
    """Our trials as Optuna's, kept up to date incrementally.

    A decision becomes a categorical over the positions of its options, named by the decision *and* its options: a
    decision whose options depend on others (Optuna forbids that) is then several parameters, and any JSON scalars may
    be options.

    Args:
        space: asked which options a decision had.
        objectives: metric -> "max" or "min".
    """

    def __init__(self, space: Space, objectives: Mapping[str, str]) -> None:
        self.space = space
        self._signs = [1.0 if direction == "min" else -1.0 for direction in objectives.values()]
        self.storage = HistoryStorage(
            [
                StudyDirection.MINIMIZE if direction == "min" else StudyDirection.MAXIMIZE
                for direction in objectives.values()
            ]
        )
        self._parameters: dict[tuple[str, tuple[Any, ...]], tuple[str, Codes]] = {}
        self._encoded: dict[Architecture, Encoded] = {}
        self._shown: list[tuple[Outcome, Architecture]] = []
        self._length = 0

    def study(self, sampler: BaseSampler) -> Study:
        """A study of the trials as they are now. Make a new one whenever they changed: a study caches them."""
        return Study(STUDY_NAME, self.storage, sampler)

    def parameter(self, name: str, options: tuple[Any, ...]) -> tuple[str, Codes]:
        """Optuna's name and distribution for a decision."""
        key = (name, options)
        if key not in self._parameters:
            self._parameters[key] = (f"{name} {json.dumps(options)}", Codes(len(options)))
        return self._parameters[key]

    def update(self, history: Sequence[TrialLike], outcomes: Sequence[Outcome]) -> Iterable[int]:
        """Show exactly this history.

        Returns:
            The positions of trials that are new or changed.
        """
        del self.storage.trials[self._length :]
        changed = []
        for position, (trial, outcome) in enumerate(zip(history, outcomes)):
            if position < self._length:
                old, architecture = self._shown[position]
                if old is outcome and architecture is trial.architecture:
                    continue
                self.storage.trials[position] = self._convert(position, trial, outcome)
                self._shown[position] = (outcome, trial.architecture)
            else:
                self.storage.trials.append(self._convert(position, trial, outcome))
                self._shown.append((outcome, trial.architecture))
            changed.append(position)
        del self.storage.trials[len(history) :], self._shown[len(history) :]
        self._length = len(history)
        return changed

    def pretend_running(self, encoded: Encoded) -> None:
        """Show one more pending trial, until the next `update`."""
        number = len(self.storage.trials)
        self.storage.trials.append(HistoryTrial(number, TrialState.RUNNING, encoded, None, {}))

    def newcomer(self) -> HistoryTrial:
        """The trial a sampler is asked for: number one past the last, not part of the study."""
        return HistoryTrial(len(self.storage.trials), TrialState.RUNNING, ({}, {}), None, {})

    def remember(self, architecture: Architecture, encoded: Encoded) -> None:
        """Save working out the parameters of `architecture` again."""
        self._encoded[architecture] = encoded

    def encode(self, architecture: Architecture) -> Encoded:
        """Parameters and distributions of an architecture; decisions with a single option are left out."""
        if architecture not in self._encoded:
            params: dict[str, int] = {}
            distributions: dict[str, Any] = {}
            made = architecture.as_dict()
            for name, options in self.space.offers(architecture).items():
                if len(options) > 1:
                    parameter, distribution = self.parameter(name, options)
                    params[parameter] = options.index(made[name])
                    distributions[parameter] = distribution
            self._encoded[architecture] = (params, distributions)
        return self._encoded[architecture]

    def _convert(self, number: int, trial: TrialLike, outcome: Outcome) -> HistoryTrial:
        encoded = self.encode(trial.architecture)
        if outcome.kind == "pending":
            return HistoryTrial(number, TrialState.RUNNING, encoded, None, {})
        if outcome.kind == "failed":
            return HistoryTrial(number, TrialState.FAIL, encoded, None, {})
        # Not measured: infinitely bad. It decides nothing, since Optuna compares infeasible trials by their violation only.
        costs = outcome.costs or (float("inf"),) * len(self._signs)
        values = [cost * sign for cost, sign in zip(costs, self._signs)]
        constraints = {"violation": outcome.violation} if outcome.violation else {}  # none is feasible, and quicker
        return HistoryTrial(number, TrialState.COMPLETE, encoded, values, constraints)
