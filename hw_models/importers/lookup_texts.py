"""Look-up tables as plain text: FBNet (rows of layers, columns of candidate operations) and SPDY (blocks of time and sparsity).

FBNet: an optional first line with the names of the operations, then one line of numbers per layer, in microseconds. SPDY: `base`,
the time of the whole dense network, `prunable`, that of its prunable layers, then per layer its name and lines `time sparsity`,
in seconds. Files do not say their unit; give it where they differ.

Source: Wu et al., FBNet (CVPR 2019), reimplementations; Frantar and Alistarh, SPDY (ICML 2022), timings/*.txt.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hw_models.importers.table import ImportedTable, TableFormatError

__all__ = ["UNITS", "load_fbnet", "load_spdy", "sniff_fbnet", "sniff_spdy"]

UNITS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
REST = "rest of the network"


def sniff_spdy(path: Path, head: bytes) -> bool:
    """Does it begin with `base`?"""
    return path.is_file() and head.split(b"\n")[0].strip() == b"base"


def load_spdy(path: Path, unit: str | None = None) -> ImportedTable:
    """One network per sparsity that all layers were measured at: all layers at that sparsity, and what is not prunable, dense.

    Only the dense one has a measured time of the whole.
    """
    scale = UNITS[unit or "s"]
    totals: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    name = ""
    for at, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        numbers = [_number(word) for word in words]
        if not words:
            continue
        if len(words) == 2 and None not in numbers and name and name not in totals:
            ms, sparsity = numbers
            assert ms is not None
            assert sparsity is not None
            if not 0 <= sparsity < 1:
                raise TableFormatError(f"line {at}: sparsity must be in [0, 1), got {sparsity}")
            rows.append({"layer": name, "sparsity": sparsity, "density": 1 - sparsity, "ms": ms * scale})
        elif len(words) == 1 and numbers[0] is not None and name in ("base", "prunable"):
            totals[name] = numbers[0] * scale
        elif numbers[0] is None:
            name = line.strip()
        else:
            raise TableFormatError(f"line {at}: expected a layer's name or 'time sparsity', found {line[:60]!r}")
    if not rows or "base" not in totals:
        raise TableFormatError("expected 'base' with a time, and layers with lines 'time sparsity'")
    frame = pd.DataFrame(rows)
    frame.insert(0, "network", [f"sparsity {s:g}" for s in frame["sparsity"]])
    frame.insert(1, "kind", "layer")
    if "prunable" in totals and totals["base"] > totals["prunable"]:
        other = {"kind": "other", "layer": REST, "density": 1.0, "ms": totals["base"] - totals["prunable"]}
        extra = pd.DataFrame([{"network": network, **other} for network in frame["network"].unique()])
        frame = pd.concat([frame, extra], ignore_index=True)
    frame = frame.drop(columns="sparsity").assign(pattern="4-block" if "block" in path.stem else "unstructured")
    networks = pd.DataFrame({"ms": [totals["base"]]}, index=pd.Index(["sparsity 0"], name="network"))
    known = {"source": "SPDY timings", "unit": unit or "s", **{f"{k}_ms": v for k, v in totals.items()}}
    return ImportedTable(networks, frame, known)


def sniff_fbnet(path: Path, head: bytes) -> bool:
    """Are there several lines of equally many numbers, after at most one line of names?"""
    if not path.is_file() or b"\x00" in head:
        return False
    lines = [line.split() for line in head.decode(errors="replace").split("\n")[:4] if line.strip()]
    if len(lines) < 2 or len(lines[1]) < 3:
        return False
    return all(_number(word) is not None for word in lines[1]) and len(lines[0]) == len(lines[1])


def load_fbnet(path: Path, unit: str | None = None) -> ImportedTable:
    """One operation per layer and candidate; `layer` and `kind` say which."""
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    named = any(_number(word) is None for word in lines[0])
    names = lines[0] if named else [f"op{i}" for i in range(len(lines[0]))]
    rows = []
    for layer, words in enumerate(lines[1:] if named else lines):
        numbers = [_number(word) for word in words]
        if len(words) != len(names) or None in numbers:
            raise TableFormatError(f"layer {layer}: expected {len(names)} numbers, found {' '.join(words)[:60]!r}")
        rows += [
            {
                "network": f"layer{layer}/{kind}",
                "kind": kind,
                "layer": layer,
                "ms": float(value or 0.0) * UNITS[unit or "us"],
            }
            for kind, value in zip(names, numbers)
        ]
    problems = [] if unit else ["the file does not say its unit; taken for microseconds: give unit= if it is another"]
    return ImportedTable(None, pd.DataFrame(rows), {"source": "FBNet table", "unit": unit or "us"}, problems)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
