"""What a cluster does wrong: cut cables, heads that are restarted, full disks, wrong addresses and tokens. Minutes.

Runs where NAS_CLUSTER_TESTS is set, as root.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.checks import check_run
from tests.cluster.driver import Driver, finished_trials, say, wait_for, write_config
from tests.cluster.nodes import Network, why_not

REASON = (
    "" if os.environ.get("NAS_CLUSTER_TESTS") else "set NAS_CLUSTER_TESTS=1 to run tests of whole clusters (minutes)"
)
pytestmark = [pytest.mark.skipif(bool(REASON or why_not()), reason=REASON or why_not()), pytest.mark.slow]

TRIALS = 10
ALL = {"random": TRIALS, "regularized_evolution": TRIALS, "dense": 2}


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path) as made:
        yield made


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def test_a_node_that_is_cut_off_for_a_while_costs_no_trial(network: Network, runs: Path) -> None:
    config = write_config(runs.parent, TRIALS)
    head, second = network.add(), network.add([runs])
    head.start()
    second.start(head)
    driver = Driver(head, config, runs / "small", head.ray_address)
    wait_for(lambda: finished_trials(runs / "small") >= 3)
    second.cut()
    say("the second node is cut off")
    time.sleep(45)
    second.mend()
    say("and back")
    driver.finish(400)
    check_run(runs / "small", ALL)


def test_the_same_command_goes_on_after_the_head_was_restarted(network: Network, runs: Path) -> None:
    config = write_config(runs.parent, TRIALS)
    head, second = network.add(), network.add()
    head.start()
    second.start(head)
    driver = Driver(second, config, runs / "small", head.ray_address)  # it outlives the head's machine
    wait_for(lambda: finished_trials(runs / "small") >= 3)
    head.kill()
    say("the head is switched off")
    _, errors = driver.process.communicate(timeout=300)
    say(f"the driver has ended with {driver.process.returncode}: {errors.strip().splitlines()[-1]}")
    assert driver.process.returncode != 0
    second.kill()
    head.start()
    second.start(head)
    Driver(second, config, runs / "small", head.ray_address).finish()
    check_run(runs / "small", ALL)


def test_a_full_disk_on_one_node_leaves_the_work_to_the_others(network: Network, runs: Path) -> None:
    config = write_config(runs.parent, TRIALS)
    head, second = network.add(), network.add([runs], small=runs.parent / "tiny")
    head.start()
    second.start(head)
    errors = Driver(head, config, runs / "small", head.ray_address).finish()
    say("\n".join(line for line in errors.splitlines() if second.address in line))
    assert second.address in errors
    check_run(runs / "small", ALL)


def test_a_wrong_token_is_one_clear_line(network: Network, runs: Path) -> None:
    config = write_config(runs.parent, TRIALS)
    head = network.add()
    head.start()
    started = time.monotonic()
    errors = Driver(head, config, runs / "small", head.ray_address, token="f" * 64).finish(60, code=2)
    say(errors)
    assert "RAY_AUTH_TOKEN" in errors
    assert "Traceback" not in errors
    assert time.monotonic() - started < 60


def test_a_wrong_address_is_one_clear_line(network: Network, runs: Path) -> None:
    config = write_config(runs.parent, TRIALS)
    head = network.add()
    started = time.monotonic()
    errors = Driver(head, config, runs / "small", head.ray_address).finish(90, code=2)
    say(errors)
    assert head.ray_address in errors
    assert "Traceback" not in errors
    assert time.monotonic() - started < 60
