"""`mlp`: fully connected networks with sparse hidden layers, for tables and flat images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from search_spaces.architecture import SpaceError
from search_spaces.chooser import Chooser, Weights, fitting_patterns, sparsity_offers
from search_spaces.space import Space

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
PATTERNS = ("unstructured", "4x1", "2:4")


def mlp(
    c: Chooser,
    *,
    input_shape: Sequence[int] = (64,),
    classes: int = 10,
    max_depth: int = 3,
    widths: Sequence[int] = (32, 64, 128, 256),
    densities: Sequence[float] = DENSITIES,
    patterns: Sequence[str] = PATTERNS,
    dropout: float = 0.0,
) -> nn.Module:
    """1 to `max_depth` hidden layers of linear, batch norm and ReLU; width, density and pattern chosen per layer.

    Args:
        c: takes the decisions.
        input_shape: shape of one input; flattened.
        classes: outputs. The classifier stays dense.
        max_depth: largest number of hidden layers.
        widths: offered for each hidden layer.
        densities, patterns: offered for each hidden layer, where legal.
        dropout: rate after each hidden layer, 0 for none.
    """
    features = prod(input_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(c.choice("depth", tuple(range(1, max_depth + 1)))):
        width = c.choice(f"layer{i}.width", tuple(widths))
        layers.append(c.sparse(f"layer{i}", nn.Linear(features, width, bias=False), densities, patterns))
        layers += [nn.BatchNorm1d(width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        features = width
    layers.append(nn.Linear(features, classes))
    return nn.Sequential(*layers)


def mlp_space(**options: Any) -> Space:
    """The `mlp` space with its options checked (see `mlp`)."""
    if not options.get("max_depth", 3) >= 1:
        raise SpaceError(f"mlp: expected max_depth >= 1, got {options['max_depth']}")
    if not options.get("widths", (1,)):
        raise SpaceError("mlp: expected at least one width")
    return Space(mlp, "mlp", fitting_patterns(options, PATTERNS), size=_size)


def _size(options: Mapping[str, Any]) -> int:
    """Paths counted layer by layer: `paths[w]` is the number of ways to have reached a layer of w outputs."""
    widths = tuple(options.get("widths", (32, 64, 128, 256)))
    densities, patterns = options.get("densities", DENSITIES), options.get("patterns", PATTERNS)

    def offered(features: int, width: int) -> int:
        layer = Weights("", (width, features), 1, False)
        return sum(max(1, len(fits)) for fits in sparsity_offers("", [layer], densities, patterns).values())

    paths = {prod(options.get("input_shape", (64,))): 1}
    total = 0
    for _ in range(options.get("max_depth", 3)):
        paths = {width: sum(n * offered(features, width) for features, n in paths.items()) for width in widths}
        total += sum(paths.values())
    return total
