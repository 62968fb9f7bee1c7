"""Curves for TensorBoard, read back as TensorBoard reads them: each epoch once, as in the run's database, whatever died."""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas import search
from nas.cli import main
from nas.errors import ConfigError
from nas.report.progress import SearchProgress
from nas.run import load_run
from nas.store import Trial
from nas.tensorboard import CURVES, TensorBoard, library
from tests.nas.search_helpers import start_search, write_config
from tests.nas.synthetic_run import OBJECTIVES, make_trial, sample

pytest.importorskip("tensorboardX")
Curves = dict[int, list[dict[str, Any]]]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> points in the order in which they came, without what a session's start took back. Every record must be whole."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in records(file):
            if event.HasField("session_log"):
                for tag in points:
                    points[tag] = [(step, value) for step, value in points[tag] if step < event.step]
            for value in event.summary.value if event.HasField("summary") else ():
                points[value.tag].append((event.step, value.simple_value))
    return dict(points)


def records(file: Path) -> list[Any]:
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        header = data[at : at + 8]
        (size,) = struct.unpack("<Q", header)
        body = data[at + 12 : at + 12 + size]
        for part, check in ((header, data[at + 8 : at + 12]), (body, data[at + 12 + size : at + 16 + size])):
            assert struct.unpack("<I", check)[0] == library().masked_crc32c(part)
        found.append(library().Event.FromString(body))
        at += 16 + size
    return found


def row(epoch: int, accuracy: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "train_loss": 1 / epoch,
        "val_loss": 2.0,
        "val_accuracy": accuracy,
        "lr": 0.1,
        "seconds": 3.0,
    }


def trial(number: int = 0, state: str = "complete", **changes: Any) -> Trial:
    rng = random.Random(number)
    return replace(make_trial(number, "random", number, state, sample(rng), rng), **changes)


def accuracies(folder: Path) -> list[tuple[int, float]]:
    return [(step, round(value, 4)) for step, value in read_back(folder).get("val_accuracy", [])]


def test_each_epoch_is_a_point_at_once_and_only_of_what_is_a_curve(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, {}.__getitem__)
    board.trial_progress(trial(), {"stage": "measuring"})
    assert not (tmp_path / "tensorboard").exists()
    for epoch in (1, 2):
        board.trial_progress(trial(), {"stage": "training", "epochs": 3, **row(epoch, epoch / 4)})
    found = read_back(tmp_path / "tensorboard" / "00000")
    assert set(found) == {"train_loss", "val_loss", "val_accuracy", "lr"}
    assert found["val_accuracy"] == [(1, 0.25), (2, 0.5)]


def test_at_the_end_there_are_the_decisions_and_the_metrics_once(tmp_path: Path) -> None:
    curves: Curves = {0: [row(1, 0.25), row(2, 0.5)]}
    done = trial(
        metrics={"val_accuracy": 0.5, "latency_ms": 1.5, "latency_source": "measured", "val_loss": float("nan")}
    )
    for _ in range(2):  # a second time after a restart
        TensorBoard(tmp_path, curves.__getitem__).trial_finished(done)
    found = read_back(tmp_path / "tensorboard" / "00000")
    assert found["final/latency_ms"] == [(2, 1.5)]
    assert "final/val_loss" not in found
    assert len(found["_hparams_/session_start_info"]) == 1
    assert found["val_accuracy"] == [(1, 0.25), (2, 0.5)]


def test_copies_and_trials_that_failed_at_once_leave_nothing(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, lambda number: [])
    board.trial_finished(trial(1, copy_of=0))
    board.trial_finished(trial(2, "failed"))
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_training_that_begins_again_takes_back_what_differs(tmp_path: Path, restarted: bool) -> None:
    curve = [row(epoch, 0.1 * epoch) for epoch in range(1, 6)]
    board = TensorBoard(tmp_path, {0: curve}.__getitem__)
    for other in [*curve[:2], row(3, 0.9), row(4, 0.9)]:  # on another machine
        board.trial_progress(trial(), other)
    if restarted:
        board = TensorBoard(tmp_path, {0: curve}.__getitem__)
    for again in curve:
        board.trial_progress(trial(), again)
    board.trial_finished(trial())
    assert accuracies(tmp_path / "tensorboard" / "00000") == [(e, round(0.1 * e, 4)) for e in range(1, 6)]


def test_equal_epochs_that_come_again_are_not_written_again(tmp_path: Path) -> None:
    curve = [row(epoch, 0.1 * epoch) for epoch in range(1, 4)]
    for _ in range(3):
        board = TensorBoard(tmp_path, {0: curve}.__getitem__)
        for one in curve:
            board.trial_progress(trial(), one)
    files = list((tmp_path / "tensorboard" / "00000").iterdir())
    assert len(files) == 1
    assert sum(event.HasField("summary") for event in records(files[0])) == 3


def test_an_epoch_nobody_told_of_is_there_when_the_trial_is_finished(tmp_path: Path) -> None:
    curve = [row(epoch, 0.1 * epoch) for epoch in range(1, 6)]
    board = TensorBoard(tmp_path, {0: curve}.__getitem__)
    for heard in (curve[0], curve[1], curve[4]):
        board.trial_progress(trial(), heard)
    board.trial_finished(trial())
    assert [epoch for epoch, _ in accuracies(tmp_path / "tensorboard" / "00000")] == [1, 2, 3, 4, 5]


def test_a_torn_record_is_left_behind_and_the_rest_goes_to_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard" / "00000"
    board = TensorBoard(tmp_path, {}.__getitem__)
    board.trial_progress(trial(), row(1, 0.1))
    board.trial_progress(trial(), row(2, 0.2))
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    board = TensorBoard(tmp_path, {}.__getitem__)
    for epoch in (2, 3):
        board.trial_progress(trial(), row(epoch, epoch / 10))
    (_, newer) = sorted(folder.iterdir())
    assert [event.step for event in records(newer) if event.HasField("summary")] == [2, 3]
    assert len(file.read_bytes()) > 0


def test_supernets_have_points_along_what_is_done_of_them(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, {}.__getitem__)
    reports: list[Mapping[str, Any]] = [
        {"phase": "search", "epoch": 1, "step": 3, "done": 0.05, "accuracy": None},
        {"phase": "search", "epoch": 2, "step": 0, "done": 0.1, "accuracy": 0.5},
        {"phase": "search", "epoch": 2, "step": 3, "done": 0.15, "accuracy": 0.5},
        {"phase": "search", "epoch": 3, "step": 0, "done": 0.2, "accuracy": 0.75},
    ]
    for report in reports:
        board.stage_progress("darts-s0", report)
    assert read_back(tmp_path / "tensorboard/oneshot/darts-s0") == {"supernet_accuracy": [(100, 0.5), (200, 0.75)]}


def test_no_file_is_held_open_and_finished_trials_are_forgotten(tmp_path: Path) -> None:
    handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    board = TensorBoard(tmp_path, lambda number: [row(1, 0.1)])
    for number in range(300):
        board.trial_progress(trial(number), row(1, 0.1))
    if handles is not None:
        assert len(os.listdir("/proc/self/fd")) == handles
    for number in range(300):
        board.trial_finished(trial(number))
    assert board._open == {}


def test_a_search_goes_on_where_its_curves_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    board = TensorBoard(tmp_path, lambda number: [])
    with SearchProgress({"random": 1}, OBJECTIVES, also=board) as progress:
        progress.trial_progress(trial(), row(1, 0.1))
        progress.trial_progress(trial(), row(2, 0.1))
        progress.trial_finished(trial())
    assert capsys.readouterr().err.count("TensorBoard gets nothing more") == 1


def test_without_a_package_it_is_said_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("tensorboardX.proto.event_pb2", "tensorboard.compat.proto.event_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="sparse-nas\\[watch\\]"):
        library()
    config, out = write_config(tmp_path, workers=0), tmp_path / "run"
    assert main(["search", str(config), "--out", str(out), "--set", "run.tensorboard=true"]) == 2
    assert not out.exists()


def test_of_a_search_that_was_killed_and_continued_the_points_are_the_curves_of_its_database(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, workers=1, trials=1, epochs=15), tmp_path / "run"
    more = ("--set", "run.tensorboard=true", "--set", "run.checkpoint_s=0.2")
    with start_search(config, out, *more) as first:
        try:
            until = time.monotonic() + 90
            while not list((out / "tensorboard").glob("*/events*")):
                assert first.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        finally:
            first.kill()
    search(config, out=out, quiet=True, workers=0, overrides={"run.tensorboard": True})
    run = load_run(out)
    checked = 0
    for one in run.trials:
        folder = out / "tensorboard" / f"{one.trial:05d}"
        curve = run.curve(one.trial) if one.copy_of is None else []
        found = read_back(folder)
        for tag in CURVES if curve else ():
            assert [step for step, _ in found[tag]] == [r["epoch"] for r in curve]
            assert [value for _, value in found[tag]] == pytest.approx([r[tag] for r in curve], rel=1e-6)
            checked += 1
        assert curve or not found
    assert checked
