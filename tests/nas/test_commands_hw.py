"""`nas profile`, `nas calibrate` and `nas devices` on a small finished run, and what they say of mistakes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

import hw_models.calibrate as calibration
from hw_models.descriptor import list_devices, load_device
from hw_models.measure import MeasurementError
from nas import commands_hw, search
from nas.artifacts import trial_folder
from nas.cli import main
from nas.config import load_config
from nas.export import export_module
from nas.report.calibration_progress import CalibrationProgress
from nas.run import Run
from nas.space_networks import SpaceNetworks
from ops.layers import sparse_layers
from tests.hw_models.flat_model import FlatModel
from tests.nas.search_helpers import write_config


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterable[None]:
    """Nothing is read from or written to the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def sparsest(run: Run) -> int:
    """The trial that keeps the smallest share of its weights."""
    frame = run.frame()
    return int(frame.loc[frame["density"].astype(float).idxmin(), "trial"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("profiled")
    run = search(write_config(folder, workers=0, trials=2), out=folder / "run", quiet=True)
    network = run.build(sparsest(run))
    export_module(network, run.example_input(), run.folder / "exported", formats=("source",))
    return run


@pytest.fixture
def _flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_hw, "latency_model", lambda threads: (FlatModel(), "a flat model", ("flat",)))


@pytest.mark.usefixtures("_flat")
def test_a_trial_is_profiled_as_table_csv_json_and_picture(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = sparsest(run)
    picture = tmp_path / "profile.svg"
    place = [str(run.folder), str(trial)]
    assert main(["profile", *place, "--format", "csv", "--plot", str(picture)]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert (frame["ms"] >= 0).all()
    assert "<svg" in picture.read_text()
    assert main(["profile", *place, "--predict-only", "--format", "json", "--batch", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["batch"] == 3
    assert [row["op"] for row in record["operations"]] == list(frame["op"].astype(str))
    assert main(["profile", *place, "--predict-only"]) == 0
    out = capsys.readouterr().out
    title = f"trial {trial}: batch 1, 1 thread"
    for text in (title, "predicted", "energy", "a flat model", "flat", "dense faster"):
        assert text in out


def test_an_export_is_profiled_without_any_calibration(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(run.folder / "exported"), "--predict-only", "--format", "json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["measured"] is None
    assert record["predicted"]["source"] == "analytical"
    assert record["predicted"]["lo_ms"] < record["predicted"]["ms"] < record["predicted"]["hi_ms"]
    assert any("not calibrated" in note and "nas calibrate" in note for note in record["notes"])
    sparse = run.build(sparsest(run))
    nnz = sum(row["nnz"] for row in record["operations"])
    kept = sum(int((m.weight != 0).sum()) for m in sparse.modules() if isinstance(m, nn.Linear))
    assert nnz == pytest.approx(kept, rel=0.01)  # a kept weight may be zero by chance


def test_a_trial_that_was_never_trained_is_profiled_with_masks_drawn_at_its_densities(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = run.trial(sparsest(run))
    weights = trial_folder(run.folder, trial.trial) / "weights.safetensors"
    assert main(["profile", str(run.folder), str(trial.trial), "--predict-only", "--format", "json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    kept = weights.read_bytes()
    weights.unlink()
    try:
        assert main(["profile", str(run.folder), str(trial.trial), "--predict-only", "--format", "json"]) == 0
    finally:
        weights.write_bytes(kept)
    drawn = json.loads(capsys.readouterr().out)
    assert any("was not trained" in note for note in drawn["notes"])
    assert [row["nnz"] for row in drawn["operations"]] == [row["nnz"] for row in trained["operations"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["profile", "RUN"], "say which trial"),
        (["profile", "RUN", "99"], "no trial 99"),
        (["profile", "nowhere"], "no network.py"),
        (["profile", "RUN", "0", "--plot", "p.bmp"], ".bmp"),
        (["profile", "RUN", "0", "--predict-only", "--plot", "no/p.svg"], "cannot be written"),
        (["devices", "raspberry-pi-44"], "raspberry-pi-4"),
        (["calibrate", "--space", "none.toml"], "no such config file: none.toml"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: Run,
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run.folder) if argument == "RUN" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "much", "1e9"])
def test_a_budget_is_a_number_of_seconds(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", f"--budget={budget}"])
    assert "seconds from 1 to 86400" in capsys.readouterr().err


def test_errors_of_the_packages_below_are_one_line_and_others_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def calibrate(*_: Any, **__: Any) -> None:
            raise error

        return calibrate

    monkeypatch.setattr(calibration, "calibrate", failing(MeasurementError('measuring "0": the call raised')))
    assert main(["calibrate", "--budget", "10", "--quiet"]) == 2
    assert capsys.readouterr().err == 'nas: measuring "0": the call raised\n'
    monkeypatch.setattr(calibration, "calibrate", failing(ValueError("a defect of ours")))
    with pytest.raises(ValueError, match="a defect"):
        main(["calibrate", "--budget", "10", "--quiet"])


def test_calibrate_asks_for_the_run_file_s_networks_threads_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("[latency]", "[latency]\nbatch = 4\nthreads = 2"))
    asked: dict[str, Any] = {}

    def calibrate(budget_s: float, *, progress: Callable[[float, float, str], None], **more: Any) -> str:
        asked.update(more, budget_s=budget_s)
        progress(1.0, budget_s, "looking")
        return "the summary"

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    assert main(["calibrate", "--budget", "10", "--space", str(config)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "the summary\n"
    assert "1 s of 10 s: looking" in shown.err
    assert (asked["budget_s"], asked["threads"], asked["batch"]) == (10.0, 2, 4)
    name, network, example = next(iter(asked["candidates"]))
    assert name.startswith("mlp ")
    assert network(example).shape == (4, 10)

    assert main(["calibrate", "--budget", "10", "--quiet", "--threads", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert asked["candidates"] is None
    assert (asked["threads"], asked["batch"]) == (1, 1)


def test_networks_of_a_space_are_distinct_reproducible_masked_and_counted(tmp_path: Path) -> None:
    networks = SpaceNetworks(load_config(write_config(tmp_path)), tmp_path, count=12)
    first, again = list(networks), list(networks)
    assert len({name for name, _, _ in first}) == 12
    for (name, one, x), (same, two, _) in zip(first, again, strict=True):
        assert name == same
        assert torch.equal(one(x), two(x))
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))
        assert not one.training
        for _, layer in sparse_layers(one):
            assert layer.nnz == layer.planned_nnz


def test_a_space_of_few_networks_ends_instead_of_asking_for_ever(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path),
        {"space.max_depth": 1, "space.widths": [16], "space.densities": [1.0], "space.patterns": ["unstructured"]},
    )
    assert len(list(SpaceNetworks(config, tmp_path, count=1000))) == 1


def test_devices_lists_every_device_and_every_figure_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["id"] for record in records] == list_devices()
    assert main(["devices", "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame["id"]) == list_devices()
    assert main(["devices"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in list_devices())
    assert "from data sheets" in table
    assert main(["devices", "raspberry-pi-4"]) == 0
    text = capsys.readouterr().out
    device = load_device("raspberry-pi-4")
    assert all(name in text for name in device.known)
    assert device.sources["peak_gflops"] in text


def test_progress_is_drawn_on_a_terminal_and_told_now_and_then_elsewhere() -> None:
    clock = iter(range(0, 1000, 10)).__next__
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100)
        with CalibrationProgress(60, console=console, clock=clock) as progress:
            for second in range(4):
                progress.update(10.0 * second, 60.0, f"step [{second}]")
        shown = out.getvalue()
        assert "step [0]" in shown
        assert ("step [1]" in shown) is terminal  # 10 s after the last one
        assert "of 1 min 00 s" in shown
