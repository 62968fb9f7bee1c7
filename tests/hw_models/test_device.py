"""The device and runtime texts: stable within a machine, different where times would differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hw_models import device
from hw_models.device import host_device, runtime_id


def test_the_host_describes_itself() -> None:
    host = host_device()
    assert host.name
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert host.memory_bytes > 0
    assert len(host.fingerprint) == 8


def test_the_runtime_is_the_same_text_in_another_process() -> None:
    code = "from hw_models.device import runtime_id; print(runtime_id(1))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == runtime_id(1)


def test_the_runtime_tells_threads_kernels_and_libraries_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    before = runtime_id(1)
    assert before != runtime_id(2)
    monkeypatch.setattr(device, "KERNELS_VERSION", "other")
    assert before != runtime_id(1)
    monkeypatch.undo()
    monkeypatch.setattr(device, "_version", lambda package: "0")
    assert before != runtime_id(1)


def test_a_machine_without_cpuinfo_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpuinfo", dict)
    host = host_device.__wrapped__()
    assert host.name
    assert host.flags == ()
