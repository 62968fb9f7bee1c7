"""Equal computations get equal digests, different ones different digests; checked against exact graph isomorphism."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import networkx as nx
import pytest

from search_spaces.cell_graph import Cell, cell_digest, cell_graph, graph_digest

SKIP, NONE = "skip_connect", "none"


def same(one: dict, two: dict) -> bool:
    return one == two


def isomorphic(one: nx.DiGraph, two: nx.DiGraph) -> bool:
    return nx.is_isomorphic(one, two, node_match=same, edge_match=same)


def chain(*nodes: list[tuple[str, int]]) -> Cell:
    return tuple(tuple(node) for node in nodes)


def digest(*nodes: list[tuple[str, int]], output: tuple[int, ...] = (-1,)) -> str:
    """Of a cell with a single input, its last node the output."""
    output = tuple(len(nodes) if j == -1 else j for j in output)
    return cell_digest(chain(*nodes), output, ("input",))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(digest([("a", 0), ("b", 0)]), digest([("b", 0), ("a", 0)]), id="sums have no order"),
        pytest.param(digest([("a", 0)], [(SKIP, 1)]), digest([("a", 0)]), id="an identity is nothing"),
        pytest.param(digest([("a", 0), (NONE, 0)]), digest([("a", 0)]), id="none adds nothing"),
        pytest.param(digest([("a", 0)], [("b", 0)]), digest([("b", 0)]), id="an unused state does not count"),
        pytest.param(digest([(NONE, 0)], [("a", 1), ("b", 0)]), digest([("b", 0)]), id="of zeros nothing is made"),
        pytest.param(
            digest([(SKIP, 0), ("a", 0)], [(SKIP, 1), ("b", 0)]),
            digest([("b", 0), ("a", 0)], [(SKIP, 1), (SKIP, 0)]),
            id="sums of sums are one sum",
        ),
        pytest.param(
            digest([("a", 0)], [("b", 0)], [("c", 1), ("d", 2)]),
            digest([("b", 0)], [("a", 0)], [("c", 2), ("d", 1)]),
            id="nodes have no order",
        ),
        pytest.param(
            digest([("a", 0)], [("b", 0)], output=(1, 2)),
            digest([("b", 0)], [("a", 0)], output=(1, 2)),
            id="a concatenation has no order",
        ),
        pytest.param(digest([(NONE, 0)]), digest([(NONE, 0)], [("a", 1)]), id="zero is zero"),
    ],
)
def test_equal_computations_have_equal_digests(one: str, two: str) -> None:
    assert one == two


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(digest([("a", 0)]), digest([("b", 0)]), id="another operation"),
        pytest.param(digest([("a", 0)], [("b", 1)]), digest([("b", 0)], [("a", 1)]), id="another order of operations"),
        pytest.param(digest([(SKIP, 0)]), digest([(SKIP, 0), (SKIP, 0)]), id="x and x + x"),
        pytest.param(
            digest([("a", 0)], [(SKIP, 1), (SKIP, 1)]),
            digest([("a", 0), ("a", 0)]),
            id="one operation twice and two operations",
        ),
        pytest.param(
            digest([("a", 0)], [("b", 1), ("c", 1)]),
            digest([("a", 0)], [("a", 0)], [("b", 1), ("c", 2)]),
            id="a shared input and two of its kind",
        ),
        pytest.param(
            digest([("a", 0)], [("b", 1)], output=(1, 2)), digest([("a", 0)], [("b", 1)]), id="another concatenation"
        ),
        pytest.param(
            digest([("a", 0)], [(SKIP, 0), (SKIP, 1)], output=(1, 2)),
            digest([("a", 0)], [(SKIP, 0)], output=(1, 2)),
            id="concatenated sums",
        ),
        pytest.param(digest([(NONE, 0)]), digest([(SKIP, 0)]), id="zero and the input"),
    ],
)
def test_different_computations_have_different_digests(one: str, two: str) -> None:
    assert one != two


def test_an_identity_stays_where_it_changes_the_shape() -> None:
    cell = chain([(SKIP, 0), ("a", 1)], [(SKIP, 2), (SKIP, 0)])
    graph = cell_graph(cell, (2, 3), reshaped=frozenset({0, 1}))
    labels = sorted(label for _, label in graph.nodes(data="label"))
    assert labels == sorted(["previous", "current", SKIP, SKIP, "a", "sum", "sum", "concat of 2"])
    assert cell_digest(cell, (2, 3)) != cell_digest(cell, (2, 3), reshaped=frozenset({0, 1}))


def test_names_of_nodes_tell_where_operations_stood() -> None:
    graph = cell_graph(chain([("a", 0), (NONE, 1)], [("b", 2), (SKIP, 0)]), (3,), prefix="normal.")
    assert set(graph) == {
        "normal.input0",
        "normal.input1",
        "normal.node2.from0.0",
        "normal.node3.from2.0",
        "normal.output",
    }
    assert graph["normal.input0"]["normal.output"] == {"weight": 1}


def random_cell(rng: random.Random, ops: list[str], repeat: bool, size: int = 4) -> Cell:
    nodes = []
    for i in range(size):
        reads = [rng.randrange(2 + i), rng.randrange(2 + i)] if repeat else rng.sample(range(2 + i), 2)
        nodes.append([(rng.choice(ops), j) for j in reads])
    return chain(*nodes)


@pytest.mark.parametrize("reshaped", [frozenset(), frozenset({0}), frozenset({0, 1})], ids=str)
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("unread", [False, True])
def test_digests_are_equal_exactly_for_isomorphic_graphs(reshaped: frozenset[int], repeat: bool, unread: bool) -> None:
    rng = random.Random(0)
    classes: dict[str, list[nx.DiGraph]] = defaultdict(list)
    alike = 0
    for _ in range(500):
        cell = random_cell(rng, [SKIP, "a"], repeat, size=3)
        read = {j for node in cell for _, j in node}
        output = tuple(j for j in range(5) if j not in read) if unread else (2, 3, 4)
        graph = cell_graph(cell, output, reshaped=reshaped)
        members = classes[graph_digest(graph)]
        assert all(isomorphic(graph, other) for other in members[:1])
        alike += bool(members)
        members.append(graph)
    assert alike > 20
    by_size: dict[tuple, list[nx.DiGraph]] = defaultdict(list)
    for members in classes.values():
        one = members[0]
        by_size[
            tuple(sorted((d["label"], one.in_degree(n), one.out_degree(n)) for n, d in one.nodes(data=True)))
        ].append(one)
    for alikes in by_size.values():
        for one, two in itertools.combinations(alikes, 2):
            assert not isomorphic(one, two)


def test_renumbering_the_nodes_of_a_cell_keeps_its_digest() -> None:
    rng = random.Random(1)
    renumbered = 0
    for _ in range(300):
        cell = random_cell(rng, [SKIP, "a", "b"], repeat=False)
        order = rng.sample(range(4), 4)  # new place of each node
        place = {0: 0, 1: 1, **{2 + i: 2 + order[i] for i in range(4)}}
        if any(place[j] >= place[2 + i] for i, node in enumerate(cell) for _, j in node):
            continue  # a node would stand before one that it reads
        moved: list[list[tuple[str, int]]] = [[] for _ in range(4)]
        for i, node in enumerate(cell):
            moved[order[i]] = [(op, place[j]) for op, j in reversed(node)]
        assert cell_digest(chain(*moved), (2, 3, 4, 5)) == cell_digest(cell, (2, 3, 4, 5))
        renumbered += order != [0, 1, 2, 3]
    assert renumbered > 10
