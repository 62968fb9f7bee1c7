"""Genotypes to architectures of the darts and nasnet spaces, and back.

What the spaces cannot hold (other operations, repeated inputs in darts, other concatenations) is an error here;
`darts.network_from_genotype` and `nasnet.nasnet_from_genotype` build networks of it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

from search_spaces import darts, nasnet
from search_spaces.architecture import Architecture, Value
from search_spaces.genotypes import Genotype, GenotypeError
from search_spaces.overall_sparsity import draw_with_cells
from search_spaces.space import Space

_SPACES = {"darts": darts, "nasnet": nasnet}


def architecture_from_genotype(
    space: Space, genotype: Genotype | str, others: Mapping[str, Value] | None = None
) -> Architecture:
    """The architecture of `space` with the cells of `genotype`.

    Args:
        space: a darts or nasnet space.
        genotype: a value, its text, or the name of a published one.
        others: remaining decisions by name, such as {"sparsity.density": 0.1}; default: as dense as offered, then the
            first option.

    Raises:
        GenotypeError: no genotype, or one whose cells the space does not have; says which and what to do.
        SpaceError: `others` is not offered.
    """
    if space.name not in _SPACES:
        raise GenotypeError(f'a genotype describes cells of the darts and nasnet spaces, not of "{space.name}"')
    given = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
    return draw_with_cells(space, _SPACES[space.name].decisions_of_genotype(space, given), others or {})


def genotype_from_architecture(space: Space, architecture: Architecture) -> Genotype:
    """The cells of `architecture`, which is of the darts or nasnet space `space`. Its sparsity is not part of a
    genotype.

    Raises:
        GenotypeError: another space, or a darts network so short that it has no normal cell.
    """
    if space.name not in _SPACES or architecture.space != space.name:
        raise GenotypeError(
            f'expected a space called darts or nasnet and an architecture of it, got "{space.name}" and "{architecture.space}"'
        )
    genotype: Genotype = _SPACES[space.name].genotype_of_decisions(architecture.as_dict(), space.options)
    return genotype
