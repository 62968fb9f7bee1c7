"""What NNI starts per trial: asks the driver for one job, runs it, answers, and tells NNI a number.

The logs that NNI keeps of it stay only where it dies: ten thousand trials would leave forty thousand files and folders.
Started by its path, `python -P nni_trial.py SOCKET`; speaks the messages of `nas.executors.worker`. Ends at once when the driver
has closed the socket. Not for import by others.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from typing import Any


def main(door: str) -> None:
    """One job."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(door)
    except OSError:
        return  # the driver is gone
    inbox = bytearray()
    order = _receive(connection, inbox)
    sys.path[:] = order["sys_path"]
    import nni

    from nas.executors.base import encode
    from nas.executors.task import describe, load_task, run_job
    from nas.executors.worker import frame

    lock = threading.Lock()

    def send(body: bytes) -> None:
        with lock:
            connection.sendall(frame(body))

    nni.get_next_parameter()
    try:
        evaluate = load_task(order["task"], order["setup"])
    except BaseException as error:
        send(json.dumps({"kind": "broken", "failure": describe(error)}).encode())
        return
    send(b'{"kind": "ready"}')
    payload = _receive(connection, inbox)["payload"]
    send(b'{"kind": "begun"}')
    threading.Thread(target=_watch, args=(connection,), daemon=True).start()
    running = [True]

    def report(info: dict[str, Any]) -> None:
        body = encode(info, "a report")
        if running:
            send(b'{"kind": "progress", "payload": ' + body + b"}")

    result, failure = run_job(evaluate, payload, report)
    running.clear()
    nni.report_final_result(_number(result))
    if result is not None:
        send(b'{"kind": "done", "payload": ' + result + b"}")
    else:
        send(json.dumps({"kind": "failed", "failure": failure}).encode())
    _forget_logs()


def _receive(connection: socket.socket, inbox: bytearray) -> dict[str, Any]:
    """The next message; the process ends if there will be none."""
    while True:
        if len(inbox) >= 4:
            end = 4 + int.from_bytes(inbox[:4], "big")
            if len(inbox) >= end:
                message: dict[str, Any] = json.loads(inbox[4:end])
                del inbox[:end]
                return message
        data = connection.recv(1 << 20)
        if not data:
            _forget_logs()
            os._exit(0)
        inbox += data


def _forget_logs() -> None:
    folder = os.environ.get("NNI_OUTPUT_DIR", "")
    if folder and os.path.basename(folder) == os.environ.get("NNI_TRIAL_JOB_ID"):
        shutil.rmtree(folder, ignore_errors=True)


def _watch(connection: socket.socket) -> None:
    """End with the driver: it sends nothing after the job, so whatever comes is the end."""
    try:
        connection.recv(1)
    finally:
        os._exit(113)


def _number(result: bytes | None) -> float:
    """What NNI lists: the first finite metric of a result, else 0."""
    metrics = json.loads(result).get("metrics", {}) if result is not None else {}
    value = metrics.get("val_accuracy") if isinstance(metrics, dict) else None
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else 0.0


if __name__ == "__main__":
    main(sys.argv[1])
