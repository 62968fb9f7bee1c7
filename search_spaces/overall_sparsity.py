"""The sparsity decisions that all cell spaces share: an overall density, a pattern, a rule that spreads the density.

Start with `allocate_overall` in a space function, `overall_size` for its closed form, `check_overall` when the space is
made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ops.allocation import RULES
from ops.patterns import parse_pattern
from search_spaces.architecture import Architecture, SpaceError, Value
from search_spaces.chooser import Chooser, sparsity_offers, weights_of
from search_spaces.space import Space

DENSITIES = (1.0, 0.5, 0.25, 0.1)
PATTERNS = ("unstructured", "4x1", "2:4")
RULES_OFFERED = ("erk", "uniform")


def skipper(sparse_stem: bool, sparse_classifier: bool) -> Callable[[str, nn.Module], bool]:
    """`skip(layer_name, layer)`: True for layers to leave dense; always for the auxiliary head, which is thrown away."""
    dense = ("auxiliary",) + (() if sparse_stem else ("stem",)) + (() if sparse_classifier else ("classifier",))
    return lambda name, _: name.startswith(dense)


def allocate_overall(
    c: Chooser,
    network: nn.Module,
    densities: Sequence[float],
    patterns: Sequence[str],
    rules: Sequence[str],
    *,
    sparse_stem: bool,
    sparse_classifier: bool,
    sparse_depthwise: bool,
) -> nn.Module:
    """Take sparsity.density, .pattern and .rule for a whole network whose parts are called stem, classifier and auxiliary."""
    skip = skipper(sparse_stem, sparse_classifier)
    return c.allocate("sparsity", network, densities, rules, patterns, skip=skip, depthwise=sparse_depthwise)


def overall_size(options: Mapping[str, Any]) -> int:
    """How many ways there are to take the decisions of `allocate_overall`."""
    rules = options.get("rules", RULES_OFFERED)
    offers = sparsity_offers("sparsity", [], options.get("densities", DENSITIES), options.get("patterns", PATTERNS))
    return sum(
        1 if density == 1 else sum(1 if parse_pattern(p).fixed_density else len(rules) for p in patterns)
        for density, patterns in offers.items()
    )


def check_overall(space: str, skeleton: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    """Check the sparsity options of a cell space; leave out default patterns that are legal on none of its fixed
    layers.

    Args:
        space: its name, for errors.
        skeleton: makes the network without any of its chosen operations; called on the meta device.
        options: of the space; "patterns" may be set to a part of the default.

    Raises:
        SpaceError: an unknown rule, a bad density, or a pattern that was asked for and is legal nowhere.
    """
    for rule in options.get("rules", RULES_OFFERED):
        if rule not in RULES:
            raise SpaceError(f'{space}: unknown rule "{rule}"; known: {", ".join(sorted(RULES))}')
    if not options.get("rules", RULES_OFFERED):
        raise SpaceError(f"{space}: expected at least one rule, got none; known: {', '.join(sorted(RULES))}")
    with torch.device("meta"):
        network = skeleton()
    skip = skipper(options.get("sparse_stem", False), options.get("sparse_classifier", False))
    layers = [w for w in weights_of(network, skip=skip) if options.get("sparse_depthwise", False) or not w.depthwise]
    legal = []
    for text in options.get("patterns", PATTERNS):
        pattern = parse_pattern(text)
        reasons = [pattern.illegal(w.shape, w.groups) for w in layers]
        if None in reasons:
            legal.append(text)
        elif "patterns" in options:
            raise SpaceError(
                f"{space}: pattern {pattern} is legal on none of the {len(layers)} layers that every network of the space has "
                f"({layers[-1].name}: {reasons[-1]}); use another number of channels, or leave the pattern out"
                if layers
                else f"{space}: no layer is left to make sparse; exempt less"
            )
    densities = options.get("densities", DENSITIES)
    if "patterns" not in options:
        fits = [p for p in legal if parse_pattern(p).fixed_density in (None, *densities)]
        if tuple(fits) != PATTERNS:
            options["patterns"] = tuple(fits)
    sparsity_offers("sparsity", [], densities, options.get("patterns", PATTERNS))


def draw_with_cells(space: Space, cells: Mapping[str, Value], others: Mapping[str, Value]) -> Architecture:
    """The architecture of `space` with given cells.

    Args:
        space: a cell space.
        cells: all decisions of its cells.
        others: some of the remaining decisions; the rest is as dense as offered, then the first option.

    Raises:
        SpaceError: a value that is not offered, or a name in `others` that this architecture does not decide.
    """
    chosen = {**cells, **others}

    def decide(name: str, options: tuple[Value, ...]) -> Value:
        if name not in chosen:
            return max(options, key=float) if name == "sparsity.density" else options[0]
        if chosen[name] not in options:
            raise SpaceError(f"{space.name}: {name}: expected one of {list(options)}, got {chosen[name]!r}")
        return chosen[name]

    made = space.draw(decide)
    for name, value in chosen.items():
        if name not in made:
            names = ", ".join(n for n, _ in made.decisions)
            raise SpaceError(
                f"{space.name}: {name}={value!r} is not decided by this architecture, which decides {names}"
            )
        if made[name] != value:
            raise SpaceError(f"{space.name}: {name}: expected {made[name]!r} (its only option), got {value!r}")
    return made
