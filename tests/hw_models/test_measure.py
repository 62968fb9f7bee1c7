"""The measuring protocol, on a clock that the test moves; and once, loosely, on the real one."""

import gc
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from hw_models.measure import Measurement, MeasurementError, Measurer


class World:
    """A clock, jobs that take time on it, and a diary of who ran and who slept."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.diary: list[tuple[str, float]] = []  # (name or "sleep", start in s)

    def clock(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.diary.append(("sleep", self.now_ns / 1e9))
        self.now_ns += round(seconds * 1e9)

    def job(self, name: str, ms: Callable[[], float] | float) -> Callable[[], None]:
        def call() -> None:
            self.diary.append((name, self.now_ns / 1e9))
            self.now_ns += round((ms if isinstance(ms, int | float) else ms()) * 1e6)

        return call

    def measurer(self, **settings: object) -> Measurer:
        return Measurer(clock_ns=self.clock, sleep=self.sleep, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("ms", [0.001, 0.03, 0.999, 1.0, 7.0, 30.0, 1000.0])
def test_a_steady_callable_gets_its_own_time_and_an_ok(ms: float) -> None:
    world = World()
    found = world.measurer().measure({"a": world.job("a", ms)})["a"]
    for value in (found.floor_ms, found.lo_ms, found.hi_ms, found.median_ms, found.p90_ms, *found.rounds):
        assert value == pytest.approx(ms)
    assert (found.quality, len(found.rounds)) == ("ok", 8)


def test_a_block_lasts_at_least_its_minimum() -> None:
    world = World()
    seen: list[float] = []
    measurer = world.measurer(min_block_ms=2.0)
    block = type(measurer)._block

    def spy(self: Measurer, item: object, calls: int) -> float:
        per_call = block(self, item, calls)  # type: ignore[arg-type]
        seen.append(per_call * calls)
        return per_call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurer, "_block", spy)
        measurer.measure({"a": world.job("a", 0.003)})
    assert min(seen[-8 * 11 :]) >= 2.0
    assert max(seen[-8 * 11 :]) < 3.0


def test_a_slow_callable_is_called_fewer_times() -> None:
    world = World()
    calls = {}
    for ms in (1.5, 50.0, 1000.0):
        world.diary.clear()
        world.measurer().measure({"a": world.job("a", ms)})
        calls[ms] = sum(name == "a" for name, _ in world.diary)
    assert calls[1.5] >= 80
    assert calls[50.0] <= 8 * 4 + 6
    assert calls[1000.0] <= 8 + 6


def test_warming_up_goes_on_until_three_blocks_agree() -> None:
    world = World()
    cold = iter([500.0, 60, 50, 40, 30, 25, 20, 15, 12, 11, 10.6, 10.4] + [10.0] * 1000)
    found = world.measurer().measure({"a": world.job("a", lambda: next(cold))})["a"]
    assert found.floor_ms == found.p90_ms == 10.0


def test_warming_up_ends_even_if_nothing_ever_agrees() -> None:
    world = World()
    rng = random.Random(0)
    found = world.measurer(cap_rounds=9).measure({"a": world.job("a", lambda: 2 + 2 * rng.random())})["a"]
    assert 2 <= found.floor_ms < 2.8


def test_rounds_of_an_item_are_apart_and_others_fill_the_time() -> None:
    world = World()
    names = [f"job{i}" for i in range(40)]
    world.measurer(spacing_s=0.3).measure({name: world.job(name, 1.0) for name in names})
    assert "sleep" not in {name for name, _ in world.diary}, "40 items of 10 ms fill 0.3 s"

    world.diary.clear()
    world.measurer(spacing_s=0.3, rounds=5).measure({name: world.job(name, 1.0) for name in names[:2]})
    for name in names[:2]:
        starts = [start for who, start in world.diary if who == name]
        gaps = [b - a for a, b in itertools.pairwise(starts) if b - a > 0.1]
        assert len(gaps) == 4
        assert all(0.3 <= gap < 0.35 for gap in gaps)


def test_the_order_is_random_and_comes_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        world = World()
        world.measurer(seed=seed, spacing_s=0).measure({name: world.job(name, 5.0) for name in "abcdef"})
        runs = [name for name, _ in world.diary]
        return [name for name, before in zip(runs[1:], runs) if name != before]

    assert order(0) == order(0)
    assert order(0) != order(1)
    rounds = order(0)[6:]
    assert len({tuple(rounds[i : i + 6]) for i in range(0, 36, 6)}) > 1


def test_the_floor_ignores_disturbed_rounds_and_the_median_does_not() -> None:
    world = World()

    def ms() -> float:  # two of three seconds are disturbed
        return 1.0 if int(world.now_ns / 1e9) % 3 == 0 else 2.0

    found = world.measurer().measure({"a": world.job("a", ms)})["a"]
    assert found.floor_ms == 1.0
    assert found.quality == "ok"
    assert found.p90_ms == pytest.approx(2.0)


def _drifting(factors: list[float], **settings: object) -> Measurement:
    """One value per round; the clock's time since the last sleep tells the rounds apart."""
    world = World()

    def ms() -> float:
        slept = sum(name == "sleep" for name, _ in world.diary)
        return factors[min(slept, len(factors) - 1)]

    return world.measurer(**settings).measure({"a": world.job("a", ms)})["a"]


def test_quality_counts_the_rounds_near_the_floor_and_extends_up_to_the_cap() -> None:
    ok = _drifting([1.0, 1.02, 1.5, 1.029, 2, 2, 2, 2])
    assert (ok.quality, len(ok.rounds), ok.floor_ms) == ("ok", 8, 1.0)
    late = _drifting([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.0, 1.0, 1.0, 2.0], cap_rounds=24)
    assert (late.quality, len(late.rounds), late.floor_ms) == ("ok", 11, 1.0)
    thin = _drifting([1.0, 1.02, 1.5, 1.6, 1.7, 1.8, 1.9, 2, 2.1], cap_rounds=9)
    assert (thin.quality, len(thin.rounds)) == ("thin", 9)
    never = _drifting([1.0 + 0.1 * i for i in range(12)], cap_rounds=12)
    assert (never.quality, len(never.rounds)) == ("unreached", 12)


def test_the_interval_holds_the_floor_and_widens_with_disagreement() -> None:
    calm, rough = _drifting([1.0] * 8), _drifting([1.0, 1.3, 1.02, 1.3, 1.01, 1.3, 1.0, 1.3], cap_rounds=8)
    assert calm.lo_ms == calm.floor_ms == calm.hi_ms
    assert rough.lo_ms < rough.floor_ms < rough.hi_ms  # even rounds reached 1.0, odd ones only 1.3


def test_a_callable_that_raises_is_named() -> None:
    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(
        MeasurementError, match='measuring "layer7": the call raised ZeroDivisionError: by nothing'
    ) as error:
        World().measurer().measure({"layer7": broken})
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert gc.isenabled()


def test_threads_and_garbage_collection_are_set_and_put_back() -> None:
    seen: set[tuple[int, bool]] = set()

    def look() -> None:
        seen.add((torch.get_num_threads(), gc.isenabled()))
        time.sleep(0.001)

    before = torch.get_num_threads()
    Measurer(threads=2, rounds=1, cap_rounds=1, spacing_s=0).measure({"a": look})
    assert seen == {(2, False)}
    assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


def test_progress_tells_every_round() -> None:
    world = World()
    seen: list[tuple[int, int, str]] = []
    measurer = world.measurer(progress=lambda *what: seen.append(what), rounds=3, cap_rounds=3)
    measurer.measure({"a": world.job("a", 1.0), "b": world.job("b", 1.0)})
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 6) for i in range(6)]
    assert {name for _, _, name in seen} == {"a", "b"}


def test_nothing_to_measure_gives_nothing() -> None:
    assert Measurer().measure({}) == {}


@pytest.mark.parametrize(
    "settings",
    [{"rounds": 0}, {"rounds": 9, "cap_rounds": 8}, {"threads": 0}, {"percentile": 101}, {"min_block_ms": 0}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Measurer needs"):
        Measurer(**settings)  # type: ignore[arg-type]


def test_on_the_real_clock_twice_the_work_takes_about_twice_the_time() -> None:
    def work(n: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(n):
                pass

        return call

    found = Measurer(rounds=4, spacing_s=0.02).measure({"one": work(20_000), "two": work(40_000), "tiny": lambda: None})
    assert found["two"].floor_ms / found["one"].floor_ms == pytest.approx(2, rel=0.3)
    assert 0 < found["tiny"].floor_ms < 0.002


def test_measuring_leaves_the_number_of_threads_as_it_was_also_the_first_time() -> None:
    code = (
        "import numba, torch, ops.runtime\n"
        "from hw_models.measure import Measurer\n"
        "torch.set_num_threads(1)\n"
        "Measurer(rounds=3, spacing_s=0, min_block_ms=0.01, blocks=2).measure({'a': lambda: None})\n"
        "print(torch.get_num_threads())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "1"
