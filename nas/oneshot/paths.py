"""Single paths through a supernet: drawn from probabilities, changed, turned into gates and decisions. Start with `Genes`.

A path says for *every* mixed choice which option it takes, also on edges that it does not keep, so that any one of them can be
changed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nas.oneshot.choices import Choice, EdgeChoice, OpChoice, OverallChoice, SparsityChoice, ValueChoice
from nas.oneshot.decode import NONE
from nas.oneshot.mixed import Edge, Gate, Gates, MixedOp
from search_spaces.architecture import Value

if TYPE_CHECKING:
    from nas.oneshot.supernet import Structure

Taken = tuple[int, ...]
"""Indices of the options that are taken: one, or as many as an edge choice keeps."""


@dataclass(frozen=True)
class Genes:
    """One path: choice -> what is taken, hashable by `key`."""

    taken: dict[str, Taken]

    @property
    def key(self) -> tuple[tuple[str, Taken], ...]:
        """The same as a value."""
        return tuple(self.taken.items())


class PathSpace:
    """The paths of a supernet.

    Args:
        choices: of the supernet.
    """

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self.choices = {n: c for n, c in choices.items() if not isinstance(c, OverallChoice)}
        on_edges = {
            operation
            for choice in choices.values()
            if isinstance(choice, EdgeChoice)
            for names in choice.operations
            for operation in names
        }
        self.allowed: dict[str, tuple[int, ...]] = {}
        for name, choice in self.choices.items():
            indices = tuple(range(len(choice.options)))
            if isinstance(choice, OpChoice) and name in on_edges and len(indices) > 1:
                indices = tuple(i for i in indices if choice.options[i] != NONE)
            self.allowed[name] = indices

    def draw(self, probabilities: Mapping[str, Tensor], generator: torch.Generator) -> Genes:
        """Draw every choice by its probabilities; edges without replacement. A choice without any is drawn uniformly.

        Source: Gumbel top-k, Kool et al. 2019 (arXiv:1903.06059), section 2.
        """
        sizes = [len(choice.options) for choice in self.choices.values()]
        logs = [
            probabilities[name].detach().clamp_min(1e-12).log() if name in probabilities else torch.zeros(size)
            for name, size in zip(self.choices, sizes)
        ]
        noise = -torch.empty(sum(sizes)).exponential_(generator=generator).log()
        noisy = (torch.cat([log.float().cpu() for log in logs]) + noise).split(sizes)
        return Genes({name: self._best(name, values) for name, values in zip(self.choices, noisy)})

    def most_probable(self, probabilities: Mapping[str, Tensor]) -> Genes:
        """The most probable option of every choice; ties to the lower index."""
        return Genes(
            {
                name: self._best(
                    name,
                    probabilities[name].detach().float().cpu()
                    if name in probabilities
                    else torch.zeros(len(c.options)),
                )
                for name, c in self.choices.items()
            }
        )

    def gates(self, genes: Genes, probabilities: Mapping[str, Tensor] | None = None) -> Gates:
        """Gates of the path: with probabilities each counts 1, with the gradient of its probability (straight through)."""
        made: Gates = {}
        for name, taken in genes.taken.items():
            if isinstance(self.choices[name], ValueChoice):
                continue
            weights = None
            if probabilities is not None and name in probabilities:
                p = probabilities[name]
                hard = torch.zeros_like(p).index_fill_(0, torch.tensor(taken, device=p.device), 1.0)
                weights = hard * (1 + p - p.detach())
            made[name] = Gate(weights, taken)
        return made

    def values(self, genes: Genes) -> dict[str, Value]:
        """Of the choices that cannot be mixed."""
        return {
            name: self.choices[name].options[taken[0]]
            for name, taken in genes.taken.items()
            if isinstance(self.choices[name], ValueChoice)
        }

    def decisions(self, genes: Genes) -> dict[str, Value]:
        """The decisions of the space, those of unused edges left out."""
        decisions: dict[str, Value] = {}
        unused: set[str] = set()
        used: set[str] = set()
        for name, taken in genes.taken.items():
            choice = self.choices[name]
            if isinstance(choice, EdgeChoice):
                decisions[name] = choice.text(taken)
                for j, names in enumerate(choice.operations):
                    (used if j in taken else unused).update(names)
            elif isinstance(choice, SparsityChoice):
                density, pattern = choice.targets[taken[0]]
                decisions[f"{name}.density"] = density
                if density < 1:
                    decisions[f"{name}.pattern"] = pattern
            else:
                decisions[name] = choice.options[taken[0]]
        return {name: value for name, value in decisions.items() if name not in unused or name in used}

    def _count(self, name: str) -> int:
        choice = self.choices[name]
        return choice.keep if isinstance(choice, EdgeChoice) else 1

    def _best(self, name: str, values: Tensor) -> Taken:
        allowed = self.allowed[name]
        order = torch.sort(values[list(allowed)], descending=True, stable=True).indices[: self._count(name)]
        return tuple(sorted(allowed[int(i)] for i in order))


class ActiveLayers:
    """Which layers of a structure run on a path.

    Args:
        structure: of a supernet.
    """

    def __init__(self, structure: Structure) -> None:
        self.conditions: dict[str, tuple[tuple[str, int], ...]] = {}
        self.sizes: dict[str, int] = {}
        self.layers: dict[str, nn.Module] = {}
        self._walk(structure.network, "", ())
        self.parts = structure.parts.parts if structure.parts else []
        self.claimed = {path for part in self.parts for path in part.layers}

    def on(self, genes: Genes) -> list[str]:
        """Paths of the convolutions and linear layers that run."""
        return [
            path
            for path, conditions in self.conditions.items()
            if all(index in genes.taken.get(name, (index,)) for name, index in conditions)
        ]

    def sizes_on(self, genes: Genes) -> tuple[int, int]:
        """Weights of the layers that run: (those that can be sparse, the others)."""
        on = self.on(genes)
        claimed = sum(self.sizes[path] for path in on if path in self.claimed)
        return claimed, sum(self.sizes[path] for path in on) - claimed

    def _walk(self, module: nn.Module, path: str, conditions: tuple[tuple[str, int], ...]) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            self.conditions[path] = conditions
            self.sizes[path] = module.weight.numel()
            self.layers[path] = module
            return
        if isinstance(module, Edge):
            conditions = (*conditions, (module.name, module.j))
        if isinstance(module, MixedOp):
            for i, candidate in enumerate(module.candidates):
                self._walk(candidate, f"{path}.candidates.{i}".lstrip("."), (*conditions, (module.name, i)))
            return
        for name, child in module.named_children():
            self._walk(child, f"{path}.{name}".lstrip("."), conditions)
