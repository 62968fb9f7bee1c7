"""Spread one overall density over layers: shapes in, a density per layer out. No weights are looked at, but by `lamp`.

Every rule meets the overall density: masks drawn at its densities, with the counts of `ops.masks`, keep at least the asked total
and less than one weight per layer more (two for the ER family with `floor`, which rounds the plan up as well). Layers that shall
stay dense or have a density of their own are left out of `shapes`; the overall density is that of the layers given.

Start with `allocate(shapes, density, "erk")`; `RULES` names the rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import fsum, prod
from typing import cast

import torch
from torch import Tensor

from ops.masks import check_density, zero_count

Shape = tuple[int, ...]


class AllocationError(ValueError):
    """A density that a rule cannot spread over the layers, or an unknown rule."""


@dataclass(frozen=True)
class Request:
    """What a rule is asked: all arguments of `allocate`, checked.

    Attributes:
        shapes: layer -> shape of its weight, `[out, in / groups, *kernel]`; at least one.
        density: overall, in (0, 1).
        floor: whether ER and ERK plan whole zeros, floor((1 - density) * N) per layer.
        power: exponent of the ERK score.
        first: name of the layer that `uniform+` keeps dense.
        last: name of the classifier, for `uniform+` and `erk+`.
        last_density: density of the classifier; None for the rule's own default.
        weights: layer -> weight, for `lamp`.
    """

    shapes: dict[str, Shape]
    density: float
    floor: bool
    power: float
    first: str
    last: str
    last_density: float | None
    weights: Mapping[str, Tensor] | None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: prod(shape) for name, shape in self.shapes.items()}


def allocate(
    shapes: Mapping[str, Shape],
    density: float,
    rule: str = "erk",
    *,
    floor: bool = True,
    power: float = 1.0,
    first: str | None = None,
    last: str | None = None,
    last_density: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Spread an overall density over layers.

    Args:
        shapes: layer -> shape of its stored weight, `[out, in / groups, *kernel]`. A linear layer is not the equivalent 1x1
            convolution here: ERK adds up all axes.
        density: fraction of all weights to keep, in (0, 1]; 1 makes every layer dense.
        rule: a name in `RULES`:
            "uniform" the same everywhere; "uniform+" first layer dense, classifier at least 0.2, the rest alike;
            "er" and "erk" (n_in + n_out) / (n_in n_out), without and with the kernel's axes; "erk+" classifier at its own density,
            ERK for the rest; "igq" 1 / (F N + 1); "lamp" by the weights' magnitudes relative to what is left of their layer.
        floor: er, erk, erk+: plan floor((1 - density) * N) zeros per layer (RigL's code, the default) or the exact product.
        power: erk, erk+: exponent of the score.
        first: uniform+: the layer that stays dense; None is the first in `shapes`.
        last: uniform+, erk+: the classifier; None is the last in `shapes`.
        last_density: uniform+, erk+: the classifier's; None is max(density, 0.2) and 1.
        weights: lamp: layer -> weight of the shape in `shapes`.
        Options a rule does not use are checked and otherwise without effect.

    Returns:
        layer -> density, each in (0, 1], in the order of `shapes`.

    Raises:
        AllocationError: no such rule (names the nearest); a density out of range or too low for the rule; a shape or name that does
            not fit.
    """
    if rule not in RULES:
        near = difflib.get_close_matches(str(rule), RULES, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ";"
        raise AllocationError(f'unknown allocation rule "{rule}"{hint} known: {", ".join(sorted(RULES))}')
    request = _checked(shapes, density, floor, power, first, last, last_density, weights)
    if request.density == 1:
        return dict.fromkeys(request.shapes, 1.0)
    return RULES[rule](request)


def uniform(request: Request) -> dict[str, float]:
    """The overall density in every layer."""
    return dict.fromkeys(request.shapes, request.density)


def uniform_plus(request: Request) -> dict[str, float]:
    """First layer dense, classifier at `last_density` (at least 0.2 unless given), one density for the others that meets the total.

    Source: Gale et al. 2019 (arXiv:1902.09574) §4, as commonly coded.
    """
    sizes, density = request.sizes, request.density
    if len(sizes) < 3:
        raise AllocationError(
            f'"uniform+" needs a first layer, a last one and one between, got {list(sizes)}; use "uniform" or "erk"'
        )
    if request.first == request.last:
        raise AllocationError(f'"uniform+" needs two layers as `first` and `last`, got "{request.first}" for both')
    given, total = request.last_density, sum(sizes.values())
    fixed = {request.first: 1.0, request.last: max(density, 0.2) if given is None else given}
    middle = [n for name, n in sizes.items() if name not in fixed]
    spent = fsum(fixed[name] * sizes[name] for name in fixed)
    shared = (density * total - spent) / sum(middle)
    if not 0 < shared <= 1:
        # The classifier's own default grows with the density from 0.2 on; then only the first layer is in the way.
        alone = sizes[request.first] / (total - sizes[request.last])
        needed = (
            alone
            if given is None and alone > 0.2
            else (sizes[request.first] + (given or 0.2) * sizes[request.last]) / total
        )
        raise AllocationError(
            f'"uniform+" at density {density}: {request.first} (dense) and {request.last} (density {fixed[request.last]:.6g}) '
            f"leave density {shared:.6g} for the other {len(middle)} layers; expected (0, 1]. {_cure(needed, shared)}"
        )
    return {name: fixed.get(name, shared) for name in sizes}


def er(request: Request) -> dict[str, float]:
    """Erdős-Rényi: in proportion to (n_in + n_out) / (n_in * n_out), the first two axes of the shape; at most 1.

    Source: SET, Mocanu et al. 2018 (arXiv:1707.04780); capping as in RigL.
    """
    for name, shape in request.shapes.items():
        if len(shape) < 2:
            raise AllocationError(
                f'"er" needs an output and an input axis, got {name} of shape {list(shape)}; use "erk" or "igq"'
            )
    scores = {name: (shape[0] + shape[1]) / (shape[0] * shape[1]) for name, shape in request.shapes.items()}
    return _capped(request.sizes, scores, request.density, request.floor, '"er"')


def erk(request: Request) -> dict[str, float]:
    """Erdős-Rényi-Kernel: in proportion to (sum of all axes / product of all axes) ** power; at most 1.

    Source: RigL, Evci et al. 2020 (arXiv:1911.11134) §3(1), and its reference code.
    """
    scores = _erk_scores(request.shapes, request.power)
    return _capped(request.sizes, scores, request.density, request.floor, '"erk"')


def erk_plus(request: Request) -> dict[str, float]:
    """The classifier at `last_density` (1 unless given), ERK over the others so that the total is that of the overall density.

    Source: Liu et al. 2022 (arXiv:2202.02643), reference code.
    """
    sizes, density = request.sizes, request.density
    total, last = sum(sizes.values()), request.last
    if len(sizes) < 2:
        raise AllocationError(f'"erk+" needs a layer beside the classifier, got only {list(sizes)}; use "erk"')
    last_density = 1.0 if request.last_density is None else request.last_density
    spent = last_density * sizes[last]
    rest = (density * total - spent) / (total - sizes[last])
    if not 0 < rest <= 1:
        raise AllocationError(
            f'"erk+" at density {density}: {last} at density {last_density:.6g} leaves density {rest:.6g} for the other '
            f"{len(sizes) - 1} layers; expected (0, 1]. {_cure(spent / total, rest)}"
        )
    others = {name: shape for name, shape in request.shapes.items() if name != last}
    other_sizes = {name: sizes[name] for name in others}
    spread = _capped(other_sizes, _erk_scores(others, request.power), rest, request.floor, '"erk+"')
    return {name: last_density if name == last else spread[name] for name in sizes}


def igq(request: Request) -> dict[str, float]:
    """Ideal gas quota: density 1 / (F N + 1) for the one F >= 0 that meets the total.

    Source: Vysogorets and Kempe 2021 (arXiv:2107.02306) §4.
    """
    sizes = request.sizes
    target = request.density * sum(sizes.values())

    def kept(force: float) -> float:
        return fsum(n / (force * n + 1) for n in sizes.values())

    low, high = 0.0, len(sizes) / target  # kept(0) is everything, and kept(F) < layers / F
    for _ in range(200):  # to the last bit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > target else (low, middle)
    return {name: 1 / (high * n + 1) for name, n in sizes.items()}


def lamp(request: Request) -> dict[str, float]:
    """Shares of the layers among the globally highest `lamp_scores`; exactly the total, at least one weight per layer.

    Ties are kept in the order of the layers, then of the weights.

    Source: Lee et al. 2021 (arXiv:2010.07611), eq. (3).
    """
    sizes = request.sizes
    if request.weights is None:
        raise AllocationError(
            '"lamp" needs weights=..., the layers\' weights by name; the other rules need shapes only'
        )
    for name, shape in request.shapes.items():
        found = request.weights.get(name)
        if found is None or tuple(found.shape) != shape or found.is_meta:
            what = "none" if found is None else f"{list(found.shape)} on {found.device}"
            raise AllocationError(f'"lamp" needs the weight of {name}, shape {list(shape)}, with values; got {what}')
    scores = torch.cat([lamp_scores(request.weights[name]).flatten() for name in sizes])
    total = scores.numel()
    keep = total - zero_count(total, request.density)
    if keep < len(sizes):
        raise AllocationError(
            f'"lamp" keeps at least one weight in each of the {len(sizes)} layers, but density {request.density} keeps {keep} of '
            f"{total}; use at least {len(sizes) / total:.3g}"
        )
    best = torch.sort(scores, descending=True, stable=True).indices[:keep]
    layer_of = torch.repeat_interleave(torch.tensor(list(sizes.values()), device=best.device))
    counts = torch.bincount(layer_of[best], minlength=len(sizes)).tolist()
    return {name: kept / n for (name, n), kept in zip(sizes.items(), counts, strict=True)}


def lamp_scores(weight: Tensor) -> Tensor:
    """w_i^2 / sum of w_j^2 over the weights of the layer that are not smaller; in (0, 1] where w_i is not 0.

    Of equal magnitudes the lower flat index is taken as the smaller. The largest weight scores exactly 1, even if all are 0.

    Args:
        weight: real, any shape.

    Returns:
        float64 of weight's shape.

    Raises:
        ValueError: NaN or infinity among the weights.

    Source: Lee et al. 2021 (arXiv:2010.07611), eq. (3).
    """
    magnitude = weight.detach().to(torch.float64).abs().flatten()
    if not bool(magnitude.isfinite().all()):
        raise ValueError(
            f"LAMP scores need finite weights, got {int((~magnitude.isfinite()).sum())} that are NaN or infinite"
        )
    if bool(magnitude.any()):
        magnitude = magnitude / magnitude.max()  # squares of very small weights would vanish
    order = torch.sort(magnitude, stable=True).indices
    squares = magnitude[order] ** 2
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    ranked = torch.where(not_smaller > 0, squares / not_smaller, torch.zeros_like(squares))
    ranked[-1] = 1.0
    return torch.empty_like(ranked).scatter_(0, order, ranked).reshape(weight.shape)


RULES: dict[str, Callable[[Request], dict[str, float]]] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "er": er,
    "erk": erk,
    "erk+": erk_plus,
    "igq": igq,
    "lamp": lamp,
}


def _erk_scores(shapes: Mapping[str, Shape], power: float) -> dict[str, float]:
    """Scores relative to the highest, so that no power overflows; only their proportions matter."""
    scores = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    highest = max(scores.values())
    return {name: (score / highest) ** power for name, score in scores.items()}


def _capped(
    sizes: dict[str, int], scores: dict[str, float], density: float, floor: bool, rule: str
) -> dict[str, float]:
    """density_l = eps * score_l; layers where that exceeds 1 are dense, and eps is solved again for the rest.

    Of the layers over 1, those with the highest score (all of them, if equal) become dense in each round.

    Source: RigL reference code; the zeros a dense layer does not contribute are taken from the others, so the total is kept.
    """
    total_kept = fsum((n - zero_count(n, density)) if floor else n * density for n in sizes.values())
    pool, dense = dict(scores), set[str]()
    while pool:
        left = total_kept - sum(sizes[name] for name in dense)
        weighted = fsum(score * sizes[name] for name, score in pool.items())
        if left <= 0 or weighted <= 0 or left * min(pool.values()) / weighted < 1e-12:
            raise AllocationError(
                f"{rule} at density {density}: {len(dense)} dense layers leave {left:.6g} weights for the other {len(pool)}, and "
                f"{min(pool, key=pool.__getitem__)} would get none; use a lower power, a higher density, "
                'or "uniform" or "igq"'
            )
        eps = left / weighted
        highest = max(pool.values())
        if eps * highest <= 1:
            return {name: 1.0 if name in dense else eps * scores[name] for name in sizes}
        capped = [name for name, score in pool.items() if score == highest]
        dense.update(capped)
        for name in capped:
            del pool[name]
    return dict.fromkeys(sizes, 1.0)


def _cure(needed: float, share: float) -> str:
    if share > 1:
        return "Give the classifier a higher density, or use a lower overall density"
    return f"Use an overall density above {needed:.4g}, or give the classifier a lower density"


def _checked(
    shapes: Mapping[str, Shape],
    density: float,
    floor: bool,
    power: float,
    first: str | None,
    last: str | None,
    last_density: float | None,
    weights: Mapping[str, Tensor] | None,
) -> Request:
    if not shapes:
        raise AllocationError("expected at least one layer to spread the density over, got none")
    for name, shape in shapes.items():
        if not shape or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise AllocationError(f"{name}: expected a shape of whole numbers >= 1, got {list(shape)}")
    for option, chosen in (("first", first), ("last", last)):
        if chosen is not None and chosen not in shapes:
            near = difflib.get_close_matches(chosen, shapes, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise AllocationError(f'{option} names layer "{chosen}", which is not among the {len(shapes)} layers{hint}')
    try:
        density = check_density(density, "overall density")
        last_density = last_density if last_density is None else check_density(last_density, "last_density")
    except ValueError as error:
        raise AllocationError(str(error)) from None
    if not 0 <= power < float("inf"):
        raise AllocationError(f"expected power as a number >= 0, got {power}")
    names = list(shapes)
    plain = {name: cast(Shape, tuple(shape)) for name, shape in shapes.items()}
    return Request(
        plain,
        density,
        floor,
        power,
        names[0] if first is None else first,
        names[-1] if last is None else last,
        last_density,
        weights,
    )
