"""NAS-Bench-201 networks as operations: numbering, strings, dead code and costs."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from hw_models.lowered_cells import EDGES, OPS, arch_index, arch_string, cell_operations, live_edges, parse_cell

# As published with the benchmark: what its own script expects of three numbers.
PUBLISHED = {
    0: "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
    9: "|avg_pool_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|nor_conv_3x3~2|",
    123: "|avg_pool_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|none~0|avg_pool_3x3~1|nor_conv_3x3~2|",
}


@pytest.mark.parametrize("number", PUBLISHED)
def test_numbers_are_those_of_the_published_files(number: int) -> None:
    assert arch_string(number) == PUBLISHED[number]


def test_strings_and_numbers_are_inverse_and_all_different() -> None:
    strings = [arch_string(i) for i in range(15625)]
    assert len(set(strings)) == 15625
    assert all(arch_index(strings[i]) == i for i in range(0, 15625, 97))


def test_a_cell_may_be_a_number_a_string_names_or_positions() -> None:
    cell = parse_cell(77)
    assert cell == parse_cell(arch_string(77)) == parse_cell([OPS[i] for i in cell]) == parse_cell(list(np.array(cell)))


@pytest.mark.parametrize(
    "bad", [-1, 15625, "|none~0|", "|a~0|+|none~0|none~1|+|none~0|none~1|none~2|", [0] * 5, [5] * 6]
)
def test_what_is_no_cell_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match=r"cell|space has networks"):
        parse_cell(bad)  # type: ignore[arg-type]


def slow_live(cell: tuple[int, ...]) -> list[bool]:
    """By reachability in a graph of the edges that pass something on."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(4))
    graph.add_edges_from(edge for edge, op in zip(EDGES, cell) if op)
    return [bool(op) and nx.has_path(graph, 0, a) and nx.has_path(graph, b, 3) for (a, b), op in zip(EDGES, cell)]


def test_live_edges_equal_reachability_in_the_graph() -> None:
    numbers = list(range(0, 15625, 23))
    cells = np.array([parse_cell(i) for i in numbers])
    assert live_edges(cells).tolist() == [slow_live(tuple(cell)) for cell in cells]


def test_costs_are_those_of_the_benchmark() -> None:
    """On CIFAR-10 the benchmark gives 220.12 M and 1.5315 M parameters for 3x3 convolutions only, 7.78 M and 0.0733 M for none."""
    frame = cell_operations([(3,) * 6, (0,) * 6])
    total = frame.assign(macs=frame["macs"] * frame["count"], params=frame["params"] * frame["count"]).groupby(
        "network"
    )
    assert total["params"].sum()[0] - total["params"].sum()[1] == 5 * 6 * sum(9 * c * c + 2 * c for c in (16, 32, 64))
    assert total["macs"].sum()[0] - total["macs"].sum()[1] == 5 * 6 * 9 * sum(
        c * c * s * s for c, s in ((16, 32), (32, 16), (64, 8))
    )
    assert total["params"].sum().tolist() == pytest.approx([1.5315e6, 0.0733e6], rel=0.01)
    assert total["macs"].sum().tolist() == pytest.approx([220.12e6, 7.78e6], rel=0.01)


def test_every_network_has_the_same_rows_and_a_graph_without_cycles() -> None:
    frame = cell_operations([0, 1, 5000])
    assert set(frame["network"]) == {0, 1, 5000}
    assert frame.groupby("network").size().nunique() == 1
    assert (frame["src"] < frame["dst"]).all()
    assert set(frame.loc[~frame["live"], "kind"]) <= set(OPS)
