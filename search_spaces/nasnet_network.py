"""The NASNet macro network: stacks of normal cells with reductions between them, made from any source of operations.

It decides nothing: `nasnet.py` fills it from a chooser or from a genotype. Start with `NasnetNetwork`. Where TensorFlow
pads an even image at the bottom right only, padding here is symmetric: same sizes and counts, features shifted by a
pixel.

Source: Zoph et al. 2018, NASNet (arXiv:1707.07012), section 3 and appendix A, in its published TensorFlow code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import cast

import torch
from torch import Tensor, nn

from ops.candidates import FactorizedReduce, ReluConvNorm
from ops.droppath import set_progress
from search_spaces.architecture import SpaceError
from search_spaces.darts_network import AuxiliaryHead, Nodes, NodeSource, NodeSums, Size, check_macro, halved, is_odd
from search_spaces.open_edges import OpenEdge, unread

Concat = Callable[[str, Nodes], Mapping[int, Sequence[OpenEdge]]]
"""`concat(kind, nodes)` -> the states that a cell concatenates, in order, each with the edges that keep it out where they are
there. None in a network of one architecture; a supernet concatenates every state and multiplies it by `open_edges.unread`."""


Outputs = tuple[list[slice], Tensor | float]
"""Channels of what a supernet's cell concatenates, and how sure it is that an architecture has these and no others."""


class NasnetCell(nn.Module):
    """Align the previous state (unless it is taken raw), bring the current one to `channels`, compute the blocks,
    concatenate.

    In a supernet a state that is certainly read is concatenated as zeros, which do nothing to those who read the
    concatenation: they begin with a ReLU and a convolution without bias, or with an average and a linear layer.

    Args:
        previous, current: (channels, size) of the two inputs.
        raw: take the previous input as it is (the first cell: both inputs are the stem's output).
        channels: of every block.
        kind: "normal" or "reduce".
        source: makes the operations.
        concat: the states of the output. A state of another shape is brought to that of the blocks first: 1x1
            convolution, or factorised reduction, and batch norm, without a ReLU.
        drop_path: rate of this cell at the end of training.
        affine: learned scale and shift in the batch norms outside the blocks.
        open_previous: the previous input comes from a supernet's cell: it may have to be aligned, however wide it is.
    """

    def __init__(
        self,
        previous: tuple[int, Size],
        current: tuple[int, Size],
        raw: bool,
        channels: int,
        kind: str,
        source: NodeSource,
        concat: Concat,
        drop_path: float = 0.0,
        affine: bool = True,
        open_previous: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        planes, size = previous
        self.align0: nn.Module = nn.Identity()
        if not raw:
            if size != current[1]:
                self.align0 = FactorizedReduce(planes, channels, odd=is_odd(size), affine=affine)
            elif planes != channels or open_previous:
                self.align0 = ReluConvNorm(planes, channels, affine=affine)
            planes = channels
        self.align1 = ReluConvNorm(current[0], channels, affine=affine)
        odd = is_odd(current[1])
        nodes = source(kind, (planes, channels), channels, odd)
        self.open_edges = dict(concat(kind, nodes))
        self.concat = tuple(self.open_edges)
        self.out_channels = len(self.concat) * channels
        self.nodes = NodeSums(nodes, drop_path)
        fixes: dict[str, nn.Module] = {}
        for j in self.concat:
            width = (planes, channels)[j] if j < 2 else channels
            if j < 2 and kind == "reduce":
                fixes[str(j)] = FactorizedReduce(width, channels, relu=False, odd=odd, affine=affine)
            elif width != channels:
                fixes[str(j)] = nn.Sequential(
                    nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=affine)
                )
        self.fixes = nn.ModuleDict(fixes)

    def forward(self, previous: Tensor, current: Tensor, raw: Sequence[Outputs] = ()) -> Tensor:
        """Two float[batch, channels, height, width] to float[batch, out_channels, height', width'].

        Args:
            previous, current: the cell's inputs.
            raw: in a supernet, outputs of the previous cell that an architecture would not align, being as wide as the blocks.
        """
        states = self.nodes(self._aligned(previous, raw), self.align1(current))
        parts = [self._part(states, j) for j in self.concat]
        known = next(part for part in parts if part is not None)  # the last state is read by nobody
        return torch.cat([torch.zeros_like(known) if part is None else part for part in parts], dim=1)

    def outputs(self, count: int) -> list[Outputs]:
        """Every set of `count` states that may be all that is concatenated; in a supernet only."""
        shares = [unread(self.open_edges[j]) for j in self.concat]
        found = []
        for chosen in combinations(range(len(shares)), count):
            factors = [share if place in chosen else 1.0 - share for place, share in enumerate(shares)]
            if not any(isinstance(factor, float) and factor == 0.0 for factor in factors):
                channels = [slice(place * self.channels, (place + 1) * self.channels) for place in chosen]
                found.append((channels, math.prod(factors, start=1.0)))
        return found

    def _aligned(self, previous: Tensor, raw: Sequence[Outputs]) -> Tensor:
        rest: Tensor | float = 1.0
        total: Tensor | None = None
        for channels, sure in raw:
            term = torch.cat([previous[:, part] for part in channels], dim=1)
            if isinstance(sure, float) and sure == 1.0:
                return term
            total = term * sure if total is None else total + term * sure
            rest = rest - sure
        return self.align0(previous) if total is None else self.align0(previous) * rest + total

    def _part(self, states: Sequence[Tensor], j: int) -> Tensor | None:
        share = unread(self.open_edges[j])
        if isinstance(share, float) and share == 0.0:
            return None
        part = self.fixes[str(j)](states[j]) if str(j) in self.fixes else states[j]
        return part if isinstance(share, float) and share == 1.0 else part * share


class NasnetNetwork(nn.Module):
    """Stem, three stages of normal cells with a reduction cell before the second and third, classifier.

    Args:
        source: makes the operations of each cell; states 0 (previous) and 1 (current) as everywhere here.
        concat: the states that a cell concatenates.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: of a block in the first stage (F); doubled by each reduction. A published name
            such as 6@768 says cells @ 24 F.
        cells: normal cells in each of the three stages (N); two reductions come on top.
        stem: "cifar" (3x3 convolution to 3 F), or "imagenet" (3x3 of stride 2 without padding, then two reduction
            cells).
        stem_channels: of the ImageNet stem's convolution; published: 32 (mobile), 96 (large).
        skip_reduction: the first cell after a reduction takes the state one before the reduction's own input as its
            previous one (published: large only).
        auxiliary: a second classifier in training, on the last cell before the second reduction.
        drop_path: rate in the last cell at the end of training; earlier cells have proportionally less
            (ScheduledDropPath: rate = drop_path * (cell + 1) / number of all cells * fraction of training done). Published: 0.4
            CIFAR, 0.3 large, 0 mobile.
        dropout: before the classifier; None: 0 for "cifar", 0.5 for "imagenet", as published.
        affine: learned scale and shift in the batch norms of cells, outside their blocks.

    Raises:
        SpaceError: sizes out of range, an unknown stem, an image too small for the stem.
    """

    def __init__(
        self,
        source: NodeSource,
        concat: Concat,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 32,
        cells: int = 6,
        stem: str = "cifar",
        stem_channels: int = 32,
        skip_reduction: bool = False,
        auxiliary: bool = False,
        drop_path: float = 0.0,
        dropout: float | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__()
        check_macro(
            "nasnet",
            input_shape,
            drop_path,
            classes=classes,
            channels=channels,
            cells=cells,
            stem_channels=stem_channels,
        )
        size = (int(input_shape[1]), int(input_shape[2]))
        if stem == "cifar":
            width = 3 * channels
            convolution = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
            plan: list[tuple[str, float]] = []
        elif stem == "imagenet":
            width = stem_channels
            if min(size) < 3 or channels < 4:
                raise SpaceError(
                    f"nasnet: the imagenet stem needs images of at least 3x3 and at least 4 channels, got {size[0]}x{size[1]} "
                    f"and {channels}"
                )
            convolution = nn.Conv2d(input_shape[0], width, 3, 2, bias=False)
            size = ((size[0] - 3) // 2 + 1, (size[1] - 3) // 2 + 1)
            plan = [("reduce", 0.25), ("reduce", 0.5)]
        else:
            raise SpaceError(f'nasnet: stem: expected "cifar" or "imagenet", got {stem!r}')
        stems = len(plan)
        for stage in range(3):
            plan += [("reduce", 2.0**stage)] * (stage > 0) + [("normal", 2.0**stage)] * cells
        auxiliary_after = stems + 2 * cells  # the last cell before the second reduction

        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        self.previous: list[int] = []
        self.raw_states: list[int] = []  # so many states of the previous cell would not be aligned; 0: any
        self.auxiliary: nn.Module | None = None
        self.auxiliary_after = auxiliary_after
        made: list[tuple[int, Size]] = [(width, size)]
        for i, (kind, scale) in enumerate(plan):
            after_reduction = i > stems and plan[i - 1][0] == "reduce"
            back = 3 if skip_reduction and after_reduction else 2
            previous = max(0, len(made) - back)
            width = int(channels * scale)
            rate = drop_path * (i + 1) / len(plan)
            before = self._cell(previous - 1) if previous > 0 else None
            open_previous = before is not None and any(before.open_edges.values())
            cell = NasnetCell(
                made[previous], made[-1], i == 0, width, kind, source, concat, rate, affine, open_previous
            )
            self.cells.append(cell)
            same = before is not None and made[previous][1] == made[-1][1] and width % before.channels == 0
            self.raw_states.append(width // before.channels if before is not None and open_previous and same else 0)
            self.previous.append(previous)
            size = halved(made[-1][1]) if kind == "reduce" else made[-1][1]
            made.append((cell.out_channels, size))
            if auxiliary and i == auxiliary_after:
                self.auxiliary = AuxiliaryHead(cell.out_channels, classes, size)
        rate = dropout if dropout is not None else 0.5 if stem == "imagenet" else 0.0
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout: nn.Module = nn.Dropout(rate) if rate else nn.Identity()
        self.classifier = nn.Linear(made[-1][0], classes)
        if stem == "imagenet":
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eps = 1e-3

    def set_progress(self, fraction: float) -> None:
        """Tell ScheduledDropPath how much of training is done, in [0, 1]."""
        set_progress(self, fraction)

    def read_channels(self) -> dict[str, list[int]]:
        """Which input channels the weights that read a cell's output have, of those they have where all states are concatenated.

        Returns:
            path of a parameter -> indices along its axis 1. It is how weights are taken from a supernet.
        """

        def of(i: int) -> list[int]:
            cell = self._cell(i)
            return [j * cell.channels + k for j in cell.concat for k in range(cell.channels)]

        found: dict[str, list[int]] = {}
        for i, cell in enumerate(self.cells):
            for name, source in (("align0", self.previous[i]), ("align1", i)):
                for path, parameter in getattr(cell, name).named_parameters():
                    if source > 0 and parameter.ndim == 4:
                        found[f"cells.{i}.{name}.{path}"] = of(source - 1)
        found["classifier.weight"] = of(-1)
        if self.auxiliary is not None:
            found["auxiliary.2.weight"] = of(self.auxiliary_after)
        return found

    def _cell(self, i: int) -> NasnetCell:
        return cast(NasnetCell, self.cells[i])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map float[batch, *input_shape] to logits float[batch, classes]; in training, with the auxiliary head, to a pair."""
        made = [self.stem(x)]
        auxiliary = None
        for i, cell in enumerate(self.cells):
            count = self.raw_states[i]
            raw = self._cell(self.previous[i] - 1).outputs(count) if count else ()
            made.append(cell(made[self.previous[i]], made[-1], raw))
            if self.training and self.auxiliary is not None and i == self.auxiliary_after:
                auxiliary = self.auxiliary(made[-1])
        logits = self.classifier(self.dropout(self.head(made[-1])))
        return logits if auxiliary is None else (logits, auxiliary)
