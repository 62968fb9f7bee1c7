"""What a learned model looks at: counts of work that are priced, and numbers that tell shapes apart.

Both are computed from a steps frame (`hw_models.workload.STEP_COLUMNS`), for all rows at once. `work` is for sums with
non-negative prices: everything in it makes a step take longer in proportion, as the kernels' own loops do it. `shape` is for what
makes the same work dearer or cheaper: logarithms of sizes, how well channels fill vectors, the pattern.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.step_traits import traits

__all__ = ["SHAPE_FEATURES", "WORK_FEATURES", "shape", "work"]

Floats = NDArray[np.float64]

# Output channels that the specialised kernel has in registers at once, and at most in one function; vectors of input it touches.
ROWS_AT_ONCE, RANGE_ROWS, VECTORS = 30.0, 150.0, 360.0
# Bytes between which something leaves the first- and the second-level cache.
FIRST_CACHE, SECOND_CACHE = (16e3, 64e3), (0.4e6, 2e6)

WORK_FEATURES = (
    *(
        "macs",
        "macs of full windows",
        "macs from far code",
        "macs from farther code",
        "loads",
        "loads from far",
        "splats",
    ),
    *(
        "starts",
        "surprises",
        "border macs",
        "outputs",
        "sums",
        "rewrites",
        "exponentials",
        "clamps",
        "weights",
        "weight_bytes",
    ),
    *("in_bytes", "out_bytes", "far bytes", "lines", "padded macs", "channels", "followers", "call"),
)
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
    *("row_tiles", "exponentials", "clamps", "residual", "dilation", "middle", "pool_window", "followers"),
    *(f"pattern {name}" for name in PATTERNS),
)


def _columns(steps: pd.DataFrame) -> dict[str, Floats]:
    return {name: steps[name].to_numpy(float) for name in steps.columns if steps[name].dtype.kind in "fi"}


def _beyond(nbytes: Floats, cache: tuple[float, float]) -> Floats:
    """0 where bytes are well inside a cache, 1 well outside, straight in the logarithm between."""
    low, high = np.log(cache)
    return np.asarray(np.clip((np.log(np.maximum(nbytes, 1)) - low) / (high - low), 0, 1))


def _loads(
    density: Floats, rows: Floats, columns: Floats, groups: Floats, height: Floats, whole: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """Of one layer and tile: input vectors loaded, and row blocks. A column is loaded once per block of rows that keeps a weight
    of it; `height` rows of a pattern's block stand and fall together; `whole`: rows keep everything or nothing."""
    per_group = rows / np.maximum(groups, 1)
    blocks = np.ceil(np.maximum(per_group, 1) / ROWS_AT_ONCE)
    inside = np.maximum(per_group / blocks / height, 1)
    density = np.clip(density, 0, 1)
    kept = np.where(whole, 1 - (1 - 1 / blocks) ** (density * per_group), 1 - (1 - density) ** inside)
    return groups * blocks * columns * kept, groups * blocks


def _pieces(tiles: Floats) -> Floats:
    """In how many goes a depthwise kernel takes its tiles: 8 at a time, 7 where that comes out even, then 4 and single ones."""
    sizes, which = np.unique(tiles.astype(np.int64), return_inverse=True)
    return np.array([_goes(int(size)) for size in sizes], dtype=float)[which]


@lru_cache(maxsize=10_000)
def _goes(tiles: int) -> int:
    goes = 0
    while tiles >= 4:
        tiles -= 7 if tiles >= 7 and (tiles % 7 == 0 or tiles % 8 == 7) else 8 if tiles >= 8 else 4
        goes += 1
    return goes + tiles


def _in_line(length: Floats) -> NDArray[np.bool_]:
    """Whether sevens and fours add up to a length."""
    return np.asarray(
        np.any([(length >= 7 * n) & ((length - 7 * n) % 4 == 0) for n in range(4)], axis=0) & (length > 0)
    )


def work(steps: pd.DataFrame) -> Floats:
    """Counts of work, float64[n, len(WORK_FEATURES)], in units of the order of a nanosecond each.

    macs: 16 at a time, as executed; of full windows: of depthwise layers that share what they read, as they keep everything; from
    far code: those whose code leaves the caches and is fetched for every tile; border macs: of pooling windows that reach over
    the image's edge. loads: input vectors, as often as a block of output channels needs them; from far: where a tile's inputs
    leave the cache. splats, starts, surprises: weights, channels and irregular channels of a depthwise layer, once per go of 8
    tiles. outputs: vectors written; sums: of those with a residual; rewrites: once per further chunk of inputs; exponentials,
    clamps: those through such activations. weights; bytes; far bytes: of values that leave the second-level cache. lines: rows of
    tiles. padded macs: of dense layers, channels rounded up to 16. channels; followers: calls of torch after a layer; one per call.
    """
    c, t = _columns(steps), {name: values.to_numpy() for name, values in traits(steps).items()}
    tiles = np.maximum(c["tiles"], np.ceil(c["positions"] / 16))
    kind = steps["kind"].to_numpy(dtype=object)
    conv, torch = ((steps["kernel"] == name).to_numpy() for name in ("specialised", "torch"))
    depthwise, whole = kind == "depthwise", (steps["pattern"] == "channel").to_numpy()
    rows = np.where(t["rows"] > 0, t["rows"], c["channels_out"])
    columns = np.where(t["columns"] > 0, t["columns"], c["channels_in"] / np.maximum(c["groups"], 1) * c["window"])
    one = np.ones(len(rows))
    loads, blocks = _loads(c["density"], rows, columns, t["layer_groups"], t["pattern_rows"], whole)
    second, _ = _loads(c["density"], t["rows2"], t["columns2"], one, t["pattern_rows"], whole)
    touched = columns * t["layer_groups"] * (1 - (1 - np.clip(c["density"], 0, 1)) ** np.minimum(rows, RANGE_ROWS))
    chunks = np.maximum(np.ceil(touched / VECTORS), 1)
    macs = c["macs"] / 16
    # depthwise
    lengths = np.where(_in_line(t["row_tiles"]), t["row_tiles"], t["tile_rows"])
    sided = np.isin(c["window"], (9, 15, 21, 25, 35)) & (c["stride"] == 1) & (t["dilation"] <= 1)
    full = depthwise & (c["density"] >= 1) & sided & _in_line(lengths)
    taps = depthwise & ~full
    pieces = np.where(depthwise, _pieces(tiles), 0)
    irregular = np.where(taps & ~whole, np.minimum(c["density"], 1 - c["density"]) * 2, 0)
    # pooling
    height, width = np.maximum(t["tile_rows"], 1), np.maximum(t["row_tiles"], 1)
    inner = np.maximum(height - 2 * t["padding"], 0) / height * np.maximum(width - 2 * t["padding"], 0) / width
    pooled = np.isin(kind, ("max_pool", "avg_pool"))
    code = 11.0 * c["nnz"]
    outputs = tiles * (rows + t["rows2"])
    lines = np.where(t["tile_rows"] > 0, t["tile_rows"], np.ceil(tiles / 4))
    moved = c["in_bytes"] + c["out_bytes"]
    padded = np.ceil(c["channels_out"] / 16) * np.ceil(columns / c["window"] / 16) * 16 * c["window"] * c["positions"]
    counts = [
        np.where(torch & (t["pool_window"] > 1), t["pool_window"] * outputs, macs) / 4,
        np.where(full, macs, 0) / 4,
        np.where(conv, macs * _beyond(code, FIRST_CACHE), 0) / 4,
        np.where(conv, macs * _beyond(code, SECOND_CACHE), 0) / 4,
        np.where(conv, (loads + second) * tiles, 0) / 4,
        np.where(conv, loads * tiles * _beyond(64 * touched, FIRST_CACHE), 0) / 4,
        np.where(taps, c["nnz"] * pieces, 0) / 4,
        rows * pieces,
        rows * pieces * irregular * 4,
        np.where(pooled, macs * (1 - inner), 0) / 4,
        outputs / 4,
        outputs * t["residual"] / 4,
        np.where(conv, outputs * (chunks - 1), 0) / 4,
        outputs * t["exponentials"] * 4,
        outputs * t["clamps"] / 4,
        c["nnz"],
        c["weight_bytes"] / 32,
        c["in_bytes"] / 64,
        c["out_bytes"] / 64,
        moved * _beyond(moved, SECOND_CACHE) / 32,
        lines * np.where(conv, np.maximum(blocks / 5, 1) * chunks, 1) * 4,
        np.where(torch & (t["rows"] > 0), padded / 16, 0),
        c["channels_in"] + c["channels_out"],
        t["followers"] * 100.0,
        np.full(len(steps), 100.0),
    ]
    return np.stack(counts, axis=1)


def shape(steps: pd.DataFrame) -> Floats:
    """Logarithms of sizes and the like, float64[n, len(SHAPE_FEATURES)], all finite."""
    c, t = _columns(steps), {name: values.to_numpy() for name, values in traits(steps).items()}
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
        np.log(t["row_tiles"] + 1),
        *(t[name] for name in ("exponentials", "clamps", "residual")),
        *(np.log(t[name] + 1) for name in ("dilation", "columns2", "pool_window", "followers")),
        *(pattern.str.contains(name, regex=False).to_numpy(float) for name in PATTERNS),
    ]
    return np.stack(columns, axis=1)
