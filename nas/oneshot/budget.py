"""Densities for single paths of a supernet, so that different paths keep equally many weights. Start with `PathBudget`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from nas.errors import ConfigError
from nas.oneshot.choices import OverallChoice, SparsityChoice
from nas.oneshot.paths import ActiveLayers, Genes, PathSpace
from nas.oneshot.supernet import Structure, Supernet
from ops.allocation import AllocationError, allocate
from ops.masks import kept_count
from ops.patterns import parse_pattern
from ops.rankings import global_densities
from search_spaces.architecture import Value

REMEMBERED = 4096
"""Allocations that are kept at once."""

DRAWN = 64
"""Random paths that the usual number of kept weights is the mean of."""


class PathBudget:
    """Puts masks on the layers that run on a path, and counts what they keep.

    The layers that the space may make sparse share one density, spread by `allocation`; all others, and those on which the pattern
    is illegal, stay dense. In spaces that decide a density for each part, the parts of a path keep the ratios of their densities.

    Args:
        supernet: with learned layers.
        paths: its paths.
        allocation: "erk", "uniform" or "global".
        pattern: of all masks.
    """

    def __init__(self, supernet: Supernet, paths: PathSpace, allocation: str, pattern: str) -> None:
        self.supernet = supernet
        self.paths = paths
        self.allocation = allocation
        self.pattern = pattern
        self.by_part = not supernet.of_kind(OverallChoice) and bool(supernet.of_kind(SparsityChoice))
        if allocation == "global" and supernet.shares_weights:
            raise ConfigError(
                'allocation "global" ranks the weights of one network, but this space also decides widths or depths; use "erk"'
            )
        self._usual: dict[float, int] = {}
        self._active: dict[int, tuple[Structure, ActiveLayers]] = {}
        self._allocated: OrderedDict[tuple[object, ...], dict[str, float]] = OrderedDict()

    def refresh_scores(self) -> None:
        """Make the present weights the scores that masks are drawn by."""
        parameters = self.supernet.by_key()
        with torch.no_grad():
            for key, score in parameters.items():
                if key.endswith(".score"):
                    score.copy_(parameters[key.removesuffix("score") + "weight"])
        if self.allocation == "global":
            self._allocated.clear()

    def active(self, genes: Genes) -> ActiveLayers:
        """The layers of this path's structure."""
        structure = self.supernet.structure(self.paths.values(genes))
        known = self._active.get(id(structure))
        if known is None or known[0] is not structure:
            if len(self._active) > 512:
                self._active.clear()
            known = self._active[id(structure)] = (structure, ActiveLayers(structure))
        return known[1]

    def set_density(self, genes: Genes, density: float) -> None:
        """Give the layers of the path their densities; the masks follow from the scores."""
        layers = self.active(genes)
        for path, wanted in self.densities(genes, density).items():
            layer = layers.layers[path]
            layer.gates = None  # type: ignore[assignment]
            if layer.density != wanted or (wanted < 1 and str(layer.pattern) != self.pattern):
                layer.set_target(wanted, self.pattern)  # type: ignore[operator]

    def set_all(self, values: Mapping[str, Value], density: float) -> None:
        """Give all layers of a structure their densities, as if every one ran."""
        structure = self.supernet.structure(values)
        if structure.parts is None:
            return
        key = (id(structure), round(density, 9))
        if key not in self._allocated:
            on = list(structure.parts.layers)
            legal = [path for path in on if self._legal(structure.parts.layers[path])]
            result = dict.fromkeys(on, 1.0)
            if density < 1 and legal:
                result |= self._spread(structure.parts.layers, legal, density)
            self._allocated[key] = result
        for path, wanted in self._allocated[key].items():
            layer = structure.parts.layers[path]
            layer.gates = None
            if layer.density != wanted or (wanted < 1 and str(layer.pattern) != self.pattern):
                layer.set_target(wanted, self.pattern)

    def densities(self, genes: Genes, density: float) -> dict[str, float]:
        """Path of a layer that runs and can be sparse -> its density."""
        layers = self.active(genes)
        on = tuple(path for path in layers.on(genes) if path in layers.claimed)
        parts = self._part_shares(genes) if self.by_part else {}
        key = (id(layers), on, round(density, 9), tuple(parts.items()))
        if key in self._allocated:
            self._allocated.move_to_end(key)
            return self._allocated[key]
        result = dict.fromkeys(on, 1.0)
        legal = [path for path in on if self._legal(layers.layers[path])]
        if density < 1 and legal:
            if self.by_part:
                result |= self._by_part(layers, legal, density, parts)
            else:
                result |= self._spread(layers.layers, legal, density)
        self._allocated[key] = result
        if len(self._allocated) > REMEMBERED:
            self._allocated.popitem(last=False)
        return result

    def kept(self, genes: Genes, density: float) -> int:
        """Weights of convolutions and linear layers that the path keeps at this density, those that are always dense included."""
        layers = self.active(genes)
        _, dense = layers.sizes_on(genes)
        kept = dense
        for path, d in self.densities(genes, density).items():
            shape: tuple[int, ...] = tuple(layers.layers[path].weight.shape)  # type: ignore[arg-type]
            kept += kept_count(shape, d, self.pattern if d < 1 else "unstructured")
        return kept

    def usual_kept(self, density: float) -> int:
        """Mean of what random paths keep at this density: the same for every seed of the search."""
        if density in self._usual:
            return self._usual[density]
        generator = torch.Generator().manual_seed(0)
        kept = [self.kept(self.paths.draw({}, generator), density) for _ in range(DRAWN)]
        self._usual[density] = round(sum(kept) / DRAWN)
        return self._usual[density]

    def density_for(self, genes: Genes, kept: int) -> float | None:
        """The density at which the path keeps `kept` weights, as near as it can; None if it cannot keep nearly as many or as few.

        "Nearly" is 2 %.
        """
        layers = self.active(genes)
        on = layers.on(genes)
        sizes = {p: layers.sizes[p] for p in on if p in layers.claimed and self._legal(layers.layers[p])}
        wanted = kept - sum(layers.sizes[path] for path in on if path not in sizes)
        shares = (
            self._ratios(layers, list(sizes), self._part_shares(genes)) if self.by_part else dict.fromkeys(sizes, 1.0)
        )
        low, high = 0.0, 1.0
        for _ in range(40):  # of a sum that rises with density
            middle = (low + high) / 2
            if sum(size * min(1.0, middle * shares[path]) for path, size in sizes.items()) < wanted:
                low = middle
            else:
                high = middle
        return self._corrected(genes, max(high, 1e-6), kept)

    def _corrected(self, genes: Genes, density: float, kept: int) -> float | None:
        """A density near this one at which the exact count is right: rules round up in every layer."""
        best, error = density, self.kept(genes, density) - kept
        low, high = (0.0, density) if error > 0 else (density, 1.0)
        for _ in range(16):
            if abs(error) <= 0.002 * kept:
                break
            middle = (low + high) / 2
            found = self.kept(genes, max(middle, 1e-6)) - kept
            if abs(found) < abs(error):
                best, error = max(middle, 1e-6), found
            low, high = (low, middle) if found > 0 else (middle, high)
        return best if abs(error) <= 0.02 * kept else None

    def part_densities(self, genes: Genes, kept: int) -> dict[str, Value]:
        """Decisions of the parts of a path that keeps `kept` weights."""
        density = self.density_for(genes, kept) or 1.0
        shares = self._part_shares(genes)
        layers = self.active(genes)
        present = {part.choice.name for part in layers.parts if set(part.layers) & set(layers.on(genes))}
        top = max((shares[name] for name in present), default=1.0)
        decisions: dict[str, Value] = {}
        for name in present:
            own = min(1.0, round(shares[name] * density / top, 6))
            decisions[f"{name}.density"] = own
            if own < 1:
                decisions[f"{name}.pattern"] = self.pattern
        return decisions

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _spread(self, layers: Mapping[str, nn.Module], legal: list[str], density: float) -> dict[str, float]:
        if self.allocation == "global":
            scores = {path: layers[path].score for path in legal}
            patterns = {path: parse_pattern(self.pattern) for path in legal}
            return global_densities(scores, density, patterns)  # type: ignore[arg-type]
        shapes = {path: tuple(layers[path].weight.shape) for path in legal}  # type: ignore[arg-type]
        try:
            return allocate(shapes, density, self.allocation)
        except AllocationError:  # so few weights that the rule has no answer
            return allocate(shapes, density, "uniform")

    def _part_shares(self, genes: Genes) -> dict[str, float]:
        """Density that the path itself gives each part."""
        return {
            name: choice.targets[genes.taken[name][0]][0]
            for name, choice in self.supernet.of_kind(SparsityChoice).items()
        }

    def _by_part(
        self, layers: ActiveLayers, legal: list[str], density: float, shares: dict[str, float]
    ) -> dict[str, float]:
        """The densest part gets `density`, the others in proportion."""
        return {path: min(1.0, density * ratio) for path, ratio in self._ratios(layers, legal, shares).items()}

    def _ratios(self, layers: ActiveLayers, legal: list[str], shares: dict[str, float]) -> dict[str, float]:
        part_of = {path: part.choice.name for part in layers.parts for path in part.layers}
        top = max((shares[part_of[path]] for path in legal), default=1.0)
        return {path: shares[part_of[path]] / top for path in legal}

    def _legal(self, layer: nn.Module) -> bool:
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        return parse_pattern(self.pattern).illegal(tuple(layer.weight.shape), groups) is None  # type: ignore[arg-type]
