"""Pictures of a network's layers: what each costs and how dense it is. Start with `cost_figure` and `density_figure`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nas.report import style
from nas.report.axes import tick
from nas.report.plans import Operation, total_ms
from nas.report.units import shorten

MAX_BARS = 28


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
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
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
    names = {
        "torch": "torch, dense kernel",
        "portable": "portable sparse kernel",
        "specialised": "specialised sparse kernel",
    }
    handles = [Patch(facecolor=style.KERNEL_COLOURS[kernel], label=names[kernel]) for kernel in used]
    if any(row.parts.keys() - style.KERNEL_COLOURS.keys() for row in rows):
        handles.append(Patch(facecolor=style.OTHER_KERNEL, label="no choice of kernel"))
    if any(row.dense for row in rows):
        text = "the dense kernel would take" if timed else "the dense layer has"
        handles.append(Patch(facecolor="none", edgecolor=style.MUTED, linestyle=(0, (2, 1.5)), label=text))
    figure: Any = axes.figure
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=8, handlelength=1.4)
