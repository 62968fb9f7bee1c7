"""Tables for people: right rows, exact numbers, nothing cut at any width, and machine formats that parse."""

from __future__ import annotations

import csv
import io
import json
import math

import pandas as pd
import pytest
from rich.console import Console

from nas.errors import UnknownName
from nas.frames import front_rows, trials_frame
from nas.report.plans import read_plan
from nas.report.sheet import Column, Sheet, fit, print_sheet, text_width, to_html, to_text
from nas.report.tables import (
    failure_sheet,
    format_frame,
    last_line,
    layer_sheet,
    pareto_sheet,
    results_sheet,
    searcher_sheet,
)
from nas.report.units import compact, digits, direction_of, duration, interval, show
from tests.nas.synthetic_run import OBJECTIVES, make_trial, residual_plan, sample, synthetic_run

RUN = synthetic_run(30)


def on_terminal(sheet: Sheet, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    print_sheet(sheet, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def all_sheets() -> list[Sheet]:
    frame = RUN.frame()
    plan = read_plan(residual_plan(3, 2))
    front = front_rows(frame, OBJECTIVES)
    return [
        *(results_sheet(frame, OBJECTIVES), pareto_sheet(front, OBJECTIVES), searcher_sheet(frame, OBJECTIVES)),
        *(layer_sheet(plan), failure_sheet(frame)),
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("which", range(4))
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(which, width):
    sheet = all_sheets()[which]
    text = on_terminal(sheet, width)
    assert max(text_width(line.rstrip()) for line in text.splitlines()) <= width
    kept = fit(sheet, width)
    numbers = [i for i, column in enumerate(kept.columns) if column.right]
    for row in kept.rows:
        assert any(all(row[i].strip() in line for i in numbers) for line in text.splitlines()), row


def test_columns_that_are_left_out_are_named():
    sheet = Sheet("t", (Column("a"), Column("wide", rank=2), Column("b", rank=1)), (("1", "x" * 50, "y"),))
    narrow = fit(sheet, 20)
    assert [column.header for column in narrow.columns] == ["a", "b"]
    assert narrow.rows == (("1", "y"),)
    assert narrow.notes == ("not shown at this width: wide",)


def test_a_column_of_rank_0_is_never_left_out():
    sheet = Sheet("t", (Column("a"), Column("b")), (("1" * 50, "2" * 50),))
    assert fit(sheet, 10).rows == sheet.rows


def test_piped_output_is_plain_and_has_every_column():
    console = Console(file=io.StringIO(), width=40)
    sheet = results_sheet(RUN.frame(), OBJECTIVES)
    print_sheet(sheet, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert text == to_text(sheet)
    for column in sheet.columns:
        assert column.header in text


def test_markup_in_a_text_is_shown_as_it_is():
    sheet = Sheet("[bold]t", (Column("[red]h"),), (("[/nonsense]",),), ("[link]",))
    text = on_terminal(sheet, 80)
    for part in ("[bold]t", "[red]h", "[/nonsense]", "[link]"):
        assert part in text


def test_html_of_a_sheet_is_escaped():
    sheet = Sheet("<t>", (Column("<h>"),), (('<script>"&',),), ("<n>",), keys=(('"><b>',),))
    text = to_html(sheet)
    assert "<script>" not in text
    assert "&lt;script&gt;&quot;&amp;" in text
    assert '"><b>' not in text


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="expected 2 cells in a row, got 1"):
        Sheet("t", (Column("a"), Column("b")), (("1",),))


def test_the_results_have_a_row_per_trial_and_a_star_on_the_front():
    frame = RUN.frame()
    sheet = results_sheet(frame, OBJECTIVES)
    front = set(front_rows(frame, OBJECTIVES)["trial"])
    assert [row[0] for row in sheet.rows] == [f"{t}{'*' if t in front else ''}" for t in frame["trial"]]
    assert sum("failed" in row for row in sheet.rows) == int((frame["state"] == "failed").sum())


def test_a_limit_keeps_the_last_rows_and_says_how_many_there_are():
    sheet = results_sheet(RUN.frame(), OBJECTIVES, limit=5)
    assert len(sheet.rows) == 5
    assert sheet.rows[-1][0].rstrip("*") == str(RUN.frame()["trial"].iloc[-1])
    assert any("the last 5 of 32 trials" in note for note in sheet.notes)


def test_the_pareto_table_shows_accuracy_latency_with_interval_non_zeros_density_and_searcher():
    front = front_rows(RUN.frame(), OBJECTIVES)
    sheet = pareto_sheet(front, OBJECTIVES)
    headers = [column.header for column in sheet.columns]
    assert headers[:6] == ["trial", "val acc", "latency ms", "non-zeros", "density", "searcher"]
    assert len(sheet.rows) == len(front)
    first = front.iloc[0]
    assert sheet.rows[0][1] == f"{first['val_accuracy']:.4f}"
    assert sheet.rows[0][3] == f"{first['nnz']:,}"
    assert "[" in sheet.rows[0][2]
    assert [row[0] for row in sheet.rows] == [str(t) for t in front["trial"]]


def test_the_front_is_not_dominated_feasible_and_best_first():
    frame = RUN.frame()
    front = front_rows(frame, OBJECTIVES)
    done = frame[frame["state"] == "complete"]
    for _, row in front.iterrows():
        better = (done["val_accuracy"] >= row["val_accuracy"]) & (done["latency_ms"] <= row["latency_ms"])
        strictly = (done["val_accuracy"] > row["val_accuracy"]) | (done["latency_ms"] < row["latency_ms"])
        assert not (better & strictly).any()
    assert front["val_accuracy"].is_monotonic_decreasing
    assert (front["state"] == "complete").all()


def test_a_copy_is_not_a_second_member_of_the_front():
    import random

    made = sample(random.Random(0))
    original = make_trial(0, "random", 0, "complete", made, val_accuracy=0.9, latency_ms=1.0)
    copy = make_trial(1, "nsga2", 0, "complete", made, val_accuracy=0.9, latency_ms=1.0)
    object.__setattr__(copy, "copy_of", 0)
    assert front_rows(trials_frame([original, copy]), OBJECTIVES)["trial"].tolist() == [0]


@pytest.mark.parametrize("n", [0, 1, 12])
def test_every_table_works_for_runs_without_complete_trials(n):
    for run in (synthetic_run(n, failed=1.0, dense=0), synthetic_run(n, failed=0.0, infeasible=1.0, dense=0)):
        frame = run.frame()
        sheets = [results_sheet(frame, OBJECTIVES), pareto_sheet(front_rows(frame, OBJECTIVES), OBJECTIVES)]
        sheets += [searcher_sheet(frame, OBJECTIVES), failure_sheet(frame)]
        for sheet in sheets:
            assert to_text(sheet)
            assert on_terminal(sheet, 80)
            assert to_html(sheet)
        assert len(sheets[0].rows) == n


def test_an_objective_that_is_no_usual_column_is_shown():
    trials = [
        make_trial(i, "random", i, "complete", t.architecture, balance_db=2.0 + i) for i, t in enumerate(RUN.trials[:3])
    ]
    objectives = {"val_accuracy": "max", "balance_db": "min"}
    frame = trials_frame(trials)
    for sheet in (results_sheet(frame, objectives), pareto_sheet(front_rows(frame, objectives), objectives)):
        assert "balance_db" in [column.header for column in sheet.columns]


def test_the_layer_table_adds_up():
    plan = read_plan(residual_plan(3, 2))
    sheet = layer_sheet(plan)
    shares = [float(row[-1].rstrip("%")) for row in sheet.rows]
    assert len(sheet.rows) == len(plan) == 21
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_without_times_the_layer_table_shows_shares_of_multiply_adds():
    plan = read_plan(residual_plan(2, 1).drop(columns=["ms", "dense_ms"]))
    headers = [column.header for column in layer_sheet(plan).columns]
    assert "of MACs" in headers
    assert "ms" not in headers


def test_csv_and_json_hold_every_row_and_column_exactly():
    frame = RUN.frame()
    rows = list(csv.DictReader(io.StringIO(format_frame(frame, "csv"))))
    records = json.loads(format_frame(frame, "json"))
    assert len(rows) == len(records) == len(frame)
    assert list(rows[0]) == list(records[0]) == list(frame.columns)
    for row, record, value in zip(rows, records, frame["latency_ms"], strict=True):
        if pd.isna(value):
            assert row["latency_ms"] == ""
            assert record["latency_ms"] is None
        else:
            assert float(row["latency_ms"]) == record["latency_ms"] == value


def test_json_has_no_bare_infinity():
    frame = trials_frame([make_trial(0, "random", 0, "complete", RUN.trials[0].architecture, val_loss=math.inf)])
    assert json.loads(format_frame(frame, "json"), parse_constant=pytest.fail)[0]["val_loss"] == "inf"


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(UnknownName, match='did you mean "json"'):
        format_frame(RUN.frame(), "jsn")


def test_last_line_is_the_exception():
    assert last_line("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert last_line(None) == last_line("") == "–"


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show("val_accuracy", 0.97222), "0.9722"),
        (show("nnz", 1234567), "1,234,567"),
        (show("density", 0.25), "0.25"),
        (show("latency_ms", 0.0123456), "0.0123"),
        (show("latency_ms", pd.NA), "–"),
        (show("x", float("nan")), "–"),
        (show("x", float("-inf")), "-inf"),
        (digits(0), "0"),
        (digits(1.5), "1.50"),
        (digits(1234.5), "1,234"),
        (digits(1e-7), "1.00e-07"),
        (interval(0.1234, 0.12, 0.13), "0.123 [0.120, 0.130]"),
        (interval(0.1234, None, 0.13), "0.123"),
        (interval(None, None, None), "–"),
        (compact(999), "999"),
        (compact(1500), "1.50k"),
        (compact(999_999), "1.00M"),
        (compact(0), "0"),
        (duration(59.4), "59 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (duration(None), "–"),
    ],
)
def test_numbers_are_written_like_this(shown, text):
    assert shown == text


def test_the_direction_is_what_the_run_says_and_else_the_usual_one():
    assert direction_of("val_accuracy", {}) == "max"
    assert direction_of("latency_ms", {}) == "min"
    assert direction_of("latency_ms", {"latency_ms": "max"}) == "max"
