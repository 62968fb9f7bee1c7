"""What real tables get wrong is seen, and nothing is said about sound ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hw_models.importers.checks import check_operations, check_times
from hw_models.lowered_cells import cell_operations


def times(count: int = 200, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(2.5, 0.5, count))


def test_sound_times_raise_no_doubt() -> None:
    assert check_times(pd.DataFrame({"a_ms": times(seed=0), "b_ms": times(seed=1), "a_std_ms": 0.0})) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([-1.0, 5.0], "1 of 2 values are -1"),
        ([-0.3, 5.0], "are negative"),
        ([5.0, 0.0], "are 0, first in row 1"),
        ([np.nan, np.inf], "2 of 2 values are missing"),
        (np.round(times()), "whole milliseconds only"),
        (np.where(np.arange(200) < 20, times() / 1000, times()), "20 values are about 1000 times below"),
        (np.where(np.arange(200) < 5, times() * 1000, times()), "5 values are about 1000 times above"),
    ],
)
def test_impossible_and_doubtful_values_are_named(values: object, words: str) -> None:
    problems = check_times(pd.DataFrame({"x_ms": values}))
    assert len(problems) == 1
    assert problems[0].startswith("x_ms: ")
    assert words in problems[0]


def test_a_column_of_seconds_beside_columns_of_milliseconds_is_seen() -> None:
    frame = pd.DataFrame({"a_ms": times(), "b_ms": times(seed=1), "c_ms": times(seed=2) / 1000})
    assert [p.split(":")[0] for p in check_times(frame)] == ["c_ms"]


def test_two_devices_that_are_one_are_seen() -> None:
    frame = pd.DataFrame({"a_ms": times(), "b_ms": times() * 1.5, "c_ms": times(seed=1), "d_ms": times()})
    problems = check_times(frame)
    assert "a_ms and b_ms are one: the second is 1.5 x the first" in problems
    assert "a_ms and d_ms are one: equal throughout" in problems
    assert not any("c_ms" in p for p in problems)


def test_networks_that_appear_twice_are_counted() -> None:
    frame = pd.DataFrame({"ms": times(4)}, index=["a", "b", "a", "a"])
    assert check_times(frame) == ["2 networks appear more than once"]


def test_sums_of_a_table_do_not_pass_for_measurements() -> None:
    frame = cell_operations(range(15625))
    price = frame["macs"] / 1e6 + 0.1
    total = (price * frame["count"] * frame["live"]).groupby(frame["network"]).sum()
    assert any("sums of a table or a simulation" in p for p in check_times(pd.DataFrame({"fpga_ms": total})))
    noisy = total * np.exp(0.02 * np.random.default_rng(0).normal(size=15625))
    assert check_times(pd.DataFrame({"raspi4_ms": noisy})) == []


def test_operations_that_appear_twice_are_counted() -> None:
    frame = pd.DataFrame({"kind": ["conv", "conv", "pool"], "c_in": [8, 8, 8], "ms": [1.5, 1.7, 0.3]})
    assert check_operations(frame) == ["2 operations appear more than once with different times"]


def test_rows_filled_in_by_interpolation_are_seen() -> None:
    width = np.arange(8, 200, 8)
    rng = np.random.default_rng(0)
    true = 0.1 + 0.01 * width * np.exp(0.05 * rng.normal(size=len(width)))
    frame = pd.DataFrame({"kind": "conv", "c_out": width, "ms": true})
    assert check_operations(frame) == []
    filled = frame.assign(ms=np.interp(width, width[::6], true[::6]))
    assert any("filled in by interpolation" in p for p in check_operations(filled))
