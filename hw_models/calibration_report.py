"""What a calibration did and what accuracy to expect of it: `CalibrationReport`; `str(report)` is the closing summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw_models.descriptor import DeviceDescriptor
from hw_models.model import SOURCES
from hw_models.store import Epoch

__all__ = ["CalibrationReport"]

FEWEST = 10  # networks, for shares of them to mean anything
BUSY = 0.75  # load average per core, from which on measurements suffer
_MEANING = {
    "measured": "every step was measured before",
    "interpolated": "shapes were measured, densities lie between",
    "learned": "some shapes were never measured",
    "analytical": "some operations were never measured",
}


@dataclass(frozen=True)
class CalibrationReport:
    """The outcome of `hw_models.calibrate.calibrate`.

    Attributes:
        runtime: what it holds for: machine, versions, threads.
        device: the machine with its measured roofs.
        seconds: that it took.
        measured: networks measured by this call; networks, steps: what the model was fitted to, earlier ones included.
        left_out: source -> n, within_5, within_10, rmspe (percent) on networks that were left out.
        noise: `hw_models.accuracy.noise_ceiling` of networks measured twice; empty with fewer than three.
        epoch: that the measurements belong to.
        failed: what could not be lowered or measured, and why.
        folder, device_file, store: where the model, the device and the measurements are.
    """

    runtime: str
    device: DeviceDescriptor
    seconds: float
    measured: int
    networks: int
    steps: int
    left_out: Mapping[str, Mapping[str, Any]]
    noise: Mapping[str, float]
    epoch: Epoch
    failed: tuple[str, ...]
    folder: Path
    device_file: Path
    store: Path | None

    def __str__(self) -> str:
        d = self.device
        lines = [
            f"calibrated {d.name} in {self.seconds:.0f} s: {d.peak_gflops:.0f} GFLOP/s, "
            f"{d.bandwidth_measured_gbs:.1f} GB/s on {d.threads} thread{'s' * (d.threads > 1)}",
            f"{self.measured} networks measured now; the model knows {self.networks} networks, {self.steps:,} distinct steps",
        ]
        if self.epoch.is_new and self.epoch.moved:
            changes = ", ".join(f"{name} {change:+.1%}" for name, change in self.epoch.moved.items())
            lines.append(
                f"the machine is not as it was ({changes}): a new epoch of measurements was begun; earlier ones are kept, not used"
            )
        load, cores = self.epoch.environment.get("load_1min") or 0.0, self.epoch.environment.get("cores") or 1
        if load > BUSY * cores:
            lines.append(
                f"the machine was busy (load average {load:.1f} on {cores} cores): times are too long where that could not be "
                "waited out; calibrate again when it is quiet"
            )
        lines += self._expected()
        if self.failed:
            lines.append(f"{len(self.failed)} networks could not be measured; the first: {self.failed[0]}")
        lines += [f"model: {self.folder}", f"device: {self.device_file}"]
        lines.append(
            f"measurements: {self.store}" if self.store is not None else "measurements could not be kept on disk"
        )
        return "\n".join(lines)

    def _expected(self) -> list[str]:
        known = [(name, self.left_out[name]) for name in SOURCES if name in self.left_out and self.networks >= FEWEST]
        if not known:
            return ["too few networks to tell how good predictions are: use a larger budget"]
        lines = [
            "what to expect, from networks left out of the fit (share within 5 % and 10 %, root mean square error):"
        ]
        for name, of in known:
            shares = f"{of['within_5']:5.1f} % {of['within_10']:6.1f} % {of['rmspe']:6.1f} %"
            lines.append(f"  {name:12s} {shares}   n = {of['n']:<4d} {_MEANING[name]}")
        if self.noise:
            n = self.noise
            lines.append(
                f"  the same network measured twice: a perfect model would have {n['hit5']:.0%} within 5 % and {n['hit10']:.0%} "
                f"within 10 % (n = {n['n']:.0f})"
            )
        return lines
