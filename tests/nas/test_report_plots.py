"""Pictures: what is drawn is what the frame says, nothing overlaps, and odd runs still give a picture."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation

from nas.errors import ConfigError
from nas.frames import front_rows, numbers, trials_frame
from nas.objectives import parse_constraints
from nas.report.labels import place_labels
from nas.report.plans import read_plan
from nas.report.plots import (
    MAX_BARS,
    cost_figure,
    curves_figure,
    default_axes,
    density_figure,
    front_figure,
    history_figure,
    save_front,
)
from nas.report.style import density_colour, new_figure, rc, save_figure, searcher_style, svg_text
from nas.report.units import spread
from tests.nas.synthetic_run import OBJECTIVES, make_trial, residual_plan, synthetic_run

RUN = synthetic_run(40, failed=0.1, infeasible=0.15)
ARCHITECTURE = RUN.trials[0].architecture


def staircase(figure):
    """The corners of the front's line."""
    lines = [line for line in figure.axes[0].lines if line.get_linewidth() == 1.3 and len(line.get_xdata()) > 2]
    assert len(lines) == 1
    return np.column_stack([lines[0].get_xdata(), lines[0].get_ydata()])


def labels(figure):
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation) and text.get_text().isdigit()]


@pytest.mark.parametrize(
    ("x", "y", "x_direction", "y_direction"),
    [("a", "b", "min", "max"), ("a", "b", "max", "max"), ("a", "b", "min", "min"), ("a", "b", "max", "min")],
)
def test_the_staircase_is_the_border_of_what_is_attained(x, y, x_direction, y_direction):
    rng = random.Random(1)
    points = [(rng.uniform(1, 5), rng.uniform(1, 5)) for _ in range(40)]
    trials = [make_trial(i, "random", i, "complete", ARCHITECTURE, a=p[0], b=p[1]) for i, p in enumerate(points)]
    figure = front_figure(trials_frame(trials), {x: x_direction, y: y_direction}, x, y)
    corners = staircase(figure)
    for at in np.linspace(1.2, 4.8, 37):
        attained = [b for a, b in points if (a <= at if x_direction == "min" else a >= at)]
        if not attained:
            continue
        best = max(attained) if y_direction == "max" else min(attained)
        xs, ys = corners[:, 0], corners[:, 1]
        on = [
            ys[i]
            for i in range(len(xs) - 1)
            if ys[i] == ys[i + 1] and min(xs[i], xs[i + 1]) <= at <= max(xs[i], xs[i + 1])
        ]
        assert any(value == pytest.approx(best) for value in on), (at, best, on)


def test_the_members_of_the_front_are_labelled_with_their_trial_numbers():
    frame = RUN.frame()
    texts = {label.get_text() for label in labels(front_figure(frame, OBJECTIVES))}
    front = {str(trial) for trial in front_rows(frame, OBJECTIVES)["trial"]}
    assert texts <= front
    assert len(texts) >= 0.7 * len(front)


@pytest.mark.parametrize("n", [40, 600])
def test_labels_cover_neither_each_other_nor_a_member_of_the_front(n):
    frame = synthetic_run(n).frame()
    figure = front_figure(frame, OBJECTIVES)
    with rc():
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels(figure)]
        front = front_rows(frame, OBJECTIVES)
        pixels = figure.axes[0].transData.transform(
            np.column_stack([numbers(front, "latency_ms"), numbers(front, "val_accuracy")])
        )
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*pixel) for pixel in pixels)
        assert figure.axes[0].bbox.padded(2).contains(box.x0, box.y0)


def test_a_label_without_a_free_place_is_left_out():
    with rc():
        figure = new_figure(2, 2)
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        points = np.full((30, 2), 0.5) + np.random.default_rng(0).normal(0, 0.01, (30, 2))
        placed = place_labels(axes, points, ["12345"] * 30, list(range(30)))
    assert 0 < len(placed) < 30


def test_a_wide_cost_axis_is_logarithmic_and_a_narrow_one_is_not():
    def figure(*latencies):
        trials = [
            make_trial(i, "random", i, "complete", ARCHITECTURE, val_accuracy=0.5 + 0.01 * i, latency_ms=t)
            for i, t in enumerate(latencies)
        ]
        return front_figure(trials_frame(trials), OBJECTIVES)

    assert figure(1.0, 5.0, 9.9).axes[0].get_xscale() == "linear"
    assert figure(1.0, 5.0, 10.1).axes[0].get_xscale() == "log"
    assert figure(0.0, 5.0, 50.0).axes[0].get_xscale() == "linear"  # no logarithm of zero


def test_every_feasible_trial_is_a_point_and_every_infeasible_one_a_cross():
    frame = RUN.frame()
    figure = front_figure(frame, OBJECTIVES)
    offsets = [len(c.get_offsets()) for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    front = len(front_rows(frame, OBJECTIVES))
    states = frame["state"].value_counts()
    assert sum(offsets) >= states["complete"] + front + states["infeasible"]


def test_the_latency_interval_is_drawn_where_it_is():
    trials = [
        make_trial(
            0,
            "random",
            0,
            "complete",
            ARCHITECTURE,
            val_accuracy=0.9,
            latency_ms=2.0,
            latency_lo_ms=1.5,
            latency_hi_ms=3.0,
        )
    ]
    figure = front_figure(trials_frame(trials), OBJECTIVES)
    spans = [
        tuple(segment[:, 0])
        for c in figure.axes[0].collections
        if hasattr(c, "get_segments")
        for segment in c.get_segments()
    ]
    assert (1.5, 3.0) in [tuple(map(float, span)) for span in spans]


def test_a_constraint_inside_the_picture_is_a_line():
    latency = numbers(RUN.frame(), "latency_ms")
    middle = float(np.nanmedian(latency))
    for bound, expected in ((middle, True), (1e6, False)):
        figure = front_figure(RUN.frame(), OBJECTIVES, constraints=parse_constraints({"latency_ms": f"<= {bound}"}))
        assert any("≤" in text.get_text() for text in figure.axes[0].texts) is expected


def test_axes_carry_units_and_say_what_is_better():
    axes = front_figure(RUN.frame(), OBJECTIVES).axes[0]
    assert axes.get_xlabel() == "latency (ms)  (less is better)"
    assert axes.get_ylabel() == "validation accuracy  (more is better)"


@pytest.mark.parametrize(
    "run",
    [
        synthetic_run(0, dense=0),
        synthetic_run(1, failed=0, infeasible=0, dense=0),
        synthetic_run(2, failed=0, infeasible=0, dense=0),
        synthetic_run(8, failed=1, dense=0),
        synthetic_run(8, failed=0, infeasible=1, dense=0),
        synthetic_run(12, unfinished=6),
    ],
    ids=["empty", "one", "two", "all failed", "all infeasible", "running"],
)
def test_odd_runs_give_pictures(run, tmp_path):
    frame = run.frame()
    for name, figure in {
        "front": front_figure(frame, OBJECTIVES),
        "nnz": front_figure(frame, OBJECTIVES, "nnz", "val_accuracy"),
        "history": history_figure(frame, OBJECTIVES),
        "one objective": history_figure(frame, {"val_accuracy": "max"}),
        "curves": curves_figure({t.trial: run.curve(t.trial) for t in run.trials}),
    }.items():
        assert save_figure(figure, tmp_path / f"{name}.png").stat().st_size > 1000
        ET.fromstring(svg_text(figure, name))


def test_equal_points_and_one_value_everywhere_are_no_problem(tmp_path):
    trials = [make_trial(i, "random", i, "complete", ARCHITECTURE, val_accuracy=1.0, latency_ms=2.0) for i in range(5)]
    frame = trials_frame(trials)
    save_figure(front_figure(frame, OBJECTIVES), tmp_path / "a.png")
    save_figure(history_figure(frame, OBJECTIVES), tmp_path / "b.png")


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for kind in ("svg", "png"):
        one = save_figure(front_figure(RUN.frame(), OBJECTIVES), tmp_path / f"one.{kind}").read_bytes()
        two = save_figure(front_figure(RUN.frame(), OBJECTIVES), tmp_path / f"two.{kind}").read_bytes()
        assert one == two


def test_three_objectives_give_a_panel_each_and_the_hypervolume():
    objectives = {**OBJECTIVES, "nnz": "min"}
    assert len([axes for axes in history_figure(RUN.frame(), objectives).axes if axes.get_visible()]) == 4
    save = svg_text(front_figure(RUN.frame(), objectives), "three")
    assert "front of all objectives" in save


def test_many_operations_are_added_up_by_block_and_none_is_lost():
    operations = read_plan(residual_plan(3, 8))
    figure = cost_figure(operations)
    widths = [bar.get_width() for bar in figure.axes[0].patches if bar.get_height() == pytest.approx(0.5)]
    assert len(figure.axes[0].get_yticks()) <= MAX_BARS < len(operations)
    assert sum(widths) == pytest.approx(sum(op.ms for op in operations))


def test_many_operations_without_blocks_keep_the_largest():
    plan = residual_plan(3, 8)
    plan["op"] = [f"layer{i}" for i in range(len(plan))]
    operations = read_plan(plan)
    figure = cost_figure(operations)
    widths = [bar.get_width() for bar in figure.axes[0].patches if bar.get_height() == pytest.approx(0.5)]
    assert len(figure.axes[0].get_yticks()) <= MAX_BARS
    assert sum(widths) == pytest.approx(sum(op.ms for op in operations))


def test_costs_without_times_are_multiply_adds():
    figure = cost_figure(read_plan(residual_plan(1, 2).drop(columns=["ms", "dense_ms"])))
    assert figure.axes[0].get_xlabel() == "multiply-adds"


def test_costs_and_densities_of_nothing_say_so():
    assert "no layers" in cost_figure([]).texts[0].get_text()
    assert "no layers" in density_figure({}).texts[0].get_text()


def test_the_density_picture_has_a_cell_per_layer_with_weights():
    plan = read_plan(residual_plan(2, 3))
    figure = density_figure({"trial 1": plan, "trial 2": plan[:4]})
    cells = [bar for bar in figure.axes[0].patches if bar.get_width() == 1]
    assert len(cells) == sum(op.density is not None for op in [*plan, *plan[:4]])
    assert len(cells) == 14 + 3


def test_less_density_is_paler():
    def luminance(density):
        fill = density_colour(density)[0]
        return sum(int(fill[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114)))

    values = [luminance(d) for d in (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)]
    assert values == sorted(values)


def test_text_on_every_density_can_be_read():
    def relative(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for density in (1.0, 0.7, 0.5, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.01):
        light, dark = sorted(map(relative, density_colour(density)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0, density  # WCAG: large or bold text


def test_searchers_differ_in_colour_and_marker():
    styles = searcher_style(["random", "nsga2", "tpe", "regularized_evolution", "dense"])
    assert len({colour for colour, _ in styles.values()}) == 5
    assert len({marker for _, marker in styles.values()}) == 5


def test_a_front_is_saved_in_the_axes_that_were_asked_for(tmp_path):
    assert default_axes(RUN.frame(), OBJECTIVES) == ("latency_ms", "val_accuracy")
    assert default_axes(RUN.frame(), {"val_accuracy": "max"}) == ("latency_ms", "val_accuracy")
    assert save_front(RUN, tmp_path / "f.svg").stat().st_size > 1000
    assert "non-zeros" in save_front(RUN, tmp_path / "g.svg", x="nnz").read_text()
    with pytest.raises(ConfigError, match='did you mean "latency_ms"'):
        save_front(RUN, tmp_path / "h.svg", x="latency_m")
    with pytest.raises(ConfigError, match=r"ending in \.png, \.svg or \.pdf"):
        save_front(RUN, tmp_path / "h.jpg")


def test_spread_keeps_both_ends():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 5) == [0, 25, 50, 74, 99]
    assert spread(0, 5) == []


def test_pictures_leave_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg_text(front_figure(RUN.frame(), OBJECTIVES), "x")
    assert dict(matplotlib.rcParams) == before
