"""Connecting to a Ray cluster: what goes wrong is one clear line, in seconds."""

from __future__ import annotations

import socket
import time
from typing import Any, NoReturn

import pytest

pytest.importorskip("ray")

import ray

from nas.errors import ConfigError
from nas.executors.ray_cluster import code_that_travels, connect, modules_named


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


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head", "head:port"])
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
