"""Small searches for tests: a run file that takes seconds, and a driver process that can be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = """
[run]
workers = {workers}

[data]
name = "digits"
limit = 300
validation = 0.2

[space]
name = "mlp"
max_depth = 2
widths = [16, 32]
densities = [1.0, 0.5, 0.1]
patterns = ["unstructured", "4x1"]

[search]
searchers = ["random", "nsga2"]
trials = {trials}
dense_baselines = 1

[train]
epochs = {epochs}
batch_size = 64
method = "{method}"

[latency]
rounds = 3
spacing_s = 0.0

[final]
export = {export}
"""


def write_config(folder: Path, **changes: Any) -> Path:
    """A run file in `folder`; workers, trials, epochs, method and export can be changed."""
    values = {"workers": 1, "trials": 3, "epochs": 1, "method": "static", "export": "false", **changes}
    path = folder / "small.toml"
    path.write_text(CONFIG.format(**values))
    return path


def start_search(config: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """`nas search` in a process of its own."""
    command = [sys.executable, "-m", "nas.cli", "search", str(config), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
