"""Candidates of a supernet as networks of their own, and whole networks, to be priced. Start with `candidate_places`.

They are as in a found network, not as in a supernet: batch norms have statistics, so that they can be folded, pools have none
behind them, mixed operations see all channels. Below density 1 a candidate on images stands between two sparse 1x1 convolutions,
whose time is subtracted: sparse kernels keep a layout of their own, in which pools run too, and it is entered and left at the
ends only.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nas.oneshot.choices import Choice, Choices, EdgeChoice, OpChoice, ValueChoice
from nas.oneshot.chooser import SupernetChooser, Tagging
from nas.oneshot.mixed import Edge, Gate, GateBoard, MixedOp
from nas.oneshot.sparse_parts import SparseParts
from ops.candidates import Zero
from ops.layers import SparseConv2d, draw_masks_
from ops.learned import freeze_masks_, learned_layers
from search_spaces.architecture import Value

if TYPE_CHECKING:
    from nas.oneshot.algorithm import Setting


Shape = tuple[int, ...]
"""Of one value, batch axis left out."""


@dataclass(frozen=True, eq=False)
class LoneCandidate:
    """A module to price.

    Attributes:
        module: in evaluation mode, masks drawn.
        shape: of one input, batch axis left out.
        what: which density and pattern its masks have; "" if it has none.
        ends: two modules, half of each of which is not the candidate's; () if it stands alone.
        free: whether it costs nothing: "none" and the identity are not executed.
    """

    module: nn.Module
    shape: tuple[int, ...]
    what: str = ""
    ends: tuple[LoneCandidate, ...] = ()
    free: bool = False

    @property
    def example(self) -> Tensor:
        """One input."""
        return torch.zeros(1, *self.shape)

    @cached_property
    def key(self) -> str:
        """The same for modules that cost the same."""
        made_of = hashlib.blake2b(signature(self.module).encode(), digest_size=8).hexdigest()
        where = "x".join(map(str, self.shape))
        return f"{type(self.module).__name__} {made_of} on {where} {self.what}".strip()


@dataclass(frozen=True)
class CandidatePlace:
    """One occurrence of a choice in a network.

    Attributes:
        decision: name of the op choice.
        edge: name of the edge choice and input that it is on, or None.
        candidates: name -> density -> module; 1 is there for all, others where time may depend on density.
    """

    decision: str
    edge: tuple[str, int] | None
    candidates: dict[str, dict[float, LoneCandidate]] = field(hash=False)


class _OnePath(SupernetChooser):
    """Takes the decisions of one architecture but for its sparsity, whose layers it remembers."""

    def op(self, name: str, candidates: Mapping[str, Any], **arguments: Any) -> nn.Module:
        return Tagging.op(self, name, candidates, **arguments)

    def edges(self, name: str, n: int, k: int, make: Any) -> list[tuple[int, nn.Module]]:
        return Tagging.edges(self, name, n, k, make)


def candidate_places(
    setting: Setting, values: Mapping[str, Value], densities: Sequence[float], pattern: str
) -> tuple[dict[str, Choice], list[CandidatePlace]]:
    """Every occurrence of every op choice in one structure of a space.

    Args:
        setting: its space and input shape.
        values: of the choices that cannot be mixed; default the largest.
        densities: below 1, to have masks of.
        pattern: of the masks.

    Returns:
        The choices that were met, and the occurrences in the order in which they run.
    """
    choices, board = Choices(), GateBoard()
    network, parts = _built(setting, SupernetChooser(values, choices, board, pool_norm=False, affine=True))
    met = choices.by_name
    board.gates = {name: Gate(None, (0,)) for name, choice in met.items() if isinstance(choice, OpChoice)}
    on: dict[int, tuple[str, int]] = {}
    for module in network.modules():
        if isinstance(module, Edge):
            on |= {id(inner): (module.name, module.j) for inner in module.modules() if isinstance(inner, MixedOp)}
    ran: list[tuple[MixedOp, Shape, Shape]] = []
    hooks = [
        module.register_forward_hook(lambda m, x, y: ran.append((m, tuple(x[0].shape[1:]), tuple(y.shape[1:]))))
        for module in network.modules()
        if isinstance(module, MixedOp)
    ]
    with torch.no_grad():
        network(torch.zeros(1, *setting.input_shape))
    for hook in hooks:
        hook.remove()
    kinds = {id(module): signature(module) for mixed, _, _ in ran for module in mixed.candidates}
    lone: dict[tuple[str, Shape], dict[float, LoneCandidate]] = {}  # of equal ones one is copied
    for density in (1.0, *densities):
        parts.set_all(density, "uniform", pattern)
        what = f"at {density:g} {pattern}" if density < 1 else ""
        for mixed, shape, after in ran:
            for module in mixed.candidates:
                of = lone.setdefault((kinds[id(module)], shape), {})
                if density in of:
                    continue
                free = isinstance(module, Zero | nn.Identity)
                alone = density == 1 or len(shape) != 3 or len(after) != 3
                masked = any(layer.density < 1 for _, layer in learned_layers(module))
                if density == 1 or free or (alone and masked):
                    of[density] = LoneCandidate(freeze_masks_(copy.deepcopy(module)), shape, what, free=free)
                elif parts.layers and not alone:
                    of[density] = between(freeze_masks_(copy.deepcopy(module)), shape, after, density, what)
    made = []
    for mixed, shape, _ in ran:
        modules = zip(mixed.options, mixed.candidates)
        candidates = {str(option): lone[kinds[id(module)], shape] for option, module in modules}
        made.append(CandidatePlace(mixed.name, on.get(id(mixed)), candidates))
    return met, made


def between(module: nn.Module, before: Shape, after: Shape, density: float, what: str) -> LoneCandidate:
    """A candidate on images between two sparse convolutions of this density."""
    generator = torch.Generator().manual_seed(0)

    def convolution(channels: int) -> nn.Module:
        made = SparseConv2d(channels, channels, 1, bias=False, density=density)
        draw_masks_(made, generator)
        return made.eval()

    def pair(shape: Shape) -> LoneCandidate:
        return LoneCandidate(nn.Sequential(convolution(shape[0]), convolution(shape[0])).eval(), shape, what)

    whole = nn.Sequential(convolution(before[0]), module, convolution(after[0])).eval()
    return LoneCandidate(whole, before, what, (pair(before), pair(after)))


def build_whole(setting: Setting, decisions: Mapping[str, Value], density: float, pattern: str) -> LoneCandidate:
    """The network with these decisions; every layer that may be sparse has this density."""
    network, parts = _built(setting, _OnePath(decisions, Choices(), GateBoard()))
    parts.set_all(density, "uniform", pattern)
    what = f"at {density:g} {pattern}" if density < 1 else ""
    return LoneCandidate(freeze_masks_(network), tuple(setting.input_shape), what)


def decisions_of_first(choices: Mapping[str, Choice], values: Mapping[str, Value]) -> dict[str, Value]:
    """Decisions with these values, the first option of every operation and the first inputs of every sum."""
    decisions: dict[str, Value] = {name: v for name, v in values.items() if isinstance(choices.get(name), ValueChoice)}
    for name, choice in choices.items():
        if isinstance(choice, EdgeChoice):
            decisions[name] = choice.text(tuple(range(choice.keep)))
        elif isinstance(choice, OpChoice):
            decisions[name] = choice.options[0]
    return decisions


def signature(module: nn.Module) -> str:
    """What a module is made of, the same for modules that compute alike (their weights aside)."""
    scalars = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | tuple) and name != "training"
    }
    inner = ", ".join(f"{name}: {signature(child)}" for name, child in module.named_children())
    facts = ", ".join(f"{name}={value}" for name, value in sorted(scalars.items()))
    return f"{type(module).__name__}({module.extra_repr()}; {facts})[{inner}]"


def _built(setting: Setting, chooser: SupernetChooser) -> tuple[nn.Module, SparseParts]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = setting.space._call(chooser)
        parts = SparseParts(network, chooser.sparse_parts)
    return network.eval(), parts
