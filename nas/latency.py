"""How a search learns the latency of its networks: by measuring each one, or by a model of this machine that predicts it.

A `Pricer` answers twice: `price` during the search, for any candidate; `measure` afterwards, for the networks a run hands out, all
of them interleaved. `Measured` measures both times. `Predicted` predicts the first time, in milliseconds instead of seconds, and
after measuring `learn`s: the model is fitted again with what was measured, and kept for later runs.

Start with `make_pricer(config)`; `check_pricing` says before a search begins whether it can have one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from hw_models.descriptor import DeviceDescriptor, DeviceError, load_device
from hw_models.energy import energy_of
from hw_models.host import describe_host
from hw_models.latency import Latency, measure_latency, measure_many
from hw_models.measure import Measurer
from hw_models.model import Estimate, LatencyModel
from hw_models.tables import LayerTable, TableError
from nas.config import RunConfig
from nas.errors import ConfigError, RunError
from nas.objectives import Constraint, on_interval_ends, parse_constraints
from ops.plan import Plan, lower

__all__ = [
    "Measured",
    "Predicted",
    "Priced",
    "Pricer",
    "check_pricing",
    "constraints_of",
    "make_measurer",
    "make_pricer",
]

Networks = Mapping[int, tuple[nn.Module, torch.Tensor]]

CALIBRATION_S = 300
"""Budget that is recommended to who has none: all shapes of a space are measured."""


@dataclass(frozen=True, eq=False)
class Priced:
    """A network's latency, as a trial keeps it.

    Attributes:
        metrics: latency_ms, latency_lo_ms, latency_hi_ms (90 % interval), latency_source, and latency_quality if it was measured;
            energy_mj and energy_method, if the machine's power is known.
        plan: one row per executed operation, with its ms and its share.
    """

    metrics: dict[str, Any]
    plan: pd.DataFrame = field(repr=False)


class Pricer(ABC):
    """Says how long networks take on this machine, for the run's batch and threads."""

    predicts: bool
    """Whether `price` is a prediction; then only what `measure` says may be handed out."""

    def __init__(self, device: DeviceDescriptor | None = None) -> None:
        self.device = device if device is not None else this_machine(1)

    @abstractmethod
    def price(self, module: nn.Module, example: torch.Tensor) -> Priced:
        """The latency of a candidate; its masks must be drawn."""

    @abstractmethod
    def measure(self, networks: Networks) -> dict[int, Priced]:
        """Measure networks against each other, in one measuring run.

        Raises:
            MeasurementError: one of them failed; names it.
        """

    def learn(self) -> bool:
        """Take in what was measured since the last call; True if `price` may answer differently now."""
        return False

    def _with_energy(self, priced: Priced) -> Priced:
        return replace(priced, metrics=priced.metrics | energy_metrics(priced.metrics["latency_ms"], self.device))


class Measured(Pricer):
    """Measures every network (`hw_models.latency`).

    Args:
        measurer: protocol and threads.
        table: remembers the times of single operations; default the user's.
        device: of the energy; default this machine.
    """

    predicts = False

    def __init__(
        self, measurer: Measurer, table: LayerTable | None = None, device: DeviceDescriptor | None = None
    ) -> None:
        super().__init__(device if device is not None else this_machine(measurer.threads))
        self.measurer = measurer
        self.table = table if table is not None else open_table()

    def price(self, module: nn.Module, example: torch.Tensor) -> Priced:
        """Measure it alone; seconds."""
        threads = self.measurer.threads
        found = measure_latency(module, example, threads=threads, table=self.table, measurer=self.measurer)
        return self._with_energy(_measured(found))

    def measure(self, networks: Networks) -> dict[int, Priced]:
        """See `Pricer.measure`."""
        threads = self.measurer.threads
        found = measure_many(networks, threads=threads, table=self.table, measurer=self.measurer)
        return {number: self._with_energy(_measured(latency)) for number, latency in found.items()}


class Predicted(Pricer):
    """Predicts every network by a model of this machine; measures what is handed out, and learns from that.

    Args:
        model: of this host, runtime and number of threads.
        laboratory: measures plans, and fits the model again.
        choose: picks the kernels of a plan by the model.
        device: of the energy; default this machine on one thread.
    """

    predicts = True

    def __init__(
        self,
        model: LatencyModel,
        laboratory: Laboratory,
        choose: Callable[[Plan, Any], Plan],
        device: DeviceDescriptor | None = None,
    ) -> None:
        super().__init__(device)
        self.model = model
        self.laboratory = laboratory
        self.choose = choose

    def price(self, module: nn.Module, example: torch.Tensor) -> Priced:
        """Predict it, on the kernels the model finds fastest; milliseconds."""
        plan = self.choose(lower(module, example), self.model)
        return self._with_energy(_estimated(plan, self.model.predict(plan)))

    def measure(self, networks: Networks) -> dict[int, Priced]:
        """See `Pricer.measure`. What is measured is the plan that was priced."""
        plans = {n: (self.choose(lower(module, x), self.model), x) for n, (module, x) in networks.items()}
        return {n: self._with_energy(priced) for n, priced in self.laboratory.measure(plans).items()}

    def learn(self) -> bool:
        """Fit the model again, with all that was measured on this machine."""
        found = self.laboratory.refit()
        if found is None:
            return False
        self.model = found
        return True


class Laboratory(ABC):
    """Measures plans on this machine and keeps what was measured."""

    @abstractmethod
    def measure(self, plans: Mapping[int, tuple[Plan, torch.Tensor]]) -> dict[int, Priced]:
        """Measure plans against each other; every measurement is kept before this returns."""

    @abstractmethod
    def refit(self) -> LatencyModel | None:
        """A model fitted to all measurements, the new ones included; None if there are no new ones."""


def _measured(latency: Latency) -> Priced:
    frame = latency.plan.frame()
    times = latency.parts.drop(columns=frame.columns, errors="ignore")
    metrics = {
        "latency_ms": latency.ms,
        "latency_lo_ms": latency.lo_ms,
        "latency_hi_ms": latency.hi_ms,
        "latency_source": latency.source,
        "latency_quality": latency.quality,
    }
    return Priced(metrics, pd.concat([frame, times], axis=1))


def _estimated(plan: Plan, estimate: Estimate) -> Priced:
    frame = plan.frame()
    times = estimate.parts.drop(columns=frame.columns, errors="ignore").reset_index(drop=True)
    metrics = {
        "latency_ms": estimate.ms,
        "latency_lo_ms": estimate.lo_ms,
        "latency_hi_ms": estimate.hi_ms,
        "latency_source": estimate.source,
    }
    return Priced(metrics, pd.concat([frame, times], axis=1))


def this_machine(threads: int) -> DeviceDescriptor:
    """The host as `nas calibrate` left it; where it left nothing that can be read, what it says about itself."""
    try:
        return load_device("host", threads)
    except DeviceError:
        return describe_host(threads)


def energy_metrics(ms: float, device: DeviceDescriptor) -> dict[str, Any]:
    """energy_mj and energy_method of a call of `ms` milliseconds; nothing where the device's power is not known."""
    energy = energy_of(ms, device)
    return {} if math.isnan(energy.mj) else {"energy_mj": energy.mj, "energy_method": energy.method}


def constraints_of(config: RunConfig) -> tuple[Constraint, ...]:
    """The run's hard limits, and what each is judged on: where latencies are predicted, the end of the interval."""
    constraints = parse_constraints(config.constraints)
    return on_interval_ends(constraints) if config.latency.model == "predict" else constraints


def open_table() -> LayerTable:
    """The user's table of layer times.

    Raises:
        RunError: the file is damaged or locked; says which file, and the cure.
    """
    try:
        return LayerTable()
    except TableError as error:
        raise RunError(str(error)) from error


def make_measurer(config: RunConfig) -> Measurer:
    """The latency protocol with the run's settings."""
    latency = config.latency
    return Measurer(
        rounds=latency.rounds,
        cap_rounds=max(24, 3 * latency.rounds),
        spacing_s=latency.spacing_s,
        threads=latency.threads,
        seed=config.run.seed,
    )


def open_model(threads: int) -> LatencyModel | None:
    """The model `nas calibrate` made of this machine, for so many threads; None if there is none.

    Raises:
        ConfigError: there is one, but it cannot be used (of another version of the kernels, say); says how to renew it.
    """
    from hw_models.predictor import load_predictor  # late: not needed where everything is measured
    from hw_models.predictor_files import CalibrationError

    try:
        return load_predictor(threads)
    except CalibrationError as error:
        raise ConfigError(f'[latency] model = "predict": {error}') from error


def check_pricing(config: RunConfig, config_path: Path | None = None) -> None:
    """See that the run's networks can be priced, before anything is made.

    Args:
        config: the run's.
        config_path: its file, for the command that is recommended.

    Raises:
        ConfigError: latencies are to be predicted, and this machine was not calibrated for that (says the command that does); or
            energies are asked for, and its power is not known.
    """
    if config.latency.model == "predict" and open_model(config.latency.threads) is None:
        raise not_calibrated(config, config_path)
    if "energy_mj" in {*config.objectives, *config.constraints}:
        energy = energy_of(1.0, this_machine(config.latency.threads))
        if math.isnan(energy.mj):
            raise ConfigError(f"energy_mj cannot be an objective or a limit on this machine: {energy.note}")


def not_calibrated(config: RunConfig, config_path: Path | None = None) -> ConfigError:
    """The error for a machine of which there is no latency model."""
    latency = config.latency
    options = [f"--budget {CALIBRATION_S}", f"--space {config_path or 'CONFIG'}"]
    options += [
        f"--{name} {value}" for name, value in (("threads", latency.threads), ("batch", latency.batch)) if value > 1
    ]
    threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
    return ConfigError(
        f'[latency] model = "predict": expected a latency model of this machine for {threads}, found none. Make one with '
        f'`nas calibrate {" ".join(options)}`, which takes {CALIBRATION_S // 60} minutes, once; or set model = "measure"'
    )


def make_pricer(config: RunConfig) -> Pricer:
    """What prices the run's networks.

    Raises:
        ConfigError: latencies are to be predicted, and this machine was not calibrated for that.
        RunError: the table of measured operations is damaged or locked.
    """
    measurer = make_measurer(config)
    if config.latency.model == "measure":
        return Measured(measurer)
    model = open_model(config.latency.threads)
    if model is None:
        raise not_calibrated(config)
    from hw_models.choices import choose_kernels
    from nas.laboratory import InPlaceLaboratory

    device = this_machine(config.latency.threads)
    return Predicted(model, InPlaceLaboratory(measurer), choose_kernels, device)
