"""What a stopping rule is: told values of trainings, asked which of them go on.

A rule knows one number per trial and epoch, the validation accuracy, and nothing of costs: a small network is not stopped for
being less accurate than a large one has cost it, nor kept for being cheap. It keeps nothing but what it was told, so the same
reports in any order make the same rule. One pool per run, whoever proposed the trials. Start with `StoppingRule`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

Settings = Mapping[str, float]
"""Training setting -> factor on the value of the run file; of "lr" and "weight_decay", 1.0 where one is missing."""

WORST = -math.inf
"""What a value that is no finite number counts as."""


class Described(Protocol):
    """What `is_comparison` reads of a trial (`nas.store.Trial`)."""

    @property
    def searcher(self) -> str: ...
    @property
    def sampler(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Decision:
    """What becomes of a training that paused.

    Attributes:
        stop: it ends here.
        settings: it goes on with these; None: as before.
        donor: it goes on from the checkpoint of this trial, which computes the same network; None: from its own.
        reason: one line for people, of a decision to stop or to change.
    """

    stop: bool = False
    settings: Settings | None = None
    donor: int | None = None
    reason: str = ""


GO_ON = Decision()


class StoppingRule(abc.ABC):
    """Decides at given epochs ("rungs") whether a training goes on.

    Args of every rule: min_epochs, the first epoch that is judged (values before it are of networks whose masks may still be too
    dense, and are never used), and startup, the results of others that a rung needs before anything is judged there.
    """

    name: ClassVar[str]

    def __init__(self, *, min_epochs: int, startup: int) -> None:
        if min_epochs < 1 or startup < 1:
            raise ValueError(f"expected min_epochs and startup >= 1, got {min_epochs} and {startup}")
        self.min_epochs = min_epochs
        self.startup = startup

    @abc.abstractmethod
    def rungs(self, epochs: int) -> list[int]:
        """The epochs after which a training of `epochs` epochs pauses: ascending, counted from 1, all below `epochs`."""

    @abc.abstractmethod
    def report(self, trial: int, epoch: int, value: float) -> None:
        """A training had this validation accuracy after this epoch. Of several reports of one epoch the first counts; NaN and
        infinities count as worse than any number."""

    @abc.abstractmethod
    def decide(self, trial: int, epoch: int) -> Decision:
        """What becomes of a training that paused at this rung, in the light of all reports so far. Changes nothing.

        Raises:
            ValueError: its own value at this epoch was not reported.
        """

    def introduce(self, trial: int, digest: str, settings: Settings) -> None:
        """A trial is to be known with the training settings it has from now on; only rules that change settings listen.

        Args:
            trial: its number.
            digest: of its architecture.
            settings: factors.
        """
        return


def is_comparison(trial: Described) -> bool:
    """Whether a trial is there for others to be compared with: dense baselines, what one-shot searches found, and their controls.

    Such a trial is trained to the end whatever the rule, and no rule is told of it: a dense network would be no fair rival of
    sparse ones at an early epoch, and replicates are compared at equal training.
    """
    return trial.searcher == "dense" or "/" in trial.searcher or "replicate" in trial.sampler


def plain(value: float) -> float:
    """A value as rules compare it: `WORST` in place of NaN and infinities."""
    return float(value) + 0.0 if math.isfinite(value) else WORST  # -0.0 and 0.0 would differ in print


def at_intervals(first: int, interval: int, epochs: int) -> list[int]:
    """first, first + interval, ... below `epochs`."""
    return list(range(first, epochs, interval))


def not_reported(rule: str, trial: int, epoch: int) -> ValueError:
    return ValueError(f"{rule}: expected a report of trial {trial} at epoch {epoch} before the decision, found none")
