"""Trials as one table: one row per trial, failed, infeasible and stopped ones too, with fixed dtypes and units in the names.

`trials_frame` makes the table, `write_frame` and `read_frame` take it to a CSV file and back without losing a digit or a
dtype. Nothing here judges trials: fronts are `nas.pareto`, presentation is `nas.report`.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nas.pareto import nondominated

if TYPE_CHECKING:
    from nas.store import Trial

COLUMNS: dict[str, str] = {
    "trial": "Int64",
    "state": "string",
    "searcher": "string",
    "seed": "Int64",
    "epochs": "Int64",
    "val_accuracy": "Float64",
    "test_accuracy": "Float64",
    "latency_ms": "Float64",
    "latency_lo_ms": "Float64",
    "latency_hi_ms": "Float64",
    "latency_source": "string",
    "params": "Int64",
    "nnz": "Int64",
    "density": "Float64",
    "weight_bytes": "Int64",
    "dense_macs": "Int64",
    "macs": "Int64",
    "duration_s": "Float64",
    "digest": "string",
    "error": "string",
    "latency_quality": "string",
    "energy_mj": "Float64",
    "energy_method": "string",
    "copy_of": "Int64",
    "attempts": "Int64",
}
"""The columns every frame has, in this order, with their pandas dtypes (all of them can hold a missing value).

After these come metrics of the run that have no column here, then `REPLICATED` where there are one-shot searches, then
`arch.<decision>` for every decision.
"""

REPLICATED = ("replicate", "group", "role", "control_of")
"""What the trials of one-shot searches and their controls note of themselves (`nas.report.comparison` reads it): which search
it was, what it is compared within (text, e.g. the density), its part in that, and the searcher that it is a control of."""

ARCH = "arch."
_OF_THE_TRIAL = ("trial", "state", "searcher", "seed", "epochs", "duration_s", "digest", "error", "copy_of", "attempts")
_NOT_IN_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def trials_frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """One row per trial, in the order given, under a plain 0..n-1 index.

    A missing value is <NA>, and so is a NaN metric. Where a metric bears the name of one of the trial's own fields, the
    field wins. Control characters that no CSV or XML file can carry are shown as "\\x1b" and the like in `error`.

    Args:
        trials: trials in any state; may be empty.

    Returns:
        `COLUMNS`, then other metrics in order of first appearance, then the decisions: each new one after the decision
        that preceded it in its own trial. Their dtype is Int64, Float64, boolean or string, whichever holds all values.

    Raises:
        TypeError: a metric does not fit its column's dtype; names trial, metric and value.
    """
    columns: dict[str, Any] = {}
    for name, dtype in COLUMNS.items():
        if name in _OF_THE_TRIAL:
            values = [getattr(trial, name) for trial in trials]
        else:
            values = [_plain(trial.metrics.get(name)) for trial in trials]
        columns[name] = _fixed(name, values, dtype, trials)
    for name in _metric_names(trials):
        columns[name] = _inferred([_plain(trial.metrics.get(name)) for trial in trials])
    columns |= _replicated(trials, taken=columns)
    decisions = [trial.architecture.as_dict() for trial in trials]
    for name in merged_order([list(decision) for decision in decisions]):
        columns[ARCH + name] = _inferred([decision.get(name) for decision in decisions])
    return pd.DataFrame(columns, index=pd.RangeIndex(len(trials)))


def _replicated(trials: Sequence[Trial], taken: Mapping[str, Any]) -> dict[str, Any]:
    notes = [dict(trial.sampler) if "replicate" in trial.sampler else {} for trial in trials]
    for note in notes:
        group = note.get("group", note.get("density"))
        note["group"] = f"{group:g}" if isinstance(group, float) else None if group is None else str(group)
    names = [name for name in REPLICATED if name not in taken and any(n.get(name) is not None for n in notes)]
    return {name: _inferred([note.get(name) for note in notes]) for name in names}


def merged_order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """Names of many sequences in one order that agrees with all of them, where that is possible.

    Names that no sequence puts in order keep the order of their first appearance; so do names that contradict each other.

    Args:
        sequences: e.g. the decisions of each trial, in the order they were taken; no name twice in one.
    """
    first: dict[str, int] = {}
    behind: dict[str, set[str]] = {}
    for sequence in dict.fromkeys(map(tuple, sequences)):
        for name in sequence:
            first.setdefault(name, len(first))
        for name, after in itertools.pairwise(sequence):
            behind.setdefault(name, set()).add(after)
    waits = dict.fromkeys(first, 0)
    for afters in behind.values():
        for after in afters:
            waits[after] += 1
    free = [(first[name], name) for name, count in waits.items() if not count]
    heapq.heapify(free)
    left = dict.fromkeys(first)
    merged: list[str] = []
    while left:
        name = heapq.heappop(free)[1] if free else next(iter(left))  # the latter: a contradiction, cut here
        if name not in left:
            continue
        del left[name]
        merged.append(name)
        for after in behind.get(name, ()):
            waits[after] -= 1
            if not waits[after] and after in left:
                heapq.heappush(free, (first[after], after))
    return merged


def write_frame(frame: pd.DataFrame, target: str | Path | IO[str]) -> None:
    """Write a frame as CSV (UTF-8, one header line, missing values empty, full precision)."""
    frame.to_csv(target, index=False, lineterminator="\n")


def read_frame(source: str | Path | IO[str]) -> pd.DataFrame:
    """Read what `write_frame` (or `frame.to_csv()`) wrote, with the dtypes of `COLUMNS`.

    Other columns get the narrowest nullable dtype; the texts "None", "NA" and "null" stay texts.

    Raises:
        ValueError: a value does not fit its column.
    """
    raw = pd.read_csv(source, dtype="string", keep_default_na=False, na_values=[""])
    raw = raw.drop(columns=[name for name in raw.columns if name.startswith("Unnamed: ")])
    columns = {name: _parsed(raw[name], COLUMNS.get(name)) for name in raw.columns}
    return pd.DataFrame(columns, index=pd.RangeIndex(len(raw)))


def clean_text(text: str) -> str:
    """Text that CSV, JSON, XML and a terminal can carry: control characters and lone surrogates are written out."""
    return _NOT_IN_TEXT.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def complete(frame: pd.DataFrame, objectives: Mapping[str, str] | Iterable[str] = ()) -> pd.DataFrame:
    """The feasible rows trained to the end that have a finite value for every objective; the index is kept."""
    keep = frame["state"].eq("complete").fillna(False).to_numpy(dtype=bool)
    for name in objectives:
        keep &= np.isfinite(numbers(frame, name))
    return frame[keep]


def front_rows(frame: pd.DataFrame, objectives: Mapping[str, str]) -> pd.DataFrame:
    """The non-dominated feasible rows, the best in the first objective first; copies of another trial are left out."""
    done = complete(frame, objectives)
    done = done[done["copy_of"].isna()]
    front = done[nondominated(done, dict(objectives))] if objectives else done.iloc[:0]
    first = next(iter(objectives), "trial")
    return front.sort_values([first, "trial"], ascending=[objectives.get(first) != "max", True], kind="stable")


def numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64[n], NaN where it is missing, is no number, or is not there at all."""
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _metric_names(trials: Sequence[Trial]) -> list[str]:
    names: dict[str, None] = {}
    for trial in trials:
        names.update(dict.fromkeys(trial.metrics))
    return [name for name in names if name not in COLUMNS and not name.startswith(ARCH)]


def _array(values: list[Any], dtype: Any) -> Any:
    return pd.array(values, dtype=dtype)


def _plain(value: Any) -> Any:
    """A NumPy or torch scalar as the Python number it holds."""
    return value.item() if hasattr(value, "item") else value


def _fixed(name: str, values: list[Any], dtype: str, trials: Sequence[Trial]) -> Any:
    if dtype == "string":
        values = [None if value is None else clean_text(str(value)) for value in values]
    try:
        return _array(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        pass
    for trial, value in zip(trials, values, strict=True):  # the slow road, to name the one that is wrong
        try:
            _array([value], dtype=dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(
                f"trial {trial.trial}: column {name} holds {dtype}, got {value!r}; store this metric under another name"
            ) from error
    raise TypeError(f"column {name}: expected {dtype} throughout, got a mixture of types")


def _inferred(values: list[Any]) -> Any:
    """The narrowest nullable dtype that holds all values; numbers and text together are text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} and kinds:
        return _array(values, dtype="boolean")
    if kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values):
        return _array(values, dtype="Int64")
    if kinds <= {int, float}:
        return _array([None if value is None else float(value) for value in values], dtype="Float64")
    return _array([None if value is None else clean_text(str(value)) for value in values], dtype="string")


def _parsed(column: pd.Series, dtype: str | None) -> pd.Series:
    if dtype is not None:
        return _as(column, dtype)
    known = column.dropna()
    if known.isin(["True", "False"]).all() and len(known):
        return column.map({"True": True, "False": False}).astype("boolean")
    for candidate, pattern in (("Int64", r"-?(0|[1-9]\d*)"), ("Float64", r"-?(\d+(\.\d*)?([eE][-+]?\d+)?|inf)")):
        if known.str.fullmatch(pattern).all():
            try:
                return _as(column, candidate)
            except (ValueError, OverflowError):
                continue
    return column


def _as(column: pd.Series, dtype: str) -> pd.Series:
    if dtype == "string":
        return column
    kind = int if dtype == "Int64" else float
    try:
        values = [None if value is pd.NA else kind(value) for value in column]
        return pd.Series(_array(values, dtype=dtype), index=column.index)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"column {column.name}: expected {dtype}, got {_first_bad(column, kind)!r}") from error


def _first_bad(column: pd.Series, kind: type) -> str | None:
    for value in column:
        try:
            if value is not pd.NA:
                kind(value)
        except ValueError:
            return str(value)
    return None
