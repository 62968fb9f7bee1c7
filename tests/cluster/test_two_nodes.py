"""A search on a Ray cluster of two nodes without a shared disk, while nodes and its driver are killed. See docs/cluster.md.

Runs where NAS_CLUSTER_TESTS is set, as root. `python -m pytest tests/cluster -s` shows what happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nas import load_run
from nas.errors import NasError
from tests.cluster.checks import check_run
from tests.cluster.nodes import Network, Node, why_not

REASON = (
    "" if os.environ.get("NAS_CLUSTER_TESTS") else "set NAS_CLUSTER_TESTS=1 to run tests of whole clusters (minutes)"
)
pytestmark = pytest.mark.skipif(bool(REASON or why_not()), reason=REASON or why_not())

TRIALS = 16
CONFIG = f"""
[data]
name = "{{data}}"
limit = 2000

[space]
name = "mlp"
max_depth = 2
widths = [32, 64, 128]
densities = [1.0, 0.3, 0.1]

[search]
searchers = ["random", "regularized_evolution"]
trials = {TRIALS}
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


class Driver:
    """`nas search` on a node."""

    def __init__(self, node: Node, config: Path, out: Path, head: Node) -> None:
        arguments = [sys.executable, "-m", "nas.cli", "search", str(config), "--out", str(out)]
        arguments += ["--executor", "ray", "--address", head.ray_address]
        self.process = subprocess.Popen(
            node.command(arguments), env=node.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.communicate()

    def finish(self, seconds: float = 300) -> str:
        _, errors = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, errors
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


@pytest.mark.slow
def test_a_search_survives_the_death_of_a_node_and_of_its_driver(tmp_path: Path) -> None:
    config, runs = tmp_path / "small.toml", tmp_path / "runs"
    runs.mkdir()
    out = runs / "small"
    config.write_text(CONFIG.format(data=os.environ.get("NAS_CLUSTER_DATA", "digits")))
    with Network(tmp_path) as network:
        head, second = network.add(), network.add([runs])
        head.start()
        second.start(head)
        driver = Driver(head, config, out, head)
        wait_for(lambda: finished_trials(out) >= 4)
        say(f"{finished_trials(out)} trials are finished; the second node is switched off, a third one is switched on")
        second.kill()
        third = network.add([runs])
        third.start(head)
        before = finished_trials(out)
        wait_for(lambda: finished_trials(out) >= before + 4)
        say(f"{finished_trials(out)} trials are finished; the driver is killed")
        driver.kill()
        done = finished_trials(out)
        assert done < 2 * TRIALS + 2
        time.sleep(2)
        driver = Driver(head, config, out, head)
        say(driver.finish().splitlines()[-1])
    run = check_run(out, {"random": TRIALS, "regularized_evolution": TRIALS, "dense": 2})
    again = [row.trial for row in run.trials if row.attempts > 1]
    say(f"trials that were started more than once: {again}")
    assert again, "nothing was interrupted, so nothing was tested"
