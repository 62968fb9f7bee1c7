"""The state of the machine: read from where the kernel says it, None where it says nothing."""

import json
from pathlib import Path

import pytest

from hw_models.environment import StealMeter, describe


def machine(root: Path, stat: str = "", load: str = "", **cpufreq: str) -> Path:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "proc").mkdir(exist_ok=True)
    for name, text in cpufreq.items():
        (folder / name).write_text(f"{text}\n")
    if stat:
        (root / "proc/stat").write_text(stat)
    if load:
        (root / "proc/loadavg").write_text(load)
    return root


def test_the_state_of_this_machine_can_be_told_in_json() -> None:
    state = describe(StealMeter())
    assert json.loads(json.dumps(state)) == state
    assert state["cores"] >= 1
    assert state["python"].startswith("3.")
    assert state["torch_threads"] == 1


def test_what_the_kernel_says_is_read_with_its_units(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        stat="cpu  10 0 20 60 0 0 0 10 0 0\ncpu0 1 1 1 1 1 1 1 1\n",
        load="0.50 0.40 0.30 1/100 1234\n",
        scaling_governor="performance",
        cpuinfo_min_freq="1200000",
        cpuinfo_max_freq="3500000",
        scaling_cur_freq="2400000",
    )
    state = describe(root=root)
    assert state["governor"] == "performance"
    assert (state["clock_min_ghz"], state["clock_max_ghz"], state["clock_ghz"]) == (1.2, 3.5, 2.4)
    assert (state["load_1min"], state["load_5min"], state["load_15min"]) == (0.5, 0.4, 0.3)
    assert state["steal_share"] == 0.1


def test_a_clock_without_cpufreq_is_that_of_cpuinfo(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2100.000\n\nprocessor\t: 1\ncpu MHz\t\t: 900.0\n")
    assert describe(root=root)["clock_ghz"] == 2.1


def test_a_meter_counts_from_when_it_was_made(tmp_path: Path) -> None:
    machine(tmp_path, stat="cpu  100 0 0 0 0 0 0 100 0 0\n")
    meter = StealMeter(tmp_path)
    assert meter.share() is None  # no time has passed
    machine(tmp_path, stat="cpu  130 0 0 40 0 0 0 130 7 7\n")
    assert meter.share() == pytest.approx(0.3)
    assert describe(meter, tmp_path)["steal_share"] == pytest.approx(0.3)


@pytest.mark.parametrize("stat", ["", "cpu 1 2 3\n", "cpu a b c d e f g h\n", "nonsense"])
def test_what_a_machine_does_not_tell_is_none(stat: str, tmp_path: Path) -> None:
    root = machine(tmp_path, stat=stat, load="nonsense", scaling_governor="", cpuinfo_min_freq="fast")
    state = describe(root=root)
    unknown = ("governor", "clock_min_ghz", "clock_max_ghz", "clock_ghz", "load_1min", "load_15min", "steal_share")
    assert {state[name] for name in unknown} == {None}
    assert StealMeter(root).share() is None
    assert describe(StealMeter(root), tmp_path / "nowhere")["steal_share"] is None
