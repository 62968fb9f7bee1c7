"""Operations of networks as numbers: what `hw_models.foreign` fits on.

`Operations.of(frame)` takes a table with one row per operation, lenient in how columns are called and which are there, strict in
what they mean. It knows nothing of latencies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.foreign_costs import costs_of, filled

__all__ = ["Operations"]

Floats = NDArray[np.float64]

# Names found in the wild -> ours.
ALIASES = {
    "network": ("net", "model", "arch", "network_id", "model_id"),
    "kind": ("op", "type", "op_type", "operator", "layer_type", "primitive"),
    "count": ("repeat", "repeats", "times"),
    "c_in": ("cin", "in_channels", "channels_in", "ic", "input_channels"),
    "c_out": ("cout", "out_channels", "channels_out", "oc", "output_channels"),
    "h": ("height", "out_h", "h_out"),
    "w": ("width", "out_w", "w_out"),
    "hw": ("resolution", "size", "spatial"),
    "kernel": ("k", "ks", "kernel_size", "kernelsize"),
    "stride": ("strides", "s"),
    "groups": ("group", "g"),
    "batch": ("batch_size", "bs"),
    "expand": ("expansion", "expand_ratio", "exp", "e"),
    "mid": ("mid_channels", "c_mid", "hidden"),
    "ms": ("latency_ms", "time_ms", "op_ms"),
    "activations": ("acts", "output_elements"),
    "params": ("parameters", "weights", "param_count"),
}
# These say what an operation costs or where it is, not which operation it is.
_NOT_IDENTITY = {"network", "count", "live", "ms", "macs", "params", "activations", "src", "dst", "density", "pattern"}


@dataclass(frozen=True)
class Operations:
    """Operations of many networks, as arrays over rows.

    Attributes:
        networks: names, in order of first appearance.
        row: int[n], position in `networks`.
        count: float[n], how often the operation runs.
        live: bool[n].
        kind: str[n], with the pattern for sparse operations.
        key: str[n], the whole description of the operation, density included.
        curve: str[n], the same without density.
        physics: float[n, 4]: `PHYSICS` of one execution; kept weights count.
        known: bool[4], which of them the table tells or implies.
        density: float[n], 1 where dense.
        ms: float[n], own time of one execution; NaN where not given.
        numbers: descriptors of each row that are numbers, NaN where not given.
        src, dst: int[n] nodes of each network's graph, or None.
    """

    networks: pd.Index
    row: NDArray[np.intp]
    count: Floats
    live: NDArray[np.bool_]
    kind: NDArray[np.object_]
    key: NDArray[np.object_]
    curve: NDArray[np.object_]
    physics: Floats
    known: NDArray[np.bool_]
    density: Floats
    ms: Floats
    numbers: pd.DataFrame
    src: NDArray[np.int64] | None
    dst: NDArray[np.int64] | None

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Operations:
        """Read a table of operations.

        Args:
            frame: one row per operation of a network; columns as in `hw_models.foreign.fit_table`.

        Raises:
            ValueError: nothing in it, a column missing, or a value that cannot be: names column, row and value.
        """
        if not isinstance(frame, pd.DataFrame):
            raise ValueError(f"operations must be a DataFrame with one row per operation, got {type(frame).__name__}")
        if not len(frame):
            raise ValueError("operations: at least one row is needed, got none")
        table = _renamed(frame)
        number = {
            name: _column(table, name) for name in table.columns if name not in ("network", "kind", "pattern", "live")
        }
        numeric = {name: values for name, values in number.items() if values is not None}
        count = filled(numeric, "count", 1.0, len(table))
        _check(count >= 0, "count", count, "0 or more", table)
        density = filled(numeric, "density", 1.0, len(table))
        _check((density > 0) & (density <= 1), "density", density, "in (0, 1], the fraction kept", table)
        ms = numeric.get("ms", np.full(len(table), np.nan))
        _check(~(ms <= 0) & ~np.isinf(ms), "ms", ms, "above 0 (leave it empty where it was not measured)", table)
        live = _truth(table["live"]) if "live" in table else np.ones(len(table), bool)
        pattern = (
            table["pattern"].fillna("").astype(str).to_numpy(object)
            if "pattern" in table
            else np.full(len(table), "", object)
        )
        kind = table["kind"].astype(str).to_numpy(object)
        sparse = density < 1
        physics, known = costs_of(kind, numeric, density)
        described = [c for c in table.columns if _is_identity(c)]
        costs = [c for c in ("macs", "activations", "params") if c in table]
        curve = _texts(table[described if described != ["kind"] else [*described, *costs]])
        key = _texts(table[costs].assign(curve=curve, pattern=np.where(sparse, pattern, ""), density=density))
        kind = np.where(sparse, kind + "/sparse " + pattern, kind)
        curve = np.where(sparse & (pattern != ""), curve + " " + pattern, curve)
        row, names = pd.factorize(table["network"])
        graph = all(name in numeric for name in ("src", "dst"))
        return cls(
            networks=pd.Index(names, name="network"),
            row=row,
            count=count,
            live=live,
            kind=kind,
            key=key,
            curve=curve,
            physics=physics,
            known=known,
            density=density,
            ms=ms,
            numbers=pd.DataFrame(
                {name: numeric[name] for name in numeric if _is_identity(name)}, index=range(len(table))
            ),
            src=numeric["src"].astype(np.int64) if graph else None,
            dst=numeric["dst"].astype(np.int64) if graph else None,
        )

    def per_network(self, values: Floats) -> Floats:
        """Sum of count x value over the rows of each network; values float[n] or float[n, k]."""
        weighted = (self.count if values.ndim == 1 else self.count[:, None]) * values
        if values.ndim == 1:
            return np.bincount(self.row, weighted, minlength=len(self.networks)).astype(float)
        return np.stack([np.bincount(self.row, column, minlength=len(self.networks)) for column in weighted.T], axis=1)

    def rows_alone(self, rows: NDArray[np.intp]) -> Operations:
        """Each of these rows as a network of one operation that runs once."""
        n = len(rows)
        taken = {
            name: getattr(self, name)[rows] for name in ("live", "kind", "key", "curve", "physics", "density", "ms")
        }
        places: dict[str, Any] = {
            "networks": pd.RangeIndex(n),
            "row": np.arange(n),
            "count": np.ones(n),
            "src": None,
            "dst": None,
        }
        return replace(self, numbers=self.numbers.iloc[rows].reset_index(drop=True), **taken, **places)

    def longest_path(self, values: Floats) -> Floats:
        """Per network, the largest sum of count x value along a path of its graph: time if branches ran at once.

        Args:
            values: float[n] >= 0, of one execution.

        Returns:
            float[networks]; the plain sum where the table has no graph.
        """
        if self.src is None or self.dst is None:
            return self.per_network(values)
        cost = self.count * values
        nodes, ends = np.unique(np.concatenate([self.src, self.dst]), return_inverse=True)
        start, stop = ends[: len(cost)], ends[len(cost) :]
        reached = np.zeros((len(self.networks), len(nodes)))
        order = np.argsort(stop, kind="stable")
        bounds = np.searchsorted(stop[order], np.arange(len(nodes) + 1))
        for node in range(len(nodes)):  # sources lie below: nodes are numbered along the edges
            rows = order[bounds[node] : bounds[node + 1]]
            np.maximum.at(reached[:, node], self.row[rows], reached[self.row[rows], start[rows]] + cost[rows])
        return reached.max(axis=1)


def _renamed(frame: pd.DataFrame) -> pd.DataFrame:
    lower = {str(c).strip().lower(): c for c in frame.columns}
    names = {}
    if "height" not in lower:
        lower.pop("width", None)  # alone it more often means channels
    for ours, others in ALIASES.items():
        found = next((lower[name] for name in (ours, *others) if name in lower), None)
        if found is not None and ours not in frame.columns:
            names[found] = ours
    table = frame.rename(columns=names).reset_index(drop=True)
    if "sparsity" in table and "density" not in table:
        table["density"] = 1 - pd.to_numeric(table.pop("sparsity"))
    if "hw" in table:
        for side in ("h", "w"):
            if side not in table:
                table[side] = table["hw"]
        table = table.drop(columns="hw")
    for name in ("network", "kind"):
        if name not in table:
            raise ValueError(
                f"operations need a column {name!r} (one row per operation: network, kind, and what is known of shape and cost); "
                f"got columns {', '.join(map(str, frame.columns))}"
            )
        if table[name].isna().any():
            raise ValueError(f"operations: column {name!r} is empty in row {int(np.argmax(table[name].isna()))}")
    return table.dropna(axis="columns", how="all")


_NOT_IDENTITY_ENDS = ("_ms", "_mj", "_count")


def _truth(column: pd.Series) -> NDArray[np.bool_]:
    """A column of yes and no; missing is yes. Text from a file is read, not taken for yes."""
    words = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
    found = [True if pd.isna(v) else words.get(str(v).strip().lower()) for v in column]
    if None in found:
        raise ValueError(
            f"live: expected true or false, got {column.iloc[found.index(None)]!r} in row {found.index(None)}"
        )
    return np.asarray(found, bool)


def _is_identity(column: Any) -> bool:
    return column not in _NOT_IDENTITY and not str(column).endswith(_NOT_IDENTITY_ENDS)


def _column(table: pd.DataFrame, name: Any) -> Floats | None:
    """As numbers, None if it is text."""
    values = table[name]
    if pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(dtype=float, na_value=np.nan)
    read = pd.to_numeric(values, errors="coerce")
    if (read.isna() & values.notna()).any():
        if name in _NOT_IDENTITY:
            at = int(np.argmax(read.isna() & values.notna()))
            raise ValueError(f"operations: column {name!r} must be a number, got {values.iloc[at]!r} in row {at}")
        return None
    return read.to_numpy(dtype=float)


def _check(good: NDArray[np.bool_], name: str, values: Floats, need: str, table: pd.DataFrame) -> None:
    if not good.all():
        at = int(np.argmin(good))
        where = f"row {at}, network {table['network'].iloc[at]!r}, kind {table['kind'].iloc[at]!r}"
        raise ValueError(f"operations: {name} must be {need}, got {values[at]} ({where})")


def _texts(frame: pd.DataFrame) -> NDArray[np.object_]:
    """One JSON text per row, the same for the same values, whatever their types."""
    code = frame.groupby(list(frame.columns), sort=False, dropna=False).ngroup().to_numpy(dtype=np.intp)
    first = np.unique(code, return_index=True)[1]
    texts = []
    for values in frame.iloc[first].to_dict("records"):
        plain = {
            str(k): _plain(v) for k, v in values.items() if not (isinstance(v, float) and np.isnan(v)) and v is not None
        }
        texts.append(json.dumps(plain, sort_keys=True))
    return np.array(texts, dtype=object)[code]


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_ | int | np.integer | float | np.floating):
        number = round(float(value), 9)
        return int(number) if number.is_integer() else number
    return str(value)
