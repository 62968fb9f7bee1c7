"""A machine whose latencies are a formula, and a model of it that believes another one: for searches that predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from hw_models.measure import MeasurementError
from hw_models.model import Estimate, LatencyModel
from nas.latency import Laboratory, Predicted, Priced
from ops.plan import Plan

Law = Callable[[Plan], float]


def by_work(plan: Plan) -> float:
    """0.01 ms and 1 ms per million multiply-adds."""
    return 0.01 + plan.macs / 1e6


@dataclass(frozen=True)
class FormulaModel(LatencyModel):
    """Believes `law`, times `factor`, with a 90 % interval of `width` either way."""

    law: Law = by_work
    factor: float = 1.0
    width: float = 0.1

    def predict(self, plan: Plan, device: object = None) -> Estimate:
        ms = self.factor * self.law(plan)
        parts = pd.DataFrame({"op": [op.name for op in plan.ops], "ms": ms / len(plan.ops), "source": "learned"})
        return Estimate(ms, ms * (1 - self.width), ms * (1 + self.width), "learned", parts)

    def predict_many(self, plans: Sequence[Plan], device: object = None) -> pd.DataFrame:
        raise NotImplementedError


@dataclass
class FormulaLaboratory(Laboratory):
    """Measures `truth`; `refitted` makes the next model from all ratios measured / law seen so far.

    `fails` names a trial that cannot be measured; `interrupt_after` is the pass in which somebody presses Ctrl-C.
    """

    truth: Law = by_work
    refitted: Callable[[list[float]], LatencyModel | None] = lambda ratios: None
    fails: set[int] = field(default_factory=set)
    interrupt_after: int | None = None
    passes: list[list[int]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def measure(self, plans: Mapping[int, tuple[Plan, torch.Tensor]]) -> dict[int, Priced]:
        if self.interrupt_after is not None and len(self.passes) >= self.interrupt_after:
            raise KeyboardInterrupt
        if self.fails & set(plans):
            raise MeasurementError(f"measuring {self.fails & set(plans)}: the call raised")
        self.passes.append(list(plans))
        found = {}
        for number, (plan, _) in plans.items():
            ms = self.truth(plan)
            self.ratios.append(ms / by_work(plan))
            metrics = {"latency_ms": ms, "latency_lo_ms": ms * 0.99, "latency_hi_ms": ms * 1.01}
            found[number] = Priced(
                {**metrics, "latency_source": "measured", "latency_quality": "ok"},
                plan.frame().assign(ms=ms / len(plan.ops), source="in place"),
            )
        return found

    def refit(self) -> LatencyModel | None:
        return self.refitted(self.ratios)


def formula_pricer(model: LatencyModel | None = None, laboratory: Laboratory | None = None) -> Predicted:
    """A pricer of that machine; kernels are those of the plan."""
    return Predicted(model or FormulaModel(), laboratory or FormulaLaboratory(), lambda plan, _: plan)
