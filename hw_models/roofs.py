"""The roofs of this machine, measured: multiply-adds per second, bytes read per second, and what a call costs.

The loops are written as LLVM code and compiled by llvmlite, which Numba brings: twelve or more independent accumulators of the
widest vector, fed by nothing (peak) or by loads alone (bandwidth of L2, L3 and main memory). Where that is not available, NumPy
does the work, at the speed of its BLAS, and the result says so. Bursts of all roofs alternate; each keeps its best.

Start with `measure_roofs`; `fma_peak_gflops` is the first of them alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hw_models.measure import threads_at
from hw_models.roof_loops import READ_UNROLL, peak_loop, read_loop, shape

__all__ = ["fma_peak_gflops", "measure_roofs"]

BURST_S = 0.001  # short, so that many are not interrupted where others compute as well
ROUNDS = 4000  # iterations of the loop of multiply-adds per call: some 25 us, so that calling is no more than 2 % of it
STRETCH = 2**21  # bytes of main memory read per call, one stretch after the other
# Read when the machine does not tell its caches: in KiB.
DEFAULT_L2_KIB, DEFAULT_L3_KIB = 512.0, 8192.0
MEMORY_MIB, LARGEST_MIB = 128, 512  # read from main memory: four times the L3, within these


@dataclass
class _Roof:
    """One roof being measured: `work` units are done by a call of every thread's function."""

    name: str
    text: str
    calls: list[Callable[[], object]]
    work: float  # of one call of one thread, in units of 1e9
    repeats: int = 1
    best: float = 0.0


def measure_roofs(
    threads: int = 1, budget_s: float = 5.0, progress: Callable[[float, float, str], None] | None = None
) -> dict[str, Any]:
    """Measure this machine.

    Args:
        threads: that run at once, each on data of its own.
        budget_s: seconds, about; half a second is enough on a machine with nothing else to do.
        progress: called as progress(done_s, budget_s, text).

    Returns:
        peak_gflops (FP32, all threads), bandwidth_gbs (main memory, read), l2_bandwidth_gbs, l3_bandwidth_gbs (NaN where the
        machine has no such cache), call_us (one small convolution through torch), method ("LLVM loops" or "NumPy"), threads.

    Raises:
        ValueError: threads below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    start = time.perf_counter()
    try:
        roofs, method = _llvm_roofs(threads), "LLVM loops"
    except (ImportError, RuntimeError, OSError):
        roofs, method = _numpy_roofs(threads), "NumPy"
    with threads_at(1):  # of BLAS and torch: ours are the only ones
        call_us = _measure(roofs, start, budget_s, progress or _silent)
    nothing = {"l2_bandwidth_gbs": float("nan"), "l3_bandwidth_gbs": float("nan")}
    found = {roof.name: roof.best for roof in roofs}
    return {**nothing, **found, "call_us": call_us, "method": method, "threads": threads}


def _measure(roofs: list[_Roof], start: float, budget_s: float, progress: Callable[[float, float, str], None]) -> float:
    """Bursts of each in turn until the time is up, into `best`; microseconds of a call of torch."""
    call = _torch_call()
    for roof in roofs:
        _size(roof)
    call_s, rounds = math.inf, 0
    while rounds < 3 or time.perf_counter() - start < budget_s:
        for roof in roofs:
            seconds = _burst(roof.calls, roof.repeats)
            roof.best = max(roof.best, len(roof.calls) * roof.repeats * roof.work / seconds)
        call_s = min(call_s, _burst([call], 25) / 25)
        rounds += 1
        if rounds % 10 == 0:
            progress(min(time.perf_counter() - start, budget_s), budget_s, roofs[rounds // 10 % len(roofs)].text)
    progress(budget_s, budget_s, "roofs measured")
    return call_s * 1e6


def _silent(done_s: float, budget_s: float, text: str) -> None:
    pass


@functools.cache
def fma_peak_gflops() -> float:
    """GFLOP/s (1e9 per second; a multiply-add is two) of one core, best of a few bursts; takes about 0.1 s.

    Raises:
        ImportError: there is no llvmlite.
    """
    roof = _peak_roof(1)
    _size(roof)
    return max(roof.repeats * roof.work / _burst(roof.calls, roof.repeats) for _ in range(8))


# --- bursts ----------------------------------------------------------------------------------------------------------


def _burst(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds that the slowest thread takes for `repeats` calls, all threads running at once."""
    if len(calls) == 1:
        return _repeat(calls[0], repeats)
    barrier, seconds = threading.Barrier(len(calls)), [0.0] * len(calls)

    def run(i: int) -> None:
        barrier.wait()
        seconds[i] = _repeat(calls[i], repeats)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(seconds)


def _repeat(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return max(time.perf_counter() - start, 1e-9)


def _size(roof: _Roof) -> None:
    """Warm up, and as many repeats as fill a burst."""
    fastest = min(_burst(roof.calls, 1) for _ in range(10))
    roof.repeats = max(1, round(BURST_S / fastest))


def _torch_call() -> Callable[[], object]:
    import torch

    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3)

    def call() -> object:
        with torch.inference_mode():
            return torch.nn.functional.conv2d(x, weight, padding=1)

    call()
    return call


# --- what to read ----------------------------------------------------------------------------------------------------


def _readings() -> list[tuple[str, str, int]]:
    """(name, text, bytes each thread reads again and again) for every level the machine has."""
    from hw_models.host import caches_kib

    caches = caches_kib()
    l2, l3 = caches.get(2, DEFAULT_L2_KIB), caches.get(3, DEFAULT_L3_KIB if not caches else 0.0)
    memory = min(LARGEST_MIB * 2**20, max(MEMORY_MIB * 2**20, int(4 * max(l2, l3) * 1024)))
    readings = [("l2_bandwidth_gbs", "reading the L2 cache", int(l2 * 1024 / 2))]
    if l3 > 2 * l2:
        size = min(int(l3 * 1024 / 2), max(int(l3 * 1024 / 4), int(2 * l2 * 1024)))
        readings.append(("l3_bandwidth_gbs", "reading the L3 cache", size))
    return [*readings, ("bandwidth_gbs", "reading main memory", memory)]


def _data(size: int) -> npt.NDArray[np.float32]:
    """float32[size / 4], aligned to 64 bytes."""
    raw = np.zeros(size // 4 + 16, np.float32)
    skip = -(raw.ctypes.data // 4) % 16
    found = raw[skip : skip + size // 4]
    found[:] = 1.0  # pages of their own, not the zero page
    return found


# --- LLVM ------------------------------------------------------------------------------------------------------------


def _llvm_roofs(threads: int) -> list[_Roof]:
    roofs = [_peak_roof(threads)]
    lanes, _ = shape()
    read = read_loop()
    chunk = lanes * 4 * READ_UNROLL

    def reader(part: npt.NDArray[np.float32]) -> Callable[[], object]:
        return functools.partial(read, part.ctypes.data, part.nbytes // chunk)

    return [*roofs, *_bandwidths(threads, reader)]


def _bandwidths(threads: int, reader: Callable[[npt.NDArray[np.float32]], Callable[[], object]]) -> list[_Roof]:
    """A roof for each level of the memory; `reader` makes a function that reads an array once."""
    roofs = []
    for name, text, size in _readings():
        size = size if name == "l2_bandwidth_gbs" else size // threads  # the others are shared
        stretch = min(size, STRETCH) // 4096 * 4096
        calls: list[Callable[[], object]] = []
        for _ in range(threads):
            whole = _data(size)
            # The bound functions keep addresses alone, the closure keeps the memory.
            parts = [reader(whole[i : i + stretch // 4]) for i in range(0, len(whole) - stretch // 4 + 1, stretch // 4)]
            calls.append(_in_turn(parts, whole))
        roofs.append(_Roof(name, text, calls, stretch / 1e9))
    return roofs


def _in_turn(parts: list[Callable[[], object]], keep: object) -> Callable[[], object]:
    turn = itertools.cycle(parts)

    def call(_keep: object = keep) -> object:
        return next(turn)()

    return call


def _peak_roof(threads: int) -> _Roof:
    lanes, accumulators = shape()
    call = functools.partial(peak_loop(), ROUNDS, 1.0)
    return _Roof("peak_gflops", "multiplying and adding", [call] * threads, 2e-9 * lanes * accumulators * ROUNDS)


# --- NumPy -----------------------------------------------------------------------------------------------------------


def _numpy_roofs(threads: int) -> list[_Roof]:
    """Matrix products for the peak, dot products of long vectors for the bandwidths."""
    side = 256
    made: list[Callable[[], object]] = []
    for _ in range(threads):
        a = np.ones((side, side), np.float32)
        made.append(functools.partial(np.dot, a, a.copy(), np.empty_like(a)))

    def reader(part: npt.NDArray[np.float32]) -> Callable[[], object]:
        return functools.partial(np.dot, part[: len(part) // 2], part[len(part) // 2 :])

    return [_Roof("peak_gflops", "multiplying matrices", made, 2e-9 * side**3), *_bandwidths(threads, reader)]
