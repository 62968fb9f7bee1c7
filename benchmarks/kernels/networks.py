"""The networks of the network benchmark, in plain torch: ResNet-18, -50 and -20, MobileNetV1 and V2, and a DARTS network.

Random weights, scaled so that activations keep their size, and batch norm statistics of one random batch. The shifts of the batch
norms are positive: with shifts of zero, deep random networks amplify rounding errors by four orders of magnitude (measured on the
DARTS network: 2e-4 between float32 and float64 without, 1e-5 with them). `sparse` makes all but the stem and the depthwise layers
sparse.

Start with `NETWORKS` and `sparse`. Sources: He et al. 2016 (arXiv:1512.03385), Howard et al. 2017 (arXiv:1704.04861), Sandler et
al. 2018 (arXiv:1801.04381), Liu et al. 2019 (arXiv:1806.09055).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ops.layers import SparseConv2d, SparseLinear, draw_masks_, is_depthwise, sparsify
from search_spaces.darts import network_from_genotype

__all__ = ["NETWORKS", "Network", "example", "mobilenet_v1", "mobilenet_v2", "resnet", "resnet20", "settle_", "sparse"]


@dataclass(frozen=True)
class Network:
    """A network of the benchmark: how to make it, and the height and width of its RGB image."""

    build: Callable[[], nn.Module]
    size: int


def _conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _ResidualBlock(nn.Module):
    """body(x) + shortcut(x), then ReLU."""

    def __init__(self, body: Iterable[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return (
        nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(*_conv_norm(inputs, outputs, 1, stride))
    )


def _basic(inputs: int, width: int, stride: int, shortcut: nn.Module | None = None) -> _ResidualBlock:
    body = [*_conv_norm(inputs, width, 3, stride), nn.ReLU(), *_conv_norm(width, width, 3)]
    return _ResidualBlock(body, shortcut or _shortcut(inputs, width, stride))


def _bottleneck(inputs: int, width: int, stride: int) -> _ResidualBlock:
    """With the stride in the 3x3 convolution, as most implementations have it."""
    body = [
        *_conv_norm(inputs, width),
        nn.ReLU(),
        *_conv_norm(width, width, 3, stride),
        nn.ReLU(),
        *_conv_norm(width, 4 * width),
    ]
    return _ResidualBlock(body, _shortcut(inputs, 4 * width, stride))


def _head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def resnet(depths: tuple[int, ...], bottleneck: bool, classes: int = 1000) -> nn.Sequential:
    """ResNet for 224x224: `depths` blocks at 56, 28, 14 and 7. (2, 2, 2, 2) basic is ResNet-18, (3, 4, 6, 3) bottleneck -50."""
    block, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
    parts: list[nn.Module] = [*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            parts.append(block(inputs, 64 << stage, 2 if stage and i == 0 else 1))
            inputs = (64 << stage) * expansion
    return nn.Sequential(*parts, *_head(inputs, classes))


class _PaddedShortcut(nn.Module):
    """Every second pixel, and zeros for the new channels (He et al., option A): no weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::2, ::2]
        return torch.cat([x, torch.zeros_like(x)], dim=1)


def resnet20(classes: int = 10, projection: bool = True) -> nn.Sequential:
    """ResNet-20 for 32x32: three stages of three basic blocks of 16, 32 and 64 channels.

    Args:
        projection: 1x1 convolutions where shapes change (option B); else the paper's padded identity (option A).
    """
    parts: list[nn.Module] = [*_conv_norm(3, 16, 3), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for i in range(3):
            stride = 2 if width > 16 and i == 0 else 1
            padded = _PaddedShortcut() if stride == 2 and not projection else None
            parts.append(_basic(inputs, width, stride, padded))
            inputs = width
    return nn.Sequential(*parts, *_head(64, classes))


def mobilenet_v1(classes: int = 1000) -> nn.Sequential:
    """MobileNetV1 at width 1 for 224x224: a 3x3 stem and 13 depthwise-separable layers."""
    parts: list[nn.Module] = [*_conv_norm(3, 32, 3, 2), nn.ReLU()]
    inputs = 32
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for outputs, stride in widths:
        parts += [
            *_conv_norm(inputs, inputs, 3, stride, groups=inputs),
            nn.ReLU(),
            *_conv_norm(inputs, outputs),
            nn.ReLU(),
        ]
        inputs = outputs
    return nn.Sequential(*parts, *_head(1024, classes))


class _InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise 3x3, 1x1; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        first = [*_conv_norm(inputs, wide), nn.ReLU6()] if expand > 1 else []
        middle = [*_conv_norm(wide, wide, 3, stride, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*first, *middle, *_conv_norm(wide, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """MobileNetV2 at width 1 for 224x224."""
    parts: list[nn.Module] = [*_conv_norm(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, outputs, depth, stride in stages:
        for i in range(depth):
            parts.append(_InvertedResidual(inputs, outputs, stride if i == 0 else 1, expand))
            inputs = outputs
    return nn.Sequential(*parts, *_conv_norm(inputs, 1280), nn.ReLU6(), *_head(1280, classes))


NETWORKS: dict[str, Network] = {
    "resnet18": Network(lambda: resnet((2, 2, 2, 2), bottleneck=False), 224),
    "resnet50": Network(lambda: resnet((3, 4, 6, 3), bottleneck=True), 224),
    "resnet20": Network(resnet20, 32),
    "mobilenetv1": Network(mobilenet_v1, 224),
    "mobilenetv2": Network(mobilenet_v2, 224),
    "darts": Network(lambda: network_from_genotype("DARTS_V2", channels=36, cells=20), 32),
}


def example(name: str, batch: int = 1) -> torch.Tensor:
    """float[batch, 3, size, size], like a normalised image."""
    size = NETWORKS[name].size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def sparse(name: str, density: float, seed: int = 0) -> nn.Module:
    """A network with random masks on everything but the first convolution and the depthwise ones, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name].build().requires_grad_(False)
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        network = sparsify(network, density, where=lambda _, layer: layer is not first and not is_depthwise(layer))
        draw_masks_(network, torch.Generator().manual_seed(seed))
        return settle_(network, example(name, 4))


def settle_(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """Random weights by the number of kept ones, and batch norms with the statistics of `x`: activations of any depth keep
    their size, so that no time is lost on denormal numbers. Draws from torch's global generator.

    Args:
        network: its masks are drawn; changed.
        x: float[batch, ...], more than one input.

    Returns:
        The network, in eval mode.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            kept = module.nnz if isinstance(module, SparseConv2d | SparseLinear) else module.weight.numel()
            module.weight.normal_(0.0, (2.0 * module.weight.shape[0] / kept) ** 0.5)
            if isinstance(module, SparseConv2d | SparseLinear):
                module.apply_mask_()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # a plain average: of the one batch below
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(0.0, 0.5)
    network.train()
    network(x)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is not None:
            # A channel that is constant (no weights kept) would have its rounding errors blown up by 1 / sqrt(eps).
            module.running_var.clamp_(min=0.05 * float(module.running_var.mean()))
    return network.eval()
