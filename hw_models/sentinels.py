"""Two fixed kernels that tell whether the machine is still as it was: a dense product of matrices and a sparse convolution.

They are timed in every measuring run. When one of them takes 3 % more or less than it did, everything else may have moved too, and
the `MeasurementStore` begins a new epoch.

Start with `sentinel_calls` and `moved`.

Source: two fixed kernels in every measuring run and the limit of 3 %, as in section 4.3 of the project's collection of facts about
latency models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from hw_models.measure import Measurement

__all__ = ["SAME", "moved", "sentinel_calls"]

SAME = 0.03  # relative; beyond it a sentinel has moved
DENSE, SPARSE = "sentinel: dense matmul", "sentinel: sparse convolution"


def sentinel_calls(threads: int = 1) -> dict[str, Callable[[], object]]:
    """The sentinels, to be measured with everything else of a run.

    Args:
        threads: of the compiled kernels; those of torch are what is set when a sentinel is called.

    Returns:
        By name: torch's dense float32[384, 384] @ [384, 384], a matter of the core's arithmetic, and a 3x3 convolution of 64 to 64
        channels on 32 x 32 pixels at density 0.1, unstructured, by the kernels of `ops.runtime`. About 1.1 and 0.1 ms on one thread
        of an AVX-512 host. The same numbers in every process.
    """
    a, b, out = _numbers(384, 384), _numbers(384, 384, seed=1), torch.empty(384, 384)

    def dense() -> object:
        with torch.no_grad():
            return torch.mm(a, b, out=out)

    return {DENSE: dense, SPARSE: _sparse(threads)}


def moved(old: Mapping[str, Measurement], new: Mapping[str, Measurement], limit: float = SAME) -> dict[str, float]:
    """The sentinels whose times differ by more than `limit`.

    Args:
        old, new: measurements by name of the sentinel.
        limit: relative to the old time; 0.03 = 3 %.

    Returns:
        new / old - 1 of those that moved; NaN for one that is in one of the two only, or had no time. Empty: nothing moved.
    """
    changes = {}
    for name in {**old, **new}:
        both = name in old and name in new and old[name].floor_ms > 0
        change = new[name].floor_ms / old[name].floor_ms - 1 if both else math.nan
        if not abs(change) <= limit:
            changes[name] = change
    return changes


def _sparse(threads: int) -> Callable[[], object]:
    from ops.layers import SparseConv2d, draw_masks_  # late, like all that is only needed to run it
    from ops.plan import lower
    from ops.runtime import Runtime

    with torch.random.fork_rng(devices=[]):  # the layer draws weights of its own
        layer = SparseConv2d(64, 64, 3, padding=1, bias=False, density=0.1)
    with torch.no_grad():
        layer.weight.copy_(_numbers(*layer.weight.shape))
    network = nn.Sequential(layer).eval()
    draw_masks_(network, torch.Generator().manual_seed(2))
    example = _numbers(1, 64, 32, 32, seed=1)
    runtime = Runtime(lower(network, example, lambda _, kernels: kernels[-1]), threads)
    return lambda: runtime(example)


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers that do not depend on torch's global state, nor change it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
