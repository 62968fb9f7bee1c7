"""The Ray executor on a cluster of several nodes (all on this machine): what dies, comes, goes, is slow, or shares no disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster

import nas
from nas.errors import EvaluationFailed
from nas.executors import Event, Job, Placement
from nas.executors.ray_cluster import connect, disconnect
from nas.executors.ray_tasks import RayExecutor
from nas.executors.travel import run_id
from tests.conformance.test_executors import TASK, collect, run_one
from tests.ray_environment import restored_environment

ROOT = Path(__file__).resolve().parents[2]
FILES = "tests.nas.folder_tasks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with restored_environment():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": {"NAS_TEST_NODE": "head"}})
        connection = connect(made.address, modules=["tests"])
        yield made
        disconnect(connection)
        made.shutdown()


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Any]:
    """A second node, with one CPU and a full disk."""
    node = cluster.add_node(num_cpus=1, env_vars={"NAS_TEST_NODE": "second", "NAS_TEST_DISK": "full"})
    cluster.wait_for_nodes()
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node, allow_graceful=True)


Make = Callable[..., RayExecutor]


@pytest.fixture
def make(cluster: Cluster) -> Iterator[Make]:
    made: list[RayExecutor] = []

    def one(task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> RayExecutor:
        own = {name: options.pop(name) for name in ("scratch", "silence_s") if name in options}
        placement = Placement(address=cluster.address, **({"workers": 0} | options))
        made.append(RayExecutor(task, setup, placement, **own))
        return made[-1]

    yield one
    for executor in made:
        executor.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def unshared(folder: Path) -> dict[str, Any]:
    """A setup by which workers take the folder for another that happens to have its path."""
    run_id(folder)
    return {"folder": str(folder), "run_id": "0" * 32}


def test_a_killed_process_loses_its_job_and_the_next_attempt_runs(make: Make) -> None:
    executor = make()
    executor.submit(Job(3, 1, {"do": "report then sleep", "seconds": 60}))
    (report,) = executor.poll(20)
    os.kill(report.payload["pid"], signal.SIGKILL)
    (lost,) = collect(executor, 1)
    assert (lost.kind, lost.trial, lost.attempt, lost.payload) == ("lost", 3, 1, {})
    assert "died" in (lost.error or "")
    assert run_one(executor, "return", 3, value=7).payload == {"value": 7}


def test_a_process_that_falls_silent_loses_its_job_without_blame(make: Make) -> None:
    executor = make(silence_s=3.0)
    executor.submit(Job(1, 1, {"do": "sleep", "seconds": 5}))  # longer than that, but it gives signs of life
    assert collect(executor, 1)[-1].kind == "done"
    executor.submit(Job(2, 1, {"do": "signal", "signal": int(signal.SIGSTOP)}))
    event = collect(executor, 1)[-1]
    assert (event.kind, event.payload) == ("lost", {"blameless": True})
    assert "nothing was heard of it for 3 s" in (event.error or "")
    assert run_one(executor, "return", 3, value=1).payload == {"value": 1}


def test_an_order_that_was_lost_on_the_way_is_given_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make()
    launch = executor._launch
    orders: list[int] = []

    def lose_the_first(order: Any) -> Any:
        orders.append(order.token)
        return launch(order) if len(orders) > 1 else ray.ObjectRef.from_random()

    monkeypatch.setattr(executor, "_launch", lose_the_first)
    monkeypatch.setattr(executor, "_kill", lambda ref: None)
    monkeypatch.setattr(executor, "unheard_s", 2.0)
    assert run_one(executor, "return", 3, value=1).payload == {"value": 1}
    assert len(orders) == 2


def test_a_job_that_takes_too_long_is_stopped_and_the_wait_for_room_does_not_count(make: Make) -> None:
    executor = make(timeout_s=2.0)
    first = collect_all(executor, [Job(0, 1, {"do": "sleep", "seconds": 1.2})])
    assert [event.kind for event in first] == ["done"]
    executor.submit(Job(1, 1, {"do": "sleep", "seconds": 60}))
    (late,) = collect(executor, 1)
    assert (late.kind, late.payload["type"]) == ("failed", "builtins.TimeoutError")
    assert "timeout_s = 2 s" in (late.error or "")
    assert late.duration_s is not None
    assert 2 <= late.duration_s < 10
    assert run_one(executor, "return", 2, value=1).kind == "done"


def collect_all(executor: RayExecutor, jobs: list[Job]) -> list[Event]:
    for job in jobs:
        executor.submit(job)
    return collect(executor, len(jobs))


def test_a_setup_that_kills_its_process_is_an_error_and_no_endless_loop(make: Make) -> None:
    executor = make(f"{TASK}:setup_dies")
    executor.submit(Job(0, 1, {}))
    with pytest.raises(EvaluationFailed, match="died 3 times in a row before it could run a job"):
        collect(executor, 1)


def test_capacity_follows_nodes_that_come_and_go(make: Make, cluster: Cluster) -> None:
    told: list[str] = []
    executor = make(message=told.append)
    assert executor.capacity == 1
    node = cluster.add_node(num_cpus=2)
    wait_for(lambda: executor.capacity == 3)
    assert any("has come, with room for 2 trials" in text for text in told)
    cluster.remove_node(node, allow_graceful=True)
    wait_for(lambda: executor.capacity == 1)
    assert any("is gone" in text for text in told)
    limited = make(workers=2, cpus=0.25)
    assert limited.capacity == 2


def test_a_job_whose_node_dies_is_lost_without_blame_and_runs_elsewhere(
    make: Make, cluster: Cluster, second: Any
) -> None:
    executor = make()
    wait_for(lambda: executor.capacity == 2)
    jobs = {trial: Job(trial, 1, {"do": "report then sleep", "seconds": 4}) for trial in (0, 1)}
    for job in jobs.values():
        executor.submit(job)
    events: list[Event] = []
    while len(events) < 2:
        events += executor.poll(20)
    cluster.remove_node(second, allow_graceful=False)
    events = collect(executor, 2)
    (lost,) = [event for event in events if event.kind == "lost"]
    assert lost.payload == {"blameless": True}
    assert "died or was taken away" in (lost.error or "")
    assert [event.kind for event in events if event.trial != lost.trial] == ["done"]
    wait_for(lambda: executor.capacity == 1)
    executor.submit(Job(lost.trial, 2, {"do": "return", "value": 5}))
    assert collect(executor, 1)[0].payload == {"value": 5}


def test_files_travel_where_no_disk_is_shared_and_a_second_attempt_starts_from_the_checkpoint(
    make: Make, tmp_path: Path
) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    (run / "shipped").mkdir(parents=True)
    (run / "shipped" / "given.txt").write_text("from the driver")
    executor = make(f"{FILES}:setup", unshared(run), folder=run, setup_needs=("shipped/given.txt",), scratch=scratch)
    count = run / "checkpoints" / "4" / "count"
    needs = ("checkpoints/4", "missing")
    executor.submit(Job(4, 1, {"trial": 4, "to": 9, "die_at": 3}, needs))
    seen: list[Event] = []
    while not seen or seen[-1].kind == "progress":
        for event in executor.poll(20):
            seen.append(event)
            if event.kind == "progress":
                assert int(count.read_text()) >= event.payload["count"]
    assert seen[-1].kind == "lost"
    reached = int(count.read_text())
    assert 1 <= reached <= 3
    executor.submit(Job(4, 2, {"trial": 4, "to": 9, "bytes": 3_000_000}, needs))
    done = collect(executor, 1)[-1]
    assert (done.kind, done.payload["begin"], done.payload["given"]) == ("done", reached, "from the driver")
    assert done.payload["folder"].startswith(str(scratch))
    assert count.read_text() == "9"
    assert (run / "result.bin").stat().st_size == 3_000_000


def test_workers_that_see_the_folder_work_in_it_and_run_the_code_of_the_driver(make: Make, tmp_path: Path) -> None:
    executor = make(f"{FILES}:setup", {"folder": str(tmp_path), "run_id": run_id(tmp_path)}, folder=tmp_path)
    executor.submit(Job(0, 1, {"trial": 0, "to": 1}))
    done = collect(executor, 1)[-1]
    assert done.payload["folder"] == str(tmp_path)
    code = Path(done.payload["code"])
    assert "py_modules_files" in str(code)
    assert (code / "loop.py").read_bytes() == (Path(nas.__file__).parent / "loop.py").read_bytes()


def test_a_node_with_a_full_disk_is_avoided_and_its_job_runs_elsewhere(make: Make, second: Any, tmp_path: Path) -> None:
    told: list[str] = []
    executor = make(f"{FILES}:setup", unshared(tmp_path), folder=tmp_path, scratch=tmp_path / "s", message=told.append)
    wait_for(lambda: executor.capacity == 2)
    jobs = [Job(trial, 1, {"trial": trial, "to": 1, "full": True, "sleep": 2.0}) for trial in (0, 1)]
    ends = {event.kind: event for event in collect_all(executor, jobs) if event.kind != "progress"}
    assert ends.keys() == {"done", "lost"}
    assert ends["lost"].payload == {"blameless": True}
    assert ends["done"].payload["node"] == "head"
    assert any("no space left on device; this node gets no trials" in text for text in told)
    assert executor.capacity == 1
    again = [Job(trial, 2, {"trial": trial, "to": 1, "full": True}) for trial in (5, 6)]
    for job in again:
        (event,) = [event for event in collect_all(executor, [job]) if event.kind != "progress"]
        assert (event.kind, event.payload["node"]) == ("done", "head")


def test_tasks_end_when_their_driver_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    code = (
        "import sys; from nas.executors import Job, Placement, make_executor\n"
        f"executor = make_executor('ray', '{TASK}:setup', {{}}, Placement(address='{cluster.address}'))\n"
        "executor.submit(Job(0, 1, {'do': 'report then sleep', 'seconds': 120}))\n"
        "while not (events := executor.poll(30)): pass\n"
        "print(events[0].payload['pid'], flush=True)\n"
        "executor.poll(60)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    driver.kill()
    driver.wait()
    driver.stdout.close()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
