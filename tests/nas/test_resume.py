"""Laws of trials that are evaluated in parts: paused, killed, gone on with, equal bit for bit to one that never was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from nas.checkpoint import read_facts, read_newest
from nas.errors import RunError
from nas.training.methods.base import targets
from tests.nas.resume_cases import EPOCHS, Trial


class Stop(Exception):
    """Stands for whatever ends a job."""


def stop_after(trial: Trial, epoch: int) -> None:
    def report(info: dict[str, Any]) -> None:
        if info.get("epoch") == epoch:
            raise Stop

    trial.report = report  # type: ignore[method-assign]


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is different every time."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in answer["curve"]]
    return answer | {"curve": rows}


def assert_same_result(one: Trial, answer: dict[str, Any], two: Trial, other: dict[str, Any]) -> None:
    assert timeless(answer) == timeless(other)
    for name in ("weights.safetensors", "plan.csv", "architecture.json"):
        assert (one.artifacts / name).read_bytes() == (two.artifacts / name).read_bytes(), name
    mine, theirs = (pd.read_csv(trial.artifacts / "history.csv").drop(columns="seconds") for trial in (one, two))
    pd.testing.assert_frame_equal(mine, theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, dict[str, Any]]:
    trial = Trial(tmp_path_factory.mktemp("whole"))
    return trial, trial()


class TestPauses:
    def test_a_trial_in_segments_ends_as_in_one_go(self, whole, tmp_path):
        trial = Trial(tmp_path)
        for until in (1, 2, 5):
            answer = trial(until)
            assert answer["state"] == "paused"
            assert len(answer["curve"]) == until == answer["metrics"]["trained_epochs"]
        answer = trial()
        assert answer["state"] == "complete"
        assert_same_result(*whole, trial, answer)
        assert trial.pricer.asked == 1

    def test_a_paused_trial_has_the_metrics_of_its_last_epoch_and_can_be_built(self, whole, tmp_path):
        trial, complete = Trial(tmp_path), whole[1]
        answer = trial(2)
        assert answer["metrics"].keys() == complete["metrics"].keys() | {"trained_epochs"}
        assert timeless(answer)["curve"] == timeless(complete)["curve"][:2]
        for name in ("val_accuracy", "val_loss"):
            assert answer["metrics"][name] == complete["curve"][1][name]
        assert answer["metrics"]["density"] == complete["metrics"]["density"] == answer["curve"][-1]["density"]
        model = trial.space.build(trial.architecture)
        model.load_state_dict(load_file(trial.artifacts / "weights.safetensors"))
        assert len(pd.read_csv(trial.artifacts / "history.csv")) == 2

    def test_what_was_trained_already_is_answered_at_once(self, tmp_path):
        trial = Trial(tmp_path)
        first = trial(4)
        trial.reports.clear()
        for until in (4, 2):
            again = trial(until)
            assert trial.reports == []
            assert timeless(again)["curve"] == timeless(first)["curve"][:until]
            assert again["metrics"]["val_accuracy"] == first["curve"][until - 1]["val_accuracy"]
            assert again["metrics"]["trained_epochs"] == until

    def test_until_the_last_epoch_or_beyond_is_the_whole_training(self, whole, tmp_path):
        for number, until in enumerate((EPOCHS, EPOCHS + 5)):
            trial = Trial(tmp_path, number)
            answer = trial(until)
            assert_same_result(*whole, trial, answer)

    def test_a_network_that_costs_too_much_is_infeasible_at_once(self, tmp_path):
        trial = Trial(tmp_path, constraints={"params": "<= 10"})
        answer = trial(2)
        assert (answer["state"], answer["curve"]) == ("infeasible", [])
        assert not trial.checkpoints.exists()

    @pytest.mark.parametrize("method", ["gradual", "hydra"])
    def test_where_trainings_may_be_stopped_masks_are_final_when_they_are_first_judged(self, tmp_path, method):
        trial = Trial(tmp_path, stopping={"rule": "asha", "min_epochs": 2}, train={"method": method})
        curve = trial()["curve"]
        assert curve[0]["density"] > curve[1]["density"]
        assert {row["density"] for row in curve[1:]} == {curve[-1]["density"]}

    def test_given_masks_stay_as_they_were_given_over_a_pause(self, tmp_path):
        start = Trial(tmp_path).space.build(Trial(tmp_path).architecture)
        for _, layer in targets(start):
            layer.mask.copy_(torch.rand(layer.mask.shape) < 0.2)
        save_file(start.state_dict(), tmp_path / "start.safetensors")
        answers, ends = [], []
        for number, pauses in enumerate(([], [3])):
            trial = Trial(tmp_path, number)
            for until in pauses:
                trial(until, initial="start.safetensors")
            answers.append(timeless(trial(initial="start.safetensors")))
            ends.append(load_file(trial.artifacts / "weights.safetensors"))
        assert answers[0] == answers[1]
        for key, tensor in start.state_dict().items():
            assert torch.equal(ends[0][key], ends[1][key])
            assert torch.equal(ends[1][key], tensor) == key.endswith("mask")


class TestInterruptions:
    def test_a_job_that_ends_anywhere_is_gone_on_with_and_not_measured_again(self, whole, tmp_path):
        trial = Trial(tmp_path)
        for epoch in (1, 3, 4):
            stop_after(trial, epoch)
            with pytest.raises(Stop):
                trial()
            assert len(read_facts(trial.checkpoints)["training"]["history"]) == epoch
        del trial.report
        answer = trial()
        assert [info["epoch"] for info in trial.reports] == [5, 6]
        assert trial.pricer.asked == 1
        assert_same_result(*whole, trial, answer)

    def test_a_process_killed_in_the_middle_loses_one_epoch_at_most(self, tmp_path):
        method = "hydra"  # whose scores are trained just then
        command = [sys.executable, "-m", "tests.nas.resume_cases", str(tmp_path / "killed"), "4", method]
        process = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=300, check=False)
        assert process.returncode == -signal.SIGKILL
        killed = Trial(tmp_path / "killed", train={"method": method})
        assert len(read_facts(killed.checkpoints)["training"]["history"]) == 4
        answer = killed()
        assert [info["epoch"] for info in killed.reports] == [5, 6]
        never = Trial(tmp_path / "never", train={"method": method})
        assert_same_result(never, never(), killed, answer)

    def test_checkpoints_are_written_at_pauses_and_when_the_time_has_come(self, tmp_path):
        rare = Trial(tmp_path, 0).with_checkpoints_every(1000.0)
        stop_after(rare, EPOCHS)
        with pytest.raises(Stop):
            rare()
        assert not rare.checkpoints.exists()
        del rare.report
        rare(2)
        assert len(list(rare.checkpoints.iterdir())) == 1
        often = Trial(tmp_path, 1)
        often(4)
        assert len(read_facts(often.checkpoints)["training"]["history"]) == 4
        assert len(list(often.checkpoints.iterdir())) == 2

    def test_an_answer_that_was_lost_is_given_again_with_its_files(self, whole, tmp_path):
        trial = Trial(tmp_path)
        first = trial(3)
        shutil.rmtree(trial.artifacts)
        assert timeless(trial(3)) == timeless(first)
        assert (trial.artifacts / "weights.safetensors").is_file()
        assert_same_result(*whole, trial, trial())

    def test_a_full_disk_ends_the_run_and_not_the_trial(self, whole, tmp_path, monkeypatch):
        trial = Trial(tmp_path)
        trial(2)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match="cannot write a checkpoint of the training: No space left on device"):
                trial(4)
        assert_same_result(*whole, trial, trial())

    def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(self, whole, tmp_path):
        trial = Trial(tmp_path)
        trial(4)
        older, newest = sorted(trial.checkpoints.iterdir())
        newest.write_bytes(newest.read_bytes()[:-100])
        trial.reports.clear()
        answer = trial()
        assert [info["epoch"] for info in trial.reports] == [4, 5, 6]
        assert (trial.checkpoints / f".{newest.name}.damaged").is_file()
        assert older.name < newest.name
        assert_same_result(*whole, trial, answer)

    def test_where_all_checkpoints_are_damaged_the_training_begins_again(self, whole, tmp_path):
        trial = Trial(tmp_path)
        trial(2)
        for path in list(trial.checkpoints.iterdir()):
            path.write_bytes(b"")
        assert_same_result(*whole, trial, trial())
        assert trial.pricer.asked == 2

    def test_the_checkpoint_of_another_training_is_refused(self, tmp_path):
        Trial(tmp_path)(2)
        with pytest.raises(RunError, match=r"a checkpoint of another training: expected seed = 1, found seed = 0"):
            Trial(tmp_path, seed=1)(4)
        with pytest.raises(RunError, match=r"another training: expected train.lr = 0.5"):
            Trial(tmp_path, train={"lr": 0.5})(4)
        with pytest.raises(RunError, match=r"another training: expected settle_epochs = 2"):
            Trial(tmp_path, stopping={"rule": "asha", "min_epochs": 2})(4)


class TestSettings:
    def test_factors_hold_from_then_on_and_are_in_the_history(self, whole, tmp_path):
        trial = Trial(tmp_path)
        trial(2)
        curve = trial(4, settings={"lr": 0.5, "weight_decay": 2.0})["curve"]
        usual = whole[1]["curve"]
        assert timeless({"curve": curve[:2]}) == timeless({"curve": usual[:2]})
        assert [row.get("lr_scale") for row in curve] == [None, None, 0.5, 0.5]
        assert [row.get("weight_decay_scale") for row in curve] == [None, None, 2.0, 2.0]
        assert [row["lr"] for row in curve[2:]] == [0.5 * row["lr"] for row in usual[2:4]]
        curve = trial(5)["curve"]
        assert (curve[4]["lr_scale"], curve[4]["lr"]) == (0.5, 0.5 * usual[4]["lr"])
        curve = trial(settings={"lr": 2.0})["curve"]  # of the config's value, not of the last one
        assert (curve[5]["lr_scale"], curve[5]["lr"]) == (2.0, 2.0 * usual[5]["lr"])
        assert curve[5]["weight_decay_scale"] == 2.0

    def test_weight_decay_is_multiplied(self, tmp_path):
        norms = []
        for number, factor in enumerate((1.0, 400.0)):
            trial = Trial(tmp_path, number)
            trial(1)
            trial(3, settings={"weight_decay": factor})
            weights = load_file(trial.artifacts / "weights.safetensors")
            norms.append(sum(float(w.norm()) for key, w in weights.items() if key.endswith("weight") and w.ndim > 1))
        assert norms[1] < 0.8 * norms[0]

    @pytest.mark.parametrize("settings", [{"momentum": 2.0}, {"lr": 0.0}, {"lr": float("nan")}])
    def test_senseless_factors_are_refused(self, tmp_path, settings):
        with pytest.raises(ValueError, match="expected factors above 0 of lr, weight_decay; got"):
            Trial(tmp_path)(1, settings=settings)


class TestDonors:
    def test_weights_are_the_donors_and_the_history_is_ones_own(self, tmp_path):
        donor, trial = Trial(tmp_path, 7, seed=1), Trial(tmp_path, 3)
        donor(3)
        before = trial(2)
        kept, _ = read_newest(donor.checkpoints)
        answer = trial(3, donor="checkpoints/00007", settings={"lr": 1e-9})
        assert timeless(answer)["curve"][:2] == timeless(before)["curve"]
        assert answer["curve"][2]["donor"] == 7
        mine = read_newest(trial.checkpoints)[0].tensors
        for key, tensor in kept.tensors.items():
            if key.startswith("model/") and key.endswith(("weight", "mask")) and tensor.ndim > 1:
                assert torch.allclose(mine[key].float(), tensor.float(), atol=1e-5), key
        assert "donor" not in trial(4)["curve"][3]

    def test_they_are_taken_once_per_segment_however_often_it_is_started(self, tmp_path):
        donor, trial, same = Trial(tmp_path, 7, seed=1), Trial(tmp_path, 3), Trial(tmp_path, 4)
        donor(2)
        for one in (trial, same):
            one(2)
        stop_after(trial, 4)
        with pytest.raises(Stop):
            trial(5, donor="checkpoints/00007")
        del trial.report
        answer = trial(5, donor="checkpoints/00007")
        assert [row.get("donor") for row in answer["curve"]] == [None, None, 7, None, None]
        assert timeless(answer) == timeless(same(5, donor="checkpoints/00007"))

    @pytest.mark.parametrize("space", [{"widths": [32]}, {"densities": [0.6]}])  # the second one has the same shapes
    def test_a_donor_that_is_gone_or_another_network_changes_nothing(self, whole, tmp_path, space):
        trial, other = Trial(tmp_path, 3), Trial(tmp_path, 7, space=space)
        other(2)
        trial(2)
        trial(3, donor="checkpoints/00007")
        assert_same_result(*whole, trial, trial(donor="checkpoints/00009"))
