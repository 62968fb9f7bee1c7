"""What callers give to `hw_models.foreign`: times in whatever shape, put beside their networks, and splits for self-tests.

Start with `matched(operations, latency_ms)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["folds_of", "matched"]

Floats = NDArray[np.float64]
MOST_FOLDS = 10


def matched(operations: pd.DataFrame, latency_ms: Any) -> tuple[pd.DataFrame, Floats]:
    """The operations of networks that have a time, and the times in their order of first appearance."""
    if not isinstance(operations, pd.DataFrame) or not len(operations):
        raise ValueError("operations must be a DataFrame with one row per operation, and not empty")
    column = next(
        (c for c in operations.columns if str(c).strip().lower() in ("network", "net", "model", "arch")), None
    )
    if column is None:
        raise ValueError(f"operations need a column 'network', got columns {', '.join(map(str, operations.columns))}")
    names = pd.Index(operations[column].unique())
    times = _by_network(latency_ms, names, "latency_ms")
    strange = times.index.difference(names)
    if len(strange):
        raise ValueError(f"latency_ms: network {strange[0]!r} has no operations ({len(strange)} such networks)")
    known = operations[operations[column].isin(times.index)]
    present = pd.Index(known[column].unique())
    ms = pd.to_numeric(times.reindex(present)).to_numpy(float)
    bad = ~np.isfinite(ms) | (ms <= 0)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"latency_ms: times must be finite and above 0, got {ms[at]} for network {present[at]!r} "
            f"({int(bad.sum())} such of {len(ms)}); leave these networks out, e.g. latency_ms[latency_ms > 0]"
        )
    return known, ms


def _by_network(values: Any, names: pd.Index, what: str) -> pd.Series:
    """A Series by network from whatever was given."""
    if isinstance(values, pd.DataFrame):
        if values.shape[1] != 1:
            raise ValueError(f"{what}: one column is needed, got {', '.join(map(str, values.columns))}")
        values = values.iloc[:, 0]
    if isinstance(values, Mapping):
        values = pd.Series(dict(values))
    if isinstance(values, pd.Series):
        if values.index.has_duplicates:
            twice = values.index[values.index.duplicated()][0]
            raise ValueError(f"{what}: network {twice!r} appears twice; take one of its values, or their median")
        return values
    listed = np.asarray(values).reshape(-1)
    if len(listed) != len(names):
        raise ValueError(
            f"{what}: a plain sequence needs one value per network in order of first appearance, got {len(listed)} for "
            f"{len(names)} networks; give a Series by network instead"
        )
    return pd.Series(listed, index=names)


def folds_of(networks: pd.Index, groups: Any, seed: int) -> NDArray[np.int64]:
    """int[n]: networks of one group share a number; at most ten numbers, all about equally often."""
    rng = np.random.default_rng(seed)
    n = len(networks)
    if groups is None:
        return (rng.permutation(n) % (n if n <= 2 * MOST_FOLDS else MOST_FOLDS)).astype(np.int64)
    label = _by_network(groups, networks, "groups")
    missing = networks.difference(label.index)
    if len(missing):
        raise ValueError(f"groups: network {missing[0]!r} has none ({len(missing)} such networks)")
    code, names = pd.factorize(label.loc[networks])
    size = np.bincount(code)
    load = np.zeros(min(MOST_FOLDS, len(names)))
    place = np.zeros(len(names), dtype=np.int64)
    for group in np.argsort(-size, kind="stable"):  # the largest first, each to the emptiest fold
        place[group] = int(np.argmin(load))
        load[place[group]] += size[group]
    return place[code]
