"""This machine as a device, before and after it is measured.

Before: what the machine says about itself (core count, vector extensions, caches), and nominal figures, named as such, for what it
does not say. After: the same with the roofs of `hw_models.roofs`. Start with `describe_host`; `with_roofs` puts measurements in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hw_models.descriptor import NAN, DeviceDescriptor
from hw_models.device import Device, host_device

__all__ = ["caches_kib", "describe_host", "with_roofs"]

CPU = Path("/sys/devices/system/cpu/cpu0")
# For what a machine does not say about itself. They stand in the descriptor's sources as "nominal".
NOMINAL_CLOCK_GHZ = 2.5
NOMINAL_THREAD_GBS = 10.0  # what one core of a server reads from main memory; 9 to 12 measured on Cascade Lake
NOMINAL_CORE_W = (
    5.0  # between 360 W / 96 cores (AMD EPYC 9654) and 150 W / 20 cores (Intel Xeon Gold 6248), by data sheet
)
NOMINAL_POWER_UNCERTAINTY = 0.5


def describe_host(threads: int = 1) -> DeviceDescriptor:
    """The host without any measurement; every nominal figure says so in its source."""
    host = host_device()
    flops, flops_source = _flops_per_cycle(host)
    clock, clock_source = _clock_ghz()
    caches: dict[str, Any] = {f"l{level}_kib": kib for level, kib in caches_kib().items()}
    sources = {
        "cores": "cores this process may use",
        "flops_per_cycle": flops_source,
        "clock_max_ghz": clock_source,
        "peak_gflops": "threads x clock_max_ghz x flops_per_cycle",
        "bandwidth_gbs": f"nominal: {NOMINAL_THREAD_GBS:g} GB/s for each thread; this machine was not measured",
        "peak_w": f"nominal: {NOMINAL_CORE_W:g} W for each core; no counter was read",
        "idle_w": "nominal: 0, only cores in use are counted",
        **dict.fromkeys(caches, "the operating system's description of core 0"),
    }
    if host.memory_bytes:
        sources["memory_gib"] = "the operating system"
    return DeviceDescriptor(
        id="host",
        device_class="cpu",
        name=host.name,
        cores=max(host.cores, threads),
        threads=threads,
        clock_max_ghz=clock,
        flops_per_cycle=flops,
        peak_gflops=threads * clock * flops,
        bandwidth_gbs=NOMINAL_THREAD_GBS * threads,
        memory_gib=host.memory_bytes / 2**30 if host.memory_bytes else NAN,
        idle_w=0.0,
        peak_w=NOMINAL_CORE_W * max(host.cores, threads),
        power_uncertainty=NOMINAL_POWER_UNCERTAINTY,
        sources=sources,
        note="not measured: figures are what the machine says about itself, or nominal; `nas calibrate` measures it",
        **caches,
    )


def with_roofs(device: DeviceDescriptor, roofs: Mapping[str, float | str]) -> DeviceDescriptor:
    """The device with what `hw_models.roofs.measure_roofs` found on it; ready for `save_device(..., host_path(threads))`."""
    source = f"measured by `nas calibrate` ({roofs.get('method', 'unknown method')})"
    names = {
        "peak_gflops": "peak_gflops",
        "bandwidth_gbs": "bandwidth_measured_gbs",
        "l2_bandwidth_gbs": "l2_bandwidth_gbs",
        "l3_bandwidth_gbs": "l3_bandwidth_gbs",
        "call_us": "call_us",
    }
    found = {to: float(roofs[key]) for key, to in names.items() if key in roofs and not math.isnan(float(roofs[key]))}
    sources = {**device.sources, **dict.fromkeys(found, source)}
    figures: dict[str, Any] = dict(found)
    if "bandwidth_measured_gbs" in found:  # the nominal figure has done its work
        figures["bandwidth_gbs"] = NAN
        sources.pop("bandwidth_gbs", None)
    return replace(device, measured=True, sources=sources, note="", **figures)


def _flops_per_cycle(host: Device) -> tuple[float, str]:
    """FP32 of one core, by its vector extension; two multiply-add units each, one where AVX-512 is executed in halves."""
    if "avx512f" in host.flags:
        if "amd" in host.name.lower():
            return 32.0, "AVX-512 on AMD Zen 4: two 256-bit halves in two units (Zen 5 servers: 64)"
        return 64.0, "AVX-512: two units of 16 lanes (some models have one: 32)"
    if "avx2" in host.flags and "fma" in host.flags:
        return 32.0, "AVX2: two units of 8 lanes"
    if "asimd" in host.flags or host.architecture in ("aarch64", "arm64"):
        return 16.0, "NEON: two units of 4 lanes (Cortex-A72 and older: 8)"
    return 8.0, "nominal: no vector extension is known, 4 lanes assumed"


def _clock_ghz() -> tuple[float, str]:
    try:
        khz = float((CPU / "cpufreq" / "cpuinfo_max_freq").read_text())
        return khz / 1e6, "highest frequency by the operating system"
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        mhz = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        if mhz and max(mhz) > 0:
            return max(mhz) / 1e3, "present frequency by the operating system; the highest is not told"
    except (OSError, ValueError):
        pass
    return NOMINAL_CLOCK_GHZ, f"nominal: {NOMINAL_CLOCK_GHZ:g} GHz; the machine does not tell"


def caches_kib() -> dict[int, float]:
    """KiB of the data cache of each level, as the operating system describes core 0; empty where it does not."""
    found: dict[int, float] = {}
    for folder in sorted(CPU.glob("cache/index*")):
        try:
            level, kind = int((folder / "level").read_text()), (folder / "type").read_text().strip()
            size = (folder / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        unit = {"K": 1.0, "M": 1024.0}.get(size[-1:], 0.0)
        if kind != "Instruction" and level in (1, 2, 3) and unit and size[:-1].isdigit():
            found[level] = float(size[:-1]) * unit
    return found
