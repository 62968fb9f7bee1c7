"""A latency model whose every answer can be worked out by hand, for tests of what asks models."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hw_models.descriptor import DeviceDescriptor
from hw_models.model import PART_COLUMNS, Estimate, LatencyModel
from hw_models.workload import Workload
from ops.plan import Plan, PlannedOp

MS_PER_MAC = {"torch": 1e-6, "portable": 4e-6, "specialised": 2e-6}
CALL_MS = 1e-3


def flat_ms(op: PlannedOp) -> float:
    """What the model says of one operation: a call, and its multiply-adds (all of them on torch) at the kernel's price."""
    return CALL_MS + MS_PER_MAC[op.kernel] * (op.dense_macs if op.kernel == "torch" else op.macs)


class FlatModel(LatencyModel):
    """Prices by `flat_ms`, sure to 10 % down and 20 % up.

    Args:
        note: what every estimate says.
    """

    def __init__(self, note: str = "") -> None:
        self._note = note

    def predict(self, plan: Plan, device: DeviceDescriptor | str | None = None) -> Estimate:
        total = sum(flat_ms(op) for op in plan.ops)
        rows = [
            (
                *(op.name, op.kind, op.kernel, op.density, op.nnz, op.macs),
                *(flat_ms(op), 0.9 * flat_ms(op), 1.2 * flat_ms(op), flat_ms(op) / total, "learned"),
            )
            for op in plan.ops
        ]
        return Estimate(
            total, 0.9 * total, 1.2 * total, "learned", pd.DataFrame(rows, columns=PART_COLUMNS), self._note
        )

    def predict_many(
        self, plans: Sequence[Plan] | Workload, device: DeviceDescriptor | str | None = None
    ) -> pd.DataFrame:
        assert not isinstance(plans, Workload)
        found = [self.predict(plan) for plan in plans]
        return pd.DataFrame(
            [(e.ms, e.lo_ms, e.hi_ms, e.source) for e in found], columns=["ms", "lo_ms", "hi_ms", "source"]
        )
