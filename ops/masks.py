"""Masks: exact numbers of kept weights, chosen by score or at random, under a pattern.

One rule for counts everywhere: of `units` units (weights, blocks or channels) exactly `floor((1 - density) * units)` are zero,
computed on the decimal value of the density; N:M keeps exactly N of every M. Ties keep the lower index. Masks are bool tensors;
True is kept.

This module does not know layers or training; nothing here looks at which weights happen to be zero.
Start with `topk_mask`, `random_mask` and `kept_count`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from ops.patterns import NM, Block, Channel, Pattern, PatternError, Unstructured, check_pattern

_DIGITS = 12  # decimals of a density that count; more are rounding errors of the float
_HALF_DIGIT = Fraction(1, 2 * 10**_DIGITS)


def check_density(density: float, what: str = "density") -> float:
    """Return the density as a float if it is in (0, 1].

    Raises:
        TypeError: not a number.
        ValueError: not in (0, 1], or NaN.
    """
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"expected {what} as a number in (0, 1], got {density!r} ({type(density).__name__})")
    if not 0 < density <= 1:
        raise ValueError(f"expected {what} in (0, 1] (the fraction kept), got {density}; sparsity s is density 1 - s")
    return float(density)


def zero_count(units: int, density: float) -> int:
    """Number of zeros among `units`: floor((1 - density) * units), at most `units - 1`.

    The product is exact: the density is read as the decimal number it prints as, to 12 decimals, and a value that is a fraction
    k / units up to that rounding keeps exactly k. So 0.9 of 30 keeps 27, `1 - 0.7` of 10 keeps 3, and 4 / 7 of 7 keeps 4, although
    none of these floats is exact.

    Source: the floor is that of RigL, Evci et al. 2020 (arXiv:1911.11134), reference code; the exact product is ours.
    """
    check_density(density)
    kept_fraction = Fraction(str(round(float(density), _DIGITS)))
    zeros = math.floor((1 - kept_fraction + _HALF_DIGIT) * units)
    return min(zeros, units - 1)


def kept_count(shape: Sequence[int], density: float, pattern: str | Pattern = "unstructured") -> int:
    """Number of weights a mask of this shape keeps.

    Args:
        shape: of the weight, `[out, in / groups, *kernel]`.
        density: fraction kept, in (0, 1]. N:M takes only N / M, or 1 for a dense layer.
        pattern: what stands or falls together.

    Raises:
        ValueError: the density is out of range or not that of an N:M pattern.
        PatternError: the pattern is impossible on the shape.
    """
    pattern, density = _checked(shape, density, pattern)
    total = prod(shape)
    if isinstance(pattern, NM) and density < 1:
        return total * pattern.n // pattern.m
    units, size = _units(shape, pattern)
    return (units - zero_count(units, density)) * size


def topk_mask(scores: Tensor, density: float, pattern: str | Pattern = "unstructured") -> Tensor:
    """Keep the highest-scoring weights that the pattern allows.

    The score of a block or channel is the sum of its weights' scores, added in float64. Ties keep the lower index (flat index of
    the weight, block or channel; within an N:M group the lower input channel), so counts are exact whatever the scores, and the
    masks of one score tensor nest: a lower density keeps a subset of what a higher one keeps.

    Args:
        scores: [out, in / groups, *kernel], real; larger is kept. Infinities are fine, NaN is an error.
        density: fraction kept, in (0, 1]; N:M takes only N / M, or 1 for all.
        pattern: what stands or falls together.

    Returns:
        bool, shape and device of `scores`, exactly `kept_count(scores.shape, density, pattern)` true.

    Raises:
        ValueError: NaN among the scores (or infinities of both signs in one block); density out of range.
        PatternError: the pattern is impossible on the shape; names axis, length, group size and cure.

    Source: exact top-k with index ties as in jaxpruner, Lee et al. 2023 (arXiv:2304.14082); N:M as in arXiv:2104.08378.
    """
    pattern, density = _checked(scores.shape, density, pattern)
    scores = scores.detach()
    if scores.is_complex():
        raise TypeError(f"expected real scores, got {scores.dtype}")
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN (shape {list(scores.shape)}); "
                         "a mask cannot be drawn from them. Did the training diverge?")  # fmt: skip
    if density == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    if isinstance(pattern, NM):
        grouped = _nm_groups(scores, pattern.m)
        best = torch.sort(grouped, dim=-1, descending=True, stable=True).indices[..., : pattern.n]
        kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True)
        return _from_nm_groups(kept, scores.shape)
    pooled = _pool(scores, pattern)
    if pooled.is_floating_point() and bool(pooled.isnan().any()):
        raise ValueError(f"scores of both +inf and -inf in one {pattern} unit have no sum (shape {list(scores.shape)})")
    flat = pooled.reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices
    return _expand(_keep(order, flat.numel(), density).reshape(pooled.shape), scores.shape, pattern)


def random_mask(shape: Sequence[int], density: float, pattern: str | Pattern, generator: torch.Generator) -> Tensor:
    """Draw a mask uniformly among all masks of exactly `kept_count(shape, density, pattern)` weights that the pattern allows.

    Equal generator states give equal masks, and for patterns of free density masks that nest over the densities.

    Args:
        shape: of the weight, `[out, in / groups, *kernel]`.
        density: fraction kept, in (0, 1]; N:M takes only N / M, or 1 for all.
        pattern: what stands or falls together.
        generator: source of randomness; the mask is on its device.

    Raises:
        ValueError: density out of range. PatternError: the pattern is impossible on the shape.
    """
    pattern, density = _checked(shape, density, pattern)
    device = generator.device
    if density == 1:
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)
    if isinstance(pattern, NM):
        # Scores in float64: with 53 random bits the bias of ties towards lower indices is below anything observable.
        draws = torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device=device)
        return topk_mask(draws, density, pattern)
    units, _ = _units(shape, pattern)
    order = torch.randperm(units, generator=generator, device=device)
    return _expand(_keep(order, units, density).reshape(_unit_shape(shape, pattern)), shape, pattern)


def satisfies(mask: Tensor, pattern: str | Pattern) -> bool:
    """Whether a mask has the structure of the pattern: blocks and channels kept or dropped whole; exactly N of every M for N:M.

    Args:
        mask: bool[out, in / groups, *kernel].
        pattern: the structure; one that is impossible on the shape is never satisfied.

    Raises:
        TypeError: the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"expected a bool mask, got {mask.dtype}")
    try:
        pattern = check_pattern(pattern, mask.shape)
    except PatternError:
        return False
    if isinstance(pattern, Unstructured):
        return True
    if isinstance(pattern, NM):
        return bool((_nm_groups(mask, pattern.m).sum(-1) == pattern.n).all())
    _, size = _units(mask.shape, pattern)
    kept = _pool(mask, pattern)
    return bool(((kept == 0) | (kept == size)).all())


def _checked(shape: Sequence[int], density: float, pattern: str | Pattern) -> tuple[Pattern, float]:
    density = check_density(density)
    pattern = check_pattern(pattern, shape)
    check_fixed_density(pattern, density)
    return pattern, density


def check_fixed_density(pattern: Pattern, density: float, layer: str = "") -> None:
    """Refuse a density that the pattern cannot have.

    Raises:
        ValueError: an N:M pattern with a density other than N / M and 1.
    """
    fixed = pattern.fixed_density
    if fixed is not None and density != 1 and round(density, _DIGITS) != round(fixed, _DIGITS):
        where = f"{layer}: " if layer else ""
        raise ValueError(f"{where}pattern {pattern} has density {fixed:.12g} (or 1 for a dense layer), got density {density}; "
                         f'use density {fixed:.12g}, or pattern "unstructured"')  # fmt: skip


def _unit_shape(shape: Sequence[int], pattern: Pattern) -> tuple[int, ...]:
    """Shape of one score per unit; blocks [out / rows, in / cols, *kernel], channels [out]."""
    if isinstance(pattern, Block):
        return (shape[0] // pattern.rows, shape[1] // pattern.cols, *shape[2:])
    return (shape[0],) if isinstance(pattern, Channel) else tuple(shape)


def _units(shape: Sequence[int], pattern: Pattern) -> tuple[int, int]:
    """Number of units, and weights in each."""
    units = prod(_unit_shape(shape, pattern))
    return units, prod(shape) // units


def _keep(order: Tensor, units: int, density: float) -> Tensor:
    """bool[units]: the first `units - zero_count` of `order` are kept."""
    kept = torch.zeros(units, dtype=torch.bool, device=order.device)
    kept[order[: units - zero_count(units, density)]] = True
    return kept


def _pool(values: Tensor, pattern: Pattern) -> Tensor:
    """Sum over each unit, float64; values themselves where a unit is one weight."""
    if isinstance(pattern, Channel):
        return values.to(torch.float64).flatten(1).sum(1)
    if isinstance(pattern, Block):
        out, width, *kernel = values.shape
        split = values.to(torch.float64).reshape(
            out // pattern.rows, pattern.rows, width // pattern.cols, pattern.cols, *kernel
        )
        return split.sum(dim=(1, 3))
    return values


def _expand(units: Tensor, shape: Sequence[int], pattern: Pattern) -> Tensor:
    """Inverse of `_pool` for masks: every weight gets its unit's value."""
    if isinstance(pattern, Channel):
        return units.reshape(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).contiguous()
    if isinstance(pattern, Block):
        return units.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)
    return units


def _nm_groups(values: Tensor, m: int) -> Tensor:
    """[out, *kernel, in / m, m]: groups of consecutive input channels at one kernel position."""
    last = values.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, m)


def _from_nm_groups(groups: Tensor, shape: Sequence[int]) -> Tensor:
    return groups.flatten(-2).movedim(-1, 1).contiguous().reshape(tuple(shape))
