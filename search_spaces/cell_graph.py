"""Cells as graphs of their computation, so that equal computations are seen to be equal.

Start with `cell_graph` (a networkx.DiGraph) and `cell_digest` (a text that is equal for cells that compute the same).
What is equal:

- "none" is removed, and so is everything that reads nothing but zeros or that the output does not depend on. (Taken
  literally, a batch norm makes a learned constant of zeros; as in the published equivalences, such an operation does
  not exist, and networks are built without it.)
- An identity is no operation: who reads it reads what it reads. Where shapes differ an identity has weights, and stays.
- A sum is a multiset: order does not matter, sums of sums are one sum, and x + x is x twice (edge attribute "weight").
- Operations have no order either: cells whose graphs are isomorphic are equal. The concatenation at the end counts as
  unordered: other orders give the same network with the next weights permuted.
- A value that two operations read is one node, however often it is read: f(x) + f(x) with one convolution f is not f(x)
  + g(x). Two operations of the same kind on the same input stay two, with or without weights.

For NAS-Bench-201 this makes 5,425 classes of 15,625 cells. The published counts are of text forms: 12,751 when only
identities are removed, and 6,466 when zeros are marked as well. They split equal computations (a sum of a sum is
written in brackets, a term of zeros is kept) and also merge different ones (text cannot say whether an operation that
occurs twice is one node or two).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import networkx as nx

Cell = tuple[tuple[tuple[str, int], ...], ...]
"""For each node, the (operation, state read) pairs that it sums. States are the inputs, then the nodes."""

IDENTITY = "skip_connect"
NONE = "none"


def cell_graph(
    cell: Cell,
    output: Sequence[int],
    inputs: Sequence[str] = ("previous", "current"),
    reshaped: frozenset[int] = frozenset(),
    prefix: str = "",
) -> nx.DiGraph:
    """The computation of one cell.

    Args:
        cell: what each node sums.
        output: states that are concatenated; a single one is the output itself.
        inputs: labels of the input states.
        reshaped: input states that have another shape than the nodes, so that an identity of them is an operation with
            weights (both inputs of a reduction cell, for one).
        prefix: put before the names of all nodes.

    Returns:
        Nodes carry "label": an input's label, an operation, "align" (an input brought to the shape of the others for
        concatenation), "sum" (of several values, for concatenation), or "output" / "concat of n". Edges carry "weight",
        how often the value is used. Names of nodes tell where they stood: "node3.from1.0" is the first operation of
        node 3 (state 3) on state 1.
    """
    graph: nx.DiGraph = nx.DiGraph()
    values: list[Counter[str]] = []
    for j, label in enumerate(inputs):
        graph.add_node(f"{prefix}input{j}", label=label)
        values.append(Counter([f"{prefix}input{j}"]))

    def add(name: str, label: str, terms: Counter[str]) -> str:
        graph.add_node(prefix + name, label=label)
        for source, times in terms.items():
            graph.add_edge(source, prefix + name, weight=times)
        return prefix + name

    for number, node in enumerate(cell, start=len(inputs)):
        total: Counter[str] = Counter()
        for place, (op, j) in enumerate(node):
            if op == NONE or not values[j]:
                continue
            if op == IDENTITY and j not in reshaped:
                total.update(values[j])
            else:
                total[add(f"node{number}.from{j}.{place}", op, values[j])] += 1
        values.append(total)

    if len(output) == 1 and output[0] not in reshaped:
        end = add("output", "output", values[output[0]])
    else:
        parts: Counter[str] = Counter()
        sums: dict[frozenset[tuple[str, int]], str] = {}
        for j in output:
            if j in reshaped:
                parts[add(f"align{j}", "align", values[j])] += 1
            elif values[j].total() == 1:
                parts.update(values[j])
            elif values[j]:
                key = frozenset(values[j].items())
                if key not in sums:
                    sums[key] = add(f"sum{j}", "sum", values[j])
                parts[sums[key]] += 1
        end = add("output", f"concat of {len(output)}", parts)
    alive = nx.ancestors(graph, end) | {end} | {f"{prefix}input{j}" for j in range(len(inputs))}
    graph.remove_nodes_from([node for node in graph if node not in alive])
    return graph


def graph_digest(graph: nx.DiGraph) -> str:
    """32 hex digits that are equal for isomorphic graphs (labels, weights and directions included).

    Weisfeiler-Lehman hashing of the undirected graph, after each label has got the node's depth (the longest path from
    an input), which gives every edge its direction back. Rounds are as many as the graph is deep, at least three.
    """
    depth: dict[str, int] = {}
    plain: nx.Graph = nx.Graph()
    for node in nx.topological_sort(graph):
        depth[node] = max((depth[source] + 1 for source in graph.predecessors(node)), default=0)
        plain.add_node(node, label=f"{depth[node]} {graph.nodes[node]['label']}")
    for source, target, edge in graph.edges(data=True):
        plain.add_edge(source, target, weight=f" {edge['weight']}*")
    rounds = max(3, *depth.values())
    digest: str = nx.weisfeiler_lehman_graph_hash(plain, edge_attr="weight", node_attr="label", iterations=rounds)
    return digest


@lru_cache(maxsize=200_000)
def cell_digest(
    cell: Cell,
    output: tuple[int, ...],
    inputs: tuple[str, ...] = ("previous", "current"),
    reshaped: frozenset[int] = frozenset(),
) -> str:
    """`graph_digest` of `cell_graph`, remembered."""
    return graph_digest(cell_graph(cell, output, inputs, reshaped))
