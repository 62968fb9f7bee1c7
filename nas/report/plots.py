"""The pictures of a run: its front, its history, learning curves, and what each layer costs.

Every function takes frames or plain values and returns a matplotlib `Figure`; `nas.report.style.save_figure` writes it.
Start with `front_figure`, `history_figure`, `curves_figure`, `cost_figure` and `density_figure`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from nas.errors import ConfigError, RunError, unknown_name
from nas.frames import complete, numbers
from nas.objectives import Constraint, parse_constraints
from nas.pareto import nondominated
from nas.report import style
from nas.report.history import (
    BASELINE,
    best_so_far,
    equal_budget,
    hypervolume_so_far,
    reference_box,
    searchers,
)
from nas.report.labels import place_labels
from nas.report.plans import Operation, total_ms
from nas.report.units import direction_of, label, shorten

MANY_POINTS = 2000
"""From here on the points of a scatter are drawn as pixels, so that an SVG stays small."""

MAX_LABELS = 16
MAX_BARS = 28


def front_figure(
    frame: pd.DataFrame,
    objectives: Mapping[str, str],
    x: str = "latency_ms",
    y: str = "val_accuracy",
    *,
    constraints: Sequence[Constraint] = (),
    title: str = "",
) -> Figure:
    """All trials and the front in the plane of two metrics.

    The front is that of the plane (x, y); with more than two objectives the members of the full front are ringed besides.
    Trials that broke a constraint are crosses, those without a y (never trained) stand on the lower edge; failed ones are
    counted in the legend. The horizontal axis is logarithmic where its values span more than a factor of ten.

    Args:
        frame: as from `nas.frames.trials_frame`.
        objectives: metric -> direction; a metric that is none of them gets its usual direction.
        x: metric of the horizontal axis, usually a cost.
        y: metric of the vertical axis.
        constraints: limits to be drawn where they concern x or y.
        title: one line above the picture.
    """
    plane = {x: direction_of(x, objectives), y: direction_of(y, objectives)}
    done = complete(frame, (x, y))
    if done.empty:
        return style.message_figure(f"no feasible trial with {label(x)} and {label(y)} yet")
    front = done[nondominated(done, plane)].drop_duplicates(subset=[x, y])
    front = front.sort_values([x, y], ascending=[plane[x] == "min", plane[y] == "min"], kind="stable")
    with style.rc():
        figure = style.new_figure(7.2, 4.4)
        axes = figure.add_subplot()
        style.tidy(axes)
        _scales(axes, done, frame, x, y, front)
        _points(axes, frame, done, front, objectives, x, y)
        _staircase(axes, front, plane, x, y)
        for constraint in constraints:
            _limit(axes, constraint, x, y)
        _error_bars(axes, front, x, y)
        _legend_front(axes, frame, done, objectives, x, y)
        axes.set_xlabel(_axis_label(x, plane[x]))
        axes.set_ylabel(_axis_label(y, plane[y]))
        if title:
            axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        chosen = spread(len(front), MAX_LABELS)
        points = np.column_stack([numbers(front, x), numbers(front, y)])
        texts = [str(trial) for trial in front["trial"]]
        place_labels(axes, points, texts, chosen, avoid=np.column_stack([numbers(done, x), numbers(done, y)]))
    return figure


def default_axes(frame: pd.DataFrame, objectives: Mapping[str, str]) -> tuple[str, str]:
    """(x, y) for the picture of a front: y is the first objective, x the next one, else the latency, else the non-zeros."""
    y, *others = objectives
    for x in (*others, "latency_ms", "nnz"):
        if x != y and (x in others or np.isfinite(numbers(frame, x)).any()):
            return x, y
    return "trial", y


def save_front(run: Any, path: str | Path, *, x: str | None = None, y: str | None = None) -> Path:
    """Draw the front of a run into a .png, .svg or .pdf file.

    Args:
        run: `nas.run.Run`.
        path: the file.
        x, y: columns of the run's frame; default `default_axes`.

    Raises:
        ConfigError: there is no such column of numbers, or the suffix is none of the three.
        RunError: the file cannot be written.
    """
    frame, objectives = run.frame(), run.objectives
    usual = default_axes(frame, objectives)
    chosen = (x or (usual[0] if y in (None, usual[1]) or y != usual[0] else usual[1]), y or usual[1])
    for option, name in zip(("x", "y"), chosen, strict=True):
        known = [column for column in frame.columns if np.isfinite(numbers(frame, column)).any()]
        if name not in known and name not in objectives:
            raise ConfigError(str(unknown_name(f"column of numbers for --{option}", name, known)))
    figure = front_figure(
        frame, objectives, *chosen, constraints=parse_constraints(run.constraints), title=f"{run.name}: Pareto front"
    )
    try:
        return style.save_figure(figure, path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise RunError(f"{path}: the picture cannot be written: {error.strerror or error}") from error


def history_figure(frame: pd.DataFrame, objectives: Mapping[str, str]) -> Figure:
    """Best so far in every objective and hypervolume so far, per searcher, over its finished trials."""
    names = [name for name in searchers(frame) if name != BASELINE]
    panels = [*objectives, *(["hypervolume"] if len(objectives) > 1 else [])]
    if not names or complete(frame, objectives).empty:
        return style.message_figure("no feasible trial yet")
    styles = style.searcher_style(searchers(frame))
    box = reference_box(frame, objectives)
    with style.rc():
        figure = style.new_figure(7.2, 2.9 if len(panels) <= 3 else 5.4)
        grid = figure.subplots(1 if len(panels) <= 3 else 2, min(len(panels), 3), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            style.tidy(axes)
            for name in [*names, *([BASELINE] if BASELINE in styles else [])]:
                if panel == "hypervolume":
                    steps, values = hypervolume_so_far(frame, name, objectives, box)
                else:
                    values = best_so_far(frame, name, panel, objectives[panel])
                    steps = np.arange(1, len(values) + 1)
                _history_line(axes, steps, values, name, styles[name][0])
            axes.set_title(
                "hypervolume (relative)" if panel == "hypervolume" else f"best {label(panel)}",
                loc="left",
                fontsize=9,
            )
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlim(left=0.5)
            if panel != "hypervolume" and "accuracy" not in panel and _decades(axes.get_ylim()) > 1:
                _log_axis(axes, "y")
        figure.supxlabel("finished trials of each searcher", fontsize=9)
        handles, texts = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5)
        budget = equal_budget(frame)
        if len({len(best_so_far(frame, name, panels[0], "max")) for name in names}) > 1 and budget:
            for axes in grid.flat[: len(panels)]:
                axes.axvline(budget, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    return figure


def curves_figure(
    curves: Mapping[int, Sequence[Mapping[str, Any]]],
    metric: str = "val_accuracy",
    train_metric: str = "train_accuracy",
) -> Figure:
    """Learning curves: the validation metric solid, the training one dotted, labelled with the trial at their ends.

    Args:
        curves: trial -> one mapping per epoch with "epoch" and the metrics.
        metric: of the solid lines.
        train_metric: of the dotted lines; left out where it is not there.
    """
    lines = {trial: rows for trial, rows in curves.items() if any(row.get(metric) is not None for row in rows)}
    if not lines:
        return style.message_figure("no learning curves yet")
    with style.rc():
        figure = style.new_figure(7.2, 3.4)
        axes = figure.add_subplot()
        style.tidy(axes)
        ends = []
        for i, (trial, rows) in enumerate(lines.items()):
            colour = (*style.PALETTE, style.GREY, style.INK)[i % 8]
            epochs, values = _series(rows, metric)
            axes.plot(
                epochs, values, color=colour, linewidth=1.6, marker="o" if len(epochs) == 1 else None, markersize=4
            )
            trained = _series(rows, train_metric)
            dots = "." if len(trained[0]) == 1 else None
            axes.plot(*trained, color=colour, linewidth=0.9, linestyle=(0, (1, 1.5)), alpha=0.8, marker=dots)
            ends.append((epochs[-1], values[-1], str(trial), colour))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label(metric))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        settled = [v for rows in lines.values() for v in _series(rows, metric)[1][len(rows) // 5 :]]
        top = max(v for rows in lines.values() for name in (metric, train_metric) for v in _series(rows, name)[1])
        low = min(settled)
        axes.set_xlim(left=min(epochs[0] for epochs in (_series(rows, metric)[0] for rows in lines.values())) - 0.2)
        axes.set_ylim(low - 0.05 * (top - low or 0.1), top + 0.08 * (top - low or 0.1))  # the first epochs say little
        _end_labels(figure, axes, ends)
        both = any(row.get(train_metric) is not None for rows in lines.values() for row in rows)
        handles = [Line2D([], [], color=style.MUTED, linewidth=1.6, label=label(metric))]
        if both:
            handles.append(
                Line2D([], [], color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)), label=label(train_metric))
            )
        axes.legend(
            handles=handles, frameon=False, fontsize=8.5, loc="lower right" if len(settled) > len(lines) else "best"
        )
    return figure


def cost_figure(operations: Sequence[Operation], *, title: str = "") -> Figure:
    """What each layer costs: the time of the kernel that runs, beside that of the dense kernel, and its share.

    Without measured times the bars are multiply-adds. Where there are many operations, the smallest are added up.
    """
    timed = total_ms(operations) is not None
    rows = _cost_rows(operations, timed)
    if not rows:
        return style.message_figure("no layers to show")
    total = sum(row.value for row in rows) or 1.0
    with style.rc():
        figure = style.new_figure(7.2, 0.9 + 0.27 * len(rows) + (0.3 if title else 0))
        axes = figure.add_subplot()
        style.tidy(axes, grid="x")
        place = np.arange(len(rows))
        dense = [row.dense for row in rows]
        axes.barh(
            place, dense, height=0.74, facecolor="none", edgecolor=style.MUTED, linewidth=0.9, linestyle=(0, (2, 1.5))
        )
        left = np.zeros(len(rows))
        for kernel in (*style.KERNEL_COLOURS, ""):
            widths = np.array([row.parts.get(kernel, 0.0) for row in rows])
            axes.barh(place, widths, left=left, height=0.5, color=style.KERNEL_COLOURS.get(kernel, style.OTHER_KERNEL))
            left += widths
        axes.set_yticks(place, [shorten(row.name, 40) for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        reach = max([*(row.value for row in rows), *dense, 1e-12])
        room = max(max(row.value, row.dense) / reach + 0.0105 * (len(row.note) + 6) for row in rows)
        axes.set_xlim(0, reach * max(1.0, room))
        for i, row in enumerate(rows):
            text = f"{row.value / total:.0%}" + (f"  {row.note}" if row.note else "")
            axes.text(max(row.value, row.dense) + reach * 0.012, i, text, va="center", fontsize=7.5, color=style.INK)
        axes.set_xlabel("time of one call, each operation by itself (ms)" if timed else "multiply-adds")
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _legend_costs(axes, rows, timed)
        if title:
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure


def density_figure(networks: Mapping[str, Sequence[Operation]]) -> Figure:
    """How dense each layer is: a row per network, a cell per layer with weights, in order of execution.

    Args:
        networks: label -> operations.
    """
    rows = {name: [op for op in operations if op.density is not None] for name, operations in networks.items()}
    rows = {name: layers for name, layers in rows.items() if layers}
    if not rows:
        return style.message_figure("no layers with weights")
    longest = max(len(layers) for layers in rows.values())
    with style.rc():
        figure = style.new_figure(7.2, 0.95 + 0.3 * len(rows))
        axes = figure.add_subplot()
        style.tidy(axes, grid="none")
        for i, layers in enumerate(rows.values()):
            for j, op in enumerate(layers):
                fill, ink = style.density_colour(op.density)
                axes.barh(
                    i, 1, left=j, height=0.82, color=fill, edgecolor=style.PAPER, linewidth=0.8 if longest < 80 else 0
                )
                if longest <= 16 and op.density is not None:
                    axes.text(j + 0.5, i, f"{op.density:.2g}", ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_yticks(range(len(rows)), [shorten(name, 40) for name in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, longest)
        step = max(1, round(longest / 10))
        axes.set_xticks(
            [j + 0.5 for j in range(step - 1, longest, step)], [str(j + 1) for j in range(step - 1, longest, step)]
        )
        axes.set_xlabel("layers with weights, in order of execution")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        shown = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
        handles = [Patch(facecolor=style.density_colour(d)[0], label=f"{d:g}") for d in shown]
        figure.legend(
            handles=handles,
            title="density",
            ncols=6,
            loc="outside upper right",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
    return figure


# -- the front -----------------------------------------------------------------------------------------------------------


def _scales(axes: Axes, done: pd.DataFrame, frame: pd.DataFrame, x: str, y: str, front: pd.DataFrame) -> None:
    """Limits that show the front well: far-off trials are clipped (and marked), a wide cost axis is logarithmic."""
    known = numbers(frame, x)
    known = known[np.isfinite(known)]
    if known.min() > 0 and known.max() > 10 * known.min():
        _log_axis(axes, "x")
        margin = (known.max() / known.min()) ** 0.06
        axes.set_xlim(known.min() / margin, known.max() * margin)
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.xaxis.set_major_locator(MaxNLocator(8))
        margin = 0.06 * ((known.max() - known.min()) or abs(known.max()) or 1.0)
        axes.set_xlim(known.min() - margin, known.max() + margin)
    ys, on_front = numbers(done, y), numbers(front, y)
    low = min(on_front.min(), float(np.quantile(ys, 0.1)))
    high = max(on_front.max(), float(np.quantile(ys, 0.9)))
    span = (high - low) or abs(high) * 0.02 or 1.0
    low = ys.min() if ys.min() > low - 0.35 * span else low
    high = ys.max() if ys.max() < high + 0.35 * span else high
    span = (high - low) or span
    axes.set_ylim(low - 0.1 * span, high + 0.1 * span)


def _points(
    axes: Axes,
    frame: pd.DataFrame,
    done: pd.DataFrame,
    front: pd.DataFrame,
    objectives: Mapping[str, str],
    x: str,
    y: str,
) -> None:
    styles = style.searcher_style(searchers(frame))
    raster = len(done) > MANY_POINTS
    low, high = axes.get_ylim()
    for name, (colour, marker) in styles.items():
        part = done[done["searcher"].eq(name).fillna(False)]
        size = 46 if marker == "*" else 20
        axes.scatter(
            numbers(part, x),
            numbers(part, y),
            s=size,
            c=colour,
            marker=marker,
            alpha=0.42,
            linewidths=0,
            rasterized=raster,
        )
        best = front[front["searcher"].eq(name).fillna(False)]
        axes.scatter(
            numbers(best, x),
            numbers(best, y),
            s=size * 2.3,
            c=colour,
            marker=marker,
            edgecolors=style.PAPER,
            linewidths=0.9,
            zorder=5,
        )
    outside = done[(numbers(done, y) < low) | (numbers(done, y) > high)]
    if len(outside):
        edges = np.where(numbers(outside, y) < low, low, high)
        for value, marker in ((low, "v"), (high, "^")):
            at = numbers(outside, x)[edges == value]
            axes.scatter(
                at, np.full(len(at), value), s=16, c=style.MUTED, marker=marker, clip_on=False, linewidths=0, zorder=4
            )
    broken = frame[frame["state"].eq("infeasible").fillna(False)]
    bx, by = numbers(broken, x), numbers(broken, y)
    by = np.where(np.isfinite(by), np.clip(by, low, high), low)
    axes.scatter(bx, by, s=22, c=style.MUTED, marker="x", linewidths=1.0, alpha=0.75, clip_on=False, zorder=3)
    if not {x, y} >= set(objectives):
        full = complete(frame, objectives)
        full = full[nondominated(full, dict(objectives))]
        axes.scatter(
            numbers(full, x),
            numbers(full, y),
            s=110,
            facecolors="none",
            edgecolors=style.INK,
            linewidths=0.9,
            zorder=6,
        )


def _staircase(axes: Axes, front: pd.DataFrame, plane: Mapping[str, str], x: str, y: str) -> None:
    """The border of what is attained: from the best x to the worst, a step at every member of the front."""
    xs, ys = numbers(front, x), numbers(front, y)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    worst_x = right if plane[x] == "min" else left
    worst_y = low if plane[y] == "max" else high
    corner_x = np.concatenate([[xs[0]], np.repeat(xs, 2)[1:], [worst_x]])
    corner_y = np.concatenate([[worst_y], np.repeat(ys, 2)])
    axes.plot(corner_x, corner_y, color=style.INK, linewidth=1.3, zorder=4, solid_joinstyle="miter")
    axes.fill_between(corner_x, corner_y, worst_y, color=style.MUTED, alpha=0.07, linewidth=0, zorder=0)


def _limit(axes: Axes, constraint: Constraint, x: str, y: str) -> None:
    """A line at a limit and its text, at the edge; nothing where the limit is outside the picture."""
    text = f" {label(constraint.metric)} {'≤' if constraint.relation == '<=' else '≥'} {constraint.bound:g} "
    kind: dict[str, Any] = {"color": style.INK, "linewidth": 1.0, "linestyle": (0, (4, 3)), "alpha": 0.7, "zorder": 2}
    if constraint.metric == x and axes.get_xlim()[0] < constraint.bound < axes.get_xlim()[1]:
        axes.axvline(constraint.bound, **kind)
        axes.annotate(
            text,
            (constraint.bound, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=style.MUTED,
        )
    elif constraint.metric == y and axes.get_ylim()[0] < constraint.bound < axes.get_ylim()[1]:
        axes.axhline(constraint.bound, **kind)
        axes.annotate(
            text,
            (0.99, constraint.bound),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=style.MUTED,
        )


def _error_bars(axes: Axes, front: pd.DataFrame, x: str, y: str) -> None:
    """The interval of the latency, for the members of the front."""
    for metric, direction in ((x, "x"), (y, "y")):
        lo, hi = metric.replace("_ms", "_lo_ms"), metric.replace("_ms", "_hi_ms")
        if not metric.endswith("_ms") or lo not in front.columns or hi not in front.columns:
            continue
        centre = numbers(front, metric)
        error = np.nan_to_num(np.vstack([centre - numbers(front, lo), numbers(front, hi) - centre]).clip(min=0))
        bars: dict[str, Any] = {"xerr" if direction == "x" else "yerr": error}
        axes.errorbar(
            numbers(front, x),
            numbers(front, y),
            fmt="none",
            ecolor=style.INK,
            elinewidth=1.0,
            capsize=2.0,
            alpha=0.65,
            zorder=4.5,
            **bars,
        )


def _legend_front(
    axes: Axes, frame: pd.DataFrame, done: pd.DataFrame, objectives: Mapping[str, str], x: str, y: str
) -> None:
    handles = []
    for name, (colour, marker) in style.searcher_style(searchers(frame)).items():
        count = int(done["searcher"].eq(name).sum())
        text = f"{shorten(name, 30)} ({count})"
        size = 9 if marker == "*" else 6
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=size, label=text))
    states = frame["state"].value_counts()
    if states.get("infeasible", 0):
        text = f"breaks a constraint ({states['infeasible']})"
        handles.append(Line2D([], [], color=style.MUTED, marker="x", linestyle="none", markersize=5, label=text))
    if states.get("failed", 0):
        handles.append(Line2D([], [], linestyle="none", label=f"failed ({states['failed']}), not shown"))
    handles.append(Line2D([], [], color=style.INK, linewidth=1.3, label="front"))
    if not {x, y} >= set(objectives):
        ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": style.INK}
        handles.append(Line2D([], [], linestyle="none", label="front of all objectives", **ring))
    corner = "lower right" if direction_of(y, {}) == "max" else "upper right"
    look: Any = {"loc": corner, "fontsize": 8, "frameon": True, "framealpha": 0.85, "borderpad": 0.6}
    legend = axes.legend(handles=handles, **look)
    legend.get_frame().set(facecolor=style.PAPER, edgecolor="none")
    legend.set_zorder(10)


def _axis_label(metric: str, direction: str) -> str:
    return f"{label(metric)}  ({'more' if direction == 'max' else 'less'} is better)"


# -- history, curves, costs ----------------------------------------------------------------------------------------------


def _history_line(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, colour: str) -> None:
    known = np.isfinite(values)
    if not known.any():
        return
    if name == BASELINE:
        axes.axhline(
            values[known][-1],
            color=colour,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            label=f"{shorten(name, 30)} ({len(steps)})",
        )
        return
    axes.step(
        steps[known],
        values[known],
        where="post",
        color=colour,
        linewidth=1.8,
        label=f"{shorten(name, 30)} ({steps[-1]})",
    )
    axes.plot(steps[known][-1], values[known][-1], "o", color=colour, markersize=3.5)


def _series(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    pairs = [(row.get("epoch", i + 1), row.get(metric)) for i, row in enumerate(rows)]
    kept = [(float(epoch), float(value)) for epoch, value in pairs if value is not None and np.isfinite(float(value))]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _end_labels(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels at the right ends of lines, pushed apart so that none covers another."""
    figure.draw_without_rendering()
    gap = 10.0 * figure.dpi / 72
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    heights = [float(axes.transData.transform((ends[i][0], ends[i][1]))[1]) for i in order]
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    top = float(axes.bbox.y1)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], (top if i == len(placed) - 1 else placed[i + 1] - gap))
    for i, height, at in zip(order, heights, placed, strict=True):
        x, y, text, colour = ends[i]
        axes.annotate(
            text,
            (x, y),
            xytext=(14, (at - height) * 72 / figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1},
        )


@dataclass
class _Row:
    """One bar of a cost figure: what each kernel takes, and what the dense kernel would."""

    name: str
    parts: dict[str, float]
    dense: float
    note: str = ""

    @property
    def value(self) -> float:
        return sum(self.parts.values())


def _cost_rows(operations: Sequence[Operation], timed: bool) -> list[_Row]:
    """A row per operation; where those are too many, one per block (names with the same beginning), then the largest."""
    rows = []
    for op in operations:
        value = (op.ms or 0.0) if timed else float(op.macs)
        dense = (op.dense_ms or 0.0) if timed else float(op.dense_macs)
        note = shorten(f"density {op.density:.2g} {op.pattern}", 40) if op.is_sparse else ""
        if value or dense:
            rows.append(_Row(op.name, {op.kernel or "": value}, dense, note))
    if len(rows) <= MAX_BARS:
        what = {op.name: op.what for op in operations}
        for row in rows:
            row.name += "" if row.name.endswith(what[row.name]) else f"  {what[row.name]}"
        return rows
    for depth in range(max(len(re.split(r"[./]", row.name)) - 1 for row in rows), 0, -1):
        grouped = _grouped(rows, depth)
        if len(grouped) <= MAX_BARS:
            return grouped
    cut = sorted((row.value for row in rows), reverse=True)[MAX_BARS - 2]
    small = [row for row in rows if row.value <= cut]
    return [*(row for row in rows if row.value > cut), _added(f"{len(small)} smaller ones", small)]


def _grouped(rows: Sequence[_Row], depth: int) -> list[_Row]:
    """Neighbours whose names agree in the first `depth` parts, added up."""
    groups = groupby(rows, key=lambda row: ".".join(re.split(r"[./]", row.name)[:depth]))
    return [_added(name, list(members)) for name, members in groups]


def _added(name: str, rows: Sequence[_Row]) -> _Row:
    parts: dict[str, float] = {}
    for row in rows:
        for kernel, value in row.parts.items():
            parts[kernel] = parts.get(kernel, 0.0) + value
    notes = {row.note for row in rows if row.note}
    return _Row(name, parts, sum(row.dense for row in rows), notes.pop() if len(notes) == 1 else "")


def _legend_costs(axes: Axes, rows: Sequence[_Row], timed: bool) -> None:
    used = [kernel for kernel in style.KERNEL_COLOURS if any(kernel in row.parts for row in rows)]
    names = {"torch": "torch, dense kernel", "csr": "csr, sparse kernel"}
    handles = [Patch(facecolor=style.KERNEL_COLOURS[kernel], label=names[kernel]) for kernel in used]
    if any(row.parts.keys() - style.KERNEL_COLOURS.keys() for row in rows):
        handles.append(Patch(facecolor=style.OTHER_KERNEL, label="no choice of kernel"))
    if any(row.dense for row in rows):
        text = "the dense kernel would take" if timed else "the dense layer has"
        handles.append(Patch(facecolor="none", edgecolor=style.MUTED, linestyle=(0, (2, 1.5)), label=text))
    figure: Any = axes.figure
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8, handlelength=1.4)


# -- axes ----------------------------------------------------------------------------------------------------------------


def _decades(limits: tuple[float, float]) -> float:
    low, high = min(limits), max(limits)
    return float(np.log10(high / low)) if low > 0 else 0.0


def _log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float, _: Any = None) -> str:
    """A number on an axis: 0.005, 20, 5k, 1.5M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:.6g}"


def spread(n: int, most: int) -> list[int]:
    """At most `most` indices of range(n), evenly spread, both ends among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})
