"""The arithmetic of the benchmark's clock, on clocks that are made up."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from benchmarks.kernels.clock import GROUP_S, InProcess, Settings
from benchmarks.kernels.peak import fma_peak_gflops
from benchmarks.kernels.protocol import Cell, measure, per_unit_us


class FakeClock:
    """A clock that only calls move: each by the next of the given seconds, the last of them for ever."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.left, self.calls = 0.0, list(seconds), 0

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += self.left.pop(0) if len(self.left) > 1 else self.left[0]


class Scripted:
    """A chain whose bursts take given seconds."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def burst(self, settings: Settings) -> float:
        self.log.append(self.name)
        return self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]


def test_a_burst_is_the_low_percentile_of_calls_after_warming() -> None:
    clock = FakeClock(9.0, 0.004, 0.001, 0.003, 0.002)
    burst = InProcess(clock.call, clock).burst(Settings(warm_ms=1, burst_ms=10, percentile=0))
    assert burst == pytest.approx(0.001)
    assert clock.calls == 1 + 4  # one warms; 4 + 1 + 3 + 2 ms fill the burst


def test_short_calls_are_timed_in_groups_from_the_second_burst_on() -> None:
    clock = FakeClock(1e-6)
    timed = InProcess(clock.call, clock)
    settings = Settings(warm_ms=0.001, burst_ms=0.1)
    assert timed.burst(settings) == pytest.approx(1e-6)
    assert timed.group == math.ceil(GROUP_S / 1e-6)
    assert timed.burst(settings) == pytest.approx(1e-6)


def test_a_layer_is_the_difference_of_the_minima_over_the_units_between() -> None:
    cell = Cell(short=[30e-6, 20e-6, 25e-6], long=[60e-6, 70e-6, 61e-6])
    assert per_unit_us(cell, (1, 5)) == pytest.approx(10.0)
    assert per_unit_us(cell, (1, 5), split=2) == pytest.approx(5.0)
    assert per_unit_us(cell, (0, 1)) == pytest.approx(40.0)


def test_a_long_chain_that_is_not_slower_gives_no_time() -> None:
    assert math.isnan(per_unit_us(Cell(short=[2.0], long=[1.0]), (1, 5)))
    assert math.isnan(per_unit_us(Cell(), (1, 5)))


def test_every_round_times_every_contender_and_both_chains_in_a_row() -> None:
    log: list[str] = []
    contenders = {n: (Scripted(f"{n} short", [1.0], log), Scripted(f"{n} long", [2.0], log)) for n in "abc"}
    cells = measure(contenders, Settings(rounds=5, cap_rounds=9))
    assert {len(cell.long) for cell in cells.values()} == {5}  # confirmed at once: no round more
    turns = log[6:]  # the first six size the groups
    assert all(turns[i].split()[0] == turns[i + 1].split()[0] for i in range(0, len(turns), 2))
    orders = {tuple(turns[i : i + 6 : 2]) for i in range(0, len(turns), 6)}
    assert len(orders) > 1
    assert all(len(set(order)) == 3 for order in orders)


def test_only_contenders_without_a_confirmed_minimum_go_on_to_the_cap() -> None:
    falling: Iterator[float] = (1.0 / 2**i for i in range(100))
    log: list[str] = []
    contenders = {
        "steady": (Scripted("s", [1.0], log), Scripted("S", [2.0], log)),
        "falling": (Scripted("f", [1.0], log), Scripted("F", list(falling), log)),
    }
    cells = measure(contenders, Settings(rounds=3, cap_rounds=7))
    assert (len(cells["steady"].long), len(cells["falling"].long)) == (3, 7)
    assert cells["steady"].confirmed
    assert not cells["falling"].confirmed


def test_waiting_before_turns_is_only_for_several_threads() -> None:
    waits: list[float] = []
    contenders = {"a": (Scripted("s", [1.0], []), Scripted("S", [2.0], []))}
    measure(contenders, Settings(rounds=3, cap_rounds=3), sleep=waits.append)
    assert waits == []
    measure(contenders, Settings(rounds=3, cap_rounds=3, settle_s=0.5), sleep=waits.append)
    assert waits == [0.5] * 3


def test_the_measured_peak_is_that_of_some_cpu() -> None:
    assert 5 < fma_peak_gflops() < 1000
