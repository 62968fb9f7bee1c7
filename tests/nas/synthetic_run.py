"""A run made of thin air for tests of what reads runs: the attributes of `nas.run.Run`, no folder needed, no training.

Numbers are drawn from plausible laws (more weights: more accurate and slower); nothing here is a measurement.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx as nx
import pandas as pd

from nas.errors import RunError
from nas.frames import trials_frame
from nas.store import Trial
from search_spaces.architecture import Architecture

OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}
TRACEBACK = """Traceback (most recent call last):
  File "network.py", line 12, in forward
    return self.head(x)
RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x<120> and 84x10)"""


class SyntheticRun:
    """What the report reads of a run; every part can be replaced by a test."""

    def __init__(self, trials: list[Trial], objectives: dict[str, str] | None = None) -> None:
        self.trials = trials
        self.space = SimpleNamespace(name="mlp", graph=lambda architecture: cell_graph())
        self.objectives = dict(objectives or OBJECTIVES)
        self.constraints: dict[str, str] = {"latency_ms": "<= 0.4"}
        self.config: Any = {
            "run": {"name": "synthetic", "seed": 0, "workers": 2},
            "data": {"name": "digits", "validation": 0.15},
            "space": {"name": "mlp", "widths": [32, 64, 128, 256]},
            "search": {"searchers": ["random", "nsga2"], "trials": max(1, len(trials) // 2), "dense_baselines": 2},
            "objectives": self.objectives,
            "constraints": self.constraints,
            "train": {"epochs": 12, "lr": 0.1},
        }
        self.name = "synthetic"
        self.folder = Path("runs/synthetic")
        self.finished = all(trial.finished for trial in trials)
        self.environment: dict[str, Any] = {"torch": "2.13.0", "cpu": "a CPU", "threads": 1}

    def frame(self) -> pd.DataFrame:
        return trials_frame(self.trials)

    def trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.trial == number)

    def meta(self, key: str, default: Any = None) -> Any:
        facts = {"name": "digits", "input_shape": [64], "classes": 10}
        return facts if key == "data" else default

    def plan_frame(self, number: int) -> pd.DataFrame:
        if self.trial(number).state not in ("complete", "infeasible"):
            raise RunError(f"trial {number} has no plan")
        return mlp_plan(self.trial(number).architecture)

    def curve(self, number: int) -> list[dict[str, Any]]:
        trial = self.trial(number)
        if trial.state != "complete":
            return []
        final = float(trial.metrics["val_accuracy"] or 0.0)
        return [
            {
                "epoch": epoch,
                "train_loss": 2.3 * math.exp(-epoch / 4) + 0.05,
                "val_loss": 2.3 * math.exp(-epoch / 4) + 0.1,
                "train_accuracy": min(1.0, final + 0.02) * (1 - math.exp(-epoch / 2.5)),
                "val_accuracy": final * (1 - math.exp(-epoch / 2.5)),
                "lr": 0.1 * (1 - epoch / 13),
                "density": 1.0,
                "seconds": 0.4,
            }
            for epoch in range(1, 13)
        ]


def synthetic_run(
    n: int = 24, *, failed: float = 0.08, infeasible: float = 0.1, seed: int = 0, unfinished: int = 0, dense: int = 2
) -> SyntheticRun:
    """`n` trials of two searchers, taking turns, and `dense` baselines; the last `unfinished` are still under way."""
    rng = random.Random(seed)
    trials = []
    for number in range(n + dense):
        searcher = "dense" if number >= n else ("random", "nsga2")[number % 2]
        architecture = sample(rng)
        index = number - n if searcher == "dense" else number // 2
        state = "complete"
        if searcher != "dense":
            state = "failed" if rng.random() < failed else "infeasible" if rng.random() < infeasible else "complete"
        if number >= n + dense - unfinished:
            state = "running" if number % 2 else "proposed"
        trials.append(make_trial(number, searcher, index, state, architecture, rng))
    return SyntheticRun(trials)


def sample(rng: random.Random) -> Architecture:
    """A random network of one to three hidden layers."""
    decisions: dict[str, Any] = {"depth": rng.choice([1, 2, 3])}
    for i in range(decisions["depth"]):
        decisions[f"layer{i}.width"] = rng.choice([32, 64, 128, 256])
        decisions[f"layer{i}.density"] = rng.choice([1.0, 0.5, 0.25, 0.1, 0.05])
        if decisions[f"layer{i}.density"] < 1:
            decisions[f"layer{i}.pattern"] = "2:4" if decisions[f"layer{i}.density"] == 0.5 else "unstructured"
    digest = hashlib.sha256(repr(decisions).encode()).hexdigest()[:16]
    return Architecture("mlp", tuple(decisions.items()), digest)


def make_trial(
    number: int,
    searcher: str,
    index: int,
    state: str,
    architecture: Architecture,
    rng: random.Random | None = None,
    **metrics: Any,
) -> Trial:
    """One trial with plausible metrics; `metrics` replace them."""
    rng = rng or random.Random(number)
    plan = mlp_rows(architecture)
    nnz, params = sum(row["nnz"] for row in plan), sum(row["dense_macs"] for row in plan)
    found: dict[str, Any] = {}
    if state in ("complete", "infeasible"):
        latency = sum(row["ms"] for row in plan) * rng.uniform(0.97, 1.05)
        found = {
            "params": params,
            "nnz": nnz,
            "density": nnz / params,
            "weight_bytes": 4 * nnz + params // 8,
            "dense_macs": params,
            "macs": nnz,
            "latency_ms": latency,
            "latency_lo_ms": latency * 0.985,
            "latency_hi_ms": latency * 1.02,
            "latency_source": "measured",
            "latency_quality": "ok" if rng.random() < 0.93 else "thin",
        }
    if state == "complete":
        skill = 0.004 * index / (index + 10) if searcher == "nsga2" else 0.0
        accuracy = 0.985 - 0.45 / (nnz / 150) ** 0.55 + skill + rng.gauss(0, 0.006)
        found["val_accuracy"] = max(0.1, min(0.997, round(accuracy * 540) / 540))
    return Trial(
        trial=number,
        searcher=searcher,
        index=index,
        state=state,  # type: ignore[arg-type]
        architecture=architecture,
        digest=architecture.digest,
        seed=0,
        epochs=12,
        attempts=0 if state == "proposed" else 1,
        metrics={**found, **metrics},
        violations={"latency_ms": 0.3} if state == "infeasible" else {},
        error=TRACEBACK if state == "failed" else None,
        duration_s=rng.uniform(2, 9) if state in ("complete", "failed", "infeasible") else None,
    )


def mlp_plan(architecture: Architecture) -> pd.DataFrame:
    """What the plan of an `mlp` architecture looks like: one linear operation per layer."""
    return pd.DataFrame(mlp_rows(architecture))


def mlp_rows(architecture: Architecture) -> list[dict[str, Any]]:
    """The rows of `mlp_plan`."""
    rows, features = [], 64
    for i in range(int(architecture["depth"])):
        width = int(architecture[f"layer{i}.width"])
        density = float(architecture[f"layer{i}.density"]) if f"layer{i}.density" in architecture else 1.0
        pattern = str(architecture[f"layer{i}.pattern"]) if f"layer{i}.pattern" in architecture else ""
        rows.append(plan_row(f"{1 + 3 * i}", "linear", (width, features), (1, width), density, pattern, post="relu"))
        features = width
    rows.append(plan_row(f"{1 + 3 * len(rows)}", "linear", (10, features), (1, 10)))
    return rows


def plan_row(
    name: str,
    kind: str,
    weight: tuple[int, ...],
    output: tuple[int, ...],
    density: float = 1.0,
    pattern: str = "",
    *,
    post: str = "",
    stride: int = 1,
    inputs: str = "",
) -> dict[str, Any]:
    """One operation as a plan.csv holds it."""
    n = math.prod(weight) if weight else 0
    positions = math.prod(output[2:]) if weight else 0
    nnz = n - math.floor((1 - density) * n)
    dense_ms = 0.002 + n * positions * 1.1e-7
    sparse_ms = 0.002 + nnz * positions * 6e-7
    kernel = "portable" if density < 1 and sparse_ms < dense_ms else "torch"
    return {
        "op": name,
        "kind": kind,
        "input": "",
        "output": "x".join(map(str, output)),
        "weight": "x".join(map(str, weight)),
        "stride": f"{stride}x{stride}" if len(weight) == 4 else "",
        "groups": 1,
        "pattern": pattern if density < 1 else "",
        "density": density,
        "nnz": nnz,
        "macs": nnz * positions,
        "dense_macs": n * positions,
        "kernel": kernel,
        "post_ops": post,
        "inputs": inputs,
        "ms": sparse_ms if kernel == "portable" else dense_ms,
        "dense_ms": dense_ms if weight else float("nan"),
    }


def residual_plan(stages: int = 3, blocks: int = 10, width: int = 16) -> pd.DataFrame:
    """A residual network of 3 * stages * blocks + 3 operations, with skip connections."""
    rows = [plan_row("stem", "conv2d", (width, 3, 3, 3), (1, width, 32, 32), post="relu", inputs="0")]
    channels, size = width, 32
    for stage in range(stages):
        for block in range(blocks):
            name, new = f"stage{stage}.block{block}", width * 2**stage
            stride = 2 if stage and not block else 1
            size //= stride
            shape, sparse, before = (1, new, size, size), ((1.0, 0.25, 0.05)[stage], "unstructured"), len(rows)
            weight = (new, channels, 3, 3)
            first = plan_row(
                f"{name}.conv1", "conv2d", weight, shape, *sparse, post="relu", stride=stride, inputs=f"{before}"
            )
            second = plan_row(f"{name}.conv2", "conv2d", (new, new, 3, 3), shape, *sparse, inputs=f"{before + 1}")
            added = plan_row(f"{name}/add", "add", (), shape, inputs=f"{before + 2} {before}", post="relu")
            rows += [first, second, added]
            channels = new
    rows.append(plan_row("pool", "mean", (), (1, channels), inputs=f"{len(rows)}"))
    rows.append(plan_row("head", "linear", (10, channels), (1, 10), inputs=f"{len(rows)}"))
    return pd.DataFrame(rows)


def cell_graph() -> nx.DiGraph:
    """A DARTS-like cell: two inputs, four nodes of two operations each, one output."""
    graph = nx.DiGraph()
    for name in ("c[k-2]", "c[k-1]"):
        graph.add_node(name, label=name)
    wiring = [("c[k-2]", "c[k-1]"), ("c[k-2]", "n0"), ("c[k-1]", "n0"), ("n0", "n1")]
    kinds = ("sep_conv_3x3", "skip_connect", "dil_conv_5x5", "max_pool_3x3")
    for i, sources in enumerate(wiring):
        graph.add_node(f"n{i}", label="add")
        for j, source in enumerate(sources):
            op = f"n{i}.op{j}"
            graph.add_node(op, label=kinds[(i + j) % 4])
            graph.add_edge(source, op, weight=1)
            graph.add_edge(op, f"n{i}", weight=1)
    graph.add_node("out", label="concat")
    for i in range(4):
        graph.add_edge(f"n{i}", "out", weight=1)
    return graph
