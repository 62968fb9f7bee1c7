"""Measurements to give away: one parquet file with everything a reader must know about them.

One row per (network, step), the columns of the network repeated under `network.`; compression makes that free, and any tool that
reads parquet can use the table. A network without steps has one row without a step. The file's metadata hold the schema version,
the unit of every column and where the numbers are from.

Start with `write_table` and `read_table`.

Source: schema version, units in the column names and provenance (source, licence, simulated or measured) as in section 5.5 of the
project's collection of facts about latency models.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from hw_models.device import runtime_id
from hw_models.store_schema import OBSERVED_NUMBERS
from hw_models.workload import STEP_COLUMNS

__all__ = ["METHODS", "PROVENANCE", "OtherRuntimeError", "SharedTable", "SharedTableError", "read_table", "write_table"]

VERSION = 1
METADATA = b"sparse-nas latency table"
METHODS = ("measured", "simulated")
PROVENANCE = ("source", "licence", "method", "device", "runtime")
# The last word of a column's name is its unit; the units we write, and how others write theirs.
UNITS = {"ms": "ms", "mj": "mJ", "bytes": "bytes", "macs": "multiply-adds", "ghz": "GHz"}
_STRANGE = {
    "ms": ("ns", "us", "s", "sec", "seconds", "microseconds", "milliseconds", "latency", "time"),
    "mj": ("uj", "j", "wh", "joules", "energy"),
    "bytes": ("kb", "kib", "mb", "mib", "gb", "gib", "bits"),
    "ghz": ("hz", "khz", "mhz"),
}


class SharedTableError(ValueError):
    """A shared table cannot be written or read as it is; says what was expected, what was found and what to do."""


class OtherRuntimeError(SharedTableError):
    """The table holds for another machine, other versions or other threads than wanted."""


@dataclass(frozen=True, eq=False)
class SharedTable:
    """What was read.

    Attributes:
        steps: observed steps, as of `MeasurementStore.observations`; `network` is the index of `networks`.
        networks: one row per network.
        provenance: source, licence, method ("measured" or "simulated"), device, runtime, and what else was given.
        created_at: ISO 8601, UTC.
    """

    steps: pd.DataFrame
    networks: pd.DataFrame
    provenance: dict[str, Any]
    created_at: str


def write_table(
    path: str | os.PathLike[str], steps: pd.DataFrame, networks: pd.DataFrame, provenance: Mapping[str, Any]
) -> None:
    """Write a table; an older file of this name is replaced when the new one is complete.

    Args:
        path: "NAME.parquet"; zstd-compressed.
        steps: observed steps: `STEP_COLUMNS`, ms, lo_ms, hi_ms, network, quality, and further columns.
        networks: one row per network, `steps.network` being its index: name, ms, and further columns.
        provenance: source, licence, method ("measured" or "simulated"), device, runtime; further facts are kept.

    Raises:
        SharedTableError: a column or a fact of the provenance is missing, or a column's name says another unit than ours.
    """
    import pyarrow as pa
    from pyarrow import parquet

    facts = _checked_provenance(provenance)
    _has(steps, "steps", (*STEP_COLUMNS, *OBSERVED_NUMBERS, "network"))
    _has(networks, "networks", ("name", "ms"))
    _units(steps, "steps")
    _units(networks, "networks")
    if not networks.index.is_unique or not steps["network"].isin(networks.index).all():
        raise SharedTableError("steps.network must be the index of networks, each network once")
    places = dict(zip(networks.index, range(len(networks))))
    rows = steps.assign(network=steps["network"].map(places).astype("int64"), row=1)
    numbered = networks.rename_axis(None).add_prefix("network.").assign(network=range(len(networks)))
    joined = rows.merge(numbered, how="right", on="network")
    table = pa.Table.from_pandas(joined, preserve_index=False)
    described = {
        "version": VERSION,
        "units": {name: UNITS[unit] for name in map(str, joined.columns) if (unit := _unit(name)) in UNITS},
        "provenance": facts,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: json.dumps(described).encode()})
    target = Path(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        parquet.write_table(table, part, compression="zstd")
        os.replace(part, target)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def read_table(
    path: str | os.PathLike[str], runtime: str | None = None, allow_other_runtime: bool = False
) -> SharedTable:
    """Read a table that `write_table` wrote.

    Args:
        path: of the file.
        runtime: the table must be of. Default: this machine's, at the threads the table was made for.
        allow_other_runtime: read it whatever it is of; `provenance["runtime"]` says.

    Raises:
        OtherRuntimeError: it is of another runtime; says in what they differ.
        SharedTableError: it is no parquet file, no table of this project, of another version, in other units, or columns are
            missing.
        FileNotFoundError: there is no such file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open(path, "rb") as file:
            table = parquet.read_table(file)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise SharedTableError(f"{path} cannot be read as parquet: {error}") from error
    described = _described(path, (table.schema.metadata or {}).get(METADATA))
    facts = _checked_provenance(described.get("provenance", {}), f"{path}: ")
    names = [str(name) for name in table.column_names]
    found, wanted = described.get("units", {}), {n: UNITS[unit] for n in names if (unit := _unit(n)) in UNITS}
    for name in (*found, *wanted):
        if found.get(name) != wanted.get(name):
            raise SharedTableError(
                f"{path}: column {name!r} is said to be in {found.get(name)!r}, but its name says {wanted.get(name)!r}; "
                "write the table again with `write_table`"
            )
    joined = table.to_pandas()
    _has(joined, f"{path}", (*STEP_COLUMNS, *OBSERVED_NUMBERS, "network", "row", "network.name", "network.ms"))
    steps = joined[joined["row"].notna()][[n for n in names if not n.startswith("network.") and n != "row"]]
    prefix = "network."
    networks = joined.drop_duplicates("network").set_index("network")[[n for n in names if n.startswith(prefix)]]
    networks = networks.rename(columns=lambda name: name.removeprefix(prefix))
    _units(steps, f"{path}, steps")
    _units(networks, f"{path}, networks")
    if not allow_other_runtime:
        _same_runtime(path, str(facts["runtime"]), runtime)
    return SharedTable(steps.reset_index(drop=True), networks, facts, str(described.get("created_at", "")))


def _described(path: str | os.PathLike[str], text: bytes | None) -> dict[str, Any]:
    try:
        described = json.loads(text) if text is not None else None
    except ValueError:
        described = None
    if not isinstance(described, dict):
        raise SharedTableError(
            f"{path} is parquet, but no table of this project: it does not say its version, units and provenance. "
            "Tables of others are read by `hw_models.importers`"
        )
    if described.get("version") != VERSION:
        raise SharedTableError(
            f"{path} has schema version {described.get('version')!r}, and this release reads version {VERSION}; "
            "read it with the release that wrote it, or ask for it to be written again"
        )
    return described


def _checked_provenance(provenance: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    missing = [name for name in PROVENANCE if not str(provenance.get(name) or "").strip()]
    if missing:
        raise SharedTableError(f"{where}the provenance needs {', '.join(PROVENANCE)}; missing: {', '.join(missing)}")
    if provenance["method"] not in METHODS:
        raise SharedTableError(f"{where}the provenance's method must be one of {METHODS}, got {provenance['method']!r}")
    return dict(provenance)


def _has(frame: pd.DataFrame, what: str, wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in frame]
    if missing:
        strange = [f"{name!r} ({ours} expected)" for name in map(str, frame.columns) if (ours := _strange(name))]
        units = f"; of another unit: {', '.join(strange)}" if strange else ""
        raise SharedTableError(f"{what}: the columns {missing} are missing{units}; found {list(frame.columns)}")


def _units(frame: pd.DataFrame, what: str) -> None:
    """Refuse columns whose names end in a unit we do not write."""
    for name in map(str, frame.columns):
        if ours := _strange(name):
            raise SharedTableError(
                f"{what}: the name of column {name!r} says another unit than {ours!r}, in which such numbers are kept; "
                f"convert it and end its name in _{ours}"
            )


def _unit(name: str) -> str:
    """The last word of a column's name."""
    return re.split(r"[._\s]", name.lower())[-1]


def _strange(name: str) -> str | None:
    """The unit that should stand for the one in a name; None if that is right, or there is none."""
    return next((ours for ours, others in _STRANGE.items() if _unit(name) in others), None)


def _same_runtime(path: str | os.PathLike[str], found: str, wanted: str | None) -> None:
    if wanted is None:
        threads = re.search(r"/t(\d+)$", found)
        wanted = runtime_id(int(threads[1]) if threads else 1)
    if found == wanted:
        return
    theirs, ours = found.split("/"), wanted.split("/")
    if len(theirs) == len(ours):
        parts = [f"{b} here, {a} there" for a, b in zip(theirs, ours) if a != b]
    else:
        parts = [f"{wanted} here, {found} there"]
    raise OtherRuntimeError(
        f"{path} is of another runtime: {'; '.join(parts)}. Its times do not hold here; measure with `nas calibrate`, or read it "
        "all the same with allow_other_runtime=True"
    )
