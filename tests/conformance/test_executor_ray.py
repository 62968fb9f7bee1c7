"""The Ray executor is under the laws of all executors. All tests of this file share one Ray cluster of this machine."""

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
        connection = connect("", cpus=2)
        yield
        disconnect(connection)


class TestRay(ExecutorLaws):
    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        return make_executor("ray", task, setup or {}, Placement(**({"workers": 2} | options)))
