"""The table of one-shot searches and their controls, on trials made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from nas.frames import read_frame, trials_frame, write_frame
from nas.oneshot.statistics import paired
from nas.report.comparison import comparison_figure, comparison_frame, comparison_sheet, replicated_rows
from nas.report.html import render_report
from nas.report.sheet import to_text
from nas.report.style import svg_text
from nas.store import Trial
from search_spaces.architecture import Architecture
from tests.nas.synthetic_run import OBJECTIVES, SyntheticRun, synthetic_run

SEARCHED, RANDOM, DENSE = (0.95, 0.93, 0.94), (0.94, 0.90, 0.935), (0.91, 0.92, 0.90)


def trial(number: int, searcher: str, accuracy: float | None, sampler: Mapping[str, Any], **more: Any) -> Trial:
    state = more.pop("state", "complete")
    metrics = {
        "val_accuracy": accuracy,
        "kept_weights": 1000 + number,
        "nnz": 1500,
        "macs": 20000,
        "latency_ms": 0.2,
        "dead_channels": 30,
        "channels": 40,
        "skip_pool_share": 0.75,
    }
    return Trial(
        trial=number,
        searcher=searcher,
        index=number,
        state=state,
        architecture=Architecture("darts", (("a", number),), f"{number:016d}"),
        digest=f"{number:016d}",
        seed=int(sampler.get("replicate", 0)),
        epochs=2,
        attempts=1,
        metrics={**metrics, **more} if state == "complete" else {},
        violations={},
        sampler=dict(sampler),
        copy_of=None,
        error=None,
        duration_s=1.0,
    )


def trials(group: float | None = None, start: int = 0, shift: float = 0.0) -> list[Trial]:
    made = []
    noted = {} if group is None else {"density": group}
    for r in range(3):
        control = {"control_of": "dass", "replicate": r} | ({} if group is None else {"group": group})
        made.append(trial(start + 3 * r, "dass", SEARCHED[r] + shift, {"replicate": r, **noted}))
        made.append(trial(start + 3 * r + 1, "dass/random", RANDOM[r], control))
        made.append(trial(start + 3 * r + 2, "dass/dense", DENSE[r], control))
    return made


def row_of(table: Any, searcher: str, group: str | None = None) -> Any:
    mine = table[table["searcher"] == searcher]
    if group is not None:
        mine = mine[mine["group"] == group]
    (row,) = mine.to_dict("records")
    return row


def test_differences_are_paired_by_replicate_search_less_control() -> None:
    frame = trials_frame(trials())
    table = comparison_frame(frame.iloc[::-1], OBJECTIVES)
    assert table["searcher"].tolist() == ["dass", "dass/dense", "dass/random"]
    row, theirs = row_of(table, "dass/random"), paired(SEARCHED, RANDOM)
    assert (row["n"], row["difference_val_accuracy_n"], row["control_of"]) == (3, 3, "dass")
    for part in ("low", "high", "p_t", "p_flip"):
        assert row[f"difference_val_accuracy_{part}"] == pytest.approx(getattr(theirs, part))
    assert row["difference_val_accuracy"] == pytest.approx(0.015)
    assert row["val_accuracy"] == pytest.approx(sum(RANDOM) / 3)
    search = row_of(table, "dass")
    assert search["dead_share"] == pytest.approx(0.75)
    assert search["kept_weights"] == pytest.approx(1003.0)
    assert search["difference_val_accuracy"] != search["difference_val_accuracy"]


def test_groups_are_compared_within() -> None:
    both = [*trials(0.1), *trials(0.01, start=20, shift=-0.1)]
    table = comparison_frame(trials_frame(both))
    assert table["group"].tolist() == ["0.1"] * 3 + ["0.01"] * 3
    assert row_of(table, "dass/random", "0.1")["difference_val_accuracy"] == pytest.approx(0.015)
    assert row_of(table, "dass/random", "0.01")["difference_val_accuracy"] == pytest.approx(-0.085)
    sheet = comparison_sheet(trials_frame(both))
    assert sheet is not None
    assert sheet.columns[0].header == "density"


def test_several_of_a_replicate_count_as_their_mean() -> None:
    control = {"control_of": "dass", "replicate": 0}
    more = [*trials(), trial(50, "dass/random", 0.80, control)]
    row = row_of(comparison_frame(trials_frame(more)), "dass/random")
    assert (row["n"], row["trials"]) == (3, 4)
    expected = paired(SEARCHED, ((0.94 + 0.80) / 2, *RANDOM[1:]))
    assert row["difference_val_accuracy"] == pytest.approx(expected.mean)


def test_what_did_not_complete_is_counted_as_lost_and_its_pair_left_out() -> None:
    made = [t for t in trials() if not (t.searcher == "dass/random" and t.sampler["replicate"] == 1)]
    made.append(trial(60, "dass/random", None, {"control_of": "dass", "replicate": 1}, state="infeasible"))
    row = row_of(comparison_frame(trials_frame(made)), "dass/random")
    assert (row["n"], row["lost"], row["difference_val_accuracy_n"]) == (2, 1, 2)
    expected = paired((SEARCHED[0], SEARCHED[2]), (RANDOM[0], RANDOM[2]))
    assert row["difference_val_accuracy"] == pytest.approx(expected.mean)
    sheet = comparison_sheet(trials_frame(made))
    assert sheet is not None
    assert any(note.startswith("lost:") for note in sheet.notes)


def test_other_searchers_and_parts_of_other_comparisons_stay_out() -> None:
    others = [
        trial(70, "random", 0.99, {}),
        trial(71, "node_masks", 0.99, {"replicate": 0, "role": "random", "group": "node sparsity 0.5"}),
    ]
    frame = trials_frame([*trials(), *others])
    assert set(replicated_rows(frame)["searcher"]) == {"dass", "dass/random", "dass/dense"}
    assert len(comparison_frame(frame)) == 3


def test_a_run_without_one_shot_searches_has_no_table() -> None:
    frame = synthetic_run().frame()
    assert "replicate" not in frame.columns
    assert comparison_sheet(frame, OBJECTIVES) is None
    assert comparison_frame(frame).empty
    assert "One-shot" not in render_report(synthetic_run())


def test_the_sheet_says_test_accuracy_only_where_every_pair_has_it() -> None:
    plain = comparison_sheet(trials_frame(trials()))
    assert plain is not None
    assert "validation accuracy of the search" in " ".join(plain.notes)
    tested = []
    for t in trials():
        t.metrics["test_accuracy"] = t.metrics["val_accuracy"] - 0.02
        tested.append(t)
    with_test = comparison_sheet(trials_frame(tested))
    assert with_test is not None
    assert "test accuracy of the search" in " ".join(with_test.notes)
    del tested[1].metrics["test_accuracy"]
    partly = comparison_sheet(trials_frame(tested))
    assert partly is not None
    assert "validation accuracy of the search" in " ".join(partly.notes)


def test_the_sheet_shows_difference_interval_and_both_tests() -> None:
    sheet = comparison_sheet(trials_frame(trials()), OBJECTIVES)
    assert sheet is not None
    cells = {row[0].strip(): dict(zip((c.header for c in sheet.columns), row, strict=True)) for row in sheet.rows}
    random = cells["dass/random"]
    assert random["search less this"] == "+0.0150"
    assert random["95 %"] == "[-0.0179, +0.0479]"  # 0.0150 -+ 4.303 * 0.01323 / sqrt(3)
    assert random["p (flips)"] == "0.250"
    assert random["dead"] == "75%"
    assert random["val acc"] == "0.9250 +- 0.0218"
    assert cells["dass"]["search less this"] == ""
    assert any("exact p is never below 0.250" in note for note in sheet.notes)


def test_one_replicate_has_no_interval_and_the_sheet_says_so() -> None:
    sheet = comparison_sheet(trials_frame(trials()[:3]))
    assert sheet is not None
    assert "one pair" in to_text(sheet)
    assert any("fewer than two pairs" in note for note in sheet.notes)


def test_a_search_without_controls_is_named() -> None:
    alone = [trial(r, "gdas", 0.9, {"replicate": r}) for r in range(2)]
    sheet = comparison_sheet(trials_frame(alone))
    assert sheet is not None
    assert "without controls: gdas" in sheet.notes


def test_trials_under_way_do_no_harm() -> None:
    under_way = [
        trial(0, "dass", None, {"replicate": 0}, state="running"),
        trial(1, "dass/random", None, {"control_of": "dass", "replicate": 0}, state="proposed"),
    ]
    frame = trials_frame(under_way)
    sheet = comparison_sheet(frame, OBJECTIVES)
    assert sheet is not None
    assert "no pair" in to_text(sheet)
    assert "<svg" in svg_text(comparison_figure(frame), "none-yet")


def test_the_frame_survives_a_csv_file(tmp_path: Any) -> None:
    frame = trials_frame([*trials(0.1), *trials(0.01, start=20)])
    write_frame(frame, tmp_path / "run.csv")
    table, again = comparison_frame(frame), comparison_frame(read_frame(tmp_path / "run.csv"))
    assert table["difference_val_accuracy"].tolist()[1:3] == again["difference_val_accuracy"].tolist()[1:3]
    assert table["searcher"].tolist() == again["searcher"].tolist()


def test_the_report_has_a_section_with_table_and_picture() -> None:
    text = render_report(SyntheticRun([*synthetic_run(6).trials, *trials(start=100)]))
    assert "One-shot searches and controls" in text
    assert "dass/random" in text
    assert 'id="oneshot"' in text
