"""A machine that exists in numbers only: its steps take what a formula says, with noise, so that truth is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hw_models.probes import probe
from hw_models.workload import Workload, workload
from ops.plan import Plan, lower

BETWEEN_MS, PER_CALL_MS = 0.008, 0.001


def true_step_ms(steps: pd.DataFrame) -> np.ndarray:
    """About what an AVX-512 host takes: multiply-adds, bytes and a constant, dearer for torch."""
    dear = np.where(steps["kernel"] == "torch", 1.7, 1.0)
    fixed = np.where(steps["kernel"] == "torch", 3e-3, 2e-4)
    return np.asarray(dear * (steps["macs"] / 3e7 + (steps["in_bytes"] + steps["out_bytes"]) / 2e7) + fixed, float)


def true_network_ms(work: Workload) -> np.ndarray:
    """Whole networks on the machine, without noise."""
    between = BETWEEN_MS + PER_CALL_MS * work.networks["calls"].to_numpy(float)
    return 1.02 * work.sums(true_step_ms(work.steps)) + between


def observed(work: Workload, noise: float = 0.02, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The networks of a workload as measured on the machine: steps and networks as `Predictor.fit` takes them."""
    rng = np.random.default_rng(seed)
    ms, whole = true_step_ms(work.steps), true_network_ms(work)
    rows = []
    for k in range(len(work)):
        ids, count = np.unique(work.of(k), return_counts=True)
        seen = ms[ids] * np.exp(noise * rng.standard_normal(len(ids)))
        rows.append(work.steps.iloc[ids].assign(ms=seen, lo_ms=seen, hi_ms=seen, network=k, count=count, quality="ok"))
    steps = pd.concat(rows, ignore_index=True)
    networks = work.networks.assign(
        ms=whole * np.exp(0.3 * noise * rng.standard_normal(len(work))),
        sum_ms=(steps["ms"] * steps["count"]).groupby(steps["network"]).sum().to_numpy(),
        group=[f"network {k}" for k in range(len(work))],
    )
    return steps, networks


def some_plans(count: int, seed: int = 0) -> list[Plan]:
    """Plans of probe networks."""
    rng = random.Random(seed)
    return [lower(module, example) for _, module, example in (probe(rng) for _ in range(count))]


def some_work(count: int, seed: int = 0, plans: Sequence[Plan] | None = None) -> Workload:
    """A workload of probe networks."""
    return workload(some_plans(count, seed) if plans is None else plans)
