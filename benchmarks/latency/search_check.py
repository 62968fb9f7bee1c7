"""Searches under a latency limit, and what they return measured again.

Small searches on scikit-learn's digits, which price every candidate by a model calibrated for their space: `latency_ms <= L`,
for several limits and seeds. The networks each returns (its front) are measured once more, all in one measuring run: how many are
over their limit by more than 5 %? Start with `returned_again`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks.latency.calibrated import cache_at
from hw_models.latency import measure_many
from hw_models.measure import Measurer

__all__ = ["OVER", "figures", "returned_again"]

OVER = 0.05
CONFIG = Path(__file__).resolve().parents[2] / "runs/configs/quickstart.toml"
CALIBRATION_S = 60.0
SEEDS = (0, 1)
SETTINGS: dict[str, Any] = {
    "latency.model": "predict",
    "run.workers": 0,
    "search.searchers": ["random", "nsga2"],
    "search.trials": 40,
    "search.dense_baselines": 0,
    "train.epochs": 1,
    "final.export": False,
}

Say = Callable[[float, float, str], None]


def returned_again(
    store: Path, limits_ms: Sequence[float], threads: int, say: Say, seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """Search, and measure again.

    Args:
        store: folder of the benchmark; finished searches in it are not repeated.
        limits_ms: on latency_ms.
        threads: of the networks.
        say: told what is being done.
        seeds: a search for each limit and seed.

    Returns:
        A row per returned network: limit_ms, seed, trial, latency_ms (as the run hands it out), again_ms, over (again_ms /
        limit - 1).
    """
    from nas.driver import search  # late: only here does the benchmark need the search

    folder = store / "search"
    with cache_at(folder / "cache"):
        _calibrate(threads, say)
        rows: list[dict[str, Any]] = []
        networks: dict[int, tuple[nn.Module, torch.Tensor]] = {}
        runs = [(limit, seed) for limit in limits_ms for seed in seeds]
        for i, (limit, seed) in enumerate(runs):
            say(i, len(runs), f"search under {limit:g} ms, seed {seed}")
            overrides = {
                **SETTINGS,
                "run.seed": seed,
                "latency.threads": threads,
                "constraints.latency_ms": f"<= {limit:g}",
            }
            run = search(CONFIG, overrides=overrides, out=folder / f"{limit:g}ms-seed{seed}-t{threads}", quiet=True)
            for row in run.pareto().to_dict("records"):
                trial = int(row["trial"])
                networks[len(rows)] = (run.build(trial), run.example_input())
                rows.append({"limit_ms": limit, "seed": seed, "trial": trial, "latency_ms": float(row["latency_ms"])})
        say(0, 1, f"measuring {len(networks)} returned networks again")
        measured = measure_many(networks, threads=threads, measurer=Measurer(threads=threads)) if networks else {}
    frame = pd.DataFrame(rows, columns=["limit_ms", "seed", "trial", "latency_ms"])
    frame["again_ms"] = [measured[i].ms for i in range(len(rows))]
    return frame.assign(over=frame["again_ms"] / frame["limit_ms"] - 1)


def figures(found: pd.DataFrame) -> dict[str, float]:
    """Share of the returned networks over their limit by more than 5 %, the worst, and how many there are."""
    over = found["over"].astype(float)
    return {"over_share": float((over > OVER).mean()), "worst": float(over.max()), "n": float(len(over))}


def _calibrate(threads: int, say: Say) -> None:
    """Once: what `nas calibrate --space CONFIG` does."""
    from hw_models.calibrate import calibrate
    from hw_models.predictor import load_predictor
    from nas.config import load_config
    from nas.space_networks import SpaceNetworks

    if load_predictor(threads) is None:
        config = load_config(CONFIG)
        candidates = SpaceNetworks(config, CONFIG.parent, count=20 + round(CALIBRATION_S))
        calibrate(CALIBRATION_S, candidates=candidates, threads=threads, progress=say)
