"""Cells as NNI's model hub writes them, to genotypes and back. Plain dicts and JSON; NNI itself is not needed.

The hub's DARTS space (`nni.nas.hub.pytorch.DARTS`) has for node n = 2, 3, ... of each cell two labels per input k = 0, 1:
"normal/op_3_0": name of the operation, "normal/input_3_0": [state it reads]. States are counted as in `Genotype`. What comes out is
what `DARTS.frozen_factory` and `load_searched_model` take. Start with `genotype_from_hub` and `genotype_to_hub`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from search_spaces.genotypes import Edge, Genotype, GenotypeError

HUB_OPERATIONS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""What the hub's DARTS offers; it has no "none"."""


def genotype_from_hub(sample: Mapping[str, Any] | str) -> Genotype:
    """The genotype of a frozen sample of the hub's DARTS space.

    Args:
        sample: label -> value, or its JSON text.

    Raises:
        GenotypeError: a label is missing, unknown, or has a senseless value; names it.
    """
    if isinstance(sample, str):
        try:
            sample = json.loads(sample)
        except ValueError as error:
            raise GenotypeError(f"expected the JSON of a hub sample, found {error}") from error
    if not isinstance(sample, Mapping):
        raise GenotypeError(f"expected a dict of labels, got {type(sample).__name__}")
    cells = {kind: _cell(sample, kind) for kind in ("normal", "reduce")}
    nodes = {kind: len(edges) // 2 for kind, edges in cells.items()}
    known = {label for kind, n in nodes.items() for node in range(2, 2 + n) for label in _labels(kind, node)}
    strange = sorted(set(sample) - known)
    if strange:
        raise GenotypeError(f"expected labels such as normal/op_2_0 and normal/input_2_0, found {strange[0]!r}")
    concat = {kind: tuple(range(2, 2 + n)) for kind, n in nodes.items()}
    return Genotype(cells["normal"], concat["normal"], cells["reduce"], concat["reduce"])


def genotype_to_hub(genotype: Genotype | str) -> dict[str, Any]:
    """The sample of the hub's DARTS space with the cells of a genotype; JSON.

    Raises:
        GenotypeError: an operation that the hub has not, or a cell that does not give out all of its nodes.
    """
    given = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
    sample: dict[str, Any] = {}
    for kind in ("normal", "reduce"):
        nodes = given.nodes(kind)
        if given.concat(kind) != tuple(range(2, 2 + len(nodes))):
            raise GenotypeError(
                f"{kind} cell: the hub's cells give out all of their nodes, 2 to {1 + len(nodes)}; this one gives "
                f"{given.concat(kind)}"
            )
        for number, edges in enumerate(nodes, start=2):
            for k, (operation, state) in enumerate(edges):
                if operation not in HUB_OPERATIONS:
                    raise GenotypeError(
                        f"{kind} cell, node {number}: the hub has no operation {operation!r}; it has: {', '.join(HUB_OPERATIONS)}"
                    )
                sample[f"{kind}/op_{number}_{k}"] = operation
                sample[f"{kind}/input_{number}_{k}"] = [state]
    return sample


def _cell(sample: Mapping[str, Any], kind: str) -> tuple[Edge, ...]:
    edges: list[Edge] = []
    number = 2
    while any(label in sample for label in _labels(kind, number)):
        for k in (0, 1):
            operation = _take(sample, f"{kind}/op_{number}_{k}")
            state = _take(sample, f"{kind}/input_{number}_{k}")
            if isinstance(state, list | tuple) and len(state) == 1:
                state = state[0]
            if not isinstance(operation, str):
                raise GenotypeError(f"{kind}/op_{number}_{k}: expected the name of an operation, found {operation!r}")
            if isinstance(state, bool) or not isinstance(state, int) or not 0 <= state < number:
                raise GenotypeError(
                    f"{kind}/input_{number}_{k}: expected one state from 0 to {number - 1}, found {state!r}"
                )
            edges.append((operation, state))
        number += 1
    if not edges:
        raise GenotypeError(f"expected labels of a {kind} cell, such as {kind}/op_2_0, found none")
    return tuple(edges)


def _labels(kind: str, node: int) -> list[str]:
    return [f"{kind}/{what}_{node}_{k}" for what in ("op", "input") for k in (0, 1)]


def _take(sample: Mapping[str, Any], label: str) -> Any:
    if label not in sample:
        raise GenotypeError(f"expected the label {label!r}, which is missing")
    return sample[label]
