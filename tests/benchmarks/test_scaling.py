"""The scaling benchmark: that its numbers are what they are called, and that it says when a trial costs ever more."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import scaling, scaling_engines, scaling_simulated
from nas.executors import InlineExecutor


def quiet(_: str) -> None:
    """Says nothing."""


def test_the_bound_is_the_trials_a_driver_starts_over_those_that_end() -> None:
    table = scaling_simulated.saturation([1, 10], ["random"], 60, quiet)
    assert len(table) == 6
    expected = (table["duration_s"] / (table["workers"] * table["driver_cpu_ms"] / 1e3)).clip(upper=1.0)
    assert table["bound"].tolist() == pytest.approx(expected.tolist())
    assert table["simulated"].between(0, 1).all()
    slow = table[table["duration_s"] == 100]
    assert (slow["simulated"] > 0.9).all()  # a driver of milliseconds, trials of minutes


def test_pending_trials_are_compared_with_random_search_of_the_same_seed() -> None:
    table = scaling_simulated.pending([1, 50], ["random", "regularized_evolution"], 50, 2, quiet)
    random = table[table["searcher"] == "random"]
    assert random["over_random"].eq(1.0).all()
    assert len(random) == 2
    blind = table[(table["searcher"] != "random") & (table["workers"] == 50)]  # all proposed before any result
    assert blind["over_random"].tolist() == pytest.approx([1.0, 1.0])
    summary = scaling_simulated.pending_summary(table)
    assert summary["n"].eq(2).all()


def test_a_rule_costs_less_and_is_compared_at_equal_epochs() -> None:
    table = scaling_simulated.stopping(["random"], 40, 2, 5, quiet).set_index(["rule", "seed"])
    assert table.loc["none", "epochs"].eq(40 * 27).all()
    assert table.loc["none", "best_accuracy"].tolist() == table.loc["none", "best_for_these_epochs"].tolist()
    for rule in ("asha", "median"):
        assert table.loc[rule, "epochs_share"].between(0.05, 0.9).all()
        assert (table.loc[rule, "best_for_these_epochs"] <= table.loc["none", "best_accuracy"]).all()
    assert len(scaling_simulated.stopping_summary(table.reset_index())) == 3


def test_growth_has_a_row_per_mark_and_sees_a_cost_that_grows() -> None:
    table, reading = scaling_simulated.growth(60, 5, 20, quiet)
    assert table["trials"].tolist() == [20, 40, 60]
    assert (table[["ms_per_trial", "rss_mb", "db_bytes_per_trial"]] > 0).all(axis=None)
    assert reading["frame_s"] > 0
    assert scaling_simulated.growth_is_flat(pd.DataFrame({"cpu_ms_per_trial": [2.0, 2.1, 1.9, 2.2]}))[0]
    assert not scaling_simulated.growth_is_flat(pd.DataFrame({"cpu_ms_per_trial": [2.0, 3.0, 4.0, 8.0]}))[0]


def test_a_block_takes_as_long_as_its_trials_and_a_failure_is_no_time() -> None:
    executor = InlineExecutor(scaling_engines.sleeper({}))
    assert 0.06 <= scaling_engines.run_block(executor, 3, 0.02, 0) < 5
    broken = InlineExecutor(lambda payload, report: {}["nothing"])
    with pytest.raises(RuntimeError, match="job 0 was failed"):
        scaling_engines.run_block(broken, 1, 0.0, 0)


def test_engines_that_are_not_there_are_left_out_and_named() -> None:
    said: list[str] = []
    table = scaling_engines.compare(["inline", "nonesuch"], [1], 2, 2, 0.01, 3, said.append)
    assert table["executor"].tolist() == ["inline"]
    assert table["ideal_s"].tolist() == pytest.approx([0.02])
    assert (table["over_ideal"] >= 1).all()
    assert any("nonesuch is left out" in text for text in said)


def test_tables_and_picture_are_written_for_the_parts_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.csv"
    code = scaling.main(["--parts", "growth", "--trials", "40", "--out", str(out)])
    assert code in (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.png", "scaling_growth.csv"]
    assert len(pd.read_csv(tmp_path / "scaling_growth.csv")) == 2
    assert "reading 40 trials" in capsys.readouterr().out
