"""Latency tables of others: `read(path)` knows the public formats and says what is doubtful about the values.

    table = read("HW-NAS-Bench-v1_0.pickle")
    print(table.problems)
    model = fit_table(cell_operations(range(15625)), table.latency("cifar10.raspi4"))

Nothing is ever executed from a file: pickles are opened with an allow-list. `docs/foreign_tables.md` lists the formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hw_models.importers import (
    benchmark_tables,
    help_lists,
    hw_nas_bench,
    lookup_texts,
    nn_meter,
    ofa_tables,
    sparseml,
    tf_nas,
)
from hw_models.importers.checks import check
from hw_models.importers.table import ImportedTable, TableFormatError, first_bytes

__all__ = ["FORMATS", "ImportedTable", "TableFormatError", "check", "read"]

HEAD = 8192
WITH_UNIT = ("spdy", "fbnet", "help")  # formats that do not say their unit
_Sniff = Callable[[Path, bytes], bool]
_Load = Callable[[Path, str | None], ImportedTable]

# In the order they are tried: the more particular first.
FORMATS: dict[str, tuple[_Sniff, _Load]] = {
    "sparseml-json": (sparseml.sniff, sparseml.load),
    "sparseml-csv": (sparseml.sniff_csv, sparseml.load_csv),
    "timm": (benchmark_tables.sniff_timm, benchmark_tables.load_timm),
    "hat": (benchmark_tables.sniff_hat, benchmark_tables.load_hat),
    "ofa": (ofa_tables.sniff, ofa_tables.load),
    "nn-meter": (nn_meter.sniff, nn_meter.load),
    "spdy": (lookup_texts.sniff_spdy, lookup_texts.load_spdy),
    "fbnet": (lookup_texts.sniff_fbnet, lookup_texts.load_fbnet),
    "hw-nas-bench": (hw_nas_bench.sniff, hw_nas_bench.load),
    "tf-nas": (tf_nas.sniff, tf_nas.load),
    "help": (help_lists.sniff, help_lists.load),
}


def read(path: str | os.PathLike[str], format: str | None = None, *, unit: str | None = None) -> ImportedTable:
    """Read a table.

    Args:
        path: a file, or a folder of lists with one file per device.
        format: one of `FORMATS`; default: found from the content.
        unit: of the times in the file ("s", "ms", "us"), where the file does not say and the format's usual unit is wrong
            (spdy, fbnet, help).

    Returns:
        The table, times in ms; `problems` says what is doubtful. Values are never changed or dropped.

    Raises:
        FileNotFoundError: there is no such file.
        TableFormatError: it is of no known format, damaged, or wants to run code; names what was tried and why not.
        ValueError: unknown format or unit.
    """
    where = Path(path)
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if unit is not None and unit not in lookup_texts.UNITS:
        raise ValueError(f"unknown unit {unit!r}; known: {', '.join(lookup_texts.UNITS)}")
    if unit is not None and format not in (None, *WITH_UNIT):
        raise ValueError(f"the times of format {format} have a unit of their own; unit= is for {', '.join(WITH_UNIT)}")
    if not where.exists():
        raise FileNotFoundError(f"there is no table {where}")
    head = b"" if where.is_dir() else first_bytes(where, HEAD)
    if where.is_file() and not head:
        raise TableFormatError(f"{where} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise TableFormatError(f"{where} is a pointer of Git LFS, not the table itself; fetch it with `git lfs pull`")
    tried = []
    for name, (sniff, load) in FORMATS.items():
        if name != format and (format is not None or not sniff(where, head)):
            continue
        try:
            table = load(where, unit)
            if unit is not None and name not in WITH_UNIT:
                raise TableFormatError(f"its times have a unit of their own; unit= is for {', '.join(WITH_UNIT)}")
        except (
            TableFormatError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            tried.append(f"{name}: {error if isinstance(error, TableFormatError) else repr(error)}")
            continue
        provenance = {"format": name, "file": where.name, **table.provenance}
        return ImportedTable(table.networks, table.operations, provenance, [*table.problems, *check(table)])
    reasons = "; ".join(tried) if tried else f"its first bytes are {head[:24]!r}"
    raise TableFormatError(
        f"{where} is no table of a known format ({', '.join([format] if format else FORMATS)}): {reasons}. "
        "Where the format is known, read(path, format=...) says more"
    )
