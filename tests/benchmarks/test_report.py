"""Ratios, means, targets and losses, on tables made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.kernels import report, run_networks


def row(layer: str = "c3_64_56", density: float = 0.1, **times: float) -> dict[str, Any]:
    facts: dict[str, Any] = {"layer": layer, "family": "3x3", "pattern": "unstructured", "density": density}
    return {
        **facts,
        "batch": 1,
        "threads": 1,
        "mflop": 200.0,
        "mflop_kept": 200.0 * density,
        "confirmed": True,
        **times,
    }


def test_ratios_are_to_the_fastest_engine_of_each_kind() -> None:
    times = {"torch_us": 400.0, "ort_us": 100.0, "openvino_us": math.nan, "scipy_us": 90.0, "deepsparse_us": 50.0}
    (found,) = report.with_ratios([row(**times, portable_us=20.0)], ["portable"], 100.0).to_dict("records")
    assert (found["best_dense"], found["best_dense_us"]) == ("ort", 100.0)
    assert (found["best_sparse"], found["best_sparse_us"]) == ("deepsparse", 50.0)
    assert found["portable_x_dense"] == pytest.approx(5.0)
    assert found["portable_x_sparse"] == pytest.approx(2.5)
    assert found["portable_gflops"] == pytest.approx(1000.0)  # 20 MFLOP in 20 us
    assert found["portable_peak"] == pytest.approx(10.0)


def test_what_was_not_measured_is_nan_and_not_a_ratio() -> None:
    (found,) = report.with_ratios([row(ort_us=10.0, portable_us=math.nan)], ["portable"], 100.0).to_dict("records")
    assert found["best_sparse"] == ""
    assert all(
        math.isnan(found[c]) for c in ("best_sparse_us", "portable_x_dense", "portable_x_sparse", "portable_gflops")
    )


def test_geometric_means_stand_beside_their_targets() -> None:
    rows = [
        row("a", ort_us=20.0, portable_us=10.0, deepsparse_us=40.0),
        row("b", ort_us=80.0, portable_us=10.0, deepsparse_us=10.0),
    ]
    frame = report.with_ratios(rows, ["portable"], 100.0)
    table = report.geomeans(frame, ["portable"]).set_index("over best dense")
    assert table.loc["portable", 0.1] == pytest.approx(4.0)  # sqrt(2 * 8)
    assert table.loc["portable", "layers"] == 2
    assert table.loc["  target of portable", 0.1] == 3.8
    assert table.loc["deepsparse", 0.1] == pytest.approx(2.0)  # sqrt(0.5 * 8)
    assert table.loc["portable over deepsparse", 0.1] == pytest.approx(2.0)  # sqrt(4 * 1)


def test_means_over_the_main_layers_leave_other_rows_out() -> None:
    rows = [row("a", ort_us=20.0, portable_us=10.0)]
    rows += [
        row("b", ort_us=900.0, portable_us=1.0) | odd
        for odd in ({"family": "linear"}, {"pattern": "4x1"}, {"batch": 8})
    ]
    table = report.geomeans(report.with_ratios(rows, ["portable"], 100.0), ["portable"]).set_index("over best dense")
    assert table.loc["portable", 0.1] == pytest.approx(2.0)


def test_targets_of_groups_are_met_by_the_best_path() -> None:
    rows = [row("f1_a", ort_us=70.0, portable_us=10.0, csr_us=70.0) | {"family": "fused pairs"}]
    (found,) = report.groups(report.with_ratios(rows, ["portable", "csr"], 1.0), ["portable", "csr"]).to_dict("records")
    assert (found["rows"], found["target"], found["verdict"]) == ("fused pairs", 6.5, "met")
    rows[0]["portable_us"] = 11.0
    (found,) = report.groups(report.with_ratios(rows, ["portable", "csr"], 1.0), ["portable", "csr"]).to_dict("records")
    assert found["verdict"] == "MISSED"


@pytest.mark.parametrize(
    ("density", "ours", "why"),
    [
        (0.5, 200.0, "slower than dense"),
        (0.3, 50.0, ""),
        (0.3, 120.0, "slower than dense, 0.50x of DeepSparse"),
        (0.1, 30.0, "below 3.5x"),
        (0.1, 25.0, ""),
        (0.05, 62.0, ""),  # within noise of DeepSparse
    ],
)
def test_losses_name_every_row_that_is_too_slow_and_why(density: float, ours: float, why: str) -> None:
    frame = report.with_ratios([row(density=density, ort_us=100.0, auto_us=ours, deepsparse_us=60.0)], ["auto"], 1.0)
    found = report.losses(frame, "auto")
    assert ([] if found.empty else list(found["why"])) == ([why] if why else [])


def test_rows_are_judged_by_the_plan_where_it_was_measured() -> None:
    assert report.subject(["portable", "specialised", "auto"]) == "auto"
    assert report.subject(["csr", "portable"]) == "portable"
    assert report.subject(["csr"]) == "csr"


def test_a_table_comes_back_from_its_file_with_its_environment(tmp_path: Path) -> None:
    frame = report.with_ratios([row(ort_us=20.0, portable_us=10.0)], ["portable"], 100.0)
    report.write_csv(frame, tmp_path / "new" / "t.csv", report.environment(1, 100.0, None))
    text = (tmp_path / "new" / "t.csv").read_text()
    assert "# torch: " in text
    assert "# deepsparse: missing" in text
    back = pd.read_csv(tmp_path / "new" / "t.csv", comment="#")
    assert list(back.columns) == list(frame.columns)
    assert back["portable_x_dense"].iloc[0] == 2.0


def test_networks_are_held_against_their_targets_at_a_tenth_and_one_thread() -> None:
    facts = {"network": "resnet18", "threads": 1}
    rows = [
        {**facts, "density": d, "ort_ms": 30.0, "portable_ms": ms, "deepsparse_ms": 15.0}
        for d, ms in [(0.1, 10.0), (0.1, 12.0), (0.2, 12.0)]
    ]
    frame = run_networks.with_ratios(rows, ["portable"])
    assert list(frame["verdict"]) == ["met", "MISSED", ""]
    assert frame["portable_x_dense"].iloc[0] == pytest.approx(3.0)
    assert frame["portable_x_deepsparse"].iloc[0] == pytest.approx(1.5)
    assert run_networks.shown(frame, ["portable"]).shape[1] == 4
