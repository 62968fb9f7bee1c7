"""Time over density for one operation on one kernel: `Curve.fit(density, ms)`.

A sparse kernel's time is close to piecewise linear in density, so a curve is a few knots joined by straight lines, made
non-decreasing (more kept weights never take less time) and never below a floor (what a call costs with nothing to do). The
dense kernel is a point of its own beside the curve, because it does not care about density: where the curve crosses it is
`Curve.crossover()`.

This file knows nothing of where measurements come from or what an operation is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Curve", "isotonic"]

Floats = NDArray[np.float64]

# Relative standard error assumed of a measurement that comes without one.
SIGMA = 0.01
# Half of a 90 % interval, in standard errors.
HALF_INTERVAL = 1.645
# How far the time may lie from the straight line in the middle of a gap, as a part of the log step between the two knots: real
# bends of measured curves lie within.
BEND = 0.08
# The same per unit of log density beyond the outermost knots.
BEYOND = 0.25


def isotonic(y: ArrayLike, weights: ArrayLike) -> Floats:
    """The non-decreasing sequence nearest to y by weighted squares.

    Args:
        y: float[n].
        weights: float[n], positive.

    Returns:
        float[n]

    Source: pool adjacent violators, Ayer et al. 1955 (doi:10.1214/aoms/1177728423).
    """
    blocks: list[list[float]] = []  # value, weight, count
    for value, weight in zip(np.asarray(y, dtype=float), np.asarray(weights, dtype=float), strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value_b, weight_b, count_b = blocks.pop()
            value_a, weight_a, count_a = blocks[-1]
            total = weight_a + weight_b
            blocks[-1] = [(value_a * weight_a + value_b * weight_b) / total, total, count_a + count_b]
    return np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks]).astype(float)


@dataclass(frozen=True, eq=False)
class Curve:
    """Milliseconds as a function of density (kept fraction).

    Attributes:
        density: float64[n], ascending, distinct: the knots.
        ms: float64[n], non-decreasing, at least `floor_ms`.
        sigma: float64[n], relative standard error of each knot.
        floor_ms: no prediction is below.
        dense_ms: time of the dense kernel, None if it is not known.
        counts: how many measurements each knot is made of.
    """

    density: Floats
    ms: Floats
    sigma: Floats
    floor_ms: float
    dense_ms: float | None
    counts: NDArray[np.int64]

    @classmethod
    def fit(
        cls,
        density: ArrayLike,
        ms: ArrayLike,
        sigma: ArrayLike | None = None,
        dense_ms: float | None = None,
        floor_ms: float = 0.0,
    ) -> Curve:
        """Fit the sparse branch; several measurements of a density become one knot.

        Args:
            density: float[n] in (0, 1], any order, may repeat.
            ms: float[n], positive.
            sigma: float[n], relative standard errors; measurements are weighted by 1 / sigma^2. Default: all alike.
            dense_ms: the dense kernel's time for the same operation.
            floor_ms: a lower bound for every density.

        Raises:
            ValueError: no points, unequal lengths, a density outside (0, 1], a time or sigma that is not positive and finite.

        Source: isotonic regression of log times (`isotonic`), then linear interpolation in density, which on measured layers
        beats interpolation in log density by a factor of two to three.
        """
        d, t = (np.atleast_1d(np.asarray(a, dtype=float)) for a in (density, ms))
        s = np.full_like(d, SIGMA) if sigma is None else np.atleast_1d(np.asarray(sigma, dtype=float))
        if not (d.ndim == 1 and d.shape == t.shape == s.shape and len(d)):
            raise ValueError(
                f"density, ms and sigma must be equally long and not empty, got {d.shape, t.shape, s.shape}"
            )
        if not ((d > 0) & (d <= 1)).all():
            raise ValueError(f"densities must be in (0, 1], got {d[~((d > 0) & (d <= 1))][0]:g}")
        for name, values in (("ms", t), ("sigma", s)):
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                raise ValueError(f"{name} must be positive and finite, got {values[bad][0]:g} at density {d[bad][0]:g}")
        if not (math.isfinite(floor_ms) and floor_ms >= 0):
            raise ValueError(f"floor_ms must be 0 or more, got {floor_ms:g}")
        if dense_ms is not None and not (math.isfinite(dense_ms) and dense_ms > 0):
            raise ValueError(f"dense_ms must be positive and finite or None, got {dense_ms:g}")
        knots, which, counts = np.unique(d, return_inverse=True, return_counts=True)
        weights = np.bincount(which, 1 / s**2)
        means = np.bincount(which, np.log(t) / s**2) / weights
        # Standard error of the mean, or what its measurements show if they differ by more: two masks of one density do.
        scatter = np.bincount(which, (np.log(t) - means[which]) ** 2 / s**2) / weights
        fitted = isotonic(means, weights)
        error = np.sqrt(1 / weights + scatter / np.maximum(counts - 1, 1) + (fitted - means) ** 2)
        return cls(knots, np.maximum(np.exp(fitted), floor_ms), error, float(floor_ms), dense_ms, counts)

    def predict(self, density: ArrayLike) -> Floats:
        """The sparse kernel's time in ms: straight lines between the knots, the outermost ones prolonged.

        With one knot the time above the floor is taken to be proportional to density.

        Args:
            density: scalar or float[...].

        Returns:
            float64[...] of the same shape.
        """
        d = np.asarray(density, dtype=float)
        if len(self.density) == 1:
            return np.asarray(self.floor_ms + (self.ms[0] - self.floor_ms) * d / self.density[0])
        segment = np.clip(np.searchsorted(self.density, d) - 1, 0, len(self.density) - 2)
        left, step = self.density[segment], np.diff(self.density)[segment]
        value = self.ms[segment] + (d - left) / step * np.diff(self.ms)[segment]
        return np.maximum(value, self.floor_ms)

    def spread(self, density: ArrayLike) -> Floats:
        """Standard error of `predict` in log space: the knots', the bend a gap may hide, and more beyond the outermost knots.

        Returns:
            float64[...] of the same shape, positive.
        """
        d = np.asarray(density, dtype=float)
        log_d = np.log(np.maximum(d, 1e-9))
        beyond = np.maximum(np.log(self.density[0]) - log_d, 0) + np.maximum(log_d - np.log(self.density[-1]), 0)
        if len(self.density) == 1:
            return np.asarray(np.hypot(self.sigma[0], 2 * BEYOND * beyond))
        segment = np.clip(np.searchsorted(self.density, d) - 1, 0, len(self.density) - 2)
        along = np.clip((d - self.density[segment]) / np.diff(self.density)[segment], 0, 1)
        rise = np.log(np.maximum(self.ms[segment + 1], 1e-12) / np.maximum(self.ms[segment], 1e-12))
        knots = np.hypot((1 - along) * self.sigma[segment], along * self.sigma[segment + 1])
        bend = BEND * rise * 4 * along * (1 - along)
        return np.asarray(np.sqrt(knots**2 + bend**2 + (BEYOND * beyond) ** 2))

    def inside(self, density: ArrayLike) -> NDArray[np.bool_]:
        """Whether a density lies between the outermost knots (2 % of slack, the size of a rounding of kept weights)."""
        d = np.asarray(density, dtype=float)
        return np.asarray((d >= self.density[0] * 0.98) & (d <= self.density[-1] * 1.02))

    def crossover(self) -> float | None:
        """The density above which the dense kernel is faster.

        Returns:
            in (0, 1); None if the sparse kernel is as fast at density 1 or the dense time is not known; 0.0 if dense is always
            faster.
        """
        if self.dense_ms is None or self.predict(1.0) <= self.dense_ms:
            return None
        if self.predict(0.0) > self.dense_ms:
            return 0.0
        xs = np.concatenate([[0.0], self.density, [1.0]])
        ys = self.predict(xs)
        # The last piece that starts at or below the dense time; lines below the floor are bent there, hence a bisection.
        piece = int(np.flatnonzero(ys <= self.dense_ms)[-1])
        low, high = float(xs[piece]), float(xs[piece + 1])
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict(middle) <= self.dense_ms else (low, middle)
        return high

    def worth_adding(self, points: Iterable[float], intervals: float = 2.0) -> list[float]:
        """Which densities to measure next: those beside a knot where the curve bends by more than noise.

        Args:
            points: candidate densities.
            intervals: a bend counts where the middle knot lies off the line between its neighbours by more than this many
                of its own 90 % intervals.

        Returns:
            The candidates in segments that touch such a knot, the strongest bend first; knots themselves are left out.
        """
        if len(self.density) < 3:
            return []
        d, t = self.density, self.ms
        straight = t[:-2] + (d[1:-1] - d[:-2]) / (d[2:] - d[:-2]) * (t[2:] - t[:-2])
        bend = np.abs(t[1:-1] - straight) / np.maximum(t[1:-1] * self.sigma[1:-1] * HALF_INTERVAL * 2, 1e-12)
        strength = np.zeros(len(d) - 1)  # per segment
        for i, b in enumerate(bend):
            if b > intervals:
                strength[i : i + 2] = np.maximum(strength[i : i + 2], b)
        found = []
        for point in points:
            i = int(np.searchsorted(d, point)) - 1
            if 0 <= i < len(strength) and strength[i] > 0 and not np.isclose(d, point, rtol=0.02).any():
                found.append((-float(strength[i]), float(point)))
        return [point for _, point in sorted(found)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "density": self.density.tolist(),
            "ms": self.ms.tolist(),
            "sigma": self.sigma.tolist(),
            "floor_ms": self.floor_ms,
            "dense_ms": self.dense_ms,
            "counts": self.counts.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Curve:
        """The curve `to_dict` was called on.

        Raises:
            KeyError: a field is missing.
        """
        density, ms, sigma = (np.asarray(data[k], dtype=float) for k in ("density", "ms", "sigma"))
        counts = np.asarray(data["counts"], dtype=np.int64)
        return cls(density, ms, sigma, float(data["floor_ms"]), data["dense_ms"], counts)
