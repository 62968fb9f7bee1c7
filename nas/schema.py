"""What the run's database holds: the three tables, the `Trial` value, and how one becomes the other.

    meta    key, value                         facts about the run (the schema's version, the resolved config, ...)
    trial   one row per proposed architecture  whatever became of it
    curve   trial, row, values                 the learning curve, one JSON object per row of the training history

Does no input or output; `nas.store` does. Start with `Trial`.

Numbers: the fixed metrics are columns that any tool can query; every other metric lives in `more_metrics`. Columns hold finite
numbers only. NaN and the infinities are results too (a diverged training), and SQLite would silently turn NaN into NULL, so they
are written to `more_metrics` as `{"$float": "nan"}` and come back as they were; so does a metric that is explicitly None.
Text columns hold strict JSON (no bare NaN token), which PostgreSQL and other readers accept too.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from search_spaces.architecture import Architecture

SCHEMA_VERSION = 2
"""2 added the state "stopped". Tables of version 1 are used as they are: no run of that time can stop anything."""

State = Literal["proposed", "running", "complete", "infeasible", "stopped", "failed"]
OPEN_STATES = ("proposed", "running")
FINAL_STATES = ("complete", "infeasible", "stopped", "failed")

Metric = float | int | str | None

FLOAT_METRICS = ("val_accuracy", "test_accuracy", "latency_ms", "latency_lo_ms", "latency_hi_ms", "density")
TEXT_METRICS = ("latency_source", "latency_quality")
INTEGER_METRICS = ("params", "nnz", "weight_bytes", "dense_macs", "macs")
METRIC_COLUMNS = (
    *("val_accuracy", "test_accuracy"),
    *("latency_ms", "latency_lo_ms", "latency_hi_ms", "latency_source", "latency_quality"),
    *("params", "nnz", "density", "weight_bytes", "dense_macs", "macs"),
)
_LARGEST_INTEGER = 2**63 - 1

metadata = MetaData()

meta_table = Table(
    "meta", metadata, Column("key", String(200), primary_key=True), Column("value", Text, nullable=False)
)


def _metric_column(name: str) -> Column[Any]:
    kind = Double if name in FLOAT_METRICS else BigInteger if name in INTEGER_METRICS else Text
    return Column(name, kind)


trial_table = Table(
    "trial",
    metadata,
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("searcher", String(200), nullable=False),
    Column("index", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("epochs", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("copy_of", Integer, ForeignKey("trial.trial")),
    *(_metric_column(name) for name in METRIC_COLUMNS),
    Column("more_metrics", Text, nullable=False),
    Column("violations", Text, nullable=False),
    Column("error", Text),
    Column("duration_s", Double),
    Column("sampler", Text, nullable=False),
    Column("architecture", Text, nullable=False),
    Column("proposed_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("finished_at", String(32)),
    UniqueConstraint("searcher", "index", name="one_proposal_per_index"),
    CheckConstraint(
        "state IN ('proposed', 'running', 'complete', 'infeasible', 'stopped', 'failed')", name="known_state"
    ),
)

curve_table = Table(
    "curve",
    metadata,
    Column("trial", Integer, ForeignKey("trial.trial"), primary_key=True, autoincrement=False),
    Column("row", Integer, primary_key=True, autoincrement=False),
    Column("values", Text, nullable=False),
)


@dataclass(frozen=True)
class Trial:
    """One row of the run: an architecture that a searcher proposed, and what became of it.

    Attributes:
        trial: row number over the whole run, from 0.
        searcher: who proposed it.
        index: how many this searcher had proposed before, from 0.
        state: "proposed" (not started, or put back after a crash), "running", or final: "complete", "infeasible" (a hard
            constraint is violated), "stopped" (early, by a stopping rule; its metrics are those of its last epoch), "failed" (see
            `error`).
        architecture: what to build.
        digest: of the architecture; equal digests compute the same network.
        seed: of weights, masks and batches.
        epochs: training budget.
        attempts: how often it was started; the attempt that runs now, or the last one.
        copy_of: the trial whose result this one shares (same digest, seed and epochs), or None.
        metrics: the numbers of the finished trial, by name with unit; only those that were given.
        violations: constraint -> amount by which it is violated; <= 0 is feasible.
        error: traceback or reason of a failed trial.
        duration_s: wall time of the attempt that finished, seconds.
        sampler: whatever the searcher wants to see again (JSON).
        proposed_at, started_at, finished_at: UTC; started_at is that of the last attempt.
    """

    trial: int
    searcher: str
    index: int
    state: State
    architecture: Architecture
    digest: str
    seed: int
    epochs: int
    attempts: int = 0
    copy_of: int | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    duration_s: float | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    proposed_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL_STATES


def to_json(value: Any) -> str:
    """Strict JSON; NaN and infinities become `{"$float": "nan" | "inf" | "-inf"}`. numpy scalars are taken by value.

    Raises:
        TypeError: something in `value` is not JSON.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return json.dumps(_tagged(value), allow_nan=False)


def from_json(text: str) -> Any:
    """The value that `to_json` wrote."""
    if '"$float"' in text:
        return json.loads(text, object_hook=_untag)
    return json.loads(text)


def _tagged(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _tagged(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(item) for item in value]
    value = plain_scalar(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(float(value))}
    return value


def _untag(found: dict[str, Any]) -> Any:
    if len(found) == 1 and found.get("$float") in ("nan", "inf", "-inf"):
        return float(found["$float"])
    return found


def plain_scalar(value: Any) -> Any:
    """A numpy or torch scalar as the Python number it holds; anything else unchanged."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", 0) == 0 else value


def metric_columns(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Column values for `metrics`: one per fixed metric, and `more_metrics` for what no column can hold faithfully.

    Raises:
        TypeError: a metric is not a number, text or None, or is of the wrong kind for its column.
    """
    columns: dict[str, Any] = dict.fromkeys(METRIC_COLUMNS)
    more: dict[str, Any] = {}
    for name, given in metrics.items():
        value = _checked_metric(name, given)
        fits = value is not None and not (isinstance(value, float) and not math.isfinite(value))
        if name in columns and fits and not (name in INTEGER_METRICS and abs(value) > _LARGEST_INTEGER):
            columns[name] = value
        else:
            more[name] = value
    return columns | {"more_metrics": to_json(more)}


def _checked_metric(name: str, given: Any) -> Any:
    value = plain_scalar(given)
    if value is None:
        return None
    if name in TEXT_METRICS:
        if not isinstance(value, str):
            raise TypeError(f"metric {name}: expected text or None, got {given!r} ({type(given).__name__})")
        return value
    if name in FLOAT_METRICS or name in INTEGER_METRICS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"metric {name}: expected a number or None, got {given!r} ({type(given).__name__})")
        if name in FLOAT_METRICS or not math.isfinite(value):
            return float(value)
        if value != int(value):
            raise TypeError(f"metric {name}: expected a whole number, got {given!r}")
        return operator.index(int(value))
    if not isinstance(value, bool | int | float | str):
        raise TypeError(f"metric {name}: expected a number, text or None, got {type(given).__name__}")
    return value


def now() -> str:
    """This moment in UTC, ISO 8601, microseconds; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def storable_text(text: str | None) -> str | None:
    """`text` without what databases refuse: lone surrogates and NUL are written as escapes."""
    if text is None:
        return None
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def row_to_trial(row: Row[Any]) -> Trial:
    """A row of `trial_table` (all columns, in order) as a value.

    Raises:
        ValueError: a text column does not hold what this version writes (a damaged or foreign row).
    """
    r = row._mapping
    metrics: dict[str, Metric] = {name: r[name] for name in METRIC_COLUMNS if r[name] is not None}
    metrics.update(from_json(r["more_metrics"]))
    return Trial(
        trial=r["trial"],
        searcher=r["searcher"],
        index=r["index"],
        state=r["state"],
        architecture=Architecture.from_json(r["architecture"]),
        digest=r["digest"],
        seed=r["seed"],
        epochs=r["epochs"],
        attempts=r["attempts"],
        copy_of=r["copy_of"],
        metrics=metrics,
        violations=from_json(r["violations"]),
        error=r["error"],
        duration_s=r["duration_s"],
        sampler=from_json(r["sampler"]),
        proposed_at=_moment(r["proposed_at"]),
        started_at=_moment(r["started_at"]),
        finished_at=_moment(r["finished_at"]),
    )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
