"""The laws of executors, for `nas worker` processes that meet their driver in a real PostgreSQL database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nas.executors import Executor
from tests.conformance.test_executors import TASK, ExecutorLaws
from tests.nas.worker_helpers import WorkerProcess, executor
from tests.postgres_server import PostgresServer


@pytest.fixture(scope="module")
def url(postgres: PostgresServer) -> Iterator[str]:
    found = postgres.new_database()
    processes = [WorkerProcess(found, run) for run in ("pair", "pair", "alone")]
    yield found
    for process in processes:
        process.close()


class TestWorkers(ExecutorLaws):
    """Every test is another driver for the same three workers: two of one run, and one alone."""

    url: str

    @pytest.fixture(autouse=True)
    def _workers(self, url: str) -> None:
        self.url = url

    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        workers = options.get("workers", 2)
        return executor(self.url, "alone" if workers == 1 else "pair", workers, task, setup, most=workers)
