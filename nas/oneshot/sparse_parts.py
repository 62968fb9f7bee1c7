"""The layers of a supernet that may be sparse, by the choice that decides about them. Start with `SparseParts`.

A part decided by `Chooser.sparse` is given densities by a gate: one of them, or nested masks of all, weighted. A network decided by
`Chooser.allocate` is given a density by `set_overall`; `set_all` gives one to everything that may be sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nas.errors import ConfigError
from nas.oneshot.choices import Choice, OverallChoice, SparsityChoice
from nas.oneshot.mixed import Gates
from ops.layers import is_depthwise
from ops.learned import EXEMPT, learn_masks, set_density_
from ops.patterns import parse_pattern
from ops.rankings import global_densities
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
        layers: path in the network -> layer, in the order of the network's modules.
    """

    choice: SparsityChoice | OverallChoice
    layers: dict[str, Learned]


class SparseParts:
    """Gives the layers of one network scores, and keeps them by choice.

    Args:
        network: changed: layers that a choice is about learn their masks from now on, at density 1.
        claims: as the chooser met them.

    Raises:
        ConfigError: the network is nothing but such a layer, so that it cannot be changed in place.
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
        if "" in claimed:
            raise ConfigError(
                f"the network of this space is a single {type(network).__name__}, which a supernet cannot give a learned mask; "
                "put it into an nn.Sequential"
            )
        learn_masks(network, 1.0, where=lambda path, _: path in claimed)
        self.parts: list[Part] = []
        self.kinds = layer_kinds(network)
        modules = dict(network.named_modules())
        for choice, names in wanted:
            layers: dict[str, Any] = {path: module for path, module in modules.items() if path in names}
            if isinstance(choice, SparsityChoice):
                for layer in layers.values():
                    layer.set_options([(density, pattern or None) for density, pattern in choice.targets])
            self.parts.append(Part(choice, layers))
        self.layers: dict[str, Learned] = {
            path: modules[path] for path in modules if any(path in part.layers for part in self.parts)
        }

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
                for path, layer in part.layers.items():
                    layer.gates = None
                    if layer.density != density or (pattern and str(layer.pattern) != pattern):
                        layer.set_target(density, pattern or None, name=path)
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

    def set_overall(
        self,
        density: float,
        rule: str,
        pattern: str,
        *,
        exempt: Collection[str] = (),
        scores: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """Spread one density over the layers of every overall choice, each choice for itself; gates are dropped.

        Args:
            density: overall, of the layers that are not exempt and on which the pattern is legal; the others are dense. Layers
                of an N:M pattern get N / M, or 1 if it is 1.
            rule: "uniform", "erk", "global" (one ranking of the present scores), or another rule of shapes.
            pattern: of all layers.
            exempt: layers that stay dense: any of "stem", "classifier", "depthwise" (`layer_kinds`).
            scores: path -> score, for "global" where the layers do not hold their own (weights shared between structures).

        Returns:
            path -> density now set.

        Raises:
            AllocationError: the rule is not known or cannot spread the density.
            ValueError: an unknown exemption, a density out of range.
        """
        spread: dict[str, float] = {}
        for part in self.parts:
            if isinstance(part.choice, OverallChoice):
                spread |= self._set(part.layers, density, rule, pattern, exempt, scores)
        return spread

    def set_all(
        self,
        density: float,
        rule: str,
        pattern: str,
        *,
        exempt: Collection[str] = (),
        scores: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """As `set_overall`, over the layers of all choices together."""
        return self._set(self.layers, density, rule, pattern, exempt, scores)

    def following(self, pattern: str, exempt: Collection[str] = ()) -> dict[str, Learned]:
        """The layers that follow a density: not exempt, and the pattern is legal on them."""
        return _following(self.layers, pattern, self._exempt(exempt))

    def _exempt(self, kinds: Collection[str]) -> set[str]:
        if unknown := set(kinds) - set(EXEMPT):
            raise ValueError(f"unknown exemption {', '.join(sorted(unknown))}; known: {', '.join(EXEMPT)}")
        return set().union(*(self.kinds[kind] for kind in kinds))

    def _set(
        self,
        layers: Mapping[str, Learned],
        density: float,
        rule: str,
        pattern: str,
        exempt: Collection[str],
        scores: Mapping[str, Tensor] | None,
    ) -> dict[str, float]:
        wanted = parse_pattern(pattern)
        free = _following(layers, pattern, self._exempt(exempt))
        for path, layer in layers.items():
            layer.gates = None
            if path not in free:
                layer.set_target(1.0)
            elif layer.pattern != wanted:
                layer.set_target(1.0, pattern, name=path)
        spread = dict.fromkeys(layers, 1.0)
        if rule != "global" or wanted.fixed_density is not None or density == 1:
            return spread | (set_density_(list(free.items()), density, rule) if free else {})
        held = scores if scores is not None else {path: layer.score for path, layer in free.items()}
        found = global_densities({path: held[path] for path in free}, density, dict.fromkeys(free, wanted))
        for path, share in found.items():
            free[path].set_target(share, name=path)
        return spread | found


def layer_kinds(network: nn.Module) -> dict[str, set[str]]:
    """Which convolution and linear layers are the stem, the classifier, and depthwise: kind -> paths.

    Stem and classifier are what is in a child of the network whose name starts so; where there is none, the first layer and
    the last linear layer.
    """
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    return {
        "stem": {path for path in layers if path.startswith("stem")} or set(list(layers)[:1]),
        "classifier": {path for path in layers if path.startswith("classifier")} or set(linear[-1:]),
        "depthwise": {path for path, layer in layers.items() if is_depthwise(layer)},
    }


def _following(layers: Mapping[str, Learned], pattern: str, dense: Collection[str]) -> dict[str, Learned]:
    wanted = parse_pattern(pattern)
    return {
        path: layer
        for path, layer in layers.items()
        if path not in dense
        and wanted.illegal(tuple(layer.weight.shape), layer.groups if isinstance(layer, nn.Conv2d) else 1) is None
    }
