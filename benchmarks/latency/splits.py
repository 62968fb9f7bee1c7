"""Who is predicted from whom: folds by architecture, and what of a network the others have in common with it.

Start with `folds`; `known_share` tells networks of known shapes from others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from hw_models.workload import Workload

__all__ = ["KNOWN", "UNSEEN", "curves_of", "folds", "known_share"]

# Shares of a network's time: its shapes count as known from the one on, and as unseen up to the other.
KNOWN, UNSEEN = 0.99, 0.5


def folds(groups: Sequence[str], count: int) -> npt.NDArray[np.int64]:
    """The fold of each network: all of a group in one, and the groups of a setting (the text before "/") spread evenly.

    Args:
        groups: "<setting>/<architecture>" of each network.
        count: of folds, at least 2.

    Raises:
        ValueError: fewer than two folds, or fewer groups than folds.
    """
    if not 2 <= count <= len(set(groups)):
        raise ValueError(f"expected 2 to {len(set(groups))} folds (as many as architectures), got {count}")
    order = sorted(set(groups), key=lambda group: (group.partition("/")[0], hashlib.sha256(group.encode()).hexdigest()))
    place = {group: i % count for i, group in enumerate(order)}
    return np.array([place[group] for group in groups], np.int64)


def curves_of(work: Workload, chosen: npt.NDArray[np.bool_]) -> set[str]:
    """The shapes of some networks. Two steps have the same shape if they have the same `curve`: all but the density is equal.

    Args:
        work: all networks.
        chosen: bool[networks].
    """
    curves = work.steps["curve"].to_numpy()
    return {str(curve) for network in np.flatnonzero(chosen) for curve in curves[work.of(int(network))]}


def known_share(
    work: Workload, step_ms: Sequence[npt.NDArray[np.float64]], known: Collection[str]
) -> npt.NDArray[np.float64]:
    """For each network the share of its time in steps of known shapes.

    Args:
        work: all networks.
        step_ms: per network float[executed steps].
        known: shapes, as `curves_of` gives them.
    """
    there = work.steps["curve"].isin(known).to_numpy()
    shares = [float(ms[there[work.of(i)]].sum() / max(ms.sum(), 1e-30)) for i, ms in enumerate(step_ms)]
    return np.array(shares)
