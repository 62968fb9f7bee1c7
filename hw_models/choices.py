"""Which kernel for which layer, before anything is measured: `choose_kernels(plan, model)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hw_models.workload import Workload, workload
from ops.plan import KERNELS, LAYER_KINDS, Plan, legal_kernels

if TYPE_CHECKING:
    from hw_models.predictor import Predictor

__all__ = ["choose_kernels"]

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
