"""From times to tables: ratios of every row, geometric means beside their targets, and the losses.

Start with `with_ratios`; `geomeans`, `groups` and `losses` read its frame, `write_csv` saves it with its environment.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.kernels import targets
from benchmarks.kernels.engines import DENSE_ENGINES
from benchmarks.kernels.layers import MAIN_FAMILIES
from benchmarks.kernels.run_layers import SPARSE_ENGINES
from hw_models.device import host_device

__all__ = [
    "environment",
    "families",
    "fastest",
    "geomean",
    "geomeans",
    "groups",
    "losses",
    "subject",
    "with_ratios",
    "write_csv",
]


def with_ratios(rows: Sequence[Mapping[str, Any]], paths: Sequence[str], peak_gflops: float) -> pd.DataFrame:
    """The rows with what follows from their times.

    Adds best_dense(_us), best_sparse(_us) and, for each of our paths, `<path>_x_dense`, `<path>_x_sparse` (how many times faster
    than the best engine), `<path>_gflops` on kept weights and `<path>_peak` (share of the peak of all threads used). What is not
    there is NaN.
    """
    frame = pd.DataFrame(list(rows))
    for kind, names in (("dense", tuple(DENSE_ENGINES)), ("sparse", SPARSE_ENGINES)):
        frame[f"best_{kind}"], frame[f"best_{kind}_us"] = fastest(frame, names, "us")
    for path in paths:
        us = frame[f"{path}_us"].astype(float)
        frame[f"{path}_x_dense"] = frame["best_dense_us"] / us
        frame[f"{path}_x_sparse"] = frame["best_sparse_us"] / us
        frame[f"{path}_gflops"] = 1e3 * frame["mflop_kept"] / us
        frame[f"{path}_peak"] = frame[f"{path}_gflops"] / (peak_gflops * frame["threads"])
    return frame


def fastest(frame: pd.DataFrame, names: Sequence[str], unit: str) -> tuple[list[str], list[float]]:
    """For each row the engine with the lowest `<name>_<unit>` and its time; "" and NaN where there is none."""
    times = [(name, frame[f"{name}_{unit}"].astype(float)) for name in names if f"{name}_{unit}" in frame]
    best = []
    for i in range(len(frame)):
        there = [(float(column.iloc[i]), name) for name, column in times if not math.isnan(float(column.iloc[i]))]
        best.append(min(there, default=(math.nan, "")))
    return [name for _, name in best], [time for time, _ in best]


def geomean(ratios: pd.Series) -> float:
    """Geometric mean of what is there; NaN of nothing."""
    there = ratios.dropna().astype(float)
    return float(np.exp(np.log(there).mean())) if len(there) else math.nan


def subject(paths: Sequence[str]) -> str:
    """The path that targets of single rows are held against: the plan's own choice where it was measured."""
    for path in ("auto", "specialised", "portable", *paths):
        if path in paths:
            return path
    raise ValueError("no path of ours was measured")


def _main(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["family"].isin(MAIN_FAMILIES) & (frame["batch"] == 1) & (frame["pattern"] == "unstructured")]


def geomeans(frame: pd.DataFrame, paths: Sequence[str]) -> pd.DataFrame:
    """Over the main layers: a row per engine or path and a column per density, with the targets in rows of their own.

    `layers` says how many layers the mean is over; it is one of the targets only at 20.
    """
    main = _main(frame)
    rows: list[dict[str, Any]] = []
    densities = sorted(main["density"].unique(), reverse=True)
    others = [name for name in SPARSE_ENGINES if f"{name}_us" in main]
    for name in [*paths, *others]:
        ratio = main["best_dense_us"] / main[f"{name}_us"].astype(float)
        means = {d: geomean(ratio[main["density"] == d]) for d in densities}
        rows.append({"over best dense": name, "layers": main.loc[ratio.notna(), "layer"].nunique(), **means})
        if name in targets.GEOMEAN:
            aims = {d: targets.GEOMEAN[name].get(d, math.nan) for d in densities}
            rows.append({"over best dense": f"  target of {name}", "layers": 20, **aims})
    if "deepsparse_us" in main:
        for path in paths:
            ratio = main["deepsparse_us"].astype(float) / main[f"{path}_us"].astype(float)
            means = {d: geomean(ratio[main["density"] == d]) for d in densities}
            rows.append(
                {
                    "over best dense": f"{path} over deepsparse",
                    "layers": main.loc[ratio.notna(), "layer"].nunique(),
                    **means,
                }
            )
    return pd.DataFrame(rows)


def families(frame: pd.DataFrame, paths: Sequence[str]) -> pd.DataFrame:
    """Geometric mean of the speed-up over the best dense engine by family, pattern and batch (rows), path and density (columns)."""
    keys = ["family", "pattern", "batch"]
    rows = []
    for group, part in frame.groupby(keys, sort=False):
        for path in [*paths, *(["deepsparse"] if "deepsparse_us" in frame else [])]:
            ratio = part["best_dense_us"] / part[f"{path}_us"].astype(float)
            means = {d: geomean(ratio[part["density"] == d]) for d in sorted(frame["density"].unique(), reverse=True)}
            rows.append({**dict(zip(keys, group)), "path": path, **means})
    return pd.DataFrame(rows)


def groups(frame: pd.DataFrame, paths: Sequence[str]) -> pd.DataFrame:
    """The targets for groups of rows: what was reached by each path, and "met" or "MISSED" by the best of them."""
    rows = []
    for group in targets.GROUPS:
        named = (frame["family"] == group.rows) | (frame["layer"] == group.rows)
        part = frame[
            named
            & (frame["pattern"] == group.pattern)
            & (frame["batch"] == group.batch)
            & (frame["density"] == group.density)
        ]
        if part.empty:
            continue
        reached = {path: geomean(part[f"{path}_x_dense"]) for path in paths}
        best = max((r for r in reached.values() if not math.isnan(r)), default=math.nan)
        verdict = "met" if best >= group.target else "MISSED"
        facts = {"rows": group.rows, "pattern": group.pattern, "batch": group.batch, "density": group.density}
        rows.append({**facts, "n": len(part), **reached, "target": group.target, "verdict": verdict})
    return pd.DataFrame(rows)


def losses(frame: pd.DataFrame, path: str) -> pd.DataFrame:
    """Rows where a path is slower than the best dense engine, below what every row is to have, or slower than DeepSparse at the
    densities where it never should be; with the reason."""
    rows = []
    for row in frame.to_dict("records"):
        ratio, density = float(row[f"{path}_x_dense"]), float(row["density"])
        aim = targets.row_target(density, row["family"] in MAIN_FAMILIES)
        reasons = []
        if ratio < 1:
            reasons.append("slower than dense")
        if ratio < aim and aim > 1:
            reasons.append(f"below {aim:g}x")
        rival = float(row.get("deepsparse_us", math.nan)) / float(row[f"{path}_us"])
        if density <= targets.NEVER_BELOW_DEEPSPARSE_UP_TO and rival < targets.NOISE:
            reasons.append(f"{rival:.2f}x of DeepSparse")
        if reasons:
            facts = {
                key: row[key]
                for key in ("layer", "pattern", "density", "batch", "threads", "best_dense", "best_dense_us")
            }
            rows.append({**facts, f"{path}_us": row[f"{path}_us"], "x_dense": ratio, "why": ", ".join(reasons)})
    return pd.DataFrame(rows)


def environment(threads: int, peak_gflops: float, deepsparse: str | None) -> dict[str, str]:
    """Where and with what the numbers were taken."""
    device = host_device()
    facts = {
        "cpu": f"{device.name}, {device.cores} cores, {device.architecture}, {device.fingerprint}",
        "vector_extensions": " ".join(device.flags),
        "measured_peak_gflops_per_core": f"{peak_gflops:.1f}",
        "threads": str(threads),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "commit": _commit(),
    }
    for package in ("torch", "numba", "llvmlite", "numpy", "scipy", "onnxruntime", "openvino"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "missing"
    facts["deepsparse"] = deepsparse or "missing"
    return facts


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_csv(frame: pd.DataFrame, path: Path, facts: Mapping[str, str]) -> None:
    """The table, after a comment line per fact; `pd.read_csv(path, comment="#")` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in facts.items())
        frame.to_csv(file, index=False, float_format="%.6g")
