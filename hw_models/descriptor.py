"""What is known about a device that networks may run on: `load_device("raspberry-pi-4") -> DeviceDescriptor`.

A descriptor is a TOML file of figures, each with the source it is from. `measured` tells a data sheet from a measurement; what is
not known is left out of the file and NaN in the descriptor, never guessed. The shipped files lie in `hw_models/devices`; "host" is
this machine, as `nas calibrate` measured it or, before that, as the machine describes itself (`hw_models.host`).

Start with `load_device` and `list_devices`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

__all__ = ["DeviceDescriptor", "DeviceError", "host_path", "list_devices", "load_device", "save_device"]

FOLDER = Path(__file__).parent / "devices"
CLASSES = ("cpu", "gpu")
NAN = float("nan")


class DeviceError(ValueError):
    """There is no such device, or its file cannot be used; says which and what to do."""


@dataclass(frozen=True)
class DeviceDescriptor:
    """A device. Figures are NaN (counts 0) where unknown; a cache that is not there has 0 KiB. 1 GB is 1e9 bytes, 1 KiB 1024.

    Attributes:
        id: the name to load it by, lower case.
        device_class: "cpu" or "gpu".
        name: in words.
        cores: physical cores; CUDA cores of a GPU.
        threads: cores that a network runs on; all of them on a GPU.
        clock_min_ghz, clock_max_ghz: lowest under load and highest.
        flops_per_cycle: FP32, of one core; a multiply-add is two.
        peak_gflops: FP32, of the `threads` used.
        bandwidth_gbs: of the main memory, by the data sheet.
        bandwidth_measured_gbs: read by the `threads` used.
        l2_bandwidth_gbs, l3_bandwidth_gbs: read by the `threads` used, where they were measured.
        l1_kib, l2_kib, l3_kib: data caches; L1 and L2 of one core unless the note says otherwise, L3 of all.
        memory_gib: main memory.
        idle_w, peak_w: power doing nothing, and with all cores busy.
        power_w: power while a network runs on the `threads`, as a counter showed it; NaN if none was read.
        power_uncertainty: relative half width of the 90 % interval of the power.
        static_w, pj_per_flop, pj_per_byte: parts of the energy (`hw_models.energy`), where they are known.
        call_us: cost of calling one operation that does next to nothing, through torch.
        measured: the roofs (peak, bandwidth, call) were measured on the device, not taken from its data sheet.
        sources: where each figure is from, by field.
        note: what else one should know.

    Raises:
        DeviceError: a figure is negative, or the class unknown.
    """

    id: str
    device_class: str
    name: str
    cores: int = 0
    threads: int = 1
    clock_min_ghz: float = NAN
    clock_max_ghz: float = NAN
    flops_per_cycle: float = NAN
    peak_gflops: float = NAN
    bandwidth_gbs: float = NAN
    bandwidth_measured_gbs: float = NAN
    l2_bandwidth_gbs: float = NAN
    l3_bandwidth_gbs: float = NAN
    l1_kib: float = NAN
    l2_kib: float = NAN
    l3_kib: float = NAN
    memory_gib: float = NAN
    idle_w: float = NAN
    peak_w: float = NAN
    power_w: float = NAN
    power_uncertainty: float = 0.10
    static_w: float = NAN
    pj_per_flop: float = NAN
    pj_per_byte: float = NAN
    call_us: float = NAN
    measured: bool = False
    sources: dict[str, str] = field(default_factory=dict, repr=False, hash=False)
    note: str = ""

    def __post_init__(self) -> None:
        if self.device_class not in CLASSES:
            raise DeviceError(f'{self.id}: device_class must be one of {", ".join(CLASSES)}, got "{self.device_class}"')
        may_be_zero = (
            "cores",
            "l1_kib",
            "l2_kib",
            "l3_kib",
            "idle_w",
            "static_w",
            "pj_per_flop",
            "pj_per_byte",
            "call_us",
        )
        for name in FIGURES:
            value = getattr(self, name)
            if value < 0 or math.isinf(value) or (value == 0 and name not in may_be_zero):
                raise DeviceError(f"{self.id}: {name} must be positive, got {value}; leave out what is not known")

    @property
    def known(self) -> dict[str, float]:
        """The figures that are known, by field."""
        return {name: v for name in FIGURES if not math.isnan(v := getattr(self, name)) and (v or name != "cores")}

    def at_threads(self, threads: int) -> DeviceDescriptor:
        """The same device with another number of threads: compute scales with them, what was measured is forgotten.

        Raises:
            DeviceError: it has fewer cores, or is a GPU.
        """
        if threads == self.threads:
            return self
        if self.device_class == "gpu" or threads < 1 or (self.cores and threads > self.cores):
            raise DeviceError(f"{self.id} cannot run on {threads} threads: a {self.device_class} of {self.cores} cores")
        peak = self.peak_gflops * threads / self.threads
        forgotten: dict[str, Any] = dict.fromkeys(
            ("bandwidth_measured_gbs", "l2_bandwidth_gbs", "l3_bandwidth_gbs", "power_w"), NAN
        )
        sources = {name: text for name, text in self.sources.items() if name not in forgotten}
        if "peak_gflops" in sources:
            sources["peak_gflops"] += f" (scaled from {self.threads} to {threads} threads)"
        return replace(self, threads=threads, peak_gflops=peak, sources=sources, measured=False, **forgotten)


_TEXTS = ("id", "device_class", "name", "note")
_FIELDS = tuple(f.name for f in dataclasses.fields(DeviceDescriptor))
FIGURES = tuple(name for name in _FIELDS if name not in (*_TEXTS, "measured", "sources"))
# What a file need not give a source of: a choice, not a fact.
_CHOICES = ("threads", "power_uncertainty")


def list_devices() -> list[str]:
    """Names that `load_device` knows: "host", then the shipped ones in alphabetical order."""
    return ["host", *sorted(path.stem for path in FOLDER.glob("*.toml"))]


def host_path(threads: int = 1) -> Path:
    """Where `nas calibrate` keeps what it measured of this machine, for one runtime and number of threads."""
    from hw_models.device import runtime_id
    from hw_models.tables import cache_folder

    return cache_folder() / "devices" / (runtime_id(threads).replace("/", "_") + ".toml")


def load_device(name_or_path: str | Path, threads: int | None = None) -> DeviceDescriptor:
    """Read a descriptor.

    Args:
        name_or_path: one of `list_devices`, or a TOML file (a path, or a text that ends in ".toml").
        threads: cores that a network runs on. Default: what the file says; for "host" 1.

    Returns:
        The descriptor; for a "host" that was never calibrated one from what the machine says about itself, with a note.

    Raises:
        DeviceError: unknown name, or a file that is missing or wrong; names the place and what to do.
    """
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or os.sep in text:
        device = _read(Path(text))
    elif text == "host":
        path = host_path(threads or 1)
        if not path.exists():
            from hw_models.host import describe_host

            return describe_host(threads or 1)
        device = _read(path)
    elif (FOLDER / f"{text}.toml").exists():
        device = _read(FOLDER / f"{text}.toml")
    else:
        known = list_devices()
        near = difflib.get_close_matches(text.lower().replace("_", "-").replace(" ", "-"), known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise DeviceError(
            f'unknown device "{text}"{hint} Known: {", ".join(known)}. A device of your own is a TOML file with the same '
            'fields, given by its path; `nas calibrate` measures this machine, which is then "host"'
        )
    return device if threads is None else device.at_threads(threads)


def save_device(device: DeviceDescriptor, path: str | Path) -> None:
    """Write a descriptor as TOML, unknown figures left out; the file appears whole or not at all."""
    import tomli_w

    content: dict[str, Any] = {name: getattr(device, name) for name in _TEXTS if getattr(device, name)}
    content["measured"] = device.measured
    content |= device.known
    content["sources"] = dict(sorted(device.sources.items()))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(tomli_w.dumps(content), encoding="utf-8")
    half.replace(path)


def _read(path: Path) -> DeviceDescriptor:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(f"cannot read the device file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"{path} is not TOML: {error}; one that was measured is made anew by `nas calibrate`"
        ) from error
    for name in content:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(_FIELDS)}"
            raise DeviceError(f'{path}: unknown key "{name}"{hint}')
    missing = [name for name in ("id", "device_class", "name") if name not in content]
    if missing:
        raise DeviceError(f"{path}: {', '.join(missing)} missing; a device needs id, device_class and name")
    for name, value in content.items():
        _check_type(path, name, value)
    sources = content.get("sources", {})
    for name in content:
        if name in FIGURES and name not in _CHOICES and name not in sources:
            raise DeviceError(
                f"{path}: {name} = {content[name]} has no source; add a line {name} = ... under [sources]"
            )
    numbers = {name: float(v) for name, v in content.items() if name in FIGURES and name not in ("cores", "threads")}
    return DeviceDescriptor(**{**content, **numbers})


def _check_type(path: Path, name: str, value: Any) -> None:
    if name == "sources":
        right = isinstance(value, dict) and all(isinstance(v, str) and v and k in _FIELDS for k, v in value.items())
        wanted = "a table of texts by field"
    elif name in _TEXTS:
        right, wanted = isinstance(value, str), "a text"
    elif name == "measured":
        right, wanted = isinstance(value, bool), "true or false"
    elif name in ("cores", "threads"):
        right, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        right, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    if not right:
        raise DeviceError(f"{path}: {name} must be {wanted}, got {value!r}")
