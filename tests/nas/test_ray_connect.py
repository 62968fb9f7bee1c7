"""Connecting to a Ray cluster: what goes wrong is one clear line, in seconds."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("ray")

import ray

from nas.errors import ConfigError
from nas.executors.ray_cluster import code_that_travels, connect, modules_named
from search_spaces import get_space


@pytest.fixture(autouse=True)
def _not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_an_address_where_nobody_is_fails_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no Ray cluster answers there \(Connection refused\); check host and port"):
        connect(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head", "head:port", "http://head:8265"])
def test_an_address_that_is_none_is_refused_with_what_one_looks_like(address: str) -> None:
    with pytest.raises(ConfigError, match=r'expected "auto", HOST:PORT such as "head:6379"'):
        connect(address)


def unauthenticated() -> Exception:
    error = ConnectionError("Failed to connect to Ray cluster")
    error.__cause__ = RuntimeError("Last connection error: Unauthenticated: InvalidAuthToken")
    return error


@pytest.mark.parametrize(
    ("raised", "found"),
    [
        (unauthenticated(), "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.50.0"),
            r"install them here .*2\.50\.0",
        ),
        (ConnectionError("Failed to connect"), "what answers there is no Ray cluster"),
        (ValueError("Ray Client requires pip package `ray[client]`"), r"ray\[client\]"),
    ],
)
def test_what_ray_raises_becomes_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, found: str
) -> None:
    def init(**_: Any) -> NoReturn:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(ConfigError, match=found) as caught:
            connect(f"127.0.0.1:{server.getsockname()[1]}")
    assert "\n" not in str(caught.value)


def test_code_that_is_not_installed_travels_and_nothing_else() -> None:
    names = [
        path.rpartition("/")[2] for path in code_that_travels(["tests.nas.x", "torch.nn", "json", "nothing.there"])
    ]
    assert names == ["nas", "ops", "search_spaces", "hw_models", "tests"]


def test_the_module_of_a_space_travels_with_that_of_the_task() -> None:
    assert modules_named("a.b:c", {"config": '{"space": {"name": "my.space:fn"}}'}) == ["a.b", "my.space"]
    assert modules_named("a.b:c", {"config": '{"space": {"name": "my.py:fn"}}'}) == ["a.b"]
    assert modules_named("a.b:c", {}) == ["a.b"]


def test_what_a_space_imports_from_its_folder_travels_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in {
        "sub/wide_space.py": "import wide_helper, wide_package\ndef small(c): return wide_helper.WIDTHS",
        "sub/wide_helper.py": "WIDTHS = [1]",
        "wide_package/__init__.py": "",
        "never_imported.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    get_space("sub/wide_space.py:small", folder=tmp_path)
    setup = {
        "config": json.dumps({"space": {"name": "sub/wide_space.py:small"}}),
        "space_folder": str(tmp_path),
    }
    assert sorted(modules_named("nas.evaluate:setup", setup)) == ["nas.evaluate", "wide_helper", "wide_package"]
    paths = code_that_travels(modules_named("nas.evaluate:setup", setup))
    assert set(paths[-2:]) == {str(tmp_path / "sub" / "wide_helper.py"), str(tmp_path / "wide_package")}
    setup["config"] = json.dumps({"space": {"name": "mlp"}})
    assert modules_named("nas.evaluate:setup", setup) == ["nas.evaluate"]


@pytest.mark.parametrize(("option", "needs"), [("cpus_per_trial", {"job_cpus": 64}), ("gpus_per_trial", {"gpus": 0.5})])
def test_a_trial_that_this_machine_has_no_room_for_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, option: str, needs: dict[str, float]
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(ConfigError, match=rf"{option}: expected at most the \d .PUs of this machine, got"):
        connect("", **needs)
    assert ended
    assert connect("", job_cpus=2).local
