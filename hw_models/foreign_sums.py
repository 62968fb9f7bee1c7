"""Whole networks from times of their operations: `fit_sums(operations, ms)`.

Where a table has the time of each operation, a network is the sum of them: per operation a curve over density, dense apart
(`hw_models.curves`), and a small correction of the whole, because sums over-count where networks are very sparse. An operation
without a curve is priced by what the others cost per unit of work.

Source: sections 2.3 and 5.3 of the facts this package is built from. The correction grows with the square of the logarithm of
density: chosen so that it is nothing at dense and little at 80 % sparsity, as on the two networks of the SparseML table, and
shrunk towards none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hw_models.curves import Curve
from hw_models.foreign_additive import Additive, fit_additive
from hw_models.foreign_features import Operations

__all__ = ["Sums", "fit_sums"]

Floats = NDArray[np.float64]
SAME = 1e-6  # densities this close are the same
FLOOR = 0.5  # of the fastest point: no extrapolation goes below
NOISE = 0.02  # of one network, at least
DRAWN = np.array([0.02, 0.02, 0.1, 0.05, 0.05])  # how large the correction's terms may well be
FEW = 8  # networks below which only its first three terms are used


@dataclass(frozen=True)
class Sums:
    """Curves of operations and the correction of their sum.

    Attributes:
        points: operation without its density -> {density: ms}, as measured.
        curves: operation -> curve over density; None where only the dense time is known.
        strange: prices for operations without a curve; None if there were too few to learn from.
        terms: float[5], correction in log time per unit of `_terms`.
        smallest: ms, the smallest sum.
        size: ms of a usual operation.
    """

    points: dict[str, dict[float, float]]
    curves: dict[str, Curve | None]
    strange: Additive | None
    terms: Floats
    smallest: float
    size: float

    def operation_ms(self, operations: Operations) -> tuple[Floats, NDArray[np.object_]]:
        """ms of one execution of each row, and where it is from: measured, interpolated or learned.

        Raises:
            ValueError: an operation has neither a time nor a curve, and there is nothing to learn its price from.
        """
        each, source = operations.ms.copy(), np.full(len(operations.ms), "measured", object)
        for i in np.flatnonzero(np.isnan(each)):
            name, density = operations.curve[i], float(operations.density[i])
            same = [ms for d, ms in self.points.get(name, {}).items() if abs(d - density) < SAME]
            curve = self.curves.get(name)
            if same:
                each[i] = same[0]
            elif curve is not None and density < 1:
                each[i] = float(curve.predict(density))
                source[i] = "interpolated" if curve.inside(density) else "learned"
        gone = np.isnan(each)
        if gone.any():
            if self.strange is None:
                raise ValueError(
                    f"operation {operations.curve[int(np.argmax(gone))]} is not in the table the model was fitted on and has no "
                    "time of its own; give its ms, or fit on a table of more operations with macs or shapes"
                )
            each[gone] = np.maximum(self.strange.operation_ms(operations)[gone] + self.strange.constant_ms, 1e-9)
            source[gone] = "learned"
        return each, source

    def predict(self, operations: Operations, each: Floats) -> Floats:
        """ms of each network, from ms of its operations."""
        total = np.maximum(operations.per_network(each), 1e-12)
        return total * np.exp(np.clip(self._terms(operations, each) @ self.terms, -1.0, 1.0))

    def _terms(self, operations: Operations, each: Floats) -> Floats:
        """float[networks, 5]: what grows with the sum, with the square of log density, a constant (operations the table does not
        have), per operation, and with the size of the network."""
        total = np.maximum(operations.per_network(each), 1e-12)
        sparse = operations.per_network(each * np.log(operations.density) ** 2) / total
        small = operations.per_network(np.minimum(each, self.size)) / total
        larger = np.log(total / self.smallest)
        return np.column_stack([np.ones(len(total)), sparse, self.smallest / total, small, larger])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "points": {k: [[d, m] for d, m in v.items()] for k, v in self.points.items()},
            "curves": {k: None if c is None else c.to_dict() for k, c in self.curves.items()},
            "strange": None if self.strange is None else self.strange.to_dict(),
            "terms": self.terms.tolist(),
            "smallest": self.smallest,
            "size": self.size,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sums:
        """The inverse of `to_dict`."""
        return cls(
            {k: {float(d): float(m) for d, m in v} for k, v in data["points"].items()},
            {k: None if c is None else Curve.from_dict(c) for k, c in data["curves"].items()},
            None if data["strange"] is None else Additive.from_dict(data["strange"]),
            np.array(data["terms"], dtype=float),
            float(data["smallest"]),
            float(data["size"]),
        )


def fit_sums(
    table: Operations,
    operations: Operations | None = None,
    ms: Floats | None = None,
    folds: NDArray[np.int64] | None = None,
) -> tuple[Sums, Floats | None]:
    """Curves from the rows that have a time, and the correction from whole networks.

    Args:
        table: rows for the curves, of any networks.
        operations: of n networks; rows without a time are priced as in a prediction.
        ms: float[n], of these networks; None: the sum stands as it is.
        folds: int[n]; None: nothing is left out.

    Returns:
        The model, and its predictions of left-out networks (None without `ms` or `folds`).

    Raises:
        ValueError: no row has a time.
    """
    timed = np.flatnonzero(~np.isnan(table.ms))
    if not len(timed):
        raise ValueError("operations: no row has a time in column 'ms'")
    found: dict[str, dict[float, list[float]]] = {}
    for i in timed:
        found.setdefault(table.curve[i], {}).setdefault(round(float(table.density[i]), 9), []).append(table.ms[i])
    points = {
        name: {d: float(np.exp(np.mean(np.log(m)))) for d, m in sorted(curve.items())} for name, curve in found.items()
    }
    curves = {name: _curve(curve) for name, curve in points.items()}
    size = float(np.median(table.ms[timed]))
    model = Sums(points, curves, _strange(table, timed), np.zeros(5), 1.0, size)
    if ms is None or operations is None:
        return model, None
    each, _ = model.operation_ms(operations)
    total = np.maximum(operations.per_network(each), 1e-12)
    model = Sums(points, curves, model.strange, np.zeros(5), float(total.min()), size)
    terms, off = model._terms(operations, each), np.log(ms / total)
    held = None
    if folds is not None:
        held = np.empty(len(ms))
        for fold in np.unique(folds):
            out = folds == fold
            held[out] = total[out] * np.exp(terms[out] @ _shrunk(terms[~out], off[~out]))
    return Sums(points, curves, model.strange, _shrunk(terms, off), model.smallest, size), held


def _curve(points: dict[float, float]) -> Curve | None:
    sparse = {d: ms for d, ms in points.items() if d < 1}
    if not sparse:
        return None
    return Curve.fit(
        list(sparse), list(sparse.values()), dense_ms=points.get(1.0), floor_ms=FLOOR * min(sparse.values())
    )


def _shrunk(terms: Floats, off: Floats) -> Floats:
    """The most probable correction: each term drawn towards 0, networks that do not fit count for less."""
    used = 3 if len(off) < FEW else 5
    answer, weight = np.zeros(5), np.ones(len(off))
    noise = NOISE
    for _ in range(4):
        design = terms[:, :used]
        inside = design.T @ (weight[:, None] * design) / noise**2 + np.diag(1 / DRAWN[:used] ** 2)
        answer[:used] = np.linalg.solve(inside, design.T @ (weight * off) / noise**2)
        error = np.abs(off - terms @ answer)
        noise = max(NOISE, 1.4826 * float(np.median(error))) if len(off) >= FEW else NOISE
        weight = np.minimum(1.0, 2 * noise / np.maximum(error, 1e-12)) if len(off) >= FEW else weight
    return answer


def _strange(operations: Operations, timed: NDArray[np.intp]) -> Additive | None:
    """Prices per unit of work, each timed operation taken for a network of its own."""
    timed = timed[:: max(1, len(timed) // 2000)]
    if len(timed) < 3:
        return None
    alone = operations.rows_alone(timed)
    folds = np.arange(len(timed)) % min(10, len(timed))
    return fit_additive(alone, operations.ms[timed], folds, views=("raw",))[0]
