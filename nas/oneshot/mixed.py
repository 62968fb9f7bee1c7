"""Mixed operations: all candidates of a choice, weighted; and edges, which can be weighted or switched off.

What the weights are is said by *gates*, put on a board before each forward pass. Start with `Gate` and `MixedOp`.

Source: DARTS, Liu et al. 2019 (arXiv:1806.09055), eq. 2; single paths as in GDAS, Dong and Yang 2019 (arXiv:1910.04465), section
3.2; partial channels as in PC-DARTS, Xu et al. 2020 (arXiv:1907.05737), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ops.candidates import Zero
from search_spaces.open_edges import OpenEdge


@dataclass(frozen=True)
class Gate:
    """How much each option of a choice counts.

    Attributes:
        weights: float[options]; None: what is chosen counts 1, without a gradient.
        chosen: options that are run; None: all.
    """

    weights: Tensor | None = None
    chosen: tuple[int, ...] | None = None


Gates = dict[str, Gate]
"""Decision -> gate. An edge choice without one has all its edges, each with weight 1."""


@dataclass
class GateBoard:
    """Where mixed operations look up their gates during one forward pass, and what they can share in it.

    Attributes:
        gates: of this pass.
        fast: run candidates together where that gives the same numbers (`nas.oneshot.fast`).
        checkpointing: forget activations within mixed operations, compute them again in the backward pass.
        memo: values that depend on an input alone, by its identity; emptied after the pass.
    """

    SHARED: ClassVar[int] = 64
    """Values kept in `memo`; then the oldest goes."""

    gates: Gates = field(default_factory=dict)
    fast: bool = True
    checkpointing: bool = False
    memo: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> GateBoard:
        """Without what belongs to a forward pass: gates carry gradients, which cannot be copied."""
        return GateBoard(fast=self.fast, checkpointing=self.checkpointing)

    def once(self, x: Tensor, key: object, make: Callable[[], Tensor]) -> Tensor:
        """make(), which depends on x alone; computed once per pass."""
        version = 0 if x.is_inference() else x._version  # changed in place, x is another value
        place = (id(x), version, key, torch.is_grad_enabled())
        known = self.memo.get(place)
        if known is None:
            if len(self.memo) >= self.SHARED:
                del self.memo[next(iter(self.memo))]
            self.memo[place] = known = (x, make())  # x is kept so that its identity stays its own
        return known[1]


class MixedOp(nn.Module):
    """All candidates of an op choice.

    Args:
        name: of the decision.
        candidates: name -> module, in the order of the options; all map one shape to one shape.
        board: where its gate is.
    """

    def __init__(self, name: str, candidates: Mapping[str, nn.Module], board: GateBoard) -> None:
        super().__init__()
        self.name = name
        self.options = tuple(candidates)
        self.candidates = nn.ModuleList(candidates.values())
        self.board = board

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of what is chosen. Shapes as of the candidates."""
        gate = self.board.gates.get(self.name)
        if gate is None:
            raise KeyError(f"no gate for the decision {self.name!r}; gates are there for {', '.join(self.board.gates)}")
        return self._mix(x, gate)

    def _mix(self, x: Tensor, gate: Gate) -> Tensor:
        if gate.chosen is not None and len(gate.chosen) == 1:
            return self._single(x, gate.chosen[0], gate.weights)
        if gate.weights is None:
            raise ValueError(
                f"decision {self.name!r}: several candidates are chosen, but there are no weights for them"
            )
        chosen = tuple(range(len(self.candidates))) if gate.chosen is None else gate.chosen
        if self.board.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._sum, x, gate.weights, chosen, use_reentrant=False))
        return self._sum(x, gate.weights, chosen)

    def _single(self, x: Tensor, index: int, weights: Tensor | None) -> Tensor:
        y: Tensor = self.candidates[index](x)
        if weights is None:
            return y
        others = weights.sum() - weights[index]  # 0 for a hard choice; it carries the gradient of what was not run
        return y * weights[index] + others

    def _sum(self, x: Tensor, weights: Tensor, chosen: tuple[int, ...]) -> Tensor:
        if self.board.fast:
            from nas.oneshot.fast import weighted_sum

            return weighted_sum(self, x, weights, chosen)
        return plain_sum(self, x, weights, chosen)


def plain_sum(mixed: MixedOp, x: Tensor, weights: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """Each candidate called in turn, multiplied by its weight, added up."""
    total: Tensor | None = None
    for i in chosen:
        candidate = mixed.candidates[i]
        if isinstance(candidate, Zero):
            continue
        term = candidate(x) * weights[i]
        total = term if total is None else total + term
    if total is None:  # nothing but "none"
        zero = next(mixed.candidates[i] for i in chosen)
        return cast(Tensor, zero(x)) * weights[chosen[0]]
    return total


class PartialMixedOp(MixedOp):
    """A mixed operation on the first 1 / k of the channels; the rest passes by, then channels are shuffled.

    Args:
        name, candidates, board: as for `MixedOp`; candidates map channels / k to channels / k.
        k: the share's denominator.
        stride: of the operation; at 2 the rest is max-pooled.
    """

    def __init__(self, name: str, candidates: Mapping[str, nn.Module], board: GateBoard, k: int, stride: int) -> None:
        super().__init__(name, candidates, board)
        self.k = k
        self.stride = stride

    def _mix(self, x: Tensor, gate: Gate) -> Tensor:
        channels = x.shape[1] // self.k
        once = self.board.once if self.board.fast else lambda _x, _key, make: make()
        mixed = super()._mix(once(x, f"first {channels}", lambda: x[:, :channels]), gate)
        rest = once(x, f"rest {channels} {self.stride}", lambda: self._passing(x, channels))
        return shuffle_channels(torch.cat([mixed, rest], dim=1), self.k)

    def _passing(self, x: Tensor, channels: int) -> Tensor:
        rest = x[:, channels:]
        return F.max_pool2d(rest, 2, 2, ceil_mode=True) if self.stride == 2 else rest


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel g * (c / groups) + i becomes channel i * groups + g. float[n, c, h, w] in and out."""
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        pixels = x.permute(0, 2, 3, 1).view(n, h, w, groups, c // groups)
        return pixels.transpose(3, 4).reshape(n, h, w, c).permute(0, 3, 1, 2)
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Edge(OpenEdge):
    """One input of a sum.

    Args:
        name: of the edge choice.
        j: which input.
        module: the operation on it.
        board: where the gate is, if there is one.
    """

    def __init__(self, name: str, j: int, module: nn.Module, board: GateBoard) -> None:
        super().__init__()
        self.name = name
        self.j = j
        self.module = module
        self.board = board

    def extra_repr(self) -> str:
        return f"{self.name}, input {self.j}"

    def forward(self, x: Tensor) -> Tensor | None:
        """The operation's value times the edge's weight; None if the edge is switched off."""
        gate = self.board.gates.get(self.name)
        if gate is None:
            return cast(Tensor, self.module(x))
        if gate.chosen is not None and self.j not in gate.chosen:
            return None
        y: Tensor = self.module(x)
        return y if gate.weights is None else y * gate.weights[self.j]

    def share(self) -> Tensor | float:
        """1 without a gate; else the edge's weight, at most 1; without weights 1 or 0."""
        gate = self.board.gates.get(self.name)
        if gate is not None and gate.weights is not None:
            return gate.weights[self.j].clamp(max=1.0)
        return float(gate is None or gate.chosen is None or self.j in gate.chosen)
