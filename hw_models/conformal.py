"""Intervals that hold what they promise: `Conformal.fit(errors, spread, source)`, then `interval(ms, spread, source)`.

A model says how unsure it is (its *spread*, a standard deviation of log time), in its own scale. On networks it was not fitted to
one sees how large errors really are in units of that spread; their 90 % quantile scales every later spread. Each source of an
answer has a quantile of its own, because a measured time and a data-sheet estimate are wrong in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hw_models.model import SOURCES

__all__ = ["Conformal", "corrected_quantile"]

Floats = NDArray[np.float64]

# Classes with fewer scores use those of a worse class (a 90 % quantile of 20 numbers is their second largest).
FEWEST = 20
# ... made wider by this for each class that was gone past.
WIDEN = 1.25
# Quantile of |error| / spread if there are no scores at all: twice the normal one.
UNKNOWN = 2 * 1.645
SMALLEST_SPREAD = 1e-4


def corrected_quantile(scores: ArrayLike, coverage: float) -> float:
    """The value that a new score stays under with at least probability `coverage`: the ceil((n + 1) coverage)-th smallest.

    Returns:
        inf if there are too few scores to promise that.

    Source: split conformal prediction, Lei et al. 2018 (arXiv:1604.04173), section 2.2.
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    rank = math.ceil((len(ordered) + 1) * coverage)
    return float(ordered[rank - 1]) if 1 <= rank <= len(ordered) else math.inf


@dataclass(frozen=True)
class Conformal:
    """How many spreads wide an interval is, per source.

    Attributes:
        coverage: share of true values that lie inside, e.g. 0.9.
        quantiles: source -> half width of the interval in log time, in spreads. One for each of `SOURCES`.
        counts: source -> how many scores it had itself.
    """

    coverage: float
    quantiles: dict[str, float]
    counts: dict[str, int]

    @classmethod
    def fit(
        cls, errors: ArrayLike, spread: ArrayLike, source: Sequence[str] | NDArray[Any], coverage: float = 0.9
    ) -> Conformal:
        """From answers to questions whose truth is known and that the model was not fitted to.

        Args:
            errors: float[n], log(true ms / predicted ms).
            spread: float[n], what the model said: standard deviation of log time; below 1e-4 counts as 1e-4.
            source: n of `SOURCES`.
            coverage: in (0, 1).

        Returns:
            A class with fewer than 20 scores takes the quantile of the next worse class that has them, or else of the next
            better one, each step of the ladder making it a quarter wider, and never one narrower than its own scores ask for.

        Raises:
            ValueError: unequal lengths, an unknown source, a value that is not finite, a coverage outside (0, 1).

        Source: scores scaled by the model's own spread as in Lei et al. 2018 (arXiv:1604.04173), section 5.2; one quantile
        per class as in Vovk et al. 2003, Mondrian confidence machines.
        """
        e, s = np.abs(np.asarray(errors, dtype=float)), np.asarray(spread, dtype=float)
        names = np.asarray(source, dtype=object)
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be in (0, 1), got {coverage:g}")
        if not (e.ndim == 1 and e.shape == s.shape == names.shape):
            raise ValueError(f"errors, spread and source must be equally long, got {e.shape, s.shape, names.shape}")
        if unknown := sorted({str(n) for n in names} - set(SOURCES)):
            raise ValueError(f"unknown source {unknown[0]!r}; known: {', '.join(SOURCES)}")
        if not (np.isfinite(e).all() and np.isfinite(s).all()):
            raise ValueError("errors and spread must be finite; leave failed predictions out")
        scores = {name: (e / np.maximum(s, SMALLEST_SPREAD))[names == name] for name in SOURCES}
        quantiles = {name: _borrowed(scores, i, coverage) for i, name in enumerate(SOURCES)}
        return cls(coverage, quantiles, {name: len(scores[name]) for name in SOURCES})

    def interval(
        self, ms: ArrayLike, spread: ArrayLike, source: str | Sequence[str] | NDArray[Any]
    ) -> tuple[Floats, Floats]:
        """(lo_ms, hi_ms), each of the shape of `ms`: ms * exp(-+ quantile * spread)."""
        t, s = np.broadcast_arrays(np.asarray(ms, dtype=float), np.asarray(spread, dtype=float))
        if isinstance(source, str):
            q: Any = self.quantiles[source]
        else:
            names = np.asarray(source, dtype=object)
            q = np.empty(names.shape)
            for name, value in self.quantiles.items():
                q[names == name] = value
        factor = np.exp(np.minimum(q * np.maximum(s, SMALLEST_SPREAD), 50.0))
        return t / factor, t * factor

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"coverage": self.coverage, "quantiles": dict(self.quantiles), "counts": dict(self.counts)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Conformal:
        """What `to_dict` was called on.

        Raises:
            KeyError: a field is missing.
        """
        quantiles = {name: float(data["quantiles"][name]) for name in SOURCES}
        return cls(float(data["coverage"]), quantiles, {name: int(data["counts"][name]) for name in SOURCES})


def _borrowed(scores: dict[str, Floats], index: int, coverage: float) -> float:
    """The quantile of one class, from itself or the nearest class that has enough scores."""
    own = scores[SOURCES[index]]
    for lender in [*range(index, len(SOURCES)), *range(index - 1, -1, -1)]:
        quantile = corrected_quantile(scores[SOURCES[lender]], coverage)
        if len(scores[SOURCES[lender]]) < FEWEST or math.isinf(quantile):
            continue
        if lender == index:
            return quantile
        borrowed = quantile * WIDEN ** abs(lender - index)
        return max(borrowed, float(np.quantile(own, coverage))) if len(own) else borrowed
    return max(UNKNOWN, float(np.max(own))) if len(own) else UNKNOWN
