"""Two real public tables: timm's benchmarks and SparseML's layers. Skipped where they are not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hw_models.foreign import fit_table
from hw_models.importers import ImportedTable, read

NAMES = {"timm": "timm_infer_benchmarks.parquet", "sparseml": "sparse_cpu_deepsparse_layers_mean.csv"}


def public(name: str) -> ImportedTable:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("NAS_DATA", beside)) / "hw" / NAMES[name]
    if not path.exists():
        pytest.skip(f"needs the public table {NAMES[name]}: set NAS_DATA to the folder that holds hw/")
    return read(path)


def one_run(table: ImportedTable, run: str) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Operations, times and families of one run."""
    assert table.networks is not None
    assert table.operations is not None
    networks = table.networks[table.networks["run"] == run]
    ms = table.latency().loc[lambda times: times.index.isin(networks.index)]
    operations = table.operations.drop_duplicates("network")
    operations = operations[operations["network"].isin(ms.index)]
    ms = ms[ms.index.isin(operations["network"])]
    family = networks[~networks.index.duplicated()]["model"].str.extract("^([a-z]+)")[0]
    return operations, ms, family.loc[ms.index]


def test_timm_is_read_and_its_gaps_are_named() -> None:
    table = public("timm")
    assert table.networks is not None
    assert len(table.networks) == 28768
    assert "ms: 2 of 28768 values are missing or not finite, first in row 2223" in table.problems
    assert any("taken from other runs" in p for p in table.problems)


@pytest.mark.parametrize(
    ("run", "mape", "spearman"),
    [("fp32-nchw-pt240-cpu-i7_12700h-dynamo", 0.15, 0.98), ("fp32-nchw-pt240-cpu-i9_10940x-dynamo", 0.23, 0.94)],
)
def test_whole_models_of_families_never_seen(run: str, mape: float, spearman: float) -> None:
    operations, ms, family = one_run(public("timm"), run)
    code, names = pd.factorize(family)
    out = np.random.default_rng(0).permutation(len(names))[code] % 5 == 0
    score = fit_table(operations, ms[~out], groups=family).score(operations, ms[out])
    assert score["mape"] < mape
    assert score["spearman"] > spearman
    assert 0.8 < score["coverage"] < 0.98


def test_ten_models_are_enough_for_a_cpu_that_is_nearly_additive() -> None:
    operations, ms, _ = one_run(public("timm"), "fp32-nchw-pt240-cpu-i7_12700h-dynamo")
    score = fit_table(operations, ms.sample(10, random_state=0)).score(operations, ms)
    assert score["mape"] < 0.15
    assert score["spearman"] > 0.98


def test_layers_of_sparse_networks_sum_to_the_whole_after_a_correction_from_the_other_network() -> None:
    table = public("sparseml")
    frame, ms = table.timed_operations(), table.latency()
    model = frame["layer"].str.split("/").str[0]
    for fitted, asked in (("resnet50", "mobilenet"), ("mobilenet", "resnet50")):
        own = ms[ms.index.str.startswith(fitted)]
        predicted = fit_table(frame[model == fitted], own).predict_many(frame[model == asked])
        error = (predicted["ms"] / ms.loc[predicted.index] - 1).abs()
        assert error.iloc[:3].max() < 0.05
        assert error.iloc[3] < 0.12  # at 99 % sparsity, which layers ran fused is not known from this file
