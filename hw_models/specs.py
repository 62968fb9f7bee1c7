"""Latency of whole networks from four numbers: `fit_specs(frame, ms)`, for tables of networks nobody can take apart.

    t = (a GMACs + b activations + c params + d) x exp(sum_k e_k r_k)        a, b, c, d >= 0

is fitted to networks measured on one device, in relative error. The first factor is all that is known of a device from its own
measurements. The second is what other devices tell: r_k is how much slower than its formula the same network was on device k (the
logarithm, `SpecFit.log_residual`), and such oddities carry over from device to device in part. On the public timm tables, families
left out, the formula alone is off by 12 % on average on one desktop CPU and by 22 % on another; knowing the other CPU's table 8 and
15 %. Ten networks measured on a new CPU, drawn at random, give 17 % alone and 10.4 % (standard deviation over draws 2.6) with the
other's table; chosen by `choose_networks` 9.2 % (1.3).

Start with `fit_specs`. What it does not do: say anything about sparse networks (their operations are priced one by one by
`hw_models.analytical.AnalyticalModel`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

__all__ = ["SPEC_COLUMNS", "SpecFit", "choose_networks", "fit_specs"]

Floats = npt.NDArray[np.float64]

SPEC_COLUMNS = ("gmacs", "activations", "params")
ITERATIONS = 60
NEAR = 0.02  # relative errors below this count as equally small: least absolute, not least squared error
# What networks that were not seen do: half of an oddity carries over, and this many networks are needed to believe otherwise.
CARRY, CARRY_WORTH = 0.5, 10.0


@dataclass(frozen=True, eq=False)
class SpecFit:
    """The formula, fitted.

    Attributes:
        coefficients: ms for each GMAC, million activations, million parameters (in whatever unit the frame had), and for nothing.
        carry: the exponent of each other device's oddity.
        spread: half width of the 90 % interval, of the logarithm.
        networks: how many it was fitted to.
    """

    coefficients: tuple[float, float, float, float]
    carry: Mapping[str, float]
    spread: float
    networks: int = field(default=0)

    def predict(self, frame: pd.DataFrame, peers: pd.DataFrame | None = None) -> pd.DataFrame:
        """Price networks.

        Args:
            frame: gmacs, activations, params of each.
            peers: `log_residual` of the same networks on other devices, a column for each that the fit had; NaN where a network
                was not measured there, which counts as ordinary.

        Returns:
            ms, lo_ms, hi_ms (float64), source "analytical"; indexed as the frame.

        Raises:
            ValueError: columns are missing.
        """
        ms = _design(frame) @ np.asarray(self.coefficients)
        if self.carry:
            ms = ms * np.exp(_oddities(frame, peers, list(self.carry)) @ np.asarray(list(self.carry.values())))
        wide = math.exp(self.spread)
        columns = {"ms": ms, "lo_ms": ms / wide, "hi_ms": ms * wide, "source": "analytical"}
        return pd.DataFrame(columns, index=frame.index)

    def log_residual(self, frame: pd.DataFrame, ms: pd.Series | npt.ArrayLike) -> pd.Series:
        """How much slower than the formula networks were on this device: ln(measured / formula), indexed as the frame."""
        formula = _design(frame) @ np.asarray(self.coefficients)
        return pd.Series(np.log(np.asarray(ms, np.float64) / formula), index=frame.index)


def fit_specs(frame: pd.DataFrame, ms: pd.Series | npt.ArrayLike, peers: pd.DataFrame | None = None) -> SpecFit:
    """Fit the formula of one device.

    Args:
        frame: gmacs, activations, params (params and activations in millions, say; any unit, always the same) of measured networks.
        ms: float[networks], measured, for the same batch size throughout.
        peers: `SpecFit.log_residual` of these networks on other devices, one column each.

    Raises:
        ValueError: columns are missing, a number is not finite, a time not positive, or there is no network.
    """
    design, times = _design(frame), np.asarray(ms, np.float64)
    if len(times) != len(frame) or not len(frame):
        raise ValueError(
            f"fit_specs needs one time for each network and at least one, got {len(times)} for {len(frame)}"
        )
    if not (np.isfinite(times).all() and (times > 0).all()):
        bad = frame.index[~(np.isfinite(times) & (times > 0))][0]
        raise ValueError(f"times must be positive; that of network {bad!r} is not: drop what could not be measured")
    names = [str(name) for name in peers.columns] if peers is not None else []
    odd = _oddities(frame, peers, names)
    carry = np.full(len(names), CARRY / max(1, len(names)))
    coefficients = _least_relative(design, times)
    for _ in range(10 if names else 0):
        coefficients = _least_relative(design * np.exp(odd @ carry)[:, None], times)
        carry = _carry(np.log(times / (design @ coefficients)), odd)
    formula = (design @ coefficients) * np.exp(odd @ carry)
    return SpecFit(
        (float(coefficients[0]), float(coefficients[1]), float(coefficients[2]), float(coefficients[3])),
        dict(zip(names, map(float, carry))),
        _spread(np.log(times / formula), 4 + len(names)),
        len(frame),
    )


def choose_networks(
    frame: pd.DataFrame, rough_ms: pd.Series | npt.ArrayLike, count: int, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Which networks to measure on a new device so that its formula is known best.

    Greedily the one that tells most about the four coefficients beside those chosen before (D-optimal design), drawn among the best
    fifth, so that not all are oddities.

    Args:
        frame: gmacs, activations, params of the networks one could measure.
        rough_ms: their times on some other device, or by its formula.
        count: how many to choose.

    Returns:
        int64[count], positions in the frame, in the order of choice.

    Raises:
        ValueError: there are fewer networks.
    """
    if not 0 <= count <= len(frame):
        raise ValueError(f"cannot choose {count} of {len(frame)} networks")
    relative = _design(frame) / np.asarray(rough_ms, np.float64)[:, None]
    relative /= np.sqrt(np.mean(relative**2, axis=0))
    rng, chosen = np.random.default_rng(seed), list[int]()
    known = 0.1 * np.eye(relative.shape[1])
    for _ in range(count):
        gain = np.einsum("ij,jk,ik->i", relative, np.linalg.inv(known), relative)
        gain[chosen] = -1.0
        left = len(frame) - len(chosen)
        pick = int(rng.choice(np.argsort(-gain)[: max(1, left // 5)]))
        chosen.append(pick)
        known += np.outer(relative[pick], relative[pick])
    return np.array(chosen, np.int64)


def _design(frame: pd.DataFrame) -> Floats:
    missing = [name for name in SPEC_COLUMNS if name not in frame]
    if missing:
        raise ValueError(
            f"a frame of networks needs the columns {', '.join(SPEC_COLUMNS)}; missing: {', '.join(missing)}"
        )
    numbers = frame[list(SPEC_COLUMNS)].to_numpy(np.float64)
    if not np.isfinite(numbers).all():
        bad = frame.index[~np.isfinite(numbers).all(axis=1)][0]
        raise ValueError(f"{', '.join(SPEC_COLUMNS)} of network {bad!r} are not all known: drop it or count it")
    return np.column_stack([numbers, np.ones(len(frame))])


def _oddities(frame: pd.DataFrame, peers: pd.DataFrame | None, names: list[str]) -> Floats:
    """float[networks, names]; 0 where unknown."""
    if not names:
        return np.zeros((len(frame), 0))
    missing = [name for name in names if peers is None or name not in peers]
    if missing or peers is None or len(peers) != len(frame):
        raise ValueError(f"peers needs a row for each network and the columns {', '.join(names)}; missing: {missing}")
    return np.nan_to_num(peers[names].to_numpy(np.float64), nan=0.0)


def _least_relative(design: Floats, times: Floats) -> Floats:
    """Non-negative coefficients of the least absolute relative error, by reweighted least squares."""
    relative = design / times[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    weight = np.ones(len(times))
    for _ in range(ITERATIONS):
        found, _ = nnls(relative / scale * weight[:, None], weight)
        error = np.abs(relative / scale @ found - 1.0)
        weight = 1.0 / np.sqrt(np.maximum(error, NEAR))
    return found / scale


def _carry(log_error: Floats, odd: Floats) -> Floats:
    """Exponents by ridge regression towards `CARRY` in all, between 0 and 1; robust as the rest."""
    prior = np.full(odd.shape[1], CARRY / odd.shape[1])
    weight = np.ones(len(odd))
    strength = CARRY_WORTH * max(float(np.mean(odd**2)), 1e-6)
    found = prior
    for _ in range(20):
        weighted = odd * weight[:, None]
        left = weighted.T @ odd + strength * np.mean(weight) * np.eye(odd.shape[1])
        found = prior + np.linalg.solve(left, weighted.T @ (log_error - odd @ prior))
        weight = 1.0 / np.maximum(np.abs(log_error - odd @ found), NEAR)
    return np.clip(found, 0.0, 1.0)


def _spread(log_error: Floats, parameters: int) -> float:
    """The 90 % quantile of |log error|, corrected for the size of the sample and for what the fit took from it."""
    count = len(log_error)
    level = min(1.0, 0.9 * (count + 1) / count)
    freedom = math.sqrt(count / (count - parameters)) if count > parameters else 3.0
    return max(0.05, float(np.quantile(np.abs(log_error), level)) * freedom)
