"""Edges that a supernet keeps although an architecture may not have them, and how much of each there is.

`Chooser.edges` gives a supernet every input of a sum as an `OpenEdge`. A network whose shape depends on what is read (one that
concatenates the states nobody reads) asks `unread` how sure it is that nobody does.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable

from torch import Tensor, nn


class OpenEdge(nn.Module, abc.ABC):
    """An operation on one input of a sum that an architecture may leave out."""

    @abc.abstractmethod
    def share(self) -> Tensor | float:
        """How much of it there is in this forward pass: 1 if it is there, 0 if not, its probability while that is open."""


def unread(edges: Iterable[OpenEdge]) -> Tensor | float:
    """How sure it is that none of these edges is there, in [0, 1]: the product of 1 - share; a float if all shares are."""
    result: Tensor | float = 1.0
    for edge in edges:
        result = result * (1.0 - edge.share())
    return result
