"""The process that starts NNI's manager for `nas.executors.nni`, and ends it when its standard input is closed.

Started by its path, usually alone in namespaces of its own: `python -P nni_manager.py PLACE WORKERS FOLDER`. Not for import by
others.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from pathlib import Path

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
ENDLESS = 1_000_000_000


def loopback_up() -> None:
    """Switch the loopback interface on, which is off in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, name))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))


def main(place: Path, workers: int, folder: Path) -> None:
    """Run an experiment whose trials are processes that ask for jobs at PLACE/door, until standard input ends."""
    alone = os.getpid() == 1  # in namespaces of our own
    life = os.dup(0)  # for us alone: what NNI starts would switch it to another mode
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with suppress(OSError):
        loopback_up()
    trial = Path(__file__).with_name("nni_trial.py")
    command = [sys.executable, "-P", str(trial), str(place / "door")]
    if alone:  # NNI notes every experiment at home, by process numbers that out there are those of others
        command = ["env", f"HOME={Path.home()}", *command]
        os.environ["HOME"] = str(place)
    from nni.experiment import Experiment

    code = place / "code"
    code.mkdir()
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment("local")
    config = experiment.config
    config.experiment_working_directory = str(folder)
    config.trial_command = f"exec {shlex.join(command)}"
    config.trial_code_directory = str(code)
    config.search_space = {"job": {"_type": "randint", "_value": [0, ENDLESS]}}  # the job itself comes from the driver
    config.tuner.name = "Random"
    config.max_trial_number = ENDLESS
    config.trial_concurrency = workers
    try:
        experiment.start(_free_port(), debug=False)
        while os.read(life, 4096):
            pass
        shutil.rmtree(place, ignore_errors=True)  # a driver that was killed has not done so
    except Exception:
        traceback.print_exc()
    finally:
        if alone:  # everything in the namespace ends with its process 1, at once
            os._exit(1)
        with suppress(Exception):
            experiment.stop()
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
