"""Networks whose masks are learned: make them, spread a density over them, and take the masks they have found.

Start with `learn_masks(module, density, pattern)`, `set_density_` and, for what is to be exported or trained on, `freeze_masks_`.
The layers, their gradients and mixtures of masks are in `ops.learned_layers`. `ops.plan.lower` takes learned layers as they are
(without gates); `ops.counting.count` counts scores as parameters, so count what `freeze_masks_` gives.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import cast

from torch import Tensor, nn

from ops.allocation import RULES, AllocationError, allocate
from ops.layers import SparseConv2d, SparseLayer, SparseLinear, _legal_target, _replace, _twin, is_depthwise
from ops.learned_layers import LearnedLayer, LearnedSparseConv2d, LearnedSparseLinear, scaled_scores
from ops.masks import check_density
from ops.patterns import Pattern
from ops.rankings import global_densities

__all__ = [
    "LearnedLayer",
    "LearnedSparseConv2d",
    "LearnedSparseLinear",
    "freeze_masks_",
    "learn_masks",
    "learned_layers",
    "scaled_scores",
    "set_density_",
    "weight_of",
]

EXEMPT = ("stem", "classifier", "depthwise")


def weight_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight that a convolution or linear layer really uses: plain, under a fixed mask or under a learned one."""
    return layer.effective_weight() if isinstance(layer, SparseLayer) else layer.weight


def learned_layers(module: nn.Module) -> list[tuple[str, LearnedSparseConv2d | LearnedSparseLinear]]:
    """Name and layer of every learned layer, in the order of `module.named_modules()`."""
    kinds = (LearnedSparseConv2d, LearnedSparseLinear)
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]


def learn_masks(
    module: nn.Module,
    density: float = 1.0,
    pattern: str | Pattern = "unstructured",
    where: Callable[[str, nn.Module], bool] | None = None,
    scores: str = "scaled",
) -> nn.Module:
    """Replace every convolution and linear layer, plain or of a fixed mask, by its learned twin, in place.

    The twins share the parameters and so does an optimizer made before; earlier masks and targets are forgotten. Learned layers
    and subclasses of torch's layers are left as they are. If anything is illegal, nothing is replaced.

    Args:
        module: the network; changed.
        density, pattern: target of every replaced layer; legality is checked where density < 1.
        where: `where(name, layer)` says which layers to replace; None means all.
        scores: their initialisation, see `LearnedLayer.init_scores`.

    Returns:
        `module` itself, unless it is such a layer: then its twin.

    Raises:
        PatternError: illegal on a layer; names the layer and the cure.
        ValueError: density out of range, or not that of an N:M pattern; no such initialisation.
    """
    kinds = (nn.Conv2d, nn.Linear, SparseConv2d, SparseLinear)
    chosen = {
        layer: name
        for name, layer in module.named_modules()
        if type(layer) in kinds and (where is None or where(name, layer))
    }
    for layer, name in chosen.items():
        _legal_target(layer, density, pattern, name or type(layer).__name__)
    twins: dict[nn.Module, nn.Module] = {}
    for layer in chosen:
        twin = cast(LearnedLayer, _twin(layer, density, pattern, LearnedSparseConv2d, LearnedSparseLinear))
        twin.init_scores(scores)
        twins[layer] = twin
    return _replace(module, twins)


def freeze_masks_(module: nn.Module) -> nn.Module:
    """Replace every learned layer by an ordinary sparse layer of its present mask, in place.

    The twins share weight and bias; weights outside the mask become 0, scores, options and gates are dropped.

    Returns:
        `module` itself, unless it is a learned layer: then its twin.
    """
    twins: dict[nn.Module, nn.Module] = {}
    for _, layer in learned_layers(module):
        mask, twin = layer.mask, _twin(layer, layer.density, layer.pattern)
        twin.set_mask(mask)
        twins[layer] = twin
    return _replace(module, twins)


Layers = nn.Module | Iterable[LearnedLayer | tuple[str, LearnedLayer]]
Exempt = Collection[str] | Callable[[str, nn.Module], bool]


def set_density_(module: Layers, density: float, rule: str = "uniform", exempt: Exempt = ()) -> dict[str, float]:
    """Spread one density over learned layers and set it as their target.

    Layers of an N:M pattern get N / M (1 if `density` is 1) and, like exempt layers, are left out of what the density is of.

    Args:
        module: the network, or its learned layers (with their names or without).
        density: overall, in (0, 1].
        rule: "uniform", "erk" or another rule of `ops.allocation` that needs no weights; "global": one ranking of the present
            scores over all layers, exact in the total (`ops.rankings.global_densities` for how layers are made comparable). It
            is not made again by itself when scores change.
        exempt: layers that stay dense: any of "stem" (the first layer), "classifier" (the last linear layer), "depthwise"; or
            a function of name and layer.

    Returns:
        name -> density now set.

    Raises:
        AllocationError: no such rule, or the rule cannot spread the density; ValueError: density out of range, no such exemption;
        PatternError: a pattern is impossible on its layer. Nothing is changed then.
    """
    density = check_density(density, "overall density")
    if rule != "global" and (rule not in RULES or rule == "lamp"):
        known = sorted({*RULES, "global"} - {"lamp"})
        near = difflib.get_close_matches(str(rule), known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ";"
        raise AllocationError(f'unknown rule "{rule}" for learned layers{hint} known: {", ".join(known)}')
    layers = _named(module)
    dense = _exempt_names(layers, exempt)
    fixed = {n: layer.pattern.fixed_density for n, layer in layers.items() if n not in dense and density < 1}
    chosen = dict.fromkeys(layers, 1.0) | {name: own for name, own in fixed.items() if own is not None}
    free = {name: layers[name] for name, own in fixed.items() if own is None}
    for name in fixed:
        layers[name]._legal_target(chosen[name] if name not in free else density, layers[name].pattern, name)
    if free and rule == "global":
        scores = {name: layer.score for name, layer in free.items()}
        chosen |= global_densities(scores, density, {name: layer.pattern for name, layer in free.items()})
    elif free:
        chosen |= allocate({name: tuple(layer.weight.shape) for name, layer in free.items()}, density, rule)
    for name, layer in layers.items():
        layer.set_target(chosen[name], name=name)
    return chosen


def _named(module: Layers) -> dict[str, LearnedLayer]:
    if isinstance(module, nn.Module):
        return dict(learned_layers(module))
    pairs = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(module)]
    for name, layer in pairs:
        if not isinstance(layer, LearnedLayer):
            raise TypeError(f"expected learned layers, got {type(layer).__name__} as {name}; learn_masks makes them")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"expected a name for each layer, got {[name for name, _ in pairs]}")
    return dict(pairs)


def _exempt_names(layers: dict[str, LearnedLayer], exempt: Exempt) -> set[str]:
    if callable(exempt):
        return {name for name, layer in layers.items() if exempt(name, layer)}
    kinds = {exempt} if isinstance(exempt, str) else set(exempt)
    if unknown := kinds - set(EXEMPT):
        raise ValueError(
            f"unknown exemption {sorted(unknown)}; known: {', '.join(EXEMPT)}, or a function of name and layer"
        )
    names = {name for name, layer in layers.items() if "depthwise" in kinds and is_depthwise(layer)}
    if "stem" in kinds:
        names |= set(list(layers)[:1])
    if "classifier" in kinds:
        names |= set([name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:])
    return names
