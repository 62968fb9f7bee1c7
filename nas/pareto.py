"""Pareto fronts and hypervolumes, exact, for any number of objectives.

Plain arrays in, plain arrays out; nothing here knows what a trial is, and nothing approximates. Points with a NaN in an
objective are never on a front and dominate nothing. Start with `nondominated` and `hypervolume`; `nondomination_rank`
and `crowding_distance` are what evolution sorts by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Directions = Mapping[str, str] | Sequence[str]


def normalise_directions(directions: Directions) -> NDArray[np.float64]:
    """Turn directions into signs that make every objective one to be minimised.

    Args:
        directions: {"val_accuracy": "max", "latency_ms": "min"} or ("max", "min").

    Returns:
        float64[m]: +1 for "min", -1 for "max".

    Raises:
        ValueError: there is no direction, or one is neither "max" nor "min".
    """
    named = list(directions.items()) if isinstance(directions, Mapping) else list(enumerate(directions))
    if isinstance(directions, str) or not named:
        raise ValueError(f'directions must be a non-empty mapping or sequence of "max"/"min", got {directions!r}')
    for name, direction in named:
        if direction not in ("max", "min"):
            raise ValueError(f'the direction of objective {name!r} must be "max" or "min", got {direction!r}')
    return np.array([1.0 if direction == "min" else -1.0 for _, direction in named])


def _costs(points: Any, directions: Directions) -> NDArray[np.float64]:
    """Points as float64[n, m] to be minimised; a DataFrame's columns are picked by the names of the objectives."""
    signs = normalise_directions(directions)
    if hasattr(points, "columns"):
        if not isinstance(directions, Mapping):
            raise TypeError(f"a DataFrame needs objectives by column name, got {directions!r}")
        missing = [name for name in directions if name not in points.columns]
        if missing:
            raise ValueError(f"objectives {missing} are not columns; the columns are {list(points.columns)}")
        values = points[list(directions)].to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        values = np.asarray(points, dtype=np.float64)
        if values.size == 0:
            values = values.reshape(0, len(signs))
    if values.ndim != 2 or values.shape[1] != len(signs):
        raise ValueError(f"expected points of shape (n, {len(signs)}), one column per objective, got {values.shape}")
    return values * signs


def nondominated(points: Any, objectives: Directions) -> NDArray[np.bool_]:
    """Mark the points that no other point dominates.

    A point dominates another if it is nowhere worse and somewhere better. Equal points do not dominate each other, so
    duplicates of a front point are all on the front. Infinities compare as usual.

    Args:
        points: DataFrame with a column per objective, or float[n, m].
        objectives: direction of each column: {"column": "max" | "min"}, or for an array also ("max", ...).

    Returns:
        bool[n].

    Raises:
        ValueError: a direction or a column is unknown, or the shape does not fit.
    """
    costs = _costs(points, objectives)
    return _nondominated_costs(costs)


def _nondominated_costs(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    front = np.zeros(len(costs), dtype=bool)
    rows = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if rows.size == 0:
        return front
    if costs.shape[1] == 1:
        best = costs[rows, 0].min()
        front[rows] = costs[rows, 0] == best
    elif costs.shape[1] == 2:
        front[rows] = _nondominated_2d(costs[rows])
    else:
        unique, inverse = np.unique(costs[rows], axis=0, return_inverse=True)
        front[rows] = _nondominated_unique(unique)[inverse.reshape(-1)]
    return front


def _nondominated_2d(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Sweep along the first objective: on the front are the best of each column that also beat all columns before."""
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    x, y = costs[order, 0], costs[order, 1]
    column = np.concatenate(([0], np.cumsum(x[1:] != x[:-1])))  # which distinct value of x
    first = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    column_best = y[first]
    before = np.concatenate(([np.inf], np.minimum.accumulate(column_best)[:-1]))
    column_on_front = column_best < before
    column_on_front[0] = True  # nothing comes before it, also when its value is +inf
    front = np.empty(len(costs), dtype=bool)
    front[order] = column_on_front[column] & (y == column_best[column])
    return front


def _nondominated_unique(unique: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Distinct rows in lexicographic order: a row can only be dominated by an earlier one."""
    left = np.arange(len(unique))
    front = np.zeros(len(unique), dtype=bool)
    while left.size:
        front[left[0]] = True
        better_somewhere = (unique[left[1:]] < unique[left[0]]).any(axis=1)
        left = left[1:][better_somewhere]
    return front


def nondomination_rank(costs: ArrayLike) -> NDArray[np.int64]:
    """Front number of every point: 0 is the Pareto front, 1 the front of the rest, and so on.

    Args:
        costs: float[n, m], every objective minimised, no NaN.

    Returns:
        int64[n].

    Source: non-dominated sorting, Deb et al. 2002 (NSGA-II), section III.A.
    """
    values = np.asarray(costs, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError("ranking points with a NaN objective has no meaning; leave those points out")
    ranks = np.full(len(values), -1, dtype=np.int64)
    left = np.arange(len(values))
    rank = 0
    while left.size:
        front = _nondominated_costs(values[left])
        ranks[left[front]] = rank
        left = left[~front]
        rank += 1
    return ranks


def crowding_distance(costs: ArrayLike) -> NDArray[np.float64]:
    """How lonely each point of one front is; larger is better, the ends of each objective are infinite.

    Args:
        costs: float[n, m], points of one front.

    Returns:
        float64[n]: the sum over objectives of the gap between both neighbours, over the range of that objective.

    Source: Deb et al. 2002 (NSGA-II), section III.B.
    """
    values = np.asarray(costs, dtype=np.float64)
    distance = np.zeros(len(values))
    for column in values.T if len(values) else ():
        order = np.argsort(column, kind="stable")
        low, high = column[order[0]], column[order[-1]]
        if low == high:
            continue
        distance[order[0]] = distance[order[-1]] = np.inf
        width = high - low
        if np.isfinite(width):
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance


def hypervolume(points: ArrayLike, reference: ArrayLike, directions: Directions) -> float:
    """Volume between a set of points and a reference point: what the points dominate, counted once.

    Exact: a sweep for two objectives, slices of sweeps for three, WFG beyond. Only points better than the reference in
    every objective count; dominated points and duplicates change nothing; points with a NaN are left out.

    Args:
        points: float[n, m] in the objectives' own units; may be empty.
        reference: float[m], finite: a point that is worse than anything of interest.
        directions: "max" or "min" per objective.

    Returns:
        The volume, in the product of the objectives' units; inf if a counted point is infinitely good somewhere.

    Raises:
        ValueError: the shapes do not fit, or the reference is not finite.

    Source: While, Bradstreet, Barone 2012, "A fast way of calculating exact hypervolumes" (WFG), Algorithms 1-3.
    """
    costs = _costs(points, directions)
    ref = np.asarray(reference, dtype=np.float64)
    if ref.shape != (costs.shape[1],) or not np.isfinite(ref).all():
        raise ValueError(f"the reference must be {costs.shape[1]} finite numbers, got {ref.tolist()}")
    ref = ref * normalise_directions(directions)
    costs = costs[(costs < ref).all(axis=1)]  # NaN compares false
    if len(costs) == 0:
        return 0.0
    if np.isneginf(costs).any():
        return float("inf")
    costs = np.unique(costs[_nondominated_costs(costs)], axis=0)
    return _volume(costs, ref)


def _volume(front: NDArray[np.float64], ref: NDArray[np.float64]) -> float:
    """Volume of mutually non-dominated distinct points in lexicographic order, all better than `ref`."""
    if len(front) == 0:
        return 0.0
    if len(front) == 1 or front.shape[1] == 1:
        return float(np.prod(ref - front[0]))
    if front.shape[1] == 2:  # x ascending, so y descends: one rectangle per step of the staircase
        ends = np.concatenate((front[1:, 0], ref[:1]))
        return float(((ends - front[:, 0]) * (ref[1] - front[:, 1])).sum())
    if front.shape[1] == 3:
        return _volume_3d(front, ref)
    # WFG: the volume only point i adds to those after it, summed.
    total = 0.0
    for i, point in enumerate(front):
        limited = np.maximum(front[i + 1 :], point)  # the part of the others inside this point's box
        limited = limited[_nondominated_costs(limited)]
        total += float(np.prod(ref - point)) - _volume(np.unique(limited, axis=0), ref)
    return total


def _volume_3d(front: NDArray[np.float64], ref: NDArray[np.float64]) -> float:
    """Slices along the first objective; in each, the area of the points met so far."""
    ends = np.concatenate((front[1:, 0], ref[:1]))
    total = 0.0
    area_front = np.empty((0, 2))
    for i in range(len(front)):
        new = front[i, 1:]
        area_front = area_front[~(area_front >= new).all(axis=1)]
        at = int(np.searchsorted(area_front[:, 0], new[0]))
        if not (area_front <= new).all(axis=1).any():
            area_front = np.insert(area_front, at, new, axis=0)
        if ends[i] > front[i, 0]:
            total += float(ends[i] - front[i, 0]) * _volume(area_front, ref[1:])
    return total
