"""Searched against random node masks (`nas.oneshot.node_masks`): does it help to look for a subnetwork at initialisation?

Replicates are the pairs: within one, everything starts from the same weights and is trained with the same seed. Start with
`node_masks_sheet`; `node_masks_frame` has a row per trial, `node_masks_comparison` a row per node sparsity and figure.

Source of the comparison: R. Farahani, "Random Search as a Baseline for Sparse Neural Network Architecture Search"
(arXiv:2403.08265), abstract: final accuracy, and how fast it is reached, against random masks of equal sparsity and the dense
parent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nas.report.sheet import Column, Sheet
from nas.report.units import MISSING, short

if TYPE_CHECKING:
    from nas.run import Run
    from nas.schema import Trial

SEARCHER = "node_masks"
THRESHOLD = 0.95
"""Share of the dense parent's last validation accuracy that counts as having learned."""

FIGURES = ("val_accuracy", "test_accuracy", "epochs_to_threshold")
_COMPARED = (
    *("node_sparsity", "weight_sparsity", "figure", "versus", "searched", "other"),
    *("difference", "low", "high", "p", "p_flip", "pairs", "not_reached", "other_not_reached"),
)
_NOTED = ("role", "node_sparsity", "weight_sparsity", "kept_weights", "criterion")


def node_masks_frame(run: Run, threshold: float = THRESHOLD) -> pd.DataFrame:
    """One row per trial of node_masks, in any state.

    Columns: trial, state, replicate, seed, role ("searched", "random", "dense"), node_sparsity, weight_sparsity, kept_weights,
    criterion (loss at initialisation, nats), val_accuracy, test_accuracy, epochs (trained), epochs_to_threshold: the first epoch
    whose validation accuracy reaches `threshold` times the last one of the dense parent of the same replicate; inf if none does,
    NaN if that is not known (yet).
    """
    trials = [trial for trial in run.trials if trial.searcher == SEARCHER]
    goals = {
        _replicate(trial): threshold * accuracy
        for trial in trials
        if trial.sampler.get("role") == "dense" and (accuracy := _metric(trial, "val_accuracy")) is not None
    }
    rows = []
    for trial in trials:
        goal = goals.get(_replicate(trial))
        curve = run.curve(trial.trial) if goal is not None and trial.state == "complete" else []
        rows.append(
            {
                "trial": trial.trial,
                "state": trial.state,
                "replicate": _replicate(trial),
                "seed": trial.seed,
                **{name: trial.sampler.get(name) for name in _NOTED},
                "val_accuracy": _metric(trial, "val_accuracy"),
                "test_accuracy": _metric(trial, "test_accuracy"),
                "epochs": trial.epochs,
                "epochs_to_threshold": math.nan if goal is None else epochs_to(curve, goal),
            }
        )
    columns = ["trial", "state", "replicate", "seed", *_NOTED, "val_accuracy", "test_accuracy", "epochs"]
    frame = pd.DataFrame(rows, columns=[*columns, "epochs_to_threshold"])
    floats = ("node_sparsity", "weight_sparsity", "criterion", *FIGURES)
    for name in floats:
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    return frame


def epochs_to(curve: Sequence[Mapping[str, Any]], accuracy: float) -> float:
    """The first epoch of a history whose validation accuracy is at least `accuracy`; inf if none, NaN without a history."""
    if not curve:
        return math.nan
    return next((float(row["epoch"]) for row in curve if row["val_accuracy"] >= accuracy), math.inf)


def node_masks_comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """Searched masks against random ones, and against the dense parent, paired over replicates.

    Args:
        frame: from `node_masks_frame`.

    Returns:
        A row per node sparsity, figure (of `FIGURES`) and "versus" ("random", "dense"): weight_sparsity; means "searched" and
        "other" over the replicates that have both; "difference" (searched - other), its 95 % interval "low", "high" and two-sided
        "p" of a paired t test, "p_flip" of the exact sign-flip test (`nas.oneshot.statistics.paired`); "pairs". Several random
        masks of a replicate count as their mean. Networks that never reach the threshold count as one epoch more than they were
        trained for: "not_reached" says how many of the searched, and "other_not_reached" how many of the others. Test accuracy is
        compared only where all have one: those that were handed out for being good are no fair sample.
    """
    done = frame[frame["state"].eq("complete").fillna(False)].copy()
    late = np.isinf(done["epochs_to_threshold"].to_numpy())
    done["late"] = late
    done.loc[late, "epochs_to_threshold"] = done.loc[late, "epochs"].astype("float64") + 1
    dense = done[done["role"] == "dense"]
    tested = bool(done["test_accuracy"].notna().all())
    figures = [figure for figure in FIGURES if tested or figure != "test_accuracy"]
    rows = []
    for sparsity, group in done[done["role"] != "dense"].groupby("node_sparsity", sort=True):
        searched, random = group[group["role"] == "searched"], group[group["role"] == "random"]
        for figure in figures:
            for versus, other in (("random", random), ("dense", dense)):
                rows.append(_compared(float(sparsity), figure, versus, searched, other))  # type: ignore[arg-type]
    made = pd.DataFrame(rows, columns=list(_COMPARED))
    return made[made["pairs"] > 0].reset_index(drop=True)


def node_masks_sheet(run: Run, threshold: float = THRESHOLD) -> Sheet | None:
    """The comparison for people; None if the run has no finished pair of node masks."""
    frame = node_masks_frame(run, threshold)
    made = node_masks_comparison(frame)
    against = made[made["versus"] == "random"]
    if against.empty:
        return None
    columns = (
        *(Column("node sparsity", True), Column("weight sparsity", True), Column("figure")),
        *(Column("searched", True), Column("random", True), Column("difference [95 %]", True), Column("p", True)),
        Column("p flip", True, 3),
        *(Column("dense parent", True, 2), Column("pairs", True, 1)),
    )
    rows, keys, styles = [], [], []
    for row in against.to_dict("records"):
        same = (made["versus"] == "dense") & (made["node_sparsity"] == row["node_sparsity"])
        parent = made[same & (made["figure"] == row["figure"])]
        dense = float(parent["other"].iloc[0]) if len(parent) else math.nan
        figure = str(row["figure"])
        cells = (f"{row['node_sparsity']:g}", f"{row['weight_sparsity']:.3f}", _called(figure, threshold))
        means = (_shown(figure, row["searched"]), _shown(figure, row["other"]))
        tests = (_interval(figure, row), _p(row["p"]), _p(row["p_flip"]))
        rows.append((*cells, *means, *tests, _shown(figure, dense), str(row["pairs"])))
        numbers_ = (row["difference"], row["p"], row["p_flip"], dense, row["pairs"])
        keys.append((row["node_sparsity"], row["weight_sparsity"], None, row["searched"], row["other"], *numbers_))
        styles.append("")
    notes = [
        "a pair: equal first weights, seed and training; several random masks count as their mean; p: paired t test, "
        "p flip: exact sign-flip test; both two-sided, not corrected for the number of rows",
        f"threshold: {threshold:.0%} of the dense parent's last validation accuracy in the same replicate",
        "weight sparsity: of all convolution and linear weights, by the nodes that are left",
        *_late_notes(against),
    ]
    if (most := int(against["pairs"].max())) < 5:
        notes.append(
            f"{most} pair{'s' if most != 1 else ''} say little; options.{SEARCHER}.seeds = 5 or more gives that many"
        )
    done = frame[frame["state"] == "complete"]
    if 0 < (tested := int(done["test_accuracy"].notna().sum())) < len(done):
        notes.append(
            f"test accuracy is not compared: only {tested} of {len(done)} networks have one, and not by chance"
        )
    unfinished = int((frame["state"] != "complete").sum())
    if unfinished:
        notes.append(f"{unfinished} of {len(frame)} trials are not complete and are left out")
    title = "Node masks: searched at initialisation against random"
    return Sheet(title, columns, tuple(rows), tuple(notes), tuple(styles), tuple(keys))


def _compared(sparsity: float, figure: str, versus: str, searched: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    from nas.oneshot.statistics import paired

    one = searched.groupby("replicate")[figure].mean().dropna()
    two = other.groupby("replicate")[figure].mean().dropna()
    both = one.index.intersection(two.index)
    a, b = one.loc[both].to_numpy(), two.loc[both].to_numpy()
    found = paired(a.tolist(), b.tolist())
    counted = figure == "epochs_to_threshold"
    return {
        "node_sparsity": sparsity,
        "weight_sparsity": float(searched["weight_sparsity"].mean()),
        "figure": figure,
        "versus": versus,
        "searched": float(a.mean()) if len(both) else math.nan,
        "other": float(b.mean()) if len(both) else math.nan,
        **{"difference": found.mean, "low": found.low, "high": found.high, "p": found.p_t, "p_flip": found.p_flip},
        "pairs": found.n,
        "not_reached": int(searched["late"].sum()) if counted else 0,
        "other_not_reached": int(other["late"].sum()) if counted else 0,
    }


def _replicate(trial: Trial) -> int:
    return int(trial.sampler.get("replicate", trial.seed))


def _metric(trial: Trial, name: str) -> float | None:
    value = trial.metrics.get(name)
    finite = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if finite and value is not None else None


def _called(figure: str, threshold: float) -> str:
    return f"epochs to {threshold:.0%}" if figure == "epochs_to_threshold" else short(figure)


def _shown(figure: str, value: Any, sign: str = "") -> str:
    if not math.isfinite(value):
        return MISSING
    return format(value, f"{sign}.1f" if figure == "epochs_to_threshold" else f"{sign}.4f")


def _interval(figure: str, row: Mapping[Any, Any]) -> str:
    middle = _shown(figure, row["difference"], "+")
    if not math.isfinite(row["low"]):
        return middle
    return f"{middle} [{_shown(figure, row['low'], '+')}, {_shown(figure, row['high'], '+')}]"


def _p(value: float) -> str:
    return MISSING if not math.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _late_notes(against: pd.DataFrame) -> list[str]:
    searched, random = int(against["not_reached"].sum()), int(against["other_not_reached"].sum())
    if not searched + random:
        return []
    return [
        f"{searched} searched and {random} random networks never reach the threshold; they count as one epoch more than they were "
        "trained for, so the means are lower bounds"
    ]
