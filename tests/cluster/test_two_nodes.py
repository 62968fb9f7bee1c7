"""A search on a Ray cluster of two nodes without a shared disk, while nodes and its driver are killed. See docs/cluster.md.

Runs where NAS_CLUSTER_TESTS is set, as root. `python -m pytest tests/cluster -s` shows what happens.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.cluster.checks import check_run
from tests.cluster.driver import Driver, finished_trials, say, wait_for, write_config
from tests.cluster.nodes import Network, why_not

REASON = (
    "" if os.environ.get("NAS_CLUSTER_TESTS") else "set NAS_CLUSTER_TESTS=1 to run tests of whole clusters (minutes)"
)
pytestmark = pytest.mark.skipif(bool(REASON or why_not()), reason=REASON or why_not())

TRIALS = 16


@pytest.mark.slow
def test_a_search_survives_the_death_of_a_node_and_of_its_driver(tmp_path: Path) -> None:
    config, runs = write_config(tmp_path, TRIALS), tmp_path / "runs"
    runs.mkdir()
    out = runs / "small"
    with Network(tmp_path) as network:
        head, second = network.add(), network.add([runs])
        head.start()
        second.start(head)
        driver = Driver(head, config, out, head.ray_address)
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
        driver = Driver(head, config, out, head.ray_address)
        say(driver.finish().splitlines()[-1])
    run = check_run(out, {"random": TRIALS, "regularized_evolution": TRIALS, "dense": 2})
    again = [row.trial for row in run.trials if row.attempts > 1]
    say(f"trials that were started more than once: {again}")
    assert again, "nothing was interrupted, so nothing was tested"
