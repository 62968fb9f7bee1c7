"""How wrong a predictor is about networks it has not seen: `left_out(...)`, and the spread that follows: `Spread`.

Networks are left out in folds and priced by what the others taught: once with every shape that the others have, then with shapes
hidden, so that some or most of their time has to be learned from other shapes. The errors, next to what the predictor itself
was unsure of, give the width of its intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.conformal import Conformal
from hw_models.context import Context, class_of, surroundings
from hw_models.model import SOURCES
from hw_models.network_model import NetworkModel
from hw_models.step_model import StepModel
from hw_models.step_table import StepTable

__all__ = ["WORTH_NAMING", "Judged", "Spread", "left_out"]

Floats = npt.NDArray[np.float64]

FOLDS = 5
HIDDEN = (0.0, 0.5, 1.0)  # shares of a network's shapes that are hidden, one pass each
WORTH_NAMING = 0.01  # share of the time from which on a source counts
# Networks left out are of the same make as those that taught; those that are asked for may not be. What is learned from other
# shapes is less sure of them: by about this much on networks of search spaces, asked of a model of probe networks alone.
OTHER_MAKE = 1.15
COMMON = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Spread:
    """From what steps are unsure of to what a network is.

    Errors of steps average out, but for the part they have in common: `learned` of the spread of learned steps and `table` of the
    spread of measured ones are the same error for all of them.
    """

    learned: float = 0.5
    table: float = 0.3

    def __call__(self, alone: Floats, learned: Floats, table: Floats, whole: float) -> Floats:
        """Standard deviation of log time.

        Args:
            alone: float[n], sum of squares of (share x spread) over a network's steps.
            learned, table: float[n], sum of share x spread, over its learned and its measured steps.
            whole: the error of the correction from sum to whole.
        """
        return np.sqrt(alone + (self.learned * learned) ** 2 + (self.table * table) ** 2 + whole**2)

    def to_dict(self) -> dict[str, float]:
        """Plain values, ready for JSON."""
        return {"learned": self.learned, "table": self.table}


@dataclass(frozen=True, eq=False)
class Judged:
    """Answers to networks left out.

    Attributes:
        frame: one row per network and pass: error (log of measured / predicted), alone, learned, table (see `Spread`), source.
        whole: error of the correction from sum to whole.
    """

    frame: pd.DataFrame
    whole: float

    def fit(self) -> tuple[Spread, Conformal]:
        """The spread under which these errors are likeliest, and intervals that hold for 90 % of them, and a little wider."""
        f = self.frame
        parts = [f[name].to_numpy(float) for name in ("alone", "learned", "table")]
        error = f["error"].to_numpy(float)
        best, least = Spread(), np.inf
        for learned in COMMON:
            for table in COMMON:
                spread = Spread(learned, table)
                s = spread(parts[0], parts[1], parts[2], self.whole)
                z = np.abs(error) / s
                scale = max(float(np.median(z)) / 0.6745, 1e-6)
                loss = float(np.mean(np.log(s * scale) + np.minimum(z / scale, 6.0)))
                if loss < least - 1e-9:
                    best, least = spread, loss
        found = Conformal.fit(error, best(parts[0], parts[1], parts[2], self.whole), f["source"].to_numpy())
        wider = {**found.quantiles, "learned": found.quantiles["learned"] * OTHER_MAKE}
        return best, replace(found, quantiles=wider)

    def facts(self, spread: Spread) -> dict[str, Any]:
        """Shares of networks within 5 and 10 %, by source, in percent."""
        found: dict[str, Any] = {}
        for source, rows in self.frame.groupby("source"):
            error = np.abs(np.expm1(-rows["error"].to_numpy(float)))
            found[str(source)] = {
                "n": int(rows["network"].nunique()),
                "within_5": round(100 * float(np.mean(error <= 0.05)), 1),
                "within_10": round(100 * float(np.mean(error <= 0.10)), 1),
                "rmspe": round(100 * float(np.sqrt(np.mean(error**2))), 2),
            }
        return {"left_out": found, "spread": spread.to_dict()}


def left_out(
    observed: pd.DataFrame,
    networks: pd.DataFrame,
    learned: StepModel,
    context: Context,
    correction: NetworkModel,
    seed: int = 0,
) -> Judged:
    """Price every network by what the others taught.

    Args:
        observed, networks: as for `hw_models.predictor.Predictor.fit`, complete, times of steps detached from their networks
            (`Context.detached`); networks of one `group` are left out together.
        learned: fitted to `observed`.
        context: puts them back.
        correction: from sums to wholes.
        seed: of folds and of what is hidden.
    """
    rng = np.random.default_rng(seed)
    groups, which = np.unique(networks["group"].to_numpy(str), return_inverse=True)
    folds = min(FOLDS, len(groups))
    if folds < 2:
        return Judged(pd.DataFrame(columns=["error", "alone", "learned", "table", "source"]), correction.error)
    fold_of = pd.Series((rng.permutation(len(groups)) % folds)[which], index=networks.index)
    row_fold = observed["network"].map(fold_of).to_numpy()
    learned_ms, learned_sigma = learned.without_shape(observed)
    n = len(observed)
    ms, sigma, source = np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1, np.int8)
    for fold in range(folds):
        inside = np.flatnonzero(row_fold == fold)
        others = observed[row_fold != fold]
        if len(inside) and len(others):
            ms[inside], sigma[inside], source[inside] = StepTable.fit(others).price(observed.iloc[inside])
    passes = [
        _pass(observed, networks, context, correction, (ms, sigma, source), (learned_ms, learned_sigma), share, rng)
        for share in HIDDEN
    ]
    return Judged(pd.concat(passes, ignore_index=True), correction.error)


def _pass(
    observed: pd.DataFrame,
    networks: pd.DataFrame,
    context: Context,
    correction: NetworkModel,
    table: tuple[Floats, Floats, npt.NDArray[np.int8]],
    learned: tuple[Floats, Floats],
    hidden: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """One row per network, with a share of the shapes that have weights hidden from the table."""
    ms, sigma, source = (part.copy() for part in table)
    shape = pd.Series(np.arange(len(observed))).groupby([observed["network"].to_numpy(), observed["curve"].to_numpy()])
    hide = pd.Series(rng.random(shape.ngroups) < hidden)[shape.ngroup().to_numpy()].to_numpy()
    lost = (source < 0) | (hide & (observed["nnz"].to_numpy(float) > 0))
    ms[lost], sigma[lost], source[lost] = learned[0][lost], learned[1][lost], 2
    place = observed["network"].map(pd.Series(np.arange(len(networks)), index=networks.index)).to_numpy(int)
    there = context.attached(np.asarray(ms, float), class_of(observed), surroundings(networks)[place])
    spent = there * observed["count"].to_numpy(float)
    label = observed["network"].to_numpy()

    def sums(values: npt.NDArray[Any]) -> Floats:
        return np.asarray(pd.Series(values).groupby(label).sum().reindex(networks.index).fillna(0.0), float)

    total = np.maximum(sums(spent), 1e-12)
    worst = np.zeros(len(networks), np.int64)
    for number in range(1, len(SOURCES)):
        worst[sums(np.where(source == number, spent, 0.0)) / total >= WORTH_NAMING] = number
    whole = correction.predict(networks.assign(sum_ms=total))
    columns: Mapping[str, Any] = {
        "error": np.log(networks["ms"].to_numpy(float) / whole),
        "alone": sums(observed["count"].to_numpy(float) * (there * sigma) ** 2) / total**2,
        "learned": sums(np.where(source == 2, spent * sigma, 0.0)) / total,
        "table": sums(np.where(source < 2, spent * sigma, 0.0)) / total,
        "source": np.asarray(SOURCES, object)[worst],
        "network": networks.index,
        "hidden": hidden,
    }
    return pd.DataFrame(columns)
