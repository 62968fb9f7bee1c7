"""How each column is named, given a unit, rounded and written for people; shared by tables, pictures and pages.

The frame keeps exact numbers; what is rounded here is only shown. Start with `label`, `show` and `direction_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

LABELS: dict[str, str] = {
    "trial": "trial",
    "state": "state",
    "searcher": "searcher",
    "epochs": "epochs",
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "train_accuracy": "training accuracy",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "latency_ms": "latency (ms)",
    "latency_lo_ms": "latency, lower end (ms)",
    "latency_hi_ms": "latency, upper end (ms)",
    "latency_source": "latency is",
    "latency_search_ms": "latency during the search (ms)",
    "latency_search_lo_ms": "latency during the search, lower end (ms)",
    "latency_search_hi_ms": "latency during the search, upper end (ms)",
    "latency_search_source": "latency during the search was",
    "latency_verified": "latency measured again at the end",
    "latency_quality": "latency quality",
    "energy_mj": "energy (mJ)",
    "energy_method": "energy is",
    "params": "parameters, dense",
    "nnz": "non-zeros",
    "density": "density",
    "kept_weights": "kept weights of convolutions and linear layers",
    "dead_channels": "dead channels",
    "channels": "channels",
    "skip_pool_share": "share of skips and pools",
    "weight_bytes": "weights (bytes)",
    "dense_macs": "multiply-adds, dense",
    "macs": "multiply-adds, kept",
    "duration_s": "duration (s)",
    "digest": "digest",
    "error": "error",
}
"""Column -> what it is called in prose and on an axis, with its unit."""

SHORT: dict[str, str] = {
    "val_accuracy": "val acc",
    "test_accuracy": "test acc",
    "latency_ms": "latency ms",
    "latency_quality": "quality",
    "latency_source": "source",
    "energy_mj": "energy mJ",
    "params": "params",
    "nnz": "non-zeros",
    "kept_weights": "kept weights",
    "dead_channels": "dead",
    "skip_pool_share": "skip/pool",
    "weight_bytes": "bytes",
    "dense_macs": "dense MACs",
    "macs": "MACs",
    "duration_s": "seconds",
}
"""Column -> header of a narrow table."""

_LARGER_IS_BETTER = ("accuracy", "score", "f1", "auc", "precision", "recall")
COUNTS = ("params", "nnz", "kept_weights", "weight_bytes", "dense_macs", "macs")
MISSING = "–"


def label(column: str) -> str:
    """Name of a column with its unit, e.g. "latency (ms)"; an unknown column is called by its own name."""
    return LABELS.get(column, column.removeprefix("arch."))


def short(column: str) -> str:
    """Header for a narrow table."""
    return SHORT.get(column, column.removeprefix("arch."))


def direction_of(column: str, objectives: Mapping[str, str]) -> str:
    """ "max" or "min": what the run says, else what the name suggests (accuracies up, costs down)."""
    if column in objectives:
        return objectives[column]
    return "max" if any(word in column.lower() for word in _LARGER_IS_BETTER) else "min"


def missing(value: Any) -> bool:
    """True for None, <NA> and NaN."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def show(column: str, value: Any) -> str:
    """A value as text: counts exact with thousands separators, accuracies with 4 decimals, times with 3 digits."""
    if missing(value):
        return MISSING
    if isinstance(value, str | bool):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        return "inf" if number > 0 else "-inf"
    if "accuracy" in column or "hypervolume" in column:
        return f"{number:.4f}"
    if column == "density" or column.endswith(".density"):
        return f"{number:.3g}"
    if column in COUNTS or isinstance(value, int) or number.is_integer():
        return f"{round(number):,}"
    return digits(number)


def digits(number: float, significant: int = 3) -> str:
    """A number with so many significant digits, never in exponent form between 1e-4 and 1e9, trailing zeros kept.

    digits(0.012345) == "0.0123", digits(1.5) == "1.50", digits(1234.5) == "1,234".
    """
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else str(number)
    rounded = float(f"{number:.{significant - 1}e}")  # 999.9 has four digits before the point
    magnitude = math.floor(math.log10(abs(rounded)))
    if not -4 <= magnitude < 9:
        return f"{number:.{significant - 1}e}"
    return f"{number:,.{max(0, significant - 1 - magnitude)}f}"


def interval(ms: Any, lo: Any, hi: Any) -> str:
    """A latency with its interval, all three to the same decimal: "0.123 [0.121, 0.130]"; in milliseconds."""
    if missing(ms):
        return MISSING
    if missing(lo) or missing(hi) or not all(math.isfinite(float(v)) for v in (ms, lo, hi)):
        return digits(float(ms))
    number = float(ms)
    decimals = max(0, 2 - math.floor(math.log10(abs(number)))) if number else 3
    return f"{number:,.{decimals}f} [{float(lo):,.{decimals}f}, {float(hi):,.{decimals}f}]"


def shorten(text: str, most: int) -> str:
    """At most so many characters; what is cut is cut at the front, as names of layers differ at their ends."""
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]


def compact(number: float) -> str:
    """A count in at most five characters: 950, 12.3k, 1.20M, 3.40G."""
    if missing(number):
        return MISSING
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor * 0.9995:
            return f"{digits(number / factor).replace(',', '')}{suffix}"
    return f"{number:.0f}" if float(number).is_integer() else digits(number)


def duration(seconds: float | None) -> str:
    """A time span for people: 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def spread(n: int, most: int) -> list[int]:
    """At most `most` indices of range(n), evenly spread, both ends among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})
