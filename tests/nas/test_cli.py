"""The command line on a small finished run, and what it says of mistakes."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from nas import search
from nas.cli import main
from nas.config import METRICS
from nas.run import Run
from tests.nas.search_helpers import write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("cli")
    return search(write_config(folder, workers=0, trials=2), out=folder / "run", quiet=True)


def test_results_in_every_format_hold_every_trial(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", str(run.folder)]) == 0
    assert "random" in capsys.readouterr().out
    assert main(["results", str(run.folder), "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame["trial"]) == list(range(5))
    assert main(["results", str(run.folder), "--format", "json"]) == 0
    assert [row["digest"] for row in json.loads(capsys.readouterr().out)] == list(frame["digest"])


def test_pareto_prints_and_draws_the_front(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "front.png"
    assert main(["pareto", str(run.folder), "--plot", str(picture), "--format", "csv"]) == 0
    assert list(pd.read_csv(io.StringIO(capsys.readouterr().out))["trial"]) == list(run.pareto()["trial"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_prints_decisions_and_layers(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = int(run.pareto()["trial"].iloc[0])
    assert main(["show", str(run.folder), str(trial), "--plot", str(tmp_path / "net.svg")]) == 0
    out = capsys.readouterr().out
    for name, value in run.architecture(trial).decisions:
        assert name in out
        assert str(value) in out
    assert "linear" in out
    assert (tmp_path / "net.svg").read_text().startswith("<?xml") or "<svg" in (tmp_path / "net.svg").read_text()


def test_export_writes_a_network_that_computes_the_same(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = int(run.pareto()["trial"].iloc[0])
    assert main(["export", str(run.folder), str(trial), "--to", str(tmp_path / "out")]) == 0
    assert "largest relative difference" in capsys.readouterr().out
    exported = torch.export.load(str(tmp_path / "out" / "network.pt2")).module()
    x = run.example_input()
    assert torch.allclose(exported(x), run.build(trial)(x), atol=1e-5)


def test_report_writes_one_page(run: Run, tmp_path: Path) -> None:
    assert main(["report", str(run.folder), "--to", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_config_prints_a_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "[train]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["results", "no/such/run"], "no run folder no/such/run"),
        (["show", "RUN", "99"], "no trial 99"),
        (["export", "RUN", "99", "--to", "out"], "no trial 99"),
        (["search", "none.toml"], "no such config file: none.toml"),
        (["search", "none.toml", "--set", "epochs"], "KEY=VALUE"),
        (["pareto", "RUN", "--x", "latncy_ms", "--plot", "front.png"], "latncy_ms"),
        (["pareto", "RUN", "--plot", "front.bmp"], "front.bmp"),
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
    code = main([str(run.folder) if argument == "RUN" else argument for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert expected in error


def test_what_a_stream_cannot_encode_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "smal\u0142.toml"
    config.write_text('[objectives]\n"val_\u20ac" = "max"', encoding="utf-8")
    written = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    shown = {name: io.TextIOWrapper(raw, encoding="ascii", errors="strict") for name, raw in written.items()}
    for name, stream in shown.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(["search", str(config)]) == 2
    print("\u2713 \udcff")
    for stream in shown.values():
        stream.flush()
    assert rb"smal\u0142.toml" in written["stderr"].getvalue()
    assert rb"val_\u20ac" in written["stderr"].getvalue()
    assert rb"\u2713 \udcff" in written["stdout"].getvalue()


def test_the_metrics_a_run_file_may_name_are_the_numbers_a_trial_measures(run: Run) -> None:
    measured = next(trial.metrics for trial in run.trials if trial.state == "complete")
    numbers = {name for name, value in measured.items() if isinstance(value, int | float) and math.isfinite(value)}
    handed_out = ("latency_search_ms", "latency_verified")  # of networks on the front only
    shown_only = ("dead_channels", "channels")  # they say what a network is like, not how good it is
    assert {name for name in numbers if not name.startswith("test_")} - {*handed_out, *shown_only} == set(METRICS)
