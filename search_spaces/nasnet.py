"""`nasnet`: the NASNet cell space with an overall sparsity, and NASNet-A.

Two cells of (by default) five blocks; a block sums two operations, each on any earlier state, the same one allowed. A
cell's output is the concatenation of the states that nothing reads. Start with `nasnet_space` (or `get_space("nasnet",
...)`), `NASNET_A` and `nasnet_from_genotype`. The network itself is in nasnet_network.py.

States are numbered as in genotypes.py: 0 the previous cell's input (h_{i-1}), 1 the current one (h_i), 2 + b block b.
TensorFlow's code numbers 0 and 1 the other way round; `genotypes.swap_inputs` converts.

Source: Zoph et al. 2018, NASNet (arXiv:1707.07012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import networkx as nx
from torch import nn

from ops.candidates import NASNET_OPERATIONS, NASNET_PRIMITIVES, candidates
from search_spaces.architecture import SpaceError, Value
from search_spaces.cell_graph import Cell, cell_digest, cell_graph
from search_spaces.chooser import Chooser
from search_spaces.darts import genotype_source, resolve_stem
from search_spaces.darts_network import Nodes, check_macro
from search_spaces.genotypes import Genotype, GenotypeError, swap_inputs
from search_spaces.nasnet_network import Concat, NasnetNetwork
from search_spaces.open_edges import OpenEdge
from search_spaces.overall_sparsity import (
    DENSITIES,
    PATTERNS,
    RULES_OFFERED,
    allocate_overall,
    check_overall,
    overall_size,
)
from search_spaces.space import Space

KINDS = ("normal", "reduce")

NASNET_A = swap_inputs(
    Genotype(  # as TensorFlow's code numbers the states
        normal=(
            ("sep_conv_5x5", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 1),
            ("avg_pool_3x3", 0),
            ("skip_connect", 1),
            ("avg_pool_3x3", 1),
            ("avg_pool_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
        ),
        normal_concat=(1, 2, 3, 4, 5, 6),
        reduce=(
            ("sep_conv_5x5", 0),
            ("sep_conv_7x7", 1),
            ("max_pool_3x3", 0),
            ("sep_conv_7x7", 1),
            ("avg_pool_3x3", 0),
            ("sep_conv_5x5", 1),
            ("skip_connect", 3),
            ("avg_pool_3x3", 2),
            ("sep_conv_3x3", 2),
            ("max_pool_3x3", 0),
        ),
        reduce_concat=(3, 4, 5, 6),
    )
)
"""NASNet-A. Its cells also concatenate one state that is read (0 in the normal cell, 3 in the reduction cell)."""


def nasnet(
    c: Chooser,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    channels: int = 16,
    cells: int = 2,
    blocks: int = 5,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    stem: str = "auto",
    stem_channels: int = 32,
    skip_reduction: bool = False,
    dropout: float | None = None,
    operations: Sequence[str] = NASNET_PRIMITIVES,
    concat_normal: Sequence[int] = (),
    concat_reduce: Sequence[int] = (),
    densities: Sequence[float] = DENSITIES,
    patterns: Sequence[str] = PATTERNS,
    rules: Sequence[str] = RULES_OFFERED,
    sparse_stem: bool = False,
    sparse_classifier: bool = False,
    sparse_depthwise: bool = False,
) -> nn.Module:
    """The NASNet macro network; all cells of a kind take the same decisions.

    Decisions, for kind in normal, reduce and block b: `kind.block<b>.input1`, `.op1`, `.input2`, `.op2`; then
    sparsity.density, .pattern, .rule.

    Args:
        c: takes the decisions.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: F, of a block in the first stage. 6@768 is cells 6, channels 32.
        cells: N, normal cells in each of the three stages; two reduction cells come on top.
        blocks: in each cell.
        auxiliary, drop_path, stem_channels, skip_reduction, dropout: as for `NasnetNetwork`.
        stem: "cifar", "imagenet", or "auto": "imagenet" from 128 pixels on.
        operations: offered everywhere, names in `ops.candidates.NASNET_OPERATIONS`; default the paper's thirteen.
        concat_normal, concat_reduce: states to concatenate even where they are read: (0,) and (3,) for NASNet-A.
        densities, patterns, rules: the overall sparsity offered.
        sparse_stem, sparse_classifier, sparse_depthwise: make these sparse too; dense by default.
    """
    offered = candidates(operations, NASNET_OPERATIONS)

    def source(kind: str, in_channels: tuple[int, int], width: int, odd: bool) -> Nodes:
        def operation(b: int, side: int, j: int) -> nn.Module:
            return c.op(
                f"{kind}.block{b}.op{side}",
                offered,
                in_channels=in_channels[j] if j < 2 else width,
                out_channels=width,
                stride=2 if kind == "reduce" and j < 2 else 1,
                odd=odd,
            )

        def side_of(b: int, side: int) -> list[tuple[int, nn.Module]]:
            return c.edges(f"{kind}.block{b}.input{side}", 2 + b, 1, partial(operation, b, side))

        return [side_of(b, 1) + side_of(b, 2) for b in range(blocks)]

    if not c.building:
        for kind in KINDS:
            source(kind, (channels, channels), channels, False)
    network = c.build(
        lambda: NasnetNetwork(
            source,
            _unread({"normal": concat_normal, "reduce": concat_reduce}),
            input_shape=input_shape,
            classes=classes,
            channels=channels,
            cells=cells,
            stem=resolve_stem(stem, input_shape),
            stem_channels=stem_channels,
            skip_reduction=skip_reduction,
            auxiliary=auxiliary,
            drop_path=drop_path,
            dropout=dropout,
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


def nasnet_space(**options: Any) -> Space:
    """The `nasnet` space with its options checked (see `nasnet`).

    Raises:
        SpaceError: an option out of its range, an unknown operation, a pattern that is legal nowhere.
    """
    options = Space(nasnet, "nasnet", options).options
    try:
        candidates(options.get("operations", NASNET_PRIMITIVES), NASNET_OPERATIONS)
    except ValueError as error:
        raise SpaceError(f"nasnet: {error}") from error
    if "none" in options.get("operations", ()):
        raise SpaceError('nasnet: operations: a block reads two states, "none" is not among the choices; leave it out')
    blocks = options.get("blocks", 5)
    shape = tuple(options.get("input_shape", (3, 32, 32)))
    check_macro("nasnet", shape, blocks=blocks)
    for name in ("concat_normal", "concat_reduce"):
        for j in options.get(name, ()):
            if not 0 <= j < blocks + 2:
                raise SpaceError(f"nasnet: {name}: expected states among 0 to {blocks + 1}, got {j}")
    shaping = ("classes", "channels", "cells", "stem_channels", "skip_reduction", "drop_path", "dropout")
    macro = {name: options[name] for name in shaping if name in options}
    macro = {"channels": 16, "cells": 2, **macro, "stem": resolve_stem(options.get("stem", "auto"), shape)}
    check_overall(
        "nasnet",
        lambda: NasnetNetwork(
            lambda *_: [[(1, nn.Identity())]] * blocks, lambda *_: {blocks + 1: ()}, input_shape=shape, **macro
        ),
        options,
    )
    return Space(nasnet, "nasnet", options, canonical=_canonical, graph=_graph, size=_size)


def nasnet_from_genotype(genotype: Genotype | str = NASNET_A, **macro: Any) -> NasnetNetwork:
    """The NASNet macro network with the cells of a genotype. Dense; `ops.layers.sparsify` makes it sparse.

    Args:
        genotype: a value, its text, or the name of a published one; states numbered as everywhere here (0 previous, 1
        current). **macro: as for `NasnetNetwork`; its defaults are those of the published CIFAR-10 network 6@768.

    Raises:
        GenotypeError: the text is no genotype.
        SpaceError: sizes are out of range.
    """
    given = Genotype.parse(genotype) if isinstance(genotype, str) else genotype
    if "stem" not in macro or macro["stem"] == "auto":
        macro["stem"] = resolve_stem("auto", macro.get("input_shape", (3, 32, 32)))
    return NasnetNetwork(
        genotype_source(given, NASNET_OPERATIONS), lambda kind, _: dict.fromkeys(given.concat(kind), ()), **macro
    )


def decisions_of_genotype(space: Space, genotype: Genotype) -> dict[str, Value]:
    """The cell decisions that give `genotype` in a nasnet space.

    Raises:
        GenotypeError: an operation that is not offered, another number of blocks, another concatenation.
    """
    offered = tuple(space.options.get("operations", NASNET_PRIMITIVES))
    blocks = space.options.get("blocks", 5)
    wanted: dict[str, Value] = {}
    for kind in KINDS:
        nodes = genotype.nodes(kind)
        if len(nodes) != blocks:
            raise GenotypeError(
                f"{kind}: cells of this space have {blocks} blocks, got {len(nodes)}; set its option blocks"
            )
        also = tuple(space.options.get(f"concat_{kind}", ()))
        concat = unread_states(nodes, also)
        if concat != tuple(sorted(genotype.concat(kind))):
            missing = sorted(set(genotype.concat(kind)) - set(concat))
            cure = (
                f"set its option concat_{kind} to {missing}"
                if missing
                else "nasnet_from_genotype builds it all the same"
            )
            raise GenotypeError(
                f"{kind}: this space concatenates the states that nothing reads, {list(concat)}, got "
                f"{list(genotype.concat(kind))}; {cure}"
            )
        for b, node in enumerate(nodes):
            for side, (op, j) in enumerate(node, start=1):
                if op not in offered:
                    raise GenotypeError(
                        f"{kind}, block {b}: this space offers {', '.join(offered)}, got {op}; add it to its operations"
                    )
                wanted[f"{kind}.block{b}.input{side}"] = str(j)
                wanted[f"{kind}.block{b}.op{side}"] = op
    return wanted


def genotype_of_decisions(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Genotype:
    """The cells that the decisions of a nasnet architecture give; `options` are those of its space."""
    edges, concat = {}, {}
    for kind in KINDS:
        cell = _cell(decisions, kind)
        edges[kind] = tuple(edge for node in cell for edge in node)
        concat[kind] = unread_states(cell, tuple(options.get(f"concat_{kind}", ())))
    return Genotype(edges["normal"], concat["normal"], edges["reduce"], concat["reduce"])


def unread_states(cell: Sequence[Sequence[tuple[Any, int]]], also: Sequence[int] = ()) -> tuple[int, ...]:
    """The states that no block reads, and `also`, ascending.

    Args:
        cell: for each block, (operation, state read) pairs.
        also: states to include anyhow.
    """
    read = {j for node in cell for _, j in node}
    return tuple(j for j in range(len(cell) + 2) if j not in read or j in also)


def _unread(also: Mapping[str, Sequence[int]]) -> Concat:
    """A supernet's edges read for certain nowhere, so there all states are concatenated, each as far as it is unread."""

    def concat(kind: str, nodes: Nodes) -> dict[int, list[OpenEdge]]:
        certain = [[(op, j) for j, op in node if not isinstance(op, OpenEdge)] for node in nodes]
        edges = [(j, op) for node in nodes for j, op in node if isinstance(op, OpenEdge)]
        states = unread_states(certain, also[kind])
        return {j: [] if j in also[kind] else [edge for i, edge in edges if i == j] for j in states}

    return concat


def _cell(decisions: Mapping[str, Value], kind: str) -> Cell:
    cell: list[tuple[tuple[str, int], ...]] = []
    while f"{kind}.block{len(cell)}.op1" in decisions:
        block = f"{kind}.block{len(cell)}"
        cell.append(
            tuple((str(decisions[f"{block}.op{side}"]), int(decisions[f"{block}.input{side}"])) for side in (1, 2))
        )
    return tuple(cell)


def _shapes(options: Mapping[str, Any]) -> list[tuple[str, frozenset[int]]]:
    """The kinds of cell as they occur, each with the inputs that have another shape than its blocks.

    The very first cell takes its previous input raw, so there an identity of it is a convolution and cells that are
    equal elsewhere need not be.
    """
    shape = options.get("input_shape", (3, 32, 32))
    occurring = [("normal", frozenset[int]()), ("reduce", frozenset({0, 1}))]
    if resolve_stem(options.get("stem", "auto"), shape) == "cifar":
        occurring.append(("normal", frozenset({0})))
    return occurring


def _canonical(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Any:
    digests = []
    for kind, reshaped in _shapes(options):
        cell = _cell(decisions, kind)
        output = unread_states(cell, tuple(options.get(f"concat_{kind}", ())))
        digests.append(cell_digest(cell, output, reshaped=reshaped))
    return [digests, {name: value for name, value in decisions.items() if name.startswith("sparsity.")}]


def _graph(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> nx.DiGraph:
    """Both cells side by side; names of nodes start with the kind."""
    graphs = []
    for kind, reshaped in _shapes(options)[:2]:
        cell = _cell(decisions, kind)
        output = unread_states(cell, tuple(options.get(f"concat_{kind}", ())))
        graphs.append(cell_graph(cell, output, reshaped=reshaped, prefix=f"{kind}."))
    return cast(nx.DiGraph, nx.union_all(graphs))


def _size(options: Mapping[str, Any]) -> int:
    operations = len(tuple(options.get("operations", NASNET_PRIMITIVES)))
    cell = 1
    for b in range(options.get("blocks", 5)):
        cell *= ((2 + b) * operations) ** 2
    return cell ** len(KINDS) * overall_size(options)
