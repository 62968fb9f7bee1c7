"""What plans make a machine do, in numbers: `workload(plans) -> Workload`.

A plan is scheduled (`ops.schedule`), and every step that would be executed becomes a row of numbers: multiply-adds with idle lanes
counted, bytes read, written and streamed as weights, tiles looped over. Equal steps are one row, so that pricing many networks
prices each distinct step once. Nothing is packed or compiled, and weights may be on the meta device.

Start with `workload`; `STEP_COLUMNS` and `NETWORK_COLUMNS` say what stands in the two frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array
from torch import nn

from ops.kernels.lanes import LANES
from ops.plan import Plan, PlannedOp
from ops.runtime import CONVERSIONS
from ops.schedule import Copy, Schedule, Step, schedule

__all__ = ["NETWORK_COLUMNS", "STEP_COLUMNS", "STEP_NUMBERS", "STEP_TEXTS", "Workload", "step_rows", "workload"]

STEP_TEXTS = ("key", "curve", "family", "kind", "kernel", "pattern")
STEP_NUMBERS = (
    *("density", "nnz", "macs", "dense_macs", "weight_bytes", "in_bytes", "out_bytes", "tiles"),
    *("channels_in", "channels_out", "positions", "window", "stride", "groups", "batch"),
)
# Of a distinct step. Text: `key` names everything that decides its cost ("" if it cannot be named), `curve` the same without the
# number of kept weights and the halos: steps of one curve differ in density only. `family` is "<kind>/<kernel>", of what torch runs
# "torch.<operation>/torch". Numbers, all of one execution for the whole batch: density, nnz of its layers; macs on kept weights as
# executed, idle lanes included; dense_macs on all weights; weight_bytes packed; in_bytes, out_bytes of the buffers; tiles of 16
# pixels; channels; positions = output pixels x batch; window = kernel height x width.
STEP_COLUMNS = (*STEP_TEXTS, *STEP_NUMBERS)
# Of a network: steps executed, calls from Python (programs and operations of torch), bytes of packed weights and of working memory.
# Handed over: bytes of tensors that compiled steps fill for torch, new memory every time; moved: that all steps read and write, and
# the weights of compiled ones.
NETWORK_COLUMNS = ("name", "steps", "calls", "weight_bytes", "arena_bytes", "handed_bytes", "moved_bytes", "batch")

LEAST_DENSITY = 1e-6  # of a layer, or a part of one, that keeps nothing
# Bytes per kept weight, about: value and offset; value, and the instruction that loads and multiplies.
_PACKED = {"portable": 8.0, "specialised": 14.0, "torch": 4.0}


@dataclass(frozen=True, eq=False)
class Workload:
    """Networks as lists of distinct steps.

    Attributes:
        steps: one row per distinct step, `STEP_COLUMNS`; the index is the step's id, 0, 1, ...
        networks: one row per network, `NETWORK_COLUMNS`; the index is 0, 1, ...
        ids: int64[executed steps of all networks], the id of each, network by network, in order of execution.
        offsets: int64[networks + 1]; network k has `ids[offsets[k]:offsets[k + 1]]`.
        ops: int64[like ids], the plan's operation each step belongs to.
    """

    steps: pd.DataFrame
    networks: pd.DataFrame
    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    ops: npt.NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.networks)

    def sums(self, per_step: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sums over each network's steps of numbers given per distinct step.

        Args:
            per_step: float[distinct steps] or float[distinct steps, k].

        Returns:
            float[networks] or float[networks, k].
        """
        return np.asarray(self._counts @ per_step)

    @cached_property
    def _counts(self) -> csr_array:
        """float[networks, distinct steps]: how often each network executes each step."""
        shape = (len(self.networks), len(self.steps))
        return csr_array((np.ones(len(self.ids)), self.ids, self.offsets), shape=shape)

    def of(self, network: int) -> npt.NDArray[np.int64]:
        """Ids of the steps one network executes, in order."""
        return self.ids[self.offsets[network] : self.offsets[network + 1]]

    def subset(self, networks: Sequence[int] | npt.NDArray[np.int64]) -> Workload:
        """Some of the networks, in the order given; step ids stay as they are."""
        pieces = [slice(self.offsets[k], self.offsets[k + 1]) for k in networks]
        sizes = [piece.stop - piece.start for piece in pieces]
        empty = np.zeros(0, np.int64)
        return Workload(
            self.steps,
            self.networks.iloc[list(networks)].reset_index(drop=True),
            np.concatenate([empty, *(self.ids[piece] for piece in pieces)]),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([empty, *(self.ops[piece] for piece in pieces)]),
        )


def workload(plans: Sequence[Plan | Schedule], names: Sequence[str] | None = None) -> Workload:
    """Describe what plans execute.

    Args:
        plans: from `ops.plan.lower`, or schedules made of them already. Weights may be on the meta device.
        names: of the networks; default "0", "1", ...

    Raises:
        ValueError: not one name per plan.
    """
    if names is not None and len(names) != len(plans):
        raise ValueError(f"{len(plans)} plans need as many names, got {len(names)}")
    rows: list[dict[str, Any]] = []
    known: dict[tuple[str, str], int] = {}
    ids: list[int] = []
    ops: list[int] = []
    offsets = [0]
    networks = []
    for number, plan in enumerate(plans):
        scheduled = plan if isinstance(plan, Schedule) else schedule(plan)
        bytes_ = moved = 0.0
        for step, row in zip(scheduled.steps, step_rows(scheduled)):
            name = (row["key"], row["family"])
            at = known.get(name) if row["key"] else None
            if at is None:
                at = len(rows)
                rows.append(row)
                if row["key"]:
                    known[name] = at
            ids.append(at)
            ops.append(min(step.op, len(scheduled.plan.ops) - 1))
            bytes_ += row["weight_bytes"]
            moved += row["in_bytes"] + row["out_bytes"] + (row["weight_bytes"] if row["kernel"] != "torch" else 0.0)
        offsets.append(len(ids))
        shape = scheduled.plan.input_shape
        networks.append(
            {
                "name": str(number) if names is None else names[number],
                "steps": float(len(scheduled.steps)),
                "calls": float(_calls(scheduled)),
                "weight_bytes": bytes_,
                "arena_bytes": float(scheduled.arena),
                "handed_bytes": float(_handed(scheduled)),
                "moved_bytes": moved,
                "batch": float(shape[0] if shape else 1),
            }
        )
    steps = pd.DataFrame(rows, columns=list(STEP_COLUMNS)).astype(dict.fromkeys(STEP_NUMBERS, "float64"))
    frame = pd.DataFrame(networks, columns=list(NETWORK_COLUMNS))
    whole = np.asarray(ids, np.int64), np.asarray(offsets, np.int64), np.asarray(ops, np.int64)
    return Workload(steps, frame, *whole)


def step_rows(scheduled: Schedule) -> Iterator[dict[str, Any]]:
    """`STEP_COLUMNS` of every step of a schedule, in order of execution."""
    batch = float(scheduled.plan.input_shape[0] if scheduled.plan.input_shape else 1)
    for step in scheduled.steps:
        if step.kind == "torch":
            row = _torch_row(scheduled.plan.ops[step.op])
        else:
            row = _row(step)
        key = scheduled.key(step)
        if key is not None:  # of torch's steps what the row itself says
            key = row["curve"] if step.kind == "torch" else f"{key}@{step.kernel}"
        yield {**row, "key": key or "", "batch": batch}


def _calls(scheduled: Schedule) -> int:
    """How often Python calls something: runs of compiled steps, operations of torch, fetches."""
    count, running = 0, False
    for step in scheduled.steps:
        compiled = step.kind not in ("torch", "fetch")
        count += not (compiled and running)
        running = compiled
    return count


def _handed(scheduled: Schedule) -> int:
    """Bytes of torch's tensors that compiled steps write."""
    made = [s.writes for s in scheduled.steps if s.kind not in ("torch", "fetch") and s.writes is not None]
    return sum(4 * math.prod(copy.shape) for copy in made if copy.form == "torch")


def _weights_of(op: PlannedOp) -> tuple[float, float]:
    """Weights of a module that is one operation because nothing is known of its inside, and about the multiply-adds on them."""
    module = getattr(op.call, "__self__", op.call)
    if op.weight_shape or not isinstance(module, nn.Module):
        return 0.0, 0.0
    weights = float(sum(p.numel() for p in module.parameters()))
    source = op.input_shapes[0] if op.input_shapes else ()
    if isinstance(module, nn.modules.conv._ConvNd):  # channels are the second axis
        shape = op.output_shape or source
        places = math.prod(shape) / shape[1] if len(shape) > 1 and shape[1] else 1.0
    else:
        places = math.prod(source[:-1]) if source else 1.0
    return weights, weights * places if weights > _scaling_only(module) else 0.0


def _scaling_only(module: nn.Module) -> float:
    """Weights up to which a module only scales its values, like a normalisation."""
    return 2.0 * max((max(p.shape, default=0) for p in module.parameters()), default=0)


def _torch_row(op: PlannedOp) -> dict[str, Any]:
    """An operation that torch runs, from the plan."""
    weights, inside = _weights_of(op)
    first = op.input_shapes[0] if op.input_shapes else ()
    batch = first[0] if first else 1
    kind = f"torch.{op.kind}"
    # torch computes zeros like everything else, so that neither their number nor their pattern tells steps apart
    known = {**json.loads(op.key), "nnz": None, "pattern": None} if op.key is not None else None
    curve = op.name if known is None else json.dumps(known, sort_keys=True, separators=(",", ":"))
    dense = float(op.dense_macs * batch) + inside
    return {
        "curve": f"{curve}@torch",
        "family": f"{kind}/torch",
        "kind": kind,
        "kernel": "torch",
        "pattern": "",
        "density": 1.0,
        "nnz": float(math.prod(op.weight_shape)) if op.weight_shape else weights,
        "macs": dense,
        "dense_macs": dense,
        "weight_bytes": _PACKED["torch"] * (math.prod(op.weight_shape) if op.weight_shape else weights),
        "in_bytes": 4.0 * sum(math.prod(shape) for shape in op.input_shapes),
        "out_bytes": 4.0 * math.prod(op.output_shape) if op.output_shape else 0.0,
        "tiles": 0.0,
        **_sizes(first, op.output_shape),
        "window": float(math.prod(op.weight_shape[2:])) if len(op.weight_shape) == 4 else 1.0,
        "stride": float(max(op.stride, default=1)),
        "groups": float(op.groups),
    }


def _row(step: Step) -> dict[str, Any]:
    """A compiled step, a conversion or a fetch."""
    second = step.parameters.get("second")
    layers = [layer for layer in (step.layer, second) if layer is not None]
    source, target = step.reads[0], step.writes
    assert target is not None
    tiles = float(_tiles(step, target))
    nnz = float(sum(layer.nnz for layer in layers))
    weights = float(sum(layer.weight.numel() for layer in layers))
    window, stride, groups, macs, dense = 1.0, 1.0, 1.0, 0.0, 0.0
    positions = _sizes(source.shape, target.shape)["positions"]
    if layers:
        window = float(math.prod(layers[0].weight.shape[2:])) if layers[0].weight.ndim == 4 else 1.0
        stride, groups = float(max(layers[0].stride, default=1)), float(layers[0].groups)
        pixels = tiles * LANES if target.form == "lanes" else positions
        macs, dense = nnz * pixels, weights * positions
    elif "kernel_size" in step.parameters:
        window = float(math.prod(step.parameters["kernel_size"]))
        stride = float(max(step.parameters.get("stride", (1,))))
        macs = dense = window * tiles * LANES * target.shape[1]
    sparse = any(layer.mask is not None for layer in layers)
    return {
        "curve": _curve(step),
        "family": f"{step.kind}/{step.kernel}",
        "kind": step.kind,
        "kernel": step.kernel,
        "pattern": "+".join(dict.fromkeys(layer.pattern or "unstructured" for layer in layers)) if sparse else "",
        "density": max(nnz / weights, LEAST_DENSITY) if weights else 1.0,
        "nnz": nnz,
        "macs": macs,
        "dense_macs": dense,
        "weight_bytes": _PACKED.get(step.kernel, 4.0) * nnz,
        "in_bytes": float(sum(_bytes(step, copy) for copy in step.reads)),
        "out_bytes": float(_bytes(step, target)),
        "tiles": tiles,
        **_sizes(source.shape, target.shape),
        "window": window,
        "stride": stride,
        "groups": groups,
    }


def _sizes(source: Sequence[int], target: Sequence[int]) -> dict[str, float]:
    return {
        "channels_in": float(source[1]) if len(source) > 1 else 1.0,
        "channels_out": float(target[1]) if len(target) > 1 else 1.0,
        "positions": float(math.prod(target) / target[1]) if len(target) > 1 and target[1] else 1.0,
    }


def _tiles(step: Step, target: Copy) -> int:
    """Tiles a step loops over: those of its result, of a halo refresh those around the blocks."""
    layout = target.layout if target.layout is not None else step.reads[0].layout
    if layout is None:
        return 0
    if step.kind == "halo":
        return layout.groups * (layout.rows * layout.columns - math.prod(layout.block))
    return layout.tiles


def _bytes(step: Step, copy: Copy) -> int:
    """What a step touches of a buffer: of one in lanes the tiles inside the blocks, of a halo refresh the tiles around them."""
    if copy.layout is None:
        return 4 * math.prod(copy.shape)
    tiles = _tiles(step, copy) if step.kind == "halo" else copy.layout.tiles
    return 4 * LANES * tiles * copy.shape[1]


def _curve(step: Step) -> str:
    """What the steps of one density curve share."""
    facts: dict[str, Any] = {"step": step.kind}
    halo = step.kind in ("halo", *CONVERSIONS)
    copies = [copy for copy in (*step.reads, step.writes) if copy is not None]
    facts["copies"] = [_place(copy, halo) for copy in copies]
    for name, layer in (("layer", step.layer), ("second", step.parameters.get("second"))):
        if layer is not None:
            parts = ("stride", "padding", "dilation", "groups", "pattern", "post_ops", "residual")
            facts[name] = [*(getattr(layer, part) for part in parts), tuple(layer.weight.shape), layer.mask is None]
    for name, value in step.parameters.items():
        if name not in ("scale", "shift", "second"):
            facts[name] = value
    return f"{json.dumps(facts, sort_keys=True, separators=(',', ':'))}@{step.kernel}"


def _place(copy: Copy, halo: bool) -> list[Any]:
    layout = copy.layout
    if layout is None:
        return [copy.form, copy.shape]
    return [copy.form, copy.shape, *layout.blocking, *((layout.halo,) if halo else ())]
