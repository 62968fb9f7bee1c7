"""Measures plans on this machine for a search that predicts: in place, kept for ever, and learned from.

Whole networks run with a clock read between their steps (`hw_models.insitu`); every pass goes into the user's store of
measurements (`hw_models.store`) before anybody sees it, in the epoch the sentinels say. Then the model is fitted again to all of
that epoch and kept where `nas calibrate` keeps it, so that the next search knows what this one learned.

Start with `InPlaceLaboratory`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from hw_models.device import runtime_id
from hw_models.environment import StealMeter, describe
from hw_models.measure import Measurer
from hw_models.model import LatencyModel
from hw_models.observe import observe
from hw_models.predictor_files import home, save
from hw_models.sentinels import sentinel_calls
from hw_models.store import MeasurementStore
from hw_models.teaching import fit_from_store
from nas.latency import Laboratory, Priced
from ops.plan import Plan
from ops.runtime import Runtime

__all__ = ["InPlaceLaboratory"]


class InPlaceLaboratory(Laboratory):
    """The host CPU.

    Args:
        measurer: protocol and threads.
        store: where measurements go; default the user's.
    """

    def __init__(self, measurer: Measurer, store: MeasurementStore | None = None) -> None:
        self.measurer = measurer
        self.store = store if store is not None else MeasurementStore()
        self.runtime = runtime_id(measurer.threads)
        self._new = 0

    def measure(self, plans: Mapping[int, tuple[Plan, torch.Tensor]]) -> dict[int, Priced]:
        """See `Laboratory.measure`."""
        threads = self.measurer.threads
        steal = StealMeter()
        runtimes = {n: Runtime(plan, threads) for n, (plan, _) in plans.items()}
        found = observe({f"trial {n}": (runtimes[n], x) for n, (_, x) in plans.items()}, self.measurer)
        sentinels = self.measurer.measure(sentinel_calls(threads))
        epoch = self.store.open_epoch(self.runtime, describe(steal), sentinels)
        networks = found.networks.assign(group=found.networks["digest"])
        self.store.add_networks(epoch, found.steps, networks, found.rounds)
        self._new += len(networks)
        return {
            n: _priced(runtimes[n], networks.iloc[k], found.rounds[k]["steps"].min(axis=0)) for k, n in enumerate(plans)
        }

    def refit(self) -> LatencyModel | None:
        """See `Laboratory.refit`. The model is saved for this machine."""
        if not self._new:
            return None
        threads = self.measurer.threads
        model = fit_from_store(self.store, threads=threads)
        save(model, home(self.runtime))
        self._new = 0
        return model


def _priced(runtime: Runtime, whole: pd.Series, step_ms: npt.NDArray[np.float64]) -> Priced:
    """A measured network; its operations with the time of their steps in place, float[executed steps]."""
    plan = runtime.plan
    ms = np.zeros(len(plan.ops))
    for step, time in zip(runtime.schedule.steps, step_ms):
        if len(ms):
            ms[min(step.op, len(ms) - 1)] += time
    share = ms / max(float(ms.sum()), 1e-12)
    frame = plan.frame().assign(ms=share * float(whole["sum_ms"]), share=share, source="in place")
    metrics = {f"latency_{name}": float(whole[name]) for name in ("ms", "lo_ms", "hi_ms")}
    return Priced(metrics | {"latency_source": "measured", "latency_quality": str(whole["quality"])}, frame)
