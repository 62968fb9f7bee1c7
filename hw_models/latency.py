"""How long a network takes on this CPU: every layer gets the kernel that was measured to be faster, then the whole is measured.

The time quoted is that of the whole network as `ops.runtime.Runtime` executes it, by the full protocol of
`hw_models.measure`. Times of single operations only choose kernels and show where the time goes. Each is hot (one operation
alone, caches warm) and holds about a microsecond of calling, so their sum is below the whole for deep networks and above it
for tiny ones. They are remembered in `hw_models.tables.LayerTable`.

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
from hw_models.measure import Measurement, Measurer
from hw_models.tables import LayerTable
from ops.plan import Plan, PlannedOp, legal_kernels, lower
from ops.runtime import Runtime

__all__ = ["DENSE_FROM", "Latency", "measure_latency", "measure_many"]

# From this density on the CSR kernel is not tried, but for depthwise convolutions, where it may win at any density. Measured
# break-even with torch on one thread of an AVX-512 host: 0.35 for 3x3 64 -> 64 on 16x16, 0.2 for 1x1 256 -> 256 on 8x8, 0.1 for
# linear 784 -> 256; a wide margin for other machines.
DENSE_FROM = 0.6

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
        parts: one row per operation: op, kind, kernel (chosen), density, nnz, macs, ms of each kernel measured (`torch_ms`,
            `csr_ms`; NaN if not tried), ms (of the chosen one) and share (of the sum of ms).
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

    Sparse layers of density below `DENSE_FROM`, and depthwise convolutions, are timed with each legal kernel on their real
    mask, unless the table has an operation of the same key, and run on the faster one; all others stay dense. Takes about 3 s
    with the default measurer and some 20 ms more per operation that is new to the table.

    Args:
        module: takes one tensor; copied, never changed.
        example_input: float[batch, ...]; the latency is that of the whole batch.
        threads: CPU threads for torch; the CSR kernels use one.
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
    times: dict[Key, list[dict[str, Measurement]]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for key, (module, example) in networks.items():
        plan = lower(module, example)
        times[key] = _operation_times(plan, example, table, measurer)
        fastest = [min(of_op, key=lambda k: of_op[k].floor_ms) for of_op in times[key]]
        plans[key] = plan.with_kernels({op.name: kernel for op, kernel in zip(plan.ops, fastest)})
        calls[f"{len(calls)}: {key}"] = _bound(Runtime(plans[key]), example)
    measured = measurer.measure(calls)
    return {
        key: Latency(
            ms=m.floor_ms,
            lo_ms=m.lo_ms,
            hi_ms=m.hi_ms,
            source="measured",
            quality=m.quality,
            plan=plans[key],
            parts=_parts(plans[key], times[key]),
            median_ms=m.median_ms,
            p90_ms=m.p90_ms,
            threads=threads,
        )
        for key, m in zip(networks, measured.values())
    }


def _bound(runtime: Runtime, example: torch.Tensor) -> Callable[[], object]:
    return lambda: runtime(example)


def _kernels_to_try(op: PlannedOp) -> list[str]:
    hopeless = op.density >= DENSE_FROM and op.kind != "depthwise_conv2d"
    return ["torch"] if hopeless else legal_kernels(op)


def _operation_times(
    plan: Plan, example: torch.Tensor, table: LayerTable, measurer: Measurer
) -> list[dict[str, Measurement]]:
    """For each operation of the plan, a measurement by kernel; from the table where it knows, else measured now."""
    runtime = runtime_id(measurer.threads)
    # Operations of equal key share one measurement. What could not be traced has no key: it is measured every time.
    labels = [op.key or f"#{i}" for i, op in enumerate(plan.ops)]
    found: dict[tuple[str, str], Measurement] = {}
    missing: dict[tuple[str, str], int] = {}
    for i, op in enumerate(plan.ops):
        for kernel in _kernels_to_try(op):
            pair = (labels[i], kernel)
            known = table.lookup(runtime, op.key, kernel) if op.key is not None and pair not in found else None
            if known is not None:
                found[pair] = known
            elif pair not in found:
                missing.setdefault(pair, i)
    if missing:
        calls: dict[str, Callable[[], object]] = {}
        for kernel in sorted({kernel for _, kernel in missing}):
            chosen = plan.with_kernels({op.name: kernel for op in plan.ops if kernel in legal_kernels(op)})
            alone = Runtime(chosen).calls(example)
            calls |= {f"{plan.ops[i].name} on {k}": alone[i] for (_, k), i in missing.items() if k == kernel}
        measured = measurer.quick().measure(calls)
        found |= {
            (label, kernel): measured[f"{plan.ops[i].name} on {kernel}"] for (label, kernel), i in missing.items()
        }
        table.add(runtime, [(*pair, found[pair]) for pair, i in missing.items() if plan.ops[i].key is not None])
    return [{k: found[label, k] for k in _kernels_to_try(op)} for label, op in zip(labels, plan.ops)]


def _parts(plan: Plan, times: list[dict[str, Measurement]]) -> pd.DataFrame:
    nan = float("nan")
    rows = [
        {
            "op": op.name,
            "kind": op.kind,
            "kernel": op.kernel,
            "density": op.density,
            "nnz": op.nnz,
            "macs": op.macs,
            "torch_ms": of_op["torch"].floor_ms,
            "csr_ms": of_op["csr"].floor_ms if "csr" in of_op else nan,
            "ms": of_op[op.kernel].floor_ms,
        }
        for op, of_op in zip(plan.ops, times)
    ]
    columns = ["op", "kind", "kernel", "density", "nnz", "macs", "torch_ms", "csr_ms", "ms"]
    frame = pd.DataFrame(rows, columns=columns)
    total = float(frame["ms"].sum()) if rows else 0.0
    frame["share"] = frame["ms"] / total if total > 0 else 0.0
    return frame
