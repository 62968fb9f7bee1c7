"""Stopping rules: which trainings end early, judged by validation accuracy at equal epochs.

`RULES` maps the names used in run files to classes, `make_rule` makes one from `[stopping]`. To add one: subclass
`nas.stopping.base.StoppingRule`, add a line here and its name to `tests/conformance/test_stopping_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nas.errors import ConfigError, unknown_name
from nas.stopping.asha import Asha
from nas.stopping.base import Decision, StoppingRule, is_comparison
from nas.stopping.median import MedianRule
from nas.stopping.pbt import PopulationBased

if TYPE_CHECKING:
    from nas.config import StoppingSection

__all__ = ["RULES", "Decision", "StoppingRule", "is_comparison", "make_rule"]

RULES: dict[str, Callable[[StoppingSection, int], StoppingRule]] = {
    "asha": lambda s, seed: Asha(min_epochs=s.min_epochs, reduction=s.reduction, startup=s.startup),
    "median": lambda s, seed: MedianRule(min_epochs=s.min_epochs, interval=s.interval, startup=s.startup),
    "pbt": lambda s, seed: PopulationBased(min_epochs=s.min_epochs, interval=s.interval, startup=s.startup, seed=seed),
}


def make_rule(section: StoppingSection, epochs: int, seed: int) -> StoppingRule | None:
    """The rule of a run file, or None where nothing is stopped.

    Args:
        section: `[stopping]`.
        epochs: training budget of a trial.
        seed: of the draws of "pbt".

    Raises:
        UnknownName: no such rule.
        ConfigError: no epoch below the budget is ever judged.
    """
    if section.rule == "none":
        return None
    if section.rule not in RULES:
        raise unknown_name("stopping rule", section.rule, [*RULES, "none"])
    rule = RULES[section.rule](section, seed)
    if not rule.rungs(epochs):
        raise ConfigError(
            f"[stopping] min_epochs: expected less than train.epochs = {epochs}, got {section.min_epochs}: nothing could ever be "
            "stopped"
        )
    return rule
