"""One trial on the screen and in a file."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from nas.errors import ConfigError, RunError
from nas.report.sheet import to_text
from nas.report.show import print_trial, save_drawing, trial_sheet
from tests.nas.synthetic_run import residual_plan, synthetic_run

RUN = synthetic_run(30, failed=0.1, infeasible=0.1)


def shown(trial: int, run=RUN, terminal: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    print_trial(run, trial, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def first(state: str) -> int:
    return next(trial.trial for trial in RUN.trials if trial.state == state)


def test_a_complete_trial_shows_numbers_decisions_tree_and_layers():
    trial = RUN.trials[first("complete")]
    text = shown(trial.trial)
    assert f"{trial.metrics['nnz']:,}" in text
    for name, value in trial.architecture.decisions:
        assert any(line.split() == [name, str(value)] for line in text.splitlines())
    assert "What is executed" in text
    assert "\nLayers\n" in text


def test_a_failed_trial_shows_its_whole_traceback_and_no_layers():
    text = shown(first("failed"))
    assert 'File "network.py", line 12, in forward' in text
    assert "(64x<120> and 84x10)" in text
    assert "Layers" not in text


def test_an_infeasible_trial_says_which_limit_it_broke():
    assert "limit on latency (ms)" in shown(first("infeasible"))
    assert "broken by 30.0% of the limit" in shown(first("infeasible"))


def test_piped_output_is_plain_and_cuts_nothing():
    run = synthetic_run(4, failed=0, infeasible=0)
    run.plan_frame = lambda trial: residual_plan(3, 2)  # type: ignore[method-assign]
    text = shown(0, run, width=40)
    assert "\x1b" not in text
    tree = text[text.index("What is executed") : text.index("\nLayers")]
    assert all(line.endswith("%") for line in tree.splitlines()[1:] if line)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_no_line_is_too_wide(width):
    assert max(map(len, shown(first("complete"), terminal=True, width=width).splitlines())) <= width


def test_a_copy_says_whose():
    trial = synthetic_run(2, failed=0, infeasible=0).trials[1]
    object.__setattr__(trial, "copy_of", 0)
    assert "trial 0: the same network, not trained again" in to_text(trial_sheet(trial))


def test_a_drawing_goes_where_it_is_asked_to_go_or_says_why_not(tmp_path):
    trial = first("complete")
    assert save_drawing(RUN, trial, tmp_path / "a.svg").read_text().startswith("<svg")
    with pytest.raises(ConfigError, match=r"\.svg, \.png or \.pdf"):
        save_drawing(RUN, trial, tmp_path / "a.gif")
    with pytest.raises(RunError, match="the drawing cannot be written"):
        save_drawing(RUN, trial, tmp_path / "missing" / "a.svg")
    with pytest.raises(RunError, match="has no plan"):
        save_drawing(RUN, first("failed"), tmp_path / "a.svg")


@pytest.mark.parametrize(
    "frame", [pd.DataFrame({"a": [1]}), pd.DataFrame({"op": ["x"], "kind": ["add"], "stride": ["('x',)"]})]
)
def test_a_damaged_plan_is_one_clear_error_when_drawn_and_left_out_when_shown(frame, tmp_path, monkeypatch):
    run = synthetic_run(2, failed=0, infeasible=0)
    monkeypatch.setattr(run, "plan_frame", lambda trial: frame)
    with pytest.raises(RunError, match=r"trial 0: its plan\.csv is damaged"):
        save_drawing(run, 0, tmp_path / "a.svg")
    assert "Layers" not in shown(0, run)
