"""The slow obvious twin of every kernel: plain loops that mirror the definition. Tests compare against these.

Nothing here is meant to be fast, and nothing outside tests should call it. All arithmetic is in Python floats (float64).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ops.formats import CSR

__all__ = ["activate", "csr_conv2d", "csr_linear"]


def activate(value: float, activation: str) -> float:
    """One number through an activation; NaN stays NaN.

    Args:
        value: v.
        activation: "none"; "relu", max(v, 0); "relu6", min(max(v, 0), 6); "hardswish", v · relu6(v + 3) / 6; or "silu",
            v / (1 + e^-v).

    Raises:
        ValueError: another activation.

    Source: hardswish as in MobileNetV3, Howard et al. 2019 (arXiv:1905.02244); silu as in Elfwing et al. 2018
    (arXiv:1702.03118).
    """
    if activation == "none" or math.isnan(value):
        return value
    if activation == "relu":
        return max(value, 0.0)
    if activation == "relu6":
        return min(max(value, 0.0), 6.0)
    if activation == "hardswish":
        return value * activate(value + 3, "relu6") / 6
    if activation == "silu":
        small = math.exp(-abs(value))  # in this form nothing overflows
        return value / (1 + small) if value >= 0 else value * small / (1 + small)
    raise ValueError(f'unknown activation "{activation}"; known: none, relu, relu6, hardswish, silu')


def csr_linear(
    x: npt.NDArray[np.float32],
    weight: CSR,
    bias: npt.NDArray[np.float32] | None = None,
    activation: str = "none",
    residual: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """out[n, i] = act(bias[i] + Σ_k values[k] · x[n, indices[k]] + residual[n, i]) over the entries k of row i.

    Args:
        x: float[batch, cols].
        weight: CSR of shape (rows, cols).
        bias: float[rows] or None.
        activation: see `activate`.
        residual: float[batch, rows] or None.

    Returns:
        float64[batch, rows].
    """
    out = np.zeros((x.shape[0], weight.shape[0]))
    for n in range(x.shape[0]):
        for i in range(weight.shape[0]):
            total = 0.0 if bias is None else float(bias[i])
            for k in range(weight.indptr[i], weight.indptr[i + 1]):
                total += float(weight.values[k]) * float(x[n, weight.indices[k]])
            total += 0.0 if residual is None else float(residual[n, i])
            out[n, i] = activate(total, activation)
    return out


def csr_conv2d(
    x: npt.NDArray[np.float32],
    weight: CSR,
    kernel_size: tuple[int, int],
    bias: npt.NDArray[np.float32] | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    residual: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """act(conv(x) + bias + residual): cross-correlation, as torch.conv2d with zero padding, one output number at a time.

    Args:
        x: float[batch, in, height, width].
        weight: CSR of shape (out, in/groups * kernel_height * kernel_width), columns in the order (in, ky, kx).
        kernel_size: (kernel_height, kernel_width).
        bias: float[out] or None.
        stride: (vertical, horizontal).
        padding: (top, bottom, left, right) in pixels of the input.
        dilation: (vertical, horizontal).
        groups: as in torch.
        activation: see `activate`.
        residual: float[batch, out, out_height, out_width] or None.

    Returns:
        float64[batch, out, out_height, out_width].
    """
    batch, _, height, width = x.shape
    kh, kw = kernel_size
    out_height = (height + padding[0] + padding[1] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + padding[2] + padding[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    rows = weight.shape[0]
    channels_per_group = weight.shape[1] // (kh * kw)
    out = np.zeros((batch, rows, out_height, out_width))
    for n in range(batch):
        for o in range(rows):
            first_channel = (o // (rows // groups)) * channels_per_group
            for oy in range(out_height):
                for ox in range(out_width):
                    total = 0.0 if bias is None else float(bias[o])
                    for k in range(weight.indptr[o], weight.indptr[o + 1]):
                        channel, tap = divmod(int(weight.indices[k]), kh * kw)
                        ky, kx = divmod(tap, kw)
                        iy = oy * stride[0] + ky * dilation[0] - padding[0]
                        ix = ox * stride[1] + kx * dilation[1] - padding[2]
                        if 0 <= iy < height and 0 <= ix < width:
                            total += float(weight.values[k]) * float(x[n, first_channel + channel, iy, ix])
                    total += 0.0 if residual is None else float(residual[n, o, oy, ox])
                    out[n, o, oy, ox] = activate(total, activation)
    return out
