"""What every latency model answers: `LatencyModel.predict(plan) -> Estimate`.

A model prices a plan (`ops.plan.lower`), that is, the operations that will really be executed, each on its kernel, and says how
sure it is. Start with `Estimate` and `SOURCES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from ops.plan import Plan

if TYPE_CHECKING:
    from hw_models.descriptor import DeviceDescriptor
    from hw_models.workload import Workload

__all__ = ["PART_COLUMNS", "SOURCES", "CalibrationError", "Estimate", "LatencyModel"]

# How an answer was found, the surest first: the same operation was measured; others of its shape were, at densities around it; it
# was learned from other shapes; from the device's data sheet or roofs.
SOURCES = ("measured", "interpolated", "learned", "analytical")
PART_COLUMNS = ("op", "kind", "kernel", "density", "nnz", "macs", "ms", "lo_ms", "hi_ms", "share", "source")


class CalibrationError(RuntimeError):
    """A calibration is damaged or of another machine or version; says which and how to renew it."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """The latency of one call of a network, for the plan's batch size.

    Attributes:
        ms: milliseconds.
        lo_ms, hi_ms: 90 % interval.
        source: one of `SOURCES`: the least sure one that a hundredth of the time or more comes from.
        parts: one row per operation of the plan, conversions of layout counted with the operation that asks for them:
            `PART_COLUMNS`; share is of the sum of ms.
        note: what a reader should know, e.g. "no model knows operation fft: priced from the data sheet"; "" if nothing.
    """

    ms: float
    lo_ms: float
    hi_ms: float
    source: str
    parts: pd.DataFrame = field(repr=False)
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return f"{self.ms:.4g} ms ({self.lo_ms:.4g} to {self.hi_ms:.4g}, {self.source}){note}"


class LatencyModel(ABC):
    """Something that prices plans."""

    @abstractmethod
    def predict(self, plan: Plan, device: DeviceDescriptor | str | None = None) -> Estimate:
        """Price one plan.

        Args:
            plan: from `ops.plan.lower`; its weights may be on the meta device.
            device: descriptor, name or path of one. Default: the device the model is of.

        Raises:
            DeviceError: there is no such device, or the model is of another one.
        """

    @abstractmethod
    def predict_many(
        self, plans: Sequence[Plan] | Workload, device: DeviceDescriptor | str | None = None
    ) -> pd.DataFrame:
        """Price many plans at once.

        Args:
            plans: plans, or a `Workload` made of them once, which is much faster when they are priced again.

        Returns:
            One row per plan, in order: ms, lo_ms, hi_ms (float64), source (one of `SOURCES`).

        Raises:
            DeviceError: as for `predict`.
        """
