"""What a network around it does to the time of a step: `Context`.

The same step takes longer in a larger network: between two of its runs more memory was touched, so its code, its weights and what
Python needs to call it come from farther away. Steps that compiled code runs take longer in proportion, by the logarithm of the
bytes that a call of the network occupies. Those that Python calls take longer by a constant, by the root of the bytes that
are moved meanwhile: among small operations Python's own code stays warm.

How much is told by steps that were measured in several networks, or others just as light. Times are brought to one reference
before anything is learned from them, and from there to the network that is asked for. Start with `Context.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ops.runtime import CONVERSIONS

__all__ = ["CLASSES", "REFERENCE", "Context", "class_of", "surroundings"]

Floats = npt.NDArray[np.float64]

# Classes of steps that networks of other sizes slow down alike. Those of the first two by a constant, the others in proportion.
CLASSES = ("torch", "fetch", "conversions", "lanes", "portable", "specialised")
_CONSTANT = np.array([True, True, False, False, False, False])
_MEASURE = np.where(_CONSTANT, 1, 0)  # which of the two measures of `surroundings`
UNIT = 2.0**16  # bytes
MOST_MOVED = 4.0  # beyond, there is nothing left to become cold
REFERENCE = np.array([4.0, 1.0])  # surroundings that times are brought to: a megabyte, a megabyte moved
# Shrinkage towards no effect, in squared units of the measure: as if so much had been seen of a step that does not change.
RIDGE = 20.0
MOST = 0.4  # in proportion, per unit
LIGHT_MACS, LIGHT_BYTES = 2e5, 1e5
LEAST_SHARE = 0.3  # of a measured time that is left when it is brought to a smaller network


def surroundings(networks: pd.DataFrame) -> Floats:
    """Measures of networks: float[networks, 2].

    Args:
        networks: weight_bytes, arena_bytes, handed_bytes, moved_bytes; 0 where a column is missing.

    Returns:
        log2(1 + bytes / 64 KiB) of what a call occupies (packed weights, working memory, tensors handed over); root of the
        megabytes that all steps read and write, at most 4.
    """
    names = ["weight_bytes", "arena_bytes", "handed_bytes", "moved_bytes"]
    full = networks.reindex(columns=names, fill_value=0.0).fillna(0.0).to_numpy(float)
    moved = np.minimum(np.sqrt(full[:, 3] / 2.0**20), MOST_MOVED)
    return np.column_stack([np.log2(1.0 + full[:, :3].sum(axis=1) / UNIT), moved])


def class_of(steps: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Index into `CLASSES` of each step, by kind and kernel."""
    kind, kernel = steps["kind"].to_numpy(dtype=object), steps["kernel"].to_numpy(dtype=object)
    found = np.full(len(steps), CLASSES.index("lanes"))
    for name in ("portable", "specialised", "torch"):
        found[kernel == name] = CLASSES.index(name)
    found[np.isin(kind, [name for name in CONVERSIONS if name != "fetch"])] = CLASSES.index("conversions")
    found[kind == "fetch"] = CLASSES.index("fetch")
    return found


@dataclass(frozen=True)
class Context:
    """How times change with the size of the network.

    Attributes:
        slopes: float per class of `CLASSES`: ms per unit of the second measure for the first two classes, part of the time per unit
            of the first measure for the others.
    """

    slopes: tuple[float, ...] = (0.0,) * len(CLASSES)

    @classmethod
    def fit(cls, observed: pd.DataFrame, networks: pd.DataFrame) -> Context:
        """From steps that were measured in several networks.

        Args:
            observed: `hw_models.workload.STEP_COLUMNS`, ms, network (index of `networks`); one row per step and network.
            networks: as for `surroundings`.
        """
        if len(observed) == 0:
            return cls()
        ms, of, same = observed["ms"].to_numpy(float), class_of(observed), observed["key"].to_numpy(dtype=object)
        # What Python calls for next to no work costs the same whatever its shape, so that one may stand for another.
        light = (observed["dense_macs"] <= LIGHT_MACS) & (observed["in_bytes"] + observed["out_bytes"] <= LIGHT_BYTES)
        constant = _CONSTANT[of]
        x = _of_rows(observed, networks)[np.arange(len(of)), _MEASURE[of]]
        same = np.where(constant & light.to_numpy(), observed["family"].to_numpy(dtype=object), same)
        slopes = []
        for number in range(len(CLASSES)):
            rows = (of == number) & (same != "")
            y = ms[rows] if _CONSTANT[number] else np.log(ms[rows])
            slopes.append(_slope(x[rows], y, same[rows], bool(_CONSTANT[number])))
        return cls(tuple(slopes))

    def detached(self, observed: pd.DataFrame, networks: pd.DataFrame) -> pd.DataFrame:
        """The rows with ms as in a network of the reference surroundings."""
        of, ms = class_of(observed), observed["ms"].to_numpy(float)
        away = (_of_rows(observed, networks) - REFERENCE)[np.arange(len(of)), _MEASURE[of]]
        slope = np.asarray(self.slopes)[of]
        constant = np.maximum(ms - slope * away, LEAST_SHARE * ms)
        return observed.assign(ms=np.where(_CONSTANT[of], constant, ms * np.exp(-slope * away)))

    def attached(self, ms: Floats, of: npt.NDArray[np.int64], around: Floats) -> Floats:
        """Times in a network.

        Args:
            ms: float[n], at the reference.
            of: int[n], from `class_of`.
            around: float[n, 2] or float[2] for all, from `surroundings`.
        """
        away = np.broadcast_to(around - REFERENCE, (len(of), 2))[np.arange(len(of)), _MEASURE[of]]
        slope = np.asarray(self.slopes)[of]
        constant = np.maximum(ms + slope * away, LEAST_SHARE * ms)
        return np.asarray(np.where(_CONSTANT[of], constant, ms * np.exp(slope * away)))

    def sums(self, ms: Floats, calls: Floats, around: Floats) -> Floats:
        """Sums of networks' steps.

        Args:
            ms: float[classes, networks], sums by class at the reference.
            calls: float[classes, networks], steps by class.
            around: float[networks, 2].

        Returns:
            float[networks], what adding up `attached` steps gives (up to its lower limit).
        """
        away = around - REFERENCE
        total = np.zeros(len(away))
        for number, slope in enumerate(self.slopes):
            by = slope * away[:, _MEASURE[number]]
            if _CONSTANT[number]:
                total += np.maximum(ms[number] + by * calls[number], LEAST_SHARE * ms[number])
            else:
                total += ms[number] * np.exp(by)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"slopes": list(self.slopes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Context:
        """The context `to_dict` was called on."""
        return cls(tuple(float(slope) for slope in data["slopes"]))


def _of_rows(observed: pd.DataFrame, networks: pd.DataFrame) -> Floats:
    """`surroundings` of the network of each row, float[rows, 2]."""
    place = pd.Series(np.arange(len(networks)), index=networks.index)
    return surroundings(networks)[observed["network"].map(place).to_numpy(int)]


def _slope(x: Floats, y: Floats, key: npt.NDArray[Any], constant: bool) -> float:
    """Of y over x within keys, drawn to 0, never negative. y in ms: rows are weighted by 1 / y, so that dear steps do not rule."""
    if len(x) == 0:
        return 0.0
    frame = pd.DataFrame({"x": x, "y": y})
    mean = frame.groupby(key).transform("mean")
    dx, dy = (frame["x"] - mean["x"]).to_numpy(), (frame["y"] - mean["y"]).to_numpy()
    typical = float(np.median(y)) if constant else 1.0
    weight = (np.minimum(1.0, typical / mean["y"].to_numpy()) ** 2) if constant else np.ones(len(x))
    slope = 0.0
    for _ in range(6):  # Huber's weights: what was disturbed counts less
        slope = float(np.sum(weight * dx * dy) / (np.sum(weight * dx**2) + RIDGE))
        error = np.abs(dy - slope * dx) / np.maximum(mean["y"].to_numpy() if constant else 1.0, 1e-12)
        calm = np.minimum(1.0, 1.5 * max(1.4826 * float(np.median(error)), 1e-9) / np.maximum(error, 1e-12))
        weight = calm * ((np.minimum(1.0, typical / mean["y"].to_numpy()) ** 2) if constant else 1.0)
    return float(np.clip(slope, 0.0, MOST * typical))
