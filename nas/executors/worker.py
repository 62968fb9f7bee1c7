"""The process that runs jobs for `nas.executors.local`, and the messages both sides speak.

Started by its path, `python -P worker.py READ WRITE PARENT DIE`, so that neither the caller's `__main__` nor the current folder
is ever imported. Messages are JSON behind a length of 4 bytes, over two pipes of their own: whatever user code prints goes to
standard output, which is a file by then. Nothing but the standard library is imported before the caller's module path is known.

    to the worker      {"sys_path", "task", "setup"} once, then {"payload"} per job, {"exit"} at the end
    from the worker    {"kind": "ready"} or {"kind": "broken", failure} once; per job {"kind": "begun"},
                       {"kind": "progress", "payload"} and at last {"kind": "done", "payload"} or
                       {"kind": "failed", "failure", "leaving"}

Not for import by others than `nas.executors.process`. Start with `main`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_ORPHANED = 113
"""Exit code of a worker whose driver is gone; nobody is left to read it but `ps` and logs."""


def frame(body: bytes) -> bytes:
    """A message as it goes over the pipe."""
    return len(body).to_bytes(4, "big") + body


def take_messages(inbox: bytearray) -> list[dict[str, Any]]:
    """Remove the complete messages from the front of `inbox`, and return them."""
    found = []
    begin = 0
    while len(inbox) - begin >= 4:
        end = begin + 4 + int.from_bytes(inbox[begin : begin + 4], "big")
        if len(inbox) < end:
            break
        found.append(json.loads(inbox[begin + 4 : end]))
        begin = end
    del inbox[:begin]
    return found


class _Driver:
    """The worker's side of the pipes."""

    def __init__(self, read: int, write: int) -> None:
        self._read = read
        self._write = write
        self._lock = threading.Lock()  # a job may report from several threads
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for pipe in (read, write):
            os.set_inheritable(pipe, False)
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def send(self, body: bytes) -> None:
        rest = memoryview(frame(body))
        try:
            with self._lock:
                while rest:
                    rest = rest[os.write(self._write, rest) :]
        except OSError:
            _leave()

    def _listen(self) -> None:
        """Ends the process as soon as the driver's end of the pipe is closed: by `close`, or by its death."""
        inbox = bytearray()
        while True:
            try:
                data = os.read(self._read, 1 << 20)
            except OSError:
                data = b""
            if not data:
                _leave()
            inbox += data
            for message in take_messages(inbox):
                self.messages.put(message)


def _leave() -> NoReturn:
    """End at once, with the processes that jobs have started (this process leads its own group)."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(_ORPHANED)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even while a job holds the interpreter lock. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that call
        _leave()


def _offer_itself_to_the_memory_killer() -> None:
    """Where memory runs out, lose a worker (its trial is run again) and never the driver. Linux only."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def main(read: int, write: int, parent: int, die: bool) -> None:
    """Set the task up once, then run one job at a time until told to exit.

    Args:
        read: pipe of messages from the driver.
        write: pipe of messages to it.
        parent: the driver's process id.
        die: whether the kernel may tie this process to the thread that started it (the driver's main thread).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to decide about
    faulthandler.enable()
    _offer_itself_to_the_memory_killer()
    if die:
        _die_with(parent)
    driver = _Driver(read, write)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    order = driver.messages.get()
    sys.path[:] = order["sys_path"]
    from nas.executors.base import Evaluate, encode
    from nas.executors.task import describe, free_device_memory, load_task, poisoned, run_job

    evaluate: Evaluate
    try:
        evaluate = load_task(order["task"], order["setup"])
    except BaseException as error:
        driver.send(json.dumps({"kind": "broken", "failure": describe(error)}).encode())
        return
    driver.send(b'{"kind": "ready"}')

    while "exit" not in (message := driver.messages.get()):
        driver.send(b'{"kind": "begun"}')
        running = [True]

        def report(info: dict[str, Any], running: list[bool] = running) -> None:
            body = encode(info, "a report")
            if running:  # a thread that a job left behind has nothing more to say
                driver.send(b'{"kind": "progress", "payload": ' + body + b"}")

        result, failure = run_job(evaluate, message["payload"], report)
        running.clear()
        if result is not None:
            driver.send(b'{"kind": "done", "payload": ' + result + b"}")
            continue
        leaving = poisoned(failure)
        driver.send(json.dumps({"kind": "failed", "failure": failure, "leaving": leaving}).encode())
        if leaving:
            return
        free_device_memory()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
