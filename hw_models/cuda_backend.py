"""The little of a CUDA device that measuring needs, behind one small interface: events, graphs, a flush, clocks.

`TorchCuda` is the real one. A test brings its own, with a queue and a clock that it moves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hw_models.measure import MeasurementError

__all__ = ["Conditions", "CudaBackend", "Sample", "TorchCuda"]

# Bits of NVML's clocks-event-reasons field, by its documented names. Idle and application clocks are not listed: they hold nothing
# down while work is queued.
THROTTLE_REASONS = {
    0x0000000000000004: "software power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000010: "sync boost",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "hardware power brake",
    0x0000000000000100: "display clock setting",
}
FLUSH_BYTES = 256 * 2**20  # at least, and at least twice the L2 cache


@dataclass(frozen=True)
class Sample:
    """The device at one moment: clocks in MHz, temperature in degrees Celsius, power in W, bits of what holds the clocks down."""

    sm_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_w: float
    throttle_bits: int


@dataclass(frozen=True)
class Conditions:
    """What the samples of a measuring run span. All empty (0 samples, None) where the device could not be asked.

    Attributes:
        samples: how many.
        sm_clock_mhz, memory_clock_mhz, temperature_c, power_w: (lowest, highest).
        throttled: for each reason that held the clocks down, the share of samples it was seen in.
    """

    samples: int
    sm_clock_mhz: tuple[float, float] | None
    memory_clock_mhz: tuple[float, float] | None
    temperature_c: tuple[float, float] | None
    power_w: tuple[float, float] | None
    throttled: dict[str, float]

    @classmethod
    def over(cls, samples: Iterable[Sample]) -> Conditions:
        """Summarise samples."""
        seen = list(samples)

        def span(name: str) -> tuple[float, float] | None:
            values = [getattr(sample, name) for sample in seen]
            return (min(values), max(values)) if values else None

        throttled = {
            reason: sum(bool(sample.throttle_bits & bit) for sample in seen) / len(seen)
            for bit, reason in THROTTLE_REASONS.items()
            if any(sample.throttle_bits & bit for sample in seen)
        }
        return cls(
            len(seen),
            span("sm_clock_mhz"),
            span("memory_clock_mhz"),
            span("temperature_c"),
            span("power_w"),
            throttled,
        )


class CudaBackend(Protocol):
    """A device with a queue. Everything is queued in order; nothing but `synchronize` waits."""

    def record(self) -> Any:
        """Queue a time stamp and return it."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds of device time between two stamps that the device has passed."""

    def synchronize(self) -> None:
        """Wait until the queue is empty; errors of queued work are raised here."""

    def capture(self, call: Callable[[], object], copies: int) -> Callable[[], object]:
        """A function that queues what so many calls queue, without making them. Raises what capturing raises."""

    def flush_l2(self) -> None:
        """Queue work that evicts everything from the L2 cache."""

    def sample(self) -> Sample | None:
        """The device now, None if it cannot be asked."""

    def runtime(self) -> str:
        """Device and versions, as text that times are kept under."""


class TorchCuda:
    """A CUDA device through torch; clocks through pynvml where that is installed.

    Args:
        device: index or name as torch takes it. Default: the current one.

    Raises:
        MeasurementError: there is no CUDA device.
    """

    def __init__(self, device: int | str | None = None) -> None:
        if not torch.cuda.is_available():
            raise MeasurementError(
                f"measuring on CUDA needs a CUDA device; torch {torch.__version__} sees none on this machine. Measure on the CPU "
                "with hw_models.measure.Measurer, or, where there is a device, install a CUDA build of torch"
            )
        chosen = torch.device("cuda" if device is None else device)
        self.device = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        properties = torch.cuda.get_device_properties(self.device)
        self._flush: torch.Tensor | None = None
        self._flush_bytes = max(FLUSH_BYTES, 2 * int(getattr(properties, "L2_cache_size", 0)))
        self._nvml, self._handle, self._driver = _nvml(str(getattr(properties, "uuid", "")))

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, call: Callable[[], object], copies: int) -> Callable[[], object]:
        before = torch.cuda.current_stream(self.device)
        try:
            # A first call on a side stream, as capturing asks for: libraries set up their workspaces there.
            side = torch.cuda.Stream(self.device)
            side.wait_stream(before)
            with torch.cuda.stream(side):
                call()
            before.wait_stream(side)
            self.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                for _ in range(copies):
                    call()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails may leave its own stream current
        return graph.replay

    def flush_l2(self) -> None:
        if self._flush is None:
            self._flush = torch.empty(self._flush_bytes, dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def sample(self) -> Sample | None:
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        # The second name is that of older drivers' libraries.
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        try:
            return Sample(
                sm_clock_mhz=float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                memory_clock_mhz=float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                temperature_c=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                throttle_bits=int(reasons(handle)),
            )
        except nvml.NVMLError:  # a part of a device, or an old one, does not answer all of these
            self._handle = None
            return None

    def runtime(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
        versions = [
            f"torch{torch.__version__}",
            f"cuda{torch.version.cuda}",
            f"cudnn{torch.backends.cudnn.version()}",
            f"driver{self._driver or '-'}",
        ]
        return "/".join([f"{slug}-sm{properties.major}{properties.minor}", *versions])


def _nvml(uuid: str) -> tuple[Any, Any, str]:
    """pynvml, its handle of the device and the driver's version; (None, None, "") where there is no pynvml or it does not know
    the device."""
    try:
        import pynvml
    except ImportError:
        return None, None, ""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None, None, ""
    return pynvml, handle, driver.decode() if isinstance(driver, bytes) else str(driver)
