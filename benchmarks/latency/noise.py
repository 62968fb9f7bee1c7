"""The same kernel measured twice: the A/A figure of the measuring protocol itself.

Ten sparse layers in a measuring run of 16 rounds, in random order; the even rounds are one measurement of 8 rounds, the odd ones
another. Start with `kernels_twice`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import nn

from benchmarks.kernels.layers import Case, chain, example, select
from hw_models.measure import Measurer, threads_at
from ops.plan import lower
from ops.runtime import Runtime

__all__ = ["KERNELS", "kernels_twice", "twice"]

ROUNDS = 8
KERNELS = (
    ("c3_64_56", 0.1),
    ("c3_128_28", 0.1),
    ("c3_256_14", 0.05),
    ("c3_16_32", 0.2),
    ("p1_960_320_7", 0.1),
    ("p1_96_24_56", 0.2),
    ("c1_256_16", 0.1),
    ("c1_144_8", 0.5),
    ("linear_1024_1000", 0.1),
    ("linear_4096_4096", 0.02),
)
"""(layer of `benchmarks.kernels.layers`, density): from about 5 microseconds to half a millisecond."""


def kernels_twice(measurer: Measurer) -> pd.DataFrame:
    """Measure every kernel twice, interleaved.

    Returns:
        A row per kernel: layer, density, first_ms, second_ms, off (relative difference).
    """
    calls = {}
    with threads_at(measurer.threads), torch.inference_mode():
        for name, density in KERNELS:
            (case,) = select(name)
            runtime, x = _runtime(case, density, measurer.threads), example(case, 1)
            calls[f"{name} {density:g}"] = partial(runtime, x)
        measured = replace(measurer, rounds=2 * ROUNDS, cap_rounds=2 * ROUNDS).measure(calls)
    halves = [(min(m.rounds[::2]), min(m.rounds[1::2])) for m in measured.values()]
    frame = pd.DataFrame(KERNELS, columns=["layer", "density"])
    return pd.concat([frame, twice(halves)], axis=1)


def twice(pairs: list[tuple[float, float]]) -> pd.DataFrame:
    """first_ms, second_ms and off = |second / first - 1| of things measured twice."""
    frame = pd.DataFrame(pairs, columns=["first_ms", "second_ms"], dtype=float)
    return frame.assign(off=(frame["second_ms"] / frame["first_ms"] - 1).abs())


def _runtime(case: Case, density: float, threads: int) -> Runtime:
    network: nn.Module = chain(case, 1, density)
    return Runtime(lower(network, example(case, 1)), threads)
