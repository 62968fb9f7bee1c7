"""The whole path, on digits in seconds: what a search leaves, and that a kill at any moment loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nas import load_run, search
from nas.errors import ConfigError, DataError, RunError
from nas.pareto import nondominated
from nas.run import Run
from ops.counting import count
from search_spaces import Chooser
from tests.nas.search_helpers import start_search, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("search")
    return search(write_config(folder, workers=0, export="true"), out=folder / "run", quiet=True)


def test_every_searcher_has_its_trials_and_every_trial_an_end(finished: Run) -> None:
    frame = finished.frame()
    assert frame["searcher"].value_counts().to_dict() == {"random": 3, "nsga2": 3, "dense": 1}
    assert set(frame["state"]) == {"complete"}
    assert finished.finished


def test_the_folder_describes_itself(finished: Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert {"config.toml", "environment.json", "run.db", "artifacts", "report.html", "front.png", "exported"} <= names
    assert finished.environment["versions"]["torch"] == torch.__version__
    for trial in finished.frame().query("copy_of.isna()")["trial"]:
        files = {path.name for path in (finished.folder / "artifacts" / f"{trial:05d}").iterdir()}
        assert files == {"architecture.json", "weights.safetensors", "history.csv", "plan.csv"}


def test_the_front_is_the_one_recomputed_from_the_table(finished: Run) -> None:
    frame = pd.read_csv(pd.io.common.StringIO(finished.frame().to_csv(index=False)))
    frame = frame[frame["copy_of"].isna()]
    expected = set(frame["trial"][nondominated(frame, finished.objectives)])
    front = finished.pareto()
    assert set(front["trial"]) == expected
    assert front["test_accuracy"].notna().all()
    assert (front["latency_verified"] == 1).all()


def test_only_the_front_saw_the_test_set(finished: Run) -> None:
    frame = finished.frame()
    behind = frame[~frame["trial"].isin(finished.pareto()["trial"]) & frame["copy_of"].isna()]
    assert behind["test_accuracy"].isna().all()


def test_a_built_network_has_the_accuracy_and_the_nonzeros_of_its_row(finished: Run) -> None:
    from nas.setup import make_data
    from nas.training import evaluate

    data = make_data(finished.config)
    for row in finished.pareto().itertuples():
        model = finished.build(row.trial)
        assert evaluate(model, data.val).accuracy == pytest.approx(row.val_accuracy, abs=1e-9)
        assert evaluate(model, data.test).accuracy == pytest.approx(row.test_accuracy, abs=1e-9)
        assert count(model, data.input_shape).nnz == row.nnz


def test_a_finished_run_started_again_changes_nothing(finished: Run, tmp_path: Path) -> None:
    before = finished.frame()
    config = finished.folder.parent / "small.toml"
    again = search(config, out=finished.folder, quiet=True)
    pd.testing.assert_frame_equal(again.frame(), before)


def test_another_config_in_the_same_folder_is_refused_by_key(finished: Run) -> None:
    config = finished.folder.parent / "small.toml"
    with pytest.raises(RunError, match=r"train\.epochs was 1 and is now 2"):
        search(config, overrides={"train.epochs": 2}, out=finished.folder, quiet=True)
    search(config, overrides={"run.workers": 2}, out=finished.folder, quiet=True)  # says where, not what: allowed


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and not a run folder"):
        search({"search": {"trials": 1}}, out=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        ({"space.name": "mpl"}, ConfigError, 'did you mean "mlp"'),
        ({"space.width": [3]}, ConfigError, 'did you mean "widths"'),
        ({"search.searchers": ["tep"]}, ValueError, 'did you mean "tpe"'),
        ({"search.searchers": ["tpe"], "search.options.tpe.strtup": 1}, ConfigError, "strtup"),
        ({"data.name": "no/such/folder"}, DataError, "no/such/folder"),
        ({"train.method": "rigel"}, ValueError, 'did you mean "rigl"'),
        ({"run.executor": "locl"}, ValueError, 'did you mean "local"'),
        ({"constraints.latency_ms": "5"}, ConfigError, "latency_ms"),
        ({"space.name": "convnet", "data.name": "digits", "space.kernels": [2]}, ConfigError, "odd"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    tmp_path: Path, overrides: dict, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        search(write_config(tmp_path), overrides=overrides, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "run.db").exists()


def test_infeasible_trials_are_kept_marked_and_not_trained(tmp_path: Path) -> None:
    run = search(
        write_config(tmp_path, workers=0, trials=4),
        overrides={"constraints.params": "<= 2500"},
        out=tmp_path / "run",
        quiet=True,
    )
    frame = run.frame()
    infeasible = frame[frame["state"] == "infeasible"]
    assert len(infeasible) > 0
    assert (infeasible["params"] > 2500).all()
    assert infeasible["val_accuracy"].isna().all()
    assert (frame[frame["state"] == "complete"]["params"] <= 2500).all()


def failing(c: Chooser, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Some of its networks cannot be built, some cannot run."""
    if c.choice("fault", ["none", "build", "run"]) == "build" and c.building:
        raise ValueError("this one cannot be built")
    width = c.choice("width", [4, 8, 16, 32])
    hidden = 3 if c.choice("fault", ["none", "build", "run"]) == "run" else width
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(hidden, classes))


def test_a_trial_that_raises_is_a_failed_row_and_the_search_goes_on(tmp_path: Path) -> None:
    run = search(write_config(tmp_path, trials=6), space=failing, out=tmp_path / "run", quiet=True)
    frame = run.frame()
    failed = frame[frame["state"] == "failed"]
    assert len(failed) >= 1
    assert len(failed) < len(frame)
    assert failed["error"].str.contains("cannot be built|mat1 and mat2|shape").all()
    assert (frame["searcher"].value_counts()[["random", "nsga2"]] == 6).all()


def test_torch_datasets_through_the_python_api(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    parts = [TensorDataset(x[i : i + 80], y[i : i + 80]) for i in (0, 80, 160)]
    run = search(
        write_config(tmp_path, trials=2, epochs=8),
        data=(parts[0], parts[1], parts[2]),
        out=tmp_path / "run",
        quiet=True,
    )
    assert run.frame()["val_accuracy"].max() > 0.7
    again = load_run(run.folder)
    assert again.build(again.pareto()["trial"].iloc[0])(x[:3]).shape == (3, 2)


def test_objects_on_a_cluster_are_said_to_run_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(write_config(tmp_path, trials=1), space=failing, out=tmp_path / "run", executor="ray")
    assert "everything runs in this process, not on executor ray" in capsys.readouterr().err


def test_an_address_for_an_executor_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="address: executor local has no cluster; say --executor ray"):
        search(write_config(tmp_path), out=tmp_path / "run", address="auto")
    assert not (tmp_path / "run").exists()


def states(out: Path) -> dict[str, int]:
    try:
        return load_run(out).frame()["state"].value_counts().to_dict()
    except RunError:
        return {}


@pytest.mark.slow
def test_a_search_killed_at_any_moment_is_finished_by_the_same_command(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, workers=2, trials=5, epochs=2), tmp_path / "run"
    seen: dict[int, pd.Series] = {}
    for wait in (1, 3):  # killed once some trials are complete, twice
        driver = start_search(config, out)
        deadline = time.monotonic() + 120
        while states(out).get("complete", 0) < wait and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        frame = load_run(out).frame()
        for row in frame[frame["state"] == "complete"].itertuples():
            seen[row.trial] = row
    assert seen
    driver = start_search(config, out)
    _, stderr = driver.communicate(timeout=200)
    assert driver.returncode == 0, stderr
    frame = load_run(out).frame()
    assert frame["searcher"].value_counts().to_dict() == {"random": 5, "nsga2": 5, "dense": 1}
    assert set(frame["state"]) == {"complete"}
    assert not frame.duplicated(["searcher", "digest"]).any()
    by_trial = frame.set_index("trial")
    for trial, row in seen.items():  # what was finished before a kill was not done again
        assert by_trial.loc[trial, "val_accuracy"] == row.val_accuracy
        assert by_trial.loc[trial, "attempts"] == row.attempts
        assert by_trial.loc[trial, "duration_s"] == row.duration_s


@pytest.mark.slow
def test_a_killed_worker_costs_one_attempt(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, workers=1, trials=3, epochs=100), tmp_path / "run"
    driver = start_search(config, out)
    deadline = time.monotonic() + 120
    while not (states(out).get("complete") and states(out).get("running")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(driver.pid)], capture_output=True, text=True, check=True
    )
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    _, stderr = driver.communicate(timeout=200)
    assert driver.returncode == 0, stderr
    frame = load_run(out).frame()
    assert set(frame["state"]) == {"complete"}
    assert sorted(frame["attempts"])[-1] == 2
    assert "starts again" in stderr


def test_a_second_driver_on_the_same_run_is_refused(tmp_path: Path) -> None:
    from nas.lock import RunLock

    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), pytest.raises(RunError, match=str(os.getpid())):
        search(write_config(tmp_path), out=tmp_path / "run", quiet=True)


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "nas.cli", "search", str(tmp_path / "none.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("nas: no such config file")


def sometimes(c: Chooser, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Cannot even be drawn for one of its choices."""
    choice = c.choice("a", [1, 2, 3, 4])
    c.choice("b", list(range(10)))
    if choice == 2:
        raise ValueError("a is 2")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def test_decisions_that_cannot_be_drawn_are_drawn_again(tmp_path: Path) -> None:
    run = search(write_config(tmp_path, trials=8), space=sometimes, out=tmp_path / "run", quiet=True)
    frame = run.frame()
    assert frame["searcher"].value_counts()[["random", "nsga2"]].to_dict() == {"random": 8, "nsga2": 8}
    assert set(frame["state"]) == {"complete"}
    assert not (frame["arch.a"] == 2).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def fn(c, input_shape, classes):\n    return 3\n", "must return a torch.nn.Module"),
        ("def fn(c, input_shape, classes):\n    import sys\n    sys.exit(0)\n", "SystemExit"),
        ("def fn():\n    pass\n", "takes no argument"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("def fn(c, more):\n    pass\n", "more"),
        ("def fn(c):\n    return fn(c)\n", "RecursionError"),
        ("fn = 3\n", "no function"),
    ],
)
def test_a_space_that_cannot_work_is_one_clear_error(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        search(write_config(tmp_path), overrides={"space": {"name": "mine.py:fn"}}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


class DataDependent(nn.Module):
    """Runs and trains, but cannot be recorded, so it cannot be exported."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.flatten(1))
        return y if float(x.sum()) > 0 else -y


def test_a_network_that_cannot_be_exported_costs_the_export_only(tmp_path: Path) -> None:
    def space(c: Chooser, classes: int) -> nn.Module:
        c.choice("a", [1, 2, 3, 4, 5, 6])
        return DataDependent(classes)

    run = search(write_config(tmp_path, trials=2, export="true"), space=space, out=tmp_path / "run", quiet=True)
    assert run.finished
    assert (run.folder / "report.html").is_file()
    assert not (run.folder / "exported").exists()


def test_other_data_in_the_same_run_are_refused(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 4)).astype("float32"), np.arange(90) % 3
    np.savez(tmp_path / "d.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    overrides = {"data": {"name": str(tmp_path / "d.npz"), "validation": 0.2}}
    config = write_config(tmp_path, workers=0, trials=1)
    search(config, overrides=overrides, out=tmp_path / "run", quiet=True)
    np.savez(tmp_path / "d.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:] * 9, y_test=y[60:])
    with pytest.raises(RunError, match="data are not the ones"):
        search(config, overrides=overrides, out=tmp_path / "run", quiet=True)


def test_a_config_of_the_users_own_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("# precious\n")
    with pytest.raises(RunError, match="not a run folder"):
        search(tmp_path / "config.toml", out=tmp_path, quiet=True)
    assert (tmp_path / "config.toml").read_text() == "# precious\n"


def test_artifacts_without_their_database_are_not_overwritten(finished: Run, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    (copy / "run.db").unlink()
    with pytest.raises(RunError, match=r"run\.db is missing"):
        search(finished.folder.parent / "small.toml", out=copy, quiet=True)


def test_a_run_whose_trials_all_failed_says_so_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nas.cli import main

    (tmp_path / "wrong.py").write_text(
        "from torch import nn\n\ndef fn(c):\n    c.choice('a', [1, 2])\n    return nn.Linear(3, 3)\n"
    )
    config = write_config(tmp_path, workers=0, trials=1)
    code = main(
        ["search", str(config), "--out", str(tmp_path / "run"), "--quiet", "--set", "space={name='wrong.py:fn'}"]
    )
    assert code == 2
    assert "all 2 trials failed" in capsys.readouterr().err


def test_the_smarter_searcher_does_more_than_repeat_random_search(tmp_path: Path) -> None:
    run = search(write_config(tmp_path, trials=12), overrides={"search.searchers": ["tpe", "nsga2", "regularized_evolution"]},
                 out=tmp_path / "run", quiet=True)  # fmt: skip
    frame = run.frame()
    for name in ("tpe", "nsga2", "regularized_evolution"):
        assert frame[frame["searcher"] == name]["copy_of"].isna().sum() >= 4


def test_the_hypervolume_is_the_one_of_the_searcher_table(finished: Run) -> None:
    from nas.report.history import searcher_summary

    summary = searcher_summary(finished.frame(), finished.objectives).set_index("searcher")["hypervolume"]
    for name, value in summary.items():
        assert finished.hypervolume(str(name)) == pytest.approx(value, nan_ok=True)


def test_a_run_of_a_space_object_is_opened_with_it(tmp_path: Path) -> None:
    run = search(write_config(tmp_path, trials=1), space=sometimes, out=tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"load_run\(path, space=\.\.\.\)"):
        load_run(run.folder).build(0)
    assert load_run(run.folder, space=sometimes).build(0)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
