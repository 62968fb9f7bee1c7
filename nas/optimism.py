"""How far off predicted latencies were: the optimism ratio of a search that went by predictions.

A search picks what its model finds fast, so it picks the model's errors; the ratio measured / predicted of what it hands out says
by how much. Start with `optimism`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.objectives import number

__all__ = ["Optimism", "optimism"]


@dataclass(frozen=True)
class Optimism:
    """How measured latencies relate to the ones predicted while the search went on.

    Attributes:
        ratio: geometric mean of measured / predicted; above 1 the search believed its networks faster than they are.
        spread: geometric standard deviation of it (1.05: a factor of 1.05 either way); NaN for a single network.
        lowest, highest: of the ratios.
        inside: share of networks measured inside the 90 % interval of their prediction.
        n: networks measured.
    """

    ratio: float
    spread: float
    lowest: float
    highest: float
    inside: float
    n: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.spread) else f", spread x{self.spread:.3f}"
        return (
            f"measured / predicted latency {self.ratio:.3f} (geometric mean of {self.n}{spread}, "
            f"{self.lowest:.3f} to {self.highest:.3f}; {self.inside:.0%} inside the 90 % interval)"
        )


def optimism(trials: Iterable[Mapping[str, Any]]) -> Optimism | None:
    """The optimism ratio of networks that were predicted, then measured; None if there are none.

    Args:
        trials: metrics of trials (copies left out), or rows of a frame.

    Source: measured / predicted of a search's winners; 1.35 for HAT (Wang et al., ACL 2020) by its users' reports.
    """
    ratios, inside = [], 0
    for row in trials:
        measured, predicted = number(row, "latency_ms"), number(row, "latency_search_ms")
        if number(row, "latency_verified") != 1 or row.get("latency_search_source") is None:
            continue  # not measured since, or measured during the search already
        if measured is None or predicted is None or measured <= 0 or predicted <= 0:
            continue
        lo, hi = number(row, "latency_search_lo_ms"), number(row, "latency_search_hi_ms")
        inside += lo is not None and hi is not None and lo <= measured <= hi
        ratios.append(measured / predicted)
    if not ratios:
        return None
    logs = np.log(ratios)
    spread = float(np.exp(logs.std(ddof=1))) if len(ratios) > 1 else math.nan
    ratio = float(np.exp(logs.mean()))
    return Optimism(ratio, spread, min(ratios), max(ratios), inside / len(ratios), len(ratios))
