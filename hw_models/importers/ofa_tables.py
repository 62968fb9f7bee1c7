"""Once-for-All and ProxylessNAS tables: YAML or JSON,
{"expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:3-...": {mean, std or var, count}}, times in ms.

Keys give shapes as height x width x channels. In the newer tables `expand` is the number of inner channels, in the older
ones a factor: above 16 it is taken for channels. The sum over a network is what the tables' own code reports; it was not
measured.

Source: Cai et al., ProxylessNAS (ICLR 2019) and Once-for-All (ICLR 2020), LatencyTools.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from hw_models.importers.table import ImportedTable, TableFormatError, kept_columns

__all__ = ["load", "sniff"]

_NAMES = {"kernel": "kernel", "stride": "stride", "expand": "expand", "idskip": "skip", "group": "groups"}
MOST_EXPANSION = 16


def sniff(path: Path, head: bytes) -> bool:
    """Do keys with input and output shapes appear?"""
    return path.is_file() and b"input:" in head and b"output:" in head


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """Read a table."""
    text = path.read_text()
    data = json.loads(text) if text.lstrip()[:1] == "{" else _yaml(text)
    rows = [_row(str(key), value) for key, value in data.items()]
    if not rows:
        raise TableFormatError("no operations in it")
    frame = kept_columns(pd.DataFrame(rows))
    if "expand" in frame and frame["expand"].max() > MOST_EXPANSION:
        frame = frame.rename(columns={"expand": "mid"})
    note = "times of operations; networks are their sums, not measured"
    return ImportedTable(None, frame, {"source": "Once-for-All / ProxylessNAS table", "unit": "ms", "note": note})


def _row(key: str, value: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"network": key, "kind": key.split("-", 1)[0]}
    for name, given in re.findall(r"-([A-Za-z_]+):([0-9x.]+)", key):
        if name in ("input", "output"):
            sizes = [int(float(part)) for part in given.split("x")]
            row["c_in" if name == "input" else "c_out"] = sizes[-1]
            if name == "output":
                row["h"], row["w"] = (sizes[0], sizes[1]) if len(sizes) == 3 else (1, 1)
        else:
            row[_NAMES.get(name, name)] = float(given)
    if not isinstance(value, dict):
        return row | {"ms": _float(value, key)}
    if "mean" not in value:
        raise TableFormatError(f"{key}: expected 'mean' among {', '.join(map(str, value))}")
    row["ms"] = _float(value["mean"], key)
    if "std" in value:
        row["std_ms"] = _float(value["std"], key)
    elif "var" in value:
        row["std_ms"] = math.sqrt(max(_float(value["var"], key), 0.0))
    if "count" in value:
        row["measured_count"] = _float(value["count"], key)
    return row


def _float(value: Any, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TableFormatError(f"{key}: expected a number, got {value!r}") from error


def _yaml(text: str) -> dict[str, Any]:
    """Two levels of YAML: `key:` and, indented or in braces, `name: number`."""
    table: dict[str, Any] = {}
    current: dict[str, Any] | None = None
    pending = ""
    for at, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith(("#", "---", "...", "%")):
            continue
        if line[0] not in " \t":
            if words.startswith("? "):  # a long key on a line of its own
                pending = words[2:].strip().strip("'\"")
                current = table.setdefault(pending, {})
                continue
            if words.startswith(": ") and pending:
                words, line = words[2:].strip(), " "
                name, _, value = words.partition(":")
                table[pending][name.strip()] = value.strip()
                continue
            found = re.fullmatch(r"""(?P<q>['"]?)(?P<key>.+?)(?P=q):(?:\s+(?P<value>.*))?""", words)
            if found is None:
                raise TableFormatError(f"line {at}: expected 'key:', found {words[:60]!r}")
            value = (found["value"] or "").strip()
            if value.startswith("{"):
                table[found["key"]] = dict(
                    part.strip().split(":", 1) for part in value.strip("{} ").split(",") if ":" in part
                )
            elif value:
                table[found["key"]] = value
            else:
                current = table.setdefault(found["key"], {})
            continue
        name, colon, value = words.removeprefix(": ").partition(":")
        if not colon or current is None:
            raise TableFormatError(f"line {at}: expected 'name: number', found {words[:60]!r}")
        current[name.strip().strip("'\"")] = value.strip()
    return table
