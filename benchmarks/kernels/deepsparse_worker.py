"""DeepSparse in a process and an environment of its own; `deepsparse.Worker` talks to it over a pipe.

Needs deepsparse, numpy and `benchmarks.kernels.clock`. One JSON object per line on standard input, one per line back:

    {"do": "load", "path": "net.onnx", "input": "x.npy", "threads": 1} -> {"id": 0}
    {"do": "output", "id": 0, "path": "y.npy"}                         -> {}
    {"do": "burst", "id": 0, "settings": {...}}                        -> {"seconds": 1.2e-5}
    {"do": "close", "id": 0}                                           -> {}

A failure is {"error": "..."}. The end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import numpy as np
from deepsparse import Engine

from benchmarks.kernels.clock import InProcess, Settings


def main() -> None:
    # The engine prints a banner: what it writes goes to standard error, the pipe keeps a descriptor of its own.
    pipe: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: dict[int, tuple[Any, Any]] = {}
    print(json.dumps({"ready": os.getpid()}), file=pipe, flush=True)
    for number, line in enumerate(sys.stdin):
        try:
            answer = _answer(json.loads(line), loaded, number)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=pipe, flush=True)


def _answer(request: dict[str, Any], loaded: dict[int, tuple[Any, Any]], number: int) -> dict[str, Any]:
    match request["do"]:
        case "load":
            inputs = [np.load(request["input"])]
            engine = Engine(request["path"], batch_size=inputs[0].shape[0], num_cores=request["threads"])
            loaded[number] = engine, InProcess(lambda: engine.run(inputs, val_inp=False))
            return {"id": number}
        case "output":
            np.save(request["path"], np.asarray(loaded[request["id"]][1].call()[0]))
            return {}
        case "burst":
            return {"seconds": loaded[request["id"]][1].burst(Settings(**request["settings"]))}
        case "close":
            del loaded[request["id"]]
            return {}
    raise ValueError(f"unknown request {request}")


if __name__ == "__main__":
    main()
