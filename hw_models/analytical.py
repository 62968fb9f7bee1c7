"""Latency from a device's roofs alone, for any device that has a descriptor: nothing of the network need have been measured.

    t = F / (P e_F) + B / (W e_B) + calls x call_us                 for each executed step

F: two for each multiply-add on kept weights, as executed; P: peak; B: bytes read, written and streamed as weights, their indices
included; W: bandwidth of the memory level that the step's data fit into. The efficiencies are those of `hw_models.efficiencies`. It
is a sum, because compute and traffic overlap only in part; the maximum of the first two at full efficiency is the roofline, a bound
below (Williams et al. 2009; `AnalyticalModel.bound_ms`). Intervals are wide, and wider for a device known from its data sheet only.

Whole networks of which one knows four numbers: `hw_models.specs.fit_specs`. Start with `AnalyticalModel("raspberry-pi-5")`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hw_models.descriptor import DeviceDescriptor, DeviceError, load_device
from hw_models.efficiencies import efficiencies
from hw_models.model import PART_COLUMNS, Estimate, LatencyModel
from hw_models.specs import SpecFit, fit_specs
from hw_models.workload import Workload, workload
from ops.plan import Plan
from ops.runtime import CONVERSIONS

__all__ = ["AnalyticalModel", "SpecFit", "fit_specs"]

Floats = npt.NDArray[np.float64]

Z90 = 1.645  # of a 90 % interval
SIGMA_UNMEASURED = 0.5  # how far off a data sheet is, as a standard deviation of the logarithm
# Bytes a cycle that one core reads, where the bandwidth was not measured: 101 and 77 GB/s at 3.6 GHz, 100 and 22 GB/s at 3.1 GHz.
L2_BYTES_PER_CYCLE, L3_BYTES_PER_CYCLE = 30.0, 12.0
MEMORY_SHARE = {"cpu": 0.45, "gpu": 0.8}  # of the data sheet's bandwidth
CORE_GBS = 14.0  # one core of a CPU has so many loads under way: 10 to 33 GB/s measured
CALL_US, CALL_CLOCK_GHZ = 14.0, 3.6  # of a small convolution through torch, where it was not measured
LAUNCH_US = 10.0  # of a GPU
WHOLE_CALLS, CALLS_PER_CALL = 0.35, 0.2  # what a network costs beside its steps, and each call from Python, in calls
GPU_WORK = 8.0  # outputs that every core of a GPU needs to be half busy


class _Roofs(NamedTuple):
    """What the formula needs of a device: GFLOP/s, GB/s by level, bytes that fit into each, microseconds."""

    peak: float
    bandwidth: tuple[float, float, float]  # L2, L3, memory
    fits: tuple[float, float]
    call_us: float


class AnalyticalModel(LatencyModel):
    """Prices steps by the roofs of a device.

    Args:
        device: descriptor, or name or path of one (`hw_models.descriptor.load_device`).

    Raises:
        DeviceError: no such device, or its peak or bandwidth is not known.
    """

    def __init__(self, device: DeviceDescriptor | str = "host") -> None:
        self.device = load_device(device) if isinstance(device, str) else device
        self._roofs = _roofs(self.device)

    def step_ms(self, steps: pd.DataFrame) -> tuple[Floats, Floats]:
        """Price executed steps.

        Args:
            steps: `hw_models.workload.STEP_COLUMNS`.

        Returns:
            ms: float[steps], of one execution. sigma: float[steps], standard deviation of its logarithm.
        """
        roofs, constants = self._roofs, efficiencies(steps, self.device.device_class)
        flops, bytes_ = _flops(steps), _bytes(steps)
        compute = constants.compute
        if self.device.device_class == "gpu":
            outputs = steps["positions"].to_numpy(np.float64) * steps["channels_out"].to_numpy(np.float64)
            compute = compute * outputs / (outputs + GPU_WORK * self.device.cores)
        rate = np.minimum(self._level(bytes_) * constants.bandwidth, self._fastest(bytes_))
        ms = flops / (roofs.peak * compute) / 1e6 + bytes_ / rate / 1e6 + constants.calls * roofs.call_us / 1e3
        sigma = constants.sigma if self.device.measured else np.hypot(constants.sigma, SIGMA_UNMEASURED)
        return np.where(self._executed(steps), ms, 0.0), sigma

    def bound_ms(self, steps: pd.DataFrame) -> Floats:
        """The roofline: float[steps], ms that no execution beats if the figures of the device are right."""
        bytes_ = _bytes(steps)
        bound = np.maximum(_flops(steps) / self._roofs.peak, bytes_ / self._fastest(bytes_)) / 1e6
        return np.where(self._executed(steps), bound, 0.0)

    def unknown(self, steps: pd.DataFrame) -> list[str]:
        """Operations among the steps that the model has no constants for: priced by the bytes they read and write."""
        known = efficiencies(steps, self.device.device_class).known
        return sorted({kind.removeprefix("torch.") for kind in steps["kind"][~known]})

    def predict(self, plan: Plan, device: DeviceDescriptor | str | None = None) -> Estimate:
        """As `LatencyModel.predict`; any device will do. ms is the sum of the parts and what the calls of the network cost."""
        if device is not None:
            return AnalyticalModel(device).predict(plan)
        work = workload([plan])
        row = self.predict_many(work).iloc[0]
        return Estimate(
            ms=float(row["ms"]),
            lo_ms=float(row["lo_ms"]),
            hi_ms=float(row["hi_ms"]),
            source="analytical",
            parts=self._parts(plan, work),
            note=self._note(work.steps),
        )

    def predict_many(
        self, plans: Sequence[Plan] | Workload, device: DeviceDescriptor | str | None = None
    ) -> pd.DataFrame:
        if device is not None:
            return AnalyticalModel(device).predict_many(plans)
        work = plans if isinstance(plans, Workload) else workload(plans)
        ms, sigma = self.step_ms(work.steps)
        calls = WHOLE_CALLS + CALLS_PER_CALL * work.networks["calls"].to_numpy(np.float64)
        if self.device.device_class == "gpu":
            calls = np.full(len(work), WHOLE_CALLS)
        whole = work.sums(ms) + calls * self._roofs.call_us / 1e3
        # Errors of one kind of step are the same everywhere: they add up, they do not average out.
        spread = np.exp(Z90 * (work.sums(ms * sigma) + calls * self._roofs.call_us / 1e3 * _own(self.device)) / whole)
        return pd.DataFrame({"ms": whole, "lo_ms": whole / spread, "hi_ms": whole * spread, "source": "analytical"})

    def _executed(self, steps: pd.DataFrame) -> npt.NDArray[np.bool_]:
        """bool[steps]: a GPU has nothing in lanes, and no steps that bring it there."""
        if self.device.device_class == "cpu":
            return np.ones(len(steps), bool)
        return ~steps["kind"].isin([*CONVERSIONS, "halo", "copy"]).to_numpy()

    def _level(self, bytes_: Floats) -> Floats:
        """GB/s of the memory level that so many bytes fit into."""
        (l2, l3, memory), (in_l2, in_l3) = self._roofs.bandwidth, self._roofs.fits
        return np.where(bytes_ <= in_l2, l2, np.where(bytes_ <= in_l3, l3, memory))

    def _fastest(self, bytes_: Floats) -> Floats:
        """GB/s that cannot be beaten: of main memory for what fits into no cache, else three times the L2's (the L1's)."""
        l2, _, memory = self._roofs.bandwidth
        return np.where(bytes_ <= max(self._roofs.fits), 3.0 * l2, memory)

    def _parts(self, plan: Plan, work: Workload) -> pd.DataFrame:
        ms, sigma = self.step_ms(work.steps)
        count = len(plan.ops)
        of_op = np.bincount(work.ops, ms[work.ids], count)[:count] if len(work.ids) else np.zeros(count)
        weighted = np.bincount(work.ops, (ms * sigma)[work.ids], count)[:count] if len(work.ids) else np.zeros(count)
        spread = np.exp(Z90 * np.divide(weighted, of_op, out=np.zeros(count), where=of_op > 0))
        fields = ("kind", "kernel", "density", "nnz", "macs")
        rows = [{"op": op.name, **{name: getattr(op, name) for name in fields}} for op in plan.ops]
        frame = pd.DataFrame(rows, columns=["op", *fields])
        frame["ms"], frame["lo_ms"], frame["hi_ms"] = of_op, of_op / spread, of_op * spread
        frame["share"] = of_op / of_op.sum() if of_op.sum() > 0 else 0.0
        frame["source"] = "analytical"
        return frame[list(PART_COLUMNS)]

    def _note(self, steps: pd.DataFrame) -> str:
        notes = []
        if not self.device.measured:
            notes.append(f"{self.device.id} was not measured: priced from its data sheet")
        if unknown := self.unknown(steps):
            notes.append(f"no model knows {', '.join(unknown)}: priced by the bytes read and written")
        return "; ".join(notes)


def _own(device: DeviceDescriptor) -> float:
    return 0.5 if device.measured else math.hypot(0.5, SIGMA_UNMEASURED)


def _flops(steps: pd.DataFrame) -> Floats:
    return 2.0 * steps["macs"].to_numpy(np.float64)


def _bytes(steps: pd.DataFrame) -> Floats:
    return steps[["in_bytes", "out_bytes", "weight_bytes"]].to_numpy(np.float64).sum(axis=1)


def _roofs(device: DeviceDescriptor) -> _Roofs:
    """The figures of a device, and what follows from them where they are not known."""
    peak = device.peak_gflops
    if math.isnan(peak):
        peak = device.threads * device.clock_max_ghz * device.flops_per_cycle
    cpu = device.device_class == "cpu"
    memory = device.bandwidth_measured_gbs
    if math.isnan(memory):
        memory = device.bandwidth_gbs * MEMORY_SHARE[device.device_class]
        memory = min(memory, CORE_GBS * device.threads) if cpu else memory
    if math.isnan(peak) or math.isnan(memory):
        missing = "peak_gflops (or clock_max_ghz and flops_per_cycle)" if math.isnan(peak) else "bandwidth_gbs"
        raise DeviceError(f"{device.id} cannot be priced: {missing} is not known; add it to the device file")
    if not cpu:
        return _Roofs(peak, (memory, memory, memory), (0.0, 0.0), _known(device.call_us, LAUNCH_US))
    clock = _known(device.clock_max_ghz, 2.5)
    l3 = max(memory, _known(device.l3_bandwidth_gbs, L3_BYTES_PER_CYCLE * clock * device.threads))
    l2 = max(l3, _known(device.l2_bandwidth_gbs, L2_BYTES_PER_CYCLE * clock * device.threads))
    fits = (_known(device.l2_kib, 0.0) * 1024, _known(device.l3_kib, 0.0) * 1024)
    return _Roofs(peak, (l2, l3, memory), fits, _known(device.call_us, CALL_US * CALL_CLOCK_GHZ / clock))


def _known(figure: float, otherwise: float) -> float:
    return otherwise if math.isnan(figure) else figure
