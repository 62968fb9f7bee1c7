"""Reads the table of executed operations (`plan.csv` of a trial) into values that tables and drawings share.

The table is what `ops.plan` wrote, perhaps with measured times per operation; this module tolerates columns that are not
there and shapes that are text. It computes nothing about the network that the table does not say. Start with `read_plan`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nas.report.units import missing

_LAYERS = ("conv2d", "depthwise_conv2d", "linear")
_SYNONYMS = {"name": "op", "latency_ms": "ms", "torch_ms": "dense_ms"}


@dataclass(frozen=True)
class Operation:
    """One executed operation.

    Attributes:
        name: dotted name in the network.
        kind: "conv2d", "linear", "add", "torch", ...
        kernel: "torch", "portable" or "specialised"; "" where there is nothing to choose.
        weight: shape of the weight, [out, in / groups, *kernel]; () without a weight.
        output: shape of the output without the batch axis; () if unknown.
        stride: of a convolution, 1 otherwise.
        groups: of a convolution.
        pattern: canonical text of the sparsity pattern; "" for dense.
        density: share of the weights kept, None without a weight.
        nnz: weights kept.
        macs: multiply-adds at this density.
        dense_macs: multiply-adds of the dense twin.
        ms: time of this operation, None if it is not known.
        dense_ms: measured time of the dense kernel for it, None if it was not measured.
        inputs: what it reads: 0 is the network's input, k + 1 the result of operation k; () if the table does not say.
        after: operations fused behind it, e.g. ("relu",).
        source: how ms was got: "" by timing it alone, "in place" in the running network, else what the latency model knew it from.
    """

    name: str
    kind: str
    kernel: str = ""
    weight: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    stride: int = 1
    groups: int = 1
    pattern: str = ""
    density: float | None = None
    nnz: int = 0
    macs: int = 0
    dense_macs: int = 0
    ms: float | None = None
    dense_ms: float | None = None
    inputs: tuple[int, ...] = ()
    after: tuple[str, ...] = ()
    source: str = ""

    @property
    def weights(self) -> int:
        """Number of weights, kept or not; 0 if the shape is not known."""
        return math.prod(self.weight) if self.weight else 0

    @property
    def is_sparse(self) -> bool:
        """True if some of its weights are left out."""
        return self.density is not None and self.density < 1

    @property
    def what(self) -> str:
        """What it computes, in a few words: "conv 3x3 64→128 /2", "linear 64→10", "add"."""
        if len(self.weight) >= 3:
            kernel = "x".join(str(size) for size in self.weight[2:])
            depthwise = self.groups > 1 and self.weight[1] == 1
            channels = f"{self.weight[1] * self.groups}→{self.weight[0]}"
            grouped = f" groups {self.groups}" if self.groups > 1 and not depthwise else ""
            stride = f" /{self.stride}" if self.stride != 1 else ""
            return f"{'depthwise' if depthwise else 'conv'} {kernel} {channels}{grouped}{stride}"
        if len(self.weight) == 2:
            return f"linear {self.weight[1]}→{self.weight[0]}"
        return self.kind.replace("_", " ")

    @property
    def how(self) -> str:
        """How sparse it is and what runs it: "density 0.1 2:4 · portable"; "" without a weight."""
        if self.density is None:
            return ""
        sparse = f"density {self.density:.3g} {self.pattern}".rstrip() if self.is_sparse else "dense"
        return f"{sparse} · {self.kernel}" if self.kernel else sparse


def read_plan(frame: pd.DataFrame) -> list[Operation]:
    """The operations of a plan frame, in order of execution.

    Args:
        frame: one row per operation with at least `op` and `kind`; shapes as text such as "1x64x8x8" or as sequences.

    Raises:
        ValueError: there is no `op` or no `kind` column; names the columns there are.
    """
    frame = frame.rename(columns={old: new for old, new in _SYNONYMS.items() if new not in frame.columns})
    absent = [column for column in ("op", "kind") if column not in frame.columns]
    if absent:
        raise ValueError(f"a plan needs the columns op and kind, {absent} missing; it has {list(frame.columns)}")
    return [_operation(row) for row in frame.to_dict("records")]


def total_ms(operations: Sequence[Operation]) -> float | None:
    """Sum of the measured times, None if none was measured."""
    times = [op.ms for op in operations if op.ms is not None]
    return sum(times) if times else None


def shares(operations: Sequence[Operation]) -> list[float]:
    """Each operation's share of the network: of its time if measured, else of its multiply-adds; sums to 1 (or all 0)."""
    weights = [op.ms or 0.0 for op in operations] if total_ms(operations) else [float(op.macs) for op in operations]
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]


def shape_text(shape: Sequence[int]) -> str:
    """(64, 8, 8) as "64x8x8"; "" for no shape."""
    return "×".join(str(size) for size in shape)


def parse_shape(value: Any) -> tuple[int, ...]:
    """A shape from a sequence or from its text: "(64, 3, 3)", "[64, 3, 3]", "64x3x3"; () for anything missing."""
    if value is None or (not isinstance(value, list | tuple) and missing(value)):
        return ()
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return ()
        if text[0] not in "([":
            text = "(" + text.replace("×", ",").replace("x", ",") + ",)"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return ()
    if isinstance(value, int | float):
        return (int(value),)
    if value and isinstance(value[0], list | tuple):  # a list of shapes: the first
        value = value[0]
    return tuple(int(size) for size in value)


def _operation(row: dict[Any, Any]) -> Operation:
    stride = parse_shape(row.get("stride"))
    weight = parse_shape(row.get("weight"))
    density = _number(row.get("density"))
    has_weight = bool(weight) or _text(row["kind"]) in _LAYERS
    pattern = _text(row.get("pattern"))
    return Operation(
        name=_text(row["op"]),
        kind=_text(row["kind"]),
        kernel=_text(row.get("kernel")) if has_weight else "",
        weight=weight,
        output=parse_shape(row.get("output"))[1:],
        stride=max(stride) if stride else 1,
        groups=int(_number(row.get("groups")) or 1),
        pattern=pattern if density is not None and density < 1 and pattern != "dense" else "",
        density=density if has_weight else None,
        nnz=int(_number(row.get("nnz")) or 0),
        macs=int(_number(row.get("macs")) or 0),
        dense_macs=int(_number(row.get("dense_macs")) or 0),
        ms=_number(row.get("ms")),
        dense_ms=_number(row.get("dense_ms")) if has_weight else None,
        inputs=tuple(int(k) for k in _names(row.get("inputs")) if k.isdigit()),
        after=_names(row.get("post_ops")),
        source=_text(row.get("source")),
    )


def _text(value: Any) -> str:
    return "" if missing(value) else str(value)


def _number(value: Any) -> float | None:
    if missing(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _names(value: Any) -> tuple[str, ...]:
    """Words of a text such as "relu hardtanh"; the elements of a sequence as texts."""
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, list | tuple):
        return tuple(str(name) for name in value)
    return () if missing(value) else (str(int(value)),)
