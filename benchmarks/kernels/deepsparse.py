"""DeepSparse 1.8.0, the discontinued sparse engine, in a virtual environment of its own and driven over a pipe.

Its pins (numpy < 2, onnx 1.14) do not go together with ours; 1.9.0 is a stub. `install` makes the environment, once, by default
in the user's cache folder. The worker times itself; telemetry is switched off and the network closed to it by a dead proxy.

Start with `Worker(folder).load(network, x, threads)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.kernels.clock import Settings
from benchmarks.kernels.engines import Loaded, Unsupported, onnx_model
from hw_models.tables import cache_folder

__all__ = ["VERSION", "Worker", "default_folder", "install", "missing"]

VERSION = "1.8.0"
REQUIREMENTS = (f"deepsparse=={VERSION}", "numpy<2", "onnx==1.14.1")
QUIET = {
    "NM_DISABLE_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
ROOT = Path(__file__).resolve().parents[2]


def default_folder() -> Path:
    """Where `install` puts the environment unless told otherwise."""
    return cache_folder() / f"deepsparse-{VERSION}"


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def missing(folder: Path) -> str | None:
    """Why DeepSparse cannot be used, or None."""
    if _python(folder).exists():
        return None
    return f"no environment in {folder}; python -m benchmarks.cpu_kernels --install-deepsparse"


def install(folder: Path) -> None:
    """Make a virtual environment with DeepSparse; pip says what it does.

    Raises:
        subprocess.CalledProcessError: pip failed (the wheels are for Linux on x86-64 and Python 3.8 to 3.11).
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(_python(folder)), "-m", "pip", "install", *REQUIREMENTS], check=True)


class Worker:
    """The process that runs DeepSparse. Close it after use.

    Args:
        folder: the environment that `install` made.

    Raises:
        RuntimeError: the process does not come up; with what it wrote last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        self._files = tempfile.TemporaryDirectory(prefix="deepsparse_")
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [str(_python(self._folder)), "-m", "benchmarks.kernels.deepsparse_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
        )
        self._read()
        return self._process

    def load(self, network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
        """As the engines in `engines.ENGINES`.

        Raises:
            Unsupported: DeepSparse refuses the network; with its words.
        """
        if self._process.poll() is not None:  # it crashes on some networks; whatever it had loaded is gone
            self._end()
            self._start()
        process, folder = self._process, Path(self._files.name)
        path, data = folder / "network.onnx", folder / "x.npy"
        path.write_bytes(onnx_model(network, x))
        np.save(data, x.contiguous().numpy())
        try:
            number = self._ask(do="load", path=str(path), input=str(data), threads=threads)["id"]
        except RuntimeError as error:
            raise Unsupported(str(error)) from error
        finally:
            path.unlink()

        def output() -> np.ndarray:
            result = folder / "y.npy"
            self._ask(do="output", id=number, path=str(result))
            return np.asarray(np.load(result))

        def alive() -> bool:
            return process is self._process and process.poll() is None

        def close() -> None:
            if alive():
                self._ask(do="close", id=number)

        return Loaded(_Remote(self, number), output, close, alive)

    def burst(self, number: int, settings: Settings) -> float:
        """Seconds of one call of a loaded network, by the worker's own clock."""
        return float(self._ask(do="burst", id=number, settings=asdict(settings))["seconds"])

    def close(self) -> None:
        """End the process."""
        self._end()
        self._errors.close()
        self._files.cleanup()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # read says how it ended
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = [part.strip() for part in self._errors.read().splitlines() if part.strip()]
            asserted = [part for part in said if part.startswith("Assertion")]
            raise RuntimeError(
                f"the DeepSparse process ended with code {code}: {' / '.join(asserted[-1:] or said[-3:])}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"DeepSparse: {answer['error']}")
        return answer


class _Remote:
    """A network in the worker, as something to time."""

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker, self._number = worker, number

    def burst(self, settings: Settings) -> float:
        return self._worker.burst(self._number, settings)
