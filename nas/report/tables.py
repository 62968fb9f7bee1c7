"""The tables a run is read by: its results, its front, its searchers side by side, and a network layer by layer.

Each function takes frames and returns a `Sheet`; printing is `nas.report.sheet.print_sheet`. `format_frame` gives the
machine-readable forms. Start with `results_sheet`, `pareto_sheet`, `searcher_sheet` and `layer_sheet`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nas.errors import unknown_name
from nas.frames import front_rows, numbers, write_frame
from nas.optimism import optimism
from nas.report.history import BASELINE, outside_budget, searcher_summary
from nas.report.plans import Operation, shape_text, shares, total_ms
from nas.report.sheet import Column, Sheet, to_text
from nas.report.units import MISSING, compact, digits, direction_of, interval, missing, short, show

FORMATS = ("table", "csv", "json")

_SHOWN = (
    *("trial", "state", "searcher", "val_accuracy", "test_accuracy", "latency_ms", "nnz", "density"),
    *("params", "weight_bytes", "macs", "duration_s"),
)
_RANKS = {
    **{"trial": 0, "val_accuracy": 0, "latency_ms": 0, "state": 1, "nnz": 1, "density": 2, "searcher": 2},
    **{"test_accuracy": 3, "weight_bytes": 5, "params": 6, "macs": 4, "duration_s": 7},
}
_STATE_STYLES = {"failed": "bad", "infeasible": "dim", "stopped": "dim", "proposed": "dim", "running": "dim"}


def results_sheet(
    frame: pd.DataFrame, objectives: Mapping[str, str], *, limit: int | None = None, title: str = "Results"
) -> Sheet:
    """Every trial, or the `limit` last; failed, infeasible and stopped ones too, with a star on the members of the front.

    Args:
        frame: as from `nas.frames.trials_frame`.
        objectives: metric -> direction, for the star.
        limit: largest number of rows; the others are counted in a note.
        title: one line above.
    """
    front = set(front_rows(frame, objectives)["trial"])
    extra = [name for name in objectives if name not in _SHOWN]
    names = [name for name in (*_SHOWN, *extra) if name in objectives or _has_values(frame, name)]
    shown = frame if limit is None or len(frame) <= limit else frame.iloc[len(frame) - limit :]
    notes = []
    if front:
        notes.append(f"* on the front of {_named(objectives)}")
    if len(shown) < len(frame):
        notes.append(f"the last {len(shown)} of {len(frame)} trials; all of them: --format csv")
    notes += _quality_note(shown) + prediction_notes(frame)
    states = frame["state"].value_counts()
    if states.get("stopped", 0):
        notes.append(f"{states['stopped']} stopped early, with the values of their last epoch; never on the front")
    if states.get("failed", 0):
        notes.append(f"{states['failed']} failed; the reason is in the column error of --format csv, and in nas show")
    return _sheet(title, shown, names, notes, objectives, front)


def pareto_sheet(front: pd.DataFrame, objectives: Mapping[str, str], *, title: str | None = None) -> Sheet:
    """The members of a front: accuracy, latency with its interval, non-zeros, density, searcher; one row each.

    Args:
        front: the rows of the front, in the order to be shown.
        objectives: metric -> direction; every objective is a column.
        title: one line above; default says what the front is of.
    """
    base = ["trial", *objectives]
    others = ("val_accuracy", "latency_ms", "nnz", "density", "searcher", "test_accuracy", "weight_bytes", "macs")
    names = base + [name for name in others if name not in base and (name == "searcher" or _has_values(front, name))]
    count = f"({len(front)} network{'s' if len(front) != 1 else ''})"
    title = f"Pareto front: {_named(objectives)} {count}" if title is None else title
    notes = _quality_note(front)
    if _has_values(front, "latency_ms"):
        sources = sorted(set(front["latency_source"].dropna())) if "latency_source" in front else []
        said = f" ({', '.join(sources)})" if sources else ""
        intervals = " with its interval [low, high]" if _has_values(front, "latency_lo_ms") else ""
        notes.insert(0, f"latency{said} in ms{intervals}; non-zeros: all parameters but the masked weights")
    if front.empty:
        notes.append("no feasible trial")
    return _sheet(title, front, names, notes, objectives, set())


def searcher_sheet(frame: pd.DataFrame, objectives: Mapping[str, str], *, title: str | None = None) -> Sheet:
    """The searchers side by side at equal budget (see `nas.report.history.searcher_summary`), with an honest note."""
    summary = searcher_summary(frame, objectives)
    columns = [Column("searcher"), Column("trials", True), Column("feasible", True)]
    states = ["infeasible", *(["stopped"] if summary["stopped"].any() else []), "failed", "copies"]
    columns += [
        Column(state, True, {"infeasible": 4, "stopped": 4, "failed": 3, "copies": 5}[state]) for state in states
    ]
    columns += [Column(f"best {short(metric)}", True) for metric in objectives]
    columns += [Column("hypervolume", True, 1), Column("on front", True, 2)]
    rows, keys = [], []
    for row in summary.to_dict("records"):
        counts = [row["trials"], row["complete"], *(row[state] for state in states)]
        best = [show(metric, row[f"best_{metric}"]) for metric in objectives]
        volume = show("hypervolume", row["hypervolume"])
        rows.append((str(row["searcher"]), *(f"{n:,}" for n in counts), *best, volume, str(row["on_front"])))
        values = [*counts, *(row[f"best_{metric}"] for metric in objectives), row["hypervolume"], row["on_front"]]
        keys.append((str(row["searcher"]), *(None if missing(value) else float(value) for value in values)))
    return Sheet(
        "Searchers at equal budget" if title is None else title,
        tuple(columns),
        tuple(rows),
        (*comparison_notes(summary), *prediction_notes(frame)),
        tuple("dim" if row[0] == BASELINE else "" for row in rows),
        tuple(keys),
    )


def comparison_notes(summary: pd.DataFrame) -> list[str]:
    """What the comparison of searchers may and may not be read as."""
    notes = [
        "hypervolume: share of the box between the run's worst and best feasible values that is dominated (0 to 1)"
    ]
    searching = [name for name in summary["searcher"] if not outside_budget(name)]
    if len(searching) > 1:
        notes.append("one run, one seed: differences between searchers may be chance; compare runs of several seeds")
    if BASELINE in set(summary["searcher"]):
        notes.append(f"{BASELINE}: dense networks for comparison, outside the budget")
    found = [name for name in summary["searcher"] if outside_budget(name) and name != BASELINE]
    if found:
        notes.append(
            f"{', '.join(found)}: one-shot searches and their controls have one trial per architecture found, outside the budget"
        )
    return notes


def prediction_notes(frame: pd.DataFrame) -> list[str]:
    """Of a search that predicted latencies: how far they were off where they were measured afterwards."""
    if "latency_search_source" not in frame:
        return []
    originals = frame[frame["copy_of"].isna()].to_dict("records")
    found = optimism({str(name): value for name, value in row.items() if not missing(value)} for row in originals)
    if found is None:
        return []
    return [f"latencies were predicted, then measured for what is handed out: {found}"]


def layer_sheet(operations: Sequence[Operation], *, title: str = "Layers") -> Sheet:
    """A network operation by operation: what, how sparse, which kernel, multiply-adds, time and its share.

    Args:
        operations: as from `nas.report.plans.read_plan`.
        title: one line above.
    """
    timed = total_ms(operations) is not None
    part = "of time" if timed else "of MACs"
    columns = [
        *(Column("operation"), Column("what"), Column("output", False, 4), Column("density", True), Column("pattern")),
        *(Column("kernel", False, 1), Column("non-zeros", True, 2), Column("MACs", True, 3)),
        *(Column("of dense", True, 6), Column("ms", True, 0 if timed else 9), Column("dense ms", True, 5)),
        Column(part, True, 1),
    ]
    rows, keys, styles = [], [], []
    for op, share in zip(operations, shares(operations), strict=True):
        density = MISSING if op.density is None else f"{op.density:.3g}"
        weighty = op.density is not None
        of_dense = f"{op.macs / op.dense_macs:.0%}" if op.dense_macs else MISSING
        rows.append(
            (
                *(op.name, " + ".join((op.what, *op.after)), shape_text(op.output), density),
                *(op.pattern or ("dense" if weighty else MISSING), op.kernel or MISSING),
                *(f"{op.nnz:,}" if weighty else MISSING, compact(op.macs) if op.macs else MISSING, of_dense),
                *(MISSING if op.ms is None else digits(op.ms), MISSING if op.dense_ms is None else digits(op.dense_ms)),
                f"{share:.1%}",
            )
        )
        keys.append((None, None, None, op.density, None, None, op.nnz, op.macs, None, op.ms, op.dense_ms, share))
        styles.append("" if weighty or op.kind == "torch" else "dim")
    empty = [i for i in range(len(columns)) if i > 2 and all(row[i] == MISSING for row in rows)]
    keep = [i for i in range(len(columns)) if i not in empty]
    return Sheet(
        title,
        tuple(columns[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in rows),
        (_timed_how(operations),) if timed else (),
        tuple(styles),
        tuple(tuple(key[i] for i in keep) for key in keys),
    )


def _timed_how(operations: Sequence[Operation]) -> str:
    sources = sorted({op.source for op in operations if op.source})
    if not sources:
        return "each operation timed by itself; the whole network is measured apart"
    if sources == ["in place"]:
        return "each operation timed in its place in the running network; the whole is measured apart"
    return f"times are predicted, each operation's from one that is: {', '.join(sources)}"


def failure_sheet(frame: pd.DataFrame, *, limit: int = 20) -> Sheet:
    """The failed trials with the last line of their error."""
    failed = frame[frame["state"].eq("failed").fillna(False)]
    rows = tuple(
        (str(row["trial"]), str(row["searcher"]), last_line(row["error"]))
        for row in failed.tail(limit).to_dict("records")
    )
    notes = (f"the last {limit} of {len(failed)}",) if len(failed) > limit else ()
    columns = (Column("trial", True), Column("searcher", False, 1), Column("error"))
    return Sheet("Failed trials", columns, rows, notes, ("bad",) * len(rows))


def last_line(error: Any) -> str:
    """The last non-empty line of a traceback: the exception itself."""
    lines = [line.strip() for line in ("" if missing(error) else str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else MISSING


def format_frame(frame: pd.DataFrame, how: str, *, objectives: Mapping[str, str] | None = None) -> str:
    """A frame as text for `--format`.

    Args:
        frame: any frame of trials.
        how: "table" (for people: rounded, chosen columns), "csv" or "json" (everything, exact; JSON is a list of records
            with null for missing values).
        objectives: metric -> direction, for the table.

    Raises:
        UnknownName: `how` is none of `FORMATS`.
    """
    if how == "csv":
        buffer = io.StringIO()
        write_frame(frame, buffer)
        return buffer.getvalue()
    if how == "json":
        records = [{name: _json_value(value) for name, value in row.items()} for row in frame.to_dict("records")]
        return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if how == "table":
        return to_text(results_sheet(frame, objectives or {}))
    raise unknown_name("format", how, FORMATS)


def _json_value(value: Any) -> Any:
    if missing(value):
        return None
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _sheet(
    title: str,
    frame: pd.DataFrame,
    names: Sequence[str],
    notes: Sequence[str],
    objectives: Mapping[str, str],
    starred: set[Any],
) -> Sheet:
    columns = []
    for name in names:
        text = name in ("state", "searcher", "digest") or frame.dtypes.get(name) == "string"
        columns.append(Column(short(name), not text, 0 if name in objectives else _RANKS.get(name, 8)))
    records = frame.to_dict("records")
    marked = any(_unsettled(row) for row in records)
    rows = tuple(tuple(_cell(row, name, row["trial"] in starred, marked) for name in names) for row in records)
    keys = tuple(tuple(_key(row.get(name)) for name in names) for row in records)
    styles = tuple("good" if row["trial"] in starred else _STATE_STYLES.get(row["state"], "") for row in records)
    return Sheet(title, tuple(columns), rows, tuple(notes), styles, keys)


def _cell(row: Mapping[Any, Any], name: str, starred: bool, marked: bool) -> str:
    value = row.get(name)
    if name == "trial":
        return f"{value}{'*' if starred else ''}"
    if name == "latency_ms":
        text = interval(value, row.get("latency_lo_ms"), row.get("latency_hi_ms"))
        return text + (" ~" if _unsettled(row) else "  " if marked else "")
    return show(name, value)


def _unsettled(row: Mapping[Any, Any]) -> bool:
    quality = row.get("latency_quality")
    return not missing(quality) and quality != "ok"


def _key(value: Any) -> float | str | None:
    if missing(value):
        return None
    return value if isinstance(value, str) else float(value)


def _quality_note(frame: pd.DataFrame) -> list[str]:
    if "latency_quality" not in frame or not (frame["latency_quality"].dropna() != "ok").any():
        return []
    return ["~ the measurement did not settle (its quality is not ok); measure again on a quieter machine"]


def _has_values(frame: pd.DataFrame, name: str) -> bool:
    if name not in frame.columns:
        return False
    if frame.empty:
        return name in ("trial", "state", "searcher")
    return bool(np.isfinite(numbers(frame, name)).any() if frame[name].dtype != "string" else frame[name].notna().any())


def _named(objectives: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {direction_of(name, objectives)}" for name in objectives) or "nothing"
