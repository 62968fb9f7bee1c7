"""The activations every kernel can apply to its result, by name and number; compiled code gets the number.

Start with `ACTIVATIONS`; `activated` is the compiled form for a vector, `activated_one` for a float. Twin:
`ops.reference.activate`.
"""

from __future__ import annotations

import math

import numpy as np

from ops.kernels.vector import divide, floor, fma, jit, larger, multiply, power_of_two, smaller, splat, zero

__all__ = ["ACTIVATIONS", "activated", "activated_one"]

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "hardswish": 3, "silu": 4}

_LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts, the first exact in few bits, so that x - n ln 2 loses nothing (Cody and Waite 1980)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / math.factorial(k)) for k in (2, 3, 4, 5, 6))
_ZERO, _HALF, _ONE, _THREE, _SIX = (np.float32(v) for v in (0, 0.5, 1, 3, 6))
_SIXTH = np.float32(1 / 6)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(87.0)


@jit
def exponential(x):
    """e^x per lane for x in [-87, 87], nearest bound beyond; relative error below 4e-7. NaN stays NaN."""
    x = smaller(larger(x, splat(_LOWEST)), splat(_HIGHEST))
    n = floor(fma(x, splat(_LOG2_E), splat(_HALF)))
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))
    p = fma(splat(_C6), r, splat(_C5))
    p = fma(p, r, splat(_C4))
    p = fma(p, r, splat(_C3))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_ONE))
    return multiply(fma(p, r, splat(_ONE)), power_of_two(n))


@jit
def activated(x, activation):
    """x through the activation of that number, per lane."""
    if activation == 0:
        return x
    if activation == 1:
        return larger(x, zero())
    if activation == 2:
        return smaller(larger(x, zero()), splat(_SIX))
    if activation == 3:
        gate = smaller(larger(fma(splat(_ONE), x, splat(_THREE)), zero()), splat(_SIX))
        return multiply(multiply(x, gate), splat(_SIXTH))
    one = splat(_ONE)
    return divide(x, fma(one, exponential(multiply(x, splat(-_ONE))), one))


@jit
def activated_one(x, activation):
    """One float through the activation of that number."""
    if activation == 0:
        return x
    if activation == 1:
        return _ZERO if x < _ZERO else x
    if activation == 2:
        return _ZERO if x < _ZERO else (_SIX if x > _SIX else x)
    if activation == 3:
        gate = x + _THREE
        gate = _ZERO if gate < _ZERO else (_SIX if gate > _SIX else gate)
        return x * gate * _SIXTH
    return np.float32(x / (1.0 + math.exp(-x)))
