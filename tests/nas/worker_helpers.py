"""`nas worker` processes for tests, and executors that wait for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.executors import Placement
from nas.executors import work_queue as queue
from nas.executors.work_queue import Member
from nas.executors.workers import WorkersExecutor
from nas.server import server_engine

ROOT = Path(__file__).resolve().parents[2]
TASK = "tests.nas.executor_tasks:setup"


class WorkerProcess:
    """A `nas worker`, in a process group of its own."""

    def __init__(self, url: str, run: str, *more: str, **environment: str) -> None:
        handle, name = tempfile.mkstemp(prefix="worker-")
        self._log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nas.cli", "worker", run, *more],
            cwd=ROOT,
            env=os.environ | {"NAS_STORAGE": url} | environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
        )
        os.close(handle)
        self.pid = self.process.pid

    def said(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """kill -9 of the whole group."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.unlink()


def members(url: str, run: str) -> list[Member]:
    """The workers that are there."""
    engine = server_engine(url, run)
    try:
        with engine.begin() as connection:
            return queue.members(connection, 60.0) if queue.exists(connection) else []
    finally:
        engine.dispose()


def until(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for something to be true, and return it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def executor(
    url: str,
    run: str,
    workers: int,
    task: str = TASK,
    setup: Mapping[str, Any] | None = None,
    *,
    most: int = 0,
    lease_s: float = 20.0,
    timeout_s: float | None = None,
    folder: Path | None = None,
    setup_needs: tuple[str, ...] = (),
    message: Callable[[str], None] = lambda text: None,
) -> WorkersExecutor:
    """An executor, once so many workers have set its task up."""
    placement = Placement(
        workers=most,
        timeout_s=timeout_s,
        folder=folder,
        setup_needs=setup_needs,
        storage=url,
        run=run,
        message=message,
    )
    made = WorkersExecutor(task, setup or {}, placement, lease_s=lease_s)
    try:
        until(lambda: _set_up(members(url, run), made.generation) >= workers)
        until(lambda: made.poll() or sum(member.state == "ready" for member in made.members) >= workers)
    except BaseException:
        made.close()
        raise
    return made


def _set_up(found: list[Member], generation: int) -> int:
    return sum(member.generation == generation and member.state != "starting" for member in found)
