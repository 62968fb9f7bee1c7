"""Laws of the frame: fixed columns and dtypes whatever the trials, and nothing lost on the way through a CSV file."""

from __future__ import annotations

import csv
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.frames import ARCH, COLUMNS, clean_text, complete, merged_order, numbers, read_frame, trials_frame, write_frame
from nas.store import Trial
from search_spaces.architecture import Architecture
from tests.nas.synthetic_run import synthetic_run

FROM_THE_DESIGN = [
    "trial",
    "state",
    "searcher",
    "seed",
    "epochs",
    "val_accuracy",
    "test_accuracy",
    "latency_ms",
    "latency_lo_ms",
    "latency_hi_ms",
    "latency_source",
    "params",
    "nnz",
    "density",
    "weight_bytes",
    "dense_macs",
    "macs",
    "duration_s",
    "digest",
    "error",
]


def trial(number: int = 0, decisions: dict | None = None, **values) -> Trial:
    made = Architecture("toy", tuple((decisions or {}).items()), "0123456789abcdef")
    given_values = {"searcher": "random", "index": number, "state": "complete", "seed": 0, "epochs": 1, **values}
    return Trial(trial=number, architecture=made, digest=made.digest, **given_values)


def round_trip(frame: pd.DataFrame) -> pd.DataFrame:
    text = io.StringIO()
    write_frame(frame, text)
    return read_frame(io.StringIO(text.getvalue()))


def test_the_columns_are_those_of_the_design_in_its_order():
    assert list(COLUMNS)[: len(FROM_THE_DESIGN)] == FROM_THE_DESIGN
    later = {"latency_quality", "energy_mj", "energy_method", "copy_of", "attempts"}
    assert set(list(COLUMNS)[len(FROM_THE_DESIGN) :]) == later


@pytest.mark.parametrize("n", [0, 1, 30])
def test_dtypes_do_not_depend_on_the_trials(n):
    frame = synthetic_run(n, dense=0).frame()
    assert len(frame) == n
    assert {name: str(dtype) for name, dtype in frame.dtypes.items() if name in COLUMNS} == COLUMNS
    assert list(frame.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert list(frame.index) == list(range(n))


def test_failed_and_infeasible_trials_are_rows_too():
    run = synthetic_run(40, failed=0.3, infeasible=0.3, unfinished=4)
    assert run.frame()["state"].tolist() == [t.state for t in run.trials]
    assert set(run.frame()["state"]) == {"complete", "failed", "infeasible", "running", "proposed"}
    failed = run.frame().query("state == 'failed'").iloc[0]
    assert "shapes cannot be multiplied" in failed["error"]
    assert pd.isna(failed["val_accuracy"])


def test_a_frame_survives_a_csv_file_exactly():
    frame = synthetic_run(40, failed=0.2, unfinished=3).frame()
    pd.testing.assert_frame_equal(round_trip(frame), frame)


def test_an_empty_run_survives_a_csv_file():
    pd.testing.assert_frame_equal(round_trip(trials_frame([])), trials_frame([]))


@pytest.mark.parametrize(
    "error",
    [
        "None",
        "NA",
        "null",
        "nan",
        'he said "no", twice',
        "two\nlines\r\nthree",
        "a,b;c\td",
        "=1+1",
        "ünïcödé 漢字 🙂",
        "\x1b[31mred\x00",
        "\ud800lone",
    ],
)
def test_awkward_errors_survive_a_csv_file(error):
    frame = trials_frame([trial(0, state="failed", error=error), trial(1)])
    again = round_trip(frame)
    assert again["error"].tolist() == [clean_text(error), pd.NA]
    pd.testing.assert_frame_equal(again, frame)


def test_any_csv_reader_sees_one_row_per_trial_and_empty_cells_for_missing():
    frame = trials_frame([trial(0, metrics={"nnz": 7}), trial(1, state="failed", error="a\nb")])
    rows = list(csv.DictReader(io.StringIO(frame.to_csv(index=False))))
    assert [row["trial"] for row in rows] == ["0", "1"]
    assert (rows[0]["nnz"], rows[1]["nnz"], rows[1]["error"]) == ("7", "", "a\nb")


def test_the_index_column_of_a_plain_to_csv_is_ignored_when_read_back():
    frame = synthetic_run(6).frame()
    pd.testing.assert_frame_equal(read_frame(io.StringIO(frame.to_csv())), frame)


def test_numbers_keep_every_digit_and_infinities():
    values = [0.1 + 0.2, 1e-300, float("inf"), float("nan")]
    frame = trials_frame([trial(i, metrics={"val_accuracy": v, "params": 2**62 + 1}) for i, v in enumerate(values)])
    again = round_trip(frame)
    assert again["val_accuracy"].tolist()[:3] == values[:3]
    assert again["val_accuracy"].isna().tolist() == [False, False, False, True]
    assert again["params"].tolist() == [2**62 + 1] * 4


def test_a_metric_without_a_column_gets_one_before_the_decisions():
    frame = trials_frame(
        [trial(0, {"width": 3}, metrics={"balance_db": 1.5}), trial(1, {"width": 4}, metrics={"note": "x"})]
    )
    assert list(frame.columns[len(COLUMNS) :]) == ["balance_db", "note", ARCH + "width"]
    assert frame["balance_db"].dtype == "Float64"
    assert frame["note"].tolist() == [pd.NA, "x"]


def test_a_metric_cannot_replace_a_field_of_the_trial():
    assert trials_frame([trial(3, metrics={"epochs": 99, "seed": 5})])["epochs"].tolist() == [1]


def test_a_metric_of_the_wrong_type_is_named_with_trial_and_column():
    with pytest.raises(TypeError, match=r"trial 1: column nnz holds Int64, got 1\.5"):
        trials_frame([trial(0, metrics={"nnz": 3}), trial(1, metrics={"nnz": 1.5})])


def test_numpy_and_torch_numbers_are_numbers():
    torch = pytest.importorskip("torch")
    metrics = {"nnz": np.int64(3), "val_accuracy": torch.tensor(0.5), "other": np.float32(2)}
    frame = trials_frame([trial(0, metrics=metrics)])
    assert frame.loc[0, ["nnz", "val_accuracy", "other"]].tolist() == [3, 0.5, 2.0]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1, 2], "Int64"), ([1, 0.5], "Float64"), ([True, False], "boolean"), (["a", 1], "string"), ([True, 1], "string")],
)
def test_a_decision_gets_the_dtype_that_holds_all_its_values(values, dtype):
    frame = trials_frame([trial(i, {"d": value}) for i, value in enumerate(values)])
    assert str(frame[ARCH + "d"].dtype) == dtype


def test_decisions_stand_in_the_order_they_were_taken_although_no_trial_has_them_all():
    sequences = ["dab", "dac", "dabc", "da", "dx"]
    frame = trials_frame([trial(i, dict.fromkeys(names, 1)) for i, names in enumerate(sequences)])
    assert [name.removeprefix(ARCH) for name in frame.columns if name.startswith(ARCH)] == ["d", "a", "b", "c", "x"]


@given(st.permutations(list("abcdefgh")), st.lists(st.sets(st.sampled_from("abcdefgh")), max_size=8))
def test_merged_order_agrees_with_every_sequence_that_comes_from_one_order(order, subsets):
    sequences = [[name for name in order if name in subset] for subset in subsets]
    merged = merged_order(sequences)
    assert sorted(merged) == sorted(set().union(*subsets))
    for sequence in sequences:
        assert [name for name in merged if name in sequence] == sequence


def test_merged_order_survives_contradictions():
    assert sorted(merged_order(["ab", "ba", "bca"])) == ["a", "b", "c"]


def test_complete_keeps_only_finished_feasible_rows_with_finite_objectives():
    rows = [
        trial(0, metrics={"val_accuracy": 0.5, "nnz": 1}),
        trial(1, metrics={"val_accuracy": float("inf"), "nnz": 1}),
        trial(2, metrics={"nnz": 1}),
        trial(3, state="infeasible", metrics={"val_accuracy": 0.9, "nnz": 1}),
    ]
    assert complete(trials_frame(rows), ("val_accuracy", "nnz"))["trial"].tolist() == [0]


def test_numbers_of_a_column_that_is_not_there_are_all_missing():
    assert np.isnan(numbers(trials_frame([trial(0)]), "balance_db")).tolist() == [True]
