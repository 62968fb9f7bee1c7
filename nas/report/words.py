"""What a run found, in sentences: the few statements its numbers carry, and no more. Start with `headline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nas.frames import complete, numbers
from nas.report.history import FINISHED, epochs_spared, equal_budget, outside_budget, searcher_summary, searchers
from nas.report.tables import front_rows
from nas.report.units import digits, direction_of, duration, interval, label, missing, show


def headline(frame: pd.DataFrame, objectives: Mapping[str, str]) -> list[str]:
    """The best networks and how they stand to the dense ones; a sentence that says so where there are none.

    Args:
        frame: all trials.
        objectives: metric -> direction; "best" is by the first, then by the others.
    """
    done = complete(frame, objectives)
    if done.empty:
        return [_nothing(frame)]
    front = front_rows(frame, objectives)
    first = next(iter(objectives))
    best = front.iloc[0]
    sentences = [f"Best {label(first)}: {describe(best)}."]
    for metric in list(objectives)[1:]:
        values = numbers(front, metric)
        at = int(values.argmax() if objectives[metric] == "max" else values.argmin())
        if front.iloc[at]["trial"] != best["trial"]:
            sentences.append(f"Best {label(metric)}: {describe(front.iloc[at])}.")
    dense = _against_dense(done, objectives)
    return sentences + ([dense] if dense else [])


def describe(row: Mapping[str, Any] | pd.Series) -> str:
    """A trial in half a line: number, searcher, accuracies, latency with its interval, non-zeros, density."""
    parts = []
    for metric in ("val_accuracy", "test_accuracy"):
        if not missing(row.get(metric)):
            parts.append(f"{label(metric)} {show(metric, row[metric])}")
    if not missing(row.get("latency_ms")):
        parts.append(f"{interval(row['latency_ms'], row.get('latency_lo_ms'), row.get('latency_hi_ms'))} ms")
    if not missing(row.get("nnz")):
        density = "" if missing(row.get("density")) else f" (density {show('density', row['density'])})"
        parts.append(f"{row['nnz']:,} non-zeros{density}")
    return f"trial {row['trial']} ({row['searcher']})" + (": " + ", ".join(parts) if parts else "")


def comparison(frame: pd.DataFrame, objectives: Mapping[str, str]) -> list[str]:
    """Random search and the other searchers in words that claim no more than one run of one seed can show."""
    names = [name for name in searchers(frame) if not outside_budget(name)]
    if len(names) < 2 or not equal_budget(frame):
        return ["There is nothing to compare yet: fewer than two searchers have a finished trial."]
    summary = {str(row["searcher"]): row for row in searcher_summary(frame, objectives).to_dict("records")}
    n = equal_budget(frame)
    count = "failed, infeasible and stopped" if frame["state"].eq("stopped").any() else "failed and infeasible"
    sentences = [f"Each searcher is judged by its first {n} finished trials ({count} ones count)."]
    if len(objectives) > 1:
        volumes = {name: float(summary[name]["hypervolume"]) for name in names}
        what = "hypervolume"
    else:
        metric, direction = next(iter(objectives.items()))
        sign = 1.0 if direction == "max" else -1.0
        volumes = {name: sign * float(summary[name][f"best_{metric}"]) for name in names}
        what = f"best {label(metric)}"
    known = {name: value for name, value in volumes.items() if np.isfinite(value)}
    if len(known) > 1:
        ranked = sorted(known, key=lambda name: -known[name])
        shown = ", ".join(f"{name} {show('hypervolume', abs(known[name]))}" for name in ranked)
        sentences.append(f"{what[0].upper()}{what[1:]} at that budget: {shown}.")
    sentences.append(
        "This is one run with one seed per searcher (n = 1): the order may be chance, and no claim that one searcher is better "
        "follows from it. Run several seeds to make one."
    )
    return sentences


def status(frame: pd.DataFrame, asked: Mapping[str, int], finished: bool) -> str:
    """How far the run is: "finished: 34 trials", or what is done, running and still to come."""
    states = frame["state"].value_counts()
    done = sum(int(states.get(state, 0)) for state in FINISHED)
    parts = [f"{int(states.get(state, 0))} {state}" for state in FINISHED if states.get(state, 0)]
    spent = float(np.nansum(numbers(frame, "duration_s")))
    text = f"{done} trials" + (f" ({', '.join(parts)})" if parts else "")
    time = f"; evaluating them took {duration(spent)} in all" if spent else ""
    spared, epochs = epochs_spared(frame)
    if spared:
        time += f"; early stopping spared {spared:,} of {epochs:,} epochs"
    total = max(sum(asked.values()), len(frame))
    if finished or 0 < total == done:
        return f"The search is finished: {text}{time}."
    running = int(states.get("running", 0))
    return f"The search is not finished: {text} of {total} are done, {running} running{time}. The same command goes on with it."


def _nothing(frame: pd.DataFrame) -> str:
    states = frame["state"].value_counts()
    if frame.empty:
        return "No trial has been proposed yet."
    if states.get("failed", 0) == len(frame):
        return f"All {len(frame)} trials failed; their tracebacks are below."
    if states.get("infeasible", 0):
        return f"No trial is complete and feasible so far; {states['infeasible']} broke a constraint."
    return "No trial is complete yet."


def _against_dense(done: pd.DataFrame, objectives: Mapping[str, str]) -> str:
    """The best dense network of the run beside the cheapest sparse one that is at least as good."""
    first, direction = next(iter(objectives.items()))
    cost = next(
        (name for name in objectives if direction_of(name, objectives) == "min" and name != first), "latency_ms"
    )
    is_dense = np.isclose(numbers(done, "density"), 1.0)
    costs = numbers(done, cost)
    if direction != "max" or not is_dense.any() or is_dense.all() or not np.isfinite(costs).all():
        return ""
    values = numbers(done, first)
    order = np.lexsort((costs, -values))
    best = next(i for i in order if is_dense[i])
    dense = done.iloc[int(best)]
    sentence = f"Best dense network: {describe(dense)}."
    rivals = [i for i in range(len(done)) if not is_dense[i] and values[i] >= values[best]]
    if not rivals:
        return f"{sentence} No sparse network of this run reaches its {label(first)}."
    rival = min(rivals, key=lambda i: (costs[i], -values[i]))
    row = done.iloc[rival]
    ratio = costs[best] / costs[rival] if costs[rival] > 0 else float("nan")
    if not np.isfinite(ratio):
        return sentence
    name = label(cost).split(" (")[0]
    factor = f"{digits(ratio, 2)} times lower" if ratio >= 1 else f"{digits(1 / ratio, 2)} times higher"
    return f"{sentence} The sparse network of lowest {name} that is at least as good is trial {row['trial']}: {name} {factor}."
