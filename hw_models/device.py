"""The machine this process runs on, and the text under which its measurements are kept apart from those of others.

Start with `host_device` and `runtime_id`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ops.kernels import KERNELS_VERSION

__all__ = ["Device", "host_device", "runtime_id"]

# What decides which code runs here: the vector extensions of x86-64 and 64-bit Arm.
_ISA = re.compile(r"sse4_2|avx.*|fma|f16c|amx_.*|asimd.*|sve.*|bf16|i8mm|neon")


@dataclass(frozen=True)
class Device:
    """A CPU as seen by this process.

    Attributes:
        name: as the machine gives it, e.g. "Intel(R) Xeon(R) Processor".
        architecture: "x86_64", "aarch64", ...
        cores: logical cores this process may use.
        flags: vector extensions, sorted.
        memory_bytes: of the machine; 0 if it does not tell.
        fingerprint: 8 hex digits over everything in the CPU description that decides about speed (model, stepping, flags).
    """

    name: str
    architecture: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    fingerprint: str


@functools.cache
def host_device() -> Device:
    """Describe this machine's CPU; asked once per process."""
    facts = _cpuinfo()
    name = facts.get("model name") or facts.get("Model") or platform.processor() or platform.machine() or "unknown CPU"
    flags = tuple(sorted(f for f in (facts.get("flags") or facts.get("Features") or "").split() if _ISA.fullmatch(f)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = [facts.get(k, "") for k in ("cpu family", "model", "stepping", "cache size", "CPU part", "CPU variant")]
    text = "|".join([name, platform.machine(), *kind, *flags])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Device(name, platform.machine(), cores, flags, _memory(), fingerprint)


def runtime_id(threads: int = 1) -> str:
    """A short stable text naming everything a measured latency holds for, e.g.
    "intel-r-xeon-r-processor-1a2b3c4d/k1/torch2.13.0/numba0.68.1/numpy2.4.6/python3.11/t1".

    Args:
        threads: CPU threads the network runs with.

    Returns:
        Machine, version of our kernels, versions of what compiles and runs them, threads.
    """
    device = host_device()
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")[:48]
    versions = [f"{package}{_version(package)}" for package in ("torch", "numba", "numpy")]
    python = ".".join(platform.python_version_tuple()[:2])
    return "/".join(
        [f"{slug}-{device.fingerprint}", f"k{KERNELS_VERSION}", *versions, f"python{python}", f"t{threads}"]
    )


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
