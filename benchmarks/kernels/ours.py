"""Our side, through the public way only: `lower`, kernels by name, `Runtime(plan)(x)`.

"auto" is the plan that `hw_models.latency.measure_latency` chooses; any other name forces that kernel wherever it is legal, and
"lanes", the kernel of what stands between layers, where it is not. Start with `load`.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.kernels.engines import Loaded, Unsupported
from benchmarks.kernels.protocol import InProcess
from hw_models.latency import measure_latency
from hw_models.measure import Measurer
from hw_models.tables import LayerTable
from ops.plan import LAYER_KINDS, Plan, PlannedOp, lower
from ops.runtime import KERNELS, Runtime

__all__ = ["known_paths", "load", "plan_for", "runtime_bytes"]

BETWEEN = "lanes"  # of operations that are no layers


def known_paths() -> list[str]:
    """Names `load` takes: the kernels of sparse layers, and "auto"."""
    order = ["portable", "specialised"]
    names = sorted(set(KERNELS) - {"torch", BETWEEN}, key=lambda n: (order.index(n) if n in order else len(order), n))
    return [*names, "auto"]


def plan_for(network: nn.Module, x: torch.Tensor, path: str, threads: int) -> Plan:
    """The plan of a path.

    Raises:
        Unsupported: no layer of the network has this kernel.
    """
    if path == "auto":
        quick = Measurer().quick()
        return measure_latency(network, x, threads=threads, table=_table(), measurer=quick).plan

    def choose(op: PlannedOp, legal: list[str]) -> str:
        if path in legal:
            return path
        return BETWEEN if BETWEEN in legal and path != "csr" else legal[0]

    plan = lower(network, x).with_kernels(choose)
    layers = [op for op in plan.ops if op.kind in LAYER_KINDS]
    if layers and not any(op.kernel == path for op in layers):
        raise Unsupported(f'no layer here has the kernel "{path}"')
    return plan


def load(network: nn.Module, x: torch.Tensor, path: str, threads: int) -> Loaded:
    """A runtime of the network on one of the `known_paths`; `network` is not kept."""
    runtime = Runtime(plan_for(network, x, path, threads))

    def output() -> np.ndarray:
        return np.asarray(runtime(x))

    return Loaded(InProcess(lambda: runtime(x)), output)


def packing_seconds(plan: Plan) -> tuple[Runtime, float]:
    """A runtime and how long making it took: packing of weights and making of code, after kernels are compiled."""
    start = time.perf_counter()
    runtime = Runtime(plan)
    return runtime, time.perf_counter() - start


def runtime_bytes(runtime: Runtime) -> dict[str, float]:
    """What a runtime says about its memory, in bytes; NaN for what it does not say."""
    nan = float("nan")
    return {name: float(getattr(runtime, name, nan)) for name in ("packed_bytes", "arena_bytes", "nbytes")}


@functools.cache
def _table() -> LayerTable:
    """Times of single operations in this run alone, so that "auto" is decided by what this machine does now."""
    folder = tempfile.mkdtemp(prefix="cpu_kernels_")
    return LayerTable(Path(folder) / f"layers-{os.getpid()}.sqlite")
