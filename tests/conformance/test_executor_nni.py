"""The laws of executors, kept by NNI trials. A process per job takes seconds: all laws run only where NAS_NNI_TESTS is set."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nas.errors import ConfigError
from nas.executors import Executor, Job, Placement, make_executor
from tests.conformance import test_executors
from tests.conformance.test_executors import TASK, ExecutorLaws, collect

WHY_NOT = "" if importlib.util.find_spec("nni") else "nni is not installed: pip install 'sparse-nas[nni]'"
if not WHY_NOT:
    from nas.executors.nni import NniExecutor, _can_be_alone

    if not _can_be_alone():
        WHY_NOT = "network namespaces are not allowed here, and NNI's manager must not listen in the open"
SLOW = "" if os.environ.get("NAS_NNI_TESTS") else "set NAS_NNI_TESTS=1 to run all laws on NNI (minutes)"


@pytest.mark.skipif(bool(WHY_NOT or SLOW), reason=WHY_NOT or SLOW)
class TestNni(ExecutorLaws):
    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        return NniExecutor(task, setup, **({"workers": 2} | options))

    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NNI starts its manager and every trial as a process that imports for seconds."""
        monkeypatch.setattr(test_executors, "PATIENCE_S", 180.0)

    def test_the_task_is_set_up_once_and_then_serves_many_jobs(self) -> None:
        pytest.skip("NNI starts a process per trial")


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.slow
def test_jobs_run_fail_and_die_as_trials_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with NniExecutor(f"{TASK}:setup", {"name": "x"}, workers=2, folder=tmp_path / "it's nni") as executor:
        executor.submit(Job(0, 1, {"do": "report", "steps": 3}))
        executor.submit(Job(1, 1, {"do": "exit", "code": 3}))
        events = collect(executor, 2, seconds=180)
        assert [e.payload.get("step") for e in events if e.kind == "progress"] == [0, 1, 2]
        ends = {e.trial: e for e in events if e.kind != "progress"}
        assert (ends[0].kind, ends[0].payload) == ("done", {"steps": 3})
        assert ends[1].kind == "lost"
        executor.submit(Job(2, 1, {"do": "raise"}))
        assert collect(executor, 1, seconds=180)[0].payload["type"] == "builtins.ValueError"
        pid, place = executor._manager.pid, executor._place
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not os.path.exists(f"/proc/{pid}")
    assert not place.exists()
    assert not (tmp_path / "home").exists(), "NNI notes its experiments at home"
    kept = list((tmp_path / "it's nni").glob("[!_]*/environments/local-env/trials/*/trial.log"))
    assert 1 <= len(kept) <= 3, "of the trial that died, and of some without a job when all was killed"


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_the_manager_is_refused_where_it_would_listen_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.executors.nni._can_be_alone", lambda: False)
    with pytest.raises(ConfigError, match=r"listens on every network interface .* NAS_NNI_OPEN=1"):
        make_executor("nni", f"{TASK}:setup", {}, Placement())


def test_a_missing_nni_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "nas.executors.nni", raising=False)
    with pytest.raises(
        ConfigError, match=r"package nni is not installed; install it with pip install 'sparse-nas\[nni\]'"
    ):
        make_executor("nni", f"{TASK}:setup", {}, Placement())
