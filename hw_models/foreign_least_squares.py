"""Non-negative prices from normal equations, drawn towards given ones: `System.of(design, ms, scale).solve(...)`.

Left-out folds cost a subtraction, not another pass over the data: that is what makes it cheap to try many models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

__all__ = ["System", "usual_size", "without_each"]

Floats = NDArray[np.float64]


def usual_size(design: Floats, ms: Floats) -> Floats:
    """How far a price may be from a prior of 0: a small share of the time of a network."""
    size = np.abs(design).mean(axis=0)
    return np.where(size > 0, 0.05 * np.median(ms) / np.where(size > 0, size, 1.0), 1e-12)


@dataclass(frozen=True)
class System:
    """Normal equations of equations scaled by the size of their errors."""

    gram: Floats
    moment: Floats

    @classmethod
    def of(cls, design: Floats, ms: Floats, scale: Floats) -> System:
        scaled = design / scale[:, None]
        return cls(scaled.T @ scaled, scaled.T @ (ms / scale))

    def solve(self, prior: Floats, spread: Floats, strength: float) -> Floats:
        """argmin over price >= 0 of |design price - ms|^2 / scale^2 + strength |(price - prior) / spread|^2."""
        inside = self.gram * np.outer(spread, spread)
        inside[np.diag_indices(len(prior))] += strength + 1e-10 * np.trace(inside) / len(prior)
        right = self.moment * spread + strength * prior / spread
        root = linalg.cholesky(inside, lower=False)
        free = linalg.cho_solve((root, False), right)
        if (free >= 0).all():
            return free * spread
        return optimize.nnls(root, linalg.solve_triangular(root, right, trans="T"), maxiter=30 * len(prior))[0] * spread


def without_each(systems: list[System]) -> list[System]:
    """For each part the sum of the others, and last the sum of all."""
    gram, moment = sum(s.gram for s in systems), sum(s.moment for s in systems)
    return [
        *(System(gram - s.gram, moment - s.moment) for s in systems),
        System(np.asarray(gram), np.asarray(moment)),
    ]
