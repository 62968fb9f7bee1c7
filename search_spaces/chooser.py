"""What a space function talks to: every choice it makes goes through a `Chooser`, by name.

A space function is called in two ways. *Drawing* only takes the decisions: candidates are not built, `c.op` and `c.build`
return a `Placeholder`, and modules the function makes itself are on the meta device, so no weight is allocated.
*Building* takes given decisions and really builds. Decisions are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ops.allocation import allocate
from ops.layers import SparseConv2d, SparseLinear, is_depthwise, sparsify
from ops.patterns import Pattern, parse_pattern
from search_spaces.architecture import SpaceError, Value

Decide = Callable[[str, tuple[Value, ...]], Value]
"""Takes a decision: gets its name and the values offered, returns one of them."""


class Weights(NamedTuple):
    """What legality needs to know of a layer: its name, weight shape and number of groups."""

    name: str
    shape: tuple[int, ...]
    groups: int
    depthwise: bool


class Placeholder(nn.Module):
    """Stands for a candidate that was chosen but not built, because only the decisions are wanted."""

    def __init__(self, factory: Callable[..., nn.Module] | None, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.factory = factory
        self.arguments = dict(arguments)

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise SpaceError("this module was only drawn, not built: use Space.build(architecture)")


class Chooser:
    """Takes the decisions of one architecture, and builds its parts if asked to.

    Args:
        decide: takes each decision; called once per name, never for a decision with a single option.
        building: True if modules are really wanted (on whatever device is current), False if only decisions are.
        given: densities to take for decisions of these names although they are not offered; other values and names are ignored.
            Any in (0, 1] will do where a pattern of free density is legal, so that a network can be given an exact cost.
    """

    affine = True
    """Whether batch norms inside candidates learn a scale and shift; supernets switch that off while they are built."""

    def __init__(self, decide: Decide, *, building: bool, given: Mapping[str, Value] | None = None) -> None:
        self._decide = decide
        self.building = building
        self._given = given or {}
        self.made: dict[str, Value] = {}
        self.offered: dict[str, tuple[Value, ...]] = {}
        self._factory_built: set[int] = set()

    def choice(self, name: str, options: Sequence[Value]) -> Any:
        """Decide between JSON scalars. The same name again gives the same decision.

        Args:
            name: unique within the space, dotted by custom: "stage1.width".
            options: at least one; str, int, float or bool, no two equal.

        Raises:
            SpaceError: no options, options that are no JSON scalars, or the name was used with other options.
        """
        offered = tuple(options)
        if name in self.made:
            if self.offered[name] != offered:
                raise SpaceError(
                    f"decision {name!r}: asked with options {list(self.offered[name])} before and {list(offered)} now; "
                    "use another name, or the same options"
                )
            return self.made[name]
        if not offered:
            raise SpaceError(f"decision {name!r}: no options")
        for value in offered:
            if not isinstance(value, str | int | float | bool):
                raise SpaceError(
                    f"decision {name!r}: options must be str, int, float or bool, got {type(value).__name__} {value!r}; "
                    "offer names and look the object up"
                )
        if len(set(offered)) != len(offered):
            raise SpaceError(f"decision {name!r}: options repeat: {list(offered)}")
        if len(offered) == 1:
            value = offered[0]
        else:
            value = self._decide(name, offered)
            if value not in offered:
                raise SpaceError(f"decision {name!r}: expected one of {list(offered)}, got {value!r}")
            value = offered[offered.index(value)]  # 1 and 1.0 compare equal; keep the type that was offered
        self.made[name], self.offered[name] = value, offered
        return value

    def subset(self, name: str, n: int, k: int) -> tuple[int, ...]:
        """Decide which k of range(n) to take, ascending; stored as text such as "0,2"."""
        if not 0 < k <= n:
            raise SpaceError(f"decision {name!r}: expected 0 < k <= n, got k={k}, n={n}")
        return tuple(int(i) for i in self.choice(name, _subsets(n, k)).split(","))

    def edges(self, name: str, n: int, k: int, make: Callable[[int], nn.Module]) -> list[tuple[int, nn.Module]]:
        """Decide which k of n inputs are read, and make the operation on each: [(input, make(input)), ...], ascending.

        The decision is stored as text such as "0,2". A supernet keeps all n, as an `OpenEdge` each; calling one that is switched
        off returns None, which a sum has to leave out.
        """
        return [(j, make(j)) for j in self.subset(name, n, k)]

    def op(self, name: str, candidates: Mapping[str, Callable[..., nn.Module]], **arguments: Any) -> nn.Module:
        """Decide between candidate operations; `arguments` go to the factory of the chosen one."""
        factory = candidates[self.choice(name, tuple(candidates))]
        return factory(**arguments) if self.building else Placeholder(factory, arguments)

    def build(self, factory: Callable[[], nn.Module]) -> nn.Module:
        """Call `factory` if modules are wanted; while drawing, return a placeholder and leave it uncalled."""
        if not self.building:
            return Placeholder(None, {})
        module = factory()
        self._factory_built.add(id(module))
        return module

    def sparse(
        self,
        name: str,
        module: nn.Module,
        densities: Sequence[float],
        patterns: Sequence[str] = ("unstructured",),
        *,
        depthwise: bool = False,
    ) -> nn.Module:
        """Decide how dense the weights of `module` are, and in which pattern, one decision for all its layers.

        Takes `name.density`, and `name.pattern` where the density is below 1. Only what is legal on every layer is offered;
        a module without weights takes no decision at all.

        Args:
            name: prefix of the decisions.
            module: its Conv2d and Linear layers become SparseConv2d and SparseLinear.
            densities: fractions kept, each in (0, 1]. A pattern of fixed density (2:4) is offered at that density only.
            patterns: as `ops.patterns.parse_pattern` reads them.
            depthwise: sparsify depthwise convolutions too (they stay dense otherwise).

        Raises:
            SpaceError: nothing that was asked for is legal; names layer, reason and cure.
        """
        layers = [w for w in weights_of(module) if depthwise or not w.depthwise]
        if not layers:
            return module
        offers = sparsity_offers(name, layers, densities, patterns)
        density, fits = self._density(name, offers, lambda: _free_patterns(layers, patterns, all))
        if density == 1:
            return module
        pattern = self.choice(f"{name}.pattern", fits)
        if isinstance(module, Placeholder) or not self.building:
            return module
        return sparsify(module, density, pattern, where=lambda _, layer: depthwise or not is_depthwise(layer))

    def allocate(
        self,
        name: str,
        module: nn.Module,
        densities: Sequence[float],
        rules: Sequence[str] = ("erk",),
        patterns: Sequence[str] = ("unstructured",),
        *,
        skip: Callable[[str, nn.Module], bool] = lambda _name, _layer: False,
        depthwise: bool = False,
    ) -> nn.Module:
        """Decide one overall density, a pattern, and the rule that spreads the density over the layers.

        Takes `name.density`; below 1 also `name.pattern`, and `name.rule` where the pattern leaves the density free. The overall
        density is that of the layers that are made sparse: skipped and depthwise layers and those on which the pattern is illegal
        stay dense and do not count.

        Args:
            name: prefix of the decisions.
            module: the whole network (or a large part).
            densities: overall fractions kept, each in (0, 1].
            rules: names in `ops.allocation.RULES` that need shapes only.
            patterns: a pattern must be legal on at least one layer.
            skip: `skip(layer_name, layer)` is True for layers to leave dense (stem, classifier).
            depthwise: sparsify depthwise convolutions too.

        Raises:
            SpaceError: nothing that was asked for is possible.
        """
        offers = _density_offers(name, densities, [parse_pattern(p) for p in patterns])
        factory_made = isinstance(module, Placeholder) or id(module) in self._factory_built
        layers: list[Weights] | None = None
        if not factory_made:  # the layers are known while drawing too, so what is offered can depend on them
            layers = [w for w in weights_of(module, skip=skip) if depthwise or not w.depthwise]
            offers = _legal_somewhere(name, layers, offers)
        density, fits = self._density(name, offers, lambda: _free_patterns(layers, patterns, any))
        if density == 1:
            return module
        pattern = parse_pattern(self.choice(f"{name}.pattern", fits))
        rule = self.choice(f"{name}.rule", tuple(rules)) if pattern.fixed_density is None else "uniform"
        if self.building:
            _apply_allocation(name, module, density, rule, pattern, skip, depthwise)
        return module

    def _density(
        self, name: str, offers: Mapping[float, tuple[str, ...]], free: Callable[[], tuple[str, ...]]
    ) -> tuple[float, tuple[str, ...]]:
        """Decide a density; returns it and the patterns it can have: `free()` for one that is given and not offered."""
        decision, offered = f"{name}.density", tuple(offers)
        given = self._given.get(decision)
        off_list = isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= 1
        if off_list and decision not in self.made and given not in offers and free():
            self.made[decision], self.offered[decision] = float(cast(float, given)), offered
        density = self.choice(decision, offered)
        return density, offers[density] if density in offers else free()


@cache
def _subsets(n: int, k: int) -> tuple[str, ...]:
    return tuple(",".join(map(str, chosen)) for chosen in combinations(range(n), k))


def weights_of(module: nn.Module, skip: Callable[[str, nn.Module], bool] | None = None) -> list[Weights]:
    """The layers of `module` that can be sparse, also those of placeholders in it (built once on the meta device, remembered)."""
    if isinstance(module, Placeholder):
        if module.factory is None:
            return []
        try:
            return list(_candidate_weights(module.factory, tuple(sorted(module.arguments.items()))))
        except TypeError:  # an argument that cannot be hashed: build it every time
            return _meta_weights(module.factory, module.arguments)
    found: list[Weights] = []
    for name, part in module.named_modules():
        if isinstance(part, Placeholder):
            found += [w._replace(name=f"{name}.{w.name}" if w.name else name) for w in weights_of(part)]
        elif type(part) in (nn.Conv2d, nn.Linear, SparseConv2d, SparseLinear) and not (skip and skip(name, part)):
            groups = part.groups if isinstance(part, nn.Conv2d) else 1
            weight = cast(torch.Tensor, part.weight)
            found.append(Weights(name, tuple(weight.shape), groups, is_depthwise(part)))
    return found


@lru_cache(maxsize=4096)
def _candidate_weights(
    factory: Callable[..., nn.Module], arguments: tuple[tuple[str, Any], ...]
) -> tuple[Weights, ...]:
    return tuple(_meta_weights(factory, dict(arguments)))


def _meta_weights(factory: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> list[Weights]:
    with torch.device("meta"):
        return weights_of(factory(**arguments))


def _density_offers(name: str, densities: Sequence[float], patterns: Sequence[Pattern]) -> dict[float, tuple[str, ...]]:
    """density -> the patterns that can have it; () for density 1. In the order given."""
    if not densities or not patterns:
        raise SpaceError(
            f"{name}: expected at least one density and one pattern, got {list(densities)} and {list(patterns)}"
        )
    for density in densities:
        if not 0 < density <= 1:
            raise SpaceError(f"{name}: expected densities in (0, 1] (the fraction kept), got {density}")
    for pattern in patterns:
        if pattern.fixed_density is not None and pattern.fixed_density not in densities:
            raise SpaceError(
                f"{name}: pattern {pattern} has density {pattern.fixed_density}, which is not among {list(densities)}; "
                f"add {pattern.fixed_density} or leave the pattern out"
            )
    offers: dict[float, tuple[str, ...]] = {}
    for density in densities:
        fits = tuple(str(p) for p in patterns if p.fixed_density is None or p.fixed_density == density)
        if density == 1:
            offers[density] = ()
        elif fits:
            offers[density] = fits
    return offers


def fitting_patterns(options: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """A space's options, its default patterns without those whose fixed density (2:4) the densities asked for do not hold."""
    if "patterns" in options or "densities" not in options:
        return options
    offered = options["densities"]
    fits = [p for p in patterns if parse_pattern(p).fixed_density in (None, *offered)]
    return {**options, "patterns": fits}


def sparsity_offers(
    name: str, layers: Iterable[Weights], densities: Sequence[float], patterns: Sequence[str]
) -> dict[float, tuple[str, ...]]:
    """density -> patterns that are legal on every one of `layers`; densities below 1 without any are left out.

    Raises:
        SpaceError: no density is left.
    """
    return dict(_sparsity_offers(name, tuple(layers), tuple(densities), tuple(patterns)))


@lru_cache(maxsize=4096)
def _sparsity_offers(
    name: str, layers: tuple[Weights, ...], densities: tuple[float, ...], patterns: tuple[str, ...]
) -> dict[float, tuple[str, ...]]:
    parsed = [parse_pattern(p) for p in patterns]
    reasons: dict[str, str] = {}
    for pattern in parsed:
        for layer in layers:
            reason = pattern.illegal(layer.shape, layer.groups)
            if reason is not None:
                reasons[str(pattern)] = f"{layer.name or 'the layer'}: {reason}"
                break
    offers = {}
    for density, fits in _density_offers(name, densities, parsed).items():
        legal = tuple(p for p in fits if p not in reasons)
        if density == 1 or legal:
            offers[density] = legal
    if not offers:
        raise SpaceError(
            f"{name}: no offered pattern is legal, and density 1 is not offered. " + " ".join(reasons.values())
        )
    return offers


def _legal_somewhere(
    name: str, layers: Sequence[Weights], offers: Mapping[float, tuple[str, ...]]
) -> dict[float, tuple[str, ...]]:
    legal: dict[float, tuple[str, ...]] = {}
    for density, fits in offers.items():
        some = tuple(p for p in fits if any(parse_pattern(p).illegal(w.shape, w.groups) is None for w in layers))
        if density == 1 or some:
            legal[density] = some
    if not legal:
        raise SpaceError(
            f"{name}: none of the patterns is legal on any of the {len(layers)} layers, and density 1 is not offered"
        )
    return legal


def _free_patterns(
    layers: Sequence[Weights] | None, patterns: Sequence[str], enough: Callable[[Iterable[bool]], bool]
) -> tuple[str, ...]:
    """The patterns of free density that are legal on `enough` (all, any) of the layers; all of them if the layers are not known."""
    parsed = [p for p in map(parse_pattern, patterns) if p.fixed_density is None]
    return tuple(
        str(p) for p in parsed if layers is None or enough(p.illegal(w.shape, w.groups) is None for w in layers)
    )


def _apply_allocation(
    name: str,
    module: nn.Module,
    density: float,
    rule: str,
    pattern: Pattern,
    skip: Callable[[str, nn.Module], bool],
    depthwise: bool,
) -> None:
    chosen = {
        w.name: w
        for w in weights_of(module, skip=skip)
        if (depthwise or not w.depthwise) and pattern.illegal(w.shape, w.groups) is None
    }
    if not chosen:
        raise SpaceError(f"{name}: pattern {pattern} is legal on no layer of the network; leave it out of `patterns`")
    targets = allocate({layer: w.shape for layer, w in chosen.items()}, density, rule)
    sparsify(module, 1.0, "unstructured", where=lambda layer_name, _: layer_name in chosen)
    for layer_name, target in targets.items():
        layer = cast("SparseConv2d | SparseLinear", module.get_submodule(layer_name))
        layer.set_target(target, pattern)
