"""Few replicates, compared honestly: mean and spread, and paired differences with an interval and two tests.

Replicates are pairs because they share a seed: data order, initial weights and augmentation of the final training. Start with
`paired` and `mean_sd`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT_PAIRS = 20
"""Up to so many pairs all 2^n sign flips are tried, beyond a fixed sample of them."""
SAMPLED_FLIPS = 200_000


@dataclass(frozen=True)
class Paired:
    """What n paired differences say of their mean. Everything but `mean` is NaN below two pairs.

    Attributes:
        n: pairs in which both values are known.
        mean: of the differences; NaN without a pair.
        low, high: 95 % interval of the mean, by Student's t with n - 1 degrees of freedom.
        p_t: two-sided p of the paired t test; NaN also where all differences are equal, which it has no answer to.
        p_flip: two-sided p of the exact sign-flip test: the share of all 2^n assignments of signs to the differences whose mean
            is at least as far from 0. It cannot be below 2 / 2^n: three pairs never give less than 0.25.
    """

    n: int
    mean: float
    low: float
    high: float
    p_t: float
    p_flip: float

    def __str__(self) -> str:
        if self.n == 0:
            return "no pair"
        if self.n == 1:
            return f"{self.mean:+.4f} (one pair: no interval)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired(one: Sequence[float], other: Sequence[float]) -> Paired:
    """Compare two lists of values pair by pair, `one` less `other`; pairs with a NaN are left out.

    Args:
        one, other: float[n] each, replicate by replicate.

    Raises:
        ValueError: unequal lengths, or an infinite value.

    Source: Student 1908 (Biometrika 6); Fisher 1935, The Design of Experiments, section 21, for the flips of signs.
    """
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two lists of equal length, got shapes {a.shape} and {b.shape}")
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("expected finite values or NaN, got inf")
    differences = (a - b)[~np.isnan(a - b)]
    n = len(differences)
    if n < 2:
        nan = math.nan
        return Paired(n, float(differences[0]) if n else nan, nan, nan, nan, nan)
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    constant = spread <= 1e-12 * float(np.abs(differences).max())
    half, p_t = 0.0, math.nan
    if not constant:
        from scipy import stats

        error = spread / math.sqrt(n)
        half = float(stats.t.ppf(0.975, n - 1)) * error
        p_t = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, mean - half, mean + half, p_t, flip_p(differences))


def flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the sign-flip test of mean 0; exact up to `EXACT_PAIRS` differences. NaN below two of them."""
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n < 2:
        return math.nan
    observed = abs(float(d.sum()))
    slack = 1e-12 * float(np.abs(d).sum())
    if n <= EXACT_PAIRS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed - slack))
    signs = np.random.default_rng(n).integers(0, 2, (SAMPLED_FLIPS, n), dtype=np.int8) * np.int8(2) - np.int8(1)
    extreme = int(np.count_nonzero(np.abs(signs @ d) >= observed - slack))
    return (extreme + 1) / (SAMPLED_FLIPS + 1)


def mean_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of the values that are not NaN; NaN where there are none, or one for the latter."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if len(known) else math.nan
    return mean, float(known.std(ddof=1)) if len(known) > 1 else math.nan


def plus_minus(mean: float, sd: float, digits: int = 4) -> str:
    """ "0.9321 +- 0.0040"; without the spread where there is none, "–" without a mean."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" +- {sd:.{digits}f}")
