"""Profiles made of thin air, for tests of what shows them; nothing here is a measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from hw_models.measure import Measurement
from hw_models.model import PART_COLUMNS, Estimate
from hw_models.profile import Profile
from tests.nas.synthetic_run import plan_row

LAYERS = (  # name, density, kernel, ms, dense ms, sparse ms, crossover
    ("stem", 1.0, "torch", 0.20, 0.20, 0.45, 0.1),
    ("body.0", 0.05, "specialised", 0.10, 0.60, 0.10, 0.31),
    ("body.1", 0.25, "portable", 0.50, 0.40, 0.50, 0.18),
    ("body.2", 0.01, "specialised", 0.02, 0.60, 0.02, 1.0),
)


def make_profile(*, measured: bool = True, predicted: bool = True, crossovers: bool = True, more: int = 0) -> Profile:
    """Four layers and an addition; `more` layers like the last."""
    rows: list[dict[str, Any]] = []
    layers = [*LAYERS, *((f"more.{i}", *LAYERS[-1][1:]) for i in range(more))]
    for name, density, kernel, ms, dense, sparse, crossover in layers:
        row = plan_row(name, "conv2d", (64, 64, 3, 3), (1, 64, 14, 14), density, "unstructured", post="relu")
        rows.append(
            row | {"kernel": kernel, "ms": ms, "dense_ms": dense, "sparse_ms": sparse, "crossover_density": crossover}
        )
    add = plan_row("body/add", "add", (), (1, 64, 14, 14))
    rows.append(add | {"kernel": "torch", "ms": 0.03, "sparse_ms": np.nan, "crossover_density": np.nan})
    table = pd.DataFrame(rows)
    table["torch_ms"] = table["portable_ms"] = table["specialised_ms"] = np.nan
    table["share"] = table["ms"] / table["ms"].sum()
    for name, factor in (("", 1.1), ("lo_", 0.9), ("hi_", 1.4)):
        table[f"predicted_{name}ms"] = factor * table["ms"] if predicted else np.nan
    table["predicted_source"] = "interpolated" if predicted else ""
    for name in ("dense_ms", "sparse_ms"):
        table[f"predicted_{name}"] = 1.1 * table[name] if predicted else np.nan
    table["energy_mj"] = 5 * table["ms"]
    if not crossovers:
        table["crossover_density"] = np.nan
    total, all_dense = float(table["ms"].sum()), float(table["dense_ms"].sum()) + 0.03
    found = Profile(table, 1, 1, model="a model of thin air" if predicted else "", notes=("nothing here is true",))
    if measured:
        found = replace(found, measured=_measured(total), dense=_measured(all_dense))
    else:
        found.table[["ms", "dense_ms", "sparse_ms"]] = np.nan
    if predicted:
        found = replace(found, predicted=_predicted(total), predicted_dense=_predicted(all_dense))
    return found


def _measured(ms: float) -> Measurement:
    return Measurement(ms, 0.99 * ms, 1.02 * ms, 1.1 * ms, 1.3 * ms, "ok", (ms,))


def _predicted(ms: float) -> Estimate:
    return Estimate(1.1 * ms, 0.9 * ms, 1.4 * ms, "interpolated", pd.DataFrame(columns=PART_COLUMNS))
