"""Latency tables of other people's devices: `fit_table(operations, latency_ms) -> TableModel`.

A table gives times of whole networks and says what they are made of, one row per operation. The model is a sum over operations,
with a learned correction where sums fail, and 90 % intervals that hold on networks it has not seen. It needs no plan, no runtime
and no device: nothing here is about the kernels of this package.

    from hw_models.foreign import fit_table
    from hw_models.lowered_cells import cell_operations

    operations = cell_operations(range(15625))                # network, kind, shape, count, live, macs, ...
    model = fit_table(operations, latency_ms.loc[train])      # Series: network -> ms; networks without a time are left aside
    model.predict_many(operations)                            # network -> ms, lo_ms, hi_ms, source
    model.score(operations, latency_ms.loc[test])             # hit5, hit10, rmspe, mape, bias, spearman, kendall, coverage, width

Source: sections 2.1 to 2.3 and 5.3 of the facts this package is built from. `docs/foreign_tables.md` is the long form.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.accuracy import accuracy
from hw_models.conformal import corrected_quantile
from hw_models.foreign_additive import Additive, fit_additive, typical_error
from hw_models.foreign_features import Operations
from hw_models.foreign_inputs import folds_of, matched
from hw_models.foreign_residual import Residual, fit_residual
from hw_models.foreign_sums import Sums, fit_sums

__all__ = ["TableModel", "fit_table"]

Floats = NDArray[np.float64]
FORMAT = 1
COVERAGE = 0.9
FEW = 3
UNKNOWN = 0.25  # spread of log time where nothing was left out to learn it from
STRANGE = 2.0  # intervals of networks with operations that have no price of their own are wider by this


@dataclass(frozen=True)
class TableModel:
    """Predicts networks described by their operations; made by `fit_table`.

    Attributes:
        additive: prices of operations; None where their own times are summed.
        sums: curves of operations; None where prices are used.
        residual: learned correction; None where there is none.
        spread: typical error of log time.
        sizes, ratios: knots: the spread is `ratios` times as large at log time `sizes`.
        low, high: ends of the interval in spreads, low < 0 < high.
        networks: how many it was fitted on.
    """

    additive: Additive | None
    sums: Sums | None
    residual: Residual | None
    spread: float
    sizes: Floats
    ratios: Floats
    low: float
    high: float
    networks: int

    def __str__(self) -> str:
        if self.additive is not None:
            level = ("prices per unit of work", "prices per kind", "prices per operation")[self.additive.level - 1]
            view = {"raw": "all operations", "live": "live operations only", "both": "dead operations priced apart"}
            what = f"{level}, {view[self.additive.view]}, constant {self.additive.constant_ms:.3g} ms"
        else:
            what = "times of operations summed"
        learned = "no learned correction"
        if self.residual is not None:
            learned = f"corrected by a {self.residual.to_dict()['model']}"
        return f"{what}; {learned}; fitted on {self.networks} networks; typical error {self.spread:.1%}"

    def predict_many(self, operations: pd.DataFrame) -> pd.DataFrame:
        """Price networks.

        Args:
            operations: as for `fit_table`; `ms` of an operation, where given, is taken as it is if the model sums times.

        Returns:
            Index network, in order of first appearance; ms, lo_ms, hi_ms (90 % interval), source: "measured" or "interpolated"
            where the time is the sum of such times, "learned", or "analytical" where a kind of operation was never seen.

        Raises:
            ValueError: operations are not as described, or one of them cannot be priced; says which.
        """
        ops = Operations.of(operations)
        each, whole, source = self._base(ops)
        deviation = np.zeros(len(whole))
        if self.residual is not None:
            mean, deviation = self.residual.log_factor(ops, each, whole)
            whole = whole * np.exp(mean)
        spread = np.hypot(self.spread, deviation) * np.interp(np.log(whole), self.sizes, self.ratios)
        spread = np.where(source == "analytical", STRANGE * spread, spread)
        lo, hi = whole * np.exp(self.low * spread), whole * np.exp(self.high * spread)
        return pd.DataFrame({"ms": whole, "lo_ms": lo, "hi_ms": hi, "source": source}, index=ops.networks)

    def predict(self, operations: pd.DataFrame) -> pd.Series:
        """The row of `predict_many` for one network; column `network` may be missing.

        Raises:
            ValueError: these are operations of several networks, or as for `predict_many`.
        """
        frame = operations if "network" in operations else operations.assign(network=0)
        rows = self.predict_many(frame)
        if len(rows) != 1:
            raise ValueError(f"predict takes one network, got {len(rows)}; use predict_many")
        return rows.iloc[0]

    def score(self, operations: pd.DataFrame, latency_ms: Any) -> dict[str, float]:
        """How good it is on networks whose time is known: `hw_models.accuracy.accuracy`, with coverage and width of the intervals.

        Args:
            operations, latency_ms: as for `fit_table`; only networks with a time are scored.
        """
        frame, ms = matched(operations, latency_ms)
        predicted = self.predict_many(frame)
        return accuracy(ms, predicted["ms"], predicted["lo_ms"], predicted["hi_ms"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `<path>.json` and `<path>.npz`; nothing is pickled."""
        stem = _stem(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        arrays = {} if self.residual is None else self.residual.to_arrays()
        data = {
            "format": FORMAT,
            "additive": None if self.additive is None else self.additive.to_dict(),
            "sums": None if self.sums is None else self.sums.to_dict(),
            "residual": None if self.residual is None else self.residual.to_dict(),
            "numbers": [self.spread, self.low, self.high, self.networks],
        }
        np.savez(
            f"{stem}.npz",
            allow_pickle=False,
            sizes=self.sizes,
            ratios=self.ratios,
            **{f"residual.{k}": v for k, v in arrays.items()},
        )
        Path(f"{stem}.json").write_text(json.dumps(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TableModel:
        """The model that `save` wrote.

        Raises:
            ValueError: the files are of another format, or not such files.
            FileNotFoundError: there are none.
        """
        stem = _stem(path)
        try:
            data = json.loads(Path(f"{stem}.json").read_text())
            with np.load(f"{stem}.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}; fit the table again")
            inner = {name.removeprefix("residual."): v for name, v in arrays.items() if name.startswith("residual.")}
            spread, low, high, networks = data["numbers"]
            return cls(
                None if data["additive"] is None else Additive.from_dict(data["additive"]),
                None if data["sums"] is None else Sums.from_dict(data["sums"]),
                None if data["residual"] is None else Residual.load(data["residual"], inner),
                spread,
                arrays["sizes"],
                arrays["ratios"],
                low,
                high,
                int(networks),
            )
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{stem}.json and .npz do not hold a table model: {error}") from error

    def _base(self, ops: Operations) -> tuple[Floats, Floats, NDArray[np.object_]]:
        """ms of one execution of each row, ms of each network by the sum, and where that is from."""
        source = np.full(len(ops.networks), "learned", object)
        if self.sums is not None:
            each, origin = self.sums.operation_ms(ops)
            whole = self.sums.predict(ops, each)
            for name in ("measured", "interpolated", "learned"):  # the least sure one that 1 % of the time comes from
                part = ops.per_network(np.where(origin == name, each, 0.0))
                source[part >= 0.01 * np.maximum(ops.per_network(each), 1e-300)] = name
            return each, whole, source
        assert self.additive is not None
        each = self.additive.operation_ms(ops)
        source[~self.additive.seen(ops)] = "analytical"
        least = 1e-9 + 0.05 * math.exp(float(self.sizes[0]))
        return each, np.maximum(self.additive.constant_ms + ops.per_network(each), least), source


def fit_table(
    operations: pd.DataFrame,
    latency_ms: Any = None,
    *,
    groups: Mapping[Any, Any] | pd.Series | Sequence[Any] | None = None,
    seed: int = 0,
) -> TableModel:
    """Fit a table of network latencies.

    Args:
        operations: one row per operation of a network. Needed: `network`, `kind`. Used where given: `count` (how often it runs, 1),
            `live` (False: a compiler may delete it), shapes (`c_in`, `c_out`, `h`, `w` of the output, `kernel`, `stride`, `groups`,
            `batch`, `expand` or `mid` for inverted residual blocks), costs (`macs`, `activations`, `params`; else from the shape),
            `density` (kept fraction; or `sparsity`), `pattern`, `src` and `dst` (nodes of the network's graph, src < dst), `ms`
            (own time of one execution). Any other column is part of what the operation is. Usual other names are understood
            (cin, ks, strides, ...).
        latency_ms: time of each network: Series or mapping by network, or a sequence in order of first appearance. Any unit;
            answers are in the same. Networks without a time are left aside, but for the times of their operations. None only if
            operations have times of their own: then networks are their sums.
        groups: what to split by when the model tests itself, e.g. families: as `latency_ms`. Default: each network by itself.
        seed: of splits.

    Returns:
        A model. `print(model)` says what was found. Where at least half of the operations have `ms` their times are summed, else
        prices are looked for; where both are possible the better one on left-out networks is taken.

    Raises:
        ValueError: operations are not as described; a time is missing, not finite or not above 0; nothing to fit.
    """
    if latency_ms is None:
        summed, _ = fit_sums(Operations.of(operations))
        return _finished(None, summed, None, np.zeros(0), np.zeros(0), np.zeros(0))
    frame, ms = matched(operations, latency_ms)
    ops = Operations.of(frame)
    folds = folds_of(ops.networks, groups, seed)
    timed = float(np.mean(~np.isnan(ops.ms))) >= 0.5
    many = len(np.unique(folds)) > 1
    additive: Additive | None = None
    sums: Sums | None = None
    held: Floats | None = None
    if timed:
        sums, held = fit_sums(Operations.of(operations), ops, ms, folds if many and len(ms) >= 3 else None)
    if not timed or (len(ms) >= 20 and many):
        additive, own = fit_additive(ops, ms, folds if many else np.arange(len(ms)))
        if held is not None and typical_error(np.log(held / ms)) <= additive.error:
            additive = None
        else:
            sums, held = None, own
    if held is None or len(ms) < 3 or not many:
        return _finished(additive, sums, None, np.zeros(0), np.zeros(0), ms)
    plain = TableModel(additive, sums, None, UNKNOWN, np.log([ms.min()]), np.ones(1), -1.0, 1.0, len(ms))
    each, whole, _ = plain._base(ops)
    residual, held, spread = fit_residual(ops, each, whole, held, ms, folds, seed)
    return _finished(additive, sums, residual, held, spread, ms)


def _finished(
    additive: Additive | None, sums: Sums | None, residual: Residual | None, held: Floats, spread: Floats, ms: Floats
) -> TableModel:
    """The model with intervals from its errors on left-out networks."""
    if not len(held):
        size = float(np.log(np.median(ms))) if len(ms) else 0.0
        return TableModel(
            additive, sums, None, UNKNOWN / 5 if sums else UNKNOWN, np.array([size]), np.ones(1), -1.645, 1.645, len(ms)
        )
    error = np.log(ms / held)
    sizes, ratios = _by_size(np.log(held), np.abs(error) / spread)
    score = error / (spread * np.interp(np.log(held), sizes, ratios))
    tail = 1 - (1 - COVERAGE) / 2
    low, high = -corrected_quantile(-score, tail), corrected_quantile(score, tail)
    if not (math.isfinite(low) and math.isfinite(high)):  # too few for each end apart
        half = corrected_quantile(np.abs(score), COVERAGE)
        half = half if math.isfinite(half) else max(1.5 * float(np.abs(score).max()), 1.645)
        low, high = -half, half
    noise, few = float(np.min(spread)), 1 + FEW / len(ms)  # choosing the model on few networks flatters it
    return TableModel(
        additive, sums, residual, noise, sizes, ratios, few * min(low, -0.1), few * max(high, 0.1), len(ms)
    )


def _by_size(size: Floats, error: Floats) -> tuple[Floats, Floats]:
    """How much larger errors are for short networks than usual: knots over log time, not increasing.

    Short times suffer from coarse timers and interruptions. Flat where there are too few networks to see it.
    """
    bins = min(5, len(size) // 25)
    if bins < 2:
        return np.array([float(np.median(size))]), np.ones(1)
    edges = np.array_split(np.argsort(size), bins)
    level = np.array([np.mean(np.minimum(error[part], 3 * np.median(error[part]) + 1e-9)) for part in edges])
    from hw_models.curves import isotonic

    falling = -isotonic(-level, np.ones(bins))
    middle = np.array([float(np.median(size[part])) for part in edges])
    return middle, falling / np.median(falling)


def _stem(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    return found.with_suffix("") if found.suffix in (".json", ".npz") else found
