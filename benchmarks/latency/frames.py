"""Records as the frames that a predictor is fitted to.

Start with `observed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.latency.records import LEAST_MS, Record
from hw_models.workload import NETWORK_COLUMNS, Workload

__all__ = ["observed", "part"]


def observed(work: Workload, records: Sequence[Record], threads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What was measured, as `hw_models.store.MeasurementStore.add_networks` takes it.

    Args:
        work: of the networks' plans.
        records: one per network, in the same order.
        threads: of all of them.

    Returns:
        (steps, networks): a row for each distinct step of each network, ms being the mean over its `count` executions there; and a
        row per network. The index of networks, and `steps.network`, is 0, 1, ...

    Raises:
        ValueError: a record has not as many steps as the network: it is of other kernels, or of another benchmark.
    """
    rows = []
    for network, record in enumerate(records):
        ids, rounds = work.of(network), np.asarray(record.step_rounds_ns, float) / 1e6
        if rounds.shape[1] != len(ids):
            raise ValueError(
                f"{record.name}: measured with {rounds.shape[1]} steps, but its plan has {len(ids)}; the way networks are executed "
                "has changed: measure into another folder"
            )
        kinds, at = np.unique(ids, return_inverse=True)
        count = np.bincount(at)
        low, floor = record.step_ms(), np.maximum(rounds.min(axis=0), LEAST_MS)
        spread = np.bincount(at, np.percentile(rounds, 75, axis=0) / floor) / count
        ms = np.bincount(at, low) / count
        rows.append(
            work.steps.iloc[kinds].assign(
                ms=ms,
                lo_ms=ms,
                hi_ms=ms * np.maximum(spread, 1.0),
                count=count.astype(float),
                network=network,
                quality=record.quality,
            )
        )
    whole = ("ms", "lo_ms", "hi_ms", "median_ms", "p90_ms", "quality", "group")
    networks = work.networks[list(NETWORK_COLUMNS)].assign(
        threads=threads,
        sum_ms=[float(record.step_ms().sum()) for record in records],
        digest=[record.name for record in records],
        **{name: [getattr(record, name) for record in records] for name in whole},
    )
    return pd.concat(rows, ignore_index=True), networks


def part(
    steps: pd.DataFrame, networks: pd.DataFrame, chosen: npt.NDArray[np.bool_]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of some of the networks, their numbers kept.

    Args:
        steps, networks: from `observed`.
        chosen: bool[networks].
    """
    return steps[chosen[steps["network"].to_numpy()]].reset_index(drop=True), networks[chosen]
