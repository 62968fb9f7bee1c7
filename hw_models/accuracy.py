"""How good predicted times are, and how good they could be at all.

`accuracy` compares predictions with measurements; `noise_ceiling` says what a perfect predictor would score on the same data, from
things that were measured twice. Every figure of the first belongs beside the second. Shares and relative errors are fractions
(0.05 is 5 %), relative to the *measured* value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["accuracy", "noise_ceiling"]


def accuracy(
    measured: ArrayLike, predicted: ArrayLike, lo: ArrayLike | None = None, hi: ArrayLike | None = None
) -> dict[str, float]:
    """Compare predicted with measured times.

    Args:
        measured: float[n] times, all above 0; any unit.
        predicted: float[n] in the same unit and order.
        lo, hi: float[n] ends of the prediction intervals; both or neither.

    Returns:
        n; hit5, hit10: share predicted within 5 % and 10 % of the measured value; rmspe: root of the mean squared relative
        error; mape: mean absolute relative error; bias: mean signed relative error (above 0: predicted too slow); spearman,
        kendall (tau-b): NaN where fewer than two values differ. With intervals also coverage: share of measurements inside,
        ends included; width: mean of (hi - lo) / predicted.

    Raises:
        ValueError: lengths differ, nothing to compare, a value is not finite, or a measured time is not above 0.

    Source: definitions of nn-Meter (Zhang et al., MobiSys 2021, section 5).
    """
    real, guess = _times("measured", measured), _times("predicted", predicted, positive=False)
    if len(real) != len(guess):
        raise ValueError(f"as many predicted as measured times are needed, got {len(guess)} and {len(real)}")
    error = guess / real - 1
    # 1 + eps: a prediction of 1.1 for 1.0 is within 10 % whatever binary fractions say
    score = {
        "n": float(len(real)),
        "hit5": float(np.mean(np.abs(error) <= 0.05 * (1 + 1e-9))),
        "hit10": float(np.mean(np.abs(error) <= 0.10 * (1 + 1e-9))),
        "rmspe": float(np.sqrt(np.mean(error**2))),
        "mape": float(np.mean(np.abs(error))),
        "bias": float(np.mean(error)),
        **_ranks(real, guess),
    }
    if (lo is None) != (hi is None):
        raise ValueError("both ends of the intervals are needed, got only " + ("hi" if lo is None else "lo"))
    if lo is not None and hi is not None:
        low, high = _times("lo", lo, positive=False), _times("hi", hi, positive=False)
        if not len(low) == len(high) == len(real):
            raise ValueError(
                f"as many intervals as times are needed, got {len(low)} and {len(high)} ends, {len(real)} times"
            )
        score["coverage"] = float(np.mean((low <= real) & (real <= high)))
        score["width"] = float(np.mean((high - low) / guess))
    return score


def noise_ceiling(pairs: Iterable[tuple[float, float]] | ArrayLike) -> dict[str, float]:
    """What a perfect predictor would score on data as noisy as these.

    Args:
        pairs: float[n, 2]: two measurements of the same thing (or of two networks known to be equal), each made the way the
            data were.

    Returns:
        n; twins5, twins10: share of pairs that agree within 5 % and 10 %; hit5, hit10, rmspe, mape: expected of a predictor that
        knows the true time, on one measurement; twin_spearman: between the two measurements (order within pairs is arbitrary, so
        both orders count); spearman: its root, the most that predictions can reach.

    The error of one measurement is taken to be the difference of the logarithms of two, over the root of 2. That is exact for
    normal noise; where times jump between two states, real predictors can lie above the "ceiling": a guide, not a bound.

    Raises:
        ValueError: no pairs, wrong shape, or times that are not finite and above 0.
    """
    given: Any = pairs
    table = np.asarray(given if isinstance(given, np.ndarray) else list(given), dtype=float)
    if table.ndim != 2 or table.shape[1] != 2 or not len(table):
        raise ValueError(f"pairs of times are needed, float[n, 2] with n >= 1, got shape {table.shape}")
    first, second = _times("the first of the pairs", table[:, 0]), _times("the second of the pairs", table[:, 1])
    both = np.abs(np.concatenate([first / second, second / first]) - 1)
    gap = np.log(first / second)
    once = np.concatenate([gap, -gap]) / math.sqrt(2)  # log(measured / true)
    error = np.exp(-once) - 1  # of the true time as a prediction
    twin = _ranks(np.concatenate([first, second]), np.concatenate([second, first]))["spearman"]
    return {
        "n": float(len(table)),
        "twins5": float(np.mean(both <= 0.05 * (1 + 1e-9))),
        "twins10": float(np.mean(both <= 0.10 * (1 + 1e-9))),
        "hit5": float(np.mean(np.abs(error) <= 0.05 * (1 + 1e-9))),
        "hit10": float(np.mean(np.abs(error) <= 0.10 * (1 + 1e-9))),
        "rmspe": float(np.sqrt(np.mean(error**2))),
        "mape": float(np.mean(np.abs(error))),
        "twin_spearman": twin,
        "spearman": math.sqrt(max(0.0, twin)) if math.isfinite(twin) else math.nan,
    }


def _times(name: str, values: ArrayLike, *, positive: bool = True) -> NDArray[np.float64]:
    times = np.asarray(values, dtype=float).reshape(-1)
    if not len(times):
        raise ValueError(f"{name}: at least one time is needed, got none")
    bad = ~np.isfinite(times) | (positive & (times <= 0))
    if bad.any():
        at = int(np.argmax(bad))
        need = "finite and above 0" if positive else "finite"
        raise ValueError(
            f"{name}: times must be {need}, got {times[at]} at position {at} ({int(bad.sum())} such of {len(times)}); "
            "leave these rows out of both lists"
        )
    return times


def _ranks(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, float]:
    """Rank correlations; NaN where one side is constant."""
    from scipy import stats

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"spearman": math.nan, "kendall": math.nan}
    ranked = np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]
    return {"spearman": float(ranked), "kendall": float(stats.kendalltau(a, b).statistic)}
