"""What a learned model looks at: counts of work that are priced, and numbers that tell shapes apart.

Both are computed from the columns of a steps frame (`hw_models.workload.STEP_COLUMNS`), for all rows at once. `work` is for sums
with non-negative prices: everything in it makes a step take longer in proportion. `shape` is for what makes the same work dearer or
cheaper: logarithms of sizes, how well channels fill vectors, the pattern.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["SHAPE_FEATURES", "WORK_FEATURES", "shape", "work"]

Floats = NDArray[np.float64]

WORK_FEATURES = ("macs", "nnz", "weight_bytes", "in_bytes", "out_bytes", "rows", "channels", "call")
PATTERNS = ("unstructured", ":", "x", "channel")
SHAPE_FEATURES = (
    *(
        "density",
        "macs",
        "per_output",
        "channels_in",
        "channels_out",
        "positions",
        "tiles",
        "window",
        "stride",
        "groups",
    ),
    *("weight_bytes", "in_bytes", "out_bytes", "batch", "lane_waste"),
    *("fill_in_8", "fill_in_16", "fill_out_8", "fill_out_16", "fill_out_32"),
    *(f"pattern {name}" for name in PATTERNS),
)


def work(steps: pd.DataFrame) -> Floats:
    """Counts of work, float64[n, len(WORK_FEATURES)], in units of about a nanosecond each.

    macs as executed; kept weights; bytes streamed as weights, read and written; rows = tiles (or 16 positions) times output
    channels, once around the innermost loop; channels, once around the next; and one for the call.
    """
    c = {name: steps[name].to_numpy(float) for name in steps.columns if steps[name].dtype.kind in "fi"}
    tiles = np.maximum(c["tiles"], np.ceil(c["positions"] / 16))
    columns = [
        c["macs"] / 32,
        c["nnz"],
        c["weight_bytes"] / 32,
        c["in_bytes"] / 32,
        c["out_bytes"] / 32,
        tiles * c["channels_out"],
        c["channels_in"] + c["channels_out"],
        np.full(len(steps), 100.0),
    ]
    return np.stack(columns, axis=1)


def shape(steps: pd.DataFrame) -> Floats:
    """Logarithms of sizes and the like, float64[n, len(SHAPE_FEATURES)], all finite."""
    c = {name: steps[name].to_numpy(float) for name in steps.columns if steps[name].dtype.kind in "fi"}
    pattern = steps["pattern"].astype(str)
    inputs = np.maximum(c["channels_in"] / np.maximum(c["groups"], 1), 1)

    def log(name: str) -> Floats:
        return np.asarray(np.log(c[name] + 1))

    def fill(values: Floats, of: int) -> Floats:
        """log(rounded up / value): 0 where vectors are full."""
        values = np.maximum(values, 1)
        return np.asarray(np.log(np.ceil(values / of) * of / values))

    lanes = c["tiles"] * 16
    waste = np.where(lanes > 0, np.log(np.maximum(lanes, 1) / np.maximum(c["positions"], 1)), 0.0)
    columns = [
        np.log(np.maximum(c["density"], 1e-4)),
        log("macs"),
        np.log(inputs * np.maximum(c["window"], 1) * np.maximum(c["density"], 1e-4) + 1),
        np.log(inputs),
        *(log(name) for name in ("channels_out", "positions", "tiles", "window", "stride")),
        *(log(name) for name in ("groups", "weight_bytes", "in_bytes", "out_bytes", "batch")),
        np.clip(waste, -6, 6),
        *(fill(inputs, of) for of in (8, 16)),
        *(fill(c["channels_out"], of) for of in (8, 16, 32)),
        *(pattern.str.contains(name, regex=False).to_numpy(float) for name in PATTERNS),
    ]
    return np.stack(columns, axis=1)
