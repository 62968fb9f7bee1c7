"""How long a network takes on this CPU: every layer gets the kernel that was measured to be faster, then the whole is measured.

The time quoted is that of the whole network as `ops.runtime.Runtime` executes it, by the full protocol of
`hw_models.measure`. Times of single steps only choose kernels and show where the time goes. Each is hot (one step alone, caches
warm) and holds about a microsecond of calling, so their sum is below the whole for deep networks and above it for tiny ones.
They are remembered in `hw_models.tables.LayerTable`.

Leaving a run of sparse layers costs two conversions of a value, which no layer's own time shows. So three plans are timed
against each other, by short measurements of the whole: every layer on its fastest kernel, every layer that can on its fastest
sparse kernel, and everything dense.

Start with `measure_latency`; `measure_many` measures several networks against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pandas as pd
import torch
from torch import nn

from hw_models.device import runtime_id
from hw_models.measure import Measurer
from hw_models.tables import LayerTable
from ops.plan import KERNELS, LAYER_KINDS, Plan, PlannedOp, legal_kernels, lower, rule_of_thumb
from ops.runtime import CONVERSIONS, Runtime
from ops.schedule import Step

__all__ = ["DENSE_FROM", "Latency", "measure_latency", "measure_many"]

# From this density on sparse kernels are not tried, but for depthwise convolutions and stems, where they may win at any. Measured
# on one thread of an AVX-512 host: at 0.5 they are 1.3 to 2.4 times as fast as torch's dense ones; a wide margin for others.
DENSE_FROM = 0.9

# Layers of fewer multiply-adds are tried all the same: there torch's call, some microseconds, is most of the time.
FEW_MACS = 2_000_000

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Latency:
    """A network's latency on this machine, for the plan's batch size.

    Attributes:
        ms: of one call, undisturbed (see `Measurement.floor_ms`).
        lo_ms, hi_ms: its 90 % interval.
        source: "measured".
        quality: "ok", "thin" or "unreached"; see `Measurement`.
        plan: what was executed, with the kernels chosen.
        parts: one row per operation: op, kind, kernel (chosen), density, nnz, macs, the time on each kernel that was tried
            (`torch_ms`, `portable_ms`, `specialised_ms`; NaN if not), ms (in the chosen plan, conversions of layout that the
            operation asks for included) and share (of the sum of ms).
        median_ms, p90_ms: under the load at the time.
        threads: CPU threads used.
    """

    ms: float
    lo_ms: float
    hi_ms: float
    source: str
    quality: str
    plan: Plan = field(repr=False)
    parts: pd.DataFrame = field(repr=False)
    median_ms: float = float("nan")
    p90_ms: float = float("nan")
    threads: int = 1


def measure_latency(
    module: nn.Module,
    example_input: torch.Tensor,
    *,
    threads: int = 1,
    table: LayerTable | None = None,
    measurer: Measurer | None = None,
) -> Latency:
    """Measure a network on this CPU.

    Sparse layers of density below `DENSE_FROM`, depthwise convolutions and stems are timed with each legal kernel on their real
    mask, unless the table has a step of the same key. Takes about 3 s with the default measurer and some 20 ms more per step
    that is new to the table.

    Args:
        module: takes one tensor; copied, never changed.
        example_input: float[batch, ...]; the latency is that of the whole batch.
        threads: CPU threads, for torch and for our kernels.
        table: remembers the times of single operations. Default: the one in the user's cache folder.
        measurer: settings; its `threads` is replaced by the argument.

    Raises:
        PlanError: the network fails on the input.
        MeasurementError: an operation failed while it was timed.
        TableError: the table's file is damaged or locked.
    """
    return measure_many({"network": (module, example_input)}, threads=threads, table=table, measurer=measurer)[
        "network"
    ]


def measure_many(
    networks: Mapping[Key, tuple[nn.Module, torch.Tensor]],
    *,
    threads: int = 1,
    table: LayerTable | None = None,
    measurer: Measurer | None = None,
) -> dict[Key, Latency]:
    """Measure several networks in one measuring run, interleaved: their order can be trusted more than separate runs'.

    Args:
        networks: (module, example input) by any key; see `measure_latency` for these and the other arguments.

    Returns:
        A latency for each, in the order given.
    """
    measurer = replace(measurer or Measurer(), threads=threads)
    table = table if table is not None else LayerTable()
    plans: dict[Key, Plan] = {}
    parts: dict[Key, pd.DataFrame] = {}
    calls: dict[str, Callable[[], object]] = {}
    for key, (module, example) in networks.items():
        plans[key], parts[key], runtime = _fastest(lower(module, example), example, table, measurer)
        calls[f"{len(calls)}: {key}"] = _bound(runtime, example)
    measured = measurer.measure(calls)
    return {
        key: Latency(
            ms=m.floor_ms,
            lo_ms=m.lo_ms,
            hi_ms=m.hi_ms,
            source="measured",
            quality=m.quality,
            plan=plans[key],
            parts=parts[key],
            median_ms=m.median_ms,
            p90_ms=m.p90_ms,
            threads=threads,
        )
        for key, m in zip(networks, measured.values())
    }


def _bound(runtime: Runtime, example: torch.Tensor) -> Callable[[], object]:
    return lambda: runtime(example)


def _kernels_to_try(op: PlannedOp) -> list[str]:
    legal = legal_kernels(op) if op.kind in LAYER_KINDS else ["torch"]
    hopeless = op.density >= DENSE_FROM and op.macs > FEW_MACS and rule_of_thumb(op, legal) == "torch"
    return ["torch"] if hopeless else legal


def _fastest(
    plan: Plan, example: torch.Tensor, table: LayerTable, measurer: Measurer
) -> tuple[Plan, pd.DataFrame, Runtime]:
    """The plan that runs fastest, its parts, and its runtime."""
    tries = {op.name: _kernels_to_try(op) for op in plan.ops}
    made: dict[tuple[str, ...], Runtime] = {}  # by the kernel of every operation, packed once

    def runtime_of(choice: Mapping[str, str]) -> Runtime:
        chosen = plan.with_kernels(choice)
        kernels = tuple(op.kernel for op in chosen.ops)
        if kernels not in made:
            made[kernels] = Runtime(chosen, measurer.threads)
        return made[kernels]

    # One plan for each kernel, so that every layer is timed on it among its like.
    uniform: dict[str, list[float]] = {}
    for kernel in KERNELS:
        if kernel == "torch" or any(kernel in names for names in tries.values()):
            choice = {name: _one_of(kernel, names) for name, names in tries.items()}
            uniform[kernel] = _op_times(runtime_of(choice), example, table, measurer, conversions=False)
    times = [
        {kernel: uniform[kernel][i] for kernel in tries[op.name] if kernel in uniform} for i, op in enumerate(plan.ops)
    ]
    fastest = {op.name: min(times[i], key=times[i].__getitem__) for i, op in enumerate(plan.ops)}
    sparse = {
        op.name: min((k for k in times[i] if k != "torch"), key=times[i].__getitem__, default="torch")
        for i, op in enumerate(plan.ops)
    }
    runtimes = list(dict.fromkeys(runtime_of(choice) for choice in (fastest, sparse, dict.fromkeys(tries, "torch"))))
    best = runtimes[0]
    if len(runtimes) > 1:
        calls = {f"plan {i}": _bound(runtime, example) for i, runtime in enumerate(runtimes)}
        found = measurer.quick().measure(calls)
        best = min(zip(runtimes, found.values()), key=lambda pair: pair[1].floor_ms)[0]
    ms = _op_times(best, example, table, measurer, conversions=True)
    return best.plan, _parts(best.plan, times, ms), best


def _one_of(kernel: str, names: list[str]) -> str:
    """That kernel where it may be tried, else the last that may."""
    return kernel if kernel in names else names[0] if kernel == "torch" else names[-1]


def _op_times(
    runtime: Runtime, example: torch.Tensor, table: LayerTable, measurer: Measurer, conversions: bool
) -> list[float]:
    """ms of each operation of the runtime's plan, the sum over its steps; from the table where it knows, else measured now."""
    plan = runtime.plan
    machine = runtime_id(measurer.threads)
    steps = [step for step in runtime.schedule.steps if conversions or step.kind not in CONVERSIONS]
    # Steps of equal key share one measurement. What could not be traced has no key: it is measured every time.
    known: dict[object, float] = {}
    missing: dict[object, int] = {}
    for i, step in enumerate(steps):
        key = runtime.schedule.key(step)
        pair: object = (key, step.kernel) if key is not None else i
        remembered = table.lookup(machine, key, step.kernel) if key is not None and pair not in known else None
        if remembered is not None:
            known[pair] = remembered.floor_ms
        elif pair not in known:
            missing.setdefault(pair, i)
    if missing:
        alone = dict(runtime.step_calls(example))
        names = _labels(plan, steps, missing)
        measured = measurer.quick().measure({names[pair]: alone[steps[i]] for pair, i in missing.items()})
        new = []
        for pair in missing:
            known[pair] = measured[names[pair]].floor_ms
            if isinstance(pair, tuple):
                new.append((*pair, measured[names[pair]]))
        table.add(machine, new)
    total = [0.0] * len(plan.ops)
    for i, step in enumerate(steps):
        key = runtime.schedule.key(step)
        if plan.ops:
            total[min(step.op, len(plan.ops) - 1)] += known[(key, step.kernel) if key is not None else i]
    return total


def _labels(plan: Plan, steps: list[Step], missing: dict[object, int]) -> dict[object, str]:
    """What to call the steps while they are measured: the operation, the step where that says more, and the kernel."""
    labels: dict[object, str] = {}
    for pair, i in missing.items():
        step = steps[i]
        what = "" if step.kind in ("torch", "conv", "depthwise", "linear") else f" {step.kind}"
        name = f"{plan.ops[min(step.op, len(plan.ops) - 1)].name}{what}"
        label, again = f"{name} on {step.kernel}", 1
        while label in labels.values():
            again += 1
            label = f"{name} #{again} on {step.kernel}"
        labels[pair] = label
    return labels


def _parts(plan: Plan, times: list[dict[str, float]], ms: list[float]) -> pd.DataFrame:
    nan = float("nan")
    rows = [
        {
            "op": op.name,
            "kind": op.kind,
            "kernel": op.kernel,
            "density": op.density,
            "nnz": op.nnz,
            "macs": op.macs,
            **{f"{kernel}_ms": of_op.get(kernel, nan) for kernel in KERNELS},
            "ms": in_plan,
        }
        for op, of_op, in_plan in zip(plan.ops, times, ms)
    ]
    columns = ["op", "kind", "kernel", "density", "nnz", "macs", *(f"{k}_ms" for k in KERNELS), "ms"]
    frame = pd.DataFrame(rows, columns=columns)
    total = float(frame["ms"].sum()) if rows else 0.0
    frame["share"] = frame["ms"] / total if total > 0 else 0.0
    return frame
