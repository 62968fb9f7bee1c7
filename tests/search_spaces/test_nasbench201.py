"""NAS-Bench-201: exact published counts, strings both ways, and the number of different computations."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict

import networkx as nx
import pytest
import torch
from torch import nn

from ops.counting import count
from search_spaces import SpaceError, get_space
from search_spaces.cell_graph import Cell, cell_digest, cell_graph
from search_spaces.nasbench201 import (
    BenchCell,
    architecture_from_string,
    format_cell,
    live_nodes,
    network_from_string,
    parse_cell,
    string_from_architecture,
)

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
FIRST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"  # the benchmark's arch 1


def every(op: str) -> str:
    return f"|{op}~0|+|{op}~0|{op}~1|+|{op}~0|{op}~1|{op}~2|"


def all_cells(ops: tuple[str, ...] = OPS) -> list[Cell]:
    return [
        (((a, 0),), ((b, 0), (c, 1)), ((d, 0), (e, 1), (f, 2))) for a, b, c, d, e, f in itertools.product(ops, repeat=6)
    ]


CELLS = all_cells()


@pytest.mark.parametrize(
    ("text", "params", "conv_macs"),
    [
        (every("skip_connect"), 73_306, 7_782_400),
        (every("none"), 73_306, 7_782_400),
        (every("avg_pool_3x3"), 73_306, 7_782_400),
        (every("nor_conv_3x3"), 1_531_546, 220_119_040),
        (FIRST, 802_426, 113_950_720),
    ],
)
def test_networks_have_the_published_counts(text: str, params: int, conv_macs: int) -> None:
    space = get_space("nasbench201")
    with torch.device("meta"):
        networks = [network_from_string(text), space.meta(architecture_from_string(space, text))]
        hundred = network_from_string(text, classes=100)
    for network in networks:
        counts = count(network, (3, 32, 32))
        assert (counts.params, counts.conv_macs, counts.dense_macs) == (params, conv_macs, conv_macs + 640)
    assert sum(p.numel() for p in hundred.parameters()) == params + 5850


def test_each_operation_adds_its_weights_at_three_widths() -> None:
    rng = random.Random(0)
    for cell in rng.sample(CELLS, 10):
        names = [op for node in cell for op, _ in node]
        per_cell = [
            names.count("nor_conv_3x3") * (9 * c * c + 2 * c) + names.count("nor_conv_1x1") * (c * c + 2 * c)
            for c in (16, 32, 64)
        ]
        with torch.device("meta"):
            network = network_from_string(format_cell(cell), cells=2)
        assert sum(p.numel() for p in network.parameters()) == 73_306 + 2 * sum(per_cell)


def test_all_strings_round_trip() -> None:
    for cell in CELLS:
        assert parse_cell(format_cell(cell)) == cell
    space = get_space("nasbench201")
    for seed in range(50):
        sampled = space.sample(seed)
        others = {n: v for n, v in sampled.decisions if n.startswith("sparsity.")}
        assert architecture_from_string(space, string_from_architecture(sampled), others) == sampled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            FIRST.replace("avg_pool_3x3~1", "avg_pool_3~1"),
            "character 34: 'avg_pool_3~1' is no op~state, did you mean \"avg_pool_3x3\"",
        ),
        (
            FIRST.replace("avg_pool_3x3~1", "avg_pool_3x3~0"),
            "character 34: operation number 1 of state 2 reads state 1",
        ),
        (FIRST.replace("|nor_conv_3x3~1", ""), "operation number 1 of state 3 reads state 1, got 'skip_connect~2'"),
        (FIRST.replace("|skip_connect~2", ""), "character 50: state 3 has 3 operations, got 2"),
        (FIRST.rpartition("+")[0], "a cell has 3 groups, got 2"),
        (FIRST[1:], "character 1: .* is not enclosed"),
        ("", "character 1"),
    ],
)
def test_what_is_no_cell_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        parse_cell(text)


# -- equal computations -------------------------------------------------------------------------------------------------


def text_form(cell: Cell, mark_zeros: bool) -> str:
    """The published text form: a sum of sorted terms; identities are replaced by what they read, optionally zeros marked."""
    forms = ["0"]
    for node in cell:
        terms = []
        for op, j in node:
            if mark_zeros and (op == "none" or forms[j] == "#"):
                terms.append("#")
            else:
                terms.append(forms[j] if op == "skip_connect" else f"({forms[j]})@{op}")
        forms.append("+".join(sorted(terms)))
    return forms[-1]


def test_the_published_numbers_of_different_cells_come_out_of_the_published_text_forms() -> None:
    assert len({text_form(cell, mark_zeros=False) for cell in CELLS}) == 12_751
    assert len({text_form(cell, mark_zeros=True) for cell in CELLS}) == 6_466


def test_digests_tell_5425_computations_apart_and_no_two_of_them_are_isomorphic() -> None:
    classes = {cell_digest(cell, (3,), ("input",)): cell for cell in CELLS}
    assert len(classes) == 5_425
    similar: dict[tuple, list[nx.DiGraph]] = defaultdict(list)
    for cell in classes.values():
        graph = cell_graph(cell, (3,), ("input",))
        signature = sorted(
            (
                label,
                sorted((graph.nodes[j]["label"], w) for j, _, w in graph.in_edges(n, data="weight")),
                graph.out_degree(n),
            )
            for n, label in graph.nodes(data="label")
        )
        similar[str(signature)].append(graph)
    compared = 0
    for graphs in similar.values():
        for one, two in itertools.combinations(graphs, 2):
            compared += 1
            assert not nx.is_isomorphic(one, two, node_match=dict.__eq__, edge_match=dict.__eq__)
    assert compared > 100


def test_cells_of_equal_digest_have_isomorphic_graphs() -> None:
    members = defaultdict(list)
    for cell in CELLS:
        members[cell_digest(cell, (3,), ("input",))].append(cell)
    for cells in random.Random(0).sample([c for c in members.values() if len(c) > 1], 200):
        one, two = (cell_graph(c, (3,), ("input",)) for c in (cells[0], cells[-1]))
        assert nx.is_isomorphic(one, two, node_match=dict.__eq__, edge_match=dict.__eq__)


def test_cells_without_weights_compute_the_same_where_their_digests_are_equal() -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    outputs: dict[str, torch.Tensor] = {}
    for cell in all_cells(("none", "skip_connect", "avg_pool_3x3")):
        network = network_from_string(format_cell(cell), channels=2, cells=1)
        y = network.body[0](x)
        torch.testing.assert_close(y, outputs.setdefault(cell_digest(cell, (3,), ("input",)), y))
    assert 50 < len(outputs) < 729


def test_leaving_dead_operations_out_keeps_the_output() -> None:
    rng = random.Random(0)
    smaller = 0
    for cell in rng.sample(CELLS, 100):
        if any(op.startswith("nor_conv") and _reads_zeros(cell, j) for node in cell for op, j in node):
            continue  # a batch norm of zeros may be any constant: then the benchmark's network is another one
        full = network_from_string(format_cell(cell), channels=2, cells=1, input_shape=(2, 6, 6)).body[0].eval()
        nodes = [
            [(j, op) for j, op in zip(reads, ops, strict=True)]
            for reads, ops in zip(full.nodes.inputs, full.nodes.ops, strict=True)
        ]
        live = BenchCell(live_nodes(nodes)).eval()
        x = torch.randn(1, 2, 6, 6)
        torch.testing.assert_close(live(x), full(x))
        count_ops = [sum(len(ops) for ops in c.nodes.ops) for c in (live, full)]
        smaller += count_ops[0] < count_ops[1]
    assert smaller > 10


def _reads_zeros(cell: Cell, state: int) -> bool:
    return state > 0 and all(op == "none" or _reads_zeros(cell, j) for op, j in cell[state - 1])


def test_equal_digests_mean_equal_costs_and_every_weight_is_used() -> None:
    space = get_space(
        "nasbench201", channels=4, cells=1, input_shape=(3, 8, 8), densities=[0.5], patterns=["unstructured"]
    )
    literal = get_space("nasbench201", channels=4, cells=1, dead_operations=True)
    groups = defaultdict(list)
    for cell in random.Random(1).sample(CELLS, 1500):
        groups[cell_digest(cell, (3,), ("input",))].append(format_cell(cell))
    several = [texts for texts in groups.values() if len(texts) > 1][:15]
    differing = 0
    for texts in several:
        architectures = [architecture_from_string(space, text) for text in (texts[0], texts[-1])]
        assert architectures[0] != architectures[1]
        assert architectures[0].digest == architectures[1].digest
        one, two = (count(space.meta(a), (3, 8, 8)) for a in architectures)
        assert (one.params, one.nnz, one.macs, one.density) == (two.params, two.nnz, two.macs, two.density)
        raw = [architecture_from_string(literal, text) for text in (texts[0], texts[-1])]
        assert raw[0].digest != raw[1].digest
        differing += len({sum(p.numel() for p in literal.meta(a).parameters()) for a in raw}) > 1
    assert len(several) == 15
    assert differing


def test_a_dead_convolution_is_built_only_on_request() -> None:
    dead = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
    space, literal = get_space("nasbench201"), get_space("nasbench201", dead_operations=True)
    counts = [sum(p.numel() for p in s.meta(architecture_from_string(s, dead)).parameters()) for s in (space, literal)]
    assert counts[0] == 73_306
    with torch.device("meta"):
        assert counts[1] == sum(p.numel() for p in network_from_string(dead).parameters()) > 73_306


# -- the space ----------------------------------------------------------------------------------------------------------


def test_closed_form_size_equals_enumeration_on_small_options() -> None:
    small = get_space("nasbench201", operations=["none", "nor_conv_1x1"], densities=[1.0, 0.5, 0.1])
    sparsity = 1 + (2 + 2 + 1) + (2 + 2)  # dense; at 0.5 two free patterns under two rules and 2:4; at 0.1 no 2:4
    assert small.size() == sum(1 for _ in small.enumerate()) == 2**6 * sparsity
    assert get_space("nasbench201", densities=[1.0]).size() == 15_625


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 7), (1, 14, 9), (2, 1, 1)])
def test_networks_run_and_trace_on_any_image_size(shape: tuple) -> None:
    for text in (FIRST, every("none"), every("avg_pool_3x3")):
        network = network_from_string(text, channels=4, cells=1, input_shape=shape, classes=3).eval()
        x = torch.randn(2, *shape)
        assert network(x).shape == (2, 3)
        torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


def test_the_network_ends_in_norm_and_relu_and_its_shortcut_has_no_norm() -> None:
    network = network_from_string(FIRST, cells=1)
    assert [type(m) for m in network.head][:2] == [nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in network.body[1].shortcut] == [nn.AvgPool2d, nn.Conv2d]


def test_a_thousand_samples_a_second_are_drawn() -> None:
    space = get_space("nasbench201")
    cell_digest.cache_clear()
    start = time.process_time()
    for seed in range(500):
        space.sample(seed)
    assert time.process_time() - start < 0.5


def test_strings_belong_to_this_space() -> None:
    other = get_space("mlp", input_shape=(8,), classes=2)
    with pytest.raises(SpaceError, match='not to "mlp"'):
        architecture_from_string(other, FIRST)
    with pytest.raises(SpaceError, match='not those of "mlp"'):
        string_from_architecture(other.sample(0))
    two = get_space("nasbench201", operations=["none", "nor_conv_1x1"])
    with pytest.raises(SpaceError, match=r"node1.from0: expected one of .* got 'nor_conv_3x3'"):
        architecture_from_string(two, FIRST)
