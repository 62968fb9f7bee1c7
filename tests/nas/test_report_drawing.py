"""Drawings of networks: every operation is there once, repeats are found, texts are safe, graphs keep their layers."""

from __future__ import annotations

import io
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import networkx as nx
import pandas as pd
import pytest
from rich.console import Console

from nas.report.canvas import Canvas
from nas.report.drawing import MAX_ROWS, draw_network
from nas.report.graphs import draw_graph, layers_of, worth_drawing
from nas.report.plans import Operation, parse_shape, read_plan, shares
from nas.report.repeats import rows_of
from nas.report.tree import network_tree
from tests.nas.synthetic_run import cell_graph, mlp_plan, plan_row, residual_plan, synthetic_run

MLP = read_plan(mlp_plan(next(t for t in synthetic_run(9).trials if t.architecture["depth"] == 3).architecture))
RESNET = read_plan(residual_plan(3, 9))


def texts(svg: str) -> list[str]:
    root = ET.fromstring(svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def show_tree(operations: list[Operation], width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(network_tree(operations, "trial 1"))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("operations", [MLP, RESNET, RESNET[:30], []])
def test_every_operation_is_in_exactly_one_row_in_order(operations):
    members = [k for row in rows_of(operations) for k in row.members]
    assert sorted(members) == list(range(len(operations)))
    firsts = [row.members[0] for row in rows_of(operations)]
    assert firsts == sorted(firsts)


def test_repeated_blocks_are_found_and_begin_with_a_module():
    rows = rows_of(RESNET)
    assert len(RESNET) == 84
    # stem, 3 of the stage that is the same all through, 3 + 3 of each other stage, pool, head
    assert len(rows) == 1 + 3 + 6 + 6 + 2
    assert [row.times for row in rows] == [1, 9, 9, 9, 1, 1, 1, 8, 8, 8, 1, 1, 1, 8, 8, 8, 1, 1]
    names = [RESNET[row.members[0]].name for row in rows if row.times > 1]
    assert [name for name in names if name.endswith("conv1")] == [names[0], names[3], names[6]]


def test_small_networks_are_drawn_in_full():
    assert all(row.times == 1 for row in rows_of(RESNET[:23]))
    assert len(rows_of(MLP)) == len(MLP) == 4


def test_layers_that_differ_only_in_density_are_one_row_with_its_range():
    operations = [replace(op, density=0.05 + 0.001 * i) if op.is_sparse else op for i, op in enumerate(RESNET)]
    assert len(rows_of(operations)) == len(rows_of(RESNET))
    assert any(re.search(r"density 0\.0\d+ to 0\.1\d+", text) for text in texts(draw_network(operations).svg("x")))


def test_a_pattern_or_kernel_that_differs_is_not_collapsed():
    operations = [replace(op, pattern="2:4") if "block4" in op.name and op.is_sparse else op for op in RESNET]
    assert len(rows_of(operations)) > len(rows_of(RESNET))


@pytest.mark.parametrize("operations", [MLP, RESNET, RESNET[:12], RESNET[:1], []])
def test_drawings_are_well_formed_and_inside_their_frame(operations):
    canvas = draw_network(operations)
    root = ET.fromstring(canvas.svg("x", for_page=True))
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x")) >= 0
        assert float(box.get("x")) + float(box.get("width")) <= canvas.width
        assert float(box.get("y")) + float(box.get("height")) <= canvas.height


def test_the_drawing_says_what_each_layer_is():
    said = texts(draw_network(MLP).svg("x"))
    for op in MLP:
        assert any(text.startswith(op.what) for text in said)
        assert f"{op.nnz:,}" in said


def test_shares_in_the_drawing_add_up_to_the_whole():
    for operations in (MLP, RESNET):
        said = [float(t.rstrip("%")) for t in texts(draw_network(operations).svg("x")) if re.fullmatch(r"[\d.]+%", t)]
        assert sum(said) == pytest.approx(100, abs=0.06 * len(said))


def test_no_text_of_a_box_is_wider_than_the_box():
    long = [replace(op, name="a.very.long.name" * 8, kind="x" * 200) for op in RESNET[:6]]
    for text in texts(draw_network(long).svg("x")):
        assert len(text) < 70


def test_skip_connections_are_lines_around_the_rows():
    with_inputs = draw_network(RESNET).svg("x").count("Q")
    without = draw_network([replace(op, inputs=()) for op in RESNET]).svg("x").count("Q")
    assert without == 0
    assert with_inputs == 2 * 5  # one line of two bends into each add that is drawn


def test_names_from_elsewhere_cannot_break_out_of_the_drawing():
    evil = [replace(RESNET[0], name="</svg><script>alert(1)</script>", kind='"><b>', weight=(), density=None)]
    svg = draw_network(evil).svg('"><script>')
    assert "<script>" not in svg
    ET.fromstring(svg)


def test_thousands_of_different_operations_are_cut_in_the_middle():
    many = [replace(RESNET[0], name=f"l{i}", weight=(i + 1, 3, 3, 3)) for i in range(3000)]
    started = time.perf_counter()
    said = texts(draw_network(many).svg("x"))
    assert time.perf_counter() - started < 5
    assert f"{3000 - MAX_ROWS} rows in the middle are not drawn" in said


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_a_drawing_is_saved_as_the_suffix_says(kind, tmp_path):
    for canvas in (draw_network(MLP), draw_graph(cell_graph())):
        one = canvas.save(tmp_path / f"a.{kind}", "x").read_bytes()
        assert one == canvas.save(tmp_path / f"b.{kind}", "x").read_bytes()
        assert len(one) > 1000


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'ending in \.svg, \.png or \.pdf, got "\.jpg"'):
        draw_network(MLP).save(tmp_path / "a.jpg", "x")
    assert not list(tmp_path.iterdir())


def test_for_a_page_neutral_colours_follow_the_theme():
    canvas = Canvas(10, 10)
    canvas.text(0, 0, "x")
    assert "var(--ink)" in canvas.svg("x", for_page=True)
    assert "var(" not in canvas.svg("x")


# -- reading plans -------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_with_everything_it_says():
    row = plan_row("a.conv", "conv2d", (64, 32, 3, 3), (1, 64, 8, 8), 0.1, "4x1", post="relu", stride=2, inputs="0")
    (op,) = read_plan(pd.DataFrame([row]))
    assert op.what == "conv 3x3 32→64 /2"
    assert op.how == "density 0.1 4x1 · portable"
    assert (op.output, op.after, op.inputs, op.weights) == ((64, 8, 8), ("relu",), (0,), 64 * 32 * 9)


def test_a_plan_survives_its_csv_file(tmp_path):
    frame = residual_plan(2, 2)
    frame.to_csv(tmp_path / "plan.csv", index=False)
    assert read_plan(pd.read_csv(tmp_path / "plan.csv")) == read_plan(frame)


def test_a_plan_of_times_only_is_enough():
    frame = residual_plan(1, 1)[["op", "kind", "kernel", "density", "nnz", "macs", "ms"]]
    operations = read_plan(frame)
    assert [op.what for op in operations] == ["conv2d", "conv2d", "conv2d", "add", "mean", "linear"]
    assert [op.density is None for op in operations] == [False, False, False, True, True, False]
    draw_network(operations)
    show_tree(operations)


def test_a_depthwise_layer_is_called_so():
    row = plan_row("d", "depthwise_conv2d", (32, 1, 5, 5), (1, 32, 8, 8)) | {"groups": 32}
    assert read_plan(pd.DataFrame([row]))[0].what == "depthwise 5x5 32→32"


def test_a_table_that_is_no_plan_is_refused():
    with pytest.raises(ValueError, match=r"needs the columns op and kind, \['kind'\] missing"):
        read_plan(pd.DataFrame({"op": ["a"]}))


def test_shares_without_any_cost_are_zero():
    assert shares([Operation("a", "add"), Operation("b", "relu")]) == [0.0, 0.0]
    assert shares([]) == []


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1x64x8x8", (1, 64, 8, 8)),
        ("(1, 64)", (1, 64)),
        ([3, 4], (3, 4)),
        ("", ()),
        (None, ()),
        (float("nan"), ()),
        (7.0, (7,)),
    ],
)
def test_shapes_are_read_from_what_a_csv_makes_of_them(text, shape):
    assert parse_shape(text) == shape


# -- the tree ------------------------------------------------------------------------------------------------------------


def test_the_tree_shows_repeated_branches_once():
    text = show_tree(RESNET)
    assert "block0 … block8  9×" in text
    assert text.count("conv1") == 5
    assert len(text.splitlines()) < 30


def test_the_tree_of_a_flat_network_is_a_list():
    lines = show_tree(MLP).splitlines()
    assert len(lines) == 1 + len(MLP)
    assert MLP[0].what in lines[1]


def test_markup_in_a_name_is_shown_in_the_tree_as_it_is():
    assert "[red]x[bold]" in show_tree([replace(MLP[0], name="[red]x[bold]")])


def test_an_operation_named_like_a_module_is_no_endless_branch():
    text = show_tree(
        [
            replace(MLP[0], name="a"),
            replace(MLP[1], name="a.b"),
            replace(MLP[2], name="a.b.c"),
            replace(MLP[2], name=""),
        ]
    )
    assert len(text.splitlines()) >= 4


# -- graphs --------------------------------------------------------------------------------------------------------------


def real(layer):
    return [node for node in layer if not (isinstance(node, tuple) and node[0] == "edge")]


def test_edges_of_a_layered_graph_go_from_left_to_right():
    graph = cell_graph()
    layers = layers_of(graph)
    at = {node: i for i, layer in enumerate(layers) for node in real(layer)}
    assert sorted(map(str, at)) == sorted(map(str, graph))
    assert all(at[u] < at[v] for u, v in graph.edges)


def test_edges_that_span_layers_pass_through_each():
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")])
    assert [len(layer) for layer in layers_of(graph)] == [1, 2, 2, 1]


def test_nodes_of_a_graph_do_not_overlap():
    root = ET.fromstring(draw_graph(cell_graph()).svg("x"))
    boxes = [
        [float(r.get(k)) for k in ("x", "y", "width", "height")]
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
        if r.get("x")
    ]
    assert len(boxes) == cell_graph().number_of_nodes()
    for i, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[i + 1 :]:
            assert x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y


def test_a_cycle_is_refused():
    with pytest.raises(ValueError, match="without cycles"):
        draw_graph(nx.DiGraph([("a", "b"), ("b", "a")]))


def test_a_weight_above_one_is_written_at_its_edge():
    graph = nx.DiGraph()
    graph.add_edge("a", "b", weight=2)
    assert "×2" in texts(draw_graph(graph).svg("x"))


def test_only_small_graphs_that_branch_are_worth_drawing():
    assert worth_drawing(cell_graph())
    assert not worth_drawing(nx.path_graph(5, create_using=nx.DiGraph))
    assert not worth_drawing(nx.DiGraph())
    assert not worth_drawing(nx.DiGraph([("a", "b"), ("b", "a"), ("a", "c")]))
    assert not worth_drawing(nx.DiGraph([("a", i) for i in range(500)]))


def test_graphs_in_pieces_and_without_edges_can_be_drawn():
    graph = nx.DiGraph([("a", "b")])
    graph.add_node("alone", label="x_y")
    assert "x y" in texts(draw_graph(graph).svg("x"))
