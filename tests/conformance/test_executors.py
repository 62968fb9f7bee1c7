"""The laws every executor keeps. A new one joins by one subclass of `ExecutorLaws` with its `make`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import ConfigError, DataError, EvaluationFailed, NasError, UnknownName
from nas.executors import EXECUTORS, Event, Executor, InlineExecutor, Job, LocalExecutor, Placement, make_executor

TASK = "tests.nas.executor_tasks"
FINAL = ("done", "failed", "lost")
Make = Callable[..., Executor]
PATIENCE_S = 20.0
"""A job that has not ended by then never will."""


def collect(executor: Executor, finals: int, seconds: float | None = None) -> list[Event]:
    """Poll until `finals` jobs have ended; all events in order."""
    events: list[Event] = []
    until = time.monotonic() + (seconds or PATIENCE_S)
    while sum(event.kind in FINAL for event in events) < finals:
        assert time.monotonic() < until, f"expected {finals} jobs to end, got {events}"
        events += executor.poll(0.5)
    return events


def run_one(executor: Executor, do: str = "echo", trial: int = 0, **payload: Any) -> Event:
    executor.submit(Job(trial, 1, {"do": do, **payload}))
    return collect(executor, 1)[-1]


class ExecutorLaws:
    """Subclass, name it Test..., and override `make`."""

    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        raise NotImplementedError

    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        with self.make(setup={"name": "ä", "nested": [1, None, {"x": 2.5}]}) as executor:
            yield executor

    def test_a_result_comes_back_once_with_its_trial_and_attempt(self, executor: Executor) -> None:
        payload: dict[str, Any] = {
            "do": "echo",
            "text": "ünï\ud83d",
            "numbers": [1, 2.5, 10**30, -0.0],
            "none": None,
            "deep": {"a": [[]]},
        }
        executor.submit(Job(17, 3, payload))
        (event,) = collect(executor, 1)
        assert (event.kind, event.trial, event.attempt, event.error) == ("done", 17, 3, None)
        assert event.payload == {"payload": payload, "options": {"name": "ä", "nested": [1, None, {"x": 2.5}]}}
        assert event.duration_s is not None
        assert 0 <= event.duration_s < 10
        assert executor.poll(0.05) == []

    def test_every_one_of_many_jobs_ends_exactly_once_and_matches(self, executor: Executor) -> None:
        waiting, held = list(range(40)), 0
        ended: dict[int, Event] = {}
        while len(ended) < 40:
            while waiting and held < executor.capacity:
                trial = waiting.pop()
                executor.submit(Job(trial, trial % 3, {"do": "return", "value": trial * 10}))
                held += 1
            for event in executor.poll(1.0):
                assert event.trial not in ended
                ended[event.trial] = event
                held -= 1
        assert all(e.payload == {"value": t * 10} and e.attempt == t % 3 for t, e in ended.items())

    def test_the_task_is_set_up_once_and_then_serves_many_jobs(self) -> None:
        with self.make(workers=1) as executor:
            facts = [run_one(executor, "facts", trial).payload for trial in range(3)]
        assert [f["calls"] for f in facts] == [1, 2, 3]
        assert len({f["pid"] for f in facts}) == 1

    def test_the_order_of_results_need_not_be_that_of_jobs(self, executor: Executor) -> None:
        jobs = [Job(trial, 1, {"do": "sleep", "seconds": 0.3 / (trial + 1) ** 2}) for trial in range(executor.capacity)]
        for job in jobs:
            executor.submit(job)
        ended = [event.trial for event in collect(executor, len(jobs))]
        assert ended == sorted(ended, reverse=True)
        assert sorted(ended) == list(range(len(jobs)))

    def test_progress_comes_in_order_before_the_result(self, executor: Executor) -> None:
        executor.submit(Job(5, 2, {"do": "report", "steps": 50}))
        events = collect(executor, 1)
        assert [e.kind for e in events] == ["progress"] * 50 + ["done"]
        assert {(e.trial, e.attempt) for e in events} == {(5, 2)}
        assert [e.payload["step"] for e in events[:-1]] == list(range(50))
        assert all(math.isnan(e.payload["loss"]) for e in events[:-1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.1 + 0.2, 5e-324])
    def test_floats_survive_the_way(self, executor: Executor, value: float) -> None:
        assert repr(run_one(executor, "return", value=value).payload["value"]) == repr(value)

    def test_ten_megabytes_are_fine_both_ways(self, executor: Executor) -> None:
        value = "x" * 10_000_000
        assert run_one(executor, "return", value=value).payload == {"value": value}

    def test_what_is_reported_and_returned_is_a_copy(self, executor: Executor) -> None:
        payload: dict[str, Any] = {"do": "echo", "list": [1]}
        executor.submit(Job(0, 1, payload))
        payload["list"] = "changed"
        assert collect(executor, 1)[-1].payload["payload"] == {"do": "echo", "list": [1]}

    @pytest.mark.parametrize(
        ("do", "kind", "found"),
        [
            ("raise", "builtins.ValueError", "ValueError: bad luck"),
            ("memory", "builtins.MemoryError", "MemoryError"),
            ("system exit", "builtins.SystemExit", "SystemExit: 3"),
            ("base exception", "builtins.BaseException", "very base"),
            ("recurse", "builtins.RecursionError", "maximum recursion depth"),
            ("unprintable", "tests.nas.executor_tasks.Unprintable", "Unprintable"),
            ("object", "builtins.TypeError", "the result must be JSON .* found builtins.object at ['a']['b'][1]"),
            ("bytes key", "builtins.TypeError", "the key b'k' (bytes) in ['a']"),
            ("cycle", "builtins.TypeError", "Circular"),
            ("list", "builtins.TypeError", "the result: expected a dict, got list"),
            ("none", "builtins.TypeError", "the result: expected a dict, got NoneType"),
            ("bad report", "builtins.TypeError", "a report must be JSON"),
        ],
    )
    def test_an_exception_is_data_and_the_next_job_runs(
        self, executor: Executor, do: str, kind: str, found: str
    ) -> None:
        event = run_one(executor, do, 3)
        assert (event.kind, event.trial, event.attempt, event.payload["type"]) == ("failed", 3, 1, kind)
        assert event.error is not None
        assert all(part in event.error for part in found.split(" .* "))
        assert "Traceback" in event.error
        assert "executor_tasks.py" in event.error or kind == "builtins.TypeError"
        assert run_one(executor, "return", 4, value=1).payload == {"value": 1}

    def test_a_traceback_begins_with_the_users_code(self, executor: Executor) -> None:
        lines = (run_one(executor, "raise").error or "").splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert "executor_tasks.py" in lines[1]

    def test_an_endless_message_is_shortened(self, executor: Executor) -> None:
        event = run_one(executor, "raise", text="y" * 1_000_000)
        assert event.error is not None
        assert len(event.error) < 50_000
        assert "characters left out" in event.error

    def test_what_a_job_prints_harms_nothing(self, executor: Executor) -> None:
        assert run_one(executor, "print", size=100_000).kind == "done"
        assert run_one(executor, "echo", 1).kind == "done"

    def test_a_full_executor_refuses_and_keeps_what_it_has(self, executor: Executor) -> None:
        for trial in range(executor.capacity):
            executor.submit(Job(trial, 1, {"do": "echo"}))
        with pytest.raises(RuntimeError, match=r"trial 99: the executor is full"):
            executor.submit(Job(99, 1, {}))
        assert {e.trial for e in collect(executor, executor.capacity)} == set(range(executor.capacity))

    def test_a_trial_is_held_once_at_a_time(self) -> None:
        with self.make() as executor:
            executor.submit(Job(1, 1, {}))
            with pytest.raises(ValueError, match="trial 1: expected one job of a trial at a time"):
                executor.submit(Job(1, 2, {}))
            collect(executor, 1)
            executor.submit(Job(1, 2, {}))
            assert collect(executor, 1)[0].attempt == 2

    def test_a_payload_that_is_not_json_is_refused_at_once(self, executor: Executor) -> None:
        with pytest.raises(TypeError, match=r"the payload of trial 0 must be JSON .* found builtins.object at \['x'\]"):
            executor.submit(Job(0, 1, {"x": object()}))
        assert run_one(executor).kind == "done"

    def test_polling_without_jobs_returns_at_once(self, executor: Executor) -> None:
        started = time.monotonic()
        assert executor.poll(30.0) == []
        assert time.monotonic() - started < 5

    def test_a_cancelled_job_is_never_heard_of_again(self, executor: Executor) -> None:
        executor.submit(Job(0, 1, {"do": "echo"}))
        assert executor.cancel(0)
        assert not executor.cancel(0)
        assert not executor.cancel(12)
        assert executor.poll(0.05) == []
        assert run_one(executor, "return", 0, value=2).payload == {"value": 2}

    def test_closing_twice_is_fine_and_nothing_runs_afterwards(self) -> None:
        executor = self.make()
        executor.submit(Job(0, 1, {"do": "sleep", "seconds": 30}))
        started = time.monotonic()
        executor.close()
        executor.close()
        assert time.monotonic() - started < 5
        with pytest.raises(RuntimeError, match="the executor is closed"):
            executor.submit(Job(1, 1, {}))
        assert executor.poll(0.0) == []

    @pytest.mark.parametrize(
        ("task", "kind", "found"),
        [
            (f"{TASK}:setpu", UnknownName, 'did you mean "setup"'),
            (f"{TASK}:not_a_function", UnknownName, "unknown task"),
            ("tests.nas.no_such_module:setup", UnknownName, "there is no module 'tests.nas.no_such_module'"),
            ("nomodule", UnknownName, 'expected a task "module:function"'),
            (f"{TASK}:setup_raises", EvaluationFailed, "ValueError: no such thing as luck"),
            (f"{TASK}:setup_exits", EvaluationFailed, "SystemExit: config missing"),
            (f"{TASK}:setup_returns_nothing", EvaluationFailed, "returned NoneType"),
            (f"{TASK}:setup_raises_ours", DataError, r"^digits\.csv: expected 64 columns, found 63$"),
        ],
    )
    def test_a_task_that_cannot_be_set_up_is_one_clear_error(self, task: str, kind: type[NasError], found: str) -> None:
        def use() -> None:
            with self.make(task) as executor:
                run_one(executor)

        with pytest.raises(kind, match=found):
            use()

    def test_the_setup_must_be_json(self) -> None:
        with pytest.raises(TypeError, match="the setup"):
            self.make(setup={"x": object()})


class TestInline(ExecutorLaws):
    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        return InlineExecutor(task, setup, **options)


class TestLocal(ExecutorLaws):
    def make(self, task: str = f"{TASK}:setup", setup: dict[str, Any] | None = None, **options: Any) -> Executor:
        return LocalExecutor(task, setup, **({"workers": 2} | options))


LAWS = {
    "inline": "test_executors",
    "local": "test_executors",
    "ray": "test_executor_ray",
    "tune": "test_executor_tune",
    "workers": "test_executor_workers",
    "nni": "test_executor_nni",
}
"""Executor -> file of this folder that has its subclass of `ExecutorLaws`."""


def test_every_registered_executor_is_under_these_laws() -> None:
    assert LAWS.keys() == EXECUTORS.keys()
    for name, file in LAWS.items():
        assert "(ExecutorLaws)" in Path(__file__).with_name(f"{file}.py").read_text(), name


@pytest.mark.parametrize("name", ["workers", "nni"])
def test_gpus_are_refused_where_nobody_shares_them_out(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"gpus_per_trial: executor {name} does not share out GPUs"):
        make_executor(name, f"{TASK}:setup", {}, Placement(gpus=0.5))
