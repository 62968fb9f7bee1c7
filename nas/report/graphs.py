"""Draws a small directed acyclic graph, such as a cell, in layers from left to right.

Layers are longest paths, the order within a layer follows the neighbours (barycentres), edges that span layers are routed
through them. For graphs of up to some hundred nodes. Start with `draw_graph`; `worth_drawing` says whether a graph shows more
than a list would.
"""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx

from nas.report.canvas import Canvas, Step
from nas.report.style import GRID, INK, MUTED, PAPER

_HEIGHT, _ROW, _COLUMN, _MARGIN = 26, 16, 44, 14
_FAMILIES = (  # what a label contains -> fill; text is dark on all of them
    (("conv", "linear", "sep_", "dil_"), "#a9cdee"),
    (("pool",), "#a8dcc6"),
    (("skip", "identity", "none"), GRID),
    (("add", "sum", "concat", "cat"), "#f3d9a4"),
)


def worth_drawing(graph: nx.DiGraph, most: int = 120) -> bool:
    """True if the graph branches, is acyclic, and is not too large to be read."""
    if not 1 < graph.number_of_nodes() <= most or not nx.is_directed_acyclic_graph(graph):
        return False
    return any(degree > 1 for _, degree in (*graph.in_degree(), *graph.out_degree()))


def draw_graph(graph: nx.DiGraph) -> Canvas:
    """A graph as a diagram; parts that are not connected stand one below the other.

    Args:
        graph: nodes with an attribute "label" (default their name), edges with "weight" (how often the value is used).

    Raises:
        ValueError: the graph has a cycle.
    """
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError(f"a drawing in layers needs a graph without cycles, got one: {nx.find_cycle(graph)}")
    canvas = Canvas(0.0, 0.0)
    for nodes in nx.weakly_connected_components(graph):
        _component(canvas, graph.subgraph(nodes))
    return canvas


def layers_of(graph: nx.DiGraph) -> list[list[Any]]:
    """Nodes by the length of the longest path that leads to them; ("edge", u, v, k) where an edge passes layer k.

    A node without predecessors stands just before its first successor. Within a layer the order keeps crossings few.
    """
    depth: dict[Any, int] = {}
    order = list(nx.lexicographical_topological_sort(graph, key=str))
    for node in order:
        depth[node] = max((depth[before] + 1 for before in graph.predecessors(node)), default=0)
    for node in order:
        if graph.in_degree(node) == 0 and graph.out_degree(node):
            depth[node] = min(depth[after] for after in graph.successors(node)) - 1
    layers: list[list[Any]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for node in order:
        layers[depth[node]].append(node)
    for u, v in graph.edges:
        for k in range(depth[u] + 1, depth[v]):
            layers[k].append(("edge", u, v, k))
    joined = _joined(graph, depth)
    for sweep in range(8):
        forward = sweep % 2 == 0
        span = range(1, len(layers)) if forward else range(len(layers) - 2, -1, -1)
        for k in span:
            near = {node: i for i, node in enumerate(layers[k - 1 if forward else k + 1])}
            middle = {node: _middle(joined[node], near, i) for i, node in enumerate(layers[k])}
            layers[k].sort(key=middle.__getitem__)
    return layers


def _joined(graph: nx.DiGraph, depth: dict[Any, int]) -> dict[Any, list[Any]]:
    """Neighbours in the layers before and behind, with edges cut into pieces of one layer."""
    joined: dict[Any, list[Any]] = {node: [] for node in graph}
    for u, v in graph.edges:
        chain = [u, *(("edge", u, v, k) for k in range(depth[u] + 1, depth[v])), v]
        for a, b in itertools.pairwise(chain):
            joined.setdefault(a, []).append(b)
            joined.setdefault(b, []).append(a)
    return joined


def _middle(neighbours: list[Any], near: dict[Any, int], default: int) -> float:
    places = [near[node] for node in neighbours if node in near]
    return sum(places) / len(places) if places else float(default)


def _component(canvas: Canvas, graph: nx.DiGraph) -> None:
    """Draw a connected graph below what is there; the canvas grows."""
    layers = layers_of(graph)
    labels = {node: str(graph.nodes[node].get("label", node)).replace("_", " ") for node in graph}
    widths = [max((_width(labels[n]) for n in layer if n in labels), default=8.0) for layer in layers]
    tall = [sum((_HEIGHT if n in labels else 4) + _ROW for n in layer) - _ROW for layer in layers]
    height = max(tall) + 2 * _MARGIN
    place: dict[Any, tuple[float, float]] = {}
    x = float(_MARGIN)
    for layer, width, taken in zip(layers, widths, tall, strict=True):
        y = canvas.height + (height - taken) / 2
        for node in layer:
            size = _HEIGHT if node in labels else 4
            place[node] = (x + width / 2, y + size / 2)
            y += size + _ROW
        x += width + _COLUMN
    left = {node: place[node][0] - _width(labels[node]) / 2 for node in labels}
    for u, v, data in graph.edges(data=True):
        via = sorted((n for n in place if isinstance(n, tuple) and n[:3] == ("edge", u, v)), key=lambda n: n[3])
        points = [(left[u] + _width(labels[u]), place[u][1]), *(place[n] for n in via), (left[v] - 5, place[v][1])]
        _edge(canvas, points, int(data.get("weight", 1) or 1))
    for node, text in labels.items():
        _node(canvas, left[node], place[node][1], text)
    canvas.width = max(canvas.width, x - _COLUMN + _MARGIN)
    canvas.height += height


def _edge(canvas: Canvas, points: list[tuple[float, float]], weight: int) -> None:
    steps: list[Step] = [("M", points[0])]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        bend = (x1 - x0) / 2
        steps.append(("C", (x0 + bend, y0, x1 - bend, y1, x1, y1)))
    canvas.line(*steps, width=1.1 + 0.6 * (weight - 1))
    x, y = points[-1]
    canvas.arrow_right(x + 5, y)
    if weight > 1:
        canvas.text(x - 4, y - 5, f"×{weight}", MUTED, 9.5, anchor="end")


def _node(canvas: Canvas, x: float, y: float, text: str) -> None:
    fill = next((colour for words, colour in _FAMILIES if any(word in text.replace(" ", "_") for word in words)), PAPER)
    ink = INK if fill in (GRID, PAPER) else "#10202f"
    stroke = MUTED if fill == PAPER else "none"
    canvas.box(x, y - _HEIGHT / 2, _width(text), _HEIGHT, fill, radius=6, stroke=stroke)
    canvas.text(x + _width(text) / 2, y + 4, text, ink, anchor="middle")


def _width(text: str) -> float:
    return max(34.0, 6.8 * len(text) + 18)
