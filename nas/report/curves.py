"""Pictures of how things went: best and hypervolume so far, and learning curves. Start with `history_figure`, `curves_figure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nas.frames import complete
from nas.report import style
from nas.report.axes import decades, log_axis
from nas.report.history import (
    BASELINE,
    best_so_far,
    equal_budget,
    hypervolume_so_far,
    outside_budget,
    reference_box,
    searchers,
)
from nas.report.units import label, shorten


def history_figure(frame: pd.DataFrame, objectives: Mapping[str, str]) -> Figure:
    """Best so far in every objective and hypervolume so far, per searcher, over its finished trials."""
    names = [name for name in searchers(frame) if name != BASELINE]
    panels = [*objectives, *(["hypervolume"] if len(objectives) > 1 else [])]
    if not names or complete(frame, objectives).empty:
        return style.message_figure("no feasible trial")
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
            if panel != "hypervolume" and "accuracy" not in panel and decades(axes.get_ylim()) > 1:
                log_axis(axes, "y")
        figure.supxlabel("finished trials of each searcher", fontsize=9)
        handles, texts = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5)
        budget = equal_budget(frame)
        if (
            len({len(best_so_far(frame, name, panels[0], "max")) for name in names if not outside_budget(name)}) > 1
            and budget
        ):
            for axes in grid.flat[: len(panels)]:
                axes.axvline(budget, color=style.MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    return figure


def curves_figure(
    curves: Mapping[int, Sequence[Mapping[str, Any]]],
    metric: str = "val_accuracy",
    train_metric: str = "train_accuracy",
    *,
    stopped: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> Figure:
    """Learning curves: the validation metric solid, the training one dotted, labelled with the trial at their ends.

    Args:
        curves: trial -> one mapping per epoch with "epoch" and the metrics.
        metric: of the solid lines.
        train_metric: of the dotted lines; left out where it is not there.
        stopped: curves of trials that were stopped early: thin, grey, with a dot where they end.
    """
    lines = {trial: rows for trial, rows in curves.items() if any(row.get(metric) is not None for row in rows)}
    if not lines:
        return style.message_figure("no learning curves yet")
    with style.rc():
        figure = style.new_figure(7.2, 3.4)
        axes = figure.add_subplot()
        style.tidy(axes)
        ends = []
        cut = [series for rows in stopped if (series := _series(rows, metric))[0]]
        for epochs, values in cut:
            axes.plot(epochs, values, color=style.MUTED, linewidth=0.7, alpha=0.45, zorder=1)
            axes.plot(epochs[-1], values[-1], "o", color=style.MUTED, markersize=2.5, alpha=0.7, zorder=1)
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
        if cut:
            handles.append(
                Line2D([], [], color=style.MUTED, linewidth=0.7, marker="o", markersize=2.5, label="stopped early")
            )
        axes.legend(
            handles=handles, frameon=False, fontsize=8.5, loc="lower right" if len(settled) > len(lines) else "best"
        )
    return figure


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
    width = 3.6 if name == "random" else 1.6  # drawn first and broad, so that it shows below a line that is the same
    axes.step(
        steps[known],
        values[known],
        where="post",
        color=colour,
        linewidth=width,
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
