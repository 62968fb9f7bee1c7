"""The pictures of a run: its front, its history, learning curves, and what each layer costs.

Every function takes frames or plain values and returns a matplotlib `Figure`; `nas.report.style.save_figure` writes it. They
live in `front`, `curves` and `costs`; this is their front door.
"""

from __future__ import annotations

from nas.report.costs import MAX_BARS, cost_figure, density_figure
from nas.report.curves import curves_figure, history_figure
from nas.report.front import default_axes, front_figure, save_front

__all__ = [
    "MAX_BARS",
    "cost_figure",
    "curves_figure",
    "default_axes",
    "density_figure",
    "front_figure",
    "history_figure",
    "save_front",
]
