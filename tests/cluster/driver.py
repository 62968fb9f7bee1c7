"""`nas search` on a node of a network, and how to wait for what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nas import load_run
from nas.errors import NasError
from tests.cluster.nodes import Node

CONFIG = """
[data]
name = "{data}"
limit = 2000

[space]
name = "mlp"
max_depth = 2
widths = [32, 64, 128]
densities = [1.0, 0.3, 0.1]

[search]
searchers = ["random", "regularized_evolution"]
trials = {trials}
dense_baselines = 2

[train]
epochs = 20
batch_size = 64
method = "gradual"

[latency]
rounds = 3
spacing_s = 0.0

[run]
checkpoint_s = 0.5
trial_timeout_s = 300
"""


def write_config(folder: Path, trials: int) -> Path:
    """A run file of two searchers on NAS_CLUSTER_DATA (default digits), some seconds per trial."""
    path = folder / "small.toml"
    path.write_text(CONFIG.format(data=os.environ.get("NAS_CLUSTER_DATA", "digits"), trials=trials))
    return path


class Driver:
    """`nas search` on a node."""

    def __init__(self, node: Node, config: Path, out: Path, address: str, token: str | None = None) -> None:
        arguments = [sys.executable, "-m", "nas.cli", "search", str(config), "--out", str(out)]
        arguments += ["--executor", "ray", "--address", address]
        environment = node.environment(token)
        self.process = subprocess.Popen(
            node.command(arguments), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def __del__(self) -> None:
        if self.process.poll() is None:  # a test has failed before its driver ended
            self.kill()

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.communicate()

    def finish(self, seconds: float = 300, code: int = 0) -> str:
        """What it printed to standard error, when it has ended with `code`."""
        _, errors = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, errors
        return errors


def wait_for(what: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.2)


def finished_trials(out: Path) -> int:
    try:
        return sum(trial.finished for trial in load_run(out).trials)
    except NasError:
        return 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
