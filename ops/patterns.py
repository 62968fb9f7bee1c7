"""Sparsity patterns: which weights of a layer stand or fall together, and on which layers a pattern is possible.

A pattern is a frozen value: it knows its canonical text ("unstructured", "2:4", "4x1", "channel") and whether it is legal on a
weight of shape `[out, in / groups, *kernel]`. It does not know weights, scores or masks; those are in `ops.masks`.

Start with `parse_pattern("2:4")` and `check_pattern(pattern, shape, groups, layer)`.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


class PatternError(ValueError):
    """A pattern that does not exist, or that is impossible on a layer."""


class Pattern(ABC):
    """Base of the four patterns. Equal patterns are equal, hash equally, and `parse_pattern(str(p)) == p`."""

    @property
    def fixed_density(self) -> float | None:
        """The only density below 1 this pattern can have, or None if any density is possible."""
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def illegal(self, shape: Sequence[int], groups: int = 1) -> str | None:
        """Say why the pattern is impossible on a weight, or None if it is possible.

        Args:
            shape: of the stored weight, `[out, in / groups, *kernel]`.
            groups: of the convolution; 1 for a linear layer.

        Returns:
            None, or one sentence or two: the axis, its length, the group size, and what would be legal.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight on its own. Legal everywhere."""

    def __str__(self) -> str:
        return "unstructured"

    def illegal(self, shape: Sequence[int], groups: int = 1) -> str | None:
        return _no_weight(self, shape, axes=1)


@dataclass(frozen=True)
class NM(Pattern):
    """Exactly `n` of every `m` consecutive input channels, at one kernel position of one output channel.

    Groups run along axis 1, the reduction axis, and never across kernel positions or convolution groups.

    Source: 2:4 as in Mishra et al. 2021 (arXiv:2104.08378), N:M as in Zhou et al. 2021 (arXiv:2102.04010).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_is_int(self.n) and _is_int(self.m) and self.m >= 2 and 1 <= self.n <= self.m):
            raise PatternError(
                f"N:M needs whole numbers 1 <= N <= M and M >= 2, got {self.n!r}:{self.m!r}; an example is 2:4"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fixed_density(self) -> float | None:
        return self.n / self.m

    def illegal(self, shape: Sequence[int], groups: int = 1) -> str | None:
        if reason := _no_weight(self, shape, axes=2) or _no_groups(self, shape, groups):
            return reason
        if shape[1] == 1:
            return (
                f"{self} sparsity needs at least {self.m} input channels per output channel, got weight {list(shape)} "
                f"(axis 1 has length 1{', a depthwise convolution' if groups > 1 else ''}). "
                'Use pattern "unstructured" or leave this layer dense.'
            )
        if shape[1] % self.m:
            return (
                f"{self} sparsity needs the reduction axis divisible by {self.m}, got weight {list(shape)} "
                f"(axis 1 has length {shape[1]}). {_cure('input', shape[1], self.m, groups)}"
            )
        return None


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` consecutive output channels x `cols` consecutive input channels, at one kernel position.

    `Block(4, 1)` is the "1xN" pattern of Lin et al. 2021 (arXiv:2105.14713) per kernel position: consecutive output channels share
    the decision. Blocks do not cross convolution groups.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if not (_is_int(self.rows) and _is_int(self.cols) and self.rows >= 1 and self.cols >= 1):
            raise PatternError(f"a block needs whole numbers >= 1, got {self.rows!r}x{self.cols!r}; an example is 4x1")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def illegal(self, shape: Sequence[int], groups: int = 1) -> str | None:
        if reason := _no_weight(self, shape, axes=2) or _no_groups(self, shape, groups):
            return reason
        if groups > 1 and shape[1] == 1:
            return (
                f"{self} blocks are not possible on a depthwise convolution, got weight {list(shape)} with {groups} groups "
                '(axis 1 has length 1). Use pattern "unstructured" or "channel", or leave this layer dense.'
            )
        per_group = shape[0] // groups
        if per_group % self.rows:
            within = f", {per_group} per group" if groups > 1 else ""
            return (
                f"{self} blocks need the output channels{' of each group' if groups > 1 else ''} divisible by {self.rows}, "
                f"got weight {list(shape)} (axis 0 has length {shape[0]}{within}). {_cure('output', per_group, self.rows, groups)}"
            )
        if shape[1] % self.cols:
            return (
                f"{self} blocks need the input channels{' of each group' if groups > 1 else ''} divisible by {self.cols}, "
                f"got weight {list(shape)} (axis 1 has length {shape[1]}). {_cure('input', shape[1], self.cols, groups)}"
            )
        return None


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels. Legal unless there is only one."""

    def __str__(self) -> str:
        return "channel"

    def illegal(self, shape: Sequence[int], groups: int = 1) -> str | None:
        if reason := _no_weight(self, shape, axes=2) or _no_groups(self, shape, groups):
            return reason
        if shape[0] == 1:
            return (
                f"channel sparsity needs at least 2 output channels, got weight {list(shape)} (axis 0 has length 1). "
                'Use pattern "unstructured" or leave this layer dense.'
            )
        return None


def parse_pattern(text: str | Pattern) -> Pattern:
    """Read a pattern: "unstructured", "N:M" (2:4), "ROWSxCOLS" (4x1: output x input channels), or "channel".

    Args:
        text: the text, in any case and with spaces around; a `Pattern` is returned as it is.

    Raises:
        PatternError: no such pattern; names the nearest one.
        TypeError: neither a text nor a pattern.
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise TypeError(f'expected a pattern or a text such as "2:4", got {text!r} ({type(text).__name__})')
    plain = text.strip().lower()
    if plain in _NAMED:
        return _NAMED[plain]
    if found := re.fullmatch(r"(\d+)\s*([:x])\s*(\d+)", plain, flags=re.ASCII):
        first, sign, second = int(found[1]), found[2], int(found[3])
        return NM(first, second) if sign == ":" else Block(first, second)
    numbers = re.findall(r"\d+", plain, flags=re.ASCII)
    near = difflib.get_close_matches(plain, _NAMED, n=1)
    likely = near or ([":".join(numbers), "x".join(numbers)] if len(numbers) == 2 else [])
    quoted = " or ".join(f'"{name}"' for name in likely)
    hint = f"; did you mean {quoted}?" if likely else ";"
    raise PatternError(
        f'unknown pattern "{text}"{hint} known: "unstructured", "channel", "N:M" (as 2:4), '
        '"ROWSxCOLS" (as 4x1, output x input channels)'
    )


def check_pattern(pattern: str | Pattern, shape: Sequence[int], groups: int = 1, layer: str = "") -> Pattern:
    """Return the pattern if it is possible on the layer.

    Args:
        pattern: the pattern or its text.
        shape: of the stored weight, `[out, in / groups, *kernel]`.
        groups: of the convolution; 1 for a linear layer.
        layer: its name, for the message.

    Raises:
        PatternError: it is not; names the layer, the axis, its length, the group size and the cure.
    """
    parsed = parse_pattern(pattern)
    reason = parsed.illegal(shape, groups)
    if reason is not None:
        raise PatternError(f"{layer}: {reason}" if layer else reason)
    return parsed


_NAMED: dict[str, Pattern] = {"unstructured": Unstructured(), "channel": Channel()}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _no_weight(pattern: Pattern, shape: Sequence[int], axes: int) -> str | None:
    if len(shape) < axes or prod(shape) < 1:
        return f"{pattern} sparsity needs a weight with at least {axes} axes and no empty one, got shape {list(shape)}."
    return None


def _no_groups(pattern: Pattern, shape: Sequence[int], groups: int) -> str | None:
    if groups < 1 or shape[0] % groups:
        return (
            f"{pattern} sparsity: {groups} groups do not divide the {shape[0]} output channels of weight {list(shape)}."
        )
    return None


def _cure(side: str, length: int, size: int, groups: int) -> str:
    """The nearest legal widths. `length` is per group, the widths named are of the whole layer."""
    below, above = length // size * size * groups, -(-length // size) * size * groups
    widths = f"{below} or {above}" if below else f"{above}"
    return f'Use {widths} {side} channels, or pattern "unstructured" for this layer.'
