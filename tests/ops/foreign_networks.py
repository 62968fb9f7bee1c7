"""Networks in the manner of torchvision's, and the ways torch has to prune them. Start with `network`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


def _conv(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> nn.Sequential:
    parts = [nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(b)]
    return nn.Sequential(*parts, *([act(inplace=True)] if act is not None else []))


class Bottleneck(nn.Module):
    """ResNet: 1x1, 3x3 (grouped: ResNeXt), 1x1, and a shortcut."""

    def __init__(self, inside: int, width: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if stride == 1 and inside == out else _conv(inside, out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class InvertedResidual(nn.Module):
    """MobileNetV3: expansion, depthwise, squeeze and excitation, projection."""

    def __init__(self, inside: int, wide: int, out: int, size: int, stride: int, act: Any) -> None:
        super().__init__()
        self.shortcut = stride == 1 and inside == out
        self.block = nn.Sequential(
            _conv(inside, wide, 1, act=act),
            _conv(wide, wide, size, stride, wide, act=act),
            SqueezeExcitation(wide, 8),
            _conv(wide, out, 1, act=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + x if self.shortcut else y


class Shuffle(nn.Module):
    """ShuffleNetV2: half of the channels go by, then both halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), _conv(half, half, 3, groups=half, act=None), _conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        batch, channels, height, width = y.size()
        return (
            y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        )


class DenseBlock(nn.Module):
    """DenseNet: every layer reads all that came before it, normalised before the convolution."""

    def __init__(self, inside: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inside + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(inside + i * growth, 2 * growth, 1, bias=False),
                nn.BatchNorm2d(2 * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class UNet(nn.Module):
    """Down and up again, by interpolation and by transposed convolution, with skips between."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = _conv(3, 16), _conv(16, 24), _conv(24, 32)
        self.up2 = nn.ConvTranspose2d(32, 24, 2, 2)
        self.join2, self.join1 = _conv(48, 24), _conv(40, 16, act=nn.SiLU)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.down3(F.max_pool2d(b, 2))
        up = F.interpolate(self.up2(c), size=b.shape[2:], mode="nearest")
        b = self.join2(torch.cat([up, b], dim=1))
        up = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.join1(torch.cat([up, a], dim=1)))


class PreActivation(nn.Module):
    """ResNet v2: normalise, activate, convolve; the shortcut is taken before or after the activation."""

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, out, 1, stride, bias=False) if stride > 1 or inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        side = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + side


class ConvNeXt(nn.Module):
    """Depthwise 7x7, LayerNorm over channels put last, linear layers with GELU, a scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


def _head(channels: int, classes: int = 5) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1), nn.Linear(channels, classes)]


class Dropouts(nn.Module):
    """A VGG-like network: adaptive pooling to 7x7, flattened, linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv(3, 16), nn.MaxPool2d(2), _conv(16, 8), nn.MaxPool2d(3, 2, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(8 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return F.log_softmax(self.classifier(F.dropout(x, training=self.training)), dim=-1)


def _stem(out: int) -> list[nn.Module]:
    return [_conv(3, out, 3, 2), nn.MaxPool2d(3, 2, 1)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "resnet": (
        lambda: nn.Sequential(
            *_stem(16), Bottleneck(16, 8, 32), Bottleneck(32, 12, 40, 2), Bottleneck(40, 8, 40), *_head(40)
        ),
        (37, 45),
    ),
    "resnext": (
        lambda: nn.Sequential(
            *_stem(16), Bottleneck(16, 16, 32, groups=4), Bottleneck(32, 32, 32, 2, groups=8), *_head(32)
        ),
        (33, 32),
    ),
    "mobilenetv3": (
        lambda: nn.Sequential(
            _conv(3, 16, 3, 2, act=nn.Hardswish),
            InvertedResidual(16, 24, 16, 3, 1, nn.ReLU),
            InvertedResidual(16, 48, 24, 5, 2, nn.Hardswish),
            InvertedResidual(24, 56, 24, 5, 1, nn.Hardswish),
            _conv(24, 64, 1, act=nn.Hardswish),
            *_head(64),
        ),
        (31, 26),
    ),
    "shufflenet": (lambda: nn.Sequential(*_stem(24), Shuffle(24), Shuffle(24), _conv(24, 32, 1), *_head(32)), (29, 41)),
    "densenet": (
        lambda: nn.Sequential(
            _conv(3, 16),
            DenseBlock(16, 8, 3),
            nn.BatchNorm2d(40),
            nn.ReLU(),
            nn.Conv2d(40, 20, 1, bias=False),
            nn.AvgPool2d(2, 2),
            DenseBlock(20, 8, 2),
            *_head(36),
        ),
        (15, 18),
    ),
    "unet": (UNet, (22, 27)),
    "preactivation": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            PreActivation(16, 16),
            PreActivation(16, 24, 2),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            *_head(24),
        ),
        (19, 17),
    ),
    "convnext": (lambda: nn.Sequential(nn.Conv2d(3, 24, 4, 4), ConvNeXt(24), ConvNeXt(24), *_head(24)), (34, 52)),
    "groupnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Conv2d(16, 16, 3, 2, 1, groups=2),
            nn.GroupNorm(1, 16),
            nn.LeakyReLU(0.1),
            nn.Conv2d(16, 8, 1),
            nn.InstanceNorm2d(8),
            nn.Tanh(),
            *_head(8),
        ),
        (13, 21),
    ),
    "vgg": (Dropouts, (30, 33)),
}


def _l1(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.85)


def _removed(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.7)
    prune.remove(module, "weight")


def _channels(module: nn.Module) -> None:
    prune.ln_structured(module, "weight", 0.5, 2, dim=0)


def _twice(module: nn.Module) -> None:
    prune.random_structured(module, "weight", 0.3, dim=1 if module.weight.shape[1] > 3 else 0)
    prune.l1_unstructured(module, "weight", 0.6)


def zeros(module: nn.Module) -> None:
    weight = module.weight.detach()
    weight[torch.rand_like(weight) < 0.9] = 0


PRUNERS: dict[str, Callable[[Any], None]] = {
    "l1": _l1,
    "removed": _removed,
    "channels": _channels,
    "twice": _twice,
    "zeros": zeros,
}


def network(name: str, pruner: str) -> nn.Module:
    torch.manual_seed(5)
    net = NETWORKS[name][0]()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        if isinstance(module, nn.Conv2d | nn.Linear):
            PRUNERS[pruner](module)
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, *NETWORKS[name][1]))  # torch's pruning masks the weights at every call
    return net
