"""How much of an architecture skips, pools or does nothing: `skip_pool_share`.

Differentiable searches are known to collapse to such cells, and networks of very low density may look good for no other
reason, so the share stands beside every accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from search_spaces.architecture import Architecture, Value
from search_spaces.chooser import Chooser, Decide
from search_spaces.space import Space

_NOTHING = ("none", "zero", "zeroize")


def is_skip_or_pool(operation: Value) -> bool:
    """Whether an operation skips, pools or gives zeros, by the field's names: "skip...", "identity", "...pool...", "none", "zero".

    A strided skip is one, although it has weights, and so is a pool with a 1x1 convolution after it.
    """
    name = str(operation).lower()
    return name in (*_NOTHING, "identity") or name.startswith("skip") or "pool" in name


def skip_pool_share(space: Space, architecture: Architecture) -> float | None:
    """Share of the operations in a network that skip, pool or do nothing, in [0, 1].

    Counted are the operations chosen by `Chooser.op` that the network holds: once for every cell they are in, and not on edges that
    the space takes out because they lead nowhere. "none" counts wherever it was chosen.

    Returns:
        None for a space that offers no such operation here, or chooses no operations at all.

    Raises:
        SpaceError: the architecture does not belong to the space, or cannot be built on the meta device.
    """
    space.offers(architecture)
    decisions = architecture.as_dict()
    chooser = _Noting(lambda name, _: decisions[name], decisions)
    with torch.device("meta"):
        network = space._call(chooser)
    offered = [value for name in chooser.operations for value in chooser.offered[name]]
    if not any(map(is_skip_or_pool, offered)):
        return None
    modules = set(network.modules())
    weights = {id(p) for p in network.parameters()}
    counts = {True: 0, False: 0}
    for name, made in chooser.operations.items():
        chosen = chooser.made[name]
        for operation in made:
            held = operation in modules or any(id(p) in weights for p in operation.parameters())
            if held or chosen in _NOTHING:
                counts[is_skip_or_pool(chosen)] += 1
    total = counts[True] + counts[False]
    return counts[True] / total if total else None


class _Noting(Chooser):
    """Replays decisions and notes the operations it makes, by the name of their decision."""

    def __init__(self, decide: Decide, given: Mapping[str, Value]) -> None:
        super().__init__(decide, building=True, given=given)
        self.operations: dict[str, list[nn.Module]] = {}

    def op(self, name: str, candidates: Mapping[str, Callable[..., nn.Module]], **arguments: Any) -> nn.Module:
        made = super().op(name, candidates, **arguments)
        self.operations.setdefault(name, []).append(made)
        return made
