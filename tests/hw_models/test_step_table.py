"""What was measured: exact entries, curves within what was measured, and silence about the rest."""

import json

import numpy as np
import pandas as pd
import pytest

from hw_models.curves import Curve
from hw_models.step_table import SPREAD, StepTable


def _rows(**columns: list) -> pd.DataFrame:
    return pd.DataFrame({"nnz": 1.0, **columns})


SEEN = _rows(
    key=["a1", "a1", "a2", "b", ""],
    curve=["a", "a", "a", "b", "c"],
    density=[0.1, 0.1, 0.5, 1.0, 1.0],
    ms=[1.0, 1.21, 3.0, 2.0, 7.0],
)


def test_exact_entries_are_geometric_means() -> None:
    ms, sigma, source = StepTable.fit(SEEN).price(SEEN.iloc[[0, 2]])
    np.testing.assert_allclose(ms, [1.1, 3.0])
    assert source.tolist() == [0, 0]
    assert sigma[0] < sigma[1]  # seen twice, seen once


def test_between_densities_the_curve_answers_and_beyond_nothing_does() -> None:
    asked = _rows(key=["x", "x", "x", "x"], curve=["a", "a", "a", "unknown"], density=[0.3, 0.05, 0.9, 0.3])
    ms, sigma, source = StepTable.fit(SEEN).price(asked)
    assert source.tolist() == [1, -1, -1, -1]
    assert ms[0] == pytest.approx(2.05, rel=0.01)
    assert sigma[0] > 0
    assert np.isnan(ms[1:]).all()


def test_a_step_without_a_key_is_answered_by_its_curve_only() -> None:
    _, _, source = StepTable.fit(SEEN).price(_rows(key=[""], curve=["c"], density=[1.0]))
    assert source.tolist() == [1]


def test_the_spread_is_estimated_from_steps_met_in_several_networks() -> None:
    rng = np.random.default_rng(0)
    keys = [f"k{i}" for i in range(100) for _ in range(4)]
    frame = _rows(key=keys, curve=keys, density=[1.0] * 400, ms=list(np.exp(0.02 * rng.standard_normal(400))))
    assert StepTable.fit(frame).spread == pytest.approx(0.02, rel=0.15)
    assert StepTable.fit(SEEN).spread == SPREAD


def test_no_rows_make_a_table_that_knows_nothing() -> None:
    assert StepTable.fit(SEEN.iloc[:0]).price(SEEN)[2].tolist() == [-1] * len(SEEN)


def test_json_there_and_back() -> None:
    table = StepTable.fit(SEEN)
    again = StepTable.from_dict(json.loads(json.dumps(table.to_dict())))
    for a, b in zip(table.price(SEEN), again.price(SEEN)):
        np.testing.assert_array_equal(a, b)


def test_a_single_point_makes_the_curve_that_fitting_it_would() -> None:
    table = StepTable.fit(SEEN)
    fitted = Curve.fit([1.0], [2.0], [table.spread])
    found = table.curves["b"]
    for name, value in fitted.to_dict().items():
        assert found.to_dict()[name] == (None if value is None else pytest.approx(value))
    assert found.predict(0.5) == fitted.predict(0.5)
