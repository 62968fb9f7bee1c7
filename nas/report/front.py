"""The picture of a front: all trials and what is attained, in the plane of two metrics. Start with `front_figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nas.errors import ConfigError, RunError, unknown_name
from nas.frames import complete, numbers
from nas.objectives import Constraint, parse_constraints
from nas.pareto import nondominated
from nas.report import style
from nas.report.axes import log_axis, tick
from nas.report.history import searchers
from nas.report.labels import place_labels
from nas.report.units import direction_of, label, shorten, spread

MANY_POINTS = 2000
"""From here on the points of a scatter are drawn as pixels, so that an SVG stays small."""

MAX_LABELS = 16


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
    Trials that broke a constraint are crosses, those without a y (never trained) stand on the lower edge; those that were stopped
    early are rings at the values of their last epoch; failed ones are counted in the legend. The horizontal axis is logarithmic
    where its values span more than a factor of ten.

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


def _scales(axes: Axes, done: pd.DataFrame, frame: pd.DataFrame, x: str, y: str, front: pd.DataFrame) -> None:
    """Limits that show the front well: far-off trials are clipped (and marked), a wide cost axis is logarithmic."""
    known = numbers(frame, x)
    known = known[np.isfinite(known)]
    if known.min() > 0 and known.max() > 10 * known.min():
        log_axis(axes, "x")
        margin = (known.max() / known.min()) ** 0.06
        axes.set_xlim(known.min() / margin, known.max() * margin)
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
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
        part = done[done["searcher"].eq(name).fillna(False) & done["copy_of"].isna()]  # a copy would hide its original
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
    ended = frame[frame["state"].eq("stopped").fillna(False) & frame["copy_of"].isna()]
    ex, ey = numbers(ended, x), np.clip(numbers(ended, y), low, high)
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": style.MUTED, "linewidths": 0.8, "rasterized": raster}
    axes.scatter(ex, ey, s=16, alpha=0.6, clip_on=False, zorder=1.5, **ring)
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
        if not count:
            continue
        text = f"{shorten(name, 30)} ({count})"
        size = 9 if marker == "*" else 6
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=size, label=text))
    states = frame["state"].value_counts()
    if states.get("infeasible", 0):
        text = f"breaks a constraint ({states['infeasible']})"
        handles.append(Line2D([], [], color=style.MUTED, marker="x", linestyle="none", markersize=5, label=text))
    if states.get("stopped", 0):
        hollow: dict[str, Any] = {
            "marker": "o",
            "markersize": 4,
            "markerfacecolor": "none",
            "markeredgecolor": style.MUTED,
        }
        text = f"stopped early ({states['stopped']})"
        handles.append(Line2D([], [], linestyle="none", label=text, **hollow))
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
