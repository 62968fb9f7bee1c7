"""Building blocks of chain networks: plain convolution, depthwise-separable and inverted residual.

All take (in_channels, out_channels, kernel, stride), keep the size at stride 1 and halve it (rounding up) at stride 2.
Dense as made; `ops.layers.sparsify` makes them sparse.
"""

from __future__ import annotations

import torch
from torch import nn


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution without bias, batch norm and, unless `act` is False, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class Residual(nn.Module):
    """`body(x) + x` where the shapes allow it (stride 1, equal channels), else `body(x)`."""

    def __init__(self, body: nn.Module, residual: bool) -> None:
        super().__init__()
        self.body = body
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, in_channels, height, width] to float[batch, out_channels, height', width']."""
        y = self.body(x)
        return y + x if self.residual else y


def conv_block(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """One k x k convolution with batch norm and ReLU, residual where the shapes allow it."""
    return Residual(conv_norm(in_channels, out_channels, kernel, stride), stride == 1 and in_channels == out_channels)


def separable_block(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """Depthwise k x k, then 1x1, each with batch norm and ReLU.

    Source: MobileNet, Howard et al. 2017 (arXiv:1704.04861), section 3.1.
    """
    body = nn.Sequential(
        conv_norm(in_channels, in_channels, kernel, stride, groups=in_channels), conv_norm(in_channels, out_channels, 1)
    )
    return Residual(body, stride == 1 and in_channels == out_channels)


def mbconv_block(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, expand: int = 3) -> nn.Module:
    """Inverted residual: 1x1 to `expand` times the channels, depthwise k x k, linear 1x1.

    Source: MobileNetV2, Sandler et al. 2018 (arXiv:1801.04381), section 3.3.
    """
    hidden = in_channels * expand
    body = nn.Sequential(
        conv_norm(in_channels, hidden, 1),
        conv_norm(hidden, hidden, kernel, stride, groups=hidden),
        conv_norm(hidden, out_channels, 1, act=False),
    )
    return Residual(body, stride == 1 and in_channels == out_channels)


BLOCKS = {"conv": conv_block, "separable": separable_block, "mbconv": mbconv_block}
"""name -> block; all take in_channels, out_channels, kernel, stride."""
