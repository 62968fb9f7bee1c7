"""`nasbench201`: the NAS-Bench-201 (NATS-Bench topology) cell space with an overall sparsity.

A cell has four states; each of the six pairs of states has one of five operations, and a state is the sum over the
earlier ones. Start with `nasbench201_space` (or `get_space("nasbench201", ...)`), `architecture_from_string`,
`string_from_architecture`.

What cannot matter (operations that the output does not depend on, or that read nothing but zeros) is neither built nor
part of the digest, so that equal digests have equal parameters, MACs and densities. The benchmark does build and count
it: `network_from_string` and the option `dead_operations=True` give its numbers for every cell.

Source: Dong and Yang 2020, NAS-Bench-201 (arXiv:2001.00326), section 2.1, and its published code.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import nn

from ops.candidates import NASBENCH201_PRIMITIVES, OPERATIONS, ReluConvNorm, Zero, candidates
from search_spaces.architecture import Architecture, SpaceError, Value
from search_spaces.cell_graph import Cell, cell_digest, cell_graph
from search_spaces.chooser import Chooser
from search_spaces.darts_network import Nodes, NodeSums, Size, check_macro, halved, is_odd
from search_spaces.overall_sparsity import (
    DENSITIES,
    PATTERNS,
    RULES_OFFERED,
    allocate_overall,
    check_overall,
    draw_with_cells,
    overall_size,
)
from search_spaces.space import Space

STATES = 4


class ResidualReduction(nn.Module):
    """Halve the image, change the channels: two 3x3 convolutions (the first of stride 2), plus average pooling and a
    1x1 convolution.

    Args:
        in_channels, out_channels: channels before and after.
        odd: the image has an odd side.
    """

    def __init__(self, in_channels: int, out_channels: int, odd: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ReluConvNorm(in_channels, out_channels, 3, 2), ReluConvNorm(out_channels, out_channels, 3)
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=odd), nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, in_channels, h, w] to float[batch, out_channels, ceil(h / 2), ceil(w / 2)]."""
        return self.shortcut(x) + self.body(x)


def live_nodes(nodes: Nodes) -> Nodes:
    """Leave out what cannot matter: operations on states that are zero, and states that the last one does not depend on.

    Args:
        nodes: what each state after the input sums; the last state is the output.

    Returns:
        The same for the states that are left, renumbered; a single "none" if the output is zero.
    """
    zero = {0: False}
    kept: dict[int, list[tuple[int, nn.Module]]] = {}
    for i, node in enumerate(nodes, start=1):
        kept[i] = [(j, op) for j, op in node if not isinstance(op, Zero) and not zero[j]]
        zero[i] = not kept[i]
    last = len(nodes)
    if zero[last]:
        return [[(0, Zero(1, 1))]]
    needed = {last}
    for i in range(last, 0, -1):
        if i in needed:
            needed |= {j for j, _ in kept[i]}
    number = {i: n for n, i in enumerate(sorted(needed | {0}))}
    return [[(number[j], op) for j, op in kept[i]] for i in sorted(needed - {0})]


class BenchCell(nn.Module):
    """One cell: the last of its sums."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self.nodes = NodeSums(nodes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, channels, h, w] to the same shape."""
        return self.nodes(x)[-1]


class BenchNetwork(nn.Module):
    """Stem, three stages of equal cells with a residual reduction between them, batch norm, ReLU, average, classifier.

    Args:
        source: `source(channels)` makes the operations of one cell.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: in the first stage; doubled twice.
        cells: in each of the three stages.
    """

    def __init__(
        self,
        source: Any,
        *,
        input_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        channels: int = 16,
        cells: int = 5,
    ) -> None:
        super().__init__()
        check_macro("nasbench201", input_shape, classes=classes, channels=channels, cells=cells)
        size: Size = (int(input_shape[1]), int(input_shape[2]))
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.body = nn.Sequential()
        for stage in range(3):
            if stage > 0:
                self.body.append(ResidualReduction(channels, 2 * channels, is_odd(size)))
                channels, size = 2 * channels, halved(size)
            for _ in range(cells):
                self.body.append(BenchCell(source(channels)))
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float[batch, *input_shape] to logits float[batch, classes]."""
        return self.classifier(self.head(self.body(self.stem(x))))


def nasbench201(
    c: Chooser,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    channels: int = 16,
    cells: int = 5,
    operations: Sequence[str] = NASBENCH201_PRIMITIVES,
    dead_operations: bool = False,
    densities: Sequence[float] = DENSITIES,
    patterns: Sequence[str] = PATTERNS,
    rules: Sequence[str] = RULES_OFFERED,
    sparse_stem: bool = False,
    sparse_classifier: bool = False,
    sparse_depthwise: bool = False,
) -> nn.Module:
    """The NAS-Bench-201 macro network; all its cells take the same decisions.

    Decisions: `node<i>.from<j>` for 0 <= j < i <= 3, an operation each; then sparsity.density, .pattern, .rule.

    Args:
        c: takes the decisions.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        channels: in the first stage, doubled twice. The benchmark has 16.
        cells: in each of the three stages. The benchmark has 5.
        operations: offered on every edge, names in `ops.candidates.OPERATIONS`; default the benchmark's five.
        dead_operations: build also what cannot matter, as the benchmark does; every cell then has its own digest.
        densities, patterns, rules: the overall sparsity offered.
        sparse_stem, sparse_classifier, sparse_depthwise: make these sparse too; dense by default.
    """
    offered = candidates(operations)

    def source(width: int) -> Nodes:
        nodes = [
            [(j, c.op(f"node{i}.from{j}", offered, in_channels=width, out_channels=width, stride=1)) for j in range(i)]
            for i in range(1, STATES)
        ]
        return nodes if dead_operations or not c.building else live_nodes(nodes)

    if not c.building:
        source(channels)
    network = c.build(
        lambda: BenchNetwork(source, input_shape=input_shape, classes=classes, channels=channels, cells=cells)
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


def nasbench201_space(**options: Any) -> Space:
    """The `nasbench201` space with its options checked (see `nasbench201`).

    Raises:
        SpaceError: an option out of its range, an unknown operation, a pattern that is legal nowhere.
    """
    options = Space(nasbench201, "nasbench201", options).options
    try:
        candidates(options.get("operations", NASBENCH201_PRIMITIVES))
    except ValueError as error:
        raise SpaceError(f"nasbench201: {error}") from error
    macro = {name: options[name] for name in ("input_shape", "classes", "channels", "cells") if name in options}
    check_overall("nasbench201", lambda: BenchNetwork(lambda _: [[(0, nn.Identity())]], **macro), options)
    return Space(nasbench201, "nasbench201", options, canonical=_canonical, graph=_graph, size=_size)


def parse_cell(text: str) -> Cell:
    """Read `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`: "op~j" is an operation on state j, "+" ends a state.

    Returns:
        For each of the states 1 to 3, (operation, state read) pairs.

    Raises:
        SpaceError: names the position of what is wrong.
    """

    def fail(position: int, problem: str) -> SpaceError:
        return SpaceError(
            f"cell {text!r}, character {position + 1}: {problem}; "
            "expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2| with operations such as " + ", ".join(NASBENCH201_PRIMITIVES)
        )

    nodes = []
    start = 0
    for i, group in enumerate(text.split("+"), start=1):
        if len(group) < 2 or not (group.startswith("|") and group.endswith("|")):
            raise fail(start, f"{group!r} is not enclosed in |")
        pairs = []
        position = start + 1
        for j, item in enumerate(group[1:-1].split("|")):
            op, tilde, state = item.partition("~")
            if not tilde or op not in OPERATIONS:
                near = difflib.get_close_matches(op, OPERATIONS, n=1)
                raise fail(position, f"{item!r} is no op~state" + (f', did you mean "{near[0]}"?' if near else ""))
            if state != str(j):
                raise fail(position, f"operation number {j} of state {i} reads state {j}, got {item!r}")
            pairs.append((op, j))
            position += len(item) + 1
        if len(pairs) != i:
            raise fail(start, f"state {i} has {i} operations, got {len(pairs)}")
        nodes.append(tuple(pairs))
        start += len(group) + 1
    if len(nodes) != STATES - 1:
        raise fail(len(text), f"a cell has {STATES - 1} groups, got {len(nodes)}")
    return tuple(nodes)


def format_cell(cell: Cell) -> str:
    """The text that `parse_cell` reads."""
    return "+".join("|" + "|".join(f"{op}~{j}" for op, j in node) + "|" for node in cell)


def network_from_string(text: str, **macro: Any) -> BenchNetwork:
    """The benchmark's network with the cell `text`, dense, dead operations included.

    Args:
        text: as for `parse_cell`.
        **macro: input_shape, classes, channels, cells, as for `BenchNetwork`.
    """
    cell = parse_cell(text)
    return BenchNetwork(lambda width: [[(j, OPERATIONS[op](width, width)) for op, j in node] for node in cell], **macro)


def architecture_from_string(space: Space, text: str, others: Mapping[str, Value] | None = None) -> Architecture:
    """The architecture of a nasbench201 space with the cell `text`.

    Args:
        space: from `nasbench201_space`.
        text: as for `parse_cell`.
        others: the remaining decisions by name ("sparsity.density": 0.1); default: each the first option, the density
            the largest.

    Raises:
        SpaceError: no such text, or the space does not offer what it says.
    """
    if space.name != "nasbench201":
        raise SpaceError(f'cell strings belong to the nasbench201 space, not to "{space.name}"')
    wanted: dict[str, Value] = {
        f"node{i}.from{j}": op for i, node in enumerate(parse_cell(text), start=1) for op, j in node
    }
    return draw_with_cells(space, wanted, others or {})


def string_from_architecture(architecture: Architecture) -> str:
    """The cell of a nasbench201 architecture as text (its sparsity is not part of it).

    Raises:
        SpaceError: an architecture of another space.
    """
    if architecture.space != "nasbench201":
        raise SpaceError(f'only nasbench201 architectures have cell strings, not those of "{architecture.space}"')
    return format_cell(_cell(architecture.as_dict()))


def _cell(decisions: Mapping[str, Value]) -> Cell:
    return tuple(tuple((str(decisions[f"node{i}.from{j}"]), j) for j in range(i)) for i in range(1, STATES))


def _canonical(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Any:
    rest = {name: value for name, value in decisions.items() if name.startswith("sparsity.")}
    cell = _cell(decisions)
    return [cell if options.get("dead_operations", False) else cell_digest(cell, (STATES - 1,), ("input",)), rest]


def _graph(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> nx.DiGraph:
    return cell_graph(_cell(decisions), (STATES - 1,), ("input",))


def _size(options: Mapping[str, Any]) -> int:
    operations = len(tuple(options.get("operations", NASBENCH201_PRIMITIVES)))
    edges = STATES * (STATES - 1) // 2
    return operations**edges * overall_size(options)
