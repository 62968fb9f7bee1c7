"""From architecture parameters to one architecture. Start with `decode` and `architecture_of`.

A choice of operations that stands alone takes its most probable option. Inputs of a sum are ranked by how strong the best operation
on them is, and the strongest are kept; "none" is never taken there, though it has its share of the probability.

Source: DARTS, Liu et al. 2019 (arXiv:1806.09055), section 2.4; with edge weights PC-DARTS, Xu et al. 2020 (arXiv:1907.05737),
section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nas.oneshot.choices import Choice, EdgeChoice, OpChoice, SparsityChoice, ValueChoice
from search_spaces import Architecture, Space
from search_spaces.architecture import Value
from search_spaces.genotype_conversion import genotype_from_architecture
from search_spaces.genotypes import GenotypeError

NONE = "none"


def decode(choices: Mapping[str, Choice], probabilities: Mapping[str, Tensor]) -> dict[str, Value]:
    """The decisions that probabilities speak for. Ties go to the lower index.

    Args:
        choices: of a supernet.
        probabilities: decision -> float[options]. An edge choice without any counts its inputs equally; with some, they
            multiply the strength of the operations.

    Returns:
        A value for every op, edge, value and sparsity choice; of an edge that is not kept the operations are left out. Overall
        sparsity is the caller's to add.
    """
    plain = {name: p.detach().double().cpu() for name, p in probabilities.items()}
    decisions: dict[str, Value] = {}
    on_edges: set[str] = set()
    for choice in choices.values():
        if isinstance(choice, EdgeChoice):
            on_edges |= {operation for names in choice.operations for operation in names}
    for name, choice in choices.items():
        if (isinstance(choice, OpChoice) and name not in on_edges) or isinstance(choice, ValueChoice):
            decisions[name] = choice.options[largest(plain[name])]
        elif isinstance(choice, SparsityChoice) and name in plain:
            density, pattern = choice.targets[largest(plain[name])]
            decisions[f"{name}.density"] = density
            if density < 1:
                decisions[f"{name}.pattern"] = pattern
        elif isinstance(choice, EdgeChoice):
            kept = strongest(choice, choices, plain)
            decisions[name] = choice.text(kept)
            for j in kept:
                for operation in choice.operations[j]:
                    of = choices[operation]
                    decisions[operation] = of.options[largest(without_none(of.options, plain[operation]))]
    return decisions


def strongest(
    choice: EdgeChoice, choices: Mapping[str, Choice], probabilities: Mapping[str, Tensor]
) -> tuple[int, ...]:
    """The inputs that are kept, ascending."""
    strength = edge_strength(choice, choices, probabilities)
    order = torch.sort(strength, descending=True, stable=True).indices[: choice.keep]
    return tuple(sorted(int(j) for j in order))


def edge_strength(choice: EdgeChoice, choices: Mapping[str, Choice], probabilities: Mapping[str, Tensor]) -> Tensor:
    """How strong each input is, float64[n]: the largest probability of an operation on it but "none", times the edge's own."""
    strength = torch.ones(len(choice.options), dtype=torch.float64)
    if choice.own:
        for j, names in enumerate(choice.operations):
            best = [without_none(choices[name].options, probabilities[name]).max() for name in names]
            strength[j] = torch.stack(best).prod()
    if choice.name in probabilities:
        strength = strength * probabilities[choice.name].double()
    return strength


def without_none(options: tuple[Value, ...], values: Tensor) -> Tensor:
    """The same with -1 for "none", unless that is all there is."""
    if NONE not in options or len(options) == 1:
        return values
    return values.clone().index_fill_(0, torch.tensor([options.index(NONE)], device=values.device), -1.0)


def largest(values: Tensor) -> int:
    """Index of the largest; the lowest of equals."""
    return int((values == values.max()).nonzero()[0, 0])


def architecture_of(
    space: Space, decisions: Mapping[str, Value], sparsity: Mapping[str, tuple[float, str, str]] | None = None
) -> Architecture:
    """The architecture with these decisions.

    Args:
        space: a space.
        decisions: by name; decisions that were never met (they follow from rare others) get their first option.
        sparsity: overall choice -> (density, pattern, rule). The density need not be among those offered.

    Raises:
        SpaceError: a value that the space does not take.
    """
    wanted = dict(decisions)
    for name, (density, pattern, rule) in (sparsity or {}).items():
        wanted |= {f"{name}.density": density, f"{name}.pattern": pattern, f"{name}.rule": rule}
    made = space.draw(lambda name, options: wanted[name] if wanted.get(name) in options else options[0])
    complete = made.as_dict()
    off_list = {name: value for name, value in wanted.items() if name in complete and complete[name] != value}
    if not off_list:
        return made
    return space.architecture({**complete, **off_list, **{n: v for n, v in wanted.items() if needed(n, off_list)}})


def needed(name: str, off_list: Mapping[str, Value]) -> bool:
    """Whether a decision belongs to the same sparsity as one that was not offered."""
    return any(name.rpartition(".")[0] == other.rpartition(".")[0] for other in off_list)


def genotype_text(space: Space, architecture: Architecture) -> str | None:
    """The cells as the field writes them; None for spaces without cells."""
    try:
        return str(genotype_from_architecture(space, architecture))
    except GenotypeError:
        return None
