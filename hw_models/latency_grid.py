"""What every candidate of one mixed operation costs, at every density: the table a supernet is priced by.

A mixed operation is a place in a network where a search chooses among candidates ("skip", "sep_conv_3x3", ...), each at some
density. The grid holds, for each candidate, times of the sparse kernels at a few densities and the dense time apart from them.
Between the points time is linear in density; beyond the outermost ones the lines are prolonged, down to a floor. It never
falls with density.

Start with `LatencyGrid.from_model` (prices plans by a latency model) or `LatencyGrid.from_arrays` (any table);
`hw_models.expected` makes the differentiable expectation from grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hw_models.curves import Curve, isotonic
from hw_models.model import SOURCES, LatencyModel

if TYPE_CHECKING:
    from hw_models.descriptor import DeviceDescriptor
    from ops.plan import Plan

__all__ = ["LatencyGrid"]

Floats = NDArray[np.float64]
FORMAT = "latency grid 1"


@dataclass(frozen=True, eq=False)
class LatencyGrid:
    """Times of the candidates of one mixed operation, milliseconds.

    Attributes:
        candidates: their names.
        densities: float64[D], ascending, in (0, 1]: where sparse kernels were priced.
        ms: float64[C, D], not decreasing along a row; NaN where a candidate was not priced. A row of NaN is a candidate whose time
            does not depend on density (pooling, a skip): its dense time counts at all of them.
        dense_ms: float64[C], of the candidate without a mask; NaN if it was not priced.
        floor_ms: float64[C], no sparse time is below.
        dense_allowed: whether a layer with a mask may run on the dense kernel where that is faster, as our runtime does.
        source: the least sure source of its times, one of `hw_models.model.SOURCES`; "" if that is not known.
    """

    candidates: tuple[str, ...]
    densities: Floats
    ms: Floats
    dense_ms: Floats
    floor_ms: Floats
    dense_allowed: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.candidates), len(self.densities))
        found = (self.ms.shape, self.dense_ms.shape, self.floor_ms.shape)
        if not shape[0] or found != (shape, shape[:1], shape[:1]):
            raise ValueError(
                f"a latency grid of C={shape[0]} candidates and D={shape[1]} densities needs C >= 1, ms[C, D], dense_ms[C] and "
                f"floor_ms[C], got shapes {found[0]}, {found[1]} and {found[2]}"
            )
        if len(set(self.candidates)) < shape[0]:
            raise ValueError(f"candidates must have different names, got {', '.join(self.candidates)}")
        if not (((self.densities > 0) & (self.densities <= 1)).all() and (np.diff(self.densities) > 0).all()):
            raise ValueError(f"densities must ascend within (0, 1], got {self.densities.tolist()}")
        for name, values in (("ms", self.ms), ("dense_ms", self.dense_ms), ("floor_ms", self.floor_ms)):
            for candidate, row in zip(self.candidates, values.reshape(shape[0], -1)):
                bad = row[(row < 0) | np.isinf(row)]
                if bad.size:
                    raise ValueError(f'{name} of candidate "{candidate}" must be 0 or more and finite, got {bad[0]:g}')
        if np.isnan(self.floor_ms).any():
            raise ValueError("floor_ms must be 0 or more for every candidate, got NaN")
        for candidate, row, dense in zip(self.candidates, self.ms, self.dense_ms):
            known = row[~np.isnan(row)]
            if not known.size and math.isnan(dense):
                raise ValueError(
                    f'candidate "{candidate}" has no time at all: give ms at some density, or dense_ms (0 if it does nothing)'
                )
            if (np.diff(known) < 0).any():
                raise ValueError(
                    f'ms of candidate "{candidate}" falls with density: {known.tolist()}; LatencyGrid.from_arrays makes it monotone'
                )

    @classmethod
    def from_arrays(
        cls,
        candidates: Sequence[str],
        densities: ArrayLike = (),
        ms: ArrayLike | None = None,
        dense_ms: ArrayLike | None = None,
        *,
        floor_ms: ArrayLike = 0.0,
        dense_allowed: bool = True,
        source: str = "",
    ) -> LatencyGrid:
        """Make a grid of any table.

        Args:
            candidates: C names.
            densities: D different values in (0, 1], in any order.
            ms: float[C, D], times with a mask of that density; NaN where there is none. Default: all NaN.
            dense_ms: float[C], times without a mask; NaN where there is none. Default: all NaN.
            floor_ms: scalar or float[C].

        Returns:
            A grid whose rows were sorted by density and made not decreasing (`hw_models.curves.isotonic`).

        Raises:
            ValueError: shapes that do not fit, negative or infinite times, a candidate without any time.
        """
        d = np.atleast_1d(np.asarray(densities, dtype=float))
        names = tuple(candidates)
        table = np.full((len(names), d.size), np.nan) if ms is None else np.array(ms, dtype=float)
        dense = np.full(len(names), np.nan) if dense_ms is None else np.array(dense_ms, dtype=float)
        if table.shape == (len(names), d.size):
            order = np.argsort(d)
            d, table = d[order], table[:, order]
            for row in table:
                known = ~np.isnan(row)
                row[known] = isotonic(row[known], np.ones(int(known.sum())))
        floor = np.broadcast_to(np.asarray(floor_ms, dtype=float), (len(names),)).copy()
        return cls(names, d, table, dense, floor, dense_allowed, source)

    @classmethod
    def from_curves(cls, curves: Mapping[str, Curve | float], *, source: str = "") -> LatencyGrid:
        """Make a grid of density curves.

        Args:
            curves: for each candidate its curve, or one number (ms) if its time does not depend on density.
        """
        known = {name: curve for name, curve in curves.items() if isinstance(curve, Curve)}
        densities = np.unique(np.concatenate([[], *(curve.density for curve in known.values())]))
        ms = np.full((len(curves), densities.size), np.nan)
        dense, floor = np.full(len(curves), np.nan), np.zeros(len(curves))
        for i, curve in enumerate(curves.values()):
            if isinstance(curve, Curve):
                ms[i, np.searchsorted(densities, curve.density)] = curve.ms
                dense[i] = math.nan if curve.dense_ms is None else curve.dense_ms
                floor[i] = curve.floor_ms
            else:
                dense[i] = curve
        return cls.from_arrays(tuple(curves), densities, ms, dense, floor_ms=floor, source=source)

    @classmethod
    def from_model(
        cls,
        model: LatencyModel,
        plans: Mapping[str, Plan | Mapping[float, Plan]],
        device: DeviceDescriptor | str | None = None,
        *,
        without: Plan | None = None,
    ) -> LatencyGrid:
        """Price the candidates by a latency model.

        Args:
            model: any latency model.
            plans: for each candidate its plans by density, density 1 being the candidate without a mask; or one plan if it has no
                weights that could be pruned. Kernels should be chosen already (`hw_models.predictor.choose_kernels`). Either
                the candidate alone, or the whole network with the candidate in its place: then conversions of layout between
                it and its neighbours are counted.
            device: passed on to the model.
            without: the whole network with nothing in that place; its price is subtracted.

        Raises:
            ValueError: a density outside (0, 1], no candidates.
            DeviceError: from the model.
        """
        by_density = {name: dict(of.items()) if isinstance(of, Mapping) else {1.0: of} for name, of in plans.items()}
        flat = [plan for of in by_density.values() for plan in of.values()]
        priced = model.predict_many(flat + ([without] if without is not None else []), device)
        times = priced["ms"].to_numpy(dtype=float)
        if without is not None:
            times = np.maximum(times[:-1] - times[-1], 0.0)
        densities = sorted({float(d) for of in by_density.values() for d in of if d != 1})
        ms, dense = np.full((len(by_density), len(densities)), np.nan), np.full(len(by_density), np.nan)
        following = iter(times)
        for i, of in enumerate(by_density.values()):
            for density in of:
                if density == 1:
                    dense[i] = next(following)
                else:
                    ms[i, densities.index(float(density))] = next(following)
        source = max(priced["source"], key=SOURCES.index, default="")
        return cls.from_arrays(tuple(by_density), densities, ms, dense, source=source)

    def lines(self) -> tuple[Floats, Floats]:
        """The sparse branch as straight lines, prolonged to densities 0 and 1, before the floor is applied.

        Returns:
            knots float64[K] from 0 to 1, and the value of each candidate at each: float64[C, K]. The values of candidates without
            a sparse branch are their dense times.
        """
        knots = np.unique(np.concatenate([[0.0], self.densities, [1.0]]))
        values = np.empty((len(self.candidates), knots.size))
        for i, row in enumerate(self.ms):
            known = ~np.isnan(row)
            x, y = self.densities[known], row[known]
            if not x.size:
                values[i] = self.dense_ms[i]
                continue
            if x.size == 1:  # the time above the floor is taken to be proportional to density
                floor = min(self.floor_ms[i], y[0])
                x, y = np.array([0.0, x[0]]), np.array([floor, y[0]])
            segment = np.clip(np.searchsorted(x, knots) - 1, 0, x.size - 2)
            slope = (np.diff(y) / np.diff(x))[segment]
            values[i] = y[segment] + (knots - x[segment]) * slope
        return knots, values

    def predict(self, density: ArrayLike) -> Floats:
        """Times at a density: 1 is the candidate without a mask, below it the sparse branch or, if allowed, the dense kernel
        where that is faster. A candidate that was never priced dense stays on its sparse branch at 1.

        Args:
            density: scalar or float[...] in [0, 1].

        Returns:
            float64[C, ...]
        """
        d = np.asarray(density, dtype=float)
        knots, values = self.lines()
        found = np.empty((len(self.candidates), *d.shape))
        for i, (row, dense, floor) in enumerate(zip(values, self.dense_ms, self.floor_ms)):
            if np.isnan(self.ms[i]).all():
                found[i] = dense
                continue
            sparse = np.maximum(np.interp(d, knots, row), floor)
            if math.isnan(dense):
                found[i] = sparse
            else:
                found[i] = np.where(d >= 1, dense, np.minimum(sparse, dense) if self.dense_allowed else sparse)
        return found

    def crossover(self, candidate: str) -> float | None:
        """The density above which the candidate is faster dense; there its time no longer depends on density.

        Returns:
            in (0, 1); None if the sparse branch is never slower or one of the two is not known; 0.0 if it always is.

        Raises:
            KeyError: no such candidate.
        """
        if candidate not in self.candidates:
            raise KeyError(f'no candidate "{candidate}"; there are {", ".join(self.candidates)}')
        i = self.candidates.index(candidate)
        dense = self.dense_ms[i]
        if math.isnan(dense) or np.isnan(self.ms[i]).all():
            return None
        if self.floor_ms[i] > dense:
            return 0.0
        knots, values = self.lines()
        row = values[i]
        if row[-1] <= dense:
            return None
        if row[0] > dense:
            return 0.0
        left = int(np.flatnonzero(row <= dense)[-1])
        share = (dense - row[left]) / (row[left + 1] - row[left])
        return float(knots[left] + share * (knots[left + 1] - knots[left]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; None where nothing was priced."""
        return {
            "format": FORMAT,
            "candidates": list(self.candidates),
            "densities": self.densities.tolist(),
            "ms": [_listed(row) for row in self.ms],
            "dense_ms": _listed(self.dense_ms),
            "floor_ms": self.floor_ms.tolist(),
            "dense_allowed": self.dense_allowed,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyGrid:
        """The grid `to_dict` was called on.

        Raises:
            ValueError: another format, or values that make no grid.
            KeyError: a field is missing.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f'expected a "{FORMAT}" as LatencyGrid.to_dict writes it, found format {data.get("format")!r}'
            )
        candidates = tuple(data["candidates"])
        densities = np.asarray(data["densities"], dtype=float)
        ms = np.array(data["ms"], dtype=float).reshape(len(candidates), densities.size)
        dense, floor = (np.array(data[name], dtype=float) for name in ("dense_ms", "floor_ms"))
        return cls(candidates, densities, ms, dense, floor, bool(data["dense_allowed"]), str(data["source"]))


def _listed(row: Floats) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in row]
