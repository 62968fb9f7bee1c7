"""Our side, through the public way only: `lower`, kernels by name, `Runtime(plan)(x)`.

"auto" is the plan that `hw_models.latency.measure_latency` chooses; any other name forces that kernel wherever it is legal, and
"lanes", the kernel of what stands between layers, where it is not. Start with `load`.
"""

from __future__ import annotations

import functools
import inspect
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
from ops.layers import SparseConv2d, SparseLinear
from ops.plan import LAYER_KINDS, Plan, PlannedOp, lower
from ops.runtime import Runtime

__all__ = ["known_paths", "load", "plan_for", "runtime_bytes"]


def known_paths() -> list[str]:
    """Names `load` takes: every kernel that is legal for a sparse layer but torch's, and "auto"."""
    names: set[str] = set()

    def listen(op: PlannedOp, legal: list[str]) -> str:
        if op.kind in LAYER_KINDS:
            names.update(legal)
        return legal[0]

    layers = [SparseConv2d(16, 16, 3, padding=1, density=0.5), nn.Flatten(), SparseLinear(16 * 16, 16, density=0.5)]
    lower(nn.Sequential(*layers).eval(), torch.zeros(1, 16, 4, 4)).with_kernels(listen)
    order = ["portable", "specialised"]
    ours = sorted(names - {"torch"}, key=lambda n: (order.index(n) if n in order else len(order), n))
    return [*ours, "auto"]


def plan_for(network: nn.Module, x: torch.Tensor, path: str, threads: int) -> Plan:
    """The plan of a path.

    Raises:
        Unsupported: no layer of the network has this kernel.
    """
    if path == "auto":
        quick = Measurer().quick()
        return measure_latency(network, x, threads=threads, table=_table(), measurer=quick).plan

    def choose(op: PlannedOp, legal: list[str]) -> str:
        # What has no specialised form (depthwise, linear) is portable on that path.
        return path if path in legal else "portable" if "portable" in legal else legal[0]

    plan = lower(network, x).with_kernels(choose)
    layers = [op for op in plan.ops if op.kind in LAYER_KINDS]
    if layers and not any(op.kernel == path for op in layers):
        raise Unsupported(f'no layer here has the kernel "{path}"')
    return plan


def load(network: nn.Module, x: torch.Tensor, path: str, threads: int) -> Loaded:
    """A runtime of the network on one of the `known_paths`; `network` is not kept."""
    runtime = make_runtime(plan_for(network, x, path, threads), threads)

    def output() -> np.ndarray:
        return np.asarray(runtime(x))

    return Loaded(InProcess(lambda: runtime(x)), output)


def make_runtime(plan: Plan, threads: int) -> Runtime:
    """A runtime that uses so many threads, if runtimes of this version can be told."""
    if "threads" in inspect.signature(Runtime).parameters:
        return Runtime(plan, threads=threads)  # type: ignore[call-arg,unused-ignore]
    return Runtime(plan)


def packing_seconds(plan: Plan, threads: int) -> tuple[Runtime, float]:
    """A runtime and how long making it took: packing of weights and making of code, after kernels are compiled."""
    start = time.perf_counter()
    runtime = make_runtime(plan, threads)
    return runtime, time.perf_counter() - start


def runtime_bytes(runtime: Runtime) -> dict[str, float]:
    """What a runtime says about its memory: bytes of packed weights, and of its working memory; NaN for what it does not say."""
    nan = float("nan")
    return {name: float(getattr(runtime, name, nan)) for name in ("nbytes", "arena_nbytes")}


@functools.cache
def _table() -> LayerTable:
    """Times of single operations in this run alone, so that "auto" is decided by what this machine does now."""
    folder = tempfile.mkdtemp(prefix="cpu_kernels_")
    return LayerTable(Path(folder) / f"layers-{os.getpid()}.sqlite")
