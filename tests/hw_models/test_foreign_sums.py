"""Networks as sums of the times of their operations: curves over density, corrections, prices of what is not in the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hw_models.foreign import TableModel, fit_table

DENSITIES = (1.0, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)
DENSE = np.random.default_rng(3).uniform(0.2, 3.0, 12)


def time_of(layer: int, density: float) -> float:
    """Dense has its own kernel; the sparse one takes a floor and so much per kept weight."""
    return float(DENSE[layer] if density == 1 else DENSE[layer] * (0.12 + 1.7 * density))


def profile(name: str, densities: list[float], with_ms: bool = True, layers: int = 12) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "network": name,
            "kind": "conv",
            "layer": [f"layer{i}" for i in range(layers)],
            "macs": 1e7 * DENSE[:layers],
            "density": densities[:layers],
            "ms": [time_of(i, d) if with_ms else np.nan for i, d in enumerate(densities[:layers])],
        }
    )


def table() -> pd.DataFrame:
    """The same network, uniformly sparse, at each density."""
    return pd.concat([profile(f"uniform{d}", [d] * 12) for d in DENSITIES], ignore_index=True)


def test_mixed_profiles_are_sums_of_curves() -> None:
    model = fit_table(table())
    rng = np.random.default_rng(0)
    mixed = [[float(d) for d in np.where(rng.random(12) < 0.2, 1.0, rng.uniform(0.02, 0.6, 12))] for _ in range(20)]
    asked = pd.concat([profile(f"mixed{i}", d, with_ms=False) for i, d in enumerate(mixed)])
    predicted = model.predict_many(asked)
    truth = [sum(time_of(i, d) for i, d in enumerate(densities)) for densities in mixed]
    assert predicted["ms"].to_numpy() == pytest.approx(truth, rel=1e-6)
    assert set(predicted["source"]) == {"interpolated"}


def test_measured_profiles_are_measured_and_own_times_are_taken() -> None:
    model = fit_table(table())
    asked = profile("again", [0.2] * 12, with_ms=False)
    assert model.predict(asked)["source"] == "measured"
    asked["ms"] = 7.0
    assert model.predict(asked)["ms"] == pytest.approx(84.0)


def test_density_beyond_the_table_is_not_interpolated_and_stays_above_the_floor() -> None:
    model = fit_table(table())
    answer = model.predict(profile("sparser", [0.001] * 12, with_ms=False))
    assert answer["source"] == "learned"
    assert answer["ms"] > 0.5 * sum(time_of(i, 0.01) for i in range(12))


def test_an_operation_without_a_curve_is_priced_by_its_work() -> None:
    asked = profile("new", [1.0] * 12, with_ms=False).assign(layer="unknown")
    answer = fit_table(table()).predict(asked)
    assert answer["source"] == "learned"
    assert answer["ms"] == pytest.approx(DENSE.sum(), rel=0.1)
    lonely = fit_table(profile("one", [1.0] * 2, layers=2))
    with pytest.raises(ValueError, match="not in the table"):
        lonely.predict(asked)


def overcount(density: float) -> float:
    return float(np.exp(-0.01 * np.log(density) ** 2))


def test_the_correction_of_one_network_carries_to_another() -> None:
    operations = table()
    whole = {f"uniform{d}": overcount(d) * sum(time_of(i, d) for i in range(12)) for d in DENSITIES}
    model = fit_table(operations, whole)
    other = pd.concat([profile(f"short{d}", [d] * 5, layers=5) for d in DENSITIES])
    truth = [overcount(d) * sum(time_of(i, d) for i in range(5)) for d in DENSITIES]
    assert model.predict_many(other)["ms"].to_numpy() == pytest.approx(truth, rel=0.03)
    plain = fit_table(operations).predict_many(other)["ms"].to_numpy()
    assert abs(plain[-1] / truth[-1] - 1) > 0.15


def test_without_a_need_the_correction_is_nothing() -> None:
    operations = table()
    whole = operations.groupby("network", sort=False)["ms"].sum()
    predicted = fit_table(operations, whole).predict_many(operations)
    assert predicted["ms"].to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-6)


def test_patterns_have_curves_of_their_own() -> None:
    block = table().assign(pattern="4-block")
    block.loc[block["density"] < 1, "ms"] *= 0.5
    block["network"] = "block " + block["network"]
    both = pd.concat([table().assign(pattern="unstructured"), block], ignore_index=True)
    model = fit_table(both)
    for pattern, factor in (("unstructured", 1.0), ("4-block", 0.5)):
        asked = profile("x", [0.3] * 12, with_ms=False).assign(pattern=pattern)
        assert model.predict(asked)["ms"] == pytest.approx(factor * sum(time_of(i, 0.3) for i in range(12)))


def test_a_saved_table_of_curves_says_the_same(tmp_path: Path) -> None:
    model = fit_table(table())
    model.save(tmp_path / "curves")
    asked = profile("x", [0.3] * 12, with_ms=False)
    pd.testing.assert_frame_equal(TableModel.load(tmp_path / "curves").predict_many(asked), model.predict_many(asked))


def test_without_times_of_networks_or_operations_there_is_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="no row has a time"):
        fit_table(table().drop(columns="ms"))
