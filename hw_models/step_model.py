"""Times of steps whose shape was never measured: `StepModel.fit(observed steps)`, then `predict(steps)`.

Steps of one family ("conv/specialised", "halo/lanes", ...) cost what their work costs: multiply-adds, bytes, rows of a loop and a
call, each at a price that cannot be negative (`regression.NonNegative`). Prices of a family are drawn towards those of its kernel,
and these towards those of everything, so that a family seen a few times is not left to itself. What is left over is learned in log
space, by a Gaussian process or boosted trees, and used only in families where that helps on shapes left out.

What counts is the time of networks. A step matters by its share of the time of the networks it was seen in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hw_models.regression import GaussianProcess, NonNegative
from hw_models.step_family import ROBUST, SHRINK, Family, fit_family
from hw_models.step_features import shape, work
from hw_models.trees import BoostedTrees

__all__ = ["StepModel", "shape_groups"]

Floats = NDArray[np.float64]

# A family with less than this share of the networks' time gets prices only: nothing learned of the rest would be seen.
WORTH_LEARNING = 0.01
# Standard deviation in log space for a family nobody has seen, at least, by what it was priced from: its class, or everything.
UNKNOWN_SIGMA = {"class": 0.6, "all": 1.0}


def shape_groups(steps: pd.DataFrame) -> NDArray[Any]:
    """str[n]: equal for steps of equal shape, whatever the density, the kernel and what is fused: what to leave out together."""
    columns = ("channels_in", "channels_out", "positions", "window", "stride", "groups", "batch")
    text = steps["kind"].astype(str)
    for name in columns:
        text = text + "/" + steps[name].astype(np.int64).astype(str)
    return text.to_numpy(dtype=object)


@dataclass(frozen=True, eq=False)
class StepModel:
    """Priced families, and prices for families that were not seen.

    Attributes:
        families: family -> model.
        classes: prices over all families of a kernel, e.g. "lanes"; "torch" are torch's layers, "torch operations" its others.
        everything: prices over all rows.
        left_out: of the rows it was fitted to, by `row_names`: ms and sigma of an answer that had not seen the row's shape;
            None after reading from a file.
    """

    families: dict[str, Family]
    classes: dict[str, NonNegative]
    everything: NonNegative
    left_out: pd.DataFrame | None = field(default=None, repr=False)

    @classmethod
    def fit(cls, observed: pd.DataFrame, groups: NDArray[Any] | None = None, seed: int = 0) -> StepModel:
        """Fit all families.

        Args:
            observed: steps frame (`hw_models.workload.STEP_COLUMNS`) and `ms` > 0; `network` and `count` (how often the network
                executes the step), if there, give the rows their weights.
            groups: object[n]: rows that are left out together where choices are tried; default `shape_groups`.
            seed: of every draw.

        Raises:
            ValueError: no rows, or a time that is not positive.
        """
        if not len(observed):
            raise ValueError("a step model needs at least one observed step")
        if not (observed["ms"].to_numpy(float) > 0).all():
            raise ValueError("ms of observed steps must be positive; leave steps that failed out")
        rows = _distinct(observed, shape_groups(observed) if groups is None else groups)
        w, x, ms = work(rows), shape(rows), rows["ms"].to_numpy(float)
        weight, group = rows["weight"].to_numpy(float), rows["group"].to_numpy()
        everything = NonNegative.fit(w, ms, weight, robust=ROBUST)
        judged = np.empty((len(rows), 2))
        classes: dict[str, NonNegative] = {}
        families: dict[str, Family] = {}
        for name, at in rows.groupby(_classes(rows)).indices.items():
            wide = NonNegative.fit(w[at], ms[at], weight[at], prior=everything.prices, shrink=SHRINK, robust=ROBUST)
            classes[str(name)] = wide
            for family, inside in rows.iloc[at].groupby("family").indices.items():
                i = np.asarray(at)[inside]
                learn = float(weight[i].sum()) >= WORTH_LEARNING * float(weight.sum())
                found = fit_family(w[i], x[i], ms[i], weight[i], group[i], wide, seed, learn)
                families[str(family)] = found
                assert found.errors is not None
                assert found.deviations is not None
                judged[i, 0] = ms[i] * np.exp(-found.errors)
                judged[i, 1] = np.hypot(found.sigma, found.stretch * found.deviations)
        return cls(families, classes, everything, pd.DataFrame(judged, columns=["ms", "sigma"], index=rows["name"]))

    def without_shape(self, observed: pd.DataFrame) -> tuple[Floats, Floats]:
        """What the model would say of the rows it was fitted to if it had never seen their shapes.

        Returns:
            ms: float64[n]. sigma: float64[n], in log space.

        Raises:
            ValueError: the model was read from a file, or fitted to other rows.
        """
        if self.left_out is None:
            raise ValueError("only a model that was just fitted knows what it says without a shape")
        found = self.left_out.reindex(row_names(observed))
        if found["ms"].isna().any():
            raise ValueError("the model was fitted to other rows")
        return found["ms"].to_numpy(float), found["sigma"].to_numpy(float)

    def predict(self, steps: pd.DataFrame) -> tuple[Floats, Floats]:
        """Price steps.

        Args:
            steps: steps frame, n rows.

        Returns:
            ms: float64[n], positive. sigma: float64[n], standard deviation of log ms; for families that were not seen, which
            are priced like others of their class or like everything, 0.6 or 1 at least.
        """
        w, x, classes = work(steps), shape(steps), _classes(steps)
        ms, sigma = np.empty(len(steps)), np.empty(len(steps))
        for family, at in steps.groupby("family").indices.items():
            if str(family) in self.families:
                ms[at], sigma[at] = self.families[str(family)].predict(w[at], x[at])
            else:
                name = str(classes[at[0]])
                prices = self.classes.get(name, self.everything)
                ms[at] = np.maximum(prices.predict(w[at]), 1e-9)
                sigma[at] = UNKNOWN_SIGMA["class" if name in self.classes else "all"]
        return ms, sigma

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays for one NPZ file; the names of families are in "index", JSON text as uint8."""
        arrays: dict[str, NDArray[Any]] = {"everything": self.everything.prices}
        index: dict[str, Any] = {"classes": list(self.classes), "families": []}
        for i, prices in enumerate(self.classes.values()):
            arrays[f"class{i}"] = prices.prices
        for i, (name, family) in enumerate(self.families.items()):
            numbers = [family.offset, family.sigma, family.stretch]
            index["families"].append([name, family.residual, numbers])
            arrays[f"family{i}.prices"] = family.prices.prices
            for part, model in (("process", family.process), ("trees", family.trees)):
                if model is not None:
                    arrays |= {f"family{i}.{part}.{n}": a for n, a in model.to_arrays().items()}
        arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> StepModel:
        """The model `to_arrays` was called on; KeyError if an array is missing."""
        index = json.loads(np.asarray(arrays["index"]).tobytes())
        classes = {name: NonNegative(np.asarray(arrays[f"class{i}"])) for i, name in enumerate(index["classes"])}
        families = {}
        for i, (name, residual, (offset, sigma, stretch)) in enumerate(index["families"]):
            parts: dict[str, dict[str, Any]] = {"process": {}, "trees": {}}
            for part, found in parts.items():
                head = f"family{i}.{part}."
                found.update({n[len(head) :]: arrays[n] for n in arrays if n.startswith(head)})
            process = GaussianProcess.from_arrays(parts["process"]) if parts["process"] else None
            trees = BoostedTrees.from_arrays(parts["trees"]) if parts["trees"] else None
            prices = NonNegative(np.asarray(arrays[f"family{i}.prices"]))
            families[name] = Family(prices, residual, offset, process, trees, sigma, stretch)
        return cls(families, classes, NonNegative(np.asarray(arrays["everything"])))


def row_names(observed: pd.DataFrame) -> NDArray[Any]:
    """object[n]: what tells distinct steps apart: the key; rows without one are told apart by their place."""
    key = (observed["key"].astype(str) + "@" + observed["family"].astype(str)).to_numpy(dtype=object)
    nameless = np.flatnonzero(observed["key"].to_numpy() == "")
    key[nameless] = [f"row {i}" for i in nameless]
    return key


def _distinct(observed: pd.DataFrame, groups: NDArray[Any]) -> pd.DataFrame:
    """One row per distinct step, with `weight` (mean 1) and `group`; times of repeats are averaged in log space."""
    frame = observed.assign(group=groups).reset_index(drop=True)
    ms = frame["ms"].to_numpy(float)
    if "network" in frame:
        spent = ms * (frame["count"].to_numpy(float) if "count" in frame else 1.0)
        share = spent / pd.Series(spent).groupby(frame["network"].to_numpy()).transform("sum").to_numpy()
    else:
        share = np.ones(len(frame))
    share = np.maximum(share, 1e-3 * share.max())
    key = pd.Series(row_names(frame))
    frame["name"] = key
    log = pd.DataFrame({"sum": share * np.log(ms), "weight": share}).groupby(key.to_numpy(), sort=False).sum()
    rows = frame[~key.duplicated().to_numpy()].copy()
    rows["ms"] = np.exp((log["sum"] / log["weight"]).to_numpy())
    rows["weight"] = (log["weight"] / log["weight"].mean()).to_numpy()
    return rows


def _classes(steps: pd.DataFrame) -> NDArray[Any]:
    """object[n]: the kernel; of torch, what has weights apart from what has none."""
    bare = (steps["kernel"] == "torch") & (steps["nnz"].to_numpy(float) == 0)
    return steps["kernel"].astype(str).where(~bare, "torch operations").to_numpy(dtype=object)
