"""Lists of latencies, one number per network of a known space: HELP's .pt files, LatBench pickles, plain JSON or text lists.

A file is one device; a folder of such files is one column per device. HELP's NAS-Bench-201 lists are in the order of the
benchmark's own numbers (15,625 of them); a dictionary by cell (string, or six operations as LatBench writes them) is put
into that order.

Source: Lee et al., HELP (NeurIPS 2021), data/<space>/latency/*.pt; Dudziak et al., BRP-NAS (NeurIPS 2020), LatBench.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw_models.importers.lookup_texts import UNITS
from hw_models.importers.pickles import is_pickle, is_torch, load_pickle, load_torch
from hw_models.importers.table import ImportedTable, TableFormatError, first_bytes

__all__ = ["load", "sniff"]

SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".json", ".npy", ".txt")


def sniff(path: Path, head: bytes) -> bool:
    """Is this a folder with such files, a torch file, a pickle, an array, or a bare JSON or text list of numbers?"""
    if path.is_dir():
        return any(p.suffix in SUFFIXES for p in path.iterdir())
    if is_pickle(head) or is_torch(path) or head.startswith(b"\x93NUMPY"):
        return True
    if path.suffix == ".json":
        return head.lstrip()[:1] == b"[" or b"|nor_conv" in head or b"~0|" in head or _keys(head)
    words = head.split(b"\n")[0].split()
    return path.suffix == ".txt" and len(words) == 1 and _number(words[0])


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """Read one list, or a folder of lists.

    Raises:
        TableFormatError: a file is no list of numbers; in a folder such files are named in `problems`.
    """
    scale = UNITS[unit or "ms"]
    if not path.is_dir():
        return ImportedTable(
            pd.DataFrame({"ms": _series(path) * scale}),
            None,
            {"source": "list of latencies", "device": path.stem, "unit": "ms"},
        )
    found: dict[str, pd.Series] = {}
    problems = []
    for file in sorted(p for p in path.iterdir() if p.suffix in SUFFIXES):
        try:
            series = _series(file) * scale
            if series.index.has_duplicates:
                raise TableFormatError(f"network {series.index[series.index.duplicated()][0]!r} appears twice")
            name = file.stem if f"{file.stem}_ms" not in found else file.name
            found[f"{name}_ms"] = series
        except TableFormatError as error:
            problems.append(f"{file.name} was left out: {error}")
    if not found:
        raise TableFormatError(f"no file in {path} is a list of latencies: " + "; ".join(problems))
    frame = pd.DataFrame(found)
    frame.index.name = "network"
    return ImportedTable(frame, None, {"source": "lists of latencies", "unit": "ms"}, problems)


def _series(path: Path) -> pd.Series:
    """float, index network."""
    data = _data(path)
    if isinstance(data, dict) and len(data) == 1 and isinstance(next(iter(data.values())), dict | list):
        data = next(iter(data.values()))
    if isinstance(data, dict) and set(data) & {"latency", "lat", "latencies"}:
        data = next(data[k] for k in ("latency", "lat", "latencies") if k in data)
    if isinstance(data, dict):
        if not data:
            raise TableFormatError("an empty dictionary")
        return _by_cell(data)
    if hasattr(data, "tolist"):
        data = data.tolist()
    if not isinstance(data, list | tuple) or not len(data):
        raise TableFormatError(f"expected a list of numbers, found {type(data).__name__}")
    try:
        values = np.array([float("nan") if v is None else float(v) for v in data])
    except (TypeError, ValueError) as error:
        raise TableFormatError(f"expected a list of numbers: {error}") from error
    return pd.Series(values, index=pd.RangeIndex(len(values), name="network"))


def _data(path: Path) -> Any:
    head = first_bytes(path, 64)
    if is_torch(path):
        return load_torch(path)
    if head.startswith(b"\x93NUMPY"):
        return np.load(path, allow_pickle=False)
    if is_pickle(head):
        return load_pickle(path)
    text = path.read_text(errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return [float(word) for word in text.split()]
        except ValueError as error:
            raise TableFormatError(f"neither JSON nor numbers: {error}") from error


def _by_cell(data: dict[Any, Any]) -> pd.Series:
    """By NAS-Bench-201 number where the keys are cells, else by the keys as they are."""
    from hw_models.lowered_cells import arch_index

    values = []
    for key, value in data.items():
        number = value.get("latency", value.get("mean")) if isinstance(value, dict) else value
        try:
            if number is None or np.size(number) == 0:
                raise TypeError("nothing")
            values.append(float(np.asarray(number, dtype=float).mean()))
        except (TypeError, ValueError) as error:
            raise TableFormatError(f"expected numbers by network, got {value!r} for {key!r}") from error
    keys: list[Any] = []
    for key in data:
        try:
            cell = json.loads(key) if isinstance(key, str) and (key[:1] == "[" or key.isdecimal()) else key
            keys.append(arch_index(cell) if isinstance(cell, str | tuple | list) else int(cell))
        except (ValueError, TypeError):
            return pd.Series(values, index=pd.Index([str(k) for k in data], name="network"))
    return pd.Series(values, index=pd.Index(keys, name="network")).sort_index()


def _keys(head: bytes) -> bool:
    """Does this JSON begin with an object whose first key is a number or six operations?"""
    return re.match(rb'\s*\{\s*"(\[|\d)', head) is not None


def _number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
