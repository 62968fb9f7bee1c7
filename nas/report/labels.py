"""Puts short labels beside points so that they cover neither each other nor the points. Start with `place_labels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from nas.report.style import INK

_DIRECTIONS = ((-1, 1), (0, 1), (-1, 0), (1, 1), (1, -1), (0, -1), (1, 0), (-1, -1))
_DISTANCES = (5.0, 9.0)


def place_labels(
    axes: Axes,
    points: np.ndarray,
    texts: Sequence[str],
    chosen: Sequence[int],
    *,
    avoid: np.ndarray | None = None,
    size: float = 8.0,
) -> list[int]:
    """Annotate points; a label with no free place near its point is left out.

    Args:
        axes: the axes, limits and scales set.
        points: float[n, 2] in data coordinates.
        texts: one per point.
        chosen: indices of the points to be labelled, the most important first.
        avoid: float[m, 2], further points; a label covers a few of these rather than being left out.
        size: font size in points.

    Returns:
        The indices that were labelled.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # settles the layout, so that pixels mean something
    scale = figure.dpi / 72.0
    pixels = axes.transData.transform(points)
    others = pixels if avoid is None or len(avoid) > 5000 else np.vstack([pixels, axes.transData.transform(avoid)])
    legend = axes.get_legend()
    taken = [] if legend is None else [np.asarray(legend.get_window_extent().extents)]
    bounds = np.asarray(axes.bbox.extents)
    done = []
    for i in chosen:
        width, height = (0.62 * size * len(texts[i]) + 1) * scale, size * scale
        best: tuple[float, tuple[float, float], np.ndarray] | None = None
        for distance in _DISTANCES:
            for dx, dy in _DIRECTIONS:
                x = pixels[i, 0] + dx * (distance * scale + width / 2)
                y = pixels[i, 1] + dy * (distance * scale + height / 2)
                rectangle = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
                if (rectangle[:2] < bounds[:2] - 1).any() or (rectangle[2:] > bounds[2:] + 1).any():
                    continue
                if any(_overlap(rectangle, other) for other in taken):
                    continue
                own = _inside(pixels, rectangle, 4 * scale)
                cost = 100.0 * own + _inside(others, rectangle, 2 * scale) + 0.05 * distance
                if own == 0 and cost < 4 and (best is None or cost < best[0]):
                    best = (cost, (x, y), rectangle)
            if best is not None and best[0] < 1:
                break
        if best is None:
            continue
        taken.append(best[2])
        offset = ((best[1][0] - pixels[i, 0]) / scale, (best[1][1] - pixels[i, 1]) / scale)
        note = axes.annotate(
            texts[i],
            (points[i, 0], points[i, 1]),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=INK,
            zorder=8,
        )
        note.set_in_layout(False)
        done.append(i)
    return done


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _inside(points: np.ndarray, rectangle: np.ndarray, margin: float) -> int:
    """How many points lie in a rectangle grown by a margin."""
    grown = rectangle + np.array([-margin, -margin, margin, margin])
    return int(((points >= grown[:2]) & (points <= grown[2:])).all(axis=1).sum())
