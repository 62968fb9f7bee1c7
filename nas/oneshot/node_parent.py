"""The dense network that nodes are dropped from, and the architectures of what is left of it.

Start with `dense_parent` and `masked_architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nas.errors import ConfigError
from ops.layers import sparse_layers
from search_spaces import Architecture, Space, SpaceError
from search_spaces.architecture import Value
from search_spaces.chooser import Decide

PATTERN = "unstructured"
"""The masks that are left are no other pattern of `ops.patterns`."""


def is_density(name: str) -> bool:
    """True for the decisions by which `Chooser.sparse` and `Chooser.allocate` choose a density."""
    return name.rpartition(".")[2] == "density"


def dense_parent(space: Space, fixed: Mapping[str, Value] | None = None) -> Architecture:
    """The largest dense architecture: every number at its largest, density 1, and of names the one that gives most weights.

    Names (of operations, say) are settled one decision after the other; of equals the first offered is taken.

    Args:
        space: where densities may be given that are not offered.
        fixed: decisions that are to be as given instead.

    Raises:
        ConfigError: `fixed` holds a density, or a decision or value that this network does not have.
    """
    given = dict(fixed or {})
    for name in given:
        if is_density(name):
            raise ConfigError(f"parent: {name}: the parent is dense; leave its densities out")
    named: dict[str, Value] = {}

    def decide(name: str, options: tuple[Value, ...]) -> Value:
        if name in given:
            if given[name] not in options:
                raise ConfigError(f"parent: {name}: expected one of {list(options)}, got {given[name]!r}")
            return given[name]
        if name in named and named[name] in options:
            return named[name]
        return options[0] if any(isinstance(option, str) for option in options) else max(options)

    parent = _dense(space, decide)
    if unknown := [name for name in given if name not in parent]:
        decisions = [name for name, _ in parent.decisions if not is_density(name)]
        raise ConfigError(f"parent: {unknown[0]}: no such decision; this network decides: {', '.join(decisions)}")
    settled: set[str] = set()
    while True:  # what is decided later may depend on what is settled now
        offers = space.offers(parent)
        open_names = [
            name
            for name, options in offers.items()
            if name not in settled and name not in given and len(options) > 1 and isinstance(options[0], str)
        ]
        if not open_names:
            return parent
        name = open_names[0]
        settled.add(name)
        sizes = {}
        for option in offers[name]:
            named[name] = option
            sizes[option] = _weights(space, _dense(space, decide))
        named[name] = max(sizes, key=lambda option: sizes[option])
        parent = _dense(space, decide)


def sparse_parts(space: Space, parent: Architecture) -> dict[str, tuple[str, ...]]:
    """Density decision -> names of the layers whose density it decides."""
    parts = {}
    for name, _ in parent.decisions:
        if is_density(name):
            network = space.meta(_with_densities(space, parent, {name: 0.5}))
            parts[name] = tuple(layer for layer, module in sparse_layers(network) if module.density < 1)
    return parts


def masked_architecture(space: Space, parent: Architecture, masks: Mapping[str, Tensor]) -> Architecture:
    """The parent's decisions with the densities that masks have, so that its layers may carry them.

    Args:
        space: of the parent.
        parent: dense.
        masks: per layer of the parent bool of the weight's shape; layers left out are dense.

    Raises:
        ConfigError: the space does not offer unstructured sparsity somewhere.
    """
    densities = {}
    for name, layers in sparse_parts(space, parent).items():
        own = [masks[layer] for layer in layers if layer in masks]
        total = sum(mask.numel() for mask in own)
        densities[name] = sum(int(mask.sum()) for mask in own) / total if total else 1.0
    return _with_densities(space, parent, densities)


def _with_densities(space: Space, parent: Architecture, densities: Mapping[str, float]) -> Architecture:
    decisions: dict[str, Value] = {**parent.as_dict(), **densities}

    def decide(name: str, options: tuple[Value, ...]) -> Value:
        part, _, what = name.rpartition(".")
        if what == "pattern" and f"{part}.density" in densities:
            if PATTERN not in options:
                raise ConfigError(
                    f"{name}: node masks need the pattern {PATTERN!r} here, the space offers {', '.join(map(str, options))}; "
                    "add it to the space's patterns"
                )
            return PATTERN
        if what == "rule" and name not in decisions:
            return "uniform" if "uniform" in options else options[0]
        return decisions[name]

    try:
        found = space.draw(decide, decisions)
    except SpaceError as error:
        raise ConfigError(f"node masks of {parent}: {error}") from error
    for name, density in densities.items():
        if found[name] != density:
            raise ConfigError(f"node masks: {name}: expected density {density:.6g}, the space makes it {found[name]}")
        pattern = f"{name.rpartition('.')[0]}.pattern"
        if density < 1 and pattern in found and found[pattern] != PATTERN:  # a single option is never asked for
            raise ConfigError(
                f"{pattern}: node masks need the pattern {PATTERN!r} here, the space only has {found[pattern]!r}; "
                "add it to the space's patterns"
            )
    return found


def _dense(space: Space, decide: Decide) -> Architecture:
    """Every density at 1, offered or not; `decide` takes the other decisions."""

    def densest(name: str, options: tuple[Value, ...]) -> Value:
        return max(options) if is_density(name) else decide(name, options)

    try:
        drawn = space.draw(lambda name, options: options[0] if _follows_density(name) else densest(name, options))
        ones: dict[str, Value] = {name: 1.0 for name, _ in drawn.decisions if is_density(name)}
        found = space.draw(densest, ones)
    except SpaceError as error:
        raise ConfigError(f"the dense parent of node masks: {error}") from error
    for name in ones:
        if found[name] != 1:
            raise ConfigError(
                f"{name}: expected a dense parent, but the space neither offers density 1 here nor a pattern of free density; "
                f"add 1.0 to its densities or {PATTERN!r} to its patterns"
            )
    return found


def _follows_density(name: str) -> bool:
    """The decisions that are only taken below density 1."""
    return name.rpartition(".")[2] in ("pattern", "rule")


def _weights(space: Space, architecture: Architecture) -> int:
    return sum(p.numel() for p in space.meta(architecture).parameters() if p.ndim > 1)
