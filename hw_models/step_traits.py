"""What the text of a curve says beyond the numbers of its row: `traits(curves)`.

The columns of a steps frame are numbers that any runtime has. Some of what decides a cost is in none of them: which activation is
computed, how many rows of tiles there are, how wide the middle of a pair is. It stands in the JSON text that names the curve
(`hw_models.workload`). Text that is no JSON, or other JSON, gives the plain answers, so that frames of other origin work too.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from typing import Any

import pandas as pd

__all__ = ["TRAITS", "traits"]

# Of one step: exponentials, clamps: activations that compute e^x, and others that are more than a comparison (0 or 1);
# residual: a second value is added; tile_rows, row_tiles: rows of tiles over all groups of images, tiles in a row; rows, columns,
# layer_groups: output channels, inputs of each, groups (0, 0, 1 if it is no layer); rows2, columns2: of the second layer of a
# pair; dilation; padding, at most; pattern_rows: rows of a pattern's block; regrids: the blocks of input and output differ;
# pool_window: pixels of a window of a pooling that torch runs; followers: activations and sums that torch runs after a layer, each
# a call of its own.
TRAITS = (
    *(
        "exponentials",
        "clamps",
        "residual",
        "tile_rows",
        "row_tiles",
        "rows",
        "columns",
        "layer_groups",
        "rows2",
        "columns2",
    ),
    *("dilation", "padding", "pattern_rows", "regrids", "pool_window", "followers"),
)
_EXPONENTIALS = ("silu", "sigmoid", "tanh", "gelu", "elu(", "mish", "softplus", "softmax")
_CLAMPS = ("hardswish", "hardsigmoid", "leaky", "prelu")


def traits(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per step, columns `TRAITS`, float64, the steps' index."""
    texts = steps["curve"].astype(str)
    return pd.DataFrame([_of(text) for text in texts], columns=list(TRAITS), index=steps.index, dtype=float)


@lru_cache(maxsize=50_000)
def _of(curve: str) -> tuple[float, ...]:
    try:
        facts = json.loads(curve.rpartition("@")[0] or curve)
    except ValueError:
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    copies = [copy for copy in facts.get("copies", []) if isinstance(copy, list)]
    lanes = [copy for copy in copies if copy and copy[0] == "lanes" and len(copy) >= 5]
    rows, tiles, regrids = 0.0, 0.0, 0.0
    if lanes:
        _, shape, images, _, block = lanes[-1][:5]
        rows, tiles = float(block[0] * math.ceil(shape[0] / images)), float(block[1])
        regrids = float(lanes[0][2:5] != lanes[-1][2:5])
    first, second = _layer(facts.get("layer")), _layer(facts.get("second"))
    followers = 0.0
    if "weight_shape" in facts:  # an operation of torch
        names = ("stride", "padding", "dilation", "groups", "pattern", "post_ops", "residual", "weight_shape")
        first = _layer([facts.get(name) for name in names])
        followers = float(len(first[0]) + first[1])
    acts = " ".join(str(facts.get(name, "")) for name in ("activation", "call", "name", "function")).lower()
    acts = " ".join([acts, *map(str, first[0]), *map(str, second[0])]).replace("relu(", "")
    plain = acts.replace("hardswish", "").replace("hardsigmoid", "")
    exponentials = float(any(name in plain for name in _EXPONENTIALS))
    clamps = float(any(name in acts for name in _CLAMPS))
    pool = re.search(r"kernel_size=\(?(\d+)(?:, (\d+))?", str(facts.get("call", "")))
    window = float(int(pool[1]) * int(pool[2] or pool[1])) if pool else 1.0
    padding = _most(facts.get("padding"), 0.0) if not first[2] else first[7]
    return (
        *(exponentials, clamps, float(first[1] or second[1]), rows, tiles, *first[2:5], second[2], second[3]),
        *(first[5], padding, max(first[6], second[6]), regrids, window, followers),
    )


def _layer(entry: Any) -> tuple[list[Any], bool, float, float, float, float, float, float]:
    """Activations, residual, rows, columns, groups, dilation, rows of the pattern, padding, of one layer's entry in a curve."""
    if not isinstance(entry, list) or len(entry) < 8 or not entry[7]:
        return [], False, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0
    _, padding, dilation, groups, pattern, post_ops, residual, weight = entry[:8]
    height = 1.0
    if isinstance(pattern, str) and "x" in pattern:
        head = pattern.partition("x")[0]
        height = float(head) if head.isdigit() else 1.0
    size, most = float(math.prod(weight[1:])), _most(padding, 0.0)
    return (
        list(post_ops or []),
        bool(residual),
        float(weight[0]),
        size,
        float(groups or 1),
        _most(dilation, 1.0),
        height,
        most,
    )


def _most(values: Any, default: float) -> float:
    values = values if isinstance(values, list) else [values]
    return float(max((v for v in values if isinstance(v, int | float)), default=default))
