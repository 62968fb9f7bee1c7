"""Files of one trial: whole or not at all, and honest about what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from safetensors import SafetensorError
from torch import nn

import nas.artifacts
from nas.artifacts import clean_scratch, load_weights, read_plan, trial_folder, write_artifacts
from nas.errors import RunError
from search_spaces import get_space

SPACE = get_space("mlp", input_shape=(8,), classes=3)
PLAN = pd.DataFrame([{"op": "0", "kind": "linear"}])


def write(folder: Path, model: nn.Module | None) -> Path:
    return write_artifacts(folder, 3, SPACE.sample(0), model=model, history=[{"epoch": 1}], plan=PLAN)


def test_a_second_attempt_replaces_the_first_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(2, 2))
    target = write(tmp_path, None)
    assert {path.name for path in target.iterdir()} == {"architecture.json", "history.csv", "plan.csv"}
    pd.testing.assert_frame_equal(read_plan(tmp_path, 3), PLAN)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_a_run_error_and_leaves_nothing_behind(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(nas.artifacts, "save_model", full)
    with pytest.raises(RunError, match="No space left on device"):
        write(tmp_path, nn.Linear(2, 2))
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_weights_that_are_missing_or_foreign_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no weights"):
        load_weights(tmp_path, 3, nn.Linear(2, 2))
    write(tmp_path, nn.Linear(2, 2))
    with pytest.raises(RunError, match="does not fit"):
        load_weights(tmp_path, 3, nn.Linear(5, 2))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage", b"a,b\n1,2\n"])
def test_a_damaged_plan_is_named(tmp_path: Path, content: bytes) -> None:
    trial_folder(tmp_path, 3).mkdir(parents=True)
    (trial_folder(tmp_path, 3) / "plan.csv").write_bytes(content)
    with pytest.raises(RunError, match=r"plan\.csv: damaged"):
        read_plan(tmp_path, 3)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = write(tmp_path, None)
    for name in ("artifacts/.00007.123", ".exported.abc"):
        (tmp_path / name).mkdir()
    for name in (".report.html.77", "run.db.new-wal", "run.db", "notes.txt"):
        (tmp_path / name).touch()
    clean_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"artifacts", "run.db", "notes.txt"}
    assert list((tmp_path / "artifacts").iterdir()) == [target]
