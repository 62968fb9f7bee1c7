"""Searches under a latency limit, and what they return measured again.

Small searches on scikit-learn's digits, which price every candidate by a model calibrated for their space: `latency_ms <= L`,
for several limits and seeds. The networks each returns (its front) are measured once more, all in one measuring run: how many are
over their limit by more than 5 %? Start with `returned_again`.

Searches of this size take half a minute each: one epoch of training, on images of 8 x 8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.latency.calibrated import cache_at
from hw_models.measure import Measurer
from hw_models.tables import cache_folder
from ops.plan import lower
from ops.runtime import Runtime

__all__ = ["OVER", "figures", "returned_again"]

OVER = 0.05
CONFIG = Path(__file__).resolve().parents[2] / "runs/configs/quickstart.toml"
CALIBRATION_S = 60.0
SEEDS = (0, 1)
QUANTILES = (0.3, 0.5, 0.7)  # of the space's latencies, for the limits
SPACE: dict[str, Any] = {"space.stages": 3, "space.stem": 16, "space.widths": [16, 32, 64]}
SETTINGS: dict[str, Any] = {
    **SPACE,
    "latency.model": "predict",
    "run.workers": 0,
    "search.searchers": ["random", "nsga2"],
    "search.trials": 40,
    "search.dense_baselines": 0,
    "train.epochs": 1,
    "final.export": False,
}

Say = Callable[[float, float, str], None]


def returned_again(store: Path, threads: int, say: Say, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Search, and measure again.

    Args:
        store: folder of the benchmark; finished searches in it are not repeated.
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
        limits_ms = _calibrate(threads, say)
        rows: list[dict[str, Any]] = []
        networks: list[tuple[nn.Module, torch.Tensor]] = []
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
                networks.append((run.build(trial), run.example_input()))
                rows.append({"limit_ms": limit, "seed": seed, "trial": trial, "latency_ms": float(row["latency_ms"])})
        say(0, 1, f"measuring {len(networks)} returned networks again")
        again_ms = _measured(networks, threads)
    frame = pd.DataFrame(rows, columns=["limit_ms", "seed", "trial", "latency_ms"])
    frame["again_ms"] = again_ms
    return frame.assign(over=frame["again_ms"] / frame["limit_ms"] - 1)


def figures(found: pd.DataFrame) -> dict[str, float]:
    """Share of the returned networks over their limit by more than 5 %, the worst, and how many there are."""
    over = found["over"].astype(float)
    return {"over_share": float((over > OVER).mean()), "worst": float(over.max()), "n": float(len(over))}


def _measured(networks: Sequence[tuple[nn.Module, torch.Tensor]], threads: int) -> list[float]:
    """Whole times, ms, in one measuring run, on the kernels the model chooses: what the search priced."""
    from hw_models.predictor import choose_kernels, load_predictor

    model = load_predictor(threads)
    assert model is not None
    calls: dict[str, Callable[[], object]] = {}
    for module, x in networks:
        runtime = Runtime(choose_kernels(lower(module, x), model), threads)
        calls[f"returned network {len(calls)}"] = partial(runtime, x)
    return [one.floor_ms for one in Measurer(threads=threads).measure(calls).values()] if calls else []


def _calibrate(threads: int, say: Say) -> list[float]:
    """Once, what `nas calibrate --space CONFIG` does; returns limits, ms: `QUANTILES` of what the model says of the space."""
    from hw_models.calibrate import calibrate
    from hw_models.predictor import choose_kernels, load_predictor
    from nas.config import load_config
    from nas.space_networks import SpaceNetworks

    config = load_config(CONFIG, SPACE)
    if load_predictor(threads) is None:
        candidates = SpaceNetworks(config, CONFIG.parent, count=20 + round(CALIBRATION_S))
        calibrate(CALIBRATION_S, candidates=candidates, threads=threads, progress=say)
    limits = Path(cache_folder()) / "limits_ms.json"  # kept: finished searches are found by their limit
    if not limits.exists():
        model = load_predictor(threads)
        assert model is not None
        some = SpaceNetworks(config, CONFIG.parent, count=40)
        ms = [model.predict(choose_kernels(lower(module, x), model)).ms for _, module, x in some]
        limits.write_text(json.dumps([float(f"{limit:.2g}") for limit in np.quantile(ms, QUANTILES)]))
    found: list[float] = json.loads(limits.read_text())
    return found
