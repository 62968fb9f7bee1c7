"""What real tables get wrong: `check(table)` lists it, and changes nothing.

Times that cannot be, seconds among milliseconds, rows filled in by interpolation, one device under two names, timers of whole
milliseconds, sums of tables given out as measurements.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.importers.table import ImportedTable

__all__ = ["check", "check_operations", "check_times"]

Floats = NDArray[np.float64]
MOST_PAIRS = 400


def check(table: ImportedTable) -> list[str]:
    """Everything doubtful about a table, one sentence each, the column first."""
    problems: list[str] = []
    if table.networks is not None:
        problems += check_times(table.networks)
    if table.operations is not None:
        problems += check_operations(table.operations)
    return problems


def check_times(frame: pd.DataFrame) -> list[str]:
    """Doubts about times of networks.

    Args:
        frame: index network; times in columns `ms` or `..._ms`.
    """
    columns = _times(frame)
    problems = (
        [f"{frame.index.duplicated().sum()} networks appear more than once"] if frame.index.has_duplicates else []
    )
    for name, values in columns.items():
        problems += _impossible(name, values) + _coarse(name, values) + _outlying(name, values)
        if len(values) == 15625 and frame.index.equals(pd.RangeIndex(15625)):
            problems += _summed(name, values)
    return problems + _units(columns) + _same(columns)


def check_operations(frame: pd.DataFrame) -> list[str]:
    """Doubts about times of operations: rows of `fit_table` with times in `ms` or `..._ms`."""
    columns = _times(frame)
    problems: list[str] = []
    described = [c for c in frame.columns if not str(c).endswith(("ms", "_mj", "_count"))]
    if columns and described:
        twice = frame.duplicated(described, keep=False)
        if twice.any():
            differ = frame[twice].groupby(described, dropna=False)[list(columns)].nunique().to_numpy().max() > 1
            problems.append(
                f"{int(twice.sum())} operations appear more than once" + (" with different times" if differ else "")
            )
    for name, values in columns.items():
        problems += _impossible(name, values) + _coarse(name, values) + _interpolated(name, values, frame)
    return problems + _units(columns) + _same(columns)


def _times(frame: pd.DataFrame) -> dict[str, Floats]:
    return {
        str(c): pd.to_numeric(frame[c], errors="coerce").to_numpy(float)
        for c in frame.columns
        if (c == "ms" or str(c).endswith("_ms")) and not str(c).endswith(("std_ms", "var_ms"))
    }


def _good(values: Floats) -> Floats:
    return values[np.isfinite(values) & (values > 0)]


def _impossible(name: str, values: Floats) -> list[str]:
    problems = []
    for words, bad in (
        ("are -1 (did not compile or run)", values == -1),
        ("are negative", (values < 0) & (values != -1)),
        ("are 0", values == 0),
        ("are missing or not finite", ~np.isfinite(values)),
    ):
        if bad.any():
            problems.append(
                f"{name}: {int(bad.sum())} of {len(values)} values {words}, first in row {int(np.argmax(bad))}"
            )
    return problems


def _coarse(name: str, values: Floats) -> list[str]:
    good = _good(values)
    if len(good) < 8 or not np.allclose(good, np.round(good), atol=1e-9) or len(np.unique(good)) < 2:
        return []
    middle = float(np.median(good))
    return [
        f"{name}: whole milliseconds only; at the median of {middle:g} the timer alone rounds by up to {50 / middle:.1f} %"
    ]


def _outlying(name: str, values: Floats) -> list[str]:
    """Rows a thousand times off: seconds among milliseconds, or the other way round."""
    good = np.log10(_good(values))
    if len(good) < 8:
        return []
    off = good - np.median(good)
    found = []
    for side, words in ((-1, "seconds among milliseconds?"), (1, "microseconds among milliseconds?")):
        rows = np.abs(off - 3 * side) < 0.7
        between = np.abs(off - 1.5 * side) < 0.5
        if rows.any() and rows.sum() > between.sum():
            found.append(
                f"{name}: {int(rows.sum())} values are about 1000 times {'below' if side < 0 else 'above'} the others: {words}"
            )
    return found


def _units(columns: dict[str, Floats]) -> list[str]:
    """Columns a thousand times apart that move together, and networks that take no time at all."""
    problems = []
    middles = {name: float(np.median(_good(v))) for name, v in columns.items() if len(_good(v))}
    usual = float(np.median(list(middles.values()))) if middles else 0.0
    for name, middle in middles.items():
        if len(middles) >= 2 and 300 < usual / middle < 3000 and middle < 0.5:
            problems.append(
                f"{name}: median {middle:.3g} beside {usual:.3g} in other columns: seconds in a column of milliseconds?"
            )
    return problems


def _same(columns: dict[str, Floats]) -> list[str]:
    """Two devices that are one: equal, or one a multiple of the other."""
    problems = []
    for (a, x), (b, y) in itertools.islice(itertools.combinations(columns.items(), 2), MOST_PAIRS):
        both = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
        if both.sum() < 8 or np.ptp(x[both]) == 0:
            continue
        ratio = np.log(y[both] / x[both])
        if np.ptp(ratio) < 1e-6:
            factor = float(np.exp(ratio.mean()))
            problems.append(
                f"{a} and {b} are one: "
                + ("equal throughout" if abs(factor - 1) < 1e-6 else f"the second is {factor:.6g} x the first")
            )
    return problems


def _summed(name: str, values: Floats) -> list[str]:
    """NAS-Bench-201 holds 1,500 pairs of equal networks; measurements of equal things differ."""
    from hw_models.lowered_cells import twins

    first, second = values[twins()].T
    good = (first > 0) & (second > 0)
    if good.sum() > 100 and np.mean(np.isclose(first[good], second[good], rtol=1e-9)) > 0.95:
        return [
            f"{name}: networks that are equal have exactly equal times: sums of a table or a simulation, not measurements"
        ]
    return []


def _interpolated(name: str, values: Floats, frame: pd.DataFrame) -> list[str]:
    """Runs of rows over one number (width, say) whose times lie on straight lines to the last digit."""
    ignore = {"network", "count", "ms", name}
    numbers = [
        c
        for c in frame.columns
        if c not in ignore and pd.api.types.is_numeric_dtype(frame[c]) and frame[c].nunique() > 8
    ]
    numbers = [c for c in numbers if not str(c).endswith(("_ms", "_mj"))]
    for axis in numbers:
        others = [
            c for c in frame.columns if c not in (*ignore, axis) and not str(c).endswith(("_ms", "_mj", "_count"))
        ]
        groups = frame.assign(_t=values).groupby(others, dropna=False) if others else [((), frame.assign(_t=values))]
        flat = total = 0
        for _, rows in groups:
            if len(rows) < 8 or rows[axis].duplicated().any():
                continue
            rows = rows.sort_values(axis)
            x, y = rows[axis].to_numpy(float), rows["_t"].to_numpy(float)
            slope = np.diff(y) / np.diff(x)
            bend = np.abs(np.diff(slope))
            flat += int(np.sum(bend <= 1e-6 * np.maximum(np.abs(slope[1:]), np.abs(y[1:-1]) * 1e-3)))
            total += len(bend)
        if total >= 6 and flat > 0.3 * total:
            return [
                f"{name}: {flat / total:.0%} of the values over {axis} lie exactly on straight lines: filled in by interpolation"
            ]
    return []
