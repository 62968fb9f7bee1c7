"""Energy of an inference: `energy_of(ms, device) -> Energy`, and the counters that calibrate it.

Four methods, and every answer says which it is:

    constant power   P x t; P was read from a data sheet (or is nominal): idle + (peak - idle) x threads / cores
    RAPL, NVML       P x t; P is what a counter of the CPU or the GPU showed while a network ran
    components       P_static x t + e_F x flops + e_B x bytes, for devices whose three constants are known

On a device of fixed clock energy is power times time to 3 to 5 % (6,466 networks on a Raspberry Pi 5), so a latency is most of an
energy already, and a constant power ranks networks just as their latency does. The interval is that of the power alone, 10 % unless
the device says otherwise; a latency's own interval comes on top.

Start with `energy_of`; `find_meter` and `calibrate_power` read counters where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

from hw_models.descriptor import NAN, DeviceDescriptor
from hw_models.meters import EnergyError, Meter, NvmlMeter, RaplMeter, find_meter, read_rapl

__all__ = [
    "Energy",
    "EnergyError",
    "MeasuredEnergy",
    "NvmlMeter",
    "RaplMeter",
    "calibrate_power",
    "energy_of",
    "find_meter",
    "measure_energy",
    "read_rapl",
]

METHODS = ("constant power", "RAPL", "NVML", "components")
COUNTED_UNCERTAINTY = 0.05  # of a power that a counter showed


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
        mj: millijoules; NaN where the device's power is not known.
        lo_mj, hi_mj: 90 % interval, as far as the power goes.
        method: one of `METHODS`.
        note: where the power is from.
    """

    mj: float
    lo_mj: float
    hi_mj: float
    method: str
    note: str = ""

    def __str__(self) -> str:
        if math.isnan(self.mj):
            return f"unknown ({self.note})"
        return f"{self.mj:.4g} mJ ({self.lo_mj:.4g} to {self.hi_mj:.4g}, {self.method}: {self.note})"


@dataclass(frozen=True)
class MeasuredEnergy:
    """What a counter showed while a function was called again and again.

    Attributes:
        mj: millijoules of one call, idle power of the chip included.
        watts: mean power.
        ms: milliseconds of one call, on average.
        calls, seconds: how long it was looked at.
        method: of the meter, "RAPL" or "NVML".
    """

    mj: float
    watts: float
    ms: float
    calls: int
    seconds: float
    method: str


def energy_of(ms: float, device: DeviceDescriptor, flops: float | None = None, bytes: float | None = None) -> Energy:
    """Energy of a call that takes `ms` on a device.

    Args:
        ms: milliseconds, measured or predicted.
        device: its power, by the most trusted figure there is: read by a counter (`power_w`), components, data sheet.
        flops, bytes: of the call; two for each multiply-add. With both, and a device whose constants are known, the method is
            "components".

    Raises:
        ValueError: a negative time, number of flops or of bytes.
    """
    if ms < 0 or (flops is not None and flops < 0) or (bytes is not None and bytes < 0):
        raise ValueError(f"time, flops and bytes cannot be negative, got {ms} ms, {flops} flops, {bytes} bytes")
    constants = (device.static_w, device.pj_per_flop, device.pj_per_byte)
    if not math.isnan(device.power_w):
        source = device.sources.get("power_w", "")
        method = next((name for name in ("RAPL", "NVML") if name in source), "constant power")
        return _around(device.power_w * ms, device, method, f"{device.power_w:.3g} W, {source or 'source unknown'}")
    if flops is not None and bytes is not None and not any(math.isnan(figure) for figure in constants):
        static_w, pj_per_flop, pj_per_byte = constants
        mj = static_w * ms + (pj_per_flop * flops + pj_per_byte * bytes) * 1e-9
        return _around(mj, device, "components", f"{static_w:.3g} W, {pj_per_flop:.3g} pJ/flop, {pj_per_byte:.3g} pJ/B")
    watts, why = _power(device)
    if math.isnan(watts):
        return Energy(NAN, NAN, NAN, "constant power", f"no power of {device.id} is known: {why}")
    return _around(watts * ms, device, "constant power", f"{watts:.3g} W, {why}")


def _around(mj: float, device: DeviceDescriptor, method: str, note: str) -> Energy:
    share = device.power_uncertainty
    return Energy(mj, mj * max(0.0, 1 - share), mj * (1 + share), method, f"{note}; +-{share:.0%}")


def _power(device: DeviceDescriptor) -> tuple[float, str]:
    """Watts while a network runs on the device's threads, by its data sheet: P0 + P1 x utilisation."""
    source = device.sources.get("peak_w", "the device file")
    if math.isnan(device.peak_w):
        return NAN, "add peak_w (and idle_w) to the device file"
    idle = 0.0 if math.isnan(device.idle_w) else device.idle_w
    busy = min(1.0, device.threads / device.cores) if device.cores else 1.0
    return idle + (device.peak_w - idle) * busy, f"{busy:.0%} of the way from idle to peak power; {source}"


def measure_energy(
    call: Callable[[], object], meter: Meter, seconds: float = 2.0, clock: Callable[[], float] = perf_counter
) -> MeasuredEnergy:
    """Call a function for some time and read a counter before and after.

    Args:
        call: a network, say; make it wait for its result if it runs on a GPU.
        meter: see `find_meter`. It counts all that the chip does, so let nothing else run.
        seconds: at least; RAPL counts in steps of a millisecond, NVML of some 20 to 100.
        clock: seconds, for tests.

    Raises:
        EnergyError: the counter cannot be read, or did not move.
    """
    call()
    before, start, calls = meter.joules(), clock(), 0
    watched = start
    while (now := clock()) - start < seconds or calls == 0:
        call()
        calls += 1
        if now - watched > meter.watch_s:  # before the counter can come round twice
            meter.joules()
            watched = now
    joules, elapsed = meter.joules() - before, clock() - start
    if joules <= 0:
        raise EnergyError(f"the counter of {meter.method} did not move in {elapsed:.2g} s: measure for longer")
    return MeasuredEnergy(1e3 * joules / calls, joules / elapsed, 1e3 * elapsed / calls, calls, elapsed, meter.method)


def calibrate_power(
    device: DeviceDescriptor,
    call: Callable[[], object],
    meter: Meter | None = None,
    seconds: float = 2.0,
    clock: Callable[[], float] = perf_counter,
) -> DeviceDescriptor:
    """The device with the power that its counter shows while `call` runs; unchanged where there is no counter to read.

    Args:
        device: of this machine; keep the result with `hw_models.descriptor.save_device`.
        call, seconds, clock: see `measure_energy`.
        meter: default: the one that `find_meter` finds for the class of device.
    """
    meter = meter or find_meter(device.device_class)
    if meter is None:
        return device
    found = measure_energy(call, meter, seconds, clock)
    text = f"{found.method} counter, mean over {found.seconds:.2g} s of a network running"
    sources = {**device.sources, "power_w": text}
    return replace(device, power_w=found.watts, power_uncertainty=COUNTED_UNCERTAINTY, sources=sources)
