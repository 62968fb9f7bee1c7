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

from hw_models.descriptor import load_device
from hw_models.device import runtime_id
from hw_models.environment import StealMeter, describe
from hw_models.measure import Measurer
from hw_models.model import LatencyModel
from hw_models.observe import observe
from hw_models.predictor import Predictor
from hw_models.predictor_files import home, save
from hw_models.sentinels import sentinel_calls
from hw_models.store import MeasurementStore
from nas.latency import Laboratory, Priced
from ops.plan import Plan
from ops.runtime import Runtime

__all__ = ["ENOUGH", "InPlaceLaboratory", "teaching"]

ENOUGH = 40
"""Networks of one epoch that teach more about it than those of an earlier one."""


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
        lowest = found.networks["lo_ms"].clip(
            lower=1e-6
        )  # 0 where the rounds disagree by all of the time, which is refused
        networks = found.networks.assign(group=found.networks["digest"], lo_ms=lowest)
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
        steps, networks = teaching(self.store, self.runtime)
        model = Predictor.fit(
            steps, networks, device=load_device("host", threads), runtime=self.runtime, threads=threads
        )
        save(model, home(self.runtime))
        self._new = 0
        return model


def teaching(store: MeasurementStore, runtime: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measurements a model of the machine as it is now is fitted to.

    Those of the present epoch, if it has `ENOUGH` networks. A search that finds the machine changed since it was calibrated has
    measured only a front by then; the earlier epochs' times are taken too, multiplied by how much slower the sentinels are now.

    Returns:
        (steps, networks) as from `MeasurementStore.observations`; networks.scaled is the factor (1.0: as measured).
    """
    steps, networks = store.observations(runtime)
    if len(networks) >= ENOUGH:
        return steps, networks.assign(scaled=1.0)
    steps, networks = store.observations(runtime, "all")
    epochs = store.epochs(runtime)
    names = [name for name in epochs.columns if name.startswith("sentinel")]
    present = epochs.sort_values("last_opened_at").index[-1]
    logs = pd.DataFrame({name: np.log(epochs[name].to_numpy(float)) for name in names}, index=epochs.index)
    factors = np.exp((logs.loc[present] - logs).mean(axis=1).fillna(0.0)).to_dict()
    times = ["ms", "lo_ms", "hi_ms"]
    of_steps, of_networks = steps["epoch"].map(factors), networks["epoch"].map(factors)
    whole = [name for name in (*times, "median_ms", "p90_ms", "sum_ms") if name in networks]
    return (
        steps.assign(**{name: steps[name] * of_steps for name in times}),
        networks.assign(scaled=of_networks, **{name: networks[name] * of_networks for name in whole}),
    )


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
