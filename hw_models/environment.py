"""The state of the machine while it is measured: clocks, load, time stolen by other virtual machines, versions.

Kept with every epoch of the `MeasurementStore`. What a machine does not tell is None, never a guess.

Start with `describe`.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hw_models.device import host_device

__all__ = ["StealMeter", "describe"]

_CPU0 = "sys/devices/system/cpu/cpu0/cpufreq"


class StealMeter:
    """The share of CPU time that the host gave to others while this virtual machine wanted to run.

    It counts from when it is made.

    Args:
        root: of the file system; another one in tests.
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = Path(root)
        self._start = _ticks(self._root)

    def share(self) -> float | None:
        """Stolen / all CPU time since the meter was made, in [0, 1], over all cores; None where the kernel does not tell or the
        clock has not moved."""
        now = _ticks(self._root)
        if now is None or self._start is None or now[1] <= self._start[1]:
            return None
        return min(1.0, max(0.0, (now[0] - self._start[0]) / (now[1] - self._start[1])))


def describe(steal: StealMeter | None = None, root: str | os.PathLike[str] = "/") -> dict[str, Any]:
    """What a measuring run should note down.

    Args:
        steal: made when the run began; without it, `steal_share` is that since the machine was started.
        root: of the file system; another one in tests.

    Returns:
        cpu, architecture, cores (that this process may use), memory_bytes; governor, clock_min_ghz, clock_max_ghz, clock_ghz (now);
        load_1min, load_5min, load_15min; steal_share in [0, 1]; kernel (of the operating system), versions of python, torch, numpy,
        numba; torch_threads. Plain values, for JSON; None where the machine does not tell.
    """
    base = Path(root)
    device = host_device()
    load = _floats(_text(base / "proc/loadavg"), 3)
    if steal is not None:
        share = steal.share()
    else:
        since_start = _ticks(base)
        share = since_start[0] / since_start[1] if since_start and since_start[1] else None
    return {
        "cpu": device.name,
        "architecture": device.architecture,
        "cores": device.cores,
        "memory_bytes": device.memory_bytes,
        "governor": _text(base / _CPU0 / "scaling_governor"),
        "clock_min_ghz": _ghz(base / _CPU0 / "cpuinfo_min_freq"),
        "clock_max_ghz": _ghz(base / _CPU0 / "cpuinfo_max_freq"),
        "clock_ghz": _clock_now(base),
        "load_1min": load[0],
        "load_5min": load[1],
        "load_15min": load[2],
        "steal_share": share,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "numpy", "numba")},
        "torch_threads": torch.get_num_threads(),
    }


def _ticks(root: Path) -> tuple[int, int] | None:
    """(stolen, all) clock ticks since the machine was started: user, nice, system, idle, iowait, irq, softirq, steal."""
    line = (_text(root / "proc/stat") or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    try:
        ticks = [int(word) for word in line[1:9]]
    except ValueError:
        return None
    return ticks[7], sum(ticks)


def _clock_now(root: Path) -> float | None:
    """GHz of the first core at this moment."""
    if (scaled := _ghz(root / _CPU0 / "scaling_cur_freq")) is not None:
        return scaled
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "cpu MHz":
            found = _floats(value, 1)[0]
            return None if found is None else found / 1e3
    return None


def _ghz(path: Path) -> float | None:
    """From a file in kHz."""
    found = _floats(_text(path), 1)[0]
    return None if found is None else found / 1e6


def _floats(text: str | None, count: int) -> list[float | None]:
    words = (text or "").split()[:count]
    try:
        numbers: list[float | None] = [float(word) for word in words]
    except ValueError:
        numbers = []
    return numbers + [None] * (count - len(numbers))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None
