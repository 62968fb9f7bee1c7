"""What only processes can do: die, hang, be orphaned. Nothing is lost silently and nothing is left behind."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import ConfigError, EvaluationFailed, NasError
from nas.executors import Event, Executor, Job, LocalExecutor
from nas.executors import worker as worker_program
from nas.executors.process import WorkerProcess, thread_environment
from nas.executors.worker import frame, take_messages

ROOT = Path(__file__).parents[2]
TASK = "tests.nas.executor_tasks"
LIMIT_S = 3.0
"""Within this time every process must be gone after its driver."""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_in_time(pids: list[int], seconds: float = LIMIT_S) -> bool:
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def wait_for(executor: Executor, kind: str, seconds: float = 20.0) -> Event:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for event in executor.poll(0.5):
            if event.kind == kind:
                return event
    raise AssertionError(f"no event {kind!r} within {seconds} s")


def run(executor: Executor, do: str, trial: int = 0, **payload: Any) -> Event:
    executor.submit(Job(trial, 1, {"do": do, **payload}))
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        for event in executor.poll(5.0):
            if event.kind != "progress":
                return event
    raise AssertionError(f"trial {trial} ({do}) did not end")


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor(f"{TASK}:setup", {}, workers=1) as executor:
        yield executor
        pids = executor.pids
    assert gone_in_time(pids, 1.0)


# -- deaths -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT])
def test_a_job_whose_process_is_killed_is_lost_and_names_the_signal(
    executor: LocalExecutor, number: signal.Signals
) -> None:
    event = run(executor, "signal", 7, signal=int(number))
    assert (event.kind, event.trial, event.attempt) == ("lost", 7, 1)
    assert event.error is not None
    assert f"was killed by signal {int(number)}, {number.name}" in event.error
    assert ("memory ran out" in event.error) == (number == signal.SIGKILL)
    assert event.duration_s is not None
    assert run(executor, "return", 8, value=1).payload == {"value": 1}


def test_a_crash_in_native_code_brings_its_stack(executor: LocalExecutor) -> None:
    error = run(executor, "signal", signal=int(signal.SIGSEGV)).error or ""
    assert "Segmentation fault" in error
    assert "executor_tasks.py" in error


def test_a_job_that_ends_its_process_is_lost_and_names_the_code(executor: LocalExecutor) -> None:
    event = run(executor, "exit", code=5)
    assert event.kind == "lost"
    assert "ended with exit code 5" in (event.error or "")


def test_kill_9_from_outside_in_mid_job_loses_that_job_only() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, workers=2) as executor:
        executor.submit(Job(0, 1, {"do": "report then sleep", "seconds": 60}))
        victim = wait_for(executor, "progress").payload["pid"]
        executor.submit(Job(1, 1, {"do": "sleep", "seconds": 0.3}))
        os.kill(victim, signal.SIGKILL)
        ended: dict[int, Event] = {}
        while len(ended) < 2:
            ended |= {e.trial: e for e in executor.poll(5.0) if e.kind != "progress"}
        assert ended[0].kind == "lost"
        assert (ended[1].kind, ended[1].payload) == ("done", {"slept": 0.3})
        assert victim not in executor.pids
        assert len(executor.pids) == 2
        executor.submit(Job(0, 2, {"do": "return", "value": "again"}))
        assert wait_for(executor, "done").attempt == 2


def test_kill_9_between_jobs_costs_nothing(executor: LocalExecutor) -> None:
    for trial in range(6):  # more often than the limit of deaths in a row: jobs in between reset it
        assert run(executor, "return", trial, value=trial).kind == "done"
        os.kill(executor.pids[0], signal.SIGKILL)
    assert run(executor, "echo", 99).kind == "done"


def test_a_job_that_had_not_begun_goes_to_the_next_process(executor: LocalExecutor) -> None:
    for trial in range(5):
        run(executor, "echo", 1000 + trial)
        os.kill(executor.pids[0], signal.SIGSTOP)  # so that it cannot begin
        executor.submit(Job(trial, 1, {"do": "return", "value": trial}))
        os.kill(executor.pids[0], signal.SIGKILL)
        event = wait_for(executor, "done")
        assert (event.trial, event.payload) == (trial, {"value": trial})


def test_a_result_sent_before_death_counts(executor: LocalExecutor) -> None:
    run(executor, "echo", 0)
    executor.submit(Job(1, 1, {"do": "return", "value": "x" * 50_000}))
    time.sleep(0.3)
    os.kill(executor.pids[0], signal.SIGKILL)
    time.sleep(0.1)
    event = wait_for(executor, "done")
    assert (event.trial, len(event.payload["value"])) == (1, 50_000)
    assert run(executor, "echo", 2).kind == "done"


@pytest.mark.parametrize("do", ["child", "fork"])
@pytest.mark.parametrize("kernel_tells", [True, False])
def test_a_killed_jobs_own_children_hide_nothing_and_end(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch, do: str, kernel_tells: bool
) -> None:
    """A forked child holds the pipes open; only the process itself tells of its death, or asking for it."""
    if not kernel_tells:
        monkeypatch.delattr(os, "pidfd_open")
        os.kill(executor.pids[0], signal.SIGKILL)
        run(executor, "echo", 9)
    executor.submit(Job(0, 1, {"do": do}))
    child = wait_for(executor, "progress").payload["child"]
    os.kill(executor.pids[0], signal.SIGKILL)
    assert wait_for(executor, "lost", LIMIT_S).trial == 0
    assert gone_in_time([child])


def test_a_process_that_dies_once_in_its_setup_is_replaced(tmp_path: Path) -> None:
    with LocalExecutor(f"{TASK}:setup_dies_once", {"marker": str(tmp_path / "marker")}) as executor:
        assert run(executor, "echo").kind == "done"


def test_death_in_every_setup_is_an_error_and_not_an_endless_loop() -> None:
    with LocalExecutor(f"{TASK}:setup_dies", {}, workers=2) as executor:
        executor.submit(Job(0, 1, {}))
        with pytest.raises(EvaluationFailed, match=r"died 3 times in a row before(?s:.*)SIGKILL(?s:.*)about to die"):
            wait_for(executor, "done")
        with pytest.raises(EvaluationFailed):  # and stays one
            executor.poll(1.0)


def test_a_broken_device_costs_its_process_but_not_the_search(executor: LocalExecutor) -> None:
    first = run(executor, "facts", 0).payload["pid"]
    assert run(executor, "cuda error", 1).kind == "failed"
    assert run(executor, "facts", 2).payload["pid"] != first


# -- time ---------------------------------------------------------------------------------------------------------------------


def test_a_job_that_takes_too_long_is_stopped_and_has_failed() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, timeout_s=0.5) as executor:
        run(executor, "echo", 0)
        pid = executor.pids[0]
        started = time.monotonic()
        event = run(executor, "sleep", 3, seconds=60)
        assert 0.4 < time.monotonic() - started < LIMIT_S
        assert (event.kind, event.trial) == ("failed", 3)
        assert event.error == "took longer than timeout_s = 0.5 s and was stopped"
        assert gone_in_time([pid])
        assert run(executor, "echo", 4).kind == "done"


def test_a_stopped_process_cannot_hold_the_search_up() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, timeout_s=0.5) as executor:
        run(executor, "echo", 0)
        os.kill(executor.pids[0], signal.SIGSTOP)
        started = time.monotonic()
        assert run(executor, "return", 1, value="x" * 5_000_000).kind == "failed"
        assert time.monotonic() - started < LIMIT_S


def test_setup_time_does_not_count_as_job_time() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, timeout_s=60) as executor:
        event = run(executor, "sleep", seconds=0.0)
    assert event.duration_s is not None
    assert event.duration_s < 0.1


def test_poll_returns_as_soon_as_something_happens_or_the_time_is_up() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, workers=2) as executor:
        executor.submit(Job(1, 1, {"do": "sleep", "seconds": 0.2}))
        executor.submit(Job(2, 1, {"do": "sleep", "seconds": 60}))
        started = time.monotonic()
        assert [e.trial for e in executor.poll(30.0)] == [1]
        assert time.monotonic() - started < 5
        started = time.monotonic()
        assert executor.poll(0.2) == []
        assert 0.19 < time.monotonic() - started < 2


def test_cancelling_a_running_job_ends_its_process(executor: LocalExecutor) -> None:
    executor.submit(Job(0, 1, {"do": "report then sleep", "seconds": 60}))
    pid = wait_for(executor, "progress").payload["pid"]
    assert executor.cancel(0)
    assert gone_in_time([pid])
    assert run(executor, "return", 0, value=1).payload == {"value": 1}


# -- the end ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["sleep", "child", "signal"])
def test_closing_ends_busy_and_idle_processes_quickly(do: str) -> None:
    executor = LocalExecutor(f"{TASK}:setup", {}, workers=2)
    run(executor, "echo", 0)
    executor.submit(Job(1, 1, {"do": do, "seconds": 60, "signal": int(signal.SIGINT)}))
    executor.poll(0.2)
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < LIMIT_S
    assert gone_in_time(executor.pids, 0.5)


def test_a_forgotten_executor_leaves_no_process() -> None:
    executor = LocalExecutor(f"{TASK}:setup", {}, workers=2)
    pids = executor.pids
    del executor
    gc.collect()
    assert gone_in_time(pids, 1.0)


def test_processes_ignore_ctrl_c(executor: LocalExecutor) -> None:
    assert run(executor, "signal", 0, signal=int(signal.SIGINT)).payload == {"survived": int(signal.SIGINT)}
    assert os.getpgid(executor.pids[0]) != os.getpgid(0)


DRIVER = """
import os, sys, time
sys.path.insert(0, {root!r})
from nas.executors import Job, LocalExecutor
executor = LocalExecutor("tests.nas.executor_tasks:setup", {{}}, workers=3)
executor.submit(Job(0, 1, {{"do": "report then sleep", "seconds": 600}}))
executor.submit(Job(1, 1, {{"do": "spin", "file": {file!r}}}))
heard = []
while not heard or not os.path.exists({file!r}):
    heard += executor.poll(0.1)
{before}
print(*executor.pids, flush=True)
time.sleep(600)
"""


def orphans(tmp_path: Path, before: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    """A driver with a sleeping, a spinning (it holds the interpreter lock) and an idle process; all their ids."""
    code = DRIVER.format(root=str(ROOT), file=str(tmp_path / "spinning"), before=before)
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    return driver, [int(word) for word in driver.stdout.readline().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_driver_is_killed_its_processes_are_gone(tmp_path: Path, number: signal.Signals) -> None:
    driver, pids = orphans(tmp_path)
    with driver:
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        driver.send_signal(number)
        assert gone_in_time(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel tells a process of its parent's death")
def test_the_kernel_ends_them_even_if_someone_holds_their_pipes(tmp_path: Path) -> None:
    """A forked child of the driver keeps the pipes' ends, so that no worker sees them closed."""
    driver, pids = orphans(tmp_path, "helper = os.fork()\nif helper == 0:\n    time.sleep(600)\nprint(helper, end=' ')")
    helper, *pids = pids
    with driver:
        try:
            driver.kill()
            assert gone_in_time(pids)
            assert alive(helper)
        finally:
            os.kill(helper, signal.SIGKILL)


def test_a_closed_pipe_alone_ends_a_process_and_its_children() -> None:
    """As where the kernel does not help: started by a thread that is not tied to it."""
    order = json.dumps({"sys_path": sys.path, "task": f"{TASK}:setup", "setup": {}}).encode()
    made: list[WorkerProcess] = []
    thread = threading.Thread(target=lambda: made.append(WorkerProcess(thread_environment(1), order)))
    thread.start()
    thread.join()
    (process,) = made
    try:
        process.send(b'{"payload": {"do": "child"}}')
        messages: list[dict[str, Any]] = []
        while not (messages and messages[-1]["kind"] == "progress"):
            messages += process.receive()[0]
            time.sleep(0.01)
        child = messages[-1]["payload"]["child"]
        assert alive(process.pid)
        os.close(process.write_end)
        process.write_end = os.open(os.devnull, os.O_WRONLY)
        assert gone_in_time([process.pid, child])
    finally:
        process.kill()
        process.bury()


def test_an_executor_made_by_a_short_lived_thread_lives_on() -> None:
    made: list[LocalExecutor] = []

    def make() -> None:
        made.append(LocalExecutor(f"{TASK}:setup", {}, workers=1))
        run(made[0], "echo")

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with made[0] as executor:
        pid = executor.pids[0]
        time.sleep(0.1)
        assert run(executor, "facts").payload["pid"] == pid


# -- surroundings -------------------------------------------------------------------------------------------------------------


def test_threads_are_set_before_anything_is_imported() -> None:
    with LocalExecutor(f"{TASK}:setup", {}, threads=3) as executor:
        env = run(executor, "facts").payload["env"]
    assert {env[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")} == {"3"}
    with LocalExecutor(f"{TASK}:setup", {}, threads=None) as executor:
        env = run(executor, "facts").payload["env"]
    assert env.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="only Linux has this killer")
def test_the_memory_killer_is_pointed_at_workers_and_not_at_the_driver(executor: LocalExecutor) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    run(executor, "echo")
    assert int(Path(f"/proc/{executor.pids[0]}/oom_score_adj").read_text()) == max(500, own)


def test_the_module_path_is_the_callers(executor: LocalExecutor) -> None:
    assert run(executor, "facts").payload["path"] == sys.path


@pytest.mark.parametrize("how", ["script", "module", "stdin"])
def test_the_callers_main_is_never_run_again(tmp_path: Path, how: str) -> None:
    """Without an `if __name__` guard, and in a folder whose files are named like standard modules."""
    for name in ("queue", "json", "selectors"):
        (tmp_path / f"{name}.py").write_text(
            "import os\nopen(os.environ['MARK'], 'a').write('shadowed')\nraise SystemExit\n"
        )
    home = tmp_path / "code"
    home.mkdir()
    code = textwrap.dedent(f"""
        import os, sys
        open(os.environ["MARK"], "a").write("main ")
        sys.path.append({str(ROOT)!r})
        sys.path.append({str(home)!r})
        from nas.executors import Job, LocalExecutor
        with LocalExecutor("own_task:setup", {{}}, workers=1) as executor:
            executor.submit(Job(0, 1, {{}}))
            while not (events := executor.poll(1.0)):
                pass
            print(events[0].payload)
    """)
    (home / "own_main.py").write_text(code)
    (home / "own_task.py").write_text("def setup(options):\n    return lambda payload, report: {'own': True}\n")
    command = {"script": [str(home / "own_main.py")], "module": ["-m", "own_main"], "stdin": ["-"]}[how]
    result = subprocess.run(
        [sys.executable, "-P", *command],
        input=code if how == "stdin" else None,
        cwd=tmp_path,
        env=dict(os.environ) | {"MARK": str(tmp_path / "mark"), "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "{'own': True}\n", result.stderr
    assert result.stderr == ""
    assert (tmp_path / "mark").read_text() == "main "


def test_what_jobs_print_does_not_pile_up(executor: LocalExecutor) -> None:
    run(executor, "print", 0, size=100_000)
    run(executor, "print", 1, size=10)
    output = executor._slots[0].process._output
    assert 10 < os.fstat(output).st_size < 1000


def test_no_descriptor_is_leaked() -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(3):
        with LocalExecutor(f"{TASK}:setup", {}, workers=2) as executor:
            run(executor, "signal", signal=int(signal.SIGKILL))
            run(executor, "echo")
    assert opened() == before


def test_no_process_to_be_had_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with LocalExecutor(f"{TASK}:setup", {}) as executor:
        run(executor, "echo")
        monkeypatch.setattr(subprocess, "Popen", no_more)
        executor.submit(Job(1, 1, {"do": "exit", "code": 1}))
        assert wait_for(executor, "lost").trial == 1
        with pytest.raises(EvaluationFailed, match=r"a worker process cannot be started: .*temporarily unavailable"):
            executor.poll(1.0)
    with pytest.raises(EvaluationFailed, match="cannot be started"):
        LocalExecutor(f"{TASK}:setup", {})


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"workers": -1}, {"threads": 0}, {"timeout_s": 0}, {"timeout_s": -1.0}]
)
def test_options_must_be_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"expected {next(iter(options))} > 0"):
        LocalExecutor(f"{TASK}:setup", {}, **options)


def test_messages_survive_any_cutting() -> None:
    bodies = [b"{}", b'{"a": "' + b"x" * 300 + b'"}', b'{"b": [1]}']
    stream = b"".join(map(frame, bodies))
    for size in (1, 2, 3, 5, 7, 100, 1000):
        inbox, found = bytearray(), []
        for begin in range(0, len(stream), size):
            inbox += stream[begin : begin + size]
            found += take_messages(inbox)
        assert found == [{}, {"a": "x" * 300}, {"b": [1]}]
        assert inbox == b""


def test_the_worker_program_starts_with_the_standard_library_alone() -> None:
    code = f"import sys, runpy; runpy.run_path({worker_program.__file__!r}); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"nas", "torch", "numpy"} & set(out.split())


def test_a_trivial_job_costs_less_than_two_milliseconds() -> None:
    """Measured 0.08 ms with 1 and with 2 workers; processor time of driver and workers, so that a busy machine does not matter."""

    def spent(who: Callable[[], tuple[int, ...]] = lambda: (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who()))

    before = spent()
    with LocalExecutor(f"{TASK}:setup", {}) as executor:
        for trial in range(500):
            run(executor, "return", trial, value=trial)
    assert (spent() - before) / 500 < 0.002


def test_every_error_of_an_executor_is_one_the_command_line_prints() -> None:
    with LocalExecutor(f"{TASK}:setup_raises", {}) as executor:
        executor.submit(Job(0, 1, {}))
        with pytest.raises(NasError):
            wait_for(executor, "done")
