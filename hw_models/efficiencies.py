"""What share of a device's roofs an operation reaches, by what it is and what runs it: the constants of the analytical model.

A row is (e_F, e_B, calls, sigma): the share of the peak that multiply-adds reach; the share of the bandwidth of the memory level
that the operation's data fit into (up to 3, because data just written lie further in than that); the cost of one execution, in
calls (`call_us` of the device); how far off a time is on a device with measured roofs, as a standard deviation of its logarithm.

CPU rows were fitted to 2,500 steps of 46 networks, timed in place on one thread of an AVX-512 host (116 GFLOP/s, L2 101 GB/s, call
14 us). Rows of sparse, N:M and dense weights are apart. GPU rows are not fitted: from the literature, and wide.

Start with `efficiencies`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["Efficiency", "Lookup", "efficiencies"]


class Efficiency(NamedTuple):
    """See the module."""

    compute: float
    bandwidth: float
    calls: float
    sigma: float


class Lookup(NamedTuple):
    """Efficiencies of steps: float[steps] each, and whether the step is of a kind that has a row."""

    compute: npt.NDArray[np.float64]
    bandwidth: npt.NDArray[np.float64]
    calls: npt.NDArray[np.float64]
    sigma: npt.NDArray[np.float64]
    known: npt.NDArray[np.bool_]


_ANY = ""
# (kind, kernel, weights): weights are "dense", "sparse" (unstructured, channels), "block", "n:m", or any.
_CPU: dict[tuple[str, str, str], Efficiency] = {
    ("conv", "specialised", "dense"): Efficiency(0.98, 3.0, 0.0035, 0.20),
    ("conv", "specialised", "n:m"): Efficiency(0.98, 3.0, 0.0035, 0.20),
    ("conv", "specialised", "block"): Efficiency(0.98, 3.0, 0.0055, 0.22),
    ("conv", "specialised", "sparse"): Efficiency(0.98, 1.8, 0.0045, 0.25),
    ("conv", "portable", "dense"): Efficiency(0.76, 1.2, 0.004, 0.15),
    ("conv", "portable", "n:m"): Efficiency(0.72, 1.5, 0.0035, 0.15),
    ("conv", "portable", "block"): Efficiency(0.64, 2.8, 0.009, 0.25),
    ("conv", "portable", "sparse"): Efficiency(0.71, 1.2, 0.003, 0.20),
    ("pair", "specialised", _ANY): Efficiency(0.70, 3.0, 0.01, 0.30),
    ("pair", "portable", _ANY): Efficiency(0.60, 1.5, 0.01, 0.30),
    ("depthwise", "portable", "dense"): Efficiency(0.98, 1.2, 0.016, 0.30),
    ("depthwise", "portable", _ANY): Efficiency(0.64, 1.7, 0.007, 0.25),
    ("depthwise", "specialised", _ANY): Efficiency(0.64, 1.7, 0.007, 0.30),
    ("linear", "portable", _ANY): Efficiency(0.98, 0.52, 0.0045, 0.50),
    ("linear", "specialised", _ANY): Efficiency(0.98, 0.52, 0.0045, 0.50),
    ("max_pool", "lanes", _ANY): Efficiency(0.23, 3.0, 0.008, 0.25),
    ("avg_pool", "lanes", _ANY): Efficiency(0.80, 2.0, 0.003, 0.30),
    ("halo", "lanes", _ANY): Efficiency(1.0, 1.0, 0.005, 0.26),
    ("activate", "lanes", _ANY): Efficiency(1.0, 0.95, 0.003, 0.24),
    ("add", "lanes", _ANY): Efficiency(1.0, 1.0, 0.002, 0.24),
    ("affine", "lanes", _ANY): Efficiency(1.0, 0.73, 0.001, 0.32),
    ("global_average", "lanes", _ANY): Efficiency(1.0, 0.57, 0.009, 0.54),
    ("to_lanes", "lanes", _ANY): Efficiency(1.0, 0.40, 0.007, 0.42),
    ("from_lanes", "lanes", _ANY): Efficiency(1.0, 0.57, 0.09, 0.70),
    ("relayout", "lanes", _ANY): Efficiency(1.0, 0.25, 0.002, 0.30),
    ("fetch", "lanes", _ANY): Efficiency(1.0, 1.0, 0.13, 0.52),
    (_ANY, "lanes", _ANY): Efficiency(0.5, 0.7, 0.005, 0.50),
    ("torch.conv2d", "torch", _ANY): Efficiency(0.50, 0.25, 0.73, 0.33),
    ("torch.depthwise_conv2d", "torch", _ANY): Efficiency(0.50, 0.09, 3.6, 0.40),
    ("torch.linear", "torch", _ANY): Efficiency(0.50, 0.50, 0.40, 0.60),
    # these run without vectors
    ("torch.max_pool2d", "torch", _ANY): Efficiency(0.1, 0.003, 2.6, 0.70),
    ("torch.avg_pool2d", "torch", _ANY): Efficiency(0.1, 0.009, 0.1, 0.40),
    ("torch.adaptive_avg_pool2d", "torch", _ANY): Efficiency(0.1, 0.009, 1.0, 0.40),
    ("torch.batch_norm2d", "torch", _ANY): Efficiency(0.1, 0.013, 1.8, 0.40),
    ("torch.cat", "torch", _ANY): Efficiency(1.0, 0.11, 0.50, 0.30),
    **{
        (f"torch.{kind}", "torch", _ANY): Efficiency(1.0, 0.26, 0.20, 0.40)
        for kind in ("relu", "relu6", "hardswish", "hardsigmoid", "add", "mul", "sub", "pad", "clone", "contiguous")
    },
    **{
        (f"torch.{kind}", "torch", _ANY): Efficiency(1.0, 3.0, 0.20, 0.80)
        for kind in ("flatten", "view", "reshape", "getitem", "permute", "transpose", "squeeze", "unsqueeze", "chunk")
    },
    **{
        (f"torch.{kind}", "torch", _ANY): Efficiency(1.0, 0.05, 0.40, 0.50)
        for kind in ("gelu", "silu", "sigmoid", "tanh", "softmax", "layer_norm", "batch_norm", "mean")
    },
}
# Dense: half the FP32 peak, as cuDNN reaches on large layers. Sparse: 27 % of it (Gale et al. 2020, arXiv:2006.10901, abstract).
# 2:4: the tiles of dense layers at half their work, less the loss of Mishra et al. 2021 (arXiv:2104.08378, Fig. 3) on small ones.
_GPU: dict[tuple[str, str, str], Efficiency] = {
    (_ANY, _ANY, "dense"): Efficiency(0.50, 0.70, 1.0, 0.60),
    (_ANY, _ANY, "block"): Efficiency(0.35, 0.70, 1.0, 0.70),
    (_ANY, _ANY, "sparse"): Efficiency(0.27 * 0.5, 0.50, 1.0, 0.80),
    (_ANY, _ANY, "n:m"): Efficiency(0.40, 0.60, 1.0, 0.70),
    ("depthwise", _ANY, _ANY): Efficiency(0.10, 0.50, 1.0, 0.70),
    ("torch.depthwise_conv2d", _ANY, _ANY): Efficiency(0.10, 0.50, 1.0, 0.70),
}
_UNKNOWN = Efficiency(0.10, 0.05, 0.50, 1.00)


def efficiencies(steps: pd.DataFrame, device_class: str) -> Lookup:
    """The constants for each step.

    Args:
        steps: kind, kernel, pattern, density of each (`hw_models.workload.STEP_COLUMNS`).
        device_class: "cpu" or "gpu".
    """
    table = _GPU if device_class == "gpu" else _CPU
    weights = [_weights(p, d) for p, d in zip(steps["pattern"], steps["density"])]
    found: dict[tuple[str, str, str], tuple[Efficiency, bool]] = {}
    rows = []
    for what in zip(steps["kind"], steps["kernel"], weights):
        if what not in found:
            found[what] = _find(table, *what)
        rows.append(found[what])
    numbers = np.array([row for row, _ in rows], np.float64).reshape(len(rows), 4)
    compute, bandwidth, calls, sigma = numbers.T
    return Lookup(compute, bandwidth, calls, sigma, np.array([known for _, known in rows], bool))


def _weights(pattern: str, density: float) -> str:
    """How the zeros lie, as far as speed depends on it; a pair has the patterns of both layers, the less regular one counts."""
    parts = [part for part in pattern.split("+") if part]
    if not parts or density >= 1.0:
        return "dense"
    if any(part in ("unstructured", "channel") for part in parts):
        return "sparse"
    return "block" if any("x" in part for part in parts) else "n:m"


def _find(
    table: dict[tuple[str, str, str], Efficiency], kind: str, kernel: str, weights: str
) -> tuple[Efficiency, bool]:
    """The most particular row there is, and whether it is one that knows the kind."""
    known = _known_kind(kind)
    for key in (
        (kind, kernel, weights),
        (kind, kernel, _ANY),
        (kind, _ANY, _ANY),
        (_ANY, kernel, _ANY),
        (_ANY, _ANY, weights),
    ):
        if key in table and (known or key[0]):
            return table[key], known
    return _UNKNOWN, False


def _known_kind(kind: str) -> bool:
    """Operations of torch that no row names may do anything; steps of our own are all known."""
    return not kind.startswith("torch.") or (kind, "torch", _ANY) in _CPU
