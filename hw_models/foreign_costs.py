"""What operations cost, from their shapes where a table does not say: `costs_of(kind, numbers, density)`.

Kinds are known by words in their names ("depthwise_conv", "max_pool", "linear", ...); anything else with channels is a convolution.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PHYSICS", "costs_of", "filled"]

Floats = NDArray[np.float64]
PHYSICS = ("operations", "macs", "activations", "params")  # millions, but for the first

_WEIGHTLESS = re.compile(
    r"skip|ident|none|zero|relu|swish|act|norm|^bn|add|concat|split|shuffle|reshape|flatten|softmax|mul"
)
_POOL = re.compile(r"pool|gap")
_LINEAR = re.compile(r"linear|^fc|dense(?!net)|matmul|gemm|logits|classif")
_DEPTHWISE = re.compile(r"depthwise|dwconv|dw_conv|^dw")


def filled(numeric: dict[Any, Floats], name: str, default: float, n: int) -> Floats:
    """A column, with the default where it is missing or empty; float[n]."""
    values = numeric.get(name, np.full(n, default))
    return np.where(np.isnan(values), default, values)


def costs_of(
    kind: NDArray[np.object_], numeric: dict[Any, Floats], density: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """What each row costs: as the table says, else from the shape; 0 where nothing is known.

    Args:
        kind: str[n].
        numeric: columns that are numbers, float[n] each, NaN where not given; names as in `hw_models.foreign.fit_table`.
        density: float[n], kept fraction of the weights.

    Returns:
        float[n, 4], `PHYSICS` of one execution, in millions but for the first; and which of the four are known at all, bool[4].
    """
    n = len(kind)
    kinds, code = np.unique(kind.astype(str), return_inverse=True)
    lowered = [k.lower() for k in kinds]

    def is_a(pattern: re.Pattern[str]) -> NDArray[np.bool_]:
        return np.array([bool(pattern.search(k)) for k in lowered])[code]

    pool, linear = is_a(_POOL), is_a(_LINEAR)
    weightless = is_a(_WEIGHTLESS) & ~pool & ~linear & ~np.array(["conv" in k for k in lowered])[code]
    shape = {
        name: numeric.get(name, np.full(n, np.nan)) for name in ("c_in", "c_out", "h", "w", "kernel", "expand", "mid")
    }
    batch, stride = filled(numeric, "batch", 1.0, n), filled(numeric, "stride", 1.0, n)
    c_in = np.where(np.isnan(shape["c_in"]), shape["c_out"], shape["c_in"])
    c_out = np.where(np.isnan(shape["c_out"]), c_in, shape["c_out"])
    h = np.where(np.isnan(shape["h"]), np.where(linear, 1.0, np.nan), shape["h"])
    w = np.where(np.isnan(shape["w"]), h, shape["w"])
    kernel = np.where(np.isnan(shape["kernel"]), 1.0, shape["kernel"])
    groups = np.where(is_a(_DEPTHWISE), c_in, 1.0)
    groups = np.where(np.isnan(numeric["groups"]), groups, numeric["groups"]) if "groups" in numeric else groups
    out = c_out * h * w * batch
    mid = np.where(np.isnan(shape["mid"]), c_in * shape["expand"], shape["mid"])
    conv = c_in * c_out * kernel**2 / groups
    first = np.where(mid == c_in, 0.0, c_in * mid / groups)  # an inverted residual block: widen, depthwise, narrow
    inverted = ~np.isnan(mid)
    weights = np.where(inverted, first + mid * kernel**2 + mid * c_out / groups, np.where(linear, c_in * c_out, conv))
    weights = np.where(weightless | pool, 0.0, weights)
    macs = (
        np.where(inverted, (first * stride**2 + mid * kernel**2 + mid * c_out / groups) * h * w, weights * h * w)
        * batch
    )
    macs = np.where(pool, kernel**2 * out, macs)
    acts = np.where(inverted, out + mid * h * w * (1 + stride**2) * batch, out)
    told = {"macs": macs, "activations": acts, "params": weights}
    for name in told:
        if name in numeric:
            told[name] = np.where(np.isnan(numeric[name]), told[name], numeric[name])
    known = np.array([True, *(bool(np.isfinite(v).any()) for v in told.values())])
    told = {name: np.nan_to_num(values) for name, values in told.items()}
    kept = np.where(pool | weightless, 1.0, density)
    return np.stack(
        [np.ones(n), told["macs"] * kept / 1e6, told["activations"] / 1e6, told["params"] * kept / 1e6], axis=1
    ), known
