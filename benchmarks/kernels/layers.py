"""The rows of the layer benchmark: what is convolved with what, under which patterns, and how a chain of it is built.

A `Case` is a unit of one to three layers. A chain repeats the unit with new weights each time, an activation after every layer;
the time of one unit is the difference between a long and a short chain (`protocol`), in which layout conversions and the cost of
a call cancel. Units that cannot follow themselves (a stride, 1024 -> 1000) are timed alone, less the time of a bare ReLU on
the same input: length 0.

Names: `c3_64_56` is a 3x3 convolution 64 -> 64 at 56x56, `p1_96_24_56` a pair of 1x1 convolutions 96 -> 24 -> 96, `f1_24_96_56`
the pair 24 -> 96 -> 24 whose wide tensor a fused kernel keeps in cache, `ir_...` an inverted residual block. Start with `CASES`
and `chain`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ops.layers import SparseConv2d, SparseLinear, draw_masks_
from ops.masks import kept_count
from ops.patterns import parse_pattern

__all__ = ["CASES", "DENSITIES", "Case", "Layer", "chain", "example", "select"]

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU}


@dataclass(frozen=True)
class Layer:
    """One convolution (kernel > 0, square, zero-padded to keep the size) or linear layer (kernel 0), and the activation after it
    ("" for none). A layer that is not `sparse` keeps density 1 whatever the row's density."""

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    activation: str = "relu"
    sparse: bool = True

    def build(self, density: float, pattern: str) -> SparseConv2d | SparseLinear:
        """The layer with a bias, its mask not yet drawn."""
        if not self.sparse:
            density, pattern = 1.0, "unstructured"
        if self.kernel == 0:
            return SparseLinear(self.inputs, self.outputs, density=density, pattern=pattern)
        return SparseConv2d(
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            padding=self.dilation * (self.kernel // 2),
            dilation=self.dilation,
            groups=self.groups,
            density=density,
            pattern=pattern,
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.kernel == 0:
            return self.outputs, self.inputs
        return self.outputs, self.inputs // self.groups, self.kernel, self.kernel


@dataclass(frozen=True)
class Case:
    """A row of the table, but for density, batch and threads.

    Attributes:
        family: under which it is averaged.
        size: height and width of the image; 0 for linear layers.
        unit: the layers of one repetition.
        residual: the unit's input is added to its output.
        patterns: of the masks.
        densities: of the ones asked for these, if any, and 1 in any case if it is here; None takes all. An N:M pattern has its own.
        lengths: (short, long) numbers of units timed.
        batches: numbers of images.
        split: units per reported layer: 2 where a unit holds the reported layer and its transpose.
    """

    name: str
    family: str
    size: int
    unit: tuple[Layer, ...]
    residual: bool = False
    patterns: tuple[str, ...] = ("unstructured",)
    densities: tuple[float, ...] | None = None
    lengths: tuple[int, int] = (1, 5)
    batches: tuple[int, ...] = (1,)
    split: int = 1

    @property
    def main(self) -> bool:
        """Whether it is one of the 20 layers the geometric means are over."""
        return self.family in MAIN_FAMILIES

    @property
    def dense_bytes(self) -> int:
        """Of the weights of the longest chain, float32."""
        return 4 * self.lengths[1] * sum(torch.Size(layer.weight_shape).numel() for layer in self.unit)

    def pairs(self, densities: Sequence[float]) -> list[tuple[str, float]]:
        """(pattern, density) of every row of this case."""
        own = self.densities or ()
        wanted = [d for d in own if d in densities] or list(densities)
        if 1.0 in own and 1.0 not in wanted:
            wanted.insert(0, 1.0)
        pairs: list[tuple[str, float]] = []
        for pattern in self.patterns:
            fixed = parse_pattern(pattern).fixed_density
            pairs += [(pattern, d) for d in (wanted if fixed is None else [fixed])]
        return pairs

    def macs(self, pattern: str = "unstructured", density: float = 1.0) -> float:
        """Multiply-adds on kept weights of one reported layer (the unit over `split`) for one image."""
        total, size = 0, self.size
        for layer in self.unit:
            size = -(-size // layer.stride)
            kept = kept_count(
                layer.weight_shape, density if layer.sparse else 1.0, pattern if layer.sparse else "unstructured"
            )
            total += kept * (size * size if layer.kernel else 1)
        return total / self.split


def example(case: Case, batch: int, seed: int = 0) -> torch.Tensor:
    """float[batch, channels, size, size] or float[batch, inputs], non-negative as after a ReLU."""
    shape = (batch, case.unit[0].inputs) + ((case.size, case.size) if case.size else ())
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def chain(case: Case, length: int, density: float, pattern: str = "unstructured", seed: int = 0) -> nn.Sequential:
    """`length` units in a row with different random weights and masks; length 0 is one ReLU.

    Weights are scaled by the number of kept ones, so that activations neither die nor blow up; biases are small and positive.
    """
    generator = torch.Generator().manual_seed(seed)
    if length == 0:
        return nn.Sequential(nn.ReLU())
    layers: list[nn.Module] = []
    for _ in range(length):
        unit: list[nn.Module] = []
        for layer in case.unit:
            unit.append(layer.build(density, pattern))
            if layer.activation:
                unit.append(ACTIVATIONS[layer.activation]())
        layers += [Residual(nn.Sequential(*unit))] if case.residual else unit
    network = nn.Sequential(*layers).eval().requires_grad_(False)
    draw_masks_(network, generator)
    for module in network.modules():
        if isinstance(module, SparseConv2d | SparseLinear):
            fan_in = max(1.0, module.nnz / module.weight.shape[0])
            module.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
            assert module.bias is not None
            module.bias.uniform_(0.0, 0.1, generator=generator)
            module.apply_mask_()
    return network


def select(pattern: str) -> list[Case]:
    """Cases whose name or family matches one of the comma-separated shell patterns; "main" is the 20 layers, "all" all.

    Raises:
        ValueError: nothing matches a part.
    """
    chosen: dict[str, Case] = {}
    for part in (p.strip() for p in pattern.split(",")):
        found = [c for c in CASES if part == "all" or (part == "main" and c.main) or _matches(c, part)]
        if not found:
            families = ", ".join(dict.fromkeys(c.family for c in CASES))
            raise ValueError(
                f'--rows: nothing matches "{part}"; families: {families}; names: {CASES[0].name}, ... (--list)'
            )
        chosen |= {c.name: c for c in found}
    return [c for c in CASES if c.name in chosen]


def _matches(case: Case, part: str) -> bool:
    return fnmatch.fnmatchcase(case.name, part) or case.family == part


# --- the rows ---------------------------------------------------------------------------------------------------------------


def _c3(channels: int, size: int) -> Case:
    lengths = (1, 3) if (channels, size) == (512, 7) else (1, 5)
    return Case(f"c3_{channels}_{size}", "3x3", size, (Layer(channels, channels, 3),), lengths=lengths)


def _p1(wide: int, narrow: int, size: int) -> Case:
    return Case(
        f"p1_{wide}_{narrow}_{size}", "1x1 pairs", size, (Layer(wide, narrow), Layer(narrow, wide)), lengths=(1, 4)
    )


def _c1(channels: int, size: int) -> Case:
    return Case(f"c1_{channels}_{size}", "1x1", size, (Layer(channels, channels),))


def _fused(narrow: int, wide: int, size: int) -> Case:
    return Case(
        f"f1_{narrow}_{wide}_{size}", "fused pairs", size, (Layer(narrow, wide), Layer(wide, narrow)), lengths=(1, 4)
    )


def _inverted(narrow: int, wide: int, size: int) -> Case:
    depthwise = Layer(wide, wide, 3, groups=wide, activation="relu6", sparse=False)
    unit = (Layer(narrow, wide, activation="relu6"), depthwise, Layer(wide, narrow, activation=""))
    return Case(f"ir_{narrow}_{wide}_{size}", "inverted residual", size, unit, residual=True, lengths=(1, 4))


def _depthwise(channels: int, size: int, kernel: int) -> Case:
    unit = (Layer(channels, channels, kernel, groups=channels),)
    return Case(f"dw{kernel}_{channels}_{size}", "depthwise", size, unit, densities=(1.0, 0.5, 0.3, 0.1))


def _linear(
    inputs: int, outputs: int, batches: tuple[int, ...], densities: tuple[float, ...] | None = None
) -> list[Case]:
    """In a chain with its transpose (the weights come from the outer caches, as in a network), and alone and hot."""
    there, back = Layer(inputs, outputs, 0), Layer(outputs, inputs, 0)
    square, name = inputs == outputs, f"linear_{inputs}_{outputs}"
    unit, lengths, split = ((there,), (1, 3), 1) if square else ((there, back), (1, 2), 2)
    chained = Case(name, "linear", 0, unit, densities=densities, lengths=lengths, batches=batches, split=split)
    alone = Case(f"{name}_alone", "linear alone", 0, (there,), densities=densities, lengths=(0, 1), batches=batches)
    return [chained, alone]


def _separable(channels: int, size: int, kernel: int, dilation: int = 1) -> Case:
    """Depthwise and pointwise, as in the cells of our DARTS and NASNet spaces."""
    depthwise = Layer(channels, channels, kernel, dilation=dilation, groups=channels, activation="", sparse=False)
    kind = "dil" if dilation > 1 else "sep"
    return Case(f"{kind}{kernel}_{channels}_{size}", "spaces", size, (depthwise, Layer(channels, channels)))


def _odd(name: str, size: int, *unit: Layer, lengths: tuple[int, int] = (1, 5)) -> Case:
    return Case(name, "spaces", size, unit, lengths=lengths)


CASES: tuple[Case, ...] = (
    *(
        _c3(c, s)
        for c, s in [
            (64, 56),
            (128, 28),
            (256, 14),
            (512, 7),
            (64, 32),
            (128, 16),
            (256, 8),
            (16, 32),
            (32, 16),
            (64, 8),
        ]
    ),
    *(_p1(w, n, s) for w, n, s in [(96, 24, 56), (144, 32, 28), (384, 64, 14), (960, 320, 7)]),
    *(_p1(w, n, s) for w, n, s in [(256, 64, 56), (512, 128, 28), (1024, 256, 14)]),
    *(_c1(c, s) for c, s in [(36, 32), (72, 16), (144, 8)]),
    *(
        _fused(n, w, s)
        for n, w, s in [(24, 96, 56), (24, 144, 56), (32, 144, 28), (32, 192, 28), (64, 384, 14), (16, 64, 32)]
    ),
    *(_inverted(n, w, s) for n, w, s in [(24, 144, 56), (32, 192, 28), (64, 384, 14)]),
    Case(
        "c1_256_16",
        "patterns",
        16,
        (Layer(256, 256),),
        patterns=("unstructured", "4x1", "16x1", "2:4", "1:4", "channel"),
    ),
    Case("c3b_128_16", "patterns", 16, (Layer(128, 128, 3),), patterns=("4x1", "16x1", "2:4")),
    *(
        _depthwise(c, s, k)
        for c, s, k in [(144, 56, 3), (192, 28, 3), (384, 14, 3), (36, 32, 3), (36, 32, 5), (72, 16, 3)]
    ),
    *(_depthwise(c, s, k) for c, s, k in [(72, 16, 5), (144, 8, 5)]),
    *_linear(1024, 1000, (1, 8, 64)),
    *_linear(4096, 4096, (1, 64), (0.5, 0.2, 0.1, 0.05, 0.01)),
    *(_separable(c, s, k) for c, s, k in [(36, 32, 3), (72, 16, 5), (144, 8, 3)]),
    _separable(36, 32, 5, dilation=2),
    _odd("c3s2_64_56", 56, Layer(64, 128, 3, stride=2), lengths=(0, 1)),
    _odd("c1s2_256_28", 28, Layer(256, 512, 1, stride=2), lengths=(0, 1)),
    _odd("c3d2_64_32", 32, Layer(64, 64, 3, dilation=2)),
    _odd("c3g4_128_28", 28, Layer(128, 128, 3, groups=4)),
    _odd("c5_32_16", 16, Layer(32, 32, 5)),
    _odd("c3_48_30", 30, Layer(48, 48, 3)),
    _odd("c3_33_13", 13, Layer(33, 33, 3)),
    _odd("c1_240_28", 28, Layer(240, 240, activation="hardswish")),
    _odd("linear_784_256", 0, Layer(784, 256, 0), lengths=(0, 1)),
)
"""Every row, the 20 layers of the geometric means first."""

MAIN_FAMILIES = ("3x3", "1x1 pairs", "1x1")
