"""Two small regressions stored as arrays: sums of work with non-negative prices, and a smooth correction with an error bar.

`NonNegative` prices work: milliseconds as a sum of counts times prices that cannot be negative, fitted to errors in log time and
drawn towards given prices where data are few. `GaussianProcess` is for what such a sum leaves over, in log space: where it has
seen nothing alike it answers 0 and says that it does not know.

Both are fitted and asked with numpy arrays and know nothing of operations; `hw_models.step_model` puts them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["GaussianProcess", "NonNegative"]

Floats = NDArray[np.float64]
ROUNDS = 8  # of reweighting


@dataclass(frozen=True, eq=False)
class NonNegative:
    """Prices of work.

    Attributes:
        prices: float64[features], all >= 0, in ms per unit of each feature.
    """

    prices: Floats

    @classmethod
    def fit(
        cls,
        work: ArrayLike,
        ms: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        prior: ArrayLike | None = None,
        shrink: float = 0.0,
        robust: float = 0.0,
    ) -> NonNegative:
        """Minimise the weighted mean of log(work @ prices / ms)^2 over prices >= 0.

        Args:
            work: float[n, features], counts of work, not negative.
            ms: float[n], positive.
            weights: float[n], how much each row matters; default all alike.
            prior: float[features], prices to be drawn towards; default 0.
            shrink: how many average rows a doubling of one price weighs as much as; 0 means not at all.
            robust: beyond this error in log time a row counts linearly instead of quadratically (Huber), 0 means never.

        Raises:
            ValueError: unequal lengths, no rows, times that are not positive, work that is negative or not finite.

        Source: non-negative least squares, Lawson and Hanson 1974, chapter 23, on rows divided by their time and reweighted.
        """
        from scipy.optimize import nnls

        x, t = np.asarray(work, dtype=float), np.asarray(ms, dtype=float)
        w = np.ones_like(t) if weights is None else np.asarray(weights, dtype=float)
        if x.ndim != 2 or not (len(x) == len(t) == len(w) and len(t)):
            raise ValueError(f"work must be [n, features] with n times and weights, got {x.shape, t.shape, w.shape}")
        if not (np.isfinite(t).all() and (t > 0).all()):
            raise ValueError("ms must be positive and finite")
        if not (np.isfinite(x).all() and (x >= 0).all()):
            raise ValueError("work must be finite and not negative")
        start = np.zeros(x.shape[1]) if prior is None else np.asarray(prior, dtype=float)
        w = w / w.mean() / len(w)
        relative = x / t[:, None]
        scale = np.sqrt((w[:, None] * relative**2).sum(0))  # of a row's time, what a price of one makes
        scale[scale == 0] = 1.0
        pull = math.sqrt(shrink / len(t)) * np.eye(x.shape[1])
        prices, now = start, w
        for _ in range(ROUNDS):
            root = np.sqrt(now)
            a = np.concatenate([root[:, None] * relative / scale, pull])
            b = np.concatenate([root, pull @ (start * scale)])
            prices = nnls(a, b, maxiter=50 * x.shape[1])[0] / scale
            # Weights with which the squares of ratio - 1 have the slope of the squares of log(ratio).
            ratio = np.clip(relative @ prices, 0.02, 50.0)
            off = np.where(np.abs(ratio - 1) < 1e-6, 1e-6, ratio - 1)
            now = w * np.log1p(off) / off / ratio
            if robust:
                now *= np.minimum(1.0, robust / np.maximum(np.abs(np.log(ratio)), 1e-12))
        return cls(prices)

    def predict(self, work: ArrayLike) -> Floats:
        """float[n] ms of float[n, features]."""
        return np.asarray(np.asarray(work, dtype=float) @ self.prices)

    def to_arrays(self) -> dict[str, Floats]:
        """For an NPZ file."""
        return {"prices": self.prices}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> NonNegative:
        """The model `to_arrays` was called on; KeyError if an array is missing."""
        return cls(np.asarray(arrays["prices"], dtype=float))


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """Smooth regression with one length scale per feature and mean zero.

    Covariance: signal^2 (1 + sqrt5 r + 5/3 r^2) exp(-sqrt5 r), r the distance in units of the scales (Matern 5/2), and noise^2 /
    weight on the diagonal.

    Attributes:
        points: float64[n, features], standardised and divided by the length scales.
        alpha: float64[n], covariance^-1 targets.
        diagonal: float64[n], what is added to the diagonal of the covariance.
        factor: float64[n, n], inverse of the Cholesky factor of the covariance; made again when arrays are read.
        shift, scale: float64[features]; a feature enters as (x - shift) * scale.
        signal, noise: standard deviations.
    """

    points: Floats
    alpha: Floats
    diagonal: Floats
    factor: Floats
    shift: Floats
    scale: Floats
    signal: float
    noise: float

    @classmethod
    def fit(
        cls,
        x: ArrayLike,
        y: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        seed: int = 0,
        tuned_on: int = 350,
        like: GaussianProcess | None = None,
        limit: int = 800,
    ) -> GaussianProcess:
        """Fit by the largest posterior of the scales, then condition on the rows.

        Args:
            x: float[n, features], finite. Features that do not vary are ignored.
            y: float[n], centred.
            weights: float[n]; the noise variance of a row is noise^2 / weight. Default 1.
            seed: of the rows chosen where there are more than are used.
            tuned_on: scales are tuned on at most this many rows.
            like: take scales and noise from this one instead of tuning.
            limit: at most this many rows are kept (cost grows with the cube): the weightiest half, and others at random.

        Raises:
            ValueError: unequal lengths, fewer than two rows, values that are not finite.

        Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1 and eq. 5.9; log-normal priors
        on the scales keep fits on few rows sober.
        """
        data, target = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        w = np.ones_like(target) if weights is None else np.asarray(weights, dtype=float)
        if data.ndim != 2 or not (len(data) == len(target) == len(w) >= 2):
            raise ValueError(f"x must be [n >= 2, features] with n targets, got {data.shape, target.shape, w.shape}")
        if not (np.isfinite(data).all() and np.isfinite(target).all() and (w > 0).all()):
            raise ValueError("x and y must be finite and weights positive")
        rng = np.random.default_rng(seed)
        kept = _some(w, limit, rng)
        data, target, w = data[kept], target[kept], w[kept]
        if like is None:
            shift, deviation = data.mean(0), data.std(0)
            varies = deviation > 1e-9 * np.maximum(np.abs(shift), 1)
            standard = np.where(varies, 1 / np.where(varies, deviation, 1), 0.0)
            few = _some(w, tuned_on, rng)
            tuned = _tune(((data - shift) * standard)[few][:, varies], target[few], w[few])
            scale = standard.copy()
            scale[varies] /= np.exp(tuned[2:])
            signal, noise = math.exp(tuned[0]), math.exp(tuned[1])
        else:
            shift, scale, signal, noise = like.shift, like.scale, like.signal, like.noise
        points = (data - shift) * scale
        diagonal = noise**2 / w + 1e-8 * signal**2
        factor = _factor(points, signal, diagonal)
        return cls(points, factor.T @ (factor @ target), diagonal, factor, shift, scale, signal, noise)

    def predict(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """Mean and standard deviation (of the function, without noise), float[n] each, of float[n, features]."""
        data = (np.asarray(x, dtype=float) - self.shift) * self.scale
        mean, deviation = np.empty(len(data)), np.empty(len(data))
        for begin in range(0, len(data), 2048):  # bounds the memory of the distances
            piece = slice(begin, begin + 2048)
            cross = self.signal**2 * _matern(np.sqrt(_squares(data[piece], self.points)))
            mean[piece] = cross @ self.alpha
            explained = ((cross @ self.factor.T) ** 2).sum(1)
            deviation[piece] = np.sqrt(np.maximum(self.signal**2 - explained, 1e-6 * self.signal**2))
        return mean, deviation

    def to_arrays(self) -> dict[str, Floats]:
        """For an NPZ file."""
        names = ("points", "alpha", "diagonal", "shift", "scale")
        return {**{n: getattr(self, n) for n in names}, "deviations": np.array([self.signal, self.noise])}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> GaussianProcess:
        """The model `to_arrays` was called on; KeyError if an array is missing."""
        names = ("points", "alpha", "diagonal", "shift", "scale")
        points, alpha, diagonal, shift, scale = (np.asarray(arrays[n], dtype=float) for n in names)
        signal, noise = map(float, arrays["deviations"])
        return cls(points, alpha, diagonal, _factor(points, signal, diagonal), shift, scale, signal, noise)


def _factor(points: Floats, signal: float, diagonal: Floats) -> Floats:
    """Inverse of the lower Cholesky factor of the covariance."""
    from scipy.linalg import solve_triangular

    covariance = signal**2 * _matern(np.sqrt(_squares(points, points)))
    covariance[np.diag_indices_from(covariance)] += diagonal
    return np.asarray(solve_triangular(np.linalg.cholesky(covariance), np.eye(len(points)), lower=True))


def _some(weights: Floats, limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of at most `limit` rows: the weightiest half, the rest at random."""
    if len(weights) <= limit:
        return np.arange(len(weights))
    order = np.argsort(-weights, kind="stable")
    rest = rng.choice(order[limit // 2 :], limit - limit // 2, replace=False)
    return np.sort(np.concatenate([order[: limit // 2], rest]))


def _squares(a: Floats, b: Floats) -> Floats:
    """Squared distances, float[n, m] of float[n, d] and float[m, d]."""
    return np.asarray(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0))


def _matern(r: Floats) -> Floats:
    """Matern 5/2 correlation of a distance."""
    s = math.sqrt(5) * r
    return np.asarray((1 + s + s**2 / 3) * np.exp(-s))


def _tune(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Logs of signal, noise and length scales that are most probable.

    Priors: log signal ~ N(log std(y), 1), log noise ~ N(log std(y) / 5, 1), log scale ~ N(log sqrt(2 d), 1).
    """
    from scipy.linalg import cho_solve
    from scipy.optimize import minimize

    features = x.shape[1]
    deviation = max(float(y.std()), 1e-3)
    centre = np.concatenate(
        [[math.log(deviation), math.log(deviation / 5)], np.full(features, 0.5 * math.log(2 * max(features, 1)))]
    )

    def loss(theta: Floats) -> tuple[float, Floats]:
        signal, noise = np.exp(2 * theta[:2])
        z = x / np.exp(theta[2:])
        r = np.sqrt(_squares(z, z))
        correlation = _matern(r)
        covariance = signal * correlation
        covariance[np.diag_indices_from(covariance)] += noise / weights + 1e-8 * signal
        try:
            lower = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        inverse = np.asarray(cho_solve((lower, True), np.eye(len(y))))
        alpha = inverse @ y
        outer = np.outer(alpha, alpha) - inverse  # eq. 5.9: d(log likelihood) = 1/2 trace(outer dK)
        value = 0.5 * y @ alpha + np.log(np.diag(lower)).sum() + 0.5 * ((theta - centre) ** 2).sum()
        gradient = np.empty_like(theta)
        gradient[0] = -signal * (outer * correlation).sum()
        gradient[1] = -noise * (np.diag(outer) / weights).sum()
        # dK / d(log scale_j) = signal 5/3 (1 + sqrt5 r) exp(-sqrt5 r) (z_j - z'_j)^2
        s = math.sqrt(5) * r
        g = outer * (signal * 5 / 3 * (1 + s) * np.exp(-s))
        gradient[2:] = -((z**2 * g.sum(1)[:, None]).sum(0) - (z * (g @ z)).sum(0))
        return float(value), gradient + (theta - centre)

    bounds = [(math.log(1e-3), 3.0), (math.log(1e-4), 2.0), *[(-2.5, 6.0)] * features]
    start = np.clip(centre, [b[0] for b in bounds], [b[1] for b in bounds])
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}).x)
