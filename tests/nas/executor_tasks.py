"""Tasks that the executor tests run in worker processes. Importing this must stay cheap: every worker does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def setup(options: dict[str, Any]) -> Callable[[dict[str, Any], Report], dict[str, Any]]:
    """What `payload["do"]` names is done; setup counts are visible through "calls"."""
    calls = [0]

    def evaluate(payload: dict[str, Any], report: Report) -> dict[str, Any]:
        calls[0] += 1
        do = payload.get("do", "echo")
        if do == "echo":
            return {"payload": payload, "options": options}
        if do == "facts":
            return {"pid": os.getpid(), "calls": calls[0], "argv": sys.argv, "env": dict(os.environ), "path": sys.path}
        if do == "return":
            return {"value": payload["value"]}
        if do == "report":
            for step in range(payload["steps"]):
                report({"step": step, "loss": float("nan")})
            return {"steps": payload["steps"]}
        if do == "report then sleep":
            report({"pid": os.getpid()})
            time.sleep(payload["seconds"])
            return {}
        if do == "sleep":
            time.sleep(payload["seconds"])
            return {"slept": payload["seconds"]}
        if do == "spin":  # never lets another thread of the interpreter run
            sys.setswitchinterval(1000)
            Path(payload["file"]).write_text(str(os.getpid()))
            while True:
                pass
        if do == "signal":
            os.kill(os.getpid(), payload["signal"])
            time.sleep(0.5)
            return {"survived": payload["signal"]}
        if do == "exit":
            os._exit(payload["code"])
        if do == "print":
            print("x" * payload["size"])
            os.write(1, b"raw\n")
            sys.stderr.write("err\n")
            return {}
        if do == "child":
            child = subprocess.Popen(["sleep", "60"])
            report({"child": child.pid})
            time.sleep(60)
        if do == "fork":  # a child that holds every open descriptor
            child_pid = os.fork()
            if child_pid == 0:
                time.sleep(60)
                os._exit(0)
            report({"child": child_pid})
            time.sleep(60)
        return misbehave(do, payload, report)

    return evaluate


def misbehave(do: str, payload: dict[str, Any], report: Report) -> Any:
    if do == "raise":
        raise ValueError(payload.get("text", "bad luck"))
    if do == "unprintable":
        raise Unprintable
    if do == "memory":
        raise MemoryError
    if do == "system exit":
        raise SystemExit(3)
    if do == "base exception":
        raise BaseException("very base")
    if do == "recurse":
        return misbehave(do, payload, report)
    if do == "object":
        return {"a": {"b": [1, object()]}}
    if do == "bytes key":
        return {"a": {b"k": 1}}
    if do == "cycle":
        value: dict[str, Any] = {}
        value["self"] = value
        return value
    if do == "list":
        return [1, 2]
    if do == "none":
        return None
    if do == "bad report":
        report({"tensor": object()})
    if do == "cuda error":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if do == "late report":
        threading.Timer(0.1, report, [{"from": payload["name"]}]).start()
        return {}
    raise AssertionError(do)


def setup_raises(options: dict[str, Any]) -> Any:
    raise ValueError("no such thing as " + options.get("thing", "luck"))


def setup_raises_ours(options: dict[str, Any]) -> Any:
    from nas.errors import DataError

    raise DataError("digits.csv: expected 64 columns, found 63")


def setup_dies(options: dict[str, Any]) -> Any:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def setup_dies_once(options: dict[str, Any]) -> Any:
    marker = Path(options["marker"])
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return setup(options)


def setup_exits(options: dict[str, Any]) -> Any:
    raise SystemExit("config missing")


def setup_returns_nothing(options: dict[str, Any]) -> Any:
    return None


not_a_function = 3
