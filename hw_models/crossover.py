"""At which density each layer of a network would be faster dense, by any latency model: `crossovers(plan, model)`.

The layers of the plan are given other densities, all of them at once, and the model prices each plan and the all-dense one. So a
crossover is that of a layer among its like, in the layout it then has. Nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from hw_models.model import LatencyModel
from ops.masks import kept_count
from ops.patterns import NM, parse_pattern
from ops.plan import Plan, PlannedOp, legal_kernels

__all__ = ["DENSITIES", "at_density", "crossovers"]

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


def crossovers(plan: Plan, model: LatencyModel) -> dict[str, float | None]:
    """The density above which the dense kernel of a layer is the faster one.

    Sparse times are taken to be linear in density between `DENSITIES`, as they nearly are (`hw_models.curves`).

    Args:
        plan: its sparse kernels are kept; layers on torch are asked about on the most specialised kernel that is legal.
        model: prices plans.

    Returns:
        By operation: a density in (0, 1); None if the sparse kernel is as fast even at density 1; 0.0 if it is slower at every
        density. Operations without a choice of kernel, and N:M layers, whose density is fixed, are not in it.
    """
    asked = [i for i, op in enumerate(plan.ops) if _can_vary(op)]
    if not asked:
        return {}
    dense = _times(model, plan.with_kernels(lambda op, legal: "torch"))[asked]
    density = np.array([[op.density for op in (changed.ops[i] for i in asked)] for changed in _variants(plan, asked)])
    sparse = np.array([_times(model, changed)[asked] for changed in _variants(plan, asked)])
    return {plan.ops[i].name: _crossing(density[:, k], sparse[:, k], float(dense[k])) for k, i in enumerate(asked)}


def at_density(op: PlannedOp, density: float) -> PlannedOp:
    """The layer as it would be planned at another density, its mask not drawn (on the meta device): to be priced, not run.

    Args:
        op: a layer; one that has no mask gets one of the unstructured pattern.
        density: fraction to keep, in (0, 1]; not of an N:M layer.
    """
    layer = op.layer
    assert layer is not None
    pattern = layer.pattern or "unstructured"
    mask = torch.empty(tuple(layer.weight.shape), dtype=torch.bool, device="meta")
    weights = math.prod(layer.weight.shape)
    nnz = kept_count(tuple(layer.weight.shape), density, parse_pattern(pattern)) if density < 1 else weights
    return replace(
        op,
        layer=replace(layer, mask=mask, pattern=pattern, target=density),
        pattern=pattern,
        density=nnz / weights,
        nnz=nnz,
        macs=op.dense_macs * nnz // weights,
    )


def _can_vary(op: PlannedOp) -> bool:
    if op.layer is None or not op.layer.weight.numel() or len(legal_kernels(op)) < 2:
        return False
    return not op.pattern or not isinstance(parse_pattern(op.pattern), NM)


def _variants(plan: Plan, asked: list[int]) -> list[Plan]:
    """The plan with the layers that are asked about sparse at each of `DENSITIES`."""
    found = []
    for density in DENSITIES:
        changed: Mapping[int, PlannedOp] = {i: _sparse(at_density(plan.ops[i], density)) for i in asked}
        found.append(replace(plan, ops=tuple(changed.get(i, op) for i, op in enumerate(plan.ops))))
    return found


def _sparse(op: PlannedOp) -> PlannedOp:
    return op if op.kernel != "torch" else replace(op, kernel=legal_kernels(op)[-1])


def _times(model: LatencyModel, plan: Plan) -> npt.NDArray[np.float64]:
    """float[operations]: ms of each."""
    return model.predict(plan).parts["ms"].to_numpy(dtype=float)


def _crossing(density: npt.NDArray[np.float64], sparse: npt.NDArray[np.float64], dense: float) -> float | None:
    """Where the line through (density, sparse) last rises above `dense`."""
    faster = np.flatnonzero(sparse <= dense)
    if not len(faster):
        return 0.0
    last = int(faster[-1])
    if last == len(density) - 1:
        return None
    part = (dense - sparse[last]) / (sparse[last + 1] - sparse[last])
    return float(density[last] + part * (density[last + 1] - density[last]))
