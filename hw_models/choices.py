"""What a latency model is asked before anything is measured: which kernel for which layer, and where sparse stops paying.

Start with `choose_kernels` and `crossovers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hw_models.workload import Workload, workload
from ops.plan import KERNELS, LAYER_KINDS, Plan, legal_kernels

if TYPE_CHECKING:
    from hw_models.predictor import Predictor

__all__ = ["choose_kernels", "crossovers"]

GRID = np.concatenate([np.geomspace(0.005, 0.1, 14)[:-1], np.linspace(0.1, 1.0, 46)])
_MAIN = ("conv", "depthwise", "linear", "pair")


def choose_kernels(plan: Plan, model: Predictor) -> Plan:
    """The plan with the kernels under which the model expects it to be fastest.

    Three ways are priced: every layer on its fastest kernel, every layer that can on its fastest sparse one (leaving a run of
    sparse layers costs conversions, which no layer's own time shows), and everything dense.

    Args:
        plan: with any kernels.
        model: of the machine it is to run on.
    """
    times = _layer_times(plan, model)
    if not times:
        return plan
    fastest = {name: min(of, key=of.__getitem__) for name, of in times.items()}
    sparse = {
        name: min((k for k in of if k != "torch"), key=of.__getitem__, default="torch") for name, of in times.items()
    }
    ways = [plan.with_kernels(way) for way in (fastest, sparse, dict.fromkeys(times, "torch"))]
    return ways[int(model.predict_many(ways)["ms"].to_numpy().argmin())]


def crossovers(plan: Plan, model: Predictor) -> dict[str, float | None]:
    """For each layer the density above which it is faster dense, by the model's curves.

    Args:
        plan: as lowered.
        model: of the machine.

    Returns:
        Layer name -> density in (0, 1); None if it is as fast or faster on sparse kernels at every density; 0.0 if dense is always
        faster. Layers without a sparse kernel are left out.
    """
    layers = [op for op in plan.ops if op.kind in LAYER_KINDS and len(legal_kernels(op)) > 1]
    sparse = {op.name: op.kernel if op.kernel != "torch" else legal_kernels(op)[-1] for op in layers}
    dense = plan.with_kernels(dict.fromkeys(sparse, "torch"))
    work = workload([plan.with_kernels(sparse), dense])
    own, torch_ms = _main_steps(plan, work, 0), _main_steps(plan, work, 1)
    found: dict[str, float | None] = {}
    price, _, _ = model.price(work.steps)
    for op in layers:
        if op.name not in own or op.name not in torch_ms:
            continue
        row = work.steps.iloc[own[op.name]]
        found[op.name] = _crossing(row, model, float(price[torch_ms[op.name]]))
    return found


def _crossing(row: pd.Series, model: Predictor, dense_ms: float) -> float | None:
    """Where the sparse kernel's time, at rising density, passes the dense kernel's."""
    weights = row["nnz"] / row["density"]
    at = pd.DataFrame([row] * len(GRID)).reset_index(drop=True)
    scale = GRID * weights / max(row["nnz"], 1.0)
    for name in ("nnz", "macs", "weight_bytes"):
        at[name] = row[name] * scale
    at["density"], at["key"] = GRID, ""
    ms = np.maximum.accumulate(model.price(at)[0])
    slower = np.flatnonzero(ms > dense_ms)
    if len(slower) == 0:
        return None
    i = int(slower[0])
    if i == 0:
        return 0.0
    share = (dense_ms - ms[i - 1]) / max(ms[i] - ms[i - 1], 1e-12)
    return float(GRID[i - 1] + share * (GRID[i] - GRID[i - 1]))


def _layer_times(plan: Plan, model: Predictor) -> dict[str, dict[str, float]]:
    """Layer name -> kernel -> expected ms, for layers with more than one legal kernel."""
    layers = {op.name: legal_kernels(op) for op in plan.ops if op.kind in LAYER_KINDS}
    layers = {name: kernels for name, kernels in layers.items() if len(kernels) > 1}
    if not layers:
        return {}
    uniform = [
        plan.with_kernels({name: kernel if kernel in legal else legal[-1] for name, legal in layers.items()})
        for kernel in KERNELS
    ]
    work = workload(uniform)
    price, _, _ = model.price(work.steps)
    times: dict[str, dict[str, float]] = {name: {} for name in layers}
    for number, kernel in enumerate(KERNELS):
        for name, step in _main_steps(plan, work, number).items():
            if name in times and kernel in layers[name]:
                times[name][kernel] = float(price[step])
    return {name: of for name, of in times.items() if of}


def _main_steps(plan: Plan, work: Workload, number: int) -> dict[str, int]:
    """Operation name -> id of the step that computes it, in one network of a workload of the same plan."""
    found: dict[str, int] = {}
    kinds = work.steps["kind"].tolist()
    start = int(work.offsets[number])
    for i, step in enumerate(work.of(number)):
        op = plan.ops[int(work.ops[start + i])]
        if op.kind in LAYER_KINDS and (kinds[step] in _MAIN or kinds[step].startswith("torch.")):
            found.setdefault(op.name, int(step))
    return found
