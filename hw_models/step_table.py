"""What was measured, by step: exact entries, and a curve over density for each shape. `StepTable.fit(observed)`.

A step that was measured with as many kept weights is answered from the table; one whose shape was measured at densities around its
own, from the curve between them. The rest is not answered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.curves import Curve

__all__ = ["StepTable"]

Floats = npt.NDArray[np.float64]

# Standard deviation in log space of one measurement of a step in its place, seen again in another network, until the data say.
SPREAD = 0.05
LEAST_SPREAD = 0.005
ENOUGH = 20  # steps seen in several networks, to estimate that spread from


@dataclass(frozen=True, eq=False)
class StepTable:
    """Measured steps.

    Attributes:
        exact: index = key of a step; ms (geometric mean over the networks it was met in), sigma (log space), count.
        curves: by curve key.
        spread: standard deviation, in log space, of the same step in different networks.
    """

    exact: pd.DataFrame
    curves: Mapping[str, Curve]
    spread: float
    _known: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, observed: pd.DataFrame) -> StepTable:
        """Make the table.

        Args:
            observed: rows of steps as measured in networks: key, curve, density, ms at least; any number of rows per step.
        """
        log = np.log(observed["ms"].to_numpy(float))
        keyed = observed["key"].to_numpy(str) != ""
        grouped = pd.DataFrame({"key": observed["key"], "log": log})[keyed].groupby("key")["log"]
        exact = pd.DataFrame({"log": grouped.mean(), "count": grouped.count(), "var": grouped.var(ddof=1)})
        spread = _pooled(exact)
        exact["ms"] = np.exp(exact["log"])
        # the mean of n, and the spread of the one that is asked for
        exact["sigma"] = spread * np.sqrt(1 + 1 / exact["count"])
        density, ms = observed["density"].to_numpy(float), observed["ms"].to_numpy(float)
        rows = observed.groupby("curve", sort=False).indices
        curves = {str(name): _curve(density[at], ms[at], spread) for name, at in rows.items()}
        return cls(exact[["ms", "sigma", "count"]], curves, spread, _lookup(exact))

    def price(self, steps: pd.DataFrame) -> tuple[Floats, Floats, npt.NDArray[np.int8]]:
        """Times of steps.

        Args:
            steps: `hw_models.workload.STEP_COLUMNS`.

        Returns:
            ms float[n] (NaN where the table does not know), sigma float[n] in log space, source int8[n]: 0 measured,
            1 interpolated, -1 unknown.
        """
        n = len(steps)
        ms, sigma, source = np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1, np.int8)
        columns = (steps["key"].tolist(), steps["curve"].tolist(), steps["density"].to_numpy(float))
        for i, (key, name, density) in enumerate(zip(*columns)):
            found = self._known.get(key) if key else None
            if found is not None:
                ms[i], sigma[i], source[i] = *found, 0
                continue
            curve = self.curves.get(name)
            if curve is not None and bool(curve.inside(density)):
                ms[i], source[i] = float(curve.predict(density)), 1
                sigma[i] = float(np.hypot(self.spread, curve.spread(density)))
        return ms, sigma, source

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "spread": self.spread,
            "keys": self.exact.index.tolist(),
            **{name: self.exact[name].tolist() for name in ("ms", "sigma", "count")},
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepTable:
        """The table `to_dict` was called on."""
        columns = {name: data[name] for name in ("ms", "sigma", "count")}
        exact = pd.DataFrame(columns, index=pd.Index(data["keys"], name="key"))
        curves = {name: Curve.from_dict(curve) for name, curve in data["curves"].items()}
        return cls(exact, curves, float(data["spread"]), _lookup(exact))


def _lookup(exact: pd.DataFrame) -> dict[str, tuple[float, float]]:
    return {str(k): (float(m), float(s)) for k, m, s in zip(exact.index, exact["ms"], exact["sigma"])}


def _pooled(exact: pd.DataFrame) -> float:
    """The spread of one step between networks, from those met in several."""
    several = exact[exact["count"] > 1]
    if len(several) < ENOUGH:
        return SPREAD
    # the median of the variances: a few steps are wild, and the interval is scaled to the truth later
    return max(LEAST_SPREAD, float(np.sqrt(np.average(several["var"].clip(upper=0.09), weights=several["count"] - 1))))


def _curve(density: Floats, ms: Floats, spread: float) -> Curve:
    if len(ms) == 1:  # most of them: what `Curve.fit` makes of a single point, at a hundredth of its cost
        return Curve(density, ms, np.full(1, spread), 0.0, None, np.ones(1, np.int64))
    return Curve.fit(density, ms, np.full(len(ms), spread))
