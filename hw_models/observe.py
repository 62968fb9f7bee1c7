"""Measured networks as rows for the store and for fitting: `observe`.

Start with `observe`; `hw_models.store.MeasurementStore.add_networks` keeps what it returns, and
`hw_models.predictor.Predictor.fit` learns from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from hw_models.insitu import InPlace, measure_in_place
from hw_models.measure import Measurer
from hw_models.workload import Workload, workload
from ops.plan import Plan
from ops.runtime import Runtime
from ops.schedule import Schedule

__all__ = ["Observed", "digest_of", "observe"]


@dataclass(frozen=True, eq=False)
class Observed:
    """Measured networks.

    Attributes:
        steps: one row per distinct step and network: `hw_models.workload.STEP_COLUMNS`, ms, lo_ms, hi_ms (of one execution in
            place), network (index of `networks`), count (executions per network), quality.
        networks: one row per network: `hw_models.workload.NETWORK_COLUMNS`, ms, lo_ms, hi_ms, median_ms, p90_ms, quality, sum_ms,
            threads, group, digest.
        rounds: by index of `networks`: "whole" float[rounds] and "steps" float[rounds, executed steps], ms.
    """

    steps: pd.DataFrame
    networks: pd.DataFrame
    rounds: dict[int, dict[str, npt.NDArray[np.float64]]] = field(repr=False)


def observe(
    networks: Mapping[str, tuple[Runtime, torch.Tensor]],
    measurer: Measurer | None = None,
    groups: Sequence[str] | None = None,
) -> Observed:
    """Measure networks against each other, whole and step by step.

    Args:
        networks: by name, runtime and example input.
        measurer: settings; default the full protocol at the runtimes' threads.
        groups: of each network, what to leave out together later; default its name.

    Raises:
        MeasurementError: a network failed while it was timed; it is named.
        ValueError: not one group per network, or runtimes of different numbers of threads.
    """
    if groups is not None and len(groups) != len(networks):
        raise ValueError(f"{len(networks)} networks need as many groups, got {len(groups)}")
    threads = {runtime.threads for runtime, _ in networks.values()}
    if len(threads) > 1:
        raise ValueError(f"networks of one measuring run need the same number of threads, got {sorted(threads)}")
    count = threads.pop() if threads else 1
    measured = measure_in_place(networks, measurer or Measurer(threads=count))
    work = workload([runtime.schedule for runtime, _ in networks.values()], list(networks))
    steps, rows, rounds = [], [], {}
    for k, (name, found) in enumerate(measured.items()):
        steps.append(_steps(work, k, found))
        rows.append(_network(found, digest_of(networks[name][0].schedule), groups[k] if groups else name, count))
        rounds[k] = {"whole": np.asarray(found.whole.rounds), "steps": found.step_rounds}
    frame = pd.concat([work.networks, pd.DataFrame(rows)], axis=1)
    return Observed(pd.concat(steps, ignore_index=True) if steps else work.steps, frame, rounds)


def digest_of(plan: Plan | Schedule) -> str:
    """16 hex digits, the same for networks that execute the same steps."""
    work = workload([plan])
    text = "\n".join(work.steps["key"].iloc[work.ids]) + f"\n{work.networks['batch'].iloc[0]}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _steps(work: Workload, k: int, found: InPlace) -> pd.DataFrame:
    """The distinct steps of one network: the mean over the times each is executed."""
    ids = work.of(k)
    distinct, inverse, count = np.unique(ids, return_inverse=True, return_counts=True)
    ms = np.bincount(inverse, np.maximum(found.step_ms, 1e-6)) / count
    # how far the rounds are apart, as for whole networks: the low end is the floor itself
    spread = np.percentile(found.step_rounds, 75, axis=0) / np.maximum(found.step_ms, 1e-6)
    high = ms * np.maximum(np.bincount(inverse, spread) / count, 1.0)
    columns: dict[str, Any] = {
        "ms": ms,
        "lo_ms": ms,
        "hi_ms": high,
        "network": k,
        "count": count.astype(float),
        "quality": found.whole.quality,
    }
    return work.steps.iloc[distinct].reset_index(drop=True).assign(**columns)


def _network(found: InPlace, digest: str, group: str, threads: int) -> dict[str, Any]:
    whole = found.whole
    return {
        "ms": whole.floor_ms,
        "lo_ms": max(whole.lo_ms, 1e-6),  # 0 where the rounds disagree by all of the time
        "hi_ms": whole.hi_ms,
        "median_ms": whole.median_ms,
        "p90_ms": whole.p90_ms,
        "quality": whole.quality,
        "sum_ms": float(np.sum(found.step_ms)),
        "threads": threads,
        "group": group,
        "digest": digest,
    }
