"""One driver per run: a lock on the run's folder that the operating system frees when its holder dies, however it dies.

Does not guard readers, nor two machines on a network drive without working `flock`, nor runs on a server (`nas.lease` does). Start
with `RunLock`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from nas.errors import RunError

LOCK_NAME = "run.lock"
PAUSE_S = 0.5
"""Between two tries of a driver that stands by."""


class RunLock:
    """Holds `run.lock` in a run folder from construction until `release` (or the end of a `with` block).

    The lock is `flock`'s, not the file's existence: a file left behind by a killed driver blocks nobody. The file holds
    the process id and host of the holder as JSON, only to name them in messages.

    Args:
        folder: the run folder; it must exist.
        standby: wait until the holder ends, however it ends.
        message: is told whom we wait for.

    Raises:
        RunError: another process (named) holds it, or the folder cannot be locked.
    """

    def __init__(
        self, folder: str | Path, *, standby: bool = False, message: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path = Path(folder) / LOCK_NAME
        try:
            self._file: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be made ({error.strerror}). The run folder must exist and be writable"
            ) from error
        told = ""
        try:
            while not self._try():
                holder = self._holder()
                if not standby:
                    raise RunError(
                        f"{self.path.parent}: the run is in use by {holder}. Wait for it or end it, or give --standby to take "
                        "over when it ends; looking at results needs no lock"
                    )
                if holder != told:
                    told = holder
                    message(f"standing by: the run is in use by {holder}; this driver takes over when that one ends")
                time.sleep(PAUSE_S)
        except BaseException:
            self._close()
            raise

    def release(self) -> None:
        """Let others have the run. Twice is fine. The file stays: removing it would race with the next holder."""
        if self._file is not None:
            self._write("")
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, text: str) -> None:
        assert self._file is not None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)  # frees the lock
            self._file = None

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return False
            raise RunError(
                f"{self.path}: the run folder cannot be locked ({error.strerror}). Put it on a local disk with space left"
            ) from error
        return True

    def _holder(self) -> str:
        assert self._file is not None
        try:
            holder = json.loads(os.pread(self._file, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # between its lock and its first write
            return "another process"
