"""Laws of the run lock: one holder, named; freed by any death; a file left behind blocks nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nas.errors import RunError
from nas.lock import RunLock

ROOT = Path(__file__).parents[2]


def test_a_second_driver_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunError, match=f"in use by process {os.getpid()} on "):
        RunLock(tmp_path)


def test_a_released_lock_is_free_and_may_be_released_twice(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    lock.release()
    with RunLock(tmp_path):
        pass


def test_runs_do_not_lock_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass


@pytest.mark.parametrize("content", ["", "garbage", '{"pid": 1, "host": "elsewhere"}', "[1]"])
def test_a_stale_file_never_blocks(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    with RunLock(tmp_path):
        pass


def test_kill_9_frees_the_lock(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from nas.lock import RunLock; lock = RunLock({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid} on "):
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(tmp_path):
        pass


def test_a_driver_that_stands_by_takes_over_when_the_holder_ends(tmp_path: Path) -> None:
    told: list[str] = []

    def heard(text: str) -> None:
        told.append(text)
        threading.Timer(0.2, first.release).start()

    first = RunLock(tmp_path)
    with RunLock(tmp_path, standby=True, message=heard), pytest.raises(RunError, match="in use by"):
        RunLock(tmp_path)
    assert told == [
        f"standing by: the run is in use by process {os.getpid()} on {socket.gethostname()}; "
        "this driver takes over when that one ends"
    ]


def test_a_started_program_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        try:
            lock.release()
            RunLock(tmp_path).release()
        finally:
            child.kill()


def test_a_folder_that_cannot_be_locked_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.lock: cannot be made .* must exist and be writable"):
        RunLock(tmp_path / "nowhere")


def test_a_holder_that_has_not_written_its_name_yet_is_still_a_holder(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / "run.lock").write_text("")
        with pytest.raises(RunError, match="in use by another process"):
            RunLock(tmp_path)
