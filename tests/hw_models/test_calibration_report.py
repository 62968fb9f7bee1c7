"""The closing summary says what was measured, what to expect, and what is wrong."""

import math
from dataclasses import replace
from pathlib import Path

from hw_models.calibration_report import CalibrationReport
from hw_models.descriptor import DeviceDescriptor
from hw_models.store import Epoch

DEVICE = DeviceDescriptor("host", "cpu", "a machine", peak_gflops=100.0, bandwidth_measured_gbs=20.0)
EPOCH = Epoch(1, False, {}, "u", "r", "now", {"load_1min": 0.2, "cores": 2}, {})
REPORT = CalibrationReport(
    runtime="r",
    device=DEVICE,
    seconds=61.0,
    measured=40,
    networks=90,
    steps=1234,
    left_out={"learned": {"n": 120, "within_5": 61.0, "within_10": 84.0, "rmspe": 7.5}},
    noise={"n": 5.0, "hit5": 0.98, "hit10": 1.0},
    epoch=EPOCH,
    failed=(),
    folder=Path("models"),
    device_file=Path("host.toml"),
    store=Path("m.sqlite"),
)


def test_it_says_what_was_done_and_what_to_expect() -> None:
    text = str(REPORT)
    for part in (
        "61 s",
        "100 GFLOP/s",
        "20.0 GB/s on 1 thread\n",
        "40 networks",
        "90 networks",
        "1,234",
        "84.0 %",
        "n = 120",
    ):
        assert part in text
    assert "98% within 5 %" in text
    assert "busy" not in text
    assert "epoch" not in text


def test_too_few_networks_promise_nothing() -> None:
    assert "too few networks" in str(replace(REPORT, left_out={}, noise={}))


def test_a_busy_machine_is_told() -> None:
    assert "load average 3.0 on 2 cores" in str(
        replace(REPORT, epoch=replace(EPOCH, environment={"load_1min": 3.0, "cores": 2}))
    )
    assert "busy" not in str(replace(REPORT, epoch=replace(EPOCH, environment={"load_1min": None})))


def test_a_machine_that_changed_is_told() -> None:
    changed = replace(EPOCH, is_new=True, moved={"dense": 0.08, "new": math.nan})
    assert "dense +8.0%" in str(replace(REPORT, epoch=changed))


def test_failures_and_a_store_in_memory_are_told() -> None:
    text = str(replace(REPORT, failed=("bad: why", "worse: why"), store=None))
    assert "2 networks could not be measured; the first: bad: why" in text
    assert "could not be kept on disk" in text
