"""The report, the tables and `nas show` on a real run folder: real store, real space, real plans; only the numbers are made up."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from nas.artifacts import write_artifacts
from nas.config import load_config
from nas.errors import RunError
from nas.report.html import render_report
from nas.report.plots import save_front
from nas.report.show import print_trial, save_drawing
from nas.report.tables import format_frame
from nas.run import Run
from nas.store import Store
from ops.plan import lower
from search_spaces import get_space


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Six trials of `convnet`: four complete, one failed, one running."""
    folder: Path = tmp_path_factory.mktemp("run")
    config = load_config({"space": {"name": "convnet"}, "search": {"trials": 6}}, name="made")
    (folder / "config.toml").write_text(config.to_toml())
    space = get_space("convnet", input_shape=(1, 8, 8), classes=10)
    rng = random.Random(0)
    with Store.create(folder / "run.db") as store:
        store.set_meta("data", {"name": "digits", "input_shape": [1, 8, 8], "classes": 10})
        for i in range(6):
            architecture = space.sample(rng)
            trial = store.propose(searcher="random", index=i, architecture=architecture, seed=0, epochs=2)
            trial = store.start(trial.trial)
            if i == 5:
                break
            if i == 4:
                store.finish(trial.trial, trial.attempts, "failed", error="Traceback\nMemoryError: <b>")
                continue
            plan = lower(space.build(architecture).eval(), torch.zeros(1, 1, 8, 8))
            table = pd.concat([plan.frame(), pd.DataFrame({"torch_ms": 0.02, "ms": [0.01] * len(plan.ops)})], axis=1)
            curve = [{"epoch": e, "val_accuracy": 0.4 * e, "train_accuracy": 0.45 * e} for e in (1, 2)]
            write_artifacts(folder, trial.trial, architecture, model=None, history=curve, plan=table)
            metrics = {
                "val_accuracy": 0.8 + 0.01 * i,
                "latency_ms": 0.1 + 0.05 * i,
                "nnz": 1000 * (i + 1),
                "density": 0.5,
            }
            store.finish(trial.trial, trial.attempts, "complete", metrics=metrics, curve=curve, duration_s=1.0)
    return Run(folder)


def test_the_report_shows_front_curves_networks_and_the_failure(run):
    text = render_report(run)
    assert "trial 3 (random): validation accuracy 0.8300" in text
    assert "The search is not finished: 5 trials (4 complete, 1 failed)" in text
    assert text.count("<h3>What is executed</h3>") == len(run.pareto()) == 4
    assert "MemoryError: &lt;b&gt;" in text
    assert 'id="learning"' in text


def test_the_plan_of_a_real_network_is_drawn_with_what_skips(run):
    skips = [trial for trial in range(4) if "add" in set(run.plan_frame(trial)["kind"])]
    assert skips
    for trial in skips:
        assert "Q" in Path(save_drawing(run, trial, run.folder / f"{trial}.svg")).read_text()


def test_a_trial_is_shown(run):
    console = Console(file=io.StringIO(), width=100)
    for trial in range(6):
        print_trial(run, trial, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("What is executed") == 4
    assert "MemoryError" in text


def test_tables_and_picture_come_from_the_folder(run):
    assert len(format_frame(run.frame(), "csv").splitlines()) >= 1 + 6
    assert save_front(run, run.folder / "front.png").stat().st_size > 1000


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1, 2]"])
def test_a_damaged_environment_is_named_and_the_report_goes_on(run, content):
    path = run.folder / "environment.json"
    path.write_bytes(content)
    try:
        with pytest.raises(RunError, match=r"environment\.json: damaged"):
            _ = run.environment
        assert "environment.json: damaged" in render_report(run)
    finally:
        path.unlink()
    assert run.environment == {}


@pytest.mark.parametrize("number", [6, -1, 2**63, -(2**63) - 1, 10**30, float("inf")])
def test_a_number_no_trial_has_is_said_however_large(run, number):
    with pytest.raises(RunError, match="no trial"):
        run.trial(number)
    with pytest.raises(RunError, match="no trial"):
        run.plan_frame(number)
