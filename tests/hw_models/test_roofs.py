"""Roofs: the loops do what they say, both ways of measuring agree in kind, and the time given is kept."""

import math
import time

import numpy as np
import pytest

from hw_models import host, roofs
from hw_models.host import describe_host, with_roofs
from hw_models.roof_loops import READ_UNROLL, peak_loop, read_loop, shape
from hw_models.roofs import fma_peak_gflops, measure_roofs

llvm = pytest.importorskip("llvmlite")
NUMBERS = ("peak_gflops", "bandwidth_gbs", "l2_bandwidth_gbs", "l3_bandwidth_gbs", "call_us")


def test_the_reading_loop_reads_every_number_once() -> None:
    (lanes, _), read = shape(), read_loop()
    data = roofs._data(lanes * 4 * READ_UNROLL * 5)
    data[:] = 0.0
    assert data.ctypes.data % 64 == 0
    for where in range(0, len(data), 7):
        data[where] = 1.0
        assert read(data.ctypes.data, 5) == float(where % lanes == 0)  # the sum of every first lane
        data[where] = 0.0


@pytest.mark.parametrize("rounds", [1, 2, 10])
def test_the_multiplying_loop_multiplies_and_adds_as_often_as_it_says(rounds: int) -> None:
    (_, accumulators), peak = shape(), peak_loop()
    x = 0.5
    want = 0.0
    for k in range(accumulators):
        value = x * (k + 1)
        for _ in range(rounds):
            value = value * x + x
        want += value
    assert peak(rounds, x) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["LLVM loops", "NumPy"])
def test_roofs_are_plausible_by_either_method(threads: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "NumPy":
        monkeypatch.setattr(roofs, "_llvm_roofs", _missing)
    said: list[tuple[float, float, str]] = []
    found = measure_roofs(threads, 0.3, lambda done, budget, text: said.append((done, budget, text)))
    assert set(found) == {*NUMBERS, "method", "threads"}
    assert found["method"] == method
    assert found["threads"] == threads
    assert 1 < found["peak_gflops"] < 1000 * threads
    assert 0.1 < found["bandwidth_gbs"] < 1000
    assert 0.1 < found["call_us"] < 10_000
    assert said[-1] == (0.3, 0.3, "roofs measured")
    assert all(0 <= done <= budget for done, budget, _ in said)


def _missing(threads: int) -> None:
    raise ImportError("No module named llvmlite")


def test_the_time_given_is_kept() -> None:
    start = time.perf_counter()
    measure_roofs(1, 0.5)
    assert time.perf_counter() - start < 10.0  # some of it to set up; wide, for machines that do other things as well


def test_a_machine_that_describes_no_caches_is_read_at_default_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "caches_kib", dict)
    sizes = {name: size for name, _, size in roofs._readings()}
    assert sizes["l2_bandwidth_gbs"] == roofs.DEFAULT_L2_KIB * 1024 / 2
    assert sizes["l2_bandwidth_gbs"] < sizes["l3_bandwidth_gbs"] < sizes["bandwidth_gbs"]


@pytest.mark.parametrize(
    "caches",
    [{1: 32.0, 2: 1024.0, 3: 32768.0}, {1: 32.0, 2: 512.0, 3: 2048.0}, {1: 32.0, 2: 1024.0}, {2: 2048.0, 3: 600_000.0}],
)
def test_each_level_is_read_with_more_than_the_level_before_holds(
    caches: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "caches_kib", lambda: caches)
    sizes = {name: size for name, _, size in roofs._readings()}
    assert sizes["l2_bandwidth_gbs"] <= caches[2] * 1024 / 2
    assert ("l3_bandwidth_gbs" in sizes) == (3 in caches)
    if 3 in caches:
        assert caches[2] * 1024 < sizes["l3_bandwidth_gbs"] <= caches[3] * 1024 / 2
    assert sizes["bandwidth_gbs"] >= min(4 * max(caches.values()) * 1024, roofs.LARGEST_MIB * 2**20)


def test_every_stretch_of_memory_is_read_in_turn() -> None:
    seen: list[int] = []
    made = roofs._in_turn([lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)], None)
    for _ in range(7):
        made()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_threads_run_at_once_and_the_slowest_counts() -> None:
    import threading

    together = threading.Barrier(2)
    assert roofs._burst([lambda: together.wait(10), lambda: together.wait(10)], 3) > 0
    slow = lambda: time.sleep(0.02)  # noqa: E731
    assert roofs._burst([slow, lambda: None], 1) >= 0.02


def test_the_peak_of_one_core_is_one_number() -> None:
    assert fma_peak_gflops() == fma_peak_gflops()
    assert 1 < fma_peak_gflops() < 1000


def test_no_thread_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        measure_roofs(0)


def test_roofs_go_into_the_device_and_what_is_missing_stays_unknown() -> None:
    found: dict[str, float | str] = {
        "peak_gflops": 99.0,
        "bandwidth_gbs": 9.0,
        "l3_bandwidth_gbs": float("nan"),
        "call_us": 8.0,
        "method": "NumPy",
    }
    device = with_roofs(describe_host(), found)
    assert device.measured
    assert (device.peak_gflops, device.bandwidth_measured_gbs) == (99.0, 9.0)
    assert math.isnan(device.l3_bandwidth_gbs)
    assert "l3_bandwidth_gbs" not in device.sources
    assert np.isfinite(device.known["call_us"])
