"""Candidate operations of the cell spaces: separable, dilated and plain convolutions, pooling, identity, none.

All are dense as made (`ops.layers.sparsify` makes them sparse), have no convolution bias, and no in-place ReLU: the
states of a cell are read by several operations. Chains of blocks are elsewhere (blocks.py). Start with `OPERATIONS` and
`candidates`.

Papers disagree on the strided identity: `OPERATIONS` has that of DARTS (`FactorizedReduce`), `NASNET_OPERATIONS` that of
NASNet (a strided 1x1 convolution); they differ in nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

Candidate = Callable[..., nn.Module]
"""`candidate(in_channels, out_channels, stride=1, affine=True, odd=False) -> nn.Module`.

Maps float[batch, in_channels, height, width] to float[batch, out_channels, ceil(height / stride), ceil(width /
stride)]. `affine`: batch norms have a learned scale and shift (supernets switch them off). `odd`: the image has an odd
height or width, which only the strided identity needs to know.
"""


class ReluConvNorm(nn.Sequential):
    """ReLU, convolution, batch norm."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)


class IdentityProjection(ReluConvNorm):
    """The identity where shapes differ, as NASNet has it: ReLU, 1x1 convolution with the stride, batch norm. Never drop-pathed."""


class SpatialPairConv(nn.Sequential):
    """ReLU, 1 x k convolution, k x 1 convolution, batch norm (one, at the end, as in the published DARTS-family code)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, affine: bool = True) -> None:
        super().__init__()
        pad = kernel // 2
        self.relu = nn.ReLU()
        self.row = nn.Conv2d(in_channels, out_channels, (1, kernel), (1, stride), (0, pad), bias=False)
        self.column = nn.Conv2d(out_channels, out_channels, (kernel, 1), (stride, 1), (pad, 0), bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)


class DepthwiseSeparable(nn.Sequential):
    """ReLU, depthwise k x k (with stride and dilation), pointwise 1x1, batch norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        pad = dilation * (kernel // 2)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel, stride, pad, dilation, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)


class FactorizedReduce(nn.Module):
    """Halve the image without losing pixels: two strided 1x1 convolutions, the second on the image shifted by one,
    concatenated.

    An odd number of output channels gives the second path one more. For an odd image the shifted one is padded with a
    zero row and column at the bottom right; for an even one the padding would never be read, so it is left out.

    Args:
        in_channels, out_channels: channels before and after.
        relu: start with a ReLU (DARTS and NASNet's alignment of inputs do; NASNet's at concatenation does not).
        odd: height or width is odd.
        affine: learned scale and shift in the batch norm.

    Source: Zoph et al. 2018 (arXiv:1707.07012) in its published code; DARTS, Liu et al. 2019 (arXiv:1806.09055).
    """

    def __init__(
        self, in_channels: int, out_channels: int, relu: bool = True, odd: bool = False, affine: bool = True
    ) -> None:
        super().__init__()
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.odd = odd
        self.conv0 = nn.Conv2d(in_channels, out_channels // 2, 1, 2, bias=False)
        self.conv1 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, in_channels, height, width] to float[batch, out_channels, ceil(height / 2), ceil(width / 2)]."""
        x = self.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1)) if self.odd else x
        return self.norm(torch.cat([self.conv0(x), self.conv1(shifted[:, :, 1:, 1:])], dim=1))


class Zero(nn.Module):
    """The operation "none": zeros of the right shape. Cells leave it out of their sums instead of running it.

    Where channels differ it cannot be made without a shape; then it is an error at construction.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False):
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(
                f'operation "none" keeps the number of channels, got {in_channels} in and {out_channels} out; '
                "align the channels first"
            )
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, channels, height, width] to zeros[batch, channels, ceil(height / stride), ceil(width / stride)]."""
        return torch.zeros_like(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


def separable(
    kernel: int, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False
) -> nn.Module:
    """Depthwise-separable convolution applied twice; the first one has the stride and changes the channels."""
    return nn.Sequential(
        DepthwiseSeparable(in_channels, out_channels, kernel, stride, affine=affine),
        DepthwiseSeparable(out_channels, out_channels, kernel, affine=affine),
    )


def dilated(
    kernel: int, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False
) -> nn.Module:
    """Depthwise-separable convolution with dilation 2, applied once."""
    return DepthwiseSeparable(in_channels, out_channels, kernel, stride, dilation=2, affine=affine)


def convolution(
    kernel: int, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False
) -> nn.Module:
    """ReLU, k x k convolution, batch norm."""
    return ReluConvNorm(in_channels, out_channels, kernel, stride, affine)


def spatial_pair(
    kernel: int, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False
) -> nn.Module:
    """ReLU, 1 x k and k x 1 convolutions, batch norm."""
    return SpatialPairConv(in_channels, out_channels, kernel, stride, affine)


def pooling(
    kind: str,
    kernel: int,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    affine: bool = True,
    odd: bool = False,
) -> nn.Module:
    """Max or average pooling (the average leaves padding out); where channels differ, a 1x1 convolution and batch norm after it."""
    pool = (
        nn.MaxPool2d(kernel, stride, kernel // 2)
        if kind == "max"
        else nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=False)
    )
    if in_channels == out_channels:
        return pool
    return nn.Sequential(
        pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, affine=affine)
    )


def skip(in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False) -> nn.Module:
    """Identity; with a stride `FactorizedReduce`, where only channels differ ReLU, 1x1 convolution, batch norm."""
    if stride == 2:
        return FactorizedReduce(in_channels, out_channels, odd=odd, affine=affine)
    if in_channels != out_channels:
        return ReluConvNorm(in_channels, out_channels, affine=affine)
    return nn.Identity()


def projected_skip(
    in_channels: int, out_channels: int, stride: int = 1, affine: bool = True, odd: bool = False
) -> nn.Module:
    """Identity; with a stride or other channels ReLU, 1x1 convolution with the stride, batch norm (NASNet's)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return IdentityProjection(in_channels, out_channels, 1, stride, affine)


OPERATIONS: dict[str, Candidate] = {
    "none": Zero,
    "max_pool_3x3": partial(pooling, "max", 3),
    "avg_pool_3x3": partial(pooling, "avg", 3),
    "skip_connect": skip,
    "sep_conv_3x3": partial(separable, 3),
    "sep_conv_5x5": partial(separable, 5),
    "sep_conv_7x7": partial(separable, 7),
    "dil_conv_3x3": partial(dilated, 3),
    "dil_conv_5x5": partial(dilated, 5),
    "conv_7x1_1x7": partial(spatial_pair, 7),
    "conv_3x1_1x3": partial(spatial_pair, 3),
    "conv_1x1": partial(convolution, 1),
    "conv_3x3": partial(convolution, 3),
    "max_pool_5x5": partial(pooling, "max", 5),
    "max_pool_7x7": partial(pooling, "max", 7),
    "nor_conv_1x1": partial(convolution, 1),
    "nor_conv_3x3": partial(convolution, 3),
}
"""Every operation by the field's name for it. "nor_conv" is NAS-Bench-201's name for "conv"."""

DARTS_PRIMITIVES = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The seven of the DARTS space in its order, without "none". Source: Liu et al. 2019 (arXiv:1806.09055), section 3.1."""

NASNET_PRIMITIVES = (
    "skip_connect",
    "conv_3x1_1x3",
    "conv_7x1_1x7",
    "dil_conv_3x3",
    "avg_pool_3x3",
    "max_pool_3x3",
    "max_pool_5x5",
    "max_pool_7x7",
    "conv_1x1",
    "conv_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
)
"""The thirteen of the NASNet space in the paper's order. Its "3x3 dilated convolution" is taken to be
depthwise-separable, as in DARTS.

Source: Zoph et al. 2018 (arXiv:1707.07012), section 3.
"""

NASBENCH201_PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""The five of NAS-Bench-201 in its order. Source: Dong and Yang 2020 (arXiv:2001.00326), section 2.1."""

NASNET_OPERATIONS: dict[str, Candidate] = {**OPERATIONS, "skip_connect": projected_skip}
"""`OPERATIONS` with NASNet's strided identity."""


def candidates(names: Iterable[str], operations: dict[str, Candidate] = OPERATIONS) -> dict[str, Candidate]:
    """The operations called `names`, in that order.

    Raises:
        ValueError: an unknown or repeated name, or no name at all.
    """
    chosen: dict[str, Candidate] = {}
    for name in names:
        if name not in operations:
            near = difflib.get_close_matches(name, operations, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ";"
            raise ValueError(f'unknown operation "{name}"{hint} known: {", ".join(sorted(operations))}')
        if name in chosen:
            raise ValueError(f'operation "{name}" is named twice; name each operation once')
        chosen[name] = operations[name]
    if not chosen:
        raise ValueError(f"expected at least one operation, got none; known: {', '.join(sorted(operations))}")
    return chosen
