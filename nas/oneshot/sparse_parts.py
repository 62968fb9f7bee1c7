"""The layers of a supernet that may be sparse, by the choice that decides about them. Start with `SparseParts`.

A part decided by `Chooser.sparse` is given densities by a gate: one of them, or nested masks of all, weighted. A network decided by
`Chooser.allocate` is given a density by `set_overall`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nas.oneshot.choices import Choice, OverallChoice, SparsityChoice
from nas.oneshot.mixed import Gates
from ops.learned import learn_masks, set_density_
from search_spaces.chooser import weights_of

if TYPE_CHECKING:
    from ops.learned import LearnedSparseConv2d, LearnedSparseLinear

    Learned = LearnedSparseConv2d | LearnedSparseLinear

Claim = tuple[SparsityChoice | OverallChoice, nn.Module, Callable[[str, nn.Module], bool]]
"""A choice, the module it is about, and which of its layers (path, layer)."""


@dataclass(frozen=True)
class Part:
    """Layers that one choice decides about.

    Attributes:
        choice: with the targets that are legal on these layers.
        layers: path in the network -> layer.
    """

    choice: SparsityChoice | OverallChoice
    layers: dict[str, Learned]


class SparseParts:
    """Gives the layers of one network scores, and keeps them by choice.

    Args:
        network: changed: layers that a choice is about learn their masks from now on.
        claims: as the chooser met them.
    """

    def __init__(self, network: nn.Module, claims: list[Claim]) -> None:
        wanted: list[tuple[SparsityChoice | OverallChoice, set[str]]] = []
        paths = {id(module): path for path, module in network.named_modules()}
        for choice, module, accepts in claims:
            if id(module) not in paths:  # built, then left out of the network
                continue
            inner = [w.name for w in weights_of(module) if accepts(w.name, module.get_submodule(w.name))]
            wanted.append((choice, {".".join(filter(None, (paths[id(module)], name))) for name in inner}))
        claimed = set().union(*(names for _, names in wanted))
        learn_masks(network, 1.0, where=lambda path, _: path in claimed)
        self.parts: list[Part] = []
        for choice, names in wanted:
            layers: dict[str, Any] = {path: network.get_submodule(path) for path in sorted(names)}
            if isinstance(choice, SparsityChoice):
                for layer in layers.values():
                    layer.set_options([(density, pattern or None) for density, pattern in choice.targets])
            self.parts.append(Part(choice, layers))

    def apply(self, gates: Gates, choices: Mapping[str, Choice]) -> None:
        """Before a forward pass: put the gates of sparsity choices on their layers."""
        for part in self.parts:
            gate = gates.get(part.choice.name)
            if gate is None or not isinstance(part.choice, SparsityChoice):
                continue
            known = choices[part.choice.name]
            assert isinstance(known, SparsityChoice)
            if gate.chosen is not None and len(gate.chosen) == 1 and gate.weights is None:
                density, pattern = known.targets[gate.chosen[0]]
                for layer in part.layers.values():
                    layer.gates = None
                    if layer.density != density or (pattern and str(layer.pattern) != pattern):
                        layer.set_target(density, pattern or None)
                continue
            if gate.weights is None:
                raise ValueError(
                    f"decision {part.choice.name!r}: several densities are chosen, but there are no weights"
                )
            weights = gate.weights
            if part.choice.targets != known.targets:  # some are illegal in this structure
                legal = [known.targets.index(target) for target in part.choice.targets]
                weights = weights[legal] / weights[legal].sum()
            for layer in part.layers.values():
                layer.gates = weights

    def set_overall(self, density: float, rule: str, pattern: str) -> None:
        """Spread one density over the layers of every overall choice; layers on which the pattern is illegal stay dense.

        Args:
            density: overall, of the layers on which the pattern is legal.
            rule: "uniform", "erk", "global" (one ranking of the scores), or another rule of shapes.
            pattern: of all layers.
        """
        for part in self.parts:
            if isinstance(part.choice, OverallChoice):
                set_overall(part.layers, density, rule, pattern)

    def set_all(self, density: float, rule: str, pattern: str) -> None:
        """As `set_overall`, over the layers of all choices together."""
        layers = {path: layer for part in self.parts for path, layer in part.layers.items()}
        set_overall(layers, density, rule, pattern)


def set_overall(layers: Mapping[str, Learned], density: float, rule: str, pattern: str) -> None:
    """One density over some layers; those on which the pattern is illegal stay dense."""
    from ops.patterns import parse_pattern

    wanted = parse_pattern(pattern)
    legal: dict[str, Learned] = {}
    dense: dict[str, Learned] = {}
    for path, layer in layers.items():
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        (legal if wanted.illegal(tuple(layer.weight.shape), groups) is None else dense)[path] = layer
    for layer in dense.values():
        layer.set_target(1.0)
    for layer in legal.values():
        layer.gates = None
        if str(layer.pattern) != pattern:
            layer.set_target(1.0, pattern)
    if legal:
        set_density_(list(legal.values()), density, rule)
