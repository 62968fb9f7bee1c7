"""The simulated engine: what it promises of time, of faults and of workers that come and go."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest

from nas.errors import ConfigError, RunError
from nas.executors.base import Event, Job
from nas.simulate import Faults, Group, Result, SimulatedExecutor
from search_spaces.architecture import Architecture

SECOND = 1_000_000_000


class Fixed:
    """Every training takes the same time; the accuracy after epoch e is e / 100."""

    def __init__(self, seconds: float = 10.0, epochs: int = 5, state: Any = "complete") -> None:
        self.seconds, self.epochs, self.state = seconds, epochs, state

    def result(self, architecture: Architecture, seed: int) -> Result:
        rows = [{"epoch": e, "val_accuracy": e / 100} for e in range(1, self.epochs + 1)]
        return Result({"val_accuracy": self.epochs / 100, "latency_ms": 1.0}, rows, self.seconds, self.state)


def job(trial: int, attempt: int = 1, **more: Any) -> Job:
    architecture = Architecture("s", (("d", trial),), f"{trial:016x}")
    return Job(trial, attempt, {"trial": trial, "architecture": architecture.to_json(), "seed": 0, **more})


def run_all(executor: SimulatedExecutor, trials: int) -> list[Event]:
    """Keep the executor full until all trials are done; lost ones start again."""
    waiting, events = [job(n) for n in range(trials)], []
    while True:
        for _ in range(executor.capacity - len(executor._held)):
            if waiting:
                executor.submit(waiting.pop(0))
        if not waiting and not executor._held:
            return events
        for event in executor.poll():
            events.append(event)
            if event.kind == "lost":
                waiting.insert(0, job(event.trial, event.attempt + 1))


@pytest.mark.parametrize(("trials", "workers"), [(1, 1), (7, 3), (9, 3), (10, 3), (5, 100)])
@pytest.mark.parametrize("seconds", [0.1, 1 / 3, 7.0])
def test_equal_trials_take_as_many_rounds_as_workers_need_exactly(trials: int, workers: int, seconds: float) -> None:
    executor = SimulatedExecutor(Fixed(seconds), workers)
    run_all(executor, trials)
    assert max(stay.end for stay in executor.stays) == math.ceil(trials / workers) * round(seconds * SECOND)
    assert executor.utilisation == pytest.approx(trials / (math.ceil(trials / workers) * workers))


def test_a_hundred_thousandth_worker_is_no_different() -> None:
    executor = SimulatedExecutor(Fixed(), 100_000)
    for n in range(1000):
        executor.submit(job(n))
    assert len(executor.poll()) == 1000
    assert executor.now == 10 * SECOND


def test_segments_take_as_long_as_the_whole_and_show_the_same_curve() -> None:
    executor = SimulatedExecutor(Fixed(1 / 3, epochs=7), 1)
    for until in (1, 3):
        executor.submit(job(0, until=until))
        (event,) = executor.poll()
        assert event.payload["state"] == "paused"
        assert [row["epoch"] for row in event.payload["curve"]] == list(range(1, until + 1))
        assert event.payload["metrics"]["val_accuracy"] == until / 100
        assert event.payload["metrics"]["trained_epochs"] == until
    executor.submit(job(0, until=2))  # its checkpoint is further already
    (event,) = executor.poll()
    assert (event.payload["state"], event.duration_s, len(event.payload["curve"])) == ("paused", 0.0, 2)
    executor.submit(job(0))
    (event,) = executor.poll()
    assert (event.payload["state"], len(event.payload["curve"])) == ("complete", 7)
    assert "trained_epochs" not in event.payload["metrics"]
    assert executor.now == round(SECOND / 3)
    assert sum(stay.epochs for stay in executor.stays) == 7


def test_a_budget_beyond_the_end_is_the_end() -> None:
    executor = SimulatedExecutor(Fixed(), 1)
    executor.submit(job(0, until=5))
    assert executor.poll()[0].payload["state"] == "complete"


def test_what_is_never_trained_takes_its_time_and_says_so() -> None:
    executor = SimulatedExecutor(Fixed(3.0, epochs=0, state="infeasible"), 1)
    executor.submit(job(0, until=2))
    (event,) = executor.poll()
    assert (event.payload["state"], event.payload["curve"], event.duration_s) == ("infeasible", [], 3.0)


def test_progress_comes_at_every_epoch_in_order_and_changes_nothing_else() -> None:
    loud, quiet = SimulatedExecutor(Fixed(), 2, progress=True), SimulatedExecutor(Fixed(), 2)
    for n in range(2):
        loud.submit(job(n, until=3))
        quiet.submit(job(n, until=3))
    seen: list[tuple[int, int, str, Any]] = []
    while events := loud.poll():
        seen += [(loud.now, e.trial, e.kind, e.payload.get("epoch")) for e in events]
    assert [s for s in seen if s[1] == 0] == [
        *((2 * e * SECOND, 0, "progress", e) for e in (1, 2, 3)),
        (6 * SECOND, 0, "done", None),
    ]
    quiet.poll()
    assert loud.stays == quiet.stays


def test_lost_attempts_run_again_and_every_trial_is_done_once() -> None:
    executor = SimulatedExecutor(Fixed(), 3, faults=Faults(lost=0.4), seed=3)
    events = run_all(executor, 50)
    assert Counter(e.trial for e in events if e.kind == "done") == dict.fromkeys(range(50), 1)
    lost = [e for e in events if e.kind == "lost"]
    assert 10 < len(lost) < 80
    assert all(0 <= (e.duration_s or 0) < 10 for e in lost)
    assert len(executor.stays) == 50 + len(lost)
    assert executor.utilisation <= 1


def test_the_share_and_the_moment_of_lost_attempts_are_as_asked_for_in_segments_too() -> None:
    executor = SimulatedExecutor(Fixed(), 1, faults=Faults(lost=0.3))
    moments = []
    for trial in range(500):
        began = executor.now
        for until in (1, 3, 5):
            executor.submit(job(trial, until=until))
            if executor.poll()[0].kind == "lost":
                moments.append((executor.now - began) / SECOND)
                break
    assert abs(len(moments) / 500 - 0.3) < 0.06
    assert abs(sum(moments) / len(moments) - 5.0) < 0.6  # evenly over ten seconds


def test_what_is_lost_goes_on_from_its_last_pause() -> None:
    executor = SimulatedExecutor(Fixed(), [Group(1, leaves_s=7.0), Group(1, joins_s=20.0)])
    executor.submit(job(0, until=2))
    executor.poll()
    executor.submit(job(0))
    (event,) = executor.poll()
    assert (event.kind, event.duration_s, event.payload) == ("lost", 3.0, {"blameless": True})
    assert executor.capacity == 0
    assert executor.poll() == []  # nothing held, nobody there: the clock goes on to the next group
    assert (executor.capacity, executor.now) == (1, 20 * SECOND)
    executor.submit(job(0, 2))
    assert executor.poll()[0].payload["state"] == "complete"
    assert executor.now == 26 * SECOND  # three epochs of two seconds
    assert [stay.epochs for stay in executor.stays] == [2, 1, 3]


def test_a_trial_that_fails_for_good_fails_in_every_attempt_at_the_same_point() -> None:
    executor = SimulatedExecutor(Fixed(), 1, faults=Faults(failed=1.0))
    ends = set()
    for attempt in (1, 2):
        executor.submit(job(4, attempt))
        (event,) = executor.poll()
        assert event.kind == "failed"
        assert event.payload["type"] == "nas.errors.EvaluationFailed"
        ends.add(event.duration_s)
    assert len(ends) == 1


def test_a_result_that_is_a_failure_fails_at_its_end() -> None:
    executor = SimulatedExecutor(Fixed(state="failed"), 1)
    executor.submit(job(0, until=2))
    assert executor.poll()[0].payload["state"] == "paused"
    executor.submit(job(0))
    assert executor.poll()[0].kind == "failed"
    assert executor.now == 10 * SECOND


def test_stragglers_are_late_and_give_the_same_results() -> None:
    slow, fast = SimulatedExecutor(Fixed(), 4, faults=Faults(stragglers=0.3, factor=10)), SimulatedExecutor(Fixed(), 4)
    late, early = run_all(slow, 40), run_all(fast, 40)
    assert slow.makespan_s > fast.makespan_s
    assert {e.trial: e.payload for e in late} == {e.trial: e.payload for e in early}
    assert {e.duration_s for e in late} == {10.0, 100.0}


def test_workers_that_join_are_used_and_those_that_left_are_not() -> None:
    executor = SimulatedExecutor(Fixed(), [Group(2, leaves_s=25.0), Group(3, joins_s=5.0)])
    assert executor.capacity == 2
    events = run_all(executor, 12)
    assert sum(e.kind == "lost" for e in events) == 2
    assert all(stay.start >= 5 * SECOND for stay in executor.stays if stay.worker >= 2)
    assert all(stay.end <= 25 * SECOND for stay in executor.stays if stay.worker < 2)
    assert executor.capacity == 3
    overlaps = sorted((stay.worker, stay.start, stay.end) for stay in executor.stays)
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(overlaps) if a[0] == b[0])
    assert executor.utilisation <= 1


def test_an_idle_worker_that_left_gets_no_job() -> None:
    executor = SimulatedExecutor(Fixed(), [Group(2, leaves_s=5.0), Group(1, joins_s=1.0)])
    executor.submit(job(0))
    while not (events := executor.poll()):
        pass
    assert (events[0].kind, executor.now) == ("lost", 5 * SECOND)
    executor.submit(job(0, 2))
    executor.poll()
    assert [stay.worker for stay in executor.stays] == [0, 2]


def test_a_job_that_ends_when_its_node_leaves_has_ended() -> None:
    executor = SimulatedExecutor(Fixed(), [Group(1, leaves_s=10.0), Group(1)])
    executor.submit(job(0))
    assert executor.poll()[0].kind == "done"


def test_without_any_worker_to_come_the_caller_is_told() -> None:
    executor = SimulatedExecutor(Fixed(), [Group(1, leaves_s=1.0)])
    executor.submit(job(0))
    assert executor.poll()[0].kind == "lost"
    with pytest.raises(RunError, match="all groups have left"):
        executor.poll()


def test_a_cancelled_job_is_not_heard_of_again_and_frees_its_worker() -> None:
    executor = SimulatedExecutor(Fixed(), 1)
    executor.submit(job(0))
    assert executor.cancel(0)
    assert not executor.cancel(0)
    executor.submit(job(1))
    assert [e.trial for e in executor.poll()] == [1]
    assert executor.poll() == []


def test_it_refuses_what_every_executor_refuses() -> None:
    executor = SimulatedExecutor(Fixed(), 2)
    executor.submit(job(0))
    with pytest.raises(ValueError, match="one job of a trial"):
        executor.submit(job(0))
    with pytest.raises(TypeError, match="must be JSON"):
        executor.submit(job(1, bad={1, 2}))
    executor.submit(job(1))
    with pytest.raises(RuntimeError, match="full"):
        executor.submit(job(2))
    executor.close()
    executor.close()
    assert executor.poll() == []
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(job(3))


def test_the_time_to_start_a_job_is_paid_by_every_segment() -> None:
    executor = SimulatedExecutor(Fixed(), 1, start_s=1.5)
    for until in (2, 5):
        executor.submit(job(0, until=until))
        executor.poll()
    assert executor.now == 13 * SECOND


def test_a_slow_driver_leaves_workers_idle_where_its_time_is_charged() -> None:
    executor = SimulatedExecutor(Fixed(1e-6), 1, charge_driver=True)
    run_all(executor, 20)
    assert 0 < executor.utilisation < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Group(0),
        lambda: Group(1, joins_s=3.0, leaves_s=3.0),
        lambda: Group(1, joins_s=math.nan),
        lambda: Faults(lost=1.5),
        lambda: Faults(factor=0.5),
        lambda: SimulatedExecutor(Fixed(), []),
    ],
)
def test_nonsense_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected|must"):
        wrong()
