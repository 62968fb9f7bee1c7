"""The Tune executor is under the laws of all executors. All tests of this file share one Ray cluster of this machine.

Tune starts a process in seconds, so the laws that leave an executor as good as new share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ray")

from nas.executors import Executor, Placement, make_executor
from nas.executors.ray_cluster import connect, disconnect
from tests.conformance.test_executors import TASK, ExecutorLaws
from tests.ray_environment import restored_environment


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with restored_environment():
        connection = connect("", cpus=8)
        yield
        disconnect(connection)


def make(task: str, setup: dict[str, Any] | None, **options: Any) -> Executor:
    return make_executor("tune", task, setup or {}, Placement(**({"workers": 1} | options)))


@pytest.fixture(scope="module")
def shared(_ray: None) -> Iterator[Executor]:
    with make(f"{TASK}:setup", {"name": "ä", "nested": [1, None, {"x": 2.5}]}, workers=2) as executor:
        yield executor


class TestTune(ExecutorLaws):
    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        return make(task, setup, **options)

    @pytest.fixture
    def executor(self, shared: Executor) -> Executor:
        return shared
