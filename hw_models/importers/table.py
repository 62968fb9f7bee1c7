"""What every importer answers: `ImportedTable`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["ImportedTable", "TableFormatError", "first_bytes", "kept_columns"]


class TableFormatError(ValueError):
    """A file is not a table of a known format; says what was tried and found."""


@dataclass(frozen=True)
class ImportedTable:
    """A latency table of someone else, in this package's words.

    Attributes:
        networks: one row per network, index `network`; times in columns `ms` or `<series>_ms`, energies in `..._mj`,
            whatever else the file says of networks beside them. None if the file has no whole networks.
        operations: one row per operation as `hw_models.foreign.fit_table` takes them; own times in `ms` or `<series>_ms`.
            None if the file has none. For networks that are known by number only, `hw_models.lowered_cells.cell_operations`
            makes them.
        provenance: format, file, unit as found, and what the file or its makers say of device, runtime, batch, source.
        problems: what is doubtful about the values, one sentence each; nothing was changed because of it.
    """

    networks: pd.DataFrame | None
    operations: pd.DataFrame | None
    provenance: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def series(self) -> list[str]:
        """Names of the time series: columns of times without `_ms`; "ms" where there is one column of this name."""
        frame = self.networks if self.networks is not None else self.operations
        return [] if frame is None else [c.removesuffix("_ms") for c in _times(frame)]

    def latency(self, series: str | None = None) -> pd.Series:
        """Times of whole networks, ready for `fit_table`: what cannot be a time (missing, <= 0) is left out.

        Args:
            series: one of `series()`, with or without `_ms`; may be left out where there is only one.

        Raises:
            ValueError: no such series, several, or no networks in this table.
        """
        if self.networks is None:
            raise ValueError(
                f"{self.provenance.get('file', 'the table')} has times of operations only, not of whole networks; "
                "use `timed_operations`"
            )
        ms = pd.to_numeric(self.networks[_chosen(self.networks, series)], errors="coerce")
        good = ms[np.isfinite(ms.to_numpy(float)) & (ms.to_numpy(float) > 0)]
        return good[~good.index.duplicated()].rename("ms")

    def timed_operations(self, series: str | None = None) -> pd.DataFrame:
        """The operations with the times of one series in column `ms`; rows that cannot be a time are left out.

        Args:
            series: as for `latency`.

        Raises:
            ValueError: no such series, several, or no times of operations in this table.
        """
        if self.operations is None or not _times(self.operations):
            raise ValueError(f"{self.provenance.get('file', 'the table')} has no times of operations; use `latency`")
        column = _chosen(self.operations, series)
        ms = pd.to_numeric(self.operations[column], errors="coerce").to_numpy(float)
        others = [c for c in self.operations.columns if c != column and str(c).endswith(("_ms", "_mj"))]
        frame = self.operations.drop(columns=others).rename(columns={column: "ms"}).assign(ms=ms)
        return frame[np.isfinite(ms) & (ms > 0)].reset_index(drop=True)


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(count)


def kept_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Without columns that are empty throughout."""
    return frame.dropna(axis="columns", how="all")


def _times(frame: pd.DataFrame) -> list[str]:
    spread = ("std_ms", "var_ms")
    return [str(c) for c in frame.columns if c == "ms" or (str(c).endswith("_ms") and not str(c).endswith(spread))]


def _chosen(frame: pd.DataFrame, series: str | None) -> str:
    found = _times(frame)
    if series is None:
        if "ms" in found:
            return "ms"
        if len(found) == 1:
            return found[0]
        raise ValueError(f"which series? {', '.join(c.removesuffix('_ms') for c in found) or 'there is none'}")
    for name in (series, f"{series}_ms"):
        if name in found:
            return name
    raise ValueError(f"unknown series {series!r}; known: {', '.join(c.removesuffix('_ms') for c in found)}")
