"""HW-NAS-Bench: one pickle, {"nasbench201": {data set: {metric: [15,625 values]}}, "fbnet": {metric: {operation: value}}}.

Latencies in ms, energies in mJ. The NAS-Bench-201 half is of whole networks; the FBNet half is a table of operations that the
benchmark's own API adds up: not a measurement of networks. -1 (Edge TPU) means that a network did not compile.

Source: Li et al., HW-NAS-Bench (ICLR 2021), file HW-NAS-Bench-v1_0.pickle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw_models.importers.pickles import is_pickle, load_pickle
from hw_models.importers.table import ImportedTable, TableFormatError

__all__ = ["load", "operation_from_key", "sniff"]

_UNITS = {"latency": "ms", "energy": "mj"}
_FIELD = re.compile(r"_([A-Za-z]+?)(\d+(?:\.\d+)?)(?=_|$)")
_NAMES = {
    "h": "h_in",
    "w": "w_in",
    "cin": "c_in",
    "cout": "c_out",
    "exp": "expand",
    "kernel": "kernel",
    "stride": "stride",
}
_NAMES |= {"group": "groups", "groups": "groups"}


def sniff(path: Path, head: bytes) -> bool:
    """Is this a pickle?"""
    return path.is_file() and is_pickle(head)


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """Read the benchmark's pickle."""
    data = load_pickle(path)
    spaces = {"nasbench201", "fbnet"} & set(data) if isinstance(data, dict) else set()
    if not spaces:
        raise TableFormatError("expected a dictionary with 'nasbench201' or 'fbnet' of HW-NAS-Bench")
    networks = _networks(data["nasbench201"]) if "nasbench201" in spaces else None
    operations = _operations(data["fbnet"]) if "fbnet" in spaces else None
    note = "times of operations are per operation of FBNet; their sum is not a measured network"
    return ImportedTable(networks, operations, {"source": "HW-NAS-Bench", "unit": "ms, mJ", "note": note})


def _networks(space: dict[str, Any]) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    flat = all(not isinstance(v, dict) for v in space.values())
    for dataset, metrics in ({"": space} if flat else space).items():
        for metric, values in metrics.items():
            name = _column(metric)
            listed = [values[i] for i in sorted(values)] if isinstance(values, dict) else values
            if metric == "config" or not len(listed) or isinstance(listed[0], dict):
                continue
            columns[f"{dataset}.{name}" if dataset else name] = np.asarray(listed, dtype=float)
    if not columns or len({len(v) for v in columns.values()}) != 1:
        raise TableFormatError("nasbench201: expected lists of equal length, one value per network")
    frame = pd.DataFrame(columns)
    frame.index.name = "network"
    return frame


def _operations(space: dict[str, Any]) -> pd.DataFrame:
    by_key: dict[str, dict[str, Any]] = {}
    for metric, table in space.items():
        if not isinstance(table, dict):
            continue
        if table and all(isinstance(v, dict) for v in table.values()):  # one more level, e.g. the data set
            table = {key: value for inner in table.values() for key, value in inner.items()}
        for key, value in table.items():
            row = by_key.setdefault(str(key), {"network": str(key), **operation_from_key(str(key))})
            row[_column(metric)] = float(value)
    return pd.DataFrame(list(by_key.values()))


def _column(metric: str) -> str:
    for word, unit in _UNITS.items():
        if metric.endswith(f"_{word}"):
            return metric.removesuffix(f"_{word}") + f"_{unit}"
    return metric


def operation_from_key(key: str) -> dict[str, Any]:
    """`ConvBlock_H28_W28_Cin24_Cout32_exp6_kernel3_stride2_group1` as columns; sizes of the output follow from input and stride."""
    row: dict[str, Any] = {"kind": re.split(r"_(?=[A-Za-z]+\d)", key, maxsplit=1)[0]}
    for name, value in _FIELD.findall(key):
        row[_NAMES.get(name.lower(), name.lower())] = float(value) if "." in value else int(value)
    for side in ("h", "w"):
        size = row.pop(f"{side}_in", None)
        if size is not None:
            pooled = row["kind"].lower().startswith("avgp") and row.get("kernel") == size
            row[side] = 1 if pooled else -(-size // int(row.get("stride", 1)))
    return row
