"""Tables of known results from a finished run, from a frame or file of columns, and from the NAS-Bench-Macro benchmark.

Columns of a frame or of a CSV or parquet file, as `Run.frame()` writes them:

    arch.<decision>         one per decision of the space; empty where it was not taken
    val_accuracy, ...       metrics of the finished training
    val_accuracy@<epoch>    optional, from 1: the learning curve, every epoch of it
    duration_s              seconds of the whole training; the argument `seconds` where it is missing
    state, seed             optional; rows that are not complete or infeasible, and copies, are left out

A row without a curve gets one that rises exponentially to its accuracy (`made_curve`), for stopping rules to have something to
look at: what they would do to the real curves it does not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from torch import nn

from nas.errors import DataError
from nas.frames import ARCH, read_frame
from nas.searchers.base import rng
from nas.simulate.table import KnownTable, Result, Row, Table
from search_spaces.architecture import Architecture, SpaceError, Value
from search_spaces.chooser import Chooser
from search_spaces.space import Space

if TYPE_CHECKING:
    from nas.run import Run

Unknown = Table | Literal["nearest", "error"]
_NO_METRICS = ("trial", "state", "searcher", "seed", "epochs", "digest", "error", "copy_of", "attempts", "duration_s")
MACRO_STAGES = (2, 3, 3)
MACRO_COLUMNS = ("arch", "acc_seed0", "acc_seed1", "acc_seed2", "params", "flops")


def from_run(run: Run, *, unknown: Unknown = "nearest") -> KnownTable:
    """The trainings of a run as they were: metrics, curves, seconds.

    Complete and infeasible trials; copies, failed ones and those that were stopped early (nobody knows how they would have gone
    on) are left out.

    Raises:
        DataError: the run has none.
    """
    trials = [t for t in run.trials if t.state in ("complete", "infeasible") and t.copy_of is None]
    if not trials:
        raise DataError(f"{run.folder}: expected a run with complete trials, found none")
    results = [
        Result(t.metrics, run.curve(t.trial), t.duration_s or 0.0, _state(t.state), t.violations) for t in trials
    ]
    return KnownTable([t.architecture for t in trials], results, [t.seed for t in trials], unknown=unknown)


def from_frame(
    frame: pd.DataFrame, space: Space, *, epochs: int = 1, seconds: float = 1.0, unknown: Unknown = "nearest"
) -> KnownTable:
    """A table from columns (see above).

    Args:
        frame: a row per training.
        space: finds the architectures of the decisions; options are compared as text, numbers by value.
        epochs: of trainings without a curve.
        seconds: of trainings without duration_s.
        unknown: as in `KnownTable`.

    Raises:
        DataError: no usable row, or one whose decisions are not of the space; names it.
    """
    if "state" in frame.columns:
        frame = frame[frame["state"].isin(["complete", "infeasible"])]
    if "copy_of" in frame.columns:
        frame = frame[frame["copy_of"].isna()]
    named = [c for c in frame.columns if c.startswith(ARCH)]
    if not named or frame.empty:
        raise DataError(
            f"a table of results: expected rows with columns {ARCH}<decision>, found {len(frame)} usable rows and the columns "
            f"{list(frame.columns)[:12]}"
        )
    steps = sorted(int(c.rpartition("@")[2]) for c in frame.columns if c.startswith("val_accuracy@"))
    architectures: list[Architecture] = []
    results: list[Result] = []
    seeds: list[int | None] = []
    for number, row in enumerate(frame.to_dict("records")):
        cells = {str(k): v for k, v in row.items() if not pd.isna(v)}
        try:
            architectures.append(_architecture(space, {c[len(ARCH) :]: cells[c] for c in named if c in cells}))
        except SpaceError as error:
            raise DataError(f"a table of results, row {number}: {error}") from error
        metrics = {k: v for k, v in cells.items() if k not in _NO_METRICS and not k.startswith(ARCH) and "@" not in k}
        curve: list[Row] = [
            {"epoch": i, "val_accuracy": cells[f"val_accuracy@{step}"]}
            for i, step in enumerate(steps, start=1)
            if f"val_accuracy@{step}" in cells
        ]
        if not curve and "val_accuracy" in metrics:
            curve = made_curve(float(metrics["val_accuracy"]), epochs, architectures[-1].digest)
        results.append(Result(metrics, curve, float(cells.get("duration_s", seconds)), _state(cells.get("state"))))
        seeds.append(int(cells["seed"]) if "seed" in cells else None)
    return KnownTable(architectures, results, seeds, unknown=unknown)


def from_file(
    path: str | Path, space: Space, *, epochs: int = 1, seconds: float = 1.0, unknown: Unknown = "nearest"
) -> KnownTable:
    """`from_frame` of a file: .parquet, else CSV (compressed too).

    Raises:
        DataError: it cannot be read, or as in `from_frame`.
    """
    try:
        frame = pd.read_parquet(path) if str(path).endswith(".parquet") else read_frame(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    try:
        return from_frame(frame, space, epochs=epochs, seconds=seconds, unknown=unknown)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def made_curve(final: float, epochs: int, digest: str, chance: float = 0.1) -> list[Row]:
    """A curve of `epochs` rows from near `chance` to exactly `final`; how fast, the digest decides."""
    rate = 4.0 * math.exp(0.5 * rng("rate", digest).gauss(0, 1))
    low = min(chance, final)
    rows: list[Row] = []
    for epoch in range(1, epochs + 1):
        reached = (1 - math.exp(-rate * epoch / epochs)) / (1 - math.exp(-rate)) if epoch < epochs else 1.0
        rows.append({"epoch": epoch, "val_accuracy": final if epoch == epochs else low + (final - low) * reached})
    return rows


def macro_space() -> Space:
    """The decisions of NAS-Bench-Macro: 8 layers in stages of 2, 3, 3, each 0 identity, 1 MBConv k3 e3, 2 MBConv k5 e6.

    Builds no networks. Where the identities of a stage stand, behind its first layer, computes the same; the digests say so.

    Source: Su et al. 2021, "Prioritized Architecture Sampling with Monto-Carlo Tree Search" (arXiv:2103.11922), section 4.
    """
    return Space(_macro, "nasbench_macro", canonical=_macro_canonical, size=lambda _: 3 ** sum(MACRO_STAGES))


def macro_table(path: str | Path, *, epochs: int = 9, seconds: float = 9.0) -> tuple[Space, KnownTable]:
    """NAS-Bench-Macro from its CSV file: columns arch (a digit per layer), acc_seed0 to acc_seed2 in percent, params, flops.

    "val_accuracy" is the benchmark's accuracy on CIFAR-10 as a share, of the seed that is asked for; "macs" are its flops. It has
    no curves and no seconds: those are made.

    Raises:
        DataError: the file cannot be read or lacks a column.
    """
    try:
        frame = pd.read_csv(path, dtype={"arch": str})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error
    missing = [name for name in MACRO_COLUMNS if name not in frame.columns]
    if missing or frame.empty:
        raise DataError(f"{path}: expected rows with the columns {list(MACRO_COLUMNS)}, missing are {missing}")
    space = macro_space()
    architectures: list[Architecture] = []
    results: list[Result] = []
    seeds: list[int | None] = []
    for row in frame.itertuples():
        architecture = space.architecture({f"layer{i}": int(digit) for i, digit in enumerate(str(row.arch))})
        for seed in range(3):
            accuracy = float(getattr(row, f"acc_seed{seed}")) / 100
            metrics = {"val_accuracy": accuracy, "params": int(str(row.params)), "macs": int(str(row.flops))}
            architectures.append(architecture)
            results.append(Result(metrics, made_curve(accuracy, epochs, architecture.digest), seconds))
            seeds.append(seed)
    return space, KnownTable(architectures, results, seeds)


def _macro(c: Chooser) -> nn.Module:
    for i in range(sum(MACRO_STAGES)):
        c.choice(f"layer{i}", (0, 1, 2))
    return nn.Identity()


def _macro_canonical(decisions: Mapping[str, Value], options: Mapping[str, Any]) -> Any:
    layers = [decisions[f"layer{i}"] for i in range(len(decisions))]
    stages = []
    for length in MACRO_STAGES:
        stage, layers = layers[:length], layers[length:]
        stages.append([stage[0], *(layer for layer in stage[1:] if layer != 0)])
    return stages


def _state(state: Any) -> Literal["complete", "infeasible"]:
    return "infeasible" if state == "infeasible" else "complete"


def _architecture(space: Space, cells: Mapping[str, Any]) -> Architecture:
    def decide(name: str, options: Sequence[Value]) -> Value:
        if name not in cells:
            raise SpaceError(f"decision {name!r} is missing; options: {list(options)}")
        for option in options:
            if option == cells[name] or str(option) == str(cells[name]):
                return option
        raise SpaceError(f"decision {name!r}: expected one of {list(options)}, got {cells[name]!r}")

    found = space.draw(decide)
    unknown = [name for name in cells if name not in found]
    if unknown:
        raise SpaceError(f"unknown decisions {unknown}; this architecture decides: {', '.join(found.as_dict())}")
    return found
