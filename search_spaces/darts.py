"""`darts`: the DARTS cell space with an overall sparsity, and networks from genotypes of that family.

Two cells are searched, "normal" and "reduce"; each has four nodes, each node sums two operations on earlier states.
Start with `darts_space` (or `get_space("darts", ...)`) and `network_from_genotype`. The network itself is in
darts_network.py, genotype text in genotypes.py, genotypes to architectures and back in genotype_conversion.py.

Source: Liu et al. 2019, DARTS (arXiv:1806.09055).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import comb
from typing import Any, cast

import networkx as nx
from torch import nn

from ops.candidates import DARTS_PRIMITIVES, OPERATIONS, candidates
from search_spaces.architecture import SpaceError, Value
from search_spaces.cell_graph import Cell, cell_digest, cell_graph
from search_spaces.chooser import Chooser
from search_spaces.darts_network import DartsNetwork, Nodes, NodeSource, cell_kinds, check_macro
from search_spaces.genotypes import Edge, Genotype, GenotypeError
from search_spaces.overall_sparsity import (
    DENSITIES,
    PATTERNS,
    RULES_OFFERED,
    allocate_overall,
    check_overall,
    overall_size,
)
from search_spaces.space import Space

NODES = 4
CONCAT = {"normal": (2, 3, 4, 5), "reduce": (2, 3, 4, 5)}
RESHAPED = {"normal": frozenset[int](), "reduce": frozenset({0, 1})}


def darts(
    c: Chooser,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    channels: int = 16,
    cells: int = 8,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    stem: str = "auto",
    operations: Sequence[str] = DARTS_PRIMITIVES,
    densities: Sequence[float] = DENSITIES,
    patterns: Sequence[str] = PATTERNS,
    rules: Sequence[str] = RULES_OFFERED,
    sparse_stem: bool = False,
    sparse_classifier: bool = False,
    sparse_depthwise: bool = False,
) -> nn.Module:
    """The DARTS macro network; all cells of a kind take the same decisions.

    Decisions, for kind in normal, reduce and node i in 0..3: `kind.node<i>.inputs` (two earlier states; 0 is the cell
    before the previous one, 1 the previous one, 2 + i node i), `kind.node<i>.from<j>.op` for both; then
    sparsity.density, .pattern, .rule.

    Args:
        c: takes the decisions.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: of the states in the first cells, doubled at each of the two reductions. The published networks have
            36 (CIFAR) or 48.
        cells: in all; the published networks have 20 or 14.
        auxiliary: add the auxiliary head (training returns a pair of logits).
        drop_path: rate at the end of training.
        stem: "cifar", "imagenet" (divides the image by 8), or "auto": "imagenet" from 128 pixels on.
        operations: offered on every edge, names in `ops.candidates.OPERATIONS`.
        densities, patterns, rules: the overall sparsity offered.
        sparse_stem, sparse_classifier, sparse_depthwise: make these sparse too; dense by default.
    """
    offered = candidates(operations)

    def source(kind: str, in_channels: tuple[int, int], width: int, odd: bool) -> Nodes:
        def operation(i: int, j: int) -> nn.Module:
            return c.op(
                f"{kind}.node{i}.from{j}.op",
                offered,
                in_channels=in_channels[j] if j < 2 else width,
                out_channels=width,
                stride=2 if kind == "reduce" and j < 2 else 1,
                odd=odd,
            )

        return [c.edges(f"{kind}.node{i}.inputs", 2 + i, 2, partial(operation, i)) for i in range(NODES)]

    if not c.building:
        for kind in cell_kinds(cells):  # each kind once: its other cells would only repeat the decisions
            source(kind, (channels, channels), channels, False)
    network = c.build(
        lambda: DartsNetwork(
            source,
            CONCAT,
            input_shape=input_shape,
            classes=classes,
            channels=channels,
            cells=cells,
            auxiliary=auxiliary,
            drop_path=drop_path,
            stem=resolve_stem(stem, input_shape),
            affine=c.affine,
        )
    )
    return allocate_overall(
        c,
        network,
        densities,
        patterns,
        rules,
        sparse_stem=sparse_stem,
        sparse_classifier=sparse_classifier,
        sparse_depthwise=sparse_depthwise,
    )


def darts_space(**options: Any) -> Space:
    """The `darts` space with its options checked (see `darts`).

    Raises:
        SpaceError: an option out of its range, an unknown operation, a pattern that is legal nowhere.
    """
    made = Space(darts, "darts", options, canonical=_canonical, graph=_graph, size=_size)
    options = made.options
    try:
        candidates(options.get("operations", DARTS_PRIMITIVES))
    except ValueError as error:
        raise SpaceError(f"darts: {error}") from error
    macro = _macro(options)
    check_overall("darts", lambda: DartsNetwork(_no_operations, CONCAT, **macro), options)
    return Space(darts, "darts", options, canonical=_canonical, graph=_graph, size=_size)


def network_from_genotype(
    genotype: Genotype | str,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    channels: int = 36,
    cells: int = 20,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    stem: str = "auto",
) -> DartsNetwork:
    """The DARTS macro network with the cells of any genotype: any number of nodes, operation, repeated input or
    concatenation.

    Dense; `ops.layers.sparsify` makes it sparse. The defaults are those of the published CIFAR-10 networks.

    Args:
        genotype: a value, its text, or the name of a published one.
        input_shape, classes, channels, cells, auxiliary, drop_path, stem: as for `darts`.

    Raises:
        GenotypeError: the text is no genotype.
        SpaceError: sizes are out of range, or a reduction cell concatenates its inputs.
    """
    given = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
    return DartsNetwork(
        genotype_source(given),
        {"normal": given.normal_concat, "reduce": given.reduce_concat},
        input_shape=input_shape,
        classes=classes,
        channels=channels,
        cells=cells,
        auxiliary=auxiliary,
        drop_path=drop_path,
        stem=resolve_stem(stem, input_shape),
    )


def genotype_source(genotype: Genotype, operations: Mapping[str, Any] = OPERATIONS) -> NodeSource:
    """A source of cell operations (darts_network.py) that makes those of `genotype`."""

    def source(kind: str, in_channels: tuple[int, int], width: int, odd: bool) -> Nodes:
        def make(op: str, j: int) -> nn.Module:
            stride = 2 if kind == "reduce" and j < 2 else 1
            return operations[op](in_channels[j] if j < 2 else width, width, stride, odd=odd)

        return [[(j, make(op, j)) for op, j in node] for node in genotype.nodes(kind)]

    return source


def resolve_stem(stem: str, input_shape: Sequence[int]) -> str:
    """ "auto" becomes "imagenet" where both sides of the image have 128 pixels or more, else "cifar"."""
    if stem != "auto":
        return stem
    return "imagenet" if len(input_shape) == 3 and min(input_shape[1:]) >= 128 else "cifar"


def decisions_of_genotype(space: Space, genotype: Genotype) -> dict[str, Value]:
    """The cell decisions that give `genotype` in a darts space.

    Raises:
        GenotypeError: an operation that is not offered, one state read twice by a node, another number of nodes or
            concatenation.
    """
    offered = tuple(space.options.get("operations", DARTS_PRIMITIVES))
    wanted: dict[str, Value] = {}
    for kind in CONCAT:
        nodes = genotype.nodes(kind)
        if len(nodes) != NODES or sorted(genotype.concat(kind)) != list(CONCAT[kind]):
            raise GenotypeError(
                f"{kind}: cells of the darts space have {NODES} nodes, all concatenated, got {len(nodes)} nodes and concat "
                f"{list(genotype.concat(kind))}; network_from_genotype builds it all the same"
            )
        for i, node in enumerate(nodes):
            if node[0][1] == node[1][1]:
                raise GenotypeError(
                    f"{kind}, node {i}: nodes of the darts space read two different states, got {node[0]} and {node[1]}; "
                    "network_from_genotype builds it all the same"
                )
            wanted[f"{kind}.node{i}.inputs"] = ",".join(str(j) for j in sorted(j for _, j in node))
            for op, j in node:
                if op not in offered:
                    raise GenotypeError(
                        f"{kind}, node {i}: this space offers {', '.join(offered)}, got {op}; add it to its operations"
                    )
                wanted[f"{kind}.node{i}.from{j}.op"] = op
    return wanted


def genotype_of_decisions(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Genotype:
    """The cells that the decisions of a darts architecture give.

    Raises:
        GenotypeError: a network so short that it has no normal cell.
    """
    if "normal.node0.inputs" not in decisions:
        raise GenotypeError(
            "this architecture has no normal cell (fewer than three cells); a genotype needs both kinds"
        )
    edges = {kind: tuple(edge for node in _cell(decisions, kind) for edge in node) for kind in CONCAT}
    return Genotype(edges["normal"], CONCAT["normal"], edges["reduce"], CONCAT["reduce"])


def _no_operations(kind: str, in_channels: tuple[int, int], width: int, odd: bool) -> Nodes:
    return [[(0, nn.Identity())]] * NODES


def _macro(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options that shape the network; returns the constructor arguments of its skeleton."""
    shape = tuple(options.get("input_shape", (3, 32, 32)))
    sizes = {
        "classes": options.get("classes", 10),
        "channels": options.get("channels", 16),
        "cells": options.get("cells", 8),
    }
    drop_path = options.get("drop_path", 0.0)
    check_macro("darts", shape, drop_path, **sizes)
    return {
        "input_shape": shape,
        "stem": resolve_stem(options.get("stem", "auto"), shape),
        "drop_path": drop_path,
        **sizes,
    }


def _cell(decisions: Mapping[str, Value], kind: str) -> tuple[tuple[Edge, ...], ...]:
    def node(i: int) -> Iterator[Edge]:
        for j in str(decisions[f"{kind}.node{i}.inputs"]).split(","):
            yield str(decisions[f"{kind}.node{i}.from{j}.op"]), int(j)

    return tuple(tuple(node(i)) for i in range(NODES))


def _cells(decisions: Mapping[str, Value]) -> dict[str, Cell]:
    return {kind: _cell(decisions, kind) for kind in CONCAT if f"{kind}.node0.inputs" in decisions}


def _canonical(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Any:
    digests = {
        kind: cell_digest(cell, CONCAT[kind], reshaped=RESHAPED[kind]) for kind, cell in _cells(decisions).items()
    }
    rest = {name: value for name, value in decisions.items() if name.startswith("sparsity.")}
    return [digests, rest]


def _graph(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> nx.DiGraph:
    """Both cells side by side; names of nodes start with the kind."""
    graphs = [
        cell_graph(cell, CONCAT[kind], reshaped=RESHAPED[kind], prefix=f"{kind}.")
        for kind, cell in _cells(decisions).items()
    ]
    return cast(nx.DiGraph, nx.union_all(graphs))


def _size(options: Mapping[str, Any]) -> int:
    operations = len(tuple(options.get("operations", DARTS_PRIMITIVES)))
    cell = 1
    for i in range(NODES):
        cell *= comb(2 + i, 2) * operations**2
    return cell ** len(cell_kinds(options.get("cells", 8))) * overall_size(options)
