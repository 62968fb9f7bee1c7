"""How a search went: best so far, hypervolume so far, and the searchers side by side at equal budget. Numbers only.

Everything is per searcher, in the order in which that searcher proposed; failed and infeasible trials, and those that were stopped
early, count as spent budget. Start with `best_so_far`, `hypervolume_so_far` and `searcher_summary`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from nas.frames import complete, numbers
from nas.pareto import hypervolume, nondominated, normalise_directions
from nas.report.units import direction_of
from nas.searchers import is_oneshot

FINISHED = ("complete", "infeasible", "stopped", "failed")
BASELINE = "dense"
"""The searcher that only trains dense networks for comparison: not part of an equal budget."""


def outside_budget(searcher: str) -> bool:
    """Whether a searcher has as many trials as there are, whatever the others have: the dense baseline, one-shot searches
    (a trial per architecture that they found) and their controls ("<searcher>/random")."""
    return searcher == BASELINE or "/" in searcher or is_oneshot(searcher)


def searchers(frame: pd.DataFrame) -> list[str]:
    """The searchers of a run: random first, others in order of appearance, one-shot ones and their controls, baselines."""
    names = list(dict.fromkeys(frame["searcher"].dropna()))
    return sorted(names, key=lambda name: (name == BASELINE, outside_budget(name), name != "random"))


def finished(frame: pd.DataFrame, searcher: str | None = None) -> pd.DataFrame:
    """The rows that are done (complete, infeasible, stopped early or failed), of one searcher or of all, by trial number."""
    keep = frame["state"].isin(FINISHED)
    if searcher is not None:
        keep &= frame["searcher"].eq(searcher).fillna(False)
    return frame[keep].sort_values("trial", kind="stable")


def epochs_spared(frame: pd.DataFrame) -> tuple[int, int]:
    """What early stopping saved: (epochs not trained, epochs that all trained networks would have taken). Copies are left out."""
    rows = frame[frame["state"].isin(["complete", "stopped"]).to_numpy(dtype=bool) & frame["copy_of"].isna().to_numpy()]
    stopped = rows[rows["state"].eq("stopped").to_numpy(dtype=bool)]
    spared = np.nan_to_num(numbers(stopped, "epochs") - numbers(stopped, "trained_epochs")).sum()
    return int(spared), int(np.nansum(numbers(rows, "epochs")))


def best_so_far(frame: pd.DataFrame, searcher: str, metric: str, direction: str) -> np.ndarray:
    """Best feasible value of a metric after 1, 2, ... finished trials of a searcher.

    Returns:
        float64[n finished], NaN until the first feasible trial.
    """
    rows = finished(frame, searcher)
    values = numbers(rows, metric)
    usable = rows["state"].eq("complete").to_numpy(dtype=bool) & np.isfinite(values)
    worst = -np.inf if direction == "max" else np.inf
    running = (np.maximum if direction == "max" else np.minimum).accumulate(np.where(usable, values, worst))
    return np.where(np.isfinite(running), running, np.nan)


def reference_box(frame: pd.DataFrame, objectives: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray] | None:
    """The worst and the best value of each objective over all feasible trials of the run.

    Returns:
        (worst float64[m], best float64[m]) in the objectives' own units and order; None without two different values
        in every objective (there is no volume then).
    """
    rows = complete(frame, objectives)
    if rows.empty or not objectives:
        return None
    points = np.column_stack([numbers(rows, name) for name in objectives])
    signs = normalise_directions(objectives)
    costs = points * signs
    worst, best = costs.max(axis=0), costs.min(axis=0)
    if not (worst > best).all():
        return None
    return worst * signs, best * signs


def relative_hypervolume(
    frame: pd.DataFrame, objectives: Mapping[str, str], box: tuple[np.ndarray, np.ndarray] | None
) -> float:
    """Share of the box between the worst and the best values that the rows dominate, in [0, 1]; NaN without a box.

    Every objective is scaled to the box first, so the number has no unit; it compares rows of one run only.
    """
    if box is None:
        return float("nan")
    return hypervolume(_scaled(frame, objectives, box), np.zeros(len(objectives)), ("max",) * len(objectives))


def hypervolume_so_far(
    frame: pd.DataFrame,
    searcher: str,
    objectives: Mapping[str, str],
    box: tuple[np.ndarray, np.ndarray] | None,
    points: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """Relative hypervolume of a searcher's own front after k finished trials.

    Args:
        frame: all trials of the run.
        searcher: whose.
        objectives: metric -> direction.
        box: from `reference_box`, over the whole run, so that searchers compare.
        points: largest number of k that are computed (evenly spaced, the last always among them).

    Returns:
        (k int64[p], value float64[p]).
    """
    rows = finished(frame, searcher)
    if rows.empty:
        return np.empty(0, np.int64), np.empty(0)
    steps = np.unique(np.linspace(1, len(rows), min(len(rows), points)).round().astype(np.int64))
    if box is None:
        return steps, np.full(len(steps), np.nan)
    scaled = _scaled(rows, objectives, box)
    origin, up = np.zeros(len(objectives)), ("max",) * len(objectives)
    return steps, np.array([hypervolume(scaled[:k], origin, up) for k in steps])


def _scaled(rows: pd.DataFrame, objectives: Mapping[str, str], box: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """float64[n, m]: every objective from 0 (worst of the box) to 1 (best); NaN for rows that are not feasible results."""
    worst, best = box
    points = np.column_stack([numbers(rows, name) for name in objectives])
    points[~rows["state"].eq("complete").to_numpy(dtype=bool, na_value=False)] = np.nan
    return (points - worst) / (best - worst)


def equal_budget(frame: pd.DataFrame) -> int:
    """Finished trials that every searcher of the run has reached, those `outside_budget` left out. 0 without a searcher."""
    counts = [len(finished(frame, name)) for name in searchers(frame) if not outside_budget(name)]
    return min(counts, default=0)


def searcher_summary(frame: pd.DataFrame, objectives: Mapping[str, str]) -> pd.DataFrame:
    """One row per searcher at equal budget: its first n finished trials, n the same for all.

    Those `outside_budget` are shown with what they have. The hypervolume is relative to the box of the whole run (`reference_box`).

    Returns:
        Columns searcher, trials, complete, infeasible, stopped, failed, copies, best_<metric> for every objective, hypervolume,
        on_front (its members of the front of all searchers' trials at this budget).
    """
    n = equal_budget(frame)
    taken = {name: finished(frame, name).iloc[: None if outside_budget(name) else n] for name in searchers(frame)}
    everything = pd.concat(taken.values()) if taken else frame.iloc[:0]
    joint = complete(everything, objectives)
    on_front = set(joint["trial"][nondominated(joint, dict(objectives))]) if objectives else set()
    box = reference_box(frame, objectives)
    rows = []
    for name, part in taken.items():
        done = complete(part, objectives)
        row: dict[str, object] = {"searcher": name, "trials": len(part)}
        row |= {state: int(part["state"].eq(state).sum()) for state in FINISHED}
        row["copies"] = int(part["copy_of"].notna().sum())
        for metric in objectives:
            values = numbers(done, metric)
            best = np.nan
            if len(values):
                best = values.max() if direction_of(metric, objectives) == "max" else values.min()
            row[f"best_{metric}"] = best
        row["hypervolume"] = relative_hypervolume(part, objectives, box)
        row["on_front"] = sum(1 for trial in done["trial"] if trial in on_front)
        rows.append(row)
    columns = ["searcher", "trials", *FINISHED, "copies", *(f"best_{m}" for m in objectives), "hypervolume", "on_front"]
    return pd.DataFrame(rows, columns=columns)
