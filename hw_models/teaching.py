"""The measurements a model of this machine is fitted to, out of all that were kept: `teaching`, `fit_from_store`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hw_models.descriptor import DeviceDescriptor, load_device
from hw_models.device import runtime_id
from hw_models.predictor import Predictor
from hw_models.store import MeasurementStore

__all__ = ["ENOUGH", "fit_from_store", "teaching"]

ENOUGH = 40
"""Networks of one epoch that teach more about it than those of an earlier one."""


def fit_from_store(
    store: MeasurementStore, device: DeviceDescriptor | None = None, threads: int = 1, seed: int = 0
) -> Predictor:
    """Fit a predictor to what the store has of this runtime.

    Args:
        store: measurements.
        device: default the host as `nas calibrate` left it.
        threads: CPU threads.
        seed: of folds and residuals.
    """
    runtime = runtime_id(threads)
    observed, networks = teaching(store, runtime)
    if len(networks):
        # A network measured again is the same network: left out together.
        networks = networks.assign(group=np.where(networks["group"] == "", networks["digest"], networks["group"]))
    device = device if device is not None else load_device("host", threads)
    return Predictor.fit(observed, networks, device=device, runtime=runtime, threads=threads, seed=seed)


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
    if not len(networks):
        return steps, networks.assign(scaled=1.0)
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
