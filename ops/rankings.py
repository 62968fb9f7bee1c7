"""Masks from scores that change: who is kept is selected in linear time, remembered while the scores stay, and ranked over layers.

`ops.masks.topk_mask` is the definition and the slow twin; `select` gives the same mask without sorting and, on a GPU, without
waiting for it, `select_many` several masks with one sort. `Remembered` holds what was computed from one score tensor.
`global_densities` is one ranking over many layers. Layers and gradients are in `ops.learned_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ops.allocation import AllocationError
from ops.masks import _expand, _from_nm_groups, _nm_groups, _pool, _units, check_density, zero_count
from ops.patterns import NM, Pattern


class Target(NamedTuple):
    """A density in (0, 1] and its pattern, known to fit each other and the layer."""

    density: float
    pattern: Pattern


@torch.no_grad()
def select(scores: Tensor, target: Target) -> Tensor:
    """The mask of `topk_mask(scores.abs(), *target)`, in O(n).

    Everything above the k-th largest value is kept, and of what equals it the lowest indices until the count is met. Finding the
    value among 36,864 takes 0.4 ms where a stable sort takes 2.8 (one CPU thread); among 1600, 12 us against 29.

    Args:
        scores: [out, in / groups, *kernel], real; the larger magnitude is kept. NaN is an error on the CPU; elsewhere, where
            looking would wait for the device, it counts as the largest.
        target: legal on the shape; not checked again.

    Returns:
        bool, shape and device of `scores`, exactly `kept_count(scores.shape, *target)` true.

    Raises:
        ValueError: NaN among the scores, on the CPU.
    """
    density, pattern = target
    if density == 1:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    magnitude = scores.abs()
    look = _may_look(scores)
    if look:
        _check_no_nan(magnitude)
    if isinstance(pattern, NM):
        return _select_in_groups(magnitude, pattern)
    pooled = _pool(magnitude, pattern)
    flat = pooled.reshape(-1)
    zeros = _zeros(flat.numel(), density)
    threshold = flat.kthvalue(zeros + 1).values
    kept = flat >= threshold
    if not look or int(kept.sum()) != flat.numel() - zeros:
        above = flat > threshold
        equal = kept & ~above
        kept = above | (equal & (equal.cumsum(0) <= flat.numel() - zeros - above.sum()))
    return _expand(kept.reshape(pooled.shape), scores.shape, pattern)


@torch.no_grad()
def select_many(scores: Tensor, targets: Sequence[Target]) -> list[Tensor]:
    """`select` for each target, with one sort for all targets of a pattern."""
    magnitude = scores.abs()
    if _may_look(scores):
        _check_no_nan(magnitude)
    ranks: dict[Pattern, Tensor] = {}
    masks = []
    for density, pattern in targets:
        if density == 1:
            masks.append(torch.ones(scores.shape, dtype=torch.bool, device=scores.device))
        elif isinstance(pattern, NM):
            masks.append(_select_in_groups(magnitude, pattern))
        else:
            if pattern not in ranks:
                ranks[pattern] = _ranks(_pool(magnitude, pattern))
            units = ranks[pattern].numel()
            masks.append(_expand(ranks[pattern] < units - _zeros(units, density), scores.shape, pattern))
    return masks


class Remembered:
    """Masks computed from one score tensor, valid as long as `still(score)`.

    On the CPU the scores are compared with a copy (3 us for 4096 of them, where the mask takes 40): torch's fused optimizers, and
    changes through `.data`, do not move the version counter of a tensor. On other devices, where comparing would wait, memory,
    layout and version counter must be the same, and nothing is remembered of scores that are being trained; there, changing
    frozen scores through `.data` is not seen (`ops.learned.LearnedLayer.forget`).

    Args:
        score: real, any layout.
        by_content: None is as said; a value is for tests.
    """

    def __init__(self, score: Tensor, by_content: bool | None = None) -> None:
        self._by_content = score.device.type == "cpu" if by_content is None else by_content
        # Held, not only its address: memory that is held is not given to another tensor.
        self._scores = score.detach().clone() if self._by_content else score.detach()
        self._version = _version(score)
        self._factors: dict[Target | tuple[Target, ...], Tensor] = {}

    def still(self, score: Tensor) -> bool:
        """Whether what is remembered is right for `score`."""
        old = self._scores
        if (score.shape, score.dtype, score.device) != (old.shape, old.dtype, old.device):
            return False
        if self._by_content:
            return torch.equal(old, score)
        trained = score.requires_grad or (score._base is not None and score._base.requires_grad)
        same_memory = score.data_ptr() == old.data_ptr() and score.stride() == old.stride()
        return not trained and same_memory and self._version is not None and _version(score) == self._version

    def factors(self, targets: Target | tuple[Target, ...]) -> Tensor:
        """1 where kept and 0 elsewhere, in the type of the scores. Do not write to it.

        Returns:
            For one target, shape and memory layout of the scores; for several, [len(targets), *shape].
        """
        if targets not in self._factors:
            with torch.inference_mode(False), torch.no_grad():
                if isinstance(targets, Target):
                    self._factors[targets] = torch.empty_like(self._scores).copy_(select(self._scores, targets))
                else:
                    masks = torch.stack(select_many(self._scores, targets))
                    self._factors[targets] = masks.to(self._scores.dtype)
        return self._factors[targets]


def global_densities(scores: Mapping[str, Tensor], density: float, patterns: Mapping[str, Pattern]) -> dict[str, float]:
    """Shares of the layers among the highest of all scores, in one ranking over all layers.

    The score of a weight is |S| divided by the mean |S| of its layer; of a block or channel, the mean over its weights. So
    multiplying a layer's scores by a number changes nothing, as it changes nothing in the layer's own mask: what counts is how
    far a weight stands out in its layer, not the scale its layer was initialised with (which, being sqrt(6 / fan_in), would keep
    depthwise layers whole and drop wide ones). The best unit of each layer comes before all others, so that no layer dies.

    The kept total is exactly that of `ops.masks` on the sum of the layers' weights, `total - floor((1 - density) * total)`; where
    units are larger than a weight, the least that is not below it. Ties go to the earlier layer, then to the lower index; the
    masks at one density contain those at a lower one.

    Args:
        scores: layer -> [out, in / groups, *kernel], real.
        density: fraction of all these weights to keep, in (0, 1].
        patterns: layer -> its pattern, legal on it and of free density (not N:M).

    Returns:
        layer -> density in (0, 1], in the order of `scores`; `zero_count` gives back the exact number of units.

    Raises:
        AllocationError: fewer weights to keep than one unit in each layer; an N:M pattern.
        ValueError: density out of range; scores that are not finite.

    Source: one ranking for all layers as in global pruning; the normalisation is ours.
    """
    check_density(density)
    for name, pattern in patterns.items():
        if pattern.fixed_density is not None:
            raise AllocationError(f"{name}: pattern {pattern} has one density and takes no part in a global ranking")
    if density == 1 or not scores:
        return dict.fromkeys(scores, 1.0)
    values, sizes = [], []
    for name, score in scores.items():
        units, size = _units(score.shape, patterns[name])
        values.append(_normalised_units(score, patterns[name], size))
        sizes += [size] * units
    lengths = [len(value) for value in values]
    size_of = torch.tensor(sizes, device=values[0].device)
    flat = torch.cat(values)
    if not bool((flat >= 0).all()):
        wrong = [name for name, value in zip(scores, values) if not bool((value >= 0).all())]
        raise ValueError(f"the scores of {', '.join(wrong)} are not finite; no ranking. Did the training diverge?")
    total = int(size_of.sum())
    keep, least = total - zero_count(total, density), sum(int(s.numel()) // n for s, n in zip(scores.values(), lengths))
    if keep < least:
        raise AllocationError(
            f'"global" keeps at least one weight, block or channel in each of the {len(lengths)} layers, which is {least} weights, '
            f"but density {density} keeps {keep} of {total}; use at least {least / total:.3g}"
        )
    order = torch.sort(flat, descending=True, stable=True).indices
    kept_by_then = size_of[order].cumsum(0)
    number = int((kept_by_then < keep).sum()) + 1
    layer_of = torch.repeat_interleave(torch.tensor(lengths, device=flat.device))
    counts = torch.bincount(layer_of[order[:number]], minlength=len(lengths)).tolist()
    return {name: kept / units for name, kept, units in zip(scores, counts, lengths)}


@torch.no_grad()
def _normalised_units(score: Tensor, pattern: Pattern, size: int) -> Tensor:
    """float64[units]: mean |S| of each unit in means of the layer; infinite for the best unit; NaN if scores are not finite."""
    magnitude = score.to(torch.float64).abs()
    mean = magnitude.mean()
    flat = _pool(magnitude, pattern).flatten() / size
    flat = torch.where(mean > 0, flat / mean, flat)
    flat = torch.where(mean.isfinite(), flat, torch.nan)
    return flat.index_fill(0, flat.argmax(), torch.inf) if not flat.is_meta else flat


def _select_in_groups(magnitude: Tensor, pattern: NM) -> Tensor:
    grouped = _nm_groups(magnitude, pattern.m)
    best = torch.sort(grouped, dim=-1, descending=True, stable=True).indices[..., : pattern.n]
    return _from_nm_groups(torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True), magnitude.shape)


def _ranks(units: Tensor) -> Tensor:
    """int64 of the shape of `units`: how many come before in descending order, ties by lower index."""
    order = torch.sort(units.reshape(-1), descending=True, stable=True).indices
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places).reshape(units.shape)


def _may_look(scores: Tensor) -> bool:
    """Whether values may be read without waiting for a device."""
    return scores.device.type == "cpu"


def _check_no_nan(magnitude: Tensor) -> None:
    if bool(magnitude.isnan().any()):
        raise ValueError(f"{int(magnitude.isnan().sum())} of {magnitude.numel()} scores are NaN (shape {list(magnitude.shape)}); "
                         "a mask cannot be drawn from them. Did the training diverge?")  # fmt: skip


_zeros = lru_cache(maxsize=4096)(zero_count)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
