"""Energy by each method against arithmetic by hand; counters that come round, may not be read, or are not there."""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hw_models import energy
from hw_models.descriptor import DeviceDescriptor, list_devices, load_device, save_device
from hw_models.energy import (
    EnergyError,
    NvmlMeter,
    RaplMeter,
    calibrate_power,
    energy_of,
    find_meter,
    measure_energy,
    read_rapl,
)

BOARD = DeviceDescriptor(
    "board", "cpu", "Board", cores=4, threads=1, idle_w=2.0, peak_w=6.0, sources={"peak_w": "sheet"}
)


def test_constant_power_is_idle_and_a_share_of_the_rest_times_time() -> None:
    found = energy_of(10.0, BOARD)  # 2 W + a quarter of 4 W, for 10 ms
    assert (found.mj, found.lo_mj, found.hi_mj) == pytest.approx((30.0, 27.0, 33.0))
    assert found.method == "constant power"
    assert "sheet" in found.note
    assert "10%" in found.note
    assert energy_of(10.0, dataclasses.replace(BOARD, threads=4)).mj == pytest.approx(60.0)


def test_energy_is_proportional_to_time() -> None:
    for name in list_devices():
        device = load_device(name)
        once, twice = energy_of(1.5, device), energy_of(3.0, device)
        assert math.isnan(once.mj) == math.isnan(device.peak_w)
        if not math.isnan(once.mj):
            assert twice.mj == pytest.approx(2 * once.mj)
            assert once.lo_mj < once.mj < once.hi_mj


def test_a_device_of_unknown_power_has_unknown_energy_and_says_what_to_add() -> None:
    found = energy_of(1.0, load_device("pixel-4"))
    assert math.isnan(found.mj)
    assert "peak_w" in found.note
    assert "unknown" in str(found)


def test_the_nominal_power_of_an_unmeasured_host_is_wide_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    found = energy_of(2.0, load_device("host"))
    assert found.mj == pytest.approx(10.0)  # 5 W for the core in use
    assert found.hi_mj == pytest.approx(15.0)
    assert "nominal" in found.note


def test_components_add_static_compute_and_traffic() -> None:
    device = dataclasses.replace(BOARD, static_w=2.0, pj_per_flop=3.0, pj_per_byte=100.0)
    found = energy_of(10.0, device, flops=1e9, bytes=1e7)
    assert found.mj == pytest.approx(20.0 + 3.0 + 1.0)
    assert found.method == "components"
    assert energy_of(10.0, device, flops=1e9).method == "constant power"
    assert energy_of(10.0, BOARD, flops=1e9, bytes=1e7).method == "constant power"


def test_components_of_nothing_but_static_power_are_constant_power() -> None:
    device = dataclasses.replace(BOARD, static_w=3.0, pj_per_flop=0.0, pj_per_byte=0.0)
    assert energy_of(10.0, device, flops=1e9, bytes=1e9).mj == pytest.approx(energy_of(10.0, BOARD).mj)


@pytest.mark.parametrize(("ms", "flops", "bytes_"), [(-1.0, None, None), (1.0, -1.0, 1.0), (1.0, 1.0, -1.0)])
def test_negative_work_is_refused(ms: float, flops: float | None, bytes_: float | None) -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        energy_of(ms, BOARD, flops, bytes_)


# --- counters --------------------------------------------------------------------------------------------------------


def zone(root: Path, folder: str, name: str, energy_uj: int, span: int = 1_000_000) -> Path:
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "name").write_text(name + "\n")
    (place / "energy_uj").write_text(f"{energy_uj}\n")
    (place / "max_energy_range_uj").write_text(f"{span}\n")
    return place


def test_packages_and_their_memory_count_and_nothing_counts_twice(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 10)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    zone(tmp_path, "intel-rapl:1", "package-1", 20)
    zone(tmp_path, "intel-rapl:2", "psys", 99)
    (tmp_path / "intel-rapl").mkdir()
    assert {name: value for name, (value, _) in read_rapl(tmp_path).items()} == {
        "intel-rapl:0": 10,
        "intel-rapl:0:1": 5,
        "intel-rapl:1": 20,
    }


def test_a_counter_that_comes_round_goes_on_growing(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 999_990), zone(tmp_path, "intel-rapl:1", "package-1", 0)
    meter = RaplMeter(tmp_path)
    assert meter.joules() == 0.0
    (first / "energy_uj").write_text("9\n")  # ... 999,991 to 1,000,000, 0 to 9: twenty steps
    (second / "energy_uj").write_text("5\n")
    assert meter.joules() == pytest.approx(25e-6)
    (first / "energy_uj").write_text("10\n")
    assert meter.joules() == pytest.approx(26e-6)


def test_no_counter_and_a_broken_one_are_errors_and_find_none(tmp_path: Path) -> None:
    with pytest.raises(EnergyError, match="no RAPL counter"):
        RaplMeter(tmp_path)
    place = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (place / "energy_uj").write_text("soon")
    with pytest.raises(EnergyError, match="no readable RAPL counter"):
        read_rapl(tmp_path)
    assert find_meter("cpu", tmp_path) is None


def test_a_counter_for_the_administrator_says_how_to_allow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(self: Path, *args: str) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(self, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(EnergyError, match="chmod a\\+r"):
        RaplMeter(tmp_path)


class FakeNvml:
    """pynvml of a GPU that has used 5 mJ for every time it was asked."""

    NVMLError = OSError

    def __init__(self, works: bool = True) -> None:
        self.works, self.mj = works, 1000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 0:
            raise self.NVMLError("invalid argument")
        return 7

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        assert handle == 7
        if not self.works:
            raise self.NVMLError("not supported")
        self.mj += 5
        return self.mj


def test_nvml_counts_millijoules() -> None:
    meter = NvmlMeter(nvml=FakeNvml())
    assert meter.joules() == pytest.approx(1.010)
    assert meter.joules() - meter.joules() == pytest.approx(-0.005)


def test_a_gpu_without_a_counter_is_an_error_and_finds_none() -> None:
    with pytest.raises(EnergyError, match="not supported"):
        NvmlMeter(nvml=FakeNvml(works=False))
    with pytest.raises(EnergyError, match="GPU 3"):
        NvmlMeter(3, nvml=FakeNvml())
    assert find_meter("gpu", nvml=FakeNvml(works=False)) is None
    assert isinstance(find_meter("gpu", nvml=FakeNvml()), NvmlMeter)


class FakeMachine:
    """Ten watts while a call of 50 ms runs, on a clock that only calls move; also a meter."""

    method, watch_s = "RAPL", 1e9

    def __init__(self) -> None:
        self.now, self.used, self.calls = 0.0, 0.0, 0

    def clock(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += 0.05
        self.used += 0.5
        self.calls += 1

    def joules(self) -> float:
        return self.used


def test_a_call_is_measured_by_the_difference_of_the_counter() -> None:
    machine = FakeMachine()
    found = measure_energy(machine.call, machine, seconds=1.0, clock=machine.clock)
    assert found.calls == machine.calls - 1  # one call before the clock starts
    assert (found.mj, found.watts, found.ms) == pytest.approx((500.0, 10.0, 50.0))
    assert found.seconds >= 1.0
    assert found.method == "RAPL"


def test_a_counter_is_looked_at_before_it_can_come_round_twice() -> None:
    machine = FakeMachine()
    looks: list[float] = []

    def joules() -> float:
        looks.append(machine.now)
        return machine.used

    meter = SimpleNamespace(method="RAPL", watch_s=0.2, joules=joules)
    measure_energy(machine.call, meter, seconds=2.0, clock=machine.clock)
    assert max(b - a for a, b in itertools.pairwise(looks)) < 0.4


def test_a_counter_that_stands_still_is_an_error() -> None:
    machine = FakeMachine()
    still = SimpleNamespace(method="NVML", watch_s=1e9, joules=lambda: 3.0)
    with pytest.raises(EnergyError, match="NVML did not move"):
        measure_energy(machine.call, still, seconds=0.1, clock=machine.clock)


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def test_a_calibrated_power_is_kept_in_the_device_file_and_used_from_then_on(
    machine: FakeMachine, tmp_path: Path
) -> None:
    device = calibrate_power(BOARD, machine.call, machine, seconds=1.0, clock=machine.clock)
    save_device(
        dataclasses.replace(device, sources={**device.sources, "cores": "a", "idle_w": "a"}), tmp_path / "x.toml"
    )
    found = energy_of(3.0, load_device(tmp_path / "x.toml"), flops=1.0, bytes=1.0)
    assert found.mj == pytest.approx(30.0)
    assert found.method == "RAPL"
    assert found.hi_mj == pytest.approx(31.5)


def test_without_a_counter_a_device_stays_as_it_is(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_meter", lambda device_class: None)
    assert calibrate_power(BOARD, machine.call) is BOARD
    assert machine.calls == 0
