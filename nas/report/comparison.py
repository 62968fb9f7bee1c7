"""One-shot searches beside their controls: random and dense-searched networks that keep as many weights, replicate by replicate.

`comparison_frame` has the numbers, `comparison_sheet` the table for people, `comparison_figure` accuracy against kept weights.
What is compared are final trainings. Nothing is selected among replicates: every found architecture counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nas.frames import numbers
from nas.oneshot.statistics import mean_sd, paired, plus_minus
from nas.report.node_masks import node_masks_sheet
from nas.report.sheet import Column, Sheet
from nas.report.units import MISSING, compact, digits, label, missing, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nas.run import Run

JUDGED = ("val_accuracy", "test_accuracy")
COSTS = ("kept_weights", "nnz", "macs", "latency_ms")
SHARES = ("dead_share", "skip_pool_share")
_DIFFERENCE = ("mean", "low", "high", "p_t", "p_flip", "n")


def replicated_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials of one-shot searches and their controls, but not those with a part ("role") in a comparison of their own."""
    if "replicate" not in frame.columns:
        return frame.iloc[:0]
    keep = frame["replicate"].notna()
    if "role" in frame.columns:
        keep &= frame["role"].isna()
    return frame[keep]


def comparison_frame(frame: pd.DataFrame, objectives: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Searches and controls side by side, within groups of equal density.

    Replicates are the pairs. Several architectures of one replicate and group (more random controls, more found) count as
    their mean. Only complete trials count.

    Args:
        frame: of a run, as from `nas.frames.trials_frame`.
        objectives: metric -> direction; those that are not among the columns anyway get a column of means.

    Returns:
        A row per group and searcher, each search followed by its controls. Columns:
        group (text; <NA> where there is one group), searcher, control_of, n (replicates), trials, lost (trials that are failed or
        infeasible); val_accuracy, test_accuracy, other objectives, kept_weights, nnz, macs, latency_ms, dead_share (of channels),
        skip_pool_share: means over replicates; val_accuracy_sd, test_accuracy_sd. On rows of controls, for each accuracy:
        difference_<accuracy> = search less control, _low, _high (95 %), _p_t, _p_flip, _n (pairs) (see
        `nas.oneshot.statistics.Paired`): above 0 the search did better than this control.
    """
    rows = replicated_rows(frame).copy()
    extra = [name for name in objectives or {} if name not in (*JUDGED, *COSTS, *SHARES)]
    measured = (*JUDGED, *extra, *COSTS, *SHARES)
    for name in ("group", "control_of"):
        if name not in rows.columns:
            rows[name] = pd.array([pd.NA] * len(rows), dtype="string")
    dead, channels = numbers(rows, "dead_channels"), numbers(rows, "channels")
    rows["dead_share"] = np.divide(dead, channels, out=np.full(len(rows), np.nan), where=channels > 0)
    per_replicate = {key: _replicates(part, measured) for key, part in _parts(rows)}
    table = []
    for (group, searcher), part in _parts(rows):
        means = per_replicate[group, searcher]
        control_of = part["control_of"].dropna()
        parent = str(control_of.iloc[0]) if len(control_of) else None
        row: dict[str, Any] = {"group": group or None, "searcher": searcher, "control_of": parent}
        row |= {"n": len(means), "trials": len(part)}
        row["lost"] = int(part["state"].isin(["failed", "infeasible"]).sum())
        for name in measured:
            row[name], spread = mean_sd(means[name].to_numpy())
            if name in JUDGED:
                row[f"{name}_sd"] = spread
        if parent is not None:
            searched = per_replicate.get((group, parent), means.iloc[:0])
            both = searched.index.intersection(means.index)
            for name in JUDGED:
                found = paired(searched.loc[both, name].tolist(), means.loc[both, name].tolist())
                row |= {_difference(name, part): getattr(found, part) for part in _DIFFERENCE}
        table.append(row)
    columns = ["group", "searcher", "control_of", "n", "trials", "lost"]
    columns += [n for name in measured for n in ((name, f"{name}_sd") if name in JUDGED else (name,))]
    columns += [_difference(name, part) for name in JUDGED for part in _DIFFERENCE]
    result = pd.DataFrame(table, columns=columns)
    return result.astype(dict.fromkeys(("group", "searcher", "control_of"), "string"))


def comparison_sheets(run: Run) -> list[Sheet]:
    """All tables by which a run compares replicate by replicate: one-shot searches and their controls, searched node masks."""
    found = [comparison_sheet(run.frame(), run.objectives), node_masks_sheet(run)]
    return [sheet for sheet in found if sheet is not None]


def comparison_sheet(
    frame: pd.DataFrame, objectives: Mapping[str, str] | None = None, *, title: str | None = None
) -> Sheet | None:
    """The table of `comparison_frame` for people; None if the run has no one-shot search.

    The difference and its tests are those of the test accuracy where every pair has one, else of the validation accuracy.
    """
    table = comparison_frame(frame, objectives)
    if table.empty:
        return None
    judged = _judged(table)
    grouped = bool(table["group"].notna().any())
    columns = [Column("density")] if grouped else []
    columns += [Column("searcher"), Column("n", True), Column("val acc", True), Column("test acc", True, 2)]
    columns += [Column("kept weights", True), Column("with norms", True, 6), Column("MACs", True, 4)]
    columns += [Column("latency ms", True, 5), Column("dead", True, 1), Column("skip/pool", True, 1)]
    columns += [Column("search less this", True), Column("95 %", True, 1), Column("p (t)", True, 3)]
    columns += [Column("p (flips)", True, 2)]
    cells, keys, styles = [], [], []
    for row in table.to_dict("records"):
        control = not missing(row["control_of"])
        found = {part: row[_difference(judged, part)] for part in _DIFFERENCE} if control else {}
        texts = [str(row["group"]) if not missing(row["group"]) else MISSING] if grouped else []
        texts += [("  " if control else "") + str(row["searcher"]), _counted(row)]
        texts += [plus_minus(row[name], row[f"{name}_sd"]) for name in JUDGED]
        texts += [_count(row["kept_weights"]), _count(row["nnz"]), _macs(row["macs"])]
        texts += [show("latency_ms", row["latency_ms"]), *(_percent(row[name]) for name in SHARES)]
        texts += _difference_texts(found)
        cells.append(tuple(texts))
        sorted_by = [row["n"], *(row[name] for name in (*JUDGED, *COSTS, *SHARES))]
        sorted_by += [found.get(part, math.nan) for part in ("mean", "low", "p_t", "p_flip")]
        head = ([str(row["group"])] if grouped else []) + [str(row["searcher"])]
        keys.append((*head, *(None if missing(value) else float(value) for value in sorted_by)))
        styles.append("dim" if control else "")
    return Sheet(
        "One-shot searches and their controls" if title is None else title,
        tuple(columns),
        tuple(cells),
        tuple(_notes(table, judged)),
        tuple(styles),
        tuple(keys),
    )


def comparison_figure(frame: pd.DataFrame, metric: str = "val_accuracy", cost: str = "kept_weights") -> Figure:
    """Accuracy against kept weights: a point per trial; searches are filled, their controls hollow in the same colour."""
    from matplotlib.ticker import FuncFormatter

    from nas.report import style
    from nas.report.axes import log_axis, tick

    rows = replicated_rows(frame)
    rows = rows[rows["state"].eq("complete").fillna(False).to_numpy(dtype=bool)]
    x, y = numbers(rows, cost), numbers(rows, metric)
    known = np.isfinite(x) & np.isfinite(y) & (x > 0)
    if not known.any():
        return style.message_figure(
            f"no complete trial of a one-shot search with {label(cost)} and {label(metric)} yet"
        )
    names = list(dict.fromkeys(rows["searcher"]))
    families = list(dict.fromkeys(name.partition("/")[0] for name in names))
    colours = {family: style.PALETTE[i % len(style.PALETTE)] for i, family in enumerate(families)}
    markers = {"": "o", "random": "x", "dense": "s"}
    with style.rc():
        figure = style.new_figure(7.2, 3.4)
        axes = figure.add_subplot()
        style.tidy(axes)
        for name in names:
            family, _, kind = name.partition("/")
            mine = known & rows["searcher"].eq(name).to_numpy(dtype=bool)
            marker, colour = markers.get(kind, "^"), colours[family]
            face = colour if not kind or marker == "x" else "none"
            axes.scatter(
                x[mine], y[mine], s=34, marker=marker, label=name, linewidths=1.2, facecolors=face,
                edgecolors=None if marker == "x" else colour,
            )  # fmt: skip
        if x[known].max() > 10 * x[known].min():
            log_axis(axes, "x")
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_xlabel(label(cost))
        axes.set_ylabel(label(metric))
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _parts(rows: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """(group, searcher) -> its trials; groups by number, searches in order of appearance, each before its controls."""
    keys = pd.DataFrame({"group": rows["group"].fillna(""), "searcher": rows["searcher"]}, index=rows.index)
    appearance = {name: i for i, name in enumerate(dict.fromkeys(rows["control_of"].fillna(rows["searcher"])))}
    parent = dict(zip(rows["searcher"], rows["control_of"].fillna(""), strict=True))
    found = [
        ((str(group), str(searcher)), rows.loc[part.index])
        for (group, searcher), part in keys.groupby(["group", "searcher"], sort=False)
    ]

    def order(item: tuple[tuple[str, str], pd.DataFrame]) -> tuple[Any, ...]:
        group, searcher = item[0]
        of = parent[searcher]
        return (*_group_order(group), appearance[of or searcher], bool(of), searcher)

    return sorted(found, key=order)


def _group_order(group: str) -> tuple[float, str]:
    try:
        return -float(group or "inf"), ""
    except ValueError:
        return math.inf, group


def _replicates(part: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Means of the complete trials of each replicate, float64 under the replicate's number."""
    done = part[part["state"].eq("complete").fillna(False).to_numpy(dtype=bool)]
    values = pd.DataFrame({name: numbers(done, name) for name in names}, dtype="float64")
    return values.groupby(done["replicate"].to_numpy(dtype=np.int64), sort=True).mean()


def _difference(metric: str, part: str) -> str:
    return f"difference_{metric}" if part == "mean" else f"difference_{metric}_{part}"


def _judged(table: pd.DataFrame) -> str:
    """Test accuracy, unless it is missing from a pair."""
    controls = table[table["control_of"].notna()]
    of_test, of_val = (numbers(controls, _difference(name, "n")) for name in ("test_accuracy", "val_accuracy"))
    return "test_accuracy" if len(controls) and of_test.sum() and (of_test == of_val).all() else "val_accuracy"


def _difference_texts(found: Mapping[str, Any]) -> list[str]:
    if not found or not found["n"]:
        return ["" if not found else "no pair", "", "", ""]
    between = "one pair" if found["n"] < 2 else f"[{found['low']:+.4f}, {found['high']:+.4f}]"
    return [f"{found['mean']:+.4f}", between, _p(found["p_t"]), _p(found["p_flip"])]


def _p(value: float) -> str:
    return MISSING if missing(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _counted(row: Mapping[Any, Any]) -> str:
    return f"{row['n']}" + (f" ({row['lost']} lost)" if row["lost"] else "")


def _count(value: float) -> str:
    return MISSING if missing(value) else f"{round(value):,}"


def _macs(value: float) -> str:
    return MISSING if missing(value) else compact(value)


def _percent(value: float) -> str:
    return MISSING if missing(value) else f"{value:.0%}"


def _notes(table: pd.DataFrame, judged: str) -> list[str]:
    notes = [
        "means over n replicates (+- standard deviation), one final training each, nothing selected among them; "
        "kept weights: of convolutions and linear layers, with norms: all non-zeros, norms and biases too",
        "dead: output channels that no path of kept weights reaches; skip/pool: share of the chosen operations that skip, pool or "
        "do nothing",
    ]
    controls = table[table["control_of"].notna()]
    if len(controls):
        notes.append(
            f"search less this: {label(judged)} of the search less that of the control, paired by replicate (same training seed); "
            "above 0 the search did better. 95 % interval and p by Student's t; p (flips): exact, from all flips of signs"
        )
        most = int(numbers(controls, _difference(judged, "n")).max(initial=0))
        if most < 2:
            notes.append("fewer than two pairs: no interval, no test; set options.<searcher>.seeds to 3 or more")
        else:
            notes.append(
                f"with {most} pairs the exact p is never below {digits(2.0 ** (1 - most))}; controls keep as many weights as what "
                "was found, within a tolerance"
            )
    without = [
        name for name in table["searcher"][table["control_of"].isna()] if not (controls["control_of"] == name).any()
    ]
    if without:
        notes.append(f"without controls: {', '.join(dict.fromkeys(without))}")
    if table["lost"].sum():
        notes.append(
            "lost: trials that failed or broke a constraint; they count nowhere, and pairs that miss one side are left out"
        )
    return notes
