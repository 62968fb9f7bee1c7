"""One worker process as the driver sees it: start, send, receive, tell how it died, kill.

Knows no jobs and no rules; `nas.executors.local` does. Start with `WorkerProcess`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nas.executors import worker as worker_program
from nas.executors.worker import frame, take_messages

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_TAIL_BYTES = 4000
_READ_BYTES = 1 << 20


def thread_environment(threads: int | None) -> dict[str, str]:
    """This process's environment with the thread counts of numeric libraries set (they are read when those are imported)."""
    limits = {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))
    return dict(os.environ) | limits


class WorkerProcess:
    """A running worker, its two pipes and what it prints. Reading and writing never block.

    Args:
        environment: its environment variables.
        first_message: encoded; what it is to set up.
    """

    def __init__(self, environment: Mapping[str, str], first_message: bytes) -> None:
        self._output = _nameless_file()
        theirs_read, self.write_end = os.pipe()
        self.read_end, theirs_write = os.pipe()
        self._inbox = bytearray()
        self._outbox = bytearray()
        # The kernel ties the worker to the *thread* that starts it, so only a thread that lasts may ask for that.
        die = threading.current_thread() is threading.main_thread()
        arguments = [theirs_read, theirs_write, os.getpid(), int(die)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(worker_program.__file__)), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs_read, theirs_write),
                env=dict(environment),
                start_new_session=True,  # a group of its own: no Ctrl-C from the terminal, and all of it can be killed
            )
        except BaseException:
            for pipe in (self.write_end, self.read_end, self._output):
                os.close(pipe)
            raise
        finally:
            os.close(theirs_read)
            os.close(theirs_write)
        os.set_blocking(self.read_end, False)
        os.set_blocking(self.write_end, False)
        self.death_watch = _pidfd(self.pid)
        self._obituary: str | None = None
        self.send(first_message)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def buried(self) -> bool:
        return self._obituary is not None

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` must be called again when the write end takes more."""
        return bool(self._outbox)

    def send(self, *bodies: bytes) -> None:
        """Queue messages and send what the pipe takes now."""
        for body in bodies:
            self._outbox += frame(body)
        self.flush()

    def flush(self) -> None:
        """Send what the pipe takes now. To a dead process: nothing happens; `receive` tells."""
        while self._outbox and self._obituary is None:
            try:
                sent = os.write(self.write_end, memoryview(self._outbox)[:_READ_BYTES])
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._outbox.clear()
                return
            del self._outbox[:sent]

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether the process has closed its end (it is dead or as good as)."""
        ended = False
        while True:
            try:
                data = os.read(self.read_end, _READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._inbox += data
        return take_messages(self._inbox), ended

    def forget_output(self) -> None:
        """Empty the file of what it has printed, so that a chatty job fills no disk and the tail belongs to the next job."""
        with suppress(OSError):
            os.ftruncate(self._output, 0)

    def kill(self) -> None:
        """Kill it and every process of its group, now. Once it is buried: nothing."""
        if self._obituary is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()

    def bury(self, patience_s: float = 1.0) -> str:
        """Wait for it to end (killing it after `patience_s`), free everything, and say how it died, in words."""
        if self._obituary is not None:
            return self._obituary
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # processes it has started may be left
        tail = self._tail()
        for pipe in (self.read_end, self.write_end, self._output, self.death_watch):
            if pipe is not None:
                with suppress(OSError):
                    os.close(pipe)
        self._obituary = f"its process ({self.pid}) {_death(code)}" + (f"; its last output:\n{tail}" if tail else "")
        return self._obituary

    def _tail(self) -> str:
        try:
            size = os.fstat(self._output).st_size
            data = os.pread(self._output, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        except OSError:
            return ""
        return data.decode("utf-8", "replace").strip()


def bury_all(workers: Sequence[WorkerProcess]) -> None:
    """Kill and free what is still there; for the end of the interpreter when nobody called `close`."""
    for process in workers:
        process.kill()
    for process in workers:
        process.bury()


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = " (often because memory ran out: use fewer workers or smaller batches)" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code}, {name}{hint}"


def _nameless_file() -> int:
    """A temporary file that is gone when closed; what is written to it is appended."""
    file, path = tempfile.mkstemp(prefix="nas-worker-")
    os.unlink(path)
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def _pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when the process dies, even if its children keep the pipes open. Linux only."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
