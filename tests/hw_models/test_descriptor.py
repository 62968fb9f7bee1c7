"""Devices: every shipped figure has a source and fits the others, files come back as they were written, errors say what to do."""

import dataclasses
import math
from pathlib import Path

import pytest

from hw_models import host
from hw_models.descriptor import (
    DeviceDescriptor,
    DeviceError,
    host_path,
    list_devices,
    load_device,
    save_device,
)
from hw_models.device import host_device

SHIPPED = [name for name in list_devices() if name != "host"]
GOOD = 'id = "x"\ndevice_class = "cpu"\nname = "X"\n'


def test_the_devices_promised_are_shipped() -> None:
    assert list_devices()[0] == "host"
    assert set(SHIPPED) == {
        *("raspberry-pi-4", "raspberry-pi-5", "pixel-4", "xeon-avx512", "jetson-nano", "jetson-tx2", "h200-sxm"),
        *("jetson-agx-xavier", "jetson-orin-nano", "jetson-orin-nano-super", "jetson-agx-orin"),
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_device_is_from_its_data_sheet_and_says_so_of_every_figure(name: str) -> None:
    device = load_device(name)
    assert device.id == name
    assert not device.measured
    assert math.isnan(device.bandwidth_measured_gbs)
    assert set(device.known) - {"threads", "power_uncertainty"} == set(device.sources)
    assert {"peak_gflops", "bandwidth_gbs", "cores", "clock_max_ghz"} <= set(device.known)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_peak_of_a_shipped_device_is_threads_times_clock_times_flops_per_cycle(name: str) -> None:
    device = load_device(name)
    assert device.peak_gflops == pytest.approx(
        device.threads * device.clock_max_ghz * device.flops_per_cycle, rel=0.005
    )


@pytest.mark.parametrize("name", list_devices())
def test_a_device_written_and_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    save_device(device, tmp_path / "deep" / "x.toml")
    again = load_device(tmp_path / "deep" / "x.toml")
    assert again.known == device.known
    assert again.sources == device.sources
    assert (again.id, again.name, again.note, again.measured) == (device.id, device.name, device.note, device.measured)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.toml"]


def test_an_unknown_device_is_an_error_with_near_names_and_the_way_to_measure() -> None:
    with pytest.raises(DeviceError, match=r"did you mean 'raspberry-pi-[45]'.*h200-sxm.*nas calibrate"):
        load_device("Raspberry_Pi 5x")
    with pytest.raises(DeviceError, match="Known: host"):
        load_device("quux")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id = ", "not TOML"),
        ('id = "x"\nname = "X"\n', "device_class missing"),
        (GOOD.replace("cpu", "tpu"), "must be one of cpu, gpu"),
        (GOOD + "peak_gflop = 3\n", 'did you mean "peak_gflops"'),
        (GOOD + "peak_gflops = 3\n", "has no source"),
        (GOOD + 'peak_gflops = "3"\n', "must be a number"),
        (GOOD + "measured = 1\n", "true or false"),
        (GOOD + "cores = 1.5\n", "whole number"),
        (GOOD + 'peak_gflops = -3\n[sources]\npeak_gflops = "a"\n', "must be positive"),
        (GOOD + 'peak_gflops = inf\n[sources]\npeak_gflops = "a"\n', "must be positive"),
        (GOOD + 'bandwidth_gbs = 0\n[sources]\nbandwidth_gbs = "a"\n', "must be positive"),
        (GOOD + '[sources]\nbandwith_gbs = "a"\n', "table of texts"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_reason(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(DeviceError, match=message):
        load_device(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot read"):
        load_device(str(tmp_path / "none.toml"))


def test_what_a_file_leaves_out_is_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(GOOD)
    device = load_device(tmp_path / "x.toml")
    assert set(device.known) == {"threads", "power_uncertainty"}
    assert math.isnan(device.peak_gflops)


def test_compute_scales_with_threads_and_measurements_do_not_survive() -> None:
    device = dataclasses.replace(load_device("raspberry-pi-5"), bandwidth_measured_gbs=8.0, measured=True)
    one = device.at_threads(1)
    assert one.peak_gflops == pytest.approx(device.peak_gflops / 4)
    assert math.isnan(one.bandwidth_measured_gbs)
    assert not one.measured
    assert device.at_threads(4) is device
    with pytest.raises(DeviceError, match="5 threads"):
        device.at_threads(5)
    with pytest.raises(DeviceError, match="gpu"):
        load_device("h200-sxm").at_threads(1)


def test_the_host_before_it_is_measured_names_what_is_nominal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    device = load_device("host")
    assert not device.measured
    assert "nas calibrate" in device.note
    assert device.sources["bandwidth_gbs"].startswith("nominal")
    assert set(device.known) - {"threads", "power_uncertainty"} == set(device.sources)
    assert device.cores == host_device().cores
    assert load_device("host", threads=2).peak_gflops == pytest.approx(2 * device.peak_gflops, rel=0.2)


def test_the_host_after_it_was_measured_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    roofs: dict[str, float | str] = {"peak_gflops": 123.0, "bandwidth_gbs": 11.0, "call_us": 9.0, "method": "test"}
    save_device(host.with_roofs(load_device("host"), roofs), host_path(1))
    device = load_device("host")
    assert device.measured
    assert (device.peak_gflops, device.bandwidth_measured_gbs, device.call_us) == (123.0, 11.0, 9.0)
    assert math.isnan(device.bandwidth_gbs)
    assert "test" in device.sources["peak_gflops"]
    assert not load_device("host", threads=2).measured


@pytest.mark.parametrize(
    ("name", "architecture", "flags", "flops"),
    [
        ("Intel Xeon", "x86_64", ("avx2", "avx512f", "fma"), 64),
        ("AMD EPYC", "x86_64", ("avx2", "avx512f", "fma"), 32),
        ("Intel Core", "x86_64", ("avx2", "fma"), 32),
        ("Neoverse", "aarch64", ("asimd",), 16),
        ("old", "x86_64", (), 8),
    ],
)
def test_flops_per_cycle_follow_from_the_vector_extension(
    name: str, architecture: str, flags: tuple[str, ...], flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = dataclasses.replace(host_device(), name=name, architecture=architecture, flags=flags)
    monkeypatch.setattr(host, "host_device", lambda: device)
    assert host.describe_host().flops_per_cycle == flops


def test_a_machine_that_tells_nothing_is_still_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CPU", tmp_path)
    device = host.describe_host()
    assert math.isnan(device.l2_kib)
    assert device.clock_max_ghz > 0


def test_the_caches_are_read_by_level_without_those_of_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "Unified", "?")]
    for i, (level, kind, size) in enumerate(rows):
        folder = tmp_path / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "cpuinfo_max_freq").write_text("3100000\n")
    monkeypatch.setattr(host, "CPU", tmp_path)
    device = host.describe_host()
    assert (device.l1_kib, device.l2_kib) == (48, 2048)
    assert math.isnan(device.l3_kib)
    assert device.clock_max_ghz == pytest.approx(3.1)


def test_a_descriptor_is_a_value() -> None:
    first, second = load_device("pixel-4"), load_device("pixel-4")
    assert first == second
    assert len({first, second, DeviceDescriptor("a", "cpu", "A")}) == 2
