"""SparseML performance sensitivity: the tool's JSON, and the CSV of the same numbers averaged. Times in seconds.

JSON: {"num_cores", "batch_size", "results_model": {"sparse_measurements": [[sparsity, [seconds]]]}, "results": [{"id",
"name", the same}]}.
CSV: model, param ("__model__" for the whole), sparsity, seconds, batch_size, num_cores, iterations, warmup. In the CSV
layers that ran fused
repeat one value: of equal neighbours the first counts once and the others 0 times.

Source: neuralmagic/sparseml, `pruning_perf_sens`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw_models.importers.table import ImportedTable, TableFormatError

__all__ = ["load", "load_csv", "sniff", "sniff_csv"]

WHOLE = "__model__"


def sniff(path: Path, head: bytes) -> bool:
    """Are there sparse measurements?"""
    return path.is_file() and (
        b'"sparse_measurements"' in head or (b'"results_model"' in head and b'"num_cores"' in head)
    )


def sniff_csv(path: Path, head: bytes) -> bool:
    """Are the columns those of the averaged table?"""
    names = set(head.split(b"\n")[0].strip().split(b","))
    return path.is_file() and {b"param", b"sparsity", b"seconds"} <= names


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """One network per sparsity: the whole model, all its layers at that sparsity."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "results" not in data:
        raise TableFormatError("expected 'results' with sparse measurements")
    model = path.stem.removesuffix("_perf")
    rows: list[dict[str, Any]] = []
    for result in data["results"]:
        name = str(result.get("name") or result.get("id"))
        for sparsity, seconds in _measured(result):
            rows.append({"model": model, "param": name, "sparsity": sparsity, "seconds": seconds})
    for sparsity, seconds in _measured(data.get("results_model") or {}):
        rows.append({"model": model, "param": WHOLE, "sparsity": sparsity, "seconds": seconds})
    if not rows:
        raise TableFormatError("no measurement in it")
    known = {"batch": data.get("batch_size"), "threads": data.get("num_cores")}
    return _table(pd.DataFrame(rows), known, grouped=False)


def load_csv(path: Path, unit: str | None = None) -> ImportedTable:
    """The same from the averaged CSV."""
    frame = pd.read_csv(path)
    known = {}
    for name, column in (("batch", "batch_size"), ("threads", "num_cores")):
        if column in frame and frame[column].nunique() == 1:
            known[name] = frame[column].iloc[0].item()
    if "model" not in frame:
        frame = frame.assign(model=path.stem)
    return _table(frame, known, grouped=True)


def _measured(result: dict[str, Any]) -> list[tuple[float, float]]:
    """(sparsity, mean seconds); an empty sparsity is dense."""
    found = []
    for sparsity, values in result.get("sparse_measurements") or ():
        times = np.asarray(values, dtype=float).reshape(-1)
        if len(times):
            found.append((float(sparsity or 0.0), float(times.mean())))
    return found


def _table(frame: pd.DataFrame, known: dict[str, Any], *, grouped: bool) -> ImportedTable:
    frame = frame.assign(
        network=[f"{m} {s:g}" for m, s in zip(frame["model"], frame["sparsity"])], ms=frame["seconds"] * 1e3
    )
    whole = frame[frame["param"] == WHOLE].set_index("network")
    networks = whole[["ms", "model", "sparsity"]] if len(whole) else None
    layers = frame[frame["param"] != WHOLE]
    rows = pd.DataFrame(
        {
            "network": layers["network"],
            "kind": [_kind(str(name)) for name in layers["param"]],
            "layer": layers["model"].astype(str) + "/" + layers["param"].astype(str),
            "density": (1 - layers["sparsity"]).round(9),
            "ms": layers["ms"],
        }
    ).reset_index(drop=True)
    problems = []
    if grouped and len(rows):
        repeated = _repeats(layers)
        if repeated:
            again = rows["layer"].isin(repeated)
            rows["count"] = np.where(again, 0, 1)
            problems.append(
                f"{len(repeated)} layers repeat the times of the layer before: fused; they count 0 times in sums"
            )
    return ImportedTable(networks, rows, {"source": "SparseML sensitivity", "unit": "s", **known}, problems)


def _repeats(layers: pd.DataFrame) -> set[str]:
    """Layers whose times equal those of the layer before at every sparsity."""
    found = set()
    for model, rows in layers.groupby("model", sort=False):
        wide = rows.pivot_table(index="param", columns="sparsity", values="seconds", sort=False)
        same = (wide.diff().abs() < 1e-12).all(axis=1)
        found |= {f"{model}/{name}" for name in wide.index[same]}
    return found


def _kind(name: str) -> str:
    lowered = name.lower()
    for word, kind in (
        ("depthwise", "depthwise_conv"),
        ("conv", "conv"),
        ("gemm", "linear"),
        ("fc", "linear"),
        ("pool", "pool"),
    ):
        if word in lowered:
            return kind
    return "other"
