"""What a search is after: objectives with directions, and hard constraints.

`parse_objectives` and `parse_constraints` check what a run file says; `objective_values` and `violations` read a
trial's metrics. Nothing here decides which trial is better: that is `nas.pareto` and the searchers.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nas.errors import ConfigError

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONSTRAINT = re.compile(rf"\s*(<=|>=)\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Constraint:
    """A hard limit on one metric, inclusive: `metric <= bound` or `metric >= bound`.

    Attributes:
        metric: name of the metric, with its unit, e.g. "latency_ms".
        relation: "<=" or ">=".
        bound: the limit, in the metric's unit.
        judged_on: metric whose value is compared in place of the metric's own, where the trial has it; "" for none.
    """

    metric: str
    relation: str
    bound: float
    judged_on: str = ""

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"

    def violation(self, value: float) -> float:
        """How far a value is beyond the bound, relative to the bound (absolute if the bound is 0); <= 0 is feasible.

        Relative, because several constraints are added up and milliseconds must not drown in bytes.
        """
        beyond = value - self.bound if self.relation == "<=" else self.bound - value
        if math.isnan(value):
            return math.inf
        return beyond / abs(self.bound) if self.bound else beyond


def parse_objectives(objectives: Any, known: Iterable[str] | None = None) -> dict[str, str]:
    """Check objectives such as {"val_accuracy": "max", "latency_ms": "min"}.

    Args:
        objectives: metric name to direction, in the order they are to be shown.
        known: the metrics there are; None to accept any name.

    Returns:
        A new dict, in the same order.

    Raises:
        ConfigError: no objective, an unknown metric or direction, or an objective on the test set.
    """
    if not isinstance(objectives, Mapping) or not objectives:
        raise ConfigError(
            f'objectives: expected at least one metric with a direction, e.g. val_accuracy = "max", got {objectives!r}'
        )
    for metric, direction in objectives.items():
        _check_metric("objectives", metric, known)
        if direction not in ("max", "min"):
            hint = ""
            if isinstance(direction, str):
                near = {"maximi": "max", "minimi": "min"}.get(direction.lower()[:6]) or {
                    "max": "max",
                    "min": "min",
                }.get(direction.lower()[:3])
                hint = f'; write "{near}"' if near else ""
            raise ConfigError(f'objectives.{metric}: expected "max" or "min", got {direction!r}{hint}')
    return {str(metric): str(direction) for metric, direction in objectives.items()}


def parse_constraints(constraints: Any, known: Iterable[str] | None = None) -> tuple[Constraint, ...]:
    """Check hard constraints such as {"latency_ms": "<= 5", "val_accuracy": ">= 0.9"}.

    Args:
        constraints: metric name to "<= number" or ">= number"; None or empty for no constraint.
        known: the metrics there are; None to accept any name.

    Raises:
        ConfigError: an unknown metric, or a limit that cannot be read.
    """
    if constraints is None:
        return ()
    if not isinstance(constraints, Mapping):
        raise ConfigError(f'constraints: expected a table such as latency_ms = "<= 5", got {constraints!r}')
    result = []
    for metric, text in constraints.items():
        _check_metric("constraints", metric, known)
        match = _CONSTRAINT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f'constraints.{metric}: expected "<= number" or ">= number", got {text!r}{_cure(text)}')
        bound = float(match.group(2))
        if not math.isfinite(bound):
            raise ConfigError(f"constraints.{metric}: the limit must be a finite number, got {text!r}")
        result.append(Constraint(str(metric), match.group(1), bound))
    return tuple(result)


def on_interval_ends(constraints: Iterable[Constraint]) -> tuple[Constraint, ...]:
    """The same limits, but a latency keeps one only if its whole interval does: for predicted latencies.

    A search picks what a model finds fast, so it picks the model's errors too: judged by the prediction itself, about half of the
    networks at a limit break it when they are measured.
    """
    ends = {"<=": "latency_hi_ms", ">=": "latency_lo_ms"}
    return tuple(replace(c, judged_on=ends[c.relation]) if c.metric == "latency_ms" else c for c in constraints)


def _cure(text: Any) -> str:
    if isinstance(text, int | float) and not isinstance(text, bool):
        return f'; write "<= {text:g}" or ">= {text:g}"'
    if isinstance(text, str):
        strict = re.fullmatch(rf"\s*([<>])\s*({_NUMBER})\s*", text)
        if strict:
            return f'; limits are inclusive, write "{strict.group(1)}= {strict.group(2)}"'
        unit = re.fullmatch(rf"\s*([<>]=)\s*({_NUMBER})\s*[A-Za-z%]+\s*", text)
        if unit:
            return f'; the unit is in the metric\'s name, write "{unit.group(1)} {unit.group(2)}"'
    return ""


def _check_metric(where: str, metric: Any, known: Iterable[str] | None) -> None:
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"{where}: a metric is named by a text such as val_accuracy, got {metric!r}")
    if metric.startswith("test_"):
        instead = "val_" + metric.removeprefix("test_")
        raise ConfigError(f'{where}.{metric}: a search never sees the test set; use "{instead}"')
    if known is not None:
        names = sorted(known)
        if metric not in names:
            near = difflib.get_close_matches(metric, names, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise ConfigError(f'{where}: unknown metric "{metric}"{hint} known: {", ".join(names)}')


def number(metrics: Mapping[str, Any], metric: str) -> float | None:
    """A metric as a finite float, or None if it is missing, None, text, NaN or infinite."""
    value = metrics.get(metric)
    if value is None or isinstance(value, str | bool):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def objective_values(metrics: Mapping[str, Any], objectives: Mapping[str, str]) -> tuple[float, ...] | None:
    """The objectives' values in order, or None if any of them is missing or not finite."""
    values = []
    for metric in objectives:
        value = number(metrics, metric)
        if value is None:
            return None
        values.append(value)
    return tuple(values)


def violations(
    metrics: Mapping[str, Any], constraints: Sequence[Constraint], *, partial: bool = False
) -> dict[str, float]:
    """How far each constraint is violated; <= 0 means it holds.

    Args:
        metrics: what was measured.
        constraints: the limits.
        partial: leave out constraints whose metric is not there yet (before training, say) instead of raising.

    Returns:
        Violation per metric, relative to the bound (see `Constraint.violation`). NaN violates infinitely.

    Raises:
        ConfigError: a constrained metric is missing and `partial` is False.
    """
    result: dict[str, float] = {}
    for constraint in constraints:
        value = metrics.get(constraint.judged_on) if constraint.judged_on else None
        value = metrics.get(constraint.metric) if value is None else value
        if value is None:
            if partial:
                continue
            raise ConfigError(
                f'constraint "{constraint}": the trial has no metric "{constraint.metric}"; '
                f"it has {', '.join(sorted(metrics)) or 'none'}"
            )
        if isinstance(value, str):
            raise ConfigError(f'constraint "{constraint}": expected a number, the trial\'s value is {value!r}')
        result[constraint.metric] = constraint.violation(float(value))
    return result


def feasible(found: Mapping[str, float]) -> bool:
    """True if no constraint is violated; `found` as from `violations`."""
    return all(value <= 0 for value in found.values())


def total_violation(found: Mapping[str, float]) -> float:
    """Sum of the positive violations; 0.0 means feasible."""
    return float(sum(value for value in found.values() if value > 0))
