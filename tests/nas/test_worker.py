"""`nas worker` and the executor it works for: deaths, signals, a database that goes away, folders that are not shared."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nas.cli import main
from nas.driver import search
from nas.errors import ConfigError, RunError
from nas.executors import Event, Job, Placement, make_executor
from nas.executors.travel import Workplace
from nas.executors.versions import differences, versions
from nas.executors.workers import WorkersExecutor
from nas.run import load_run
from nas.storage import is_run
from nas.store import Trial
from tests.conformance.test_executors import collect
from tests.nas.search_helpers import start_search, write_config
from tests.nas.worker_helpers import WorkerProcess, executor, members, until
from tests.postgres_server import PostgresServer

Start = Callable[..., WorkerProcess]
HANG = {"do": "report then sleep", "seconds": 60}


@pytest.fixture(scope="module")
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture
def start(url: str, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts workers of a run that has the test's name."""
    processes: list[WorkerProcess] = []

    def begin(*more: str, run: str = request.node.name) -> WorkerProcess:
        processes.append(WorkerProcess(url, run, *more))
        return processes[-1]

    yield begin
    for process in processes:
        process.close()


@pytest.fixture(scope="module")
def shared(url: str) -> Iterator[WorkerProcess]:
    """A worker of two slots for the run "shared", which whoever uses it leaves alive."""
    process = WorkerProcess(url, "shared", "--slots", "2")
    yield process
    process.close()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    name: str = request.node.name
    return name


def begun(made: WorkersExecutor, job: Job) -> int:
    """Submit a job that reports its process, and wait for that."""
    made.submit(job)
    event = until(lambda: next((event for event in made.poll(0.2) if event.trial == job.trial), None))
    assert event.kind == "progress"
    pid: int = event.payload["pid"]
    return pid


def gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked how yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def test_a_worker_that_is_killed_loses_its_job_without_blame_and_another_runs_it(
    url: str, run: str, start: Start
) -> None:
    first = start()
    with executor(url, run, 1, lease_s=2.0) as made:
        child = begun(made, Job(4, 1, HANG))
        start()
        until(lambda: len(members(url, run)) == 2)
        first.kill()
        (lost,) = collect(made, 1)
        assert (lost.kind, lost.trial, lost.attempt, lost.payload) == ("lost", 4, 1, {"blameless": True})
        assert f"process {first.pid} was not heard of for 2 s" in str(lost.error)
        until(lambda: gone(child))
        made.submit(Job(4, 2, {"do": "return", "value": 1}))
        (done,) = collect(made, 1)
        assert (done.kind, done.attempt, made.capacity) == ("done", 2, 1)


def test_workers_that_are_told_to_end_give_their_jobs_back_at_once(url: str, run: str, start: Start) -> None:
    workers = [start(), start()]
    with executor(url, run, 2) as made:
        children = [begun(made, Job(trial, 1, HANG)) for trial in (0, 1)]
        began = time.monotonic()
        for worker, number in zip(workers, (signal.SIGTERM, signal.SIGINT), strict=True):
            assert worker.end(number) == 0
            (lost,) = collect(made, 1)
            assert (lost.kind, lost.payload) == ("lost", {"blameless": True})
            assert f"told to end by {signal.Signals(number).name}" in str(lost.error)
            assert f"attempt 1: lost: its worker was told to end by {signal.Signals(number).name}" in worker.said()
        assert time.monotonic() < began + 16  # a lease is 20 s
        until(lambda: all(gone(child) for child in children))
        until(lambda: made.poll(0.2) or made.capacity == 0)


def test_a_signal_that_comes_by_two_ways_is_one(url: str, run: str, start: Start) -> None:
    worker = start()
    with executor(url, run, 1) as made:
        begun(made, Job(0, 1, HANG))
        os.killpg(worker.pid, signal.SIGTERM)
        time.sleep(0.02)
        assert worker.end(signal.SIGTERM) == 0
        (lost,) = collect(made, 1)
        assert "told to end by SIGTERM" in str(lost.error)


def test_a_job_whose_child_process_dies_is_lost_at_once_and_the_worker_stays(url: str, shared: WorkerProcess) -> None:
    with executor(url, "shared", 1) as made:
        os.kill(begun(made, Job(0, 1, HANG)), signal.SIGKILL)
        (lost,) = collect(made, 1, 8.0)
        assert (lost.kind, lost.payload) == ("lost", {})
        assert "SIGKILL" in str(lost.error)
        made.submit(Job(0, 2, {"do": "echo"}))
        assert collect(made, 1)[0].kind == "done"
    assert shared.process.poll() is None


def test_time_outs_are_kept_and_cancelled_jobs_are_stopped(url: str, shared: WorkerProcess) -> None:
    with executor(url, "shared", 1, lease_s=1.5, timeout_s=3.0) as made:
        assert made.capacity == 2
        made.submit(Job(0, 1, HANG))
        child = begun(made, Job(1, 1, HANG))
        assert made.cancel(1)
        until(lambda: gone(child), 2.5)
        events = [event for event in collect(made, 1) if event.kind != "progress"]
        assert [(e.kind, e.trial, e.payload["type"]) for e in events] == [("failed", 0, "builtins.TimeoutError")]


def test_a_server_that_is_away_loses_nothing(postgres: PostgresServer, url: str, shared: WorkerProcess) -> None:
    told = list[str]()
    with executor(url, "shared", 1, lease_s=2.0, message=told.append) as made:
        begun(made, Job(0, 1, {"do": "report then sleep", "seconds": 1.5}))
        postgres.stop()
        try:
            began = time.monotonic()
            while time.monotonic() < began + 3.0:
                assert made.poll(0.5) == []
        finally:
            postgres.start()
        (done,) = collect(made, 1)
        assert (done.kind, done.payload) == ("done", {})
        made.submit(Job(1, 1, {"do": "echo"}))
        assert collect(made, 1)[0].kind == "done"
    assert any("Workers go on meanwhile" in text for text in told)
    assert any("the database is back after" in text for text in told)
    assert "the database is back after" in shared.said()


def test_an_answer_that_comes_after_the_lease_never_counts(url: str, shared: WorkerProcess) -> None:
    with executor(url, "shared", 1, lease_s=1.5) as made:
        begun(made, Job(0, 1, {"do": "report then sleep", "seconds": 1.0}))
        os.kill(shared.pid, signal.SIGSTOP)
        assert [event.kind for event in collect(made, 1)] == ["lost"]
        os.kill(shared.pid, signal.SIGCONT)
        until(lambda: made.poll(0.1) or made.capacity == 2)
        made.submit(Job(0, 2, {"do": "return", "value": 2}))
        assert [(e.attempt, e.payload) for e in collect(made, 1)] == [(2, {"value": 2})]
        time.sleep(0.3)
        assert made.poll(0.1) == []
    assert "no longer wanted here" in shared.said() or "too late" in shared.said()


def test_no_job_is_run_twice_however_many_workers_take_them(url: str, run: str, start: Start, tmp_path: Path) -> None:
    for _ in range(3):
        start()
    file = tmp_path / "done.txt"
    events: list[Event] = []
    with executor(url, run, 3, "tests.nas.worker_tasks:append", {"file": str(file)}) as made:
        waiting = list(range(200))
        while len(events) < 200:
            while waiting and 200 - len(waiting) - len(events) < made.capacity:
                made.submit(Job(waiting[-1], 1, {"number": waiting.pop()}))
            events += made.poll(1.0)
    assert sorted(event.payload["number"] for event in events) == list(range(200))
    lines = [line.split() for line in file.read_text().splitlines()]
    assert sorted(int(number) for number, _ in lines) == list(range(200))
    assert len({worker for _, worker in lines}) == 3


def test_files_travel_to_a_worker_that_does_not_see_the_folder(
    url: str, run: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("run")  # not below the worker's current folder
    (folder / "space").mkdir(parents=True)
    (folder / "space/word.txt").write_text("tuna")
    worker = start("--scratch", str(tmp_path / "scratch"), "--slots", "2")
    task, setup = "tests.nas.worker_tasks:files", {"folder": str(folder)}
    count = folder / "checkpoints/00003/count"
    with executor(url, run, 1, task, setup, folder=folder, setup_needs=("space",)) as made:
        job = {"file": "checkpoints/00003/count", "until": 2}
        made.submit(Job(3, 1, job, ("checkpoints/00003",)))
        first = until(lambda: made.poll(0.5))[0]
        assert (first.kind, int(count.read_text()) >= first.payload["step"]) == ("progress", True)
        (*_, done) = collect(made, 1)
        assert (done.payload["begun"], done.payload["word"], count.read_text()) == (0, "tuna", "2")
        assert done.payload["folder"].startswith(str(tmp_path / "scratch"))
        assert (folder / "big.bin").stat().st_size == 20_000_000
        made.submit(Job(3, 1, {**job, "until": 1000, "seconds": 0.1}, ("checkpoints/00003",)))
        until(lambda: [event for event in made.poll(0.5) if event.payload["step"] > 4])
        assert worker.end() == 0
        lost = collect(made, 1)[-1]
        assert lost.kind == "lost"
        assert int(count.read_text()) > 4  # what it had reached when it was told to end
    assert list((tmp_path / "scratch").rglob("*")) == []


def test_workers_go_on_with_another_driver_and_the_first_is_told(url: str, shared: WorkerProcess) -> None:
    first = executor(url, "shared", 1, setup={"name": "first"}, lease_s=2.0)
    child = begun(first, Job(0, 1, HANG))
    with executor(url, "shared", 1, setup={"name": "second"}) as second:
        until(lambda: gone(child))
        second.submit(Job(0, 2, {"do": "echo"}))
        assert collect(second, 1)[0].payload["options"] == {"name": "second"}
        with pytest.raises(RunError, match="another driver has taken over"):
            first.poll(0.0)
        first.close()
        second.submit(Job(1, 1, {"do": "echo"}))
        assert collect(second, 1)[0].kind == "done"
    assert shared.process.poll() is None


def test_an_idle_worker_ends_when_asked_to(start: Start) -> None:
    worker = start("--idle-exit", "0.5")
    assert worker.process.wait(20) == 0
    said = worker.said()
    assert "waiting for the run" in said
    assert "ends: nothing to do for 0.5 s" in said


def test_what_is_wrong_with_the_storage_is_one_line(
    postgres: PostgresServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NAS_STORAGE", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for storage, found in (
            ([], "nas worker: expected the run's PostgreSQL server, got none"),
            (["--storage", postgres.url_of("postgres", password="wrong")], "password"),
            (["--storage", postgres.url_of("postgres", port=1)], "cannot be reached"),
            (["--storage", "sqlite:///run.db"], "expected the URL of a PostgreSQL server"),
        ):
            assert main(["worker", "any", *storage]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert found in line
            assert "wrong" not in line.replace("wrong password", "")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("storage", ["", "sqlite:///run.db"])
def test_a_driver_without_a_server_is_told_what_to_do(storage: str) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a PostgreSQL server .* use executor local or ray, or give --storage"
    ):
        make_executor("workers", "a:b", {}, Placement(storage=storage))


def test_a_search_without_a_server_is_refused_before_it_makes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NAS_STORAGE", raising=False)
    with pytest.raises(ConfigError, match="or give --storage"):
        search(write_config(tmp_path), out=tmp_path / "run", executor="workers", quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.db").touch()
    with pytest.raises(ConfigError, match=r"this run's database is .*run.db: .* begin another run \(--out\)"):
        search(write_config(tmp_path), out=tmp_path / "run", executor="workers", quiet=True)


def test_scratch_folders_of_other_machines_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Workplace(tmp_path / "unseen", "id", tmp_path)
    gone = "999999999"
    host = mine.folder.name.split("-", 2)[2].rsplit("-", 2)[0]
    dead, other, alike = (tmp_path / f"nas-id-{name}-0-{gone}" for name in (host, "elsewhere", f"{host}-2"))
    for path in (dead, other, alike):
        path.mkdir()
    again = Workplace(tmp_path / "unseen", "id", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (mine.folder, again.folder, other, alike)
    }
    assert mine.folder != again.folder


def test_only_versions_that_matter_differ() -> None:
    here = versions()
    assert differences(here | {"Python": "3.99.0"}, here) == ""
    assert differences(here | {"torch": "1.0"}, here) == f"torch 1.0, not {here['torch']}"


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_goes_on_with_the_same_workers(
    url: str, run: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the trials that were asked for, none twice, none left open; the workers end with the run."""
    monkeypatch.setenv("NAS_STORAGE", url)
    folder = tmp_path / "out"
    config = write_config(tmp_path, trials=3, epochs=1)
    command = ("--storage", url, "--executor", "workers", "--set", f"run.name={run}")
    workers = [start(run=str(folder)), start()]
    killed = start_search(config, folder, *command)
    try:
        until(lambda: killed.poll() is not None or len(rows(folder)) >= 2, 90.0)
    finally:
        killed.kill()
        killed.communicate()
    with start_search(config, folder, *command) as again:
        _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    found = rows(folder)
    assert sorted((trial.searcher, trial.index) for trial in load_run(folder).trials) == [
        *(("dense", 0), *(("nsga2", index) for index in range(3)), *(("random", index) for index in range(3)))
    ]
    assert len(found) == 7
    codes = [worker.process.wait(20) for worker in workers]
    logs = [worker.said() for worker in workers]
    assert codes == [0, 0], "\n".join(logs)
    assert all("ends: the run is finished" in log for log in logs)
    done = [int(number) for log in logs for number in re.findall(r"trial (\d+), attempt \d+: done", log)]
    originals = [trial.trial for trial in found if trial.copy_of is None]
    assert sorted(set(done)) == originals
    assert len(done) <= len(originals) + 2  # at most what the killed driver had not heard of


def rows(folder: Path) -> list[Trial]:
    """The complete trials of a run."""
    if not is_run(folder) or not (folder / "environment.json").is_file():
        return []
    return [trial for trial in load_run(folder).trials if trial.state == "complete"]
