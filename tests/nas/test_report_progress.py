"""What a running search shows: right counts, no word on standard output, plain lines off a terminal."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from nas.pareto import nondominated
from nas.report.pace import GrowingFront, Pace
from nas.report.progress import SearchProgress
from nas.report.stage_progress import StageTally
from nas.report.tally import Tally
from nas.store import Trial
from tests.nas.synthetic_run import OBJECTIVES, make_trial, sample, synthetic_run

RUN = synthetic_run(30, failed=0.1, infeasible=0.1)
TOTALS = {"random": 15, "nsga2": 15, "dense": 2}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(terminal: bool, **options) -> tuple[SearchProgress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return SearchProgress(TOTALS, OBJECTIVES, console=console, **options), out


def test_the_tally_counts_what_the_trials_say():
    tally = Tally(TOTALS, OBJECTIVES)
    for trial in RUN.trials:
        tally.started(trial)
        assert trial.trial in tally.running
        tally.finished(trial)
    states = RUN.frame()["state"].value_counts().to_dict()
    assert tally.states == {"complete": 0, "infeasible": 0, "stopped": 0, "failed": 0} | states
    assert tally.done == {"random": 15, "nsga2": 15, "dense": 2}
    assert tally.running == {}


def test_best_and_front_are_those_of_all_feasible_trials():
    tally = Tally(TOTALS, OBJECTIVES)
    for trial in RUN.trials:
        tally.finished(trial)
    done = RUN.frame().query("state == 'complete'")
    assert len(tally.front) == nondominated(done, OBJECTIVES).sum()
    best = done.sort_values(["val_accuracy", "latency_ms"], ascending=[False, True]).iloc[0]
    assert tally.best is not None
    assert tally.best.trial == best["trial"]


def test_an_infeasible_trial_is_never_the_best():
    rng = random.Random(0)
    tally = Tally({"random": 1}, OBJECTIVES)
    tally.finished(make_trial(0, "random", 0, "infeasible", sample(rng), rng, val_accuracy=1.0, latency_ms=0.1))
    assert tally.best is None
    assert "no feasible trial yet" in tally.line()


def test_rate_and_time_left_count_only_what_this_process_did():
    clock = Clock()
    tally = Tally({"random": 15, "nsga2": 15}, OBJECTIVES, clock)
    for trial in RUN.trials[:10]:
        tally.finished(trial, earlier=True)
    assert tally.seconds_left() is None
    clock.now += 60
    for trial in RUN.trials[10:15]:
        tally.finished(trial)
    assert tally.rate() == pytest.approx(5 / 60)
    assert tally.seconds_left() == pytest.approx(15 * 60 / 5)
    assert "5.0 trials/min, 1 min 00 s spent, about 3 min 00 s left" in tally.line()


def finish(tally: Tally, clock: Clock, count: int, every_s: float) -> None:
    for _ in range(count):
        clock.now += every_s
        tally.finished(RUN.trials[0])


def test_the_rate_is_that_of_lately_not_since_the_start():
    clock = Clock()
    tally = Tally({"random": 1000}, OBJECTIVES, clock)
    finish(tally, clock, 60, 100.0)
    assert tally.rate() == pytest.approx(1 / 100, rel=0.01)
    finish(tally, clock, 120, 10.0)  # ten minutes and more at another pace
    assert tally.rate() == pytest.approx(1 / 10, rel=0.02)
    left = 1000 - 180
    assert tally.seconds_left() == pytest.approx(left * 10, rel=0.02)


def test_workers_that_come_and_go_change_the_rate_at_once():
    clock = Clock()
    tally = Tally({"random": 10_000}, OBJECTIVES, clock)
    tally.workers(10, 10)
    finish(tally, clock, 100, 6.0)  # ten workers, a minute per trial
    assert tally.rate() == pytest.approx(10 / 60, rel=0.02)
    tally.workers(10, 40)
    assert tally.rate() == pytest.approx(40 / 60, rel=0.02)
    tally.workers(5, 5)
    assert tally.rate() == pytest.approx(5 / 60, rel=0.02)


def test_without_workers_there_is_no_rate_and_the_time_does_not_count():
    clock = Clock()
    tally = Tally({"random": 10_000}, OBJECTIVES, clock)
    tally.workers(0, 0)
    clock.now += 3600
    assert tally.speed() == "waiting for workers, 1 h 00 min spent"
    tally.workers(10, 10)
    finish(tally, clock, 100, 6.0)
    rate = tally.rate()
    assert rate == pytest.approx(10 / 60, rel=0.02)
    assert tally.speed().startswith("10 workers busy, 0 free, 10 trials/min")
    tally.workers(3, 0)
    clock.now += 3600
    assert (tally.rate(), tally.seconds_left()) == (0.0, None)
    assert "waiting for workers (3 trials wait with them)" in tally.line()
    tally.workers(10, 10)
    assert tally.rate() == pytest.approx(rate)


def test_the_first_round_of_many_workers_is_not_taken_for_their_rate():
    clock = Clock()
    tally = Tally({"random": 10_000}, OBJECTIVES, clock)
    tally.workers(1000, 1000)
    clock.now += 3600
    finish(tally, clock, 1000, 0.9)  # all began together: they end within a quarter of an hour of each other
    assert tally.rate() == pytest.approx(1000 / 4500, rel=0.02)


def test_at_the_end_only_the_workers_count_that_have_something_to_do():
    clock = Clock()
    tally = Tally({"random": 103}, OBJECTIVES, clock)
    tally.workers(10, 10)
    finish(tally, clock, 100, 6.0)
    assert tally.seconds_left() == pytest.approx(60, rel=0.02)  # three trials, side by side


def test_lost_attempts_are_counted_and_the_trial_is_one_all_the_same():
    tally = Tally(TOTALS, OBJECTIVES)
    trial = RUN.trials[0]
    for _ in range(2):
        tally.started(trial)
        tally.attempt_lost(trial)
        assert not tally.running
    tally.started(trial)
    tally.finished(trial)
    assert tally.line().startswith("1/32 trials")
    assert tally.outcome().endswith("2 attempts lost")


def test_stopped_trials_are_counted_and_are_never_the_best_nor_on_the_front():
    rng = random.Random(0)
    tally = Tally({"random": 2}, OBJECTIVES)
    tally.finished(make_trial(0, "random", 0, "stopped", sample(rng), rng, val_accuracy=1.0, latency_ms=0.1))
    assert tally.best is None
    assert len(tally.front) == 0
    assert "1 stopped early" in tally.line()


@pytest.mark.parametrize("directions", [("max",), ("max", "min"), ("min", "max", "min")])
def test_a_growing_front_is_the_front_of_all_points_ties_included(directions: tuple[str, ...]):
    rng = random.Random(len(directions))
    points = [tuple(float(rng.randrange(12)) for _ in directions) for _ in range(300)]
    front = GrowingFront({f"m{i}": direction for i, direction in enumerate(directions)})
    for n, point in enumerate(points, start=1):
        front.add(front.cost(point))
        assert len(front) == nondominated(points[:n], directions).sum()


def test_the_rate_forgets_nothing_and_keeps_little_over_many_finishes():
    clock = Clock()
    pace = Pace(clock)
    for _ in range(50_000):
        clock.now += 0.5
        pace.finished()
    assert pace.per_worker() == pytest.approx(2.0, rel=0.01)
    assert len(pace._bins) < 150


def test_a_running_trial_shows_its_epoch():
    tally = Tally(TOTALS, OBJECTIVES)
    tally.started(RUN.trials[0])
    tally.progressed(RUN.trials[0], {"stage": "training", "epoch": 3, "epochs": 12})
    tally.progressed(RUN.trials[1], {"stage": "measuring"})
    assert tally.under_way() == "0 random epoch 3/12 · 1 nsga2 measuring"


def test_off_a_terminal_a_line_comes_now_and_then_and_at_the_end():
    clock = Clock()
    shown, out = progress(False, every_s=15.0, clock=clock)
    with shown:
        for trial in RUN.trials[:8]:
            shown.trial_started(trial)
            shown.trial_finished(trial)
            clock.now += 5
        shown.message("hello [bold]world")
    lines = out.getvalue().splitlines()
    counts = [line for line in lines if "/32 trials" in line]
    assert [line.split("/")[0] for line in counts] == ["3", "6", "8"]
    assert "hello [bold]world" in lines
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_display_shows_bars_best_and_what_runs():
    shown, out = progress(True)
    with shown:
        for trial in RUN.trials[:8]:
            shown.trial_started(trial)
            shown.trial_progress(trial, {"epoch": 1, "epochs": 12})
            shown.trial_finished(trial)
        shown.trial_started(RUN.trials[8])
        shown.message("note")
    text = out.getvalue()
    for wanted in ("4/15", "best: trial", "front of", "note", "running: 8 random", "trials/min"):
        assert wanted in text, wanted


def test_lines_keep_coming_while_nobody_works_and_say_so_at_once():
    clock = Clock()
    shown, out = progress(False, every_s=15.0, clock=clock)
    with shown:
        shown.workers(0, 0)
        assert out.getvalue().count("waiting for workers") == 1
        for _ in range(60):
            clock.now += 0.5
            shown.workers(0, 0)
        assert out.getvalue().count("waiting for workers") == 3
        shown.workers(0, 2)
        assert "0 workers busy, 2 free" in out.getvalue()


def test_others_who_listen_are_told_of_trials_and_supernets():
    told: list[object] = []

    class Listener:
        def trial_progress(self, trial: Trial, info: Mapping[str, Any]) -> None:
            told.append((trial.trial, info["epoch"]))

        def trial_finished(self, trial: Trial) -> None:
            told.append(trial.trial)

        def stage_progress(self, job: str, info: Mapping[str, Any]) -> None:
            told.append(job)

    shown, _ = progress(False, quiet=True, also=Listener())
    with shown:
        shown.stage_started(STAGE)
        shown.stage_progress("darts-s1", at(0.5, 5))
        shown.stage_ended()
        shown.trial_started(RUN.trials[0])
        shown.trial_progress(RUN.trials[0], {"epoch": 1})
        shown.trial_finished(RUN.trials[0])
    assert told == ["darts-s1", (0, 1), 0]


def test_quiet_shows_nothing():
    for terminal in (True, False):
        shown, out = progress(terminal, quiet=True)
        with shown:
            shown.message("x")
            shown.trial_finished(RUN.trials[0])
        assert out.getvalue() == ""


def test_a_failure_is_said_once_with_its_last_line_and_copies_of_it_are_not():
    rng = random.Random(0)
    failed = make_trial(0, "random", 0, "failed", sample(rng), rng)
    copy = make_trial(1, "random", 1, "failed", sample(rng), rng)
    object.__setattr__(copy, "copy_of", 0)
    shown, out = progress(False)
    with shown:
        shown.trial_finished(failed)
        shown.trial_finished(copy)
    assert out.getvalue().count("failed: RuntimeError: mat1 and mat2") == 1


def test_a_continued_search_starts_from_what_is_done():
    shown, _ = progress(False)
    shown.already(synthetic_run(20, unfinished=5).trials)
    assert sum(shown.tally.done.values()) == 17


def test_results_on_standard_output_are_not_disturbed(capsys):
    with SearchProgress(TOTALS, OBJECTIVES) as shown:
        shown.trial_finished(RUN.trials[0])
        shown.message("x")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "x" in captured.err


def test_an_error_inside_goes_through_and_the_display_ends():
    shown, _ = progress(True)
    with pytest.raises(KeyError), shown:
        raise KeyError("x")
    assert shown._live is None


def test_a_searcher_that_was_not_announced_is_counted():
    tally = Tally({}, OBJECTIVES)
    tally.finished(RUN.trials[0])
    assert tally.line().startswith("1/0 trials (random 1/0)")


STAGE = {"darts-s0": True, "darts-s1": False, "darts-s2": False}


def at(done: float, epoch: int, accuracy: float | None = None) -> dict[str, object]:
    return {"phase": "search", "epoch": epoch, "epochs": 10, "done": done, "accuracy": accuracy}


def test_a_supernet_shows_phase_epoch_accuracy_and_the_time_left_at_its_pace_here():
    clock = Clock()
    tally = StageTally(STAGE, clock)
    assert [tally.state(job) for job in STAGE] == ["done", "waiting", "waiting"]
    tally.progressed("darts-s1", at(0.5, 5, 0.25))  # continued: half was done by an earlier process
    assert tally.seconds_left("darts-s1") is None
    clock.now += 60
    tally.progressed("darts-s1", at(0.6, 6, 0.5))
    assert tally.seconds_left("darts-s1") == pytest.approx(240)
    assert tally.state("darts-s1") == "search epoch 6/10, supernet accuracy 0.5000, about 4 min 00 s left"
    assert tally.line().startswith("1/3 supernets; darts-s1 search epoch 6/10")
    tally.finished("darts-s1")
    tally.finished("darts-s2", failed=True)
    assert [tally.state(job) for job in STAGE] == ["done", "done", "failed"]
    assert [tally.share(job) for job in STAGE] == [1.0, 1.0, 0.0]
    assert tally.line() == "2/3 supernets"


def test_a_supernet_that_fell_back_to_its_checkpoint_has_a_pace_from_there():
    clock = Clock()
    tally = StageTally({"darts-s0": False}, clock)
    tally.progressed("darts-s0", at(0.0, 1))
    clock.now += 100
    tally.progressed("darts-s0", at(0.5, 5))
    clock.now += 1000  # its node died and another was waited for
    tally.progressed("darts-s0", at(0.4, 4))
    clock.now += 20
    tally.progressed("darts-s0", at(0.5, 5))
    assert tally.seconds_left("darts-s0") == pytest.approx(100)


def test_supernets_have_a_bar_each_and_give_way_to_the_trials():
    shown, out = progress(True)
    with shown:
        shown.stage_started(STAGE)
        shown.stage_progress("darts-s1", at(0.5, 5))
        shown._console.print(shown._render())
        shown.stage_ended()
        shown.expect({"darts": 6, "darts/random": 6})
        shown._console.print(shown._render())
    text = out.getvalue()
    assert "search epoch 5/10" in text
    assert "waiting" in text
    assert "darts/random" in text.rpartition("waiting")[2]
    assert shown.tally.totals == TOTALS | {"darts": 6, "darts/random": 6}


def test_off_a_terminal_the_stage_is_a_line_now_and_then_and_its_time_is_not_the_trials():
    clock = Clock()
    shown, out = progress(False, every_s=10.0, clock=clock)
    with shown:
        shown.stage_started(STAGE)
        for second in range(1, 31):
            clock.now += 1
            shown.stage_progress("darts-s1", at(second / 100, 1))
        assert out.getvalue().count("supernets") == 3
        shown.stage_ended()
        assert shown.tally.seconds() == 0
