"""What the measurement store keeps: its tables, and frames checked, taken apart and put together again.

    epoch        one state of one runtime's environment          step         one distinct step, its exact key text included
    opening      each time it was opened: environment, sentinels  observation  one step in one measured network
    network      one measured network, with its rounds

Start with `SCHEMA`, `checked` and `packed_networks`; `hw_models.store` is what one uses.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.workload import STEP_NUMBERS, STEP_TEXTS

__all__ = [
    "NETWORK_NUMBERS",
    "NETWORK_TEXTS",
    "NETWORK_WHOLE",
    "OBSERVED_NUMBERS",
    "QUALITIES",
    "SCHEMA",
    "checked",
    "columns",
    "facts_of",
    "packed_networks",
    "packed_rounds",
    "packed_steps",
    "unpacked_rounds",
]

QUALITIES = ("ok", "thin", "unreached")
OBSERVED_NUMBERS = ("ms", "lo_ms", "hi_ms")
NETWORK_TEXTS = ("name", "quality", "group", "digest")
NETWORK_NUMBERS = ("ms", "lo_ms", "hi_ms", "median_ms", "p90_ms", "sum_ms")
NETWORK_WHOLE = ("steps", "calls", "weight_bytes", "arena_bytes", "batch", "threads")


def columns(names: tuple[str, ...], kind: str = "") -> str:
    """A list of SQL columns, in quotes: group, groups and window are words of SQL."""
    return ", ".join(f'"{name}" {kind}'.strip() for name in names)


SCHEMA = f"""
CREATE TABLE IF NOT EXISTS epoch (
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, runtime TEXT NOT NULL, started_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS opening (
    id INTEGER PRIMARY KEY, epoch INTEGER NOT NULL REFERENCES epoch, opened_at TEXT NOT NULL,
    environment TEXT NOT NULL, sentinels TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS step (
    id INTEGER PRIMARY KEY, facts BLOB NOT NULL UNIQUE,
    {columns(STEP_TEXTS, "TEXT NOT NULL")}, {columns(STEP_NUMBERS, "REAL")}, more TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS network (
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL REFERENCES epoch, measured_at TEXT NOT NULL,
    {columns(NETWORK_TEXTS, "TEXT NOT NULL")}, {columns(NETWORK_NUMBERS, "REAL")}, {columns(NETWORK_WHOLE, "INTEGER NOT NULL")},
    more TEXT NOT NULL, rounds BLOB NOT NULL, observed INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS observation (
    id INTEGER PRIMARY KEY, network INTEGER NOT NULL REFERENCES network, step INTEGER NOT NULL REFERENCES step,
    {columns(OBSERVED_NUMBERS, "REAL NOT NULL")}, quality TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS network_by_epoch ON network (epoch);
CREATE INDEX IF NOT EXISTS opening_by_epoch ON opening (epoch);
CREATE INDEX IF NOT EXISTS observation_by_network ON observation (network);
"""


def checked(steps: pd.DataFrame, networks: pd.DataFrame) -> None:
    """Refuse frames that cannot be kept as they are.

    Args:
        steps, networks: see `MeasurementStore.add_networks`.

    Raises:
        ValueError: a column is missing, a time is not a positive number (of a step: negative or not finite), a quality is
            unknown, a network is listed twice or steps belong to none; names row and column.
    """
    _has(steps, "steps", (*STEP_TEXTS, *STEP_NUMBERS, *OBSERVED_NUMBERS, "network", "quality"))
    _has(networks, "networks", ("name", "ms"))
    if not networks.index.is_unique:
        twice = networks.index[networks.index.duplicated()][0]
        raise ValueError(f"networks: every network needs an index of its own, but {twice} is there twice")
    strangers = ~steps["network"].isin(networks.index)
    if strangers.any():
        raise ValueError(
            f"steps: network {steps['network'][strangers].iloc[0]} is not in the index of the networks frame; "
            f"it has {list(networks.index[:5])}..."
        )
    for frame, what in ((steps, "steps"), (networks, "networks")):
        for name in [c for c in OBSERVED_NUMBERS if c in frame]:
            values = frame[name].to_numpy(np.float64)
            bad = ~np.isfinite(values) | (values < 0) | ((values == 0) & (what == "networks"))
            if bad.any():
                where = int(np.flatnonzero(bad)[0])
                row = frame.iloc[where]
                raise ValueError(
                    f"{what}: {name} of {row.get('name', row.get('family', ''))!r} (row {where}) is {values[where]}: no time. "
                    "A measurement that failed is left out, not added"
                )
        unknown = ~frame["quality"].isin(QUALITIES) if "quality" in frame else pd.Series(False, frame.index)
        if unknown.any():
            raise ValueError(f"{what}: quality must be one of {QUALITIES}, got {frame['quality'][unknown].iloc[0]!r}")
    for name in [c for c in NETWORK_WHOLE if c in networks]:
        values = networks[name].to_numpy(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"networks: {name} must be a whole number, got {values[~np.isfinite(values)][0]}")


def packed_networks(networks: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of the network table: numbers that are missing are NaN, whole numbers 0 (batch and threads 1), texts "" (quality
    "unreached"), intervals the time itself; further columns as JSON."""
    given = dict(zip(networks.columns, zip(*networks.itertuples(index=False, name=None)))) if len(networks) else {}
    size = len(networks)
    ones = dict.fromkeys(("batch", "threads"), 1)
    table: dict[str, list[Any]] = {}
    for name in NETWORK_TEXTS:
        text = "unreached" if name == "quality" else ""
        table[name] = [str(v) for v in given.get(name, [text] * size)]
    for name in NETWORK_NUMBERS:
        missing: Any = given["ms"] if name in ("lo_ms", "hi_ms") else [float("nan")] * size
        table[name] = [float(v) for v in given.get(name, missing)]
    for name in NETWORK_WHOLE:
        table[name] = [int(v) for v in given.get(name, [ones.get(name, 0)] * size)]
    table["more"] = _more(networks, table)
    return [dict(zip(table, row)) for row in zip(*table.values())]


def packed_steps(steps: pd.DataFrame) -> list[tuple[bytes, dict[str, Any], tuple[Any, ...]]]:
    """(16 bytes that are the same for equal steps, row of the step table, (ms, lo_ms, hi_ms, quality)) of each row."""
    texts = [[str(v) for v in steps[name]] for name in STEP_TEXTS]
    numbers = [[None if v != v else v for v in steps[name].to_numpy(np.float64).tolist()] for name in STEP_NUMBERS]
    more = _more(steps, (*STEP_TEXTS, *STEP_NUMBERS, *OBSERVED_NUMBERS, "network", "quality", "epoch"))
    times = [steps[name].to_numpy(np.float64).tolist() for name in OBSERVED_NUMBERS]
    observed = zip(*times, [str(q) for q in steps["quality"]])
    names = (*STEP_TEXTS, *STEP_NUMBERS, "more")
    rows = [dict(zip(names, values)) for values in zip(*texts, *numbers, more)]
    return [(facts_of(row), row, seen) for row, seen in zip(rows, observed)]


def facts_of(row: Mapping[str, Any]) -> bytes:
    """16 bytes that are the same for equal rows of the step table."""
    text = json.dumps([row[name] for name in (*STEP_TEXTS, *STEP_NUMBERS, "more")])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def packed_rounds(rounds: Mapping[str, npt.ArrayLike]) -> bytes:
    """Arrays by name as the bytes of a compressed NPZ; numbers only."""
    arrays = {name: np.asarray(values, np.float64) for name, values in rounds.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return zlib.compress(buffer.getvalue(), 6)


def unpacked_rounds(blob: bytes) -> dict[str, npt.NDArray[np.float64]]:
    """What `packed_rounds` packed."""
    with np.load(io.BytesIO(zlib.decompress(blob)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _has(frame: pd.DataFrame, what: str, wanted: tuple[str, ...]) -> None:
    missing = [name for name in wanted if name not in frame]
    if missing:
        raise ValueError(f"{what}: the columns {missing} are missing; found {list(frame.columns)}")


def _more(frame: pd.DataFrame, known: Any) -> list[str]:
    """What stands in columns this version does not know, as JSON per row."""
    others: list[Hashable] = [name for name in frame.columns if name not in known]
    if not others:
        return ["{}"] * len(frame)
    return [
        json.dumps({str(name): _plain(value) for name, value in zip(others, row)}, sort_keys=True)
        for row in frame[others].itertuples(index=False, name=None)
    ]


def _plain(value: Any) -> Any:
    """A number, text, truth value or None as Python's own, for JSON; anything else is refused by JSON."""
    return value.item() if isinstance(value, np.generic) else value
