"""From predictions to tables: every figure beside its noise ceiling and its target.

A *prediction frame* has one row per network: setting, group, measured_ms, known (share of its time in shapes the model has
measured), and what the model answered: ms, lo_ms, hi_ms, source. Start with `scored`; `by_source` and `by_setting` look closer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from benchmarks.latency import targets
from hw_models.accuracy import accuracy, noise_ceiling
from hw_models.model import SOURCES

__all__ = ["FIGURES", "by_setting", "by_source", "figures", "flat", "lines", "scored", "spread", "wide"]

FIGURES = ("hit5", "hit10", "rmspe", "mape", "bias", "spearman", "kendall", "coverage", "width")


def figures(predictions: pd.DataFrame) -> dict[str, float]:
    """`FIGURES` and n of a prediction frame; n alone where it is empty."""
    if predictions.empty:
        return {"n": 0.0}
    return accuracy(*(predictions[name] for name in ("measured_ms", "ms", "lo_ms", "hi_ms")))


def scored(row: str, predictions: pd.DataFrame, pairs: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Four rows of a table: the figures, what a perfect predictor would reach, the targets, and the verdicts.

    Args:
        row: its name in `targets.TARGETS`; a row without targets has no last two.
        predictions: a prediction frame.
        pairs: networks measured twice, in ms; see `hw_models.accuracy.noise_ceiling`.
    """
    found = figures(predictions)
    table: list[dict[str, Any]] = [{"row": row, **found}]
    if pairs:
        ceiling = noise_ceiling(pairs)
        table.append({"row": "  noise ceiling", **{name: ceiling[name] for name in ("n", *FIGURES) if name in ceiling}})
    if row in targets.TARGETS:
        table.append({"row": "  target", **targets.shown(row)})
        table.append({"row": "  verdict", **targets.verdict(row, found)})
    return table


def by_source(predictions: pd.DataFrame) -> pd.DataFrame:
    """The figures of each class of answers, the surest first: measured, interpolated, learned, analytical."""
    there = [(source, predictions[predictions["source"] == source]) for source in SOURCES]
    return pd.DataFrame([{"source": source, **figures(part)} for source, part in there if len(part)])


def by_setting(predictions: pd.DataFrame) -> pd.DataFrame:
    """The figures of each setting, and its range of measured times."""
    rows = []
    for setting, part in predictions.groupby("setting", sort=False):
        ends = {"from_ms": part["measured_ms"].min(), "to_ms": part["measured_ms"].max()}
        rows.append({"setting": setting, **ends, "known": part["known"].mean(), **figures(part)})
    return pd.DataFrame(rows)


def lines(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of `scored` as one table of text, with columns row, n and `FIGURES`."""
    table = [{name: _cell(name, row.get(name, "")) for name in ("row", "n", *FIGURES)} for row in rows]
    return pd.DataFrame(table, columns=["row", "n", *FIGURES])


def flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `scored` as (row, figure, value, ceiling, target, verdict): one per figure."""
    table: list[dict[str, Any]] = []
    beside = {"  noise ceiling": "ceiling", "  target": "target", "  verdict": "verdict"}
    of_row: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["row"] not in beside:
            of_row = {
                name: {
                    **{"row": row["row"], "figure": name, "value": row.get(name, math.nan)},
                    **{"ceiling": "", "target": "", "verdict": ""},
                }
                for name in ("n", *FIGURES)
                if name in row or name in targets.TARGETS.get(row["row"], {})
            }
            table += of_row.values()
            continue
        for name in FIGURES:
            if name in row and name in of_row:
                of_row[name][beside[row["row"]]] = row[name]
    return table


def spread(off: pd.Series) -> dict[str, float]:
    """n, and the median (typical), 90th percentile and largest (worst) of relative differences."""
    at = {"typical": 0.5, "p90": 0.9, "worst": 1.0}
    return {"n": float(len(off)), **{name: float(off.quantile(q)) for name, q in at.items()}}


def wide(row: str, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row of other figures than accuracy, as (figure, value, target, verdict) rows."""
    asked, judged = targets.shown(row), targets.verdict(row, found)
    return [
        {"row": row, "figure": name, "value": value, "target": asked.get(name, ""), "verdict": judged.get(name, "")}
        for name, value in found.items()
    ]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if name == "n" else f"{value:.4f}"
