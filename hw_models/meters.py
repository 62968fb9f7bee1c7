"""Counters of energy: RAPL of Intel's and AMD's processors through Linux' powercap, NVML of NVIDIA's GPUs.

A `Meter` has a method and a total in joules that only grows. Start with `find_meter`, which returns None where nothing can be read:
in virtual machines, on boards without counters, and where the files are for the administrator only (most Linux distributions).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

__all__ = ["EnergyError", "Meter", "NvmlMeter", "RaplMeter", "find_meter", "read_rapl"]

POWERCAP = Path("/sys/class/powercap")


class EnergyError(RuntimeError):
    """A counter cannot be read; says which, and what to do."""


class Meter(Protocol):
    """A counter."""

    method: str
    watch_s: float  # read it at least this often

    def joules(self) -> float:
        """The total since some time before; differences count.

        Raises:
            EnergyError: it cannot be read.
        """


def read_rapl(root: str | Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Every processor package's counter, and its memory's where that is apart.

    Args:
        root: where Linux has them: folders `intel-rapl:0` (AMD's too) with `name`, `energy_uj` and `max_energy_range_uj`, and
            `intel-rapl:0:1` for parts of a package.

    Returns:
        By folder: microjoules, and the number after which the counter begins again at 0. Cores and graphics are parts of their
        package and "psys" holds everything again: they are left out. Empty where there are none.

    Raises:
        EnergyError: there are counters that may not be read or hold no number.
    """
    found = {}
    for zone in sorted(Path(root).glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            found[zone.name] = (
                int((zone / "energy_uj").read_text()),
                int((zone / "max_energy_range_uj").read_text()),
            )
        except PermissionError as error:
            raise EnergyError(
                f"{zone / 'energy_uj'} is for the administrator only; to allow reading: sudo chmod a+r {root}/*/energy_uj"
            ) from error
        except (OSError, ValueError) as error:
            raise EnergyError(f"{zone} is no readable RAPL counter: {error}") from error
    return found


class RaplMeter:
    """The packages' counters added up, over the points where they begin again.

    Args:
        root: see `read_rapl`.

    Raises:
        EnergyError: there is none, or it may not be read.
    """

    method = "RAPL"
    watch_s = 60.0  # a counter of 262 kJ comes round after 10 minutes at 400 W

    def __init__(self, root: str | Path = POWERCAP) -> None:
        self.root = Path(root)
        self._last = read_rapl(self.root)
        self._total_uj = 0
        if not self._last:
            raise EnergyError(f"no RAPL counter below {self.root}: virtual machines and other processors have none")

    def joules(self) -> float:
        now = read_rapl(self.root)
        for zone, (value, _) in now.items():
            before, span = self._last.get(zone, (value, 0))
            self._total_uj += value - before if value >= before else value - before + span + 1
        self._last = now
        return self._total_uj * 1e-6


class NvmlMeter:
    """The total that a GPU of NVIDIA keeps (Volta or newer), through pynvml.

    Args:
        index: of the GPU.
        nvml: a module like pynvml; for tests.

    Raises:
        EnergyError: no pynvml, no driver, or a GPU without the counter.
    """

    method = "NVML"
    watch_s = 3600.0  # 64 bits of millijoules

    def __init__(self, index: int = 0, nvml: Any = None) -> None:
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise EnergyError("NVML is read through pynvml: pip install nvidia-ml-py") from error
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
            self.joules()
        except nvml.NVMLError as error:
            raise EnergyError(f"GPU {index} has no energy counter that NVML can read: {error}") from error

    def joules(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise EnergyError(f"the GPU's energy counter cannot be read: {error}") from error


def find_meter(device_class: str = "cpu", root: str | Path = POWERCAP, nvml: Any = None) -> Meter | None:
    """A counter of this machine's CPU ("cpu") or GPU ("gpu"), or None."""
    try:
        return NvmlMeter(nvml=nvml) if device_class == "gpu" else RaplMeter(root)
    except EnergyError:
        return None
