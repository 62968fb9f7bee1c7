"""TF-NAS: a pickle, {"base": ms, "MBInvertedResBlock_112_16_0_24_k3_s2_relu": {inner channels: ms}}.

Keys: block, input size, channels in, squeeze channels (0: none), channels out, kernel, stride, activation.

Source: Hu et al., TF-NAS (ECCV 2020), latency_pkl.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from hw_models.importers.pickles import is_pickle, load_pickle
from hw_models.importers.table import ImportedTable, TableFormatError

__all__ = ["load", "sniff"]

_KEY = re.compile(
    r"(?P<kind>\w+?)_(?P<hw>\d+)_(?P<c_in>\d+)_(?P<se>\d+)_(?P<c_out>\d+)_k(?P<kernel>\d+)_s(?P<stride>\d+)_(?P<act>\w+)"
)


def sniff(path: Path, head: bytes) -> bool:
    """Is this a pickle?"""
    return path.is_file() and is_pickle(head)


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """Read a table."""
    data = load_pickle(path)
    found = {key: _KEY.fullmatch(str(key)) for key in data} if isinstance(data, dict) else {}
    if not any(found.values()):
        raise TableFormatError("expected keys such as 'MBI_112_16_0_24_k3_s2_relu'")
    rows: list[dict[str, Any]] = []
    for key, table in data.items():
        match = found[key]
        if match is None or not isinstance(table, dict):
            continue
        shape: dict[str, Any] = {name: int(match[name]) for name in ("c_in", "se", "c_out", "kernel", "stride")}
        size = -(-int(match["hw"]) // shape["stride"])
        for mid, ms in table.items():
            place = {
                "network": f"{key}/{mid}",
                "kind": match["kind"],
                **shape,
                "act": match["act"],
                "h": size,
                "w": size,
            }
            rows.append({**place, "mid": int(mid), "ms": float(ms)})
    known: dict[str, Any] = {"source": "TF-NAS table", "unit": "ms"}
    if "base" in data:
        known["base_ms"] = float(data["base"])
    return ImportedTable(None, pd.DataFrame(rows), known)
