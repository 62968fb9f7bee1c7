"""Trainings in segments: up to which epoch each trial trains next, and what a stopping rule says when it pauses there.

The search loop submits the trial up to `payload()["until"]`, hands the answer to `judge`, and submits it again or ends it. All that
has to outlive the process is in the metrics of an open trial (`TRAINED`, the factors of its settings) and in the curves of all;
`restore` reads both. Costs the same however many trials there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nas.errors import EvaluationFailed
from nas.stopping.base import Decision, StoppingRule, is_comparison
from nas.store import Metric, Store, Trial

TRAINED = "trained_epochs"
"""Metric of a trial: the epochs it was trained, where a rule is on."""

BECAUSE = "stopped_because"
"""Metric of a stopped trial: why, in one line."""

FACTOR = "_factor"
"""Ending of the metrics that hold factors on training settings: "lr_factor", "weight_decay_factor"."""

JUDGED = "val_accuracy"
"""The only number that a rule is given."""

TOLERANCE = 1e-4
"""Relative, of two densities that should be the same."""

Row = Mapping[str, Any]


class Segments:
    """What the search loop knows of trainings that pause.

    Args:
        rule: who decides; None: nothing ever pauses.
        epochs: training budget of a trial.
    """

    def __init__(self, rule: StoppingRule | None, epochs: int) -> None:
        self.rule = rule
        self.rungs = rule.rungs(epochs) if rule is not None else []
        self._after = dict(zip([0, *self.rungs], self.rungs, strict=False))  # rung -> the next one
        self._trained: dict[int, int] = {}  # open trial -> the rung it has passed
        self._settings: dict[int, dict[str, float]] = {}
        self._donor: dict[int, int] = {}
        self._rows: dict[int, Sequence[Row]] = {}  # open trial -> its curve so far

    def restore(self, store: Store, trials: Iterable[Trial]) -> None:
        """Tell the rule what an earlier process of this run had told it, and take up open trials where they were."""
        if self.rule is None:
            return
        for trial in trials:
            if trial.copy_of is not None or is_comparison(trial):
                continue
            factors = {
                name.removesuffix(FACTOR): float(value)
                for name, value in trial.metrics.items()
                if name.endswith(FACTOR) and isinstance(value, int | float)
            }
            self.rule.introduce(trial.trial, trial.digest, factors)
            if trial.finished:
                self._teach(trial, store.curve(trial.trial))
                continue
            trained = trial.metrics.get(TRAINED)
            if isinstance(trained, int) and trained in self.rungs:
                self._trained[trial.trial] = trained
                self._settings[trial.trial] = factors
                self._rows[trial.trial] = store.curve(trial.trial)
                self._teach(trial, self._rows[trial.trial])
                self.rule.report(trial.trial, trained, _number(trial.metrics.get(JUDGED)))

    def payload(self, trial: Trial) -> dict[str, Any]:
        """What the next job of a trial gets beside its architecture: "until", "settings" and "donor" (a trial's number), where
        there are such."""
        if self.rule is None or is_comparison(trial):
            return {}
        number = trial.trial
        if number not in self._trained:
            self.rule.introduce(number, trial.digest, {})
        found: dict[str, Any] = {}
        until = self._after.get(self._trained.get(number, 0))
        if until is not None:
            found["until"] = until
        if self._settings.get(number):
            found["settings"] = dict(self._settings[number])
        if number in self._donor:
            found["donor"] = self._donor[number]
        return found

    def judge(self, trial: Trial, answer: Mapping[str, Any]) -> Decision:
        """What becomes of a trial that paused.

        Args:
            trial: which.
            answer: its "metrics" and "curve" up to the epoch it was to train until.

        Raises:
            EvaluationFailed: it was not asked to pause, or its network was not yet as sparse as it is to be.
        """
        until = self._until(trial)
        if self.rule is None or until is None:
            raise EvaluationFailed(
                f"trial {trial.trial}: expected a training to its end, found one that paused; this is a defect of the evaluation"
            )
        metrics, curve = answer["metrics"], answer.get("curve", [])
        self._check_density(trial, metrics, curve, until)
        self._rows[trial.trial] = curve
        self._teach(trial, curve)
        self.rule.report(trial.trial, until, _number(metrics.get(JUDGED)))
        decision = self.rule.decide(trial.trial, until)
        if decision.stop:
            return decision
        self._trained[trial.trial] = until
        self._donor.pop(trial.trial, None)
        if decision.settings is not None:
            self._settings[trial.trial] = dict(decision.settings)
            self.rule.introduce(trial.trial, trial.digest, decision.settings)
            if decision.donor is not None:
                self._donor[trial.trial] = decision.donor
        return decision

    def check_end(self, trial: Trial, answer: Mapping[str, Any]) -> None:
        """Tell the rule of a training that came to its end.

        Raises:
            EvaluationFailed: its network was less sparse at an epoch that was judged than it is now.
        """
        if self.rule is None or is_comparison(trial):
            return
        curve = answer.get("curve", [])
        if curve:
            self._check_density(trial, answer["metrics"], curve, self._trained.get(trial.trial, 0))
            self._teach(trial, curve)

    def passed(self, trial: Trial) -> dict[str, Metric]:
        """What to remember with the metrics of a trial that goes on: the epochs trained, and the factors of its settings."""
        return {TRAINED: self._trained[trial.trial], **self.factors(trial)}

    def ended(self, trial: Trial, decision: Decision) -> dict[str, Metric]:
        """The same of a trial that is stopped: the epochs trained, the factors, and why."""
        return {TRAINED: self._until(trial), BECAUSE: decision.reason, **self.factors(trial)}

    def factors(self, trial: Trial) -> dict[str, Metric]:
        """The factors on the settings of a trial, as metrics; empty where nothing changed them."""
        return {name + FACTOR: factor for name, factor in self._settings.get(trial.trial, {}).items()}

    def rows(self, trial: Trial) -> list[dict[str, Any]]:
        """The curve of a trial as of its last pause."""
        return [dict(row) for row in self._rows.get(trial.trial, ())]

    def forget(self, trial: Trial) -> None:
        """A trial is finished: what is kept of open ones goes."""
        self._trained.pop(trial.trial, None)
        self._settings.pop(trial.trial, None)
        self._donor.pop(trial.trial, None)
        self._rows.pop(trial.trial, None)

    def _until(self, trial: Trial) -> int | None:
        return None if is_comparison(trial) else self._after.get(self._trained.get(trial.trial, 0))

    def _teach(self, trial: Trial, curve: Iterable[Row]) -> None:
        assert self.rule is not None
        for row in curve:
            epoch = row.get("epoch")
            if isinstance(epoch, int) and row.get(JUDGED) is not None:
                self.rule.report(trial.trial, epoch, _number(row[JUDGED]))

    def _check_density(self, trial: Trial, metrics: Row, curve: Iterable[Row], until: int) -> None:
        """A half-dense network is not to be compared with a sparse one: refuse rows denser than the trial is to be in the end."""
        final = _number(metrics.get("target_density", metrics.get("density")))
        for row in curve:
            epoch, density = row.get("epoch"), row.get("density")
            if not isinstance(epoch, int) or not self.rungs[0] <= epoch <= until or density is None:
                continue
            if density > final * (1 + TOLERANCE):
                raise EvaluationFailed(
                    f"trial {trial.trial}: expected the final density {final:.4g} at every epoch that is judged (from epoch "
                    f"{self.rungs[0]} on, [stopping] min_epochs), found {density:.4g} after epoch {epoch}: it cannot be compared "
                    "with others. The sparsity method must have its final masks by then; raise min_epochs, or use another method"
                )


def _number(value: Any) -> float:
    """A number, or NaN for anything else."""
    return float(value) if isinstance(value, int | float) else float("nan")
