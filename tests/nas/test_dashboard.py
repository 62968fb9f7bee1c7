"""A run as an Optuna study: what becomes of states, values and decisions; files that Optuna reads; the real pages, over HTTP."""

from __future__ import annotations

import io
import json
import math
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy.engine import make_url

from nas.cli import main
from nas.commands_watch import watch_results
from nas.config import load_config
from nas.dashboard.export import export_study
from nas.dashboard.server import RunStorage
from nas.dashboard.study import StudyView
from nas.run import Run, load_run
from nas.storage import Storage, write_storage
from nas.store import Store, Trial
from search_spaces.architecture import Architecture
from tests.nas.synthetic_run import OBJECTIVES, make_trial, sample, synthetic_run
from tests.postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parent.parent.parent


def one(state: str, **changes: Any) -> Trial:
    rng = random.Random(0)
    return replace(make_trial(0, "random", 0, state, sample(rng), rng), **changes)


def shown(trial: Trial, objectives: dict[str, str] = OBJECTIVES) -> optuna.trial.FrozenTrial:
    return StudyView(objectives).update([trial])[0]


def make_run(folder: Path, objectives: dict[str, str]) -> Path:
    """A run that goes on: complete, failed and infeasible trials, one that is stopped, one that runs."""
    folder.mkdir()
    config = load_config({"objectives": objectives, "constraints": {"latency_ms": "<= 0.4"}}, name="made")
    (folder / "config.toml").write_text(config.to_toml())
    with Store.create(folder / "run.db") as store:
        for made in synthetic_run(12, failed=0.2, infeasible=0.2, dense=0).trials:
            trial = propose(store, made)
            state = "stopped" if made.trial == 10 else made.state
            if made.trial < 11:
                finish(store, trial, replace(made, state=state))
    return folder


def propose(store: Store, made: Trial) -> Trial:
    trial = store.propose(searcher=made.searcher, index=made.index, architecture=made.architecture, seed=0, epochs=3)
    return store.start(trial.trial)


def finish(store: Store, trial: Trial, made: Trial) -> None:
    curve = [{"epoch": e, "val_accuracy": e / 10, "val_loss": math.nan} for e in (1, 2, 3)]
    details = {"metrics": made.metrics, "violations": made.violations, "error": made.error}
    store.finish(trial.trial, 1, made.state, curve=curve if made.state == "complete" else [], **details)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(make_run(tmp_path / "run", OBJECTIVES))


def test_states_are_mapped_and_values_are_the_objectives_in_order() -> None:
    complete = one("complete")
    values = [complete.metrics["val_accuracy"], complete.metrics["latency_ms"]]
    assert (shown(complete).state, shown(complete).values) == (TrialState.COMPLETE, values)
    assert (shown(replace(complete, state="stopped")).state, shown(one("running")).state) == (
        TrialState.PRUNED,
        TrialState.RUNNING,
    )
    assert shown(one("proposed")).state == TrialState.WAITING
    failed = shown(one("failed"))
    assert (failed.state, failed.values) == (TrialState.FAIL, None)
    assert failed.user_attrs["error"].startswith("RuntimeError: mat1 and mat2")


def test_an_infeasible_trial_has_constraints_if_it_was_measured_and_has_failed_if_not() -> None:
    measured = shown(
        one("infeasible", metrics={"val_accuracy": 0.9, "latency_ms": 0.5}, violations={"latency_ms": 0.25})
    )
    assert (measured.state, measured.constraints["latency_ms"]) == (TrialState.COMPLETE, 0.25)
    assert measured.system_attrs["constraints"] == [0.25]  # what optuna-dashboard reads
    not_trained = shown(one("infeasible", metrics={"latency_ms": 0.5}, violations={"latency_ms": math.inf}))
    assert (not_trained.state, not_trained.constraints) == (TrialState.FAIL, {})


def test_numbers_that_json_cannot_carry_are_text() -> None:
    trial = shown(one("failed", metrics={"val_loss": math.nan, "nnz": 3}))
    assert trial.user_attrs["val_loss"] == "nan"
    json.dumps(trial.user_attrs, allow_nan=False)


def test_a_decision_has_the_same_choices_in_every_trial_also_when_a_new_value_comes() -> None:
    trials = synthetic_run(20).trials
    view = StudyView(OBJECTIVES)
    view.update(trials[:3])
    found = view.update(trials)
    widths = {t.architecture["layer0.width"] for t in trials}
    for trial, made in zip(found, trials, strict=True):
        trial._validate()
        assert trial.params == made.architecture.as_dict()
        assert set(trial.distributions["layer0.width"].choices) == widths  # type: ignore[attr-defined]


def test_values_that_python_takes_for_equal_stay_apart() -> None:
    made = [one("complete", architecture=Architecture("toy", (("x", value),))) for value in (True, 1, "1", 2)]
    assert [trial.params["x"] for trial in StudyView(OBJECTIVES).update(made)] == ["True", "1", "1", "2"]


def test_only_what_changed_is_converted_again() -> None:
    trials = synthetic_run(20).trials
    view = StudyView(OBJECTIVES)
    before = view.update(trials)
    changed = [*trials[:5], replace(trials[5], metrics=trials[5].metrics | {"test_accuracy": 0.5}), *trials[6:]]
    after = view.update(changed)
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b] == [5]
    assert after[5].user_attrs["test_accuracy"] == 0.5


def test_one_objective_has_its_curve_several_have_none(tmp_path: Path, run: Run) -> None:
    alone = load_run(make_run(tmp_path / "alone", {"val_accuracy": "max"}))
    trials = StudyView(alone.objectives, alone.curves).update(alone.trials)
    assert trials[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert not any(trial.intermediate_values for trial in StudyView(run.objectives, run.curves).update(run.trials))


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_an_exported_file_is_a_study_that_optuna_reads(run: Run, tmp_path: Path, name: str, capsys: Any) -> None:
    path = tmp_path / name
    assert main(["dashboard", str(run.folder), "--export", str(path)]) == 0
    assert "12 trials" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", name]
    study = read(path)
    assert [t.state for t in study.trials] == [t.state for t in StudyView(run.objectives).update(run.trials)]
    assert {study.trials[10].state, study.trials[11].state} == {TrialState.PRUNED, TrialState.RUNNING}
    front = {t.number for t in study.best_trials}
    assert front == set(run.pareto()["trial"])
    assert main(["dashboard", str(run.folder), "--export", str(path)]) == 2
    assert "there is such a file" in capsys.readouterr().err


def read(path: Path) -> optuna.Study:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    storage = RDBStorage(f"sqlite:///{path}") if path.suffix == ".db" else JournalStorage(JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="made", storage=storage)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    study.trials  # noqa: B018  (all read before the database is closed)
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
    return study


def test_an_export_of_an_unknown_kind_is_refused(run: Run, tmp_path: Path, capsys: Any) -> None:
    assert main(["dashboard", str(run.folder), "--export", str(tmp_path / "x.csv")]) == 2
    assert "ends in .db, .sqlite" in capsys.readouterr().err
    assert export_study(run, tmp_path / "x.journal") == 12


def test_the_storage_of_the_pages_shows_and_does_not_change(run: Run) -> None:
    storage = RunStorage(run)
    storage.show(StudyView(run.objectives, run.curves).update(run.trials))
    study = optuna.load_study(study_name="made", storage=storage)
    assert len(study.trials) == 12
    assert study.user_attrs["objective val_accuracy"] == "max"
    with pytest.raises(RuntimeError, match="cannot change"):
        study.ask()
    with pytest.raises(RuntimeError, match="cannot change"):
        optuna.delete_study(study_name="made", storage=storage)


def test_the_best_of_one_objective_is_feasible(run: Run) -> None:
    storage = RunStorage(load_run(make_run(run.folder.parent / "alone", {"val_accuracy": "max"})))
    trials = [
        one("infeasible", trial=0, metrics={"val_accuracy": 0.99}, violations={"latency_ms": 0.1}),
        one("complete", trial=1, metrics={"val_accuracy": 0.5}),
        one("complete", trial=2, metrics={"val_accuracy": 0.7}),
    ]
    storage.show(StudyView({"val_accuracy": "max"}).update(trials))
    assert storage.get_best_trial(storage.study_id).number == 2


def test_a_port_that_is_taken_and_a_missing_package_are_said_in_one_line(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["dashboard", str(run.folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another with --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert main(["dashboard", str(run.folder)]) == 2
    assert "pip install 'sparse-nas[watch]'" in capsys.readouterr().err


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return json.loads(answer.read())


def test_the_real_pages_show_the_run_follow_it_and_end_with_ctrl_c(run: Run) -> None:
    pytest.importorskip("optuna_dashboard")
    command = [sys.executable, "-m", "nas.cli", "dashboard", str(run.folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            page = server.stdout.readline().strip()
            base = page.split("/dashboard")[0]
            assert base.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(page, timeout=20) as answer:
                assert b"<html" in answer.read()
            (summary,) = get(f"{base}/api/studies")["study_summaries"]
            assert (summary["study_name"], summary["directions"]) == ("made", ["maximize", "minimize"])
            study = f"{base}/api/studies/{summary['study_id']}"
            found = get(study)
            assert found["objective_names"] == ["val_accuracy", "latency_ms"]
            assert [t["state"] for t in found["trials"]][-2:] == ["Pruned", "Running"]
            assert {t["number"] for t in found["best_trials"]} == set(run.pareto()["trial"])
            with Store.open(run.folder / "run.db") as store:
                finish(store, store.trial(11), one("complete"))
                propose(store, one("running", searcher="random", index=99))
            until = time.monotonic() + 30
            while [t["state"] for t in get(study)["trials"]][11:] != ["Complete", "Running"]:
                assert time.monotonic() < until
                time.sleep(0.5)
            request = urllib.request.Request(
                study, method="DELETE", data=b"{}", headers={"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError, match="500") as refused:
                urllib.request.urlopen(request, timeout=20)
            refused.value.close()
            assert len(get(study)["trials"]) == 13
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        finally:
            server.kill()


def test_results_are_shown_again_until_the_run_is_finished(run: Run, capsys: Any) -> None:
    assert main(["results", str(run.folder), "--watch"]) == 2
    assert "expected a terminal" in capsys.readouterr().err
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, color_system=None)
    watched = threading.Thread(target=watch_results, args=(run, None, console, 0.1))
    watched.start()
    with Store.open(run.folder / "run.db") as store:
        until = time.monotonic() + 30
        while "1 running" not in out.getvalue():
            assert time.monotonic() < until
            time.sleep(0.1)
        finish(store, store.trial(11), one("complete"))
        store.set_meta("finished", True)
    watched.join(30)
    assert not watched.is_alive()
    assert "finished" in out.getvalue()
    assert "running" not in out.getvalue().rpartition("made: ")[2]


def test_a_run_on_a_server_is_shown_like_any_other(
    tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = postgres.new_database(), tmp_path / "run"
    monkeypatch.setenv("PGPASSWORD", make_url(url).password or "")
    folder.mkdir()
    (folder / "config.toml").write_text(load_config({}, name="made").to_toml())
    write_storage(folder, Storage(url, "made"))
    with Store.create(url, "made") as store:
        finish(store, propose(store, one("complete")), one("complete"))
        assert export_study(load_run(folder), tmp_path / "study.log") == 1
    assert read(tmp_path / "study.log").best_trials[0].params == one("complete").architecture.as_dict()
