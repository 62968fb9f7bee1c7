"""Objectives and constraints as written in a run file, and read from a trial's metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nas.errors import ConfigError
from nas.objectives import (
    Constraint,
    feasible,
    objective_values,
    parse_constraints,
    parse_objectives,
    total_violation,
    violations,
)


def test_objectives_keep_their_order_and_directions() -> None:
    written = {"latency_ms": "min", "val_accuracy": "max"}
    assert list(parse_objectives(written).items()) == list(written.items())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "at least one metric"),
        (None, "at least one metric"),
        (["val_accuracy"], "at least one metric"),
        (
            {"val_accuracy": "maximize"},
            'objectives.val_accuracy: expected "max" or "min", got \'maximize\'; write "max"',
        ),
        ({"val_accuracy": "Min"}, 'write "min"'),
        ({"val_accuracy": 1}, 'expected "max" or "min", got 1'),
        ({"test_accuracy": "max"}, 'never sees the test set; use "val_accuracy"'),
        (
            {"latency": "min"},
            'unknown metric "latency"; did you mean "latency_ms"\\? known: latency_ms, nnz, val_accuracy',
        ),
        ({3: "min"}, "named by a text"),
    ],
)
def test_wrong_objectives_say_what_to_write(written: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_objectives(written, known={"val_accuracy", "latency_ms", "nnz"})


@pytest.mark.parametrize(
    ("text", "relation", "bound"),
    [
        ("<= 5", "<=", 5.0),
        (">=0.9", ">=", 0.9),
        (" <=  1e6 ", "<=", 1e6),
        ("<= -2.5", "<=", -2.5),
        (">= .5", ">=", 0.5),
    ],
)
def test_constraints_are_read(text: str, relation: str, bound: float) -> None:
    assert parse_constraints({"latency_ms": text}) == (Constraint("latency_ms", relation, bound),)


def test_no_constraints_are_none() -> None:
    assert parse_constraints(None) == parse_constraints({}) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (5, 'got 5; write "<= 5" or ">= 5"'),
        ("< 5", 'limits are inclusive, write "<= 5"'),
        ("<= 5 ms", 'the unit is in the metric\'s name, write "<= 5"'),
        ("5", "got '5'"),
        ("<= five", "got '<= five'"),
        ("<= 1e999", "finite"),
        ("== 5", "got '== 5'"),
        (True, "got True"),
        (["<= 5"], "got"),
    ],
)
def test_wrong_constraints_say_what_to_write(text: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_constraints({"latency_ms": text})
    assert "constraints.latency_ms" in str(raised.value)


def test_a_constraint_on_the_test_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="never sees the test set"):
        parse_constraints({"test_accuracy": ">= 0.9"})
    with pytest.raises(ConfigError, match='did you mean "params"'):
        parse_constraints({"param": "<= 9"}, known=["params", "nnz"])
    with pytest.raises(ConfigError, match="expected a table"):
        parse_constraints("latency_ms <= 5")


def test_violations_are_relative_and_zero_at_the_bound() -> None:
    limits = parse_constraints({"latency_ms": "<= 5", "val_accuracy": ">= 0.8", "balance": "<= 0"})
    found = violations({"latency_ms": 6.0, "val_accuracy": 0.9, "balance": 3.0}, limits)
    assert found == {"latency_ms": pytest.approx(0.2), "val_accuracy": pytest.approx(-0.125), "balance": 3.0}
    assert not feasible(found)
    assert total_violation(found) == pytest.approx(3.2)
    at_the_bound = violations({"latency_ms": 5.0, "val_accuracy": 0.8, "balance": 0}, limits)
    assert at_the_bound == {"latency_ms": 0.0, "val_accuracy": 0.0, "balance": 0.0}
    assert feasible(at_the_bound)
    assert total_violation(at_the_bound) == 0.0


def test_the_smallest_step_beyond_the_bound_violates() -> None:
    (limit,) = parse_constraints({"latency_ms": "<= 5"})
    assert limit.violation(math.nextafter(5.0, 6.0)) > 0
    assert limit.violation(math.nextafter(5.0, 4.0)) < 0


def test_nan_violates_infinitely() -> None:
    limits = parse_constraints({"latency_ms": "<= 5"})
    assert violations({"latency_ms": float("nan")}, limits) == {"latency_ms": math.inf}


def test_a_missing_metric_is_an_error_unless_it_may_come_later() -> None:
    limits = parse_constraints({"latency_ms": "<= 5", "val_accuracy": ">= 0.8"})
    with pytest.raises(
        ConfigError, match=r'constraint "val_accuracy >= 0.8": the trial has no metric .* it has latency_ms'
    ):
        violations({"latency_ms": 1.0}, limits)
    assert violations({"latency_ms": 1.0}, limits, partial=True) == {"latency_ms": -0.8}
    with pytest.raises(ConfigError, match="expected a number"):
        violations({"latency_ms": "fast", "val_accuracy": 1.0}, limits)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "0.9", True])
def test_objective_values_are_all_finite_numbers_or_none(bad: Any) -> None:
    objectives = {"val_accuracy": "max", "latency_ms": "min"}
    assert objective_values({"val_accuracy": 0.5, "latency_ms": 2}, objectives) == (0.5, 2.0)
    assert objective_values({"val_accuracy": bad, "latency_ms": 2.0}, objectives) is None
    assert objective_values({"latency_ms": 2.0}, objectives) is None
