"""A trial process of NNI as the driver sees it: a local socket, what was sent to it, and how to end it. Start with `Peer`."""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import suppress
from typing import Any

from nas.executors.base import Job
from nas.executors.worker import frame, take_messages

_READ_BYTES = 1 << 20


class Peer:
    """The driver's end of a connection that a trial process has made.

    Attributes:
        pid: of the process, as this process sees it.
        ready: its task is set up.
        used: it has been given its one job.
        job: what it runs.
        begun: it has said so.
        started, deadline: seconds, monotonic.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", credentials)[0]
        self.ready = self.used = self.begun = False
        self.job: Job | None = None
        self.message = b""
        self.started = 0.0
        self.deadline: float | None = None
        self._inbox = bytearray()
        connection.setblocking(False)

    def send(self, body: bytes) -> None:
        """Send a message; to a dead process nothing happens, `receive` tells."""
        with suppress(OSError):
            self.connection.settimeout(30.0)
            self.connection.sendall(frame(body))
        with suppress(OSError):
            self.connection.setblocking(False)

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have come, and whether the process has closed its end."""
        ended = False
        while True:
            try:
                data = self.connection.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                ended = True
                break
            self._inbox += data
        return take_messages(self._inbox), ended

    def close(self, *, kill: bool) -> None:
        """Close the connection; a process that waits for a job then ends by itself."""
        if kill and self.pid > 0:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)
        with suppress(OSError):
            self.connection.close()
