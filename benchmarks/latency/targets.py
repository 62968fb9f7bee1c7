"""What the predictions are to reach, as numbers the tables can hold figures against.

Names of figures are those of `hw_models.accuracy.accuracy`. Start with `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["AA_AT_MOST", "TARGETS", "shown", "verdict"]

Range = tuple[float, float]
_AT_LEAST, _AT_MOST = (lambda x: (x, math.inf)), (lambda x: (-math.inf, x))

TARGETS: dict[str, dict[str, Range]] = {
    "known shapes": {
        "hit5": _AT_LEAST(0.80),
        "hit10": _AT_LEAST(0.99),
        "rmspe": _AT_MOST(0.04),
        "spearman": _AT_LEAST(0.99),
    },
    "unseen shapes": {"hit10": _AT_LEAST(0.75), "spearman": _AT_LEAST(0.97), "coverage": (0.87, 0.93)},
    "measured twice": {"typical": _AT_MOST(0.01), "worst": _AT_MOST(0.03)},
    "speed": {"per_second": _AT_LEAST(50_000.0)},
    "search": {"over_share": _AT_MOST(0.05)},
}
"""row of a table -> figure -> (at least, at most)."""

AA_AT_MOST = 0.015  # the accuracy targets hold for data that are no noisier


def verdict(row: str, figures: Mapping[str, float]) -> dict[str, str]:
    """ "met" or "MISSED" for each figure that has a target; "no figure" where it is NaN or missing."""
    answers = {}
    for name, (least, most) in TARGETS.get(row, {}).items():
        value = figures.get(name, math.nan)
        answers[name] = "no figure" if math.isnan(value) else "met" if least <= value <= most else "MISSED"
    return answers


def shown(row: str) -> dict[str, str]:
    """The targets of a row as text: ">= 0.8", "0.87 to 0.93"."""

    def text(least: float, most: float) -> str:
        if math.isinf(most):
            return f">= {least:g}"
        return f"<= {most:g}" if math.isinf(least) else f"{least:g} to {most:g}"

    return {name: text(*bounds) for name, bounds in TARGETS.get(row, {}).items()}
