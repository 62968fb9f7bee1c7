"""The DARTS macro network: cells of two inputs in a row, made from any source of operations.

It decides nothing: `darts.py` fills it from a chooser or from a genotype. Start with `DartsNetwork` and `NodeSource`.

Source: Liu et al. 2019, DARTS (arXiv:1806.09055), section 3 and appendix A, and its published evaluation networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ops.candidates import FactorizedReduce, IdentityProjection, ReluConvNorm, Zero
from ops.droppath import DropPath, set_progress
from search_spaces.architecture import SpaceError

Nodes = list[list[tuple[int, nn.Module]]]
"""For each node of a cell, what it sums: (index of the state read, operation). States 0 and 1 are the cell's inputs."""

NodeSource = Callable[[str, tuple[int, int], int, bool], Nodes]
"""`source(kind, in_channels, channels, odd)` makes the operations of one cell.

kind: "normal" or "reduce"; in_channels: of states 0 and 1; channels: of every other state; odd: the image has an odd
side. In a reduction cell operations on states 0 and 1 must have stride 2.
"""

Size = tuple[int, int]


def halved(size: Size) -> Size:
    """(height, width) after a stride of 2, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def is_odd(size: Size) -> bool:
    """True if height or width is odd."""
    return bool(size[0] % 2 or size[1] % 2)


class NodeSums(nn.Module):
    """The nodes of a cell: each is the sum of operations on earlier states.

    An operation "none" is left out of a sum that has another one. Drop-path applies to every operation but identities.

    Args:
        nodes: what each node sums.
        drop_path: rate at the end of training.
    """

    def __init__(self, nodes: Nodes, drop_path: float = 0.0) -> None:
        super().__init__()
        self.inputs: list[list[int]] = []
        self.ops = nn.ModuleList()
        self.dropped: list[list[bool]] = []
        self.drop = DropPath(drop_path)
        for node in nodes:
            kept = [(j, op) for j, op in node if not isinstance(op, Zero)] or node[:1]
            self.inputs.append([j for j, _ in kept])
            self.ops.append(nn.ModuleList([op for _, op in kept]))
            identities = (nn.Identity, IdentityProjection, Zero)
            self.dropped.append([drop_path > 0 and not isinstance(op, identities) for _, op in kept])

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The cell's inputs, float[batch, channels, height, width] each; returns them followed by every node's value."""
        states = list(inputs)
        for sources, ops, dropped in zip(self.inputs, self.ops, self.dropped, strict=True):
            terms = []
            for j, op, drops in zip(sources, ops, dropped, strict=True):  # type: ignore[call-overload]
                value = op(states[j])
                if value is not None:  # a supernet's edge that is switched off
                    terms.append(self.drop(value) if drops else value)
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            states.append(total)
        return states


class DartsCell(nn.Module):
    """Align both inputs to `channels`, compute the nodes, concatenate some of the states.

    Args:
        in_channels: of the cell before the previous one, and of the previous one.
        channels: of every state.
        nodes: what each node sums; in a reduction cell the operations on states 0 and 1 have stride 2.
        concat: states of the output.
        reduce_previous: the first input is twice as large as the second (the previous cell was a reduction).
        odd_previous: the first input has an odd side; matters with `reduce_previous` only.
        drop_path: rate at the end of training.
        affine: learned scale and shift in the batch norms of the alignment.
    """

    def __init__(
        self,
        in_channels: tuple[int, int],
        channels: int,
        nodes: Nodes,
        concat: Sequence[int],
        *,
        reduce_previous: bool = False,
        odd_previous: bool = False,
        drop_path: float = 0.0,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.align0: nn.Module = (
            FactorizedReduce(in_channels[0], channels, odd=odd_previous, affine=affine)
            if reduce_previous
            else ReluConvNorm(in_channels[0], channels, affine=affine)
        )
        self.align1 = ReluConvNorm(in_channels[1], channels, affine=affine)
        self.nodes = NodeSums(nodes, drop_path)
        self.concat = tuple(concat)

    def forward(self, before: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Two float[batch, in_channels[i], height, width] to float[batch, len(concat) * channels, height', width']."""
        states = self.nodes(self.align0(before), self.align1(x))
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Sequential):
    """The classifier used in training only: ReLU, average 5x5, 1x1 to 128, a full-size convolution to 768, linear.

    On 8x8 (CIFAR) or 7x7 with stride 2 (ImageNet) the full-size convolution is the published 2x2 one. On images smaller
    than the window, the window is the image.

    Args:
        channels: of its input.
        classes: outputs.
        size: (height, width) of its input.
        stride: of the average.
        second_norm: batch norm after the full-size convolution; the published ImageNet DARTS network has none there.
    """

    def __init__(self, channels: int, classes: int, size: Size, stride: int = 3, second_norm: bool = True) -> None:
        window = (min(5, size[0]), min(5, size[1]))
        pooled = ((size[0] - window[0]) // stride + 1, (size[1] - window[1]) // stride + 1)
        norm: list[nn.Module] = [nn.BatchNorm2d(768)] if second_norm else []
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(window, stride),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, pooled, bias=False),
            *norm,
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, classes),
        )


def reduction_cells(cells: int) -> set[int]:
    """Indices of the reduction cells among `cells`: at one third and two thirds."""
    return {cells // 3, 2 * cells // 3}


def cell_kinds(cells: int) -> tuple[str, ...]:
    """The kinds of cell that a network of `cells` cells has, of "normal" and "reduce"."""
    return ("normal", "reduce") if cells > len(reduction_cells(cells)) else ("reduce",)


class DartsNetwork(nn.Module):
    """Stem, cells, global average, linear classifier; an auxiliary head after the second reduction.

    Args:
        source: makes the operations of each cell.
        concat: for each kind of cell, the states that are concatenated; for "reduce" none of the inputs 0 and 1.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: of the states in the first cells; doubled at each reduction.
        cells: how many, the two reductions at one and two thirds included.
        auxiliary: add the auxiliary head; in training the forward then returns (logits, auxiliary logits).
        drop_path: rate at the end of training; follows `set_progress` linearly.
        stem: "cifar" (3x3 convolution to 3 x channels) or "imagenet" (three of stride 2).
        affine: learned scale and shift in the batch norms that align the inputs of cells.

    Raises:
        SpaceError: sizes below 1, an unknown stem, an input that is not an image, inputs concatenated in a reduction
            cell.
    """

    def __init__(
        self,
        source: NodeSource,
        concat: Mapping[str, Sequence[int]],
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 36,
        cells: int = 20,
        auxiliary: bool = False,
        drop_path: float = 0.0,
        stem: str = "cifar",
        affine: bool = True,
    ) -> None:
        super().__init__()
        check_macro("darts", input_shape, drop_path, classes=classes, channels=channels, cells=cells)
        if min(concat.get("reduce", (2,))) < 2:
            raise SpaceError(
                f"reduction cells cannot concatenate their inputs (states 0 and 1, twice as large), got {concat['reduce']}"
            )
        planes, size = int(input_shape[0]), (int(input_shape[1]), int(input_shape[2]))
        reduced = stem == "imagenet"
        if stem == "cifar":
            before = width = 3 * channels
            self.stem: nn.Module = nn.Sequential(
                nn.Conv2d(planes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            )
            self.stem1: nn.Module = nn.Identity()
            before_size = size
        elif stem == "imagenet":
            before = width = channels
            self.stem = nn.Sequential(
                nn.Conv2d(planes, channels // 2, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(),
                nn.Conv2d(channels // 2, channels, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.stem1 = ReluConvNorm(channels, channels, 3, 2)
            before_size = halved(halved(size))
            size = halved(before_size)
        else:
            raise SpaceError(f'stem: expected "cifar" or "imagenet", got {stem!r}')
        self.cells = nn.ModuleList()
        self.auxiliary: nn.Module | None = None
        self.auxiliary_after = 2 * cells // 3
        for i in range(cells):
            kind = "reduce" if i in reduction_cells(cells) else "normal"
            channels *= 2 if kind == "reduce" else 1
            self.cells.append(
                DartsCell(
                    (before, width),
                    channels,
                    source(kind, (channels, channels), channels, is_odd(size)),
                    concat[kind],
                    reduce_previous=reduced,
                    odd_previous=is_odd(before_size),
                    drop_path=drop_path,
                    affine=affine,
                )
            )
            before, width = width, len(concat[kind]) * channels
            before_size, reduced = size, kind == "reduce"
            size = halved(size) if reduced else size
            if auxiliary and i == self.auxiliary_after:
                stride = 2 if stem == "imagenet" else 3
                self.auxiliary = AuxiliaryHead(width, classes, size, stride, second_norm=stem != "imagenet")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, classes)

    def set_progress(self, fraction: float) -> None:
        """Tell drop-path how much of training is done, in [0, 1]."""
        set_progress(self, fraction)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map float[batch, *input_shape] to logits float[batch, classes]; in training, with the auxiliary head, to a pair."""
        before = self.stem(x)
        x = self.stem1(before)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            before, x = x, cell(before, x)
            if self.training and self.auxiliary is not None and i == self.auxiliary_after:
                auxiliary = self.auxiliary(x)
        logits = self.classifier(self.flatten(self.pool(x)))
        return logits if auxiliary is None else (logits, auxiliary)


def check_macro(where: str, input_shape: Sequence[int], drop_path: float = 0.0, **sizes: int) -> None:
    """Check what all cell networks need.

    Raises:
        SpaceError: the input is not an image of shape (channels, height, width), a size is below 1, or the drop-path
            rate is outside [0, 1).
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise SpaceError(
            f"{where}: expected images of shape (channels, height, width), got {tuple(input_shape)}; "
            "for flat data use the mlp space"
        )
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpaceError(f"{where}: expected {name} >= 1, a whole number, got {value!r}")
    if not 0 <= drop_path < 1:
        raise SpaceError(f"{where}: expected drop_path in [0, 1), a probability, got {drop_path!r}")
