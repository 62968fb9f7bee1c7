"""Reports of runs in which trials were stopped early: counted, drawn, and never on a front."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nas.frames import front_rows
from nas.report.curves import curves_figure
from nas.report.front import front_figure
from nas.report.history import epochs_spared, equal_budget, finished, searcher_summary
from nas.report.html import render_report
from nas.report.tables import results_sheet, searcher_sheet
from nas.report.words import comparison, status
from tests.nas.synthetic_run import OBJECTIVES, SyntheticRun, synthetic_run

STOPPED = (2, 5, 7)


class Cut(SyntheticRun):
    """Some trials ended after three of their twelve epochs, with values better than any other's."""

    def curve(self, number: int) -> list[dict[str, Any]]:
        if self.trial(number).state == "stopped":
            return [{"epoch": e, "val_accuracy": 0.3 * e, "train_accuracy": 0.3 * e} for e in (1, 2, 3)]
        return super().curve(number)


@pytest.fixture(scope="module")
def run() -> Cut:
    trials = []
    for trial in synthetic_run(24, failed=0, infeasible=0).trials:
        if trial.trial in STOPPED:
            best = {"val_accuracy": 0.9999, "latency_ms": 1e-3, "trained_epochs": 3, "stopped_because": "asha: last"}
            trial = replace(trial, state="stopped", metrics=trial.metrics | best)
        trials.append(trial)
    return Cut(trials)


def test_stopped_trials_are_never_on_the_front_however_good_they_look(run: Cut) -> None:
    frame = run.frame()
    assert not set(front_rows(frame, OBJECTIVES)["trial"]) & set(STOPPED)
    assert len(front_rows(frame, OBJECTIVES)) > 0


def test_stopped_trials_are_spent_budget_and_have_a_column(run: Cut) -> None:
    frame = run.frame()
    assert len(finished(frame)) == 26
    assert equal_budget(frame) == 12
    summary = searcher_summary(frame, OBJECTIVES).set_index("searcher")
    assert summary["stopped"].to_dict() == {"random": 1, "nsga2": 2, "dense": 0}
    sheet = searcher_sheet(frame, OBJECTIVES)
    place = [column.header for column in sheet.columns].index("stopped")
    assert [row[place] for row in sheet.rows] == ["1", "2", "0"]
    assert all(len(row) == len(keys) == len(sheet.columns) for row, keys in zip(sheet.rows, sheet.keys, strict=True))
    plain = searcher_sheet(synthetic_run(8).frame(), OBJECTIVES)
    assert "stopped" not in [column.header for column in plain.columns]


def test_words_say_what_was_stopped_and_what_it_spared(run: Cut) -> None:
    frame = run.frame()
    assert epochs_spared(frame) == (27, 26 * 12)
    said = status(frame, {"random": 12, "nsga2": 12, "dense": 2}, True)
    assert "23 complete, 3 stopped" in said
    assert "early stopping spared 27 of 312 epochs" in said
    assert "stopped ones count" in comparison(frame, OBJECTIVES)[0]
    assert any("3 stopped early" in note for note in results_sheet(frame, OBJECTIVES).notes)
    without = synthetic_run(8).frame()
    assert "spared" not in status(without, {}, True)
    assert "stopped" not in comparison(without, OBJECTIVES)[0]


def test_pictures_show_stopped_trials(run: Cut) -> None:
    frame = run.frame()
    legend = front_figure(frame, OBJECTIVES).axes[0].get_legend()
    assert legend is not None
    assert "stopped early (3)" in [text.get_text() for text in legend.get_texts()]
    learned = {0: run.curve(0)}
    axes = curves_figure(learned, stopped=[run.curve(n) for n in STOPPED]).axes[0]
    ends = [line for line in axes.lines if list(line.get_xdata()) == [3.0]]
    assert len(ends) == 3
    assert "stopped early" in [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert len(curves_figure(learned).axes[0].lines) == 2


def test_the_report_draws_curves_that_end_early(run: Cut) -> None:
    html = render_report(run)
    assert "3 of 3 trials that were stopped early" in html
    assert "early stopping spared 27 of 312 epochs" in html
