"""Which network to measure next: the one whose steps are least known and most asked for. `Wanted`.

A network is worth measuring for the time it spends in steps that little is known of. A step is known by what was measured of its
shape at densities near its own, and less so by other steps of its family; it is asked for as often as candidates execute its shape.
Worth is divided by what measuring costs, so that a slow network has to teach more.

Source: new measurements by D-optimality over kinds first, then by width of the interval times how often the search asks
(section 5.3 of the survey this project follows), here as one greedy score.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.workload import Workload

__all__ = ["Wanted"]

Floats = npt.NDArray[np.float64]

NEAR = 0.35  # densities within this distance in log space speak for each other
FIXED_S = 0.25  # of building, lowering and packing a network; measuring it comes on top
SHAPE, FAMILY = 0.6, 0.08  # how much one measurement of the same shape, of the same family, tells of a step


@dataclass
class Wanted:
    """What was measured so far and what candidates ask for."""

    _densities: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _families: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _asked: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _total: float = 0.0

    def ask(self, work: Workload, ms: Floats) -> None:
        """Note what candidates execute.

        Args:
            work: candidates.
            ms: float[distinct steps], about what each takes.
        """
        curves = work.steps["curve"].to_numpy()
        for k in range(len(work)):
            ids = work.of(k)
            total = float(ms[ids].sum()) or 1.0
            for i in ids:
                self._asked[curves[i]] += float(ms[i]) / total
            self._total += 1.0

    def seen(self, steps: pd.DataFrame) -> None:
        """Note measured steps: curve, density, family."""
        for curve, density, family in zip(steps["curve"], steps["density"], steps["family"]):
            self._densities[curve].append(float(np.log(max(density, 1e-4))))
            self._families[family] += 1

    def unknown(self, steps: pd.DataFrame) -> Floats:
        """How little is known of each step: float[n] from 1 (nothing like it was measured) towards 0."""
        found = np.empty(len(steps))
        columns = zip(steps["curve"], np.log(np.maximum(steps["density"].to_numpy(float), 1e-4)), steps["family"])
        for i, (curve, density, family) in enumerate(columns):
            near = sum(np.exp(-(((density - d) / NEAR) ** 2)) for d in self._densities.get(curve, ()))
            others = np.sqrt(self._families.get(family, 0))
            found[i] = 1.0 / (1.0 + near / SHAPE + FAMILY * others)
        return found

    def score(self, work: Workload, ms: Floats) -> Floats:
        """Worth of each candidate per second of measuring.

        Args:
            work: candidates.
            ms: float[distinct steps], about what each takes.

        Returns:
            float[networks].
        """
        unknown = self.unknown(work.steps)
        asked = np.array(
            [1.0 + 4.0 * self._asked.get(name, 0.0) / max(self._total, 1.0) for name in work.steps["curve"]]
        )
        scores = np.empty(len(work))
        for k in range(len(work)):
            ids = np.unique(work.of(k))
            total = float(ms[work.of(k)].sum()) or 1.0
            # the square root: a step of a tenth of the time is not worth a hundredth
            worth = float(np.sum(unknown[ids] * asked[ids] * np.sqrt(ms[ids] / total)))
            scores[k] = worth / (FIXED_S + 0.12 + total * 0.15)
        return scores
