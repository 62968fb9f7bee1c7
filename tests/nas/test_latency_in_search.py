"""Laws of searches that predict latencies: what is handed out was measured, limits hold for the interval, a kill loses one pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nas.driver
import nas.evaluate
import nas.latency
import nas.verify
from hw_models.energy import energy_of
from nas import load_run, search
from nas.config import load_config
from nas.errors import ConfigError
from nas.latency import Measured, Predicted, constraints_of, energy_metrics, make_pricer, this_machine
from nas.objectives import violations
from nas.optimism import optimism
from nas.report.plans import read_plan
from nas.report.tables import layer_sheet, pareto_sheet, results_sheet, searcher_sheet
from nas.run import Run
from nas.store import Store
from ops.plan import Plan
from tests.nas.latency_fakes import FormulaLaboratory, FormulaModel, by_work, formula_pricer
from tests.nas.search_helpers import write_config

TRIALS = 8


@contextmanager
def priced_by(pricer: Predicted) -> Iterator[None]:
    """Searches in here are priced by `pricer`, wherever they make one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (nas.evaluate, nas.verify):
            patch.setattr(module, "make_pricer", lambda config: pricer)
        patch.setattr(nas.driver, "check_pricing", lambda *_: None)
        for slow in ("save_front", "write_report"):  # nothing here reads them
            patch.setattr(nas.driver, slow, lambda *_: None)
        yield


def go(folder: Path, pricer: Predicted, **overrides: object) -> Run:
    """A search that predicts, with all networks of a small space."""
    settings = {"latency.model": "predict", **{key.replace("__", "."): value for key, value in overrides.items()}}
    with priced_by(pricer):
        return search(
            write_config(folder, workers=0, trials=TRIALS), overrides=settings, out=folder / "run", quiet=True
        )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted when its front was to be measured."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.raises(KeyboardInterrupt):
        go(folder, formula_pricer(laboratory=FormulaLaboratory(interrupt_after=0)))
    return folder


def copied(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "copy"))


def test_while_a_search_predicts_nothing_is_measured(searched: Path) -> None:
    run = load_run(searched / "run")
    frame = run.frame()
    assert not run.finished
    assert set(frame["latency_source"]) == {"learned"}
    assert "latency_verified" not in frame
    for trial in frame[frame["copy_of"].isna()].itertuples():
        assert trial.latency_lo_ms < trial.latency_ms < trial.latency_hi_ms
        plan = run.plan_frame(trial.trial)
        assert plan["ms"].sum() == pytest.approx(trial.latency_ms)
        assert trial.latency_ms == pytest.approx(0.01 + plan["macs"].sum() / 1e6)  # with the masks of training


def by_mask(plan: Plan) -> float:
    """Depends on where the zeros are, not on how many."""
    masks = [op.layer.mask for op in plan.ops if op.layer is not None and op.layer.mask is not None]
    return 0.01 + sum(float(mask.flatten().nonzero().double().mean()) for mask in masks) / 1e6


def test_a_trained_network_is_priced_with_the_masks_that_training_found(tmp_path: Path) -> None:
    overrides = {"train__method": "gradual", "search__trials": 3, "space__densities": [0.1]}
    run = go(tmp_path, formula_pricer(FormulaModel(by_mask), FormulaLaboratory(by_mask)), **overrides)
    rows = run.frame().query("copy_of.isna() and searcher != 'dense'")
    assert len(rows) > 0
    for row in rows.itertuples():
        predicted = row.latency_ms if pd.isna(row.latency_search_ms) else row.latency_search_ms
        assert predicted == pytest.approx(by_mask(_plan(run, row.trial)))


def upside_down(plan: Plan) -> float:
    """The truth is the opposite of what the model believes: every network it finds fast is slow."""
    return 0.02 / by_work(plan)


@pytest.mark.parametrize("truth", [by_work, upside_down], ids=["as believed", "upside down"])
def test_every_network_handed_out_was_measured_however_wrong_the_model(searched: Path, tmp_path: Path, truth) -> None:
    laboratory = FormulaLaboratory(truth=truth)
    run = go(copied(searched, tmp_path), formula_pricer(laboratory=laboratory))
    front = run.pareto()
    assert run.finished
    assert len(front) > 0
    assert (front["latency_verified"] == 1).all()
    assert set(front["latency_source"]) == {"measured"}
    for row in front.itertuples():
        assert row.latency_ms == pytest.approx(truth(_plan(run, row.trial)))
        assert row.latency_search_ms == pytest.approx(by_work(_plan(run, row.trial)))
    measured = [number for numbers in laboratory.passes for number in numbers]
    assert len(measured) == len(set(measured))  # none twice
    if truth is by_work:  # a front that stays is measured and nothing else
        assert set(measured) == set(front["trial"])
        assert len(measured) < run.frame()["copy_of"].isna().sum()


def test_tables_say_what_was_measured_what_was_predicted_and_how_far_apart_they_were(
    searched: Path, tmp_path: Path
) -> None:
    laboratory = FormulaLaboratory(
        truth=lambda plan: 1.2 * by_work(plan), refitted=lambda ratios: FormulaModel(factor=float(np.mean(ratios)))
    )
    run = go(copied(searched, tmp_path), formula_pricer(laboratory=laboratory))
    frame, front = run.frame(), run.pareto()
    how = {number: layer_sheet(read_plan(run.plan_frame(number))).notes[0] for number in frame["trial"]}
    verified = frame.set_index("trial")["latency_verified"].eq(1).fillna(False)
    assert all(("in its place in the running network" in note) == verified[n] for n, note in how.items())
    assert all(("predicted" in note) != verified[n] for n, note in how.items())
    for sheet in (results_sheet(frame, run.objectives), searcher_sheet(frame, run.objectives)):
        (note,) = (note for note in sheet.notes if "measured / predicted latency" in note)
        assert "1.200 (geometric mean of" in note
    assert "measured" in pareto_sheet(front, run.objectives).notes[0]
    unmeasured = int(frame["trial"][~verified].iloc[0])
    for number, how_got in ((int(front["trial"].iloc[0]), "measured milli"), (unmeasured, "predicted milli")):
        run.export(number, tmp_path / str(number))
        assert how_got in (tmp_path / str(number) / "card.md").read_text()


def test_a_front_that_changes_with_every_measurement_is_followed_to_its_end(searched: Path, tmp_path: Path) -> None:
    """No network is handed out on a prediction because passes ran out: here each pass takes its networks off the front."""
    laboratory = FormulaLaboratory(truth=lambda plan: 100 * by_work(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.verify, "AT_ONCE", 1)
        run = go(copied(searched, tmp_path), formula_pricer(laboratory=laboratory))
    assert len(laboratory.passes) > 4
    frame = run.frame()
    originals = frame[frame["copy_of"].isna()]
    assert (originals["latency_verified"] == 1).all()  # with all others predicted a hundred times faster, all had to be
    assert (run.pareto()["latency_verified"] == 1).all()


def test_the_model_learns_from_what_was_measured(searched: Path, tmp_path: Path) -> None:
    """After the first pass the model knows the machine is slower throughout; the other networks are priced anew."""
    folder = copied(searched, tmp_path)
    laboratory = FormulaLaboratory(
        truth=lambda plan: 3 * by_work(plan), refitted=lambda ratios: FormulaModel(factor=float(np.mean(ratios)))
    )
    believed = load_run(folder / "run").frame()["latency_ms"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.verify, "AT_ONCE", 1)  # those measured later were priced anew before
        run = go(folder, formula_pricer(laboratory=laboratory))
    frame = run.frame()
    originals = frame[frame["copy_of"].isna()]
    measured = originals["latency_verified"].eq(1).fillna(False)
    assert 1 < measured.sum() < len(originals)
    kept = frame["latency_search_ms"].notna()
    assert (frame["latency_search_ms"] == believed)[
        kept
    ].all()  # what the search went by, not what was believed in between
    again = originals["latency_search_ms"].notna()
    assert again[measured].all()
    assert (originals["latency_ms"] / originals["latency_search_ms"])[again].to_numpy() == pytest.approx(3.0)


def test_only_networks_that_could_be_on_the_front_are_priced_anew(searched: Path, tmp_path: Path) -> None:
    """A slow obvious twin of the choice: put each one on the table as fast as its interval allows, and draw the front again."""
    from nas.frames import front_rows, trials_frame

    run = go(copied(searched, tmp_path), formula_pricer(laboratory=FormulaLaboratory(truth=lambda p: 1.2 * by_work(p))))
    trials = run.trials
    expected = []
    for trial in trials:
        if trial.copy_of is not None or trial.metrics.get("latency_verified"):
            continue
        measured = trials_frame([t for t in trials if t.metrics.get("latency_verified")])
        mine = trials_frame([trial])
        mine["latency_ms"] = mine["latency_lo_ms"]
        table = pd.concat([measured, mine], ignore_index=True)
        if trial.trial in set(front_rows(table, run.objectives)["trial"]):
            expected.append(trial.trial)
    assert nas.verify._contenders(run, trials) == expected


def test_an_interrupted_verification_measures_nothing_twice(searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.verify, "AT_ONCE", 1)
        first = FormulaLaboratory(interrupt_after=2)
        with pytest.raises(KeyboardInterrupt):
            go(folder, formula_pricer(laboratory=first))
        done = {number for numbers in first.passes for number in numbers}
        frame = load_run(folder / "run").frame()
        verified = frame[frame["latency_verified"].eq(1).fillna(False) & frame["copy_of"].isna()]
        assert set(verified["trial"]) == done
        second = FormulaLaboratory()
        run = go(folder, formula_pricer(laboratory=second))
    assert not done & {number for numbers in second.passes for number in numbers}
    assert (run.pareto()["latency_verified"] == 1).all()
    assert run.meta("optimism")["n"] == run.frame().query("copy_of.isna()")["latency_verified"].eq(1).sum()


def test_a_network_that_cannot_be_measured_is_not_handed_out(searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    front = [int(n) for n in load_run(folder / "run").pareto()["trial"]]
    (folder / "run" / "artifacts" / f"{front[0]:05d}" / "weights.safetensors").unlink()
    run = go(folder, formula_pricer(laboratory=FormulaLaboratory(fails={front[-1]})))
    assert not {front[0], front[-1]} & set(run.pareto()["trial"])
    for number in (front[0], front[-1]):
        trial = run.trial(number)
        assert trial.state == "failed"
        assert "cannot be handed out" in str(trial.error)
    assert (run.pareto()["latency_verified"] == 1).all()


def test_the_optimism_of_a_run_is_the_geometric_mean_of_measured_over_predicted(searched: Path, tmp_path: Path) -> None:
    run = go(copied(searched, tmp_path), formula_pricer(laboratory=FormulaLaboratory(truth=upside_down)))
    frame = run.frame()
    rows = frame[frame["copy_of"].isna() & frame["latency_verified"].eq(1).fillna(False)]
    ratios = (rows["latency_ms"] / rows["latency_search_ms"]).to_numpy(dtype=float)
    found = run.meta("optimism")
    assert found["n"] == len(ratios)
    assert found["ratio"] == pytest.approx(float(np.prod(ratios)) ** (1 / len(ratios)))
    assert (found["lowest"], found["highest"]) == pytest.approx((ratios.min(), ratios.max()))
    inside = rows["latency_ms"].between(rows["latency_search_lo_ms"], rows["latency_search_hi_ms"]).mean()
    assert found["inside"] == pytest.approx(float(inside))


def test_trials_that_were_measured_all_along_have_no_optimism() -> None:
    assert optimism([{"latency_ms": 1.0, "latency_search_ms": 2.0, "latency_verified": 1}]) is None
    one = {"latency_ms": 3.0, "latency_search_ms": 2.0, "latency_verified": 1, "latency_search_source": "learned"}
    found = optimism([one])
    assert found is not None
    assert found.ratio == pytest.approx(1.5)
    assert math.isnan(found.spread)
    assert "1.500 (geometric mean of 1, " in str(found)


def test_a_limit_holds_for_the_end_of_the_interval_where_latencies_are_predicted() -> None:
    metrics = {"latency_ms": 4.8, "latency_lo_ms": 4.0, "latency_hi_ms": 5.5}
    for model, upper, lower in (("measure", -0.04, 0.2 / 5), ("predict", 0.1, 0.2)):
        config = load_config({"latency": {"model": model}, "constraints": {"latency_ms": "<= 5"}})
        assert violations(metrics, constraints_of(config))["latency_ms"] == pytest.approx(upper)
        config = load_config({"latency": {"model": model}, "constraints": {"latency_ms": ">= 5"}})
        assert violations(metrics, constraints_of(config))["latency_ms"] == pytest.approx(lower)


def test_a_network_whose_interval_crosses_the_limit_is_not_trained(tmp_path: Path) -> None:
    run = go(tmp_path, formula_pricer(FormulaModel(width=0.5)), constraints__latency_ms="<= 0.016")
    frame = run.frame()
    originals = frame[frame["copy_of"].isna()]
    refused = originals[originals["state"] == "infeasible"]
    assert (refused["latency_hi_ms"] > 0.016).all()
    assert (refused["latency_ms"] <= 0.016).any()  # it is the interval that broke it
    assert refused["val_accuracy"].isna().all()
    front = run.pareto()
    assert len(front) > 0
    assert (front["latency_hi_ms"] <= 0.016).all()


def test_what_breaks_the_limit_when_measured_is_infeasible(searched: Path, tmp_path: Path) -> None:
    believed = load_run(searched / "run").frame()["latency_hi_ms"]
    limit = float(believed.quantile(0.6))  # many are believed to keep it, and really take half as long again
    laboratory = FormulaLaboratory(
        truth=lambda plan: 1.5 * by_work(plan), refitted=lambda ratios: FormulaModel(factor=float(np.mean(ratios)))
    )
    run = go(tmp_path, formula_pricer(laboratory=laboratory), constraints__latency_ms=f"<= {limit}")
    frame = run.frame()
    measured = frame[frame["latency_verified"].eq(1).fillna(False)]
    over = measured[measured["latency_hi_ms"] > limit]
    assert len(over) > 0
    assert set(over["state"]) == {"infeasible"}
    assert (run.pareto()["latency_hi_ms"] <= limit).all()


def test_energy_is_the_power_of_the_machine_times_the_latency(searched: Path, tmp_path: Path) -> None:
    for run in (load_run(searched / "run"), go(copied(searched, tmp_path), formula_pricer())):
        frame = run.frame()
        watts = frame["energy_mj"] / frame["latency_ms"]
        assert watts.to_numpy(dtype=float) == pytest.approx(float(watts.iloc[0]))
        assert float(watts.iloc[0]) == pytest.approx(energy_of(1.0, this_machine(1)).mj)
        assert set(frame["energy_method"]) == {"constant power"}


def test_energy_can_be_an_objective_and_a_limit(tmp_path: Path) -> None:
    watts = energy_of(1.0, this_machine(1)).mj
    limit = 0.016 * watts
    objectives = {"objectives": {"val_accuracy": "max", "energy_mj": "min"}, "constraints.energy_mj": f"<= {limit}"}
    with priced_by(formula_pricer()):
        settings = {"latency.model": "predict", **objectives}
        config = write_config(tmp_path, workers=0, trials=4)
        run = search(config, overrides=settings, out=tmp_path / "run", quiet=True)
    front, frame = run.pareto(), run.frame()
    assert (front["energy_mj"] <= limit).all()
    assert (front["latency_verified"] == 1).all()
    assert (frame[frame["state"] == "infeasible"]["energy_mj"] > limit).all()


def test_energy_cannot_be_asked_for_where_no_power_is_known(tmp_path: Path, monkeypatch) -> None:
    unknown = replace(this_machine(1), peak_w=math.nan, power_w=math.nan)
    monkeypatch.setattr(nas.latency, "this_machine", lambda threads: unknown)
    assert energy_metrics(1.0, unknown) == {}
    overrides = {"objectives": {"val_accuracy": "max", "energy_mj": "min"}}
    with pytest.raises(ConfigError, match=r"energy_mj cannot be an objective or a limit on this machine: .*peak_w"):
        search(write_config(tmp_path), overrides=overrides, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# -- before a search begins ---------------------------------------------------------------------------------------------


def test_without_a_calibration_the_command_that_makes_one_is_said_and_nothing_is_made(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(nas.latency, "open_model", lambda threads: None)
    config = write_config(tmp_path)
    with pytest.raises(
        ConfigError, match=r"none.*`nas calibrate --budget 300 --space .*small\.toml --threads 2`"
    ) as error:
        search(config, overrides={"latency.model": "predict", "latency.threads": 2}, out=tmp_path / "run", quiet=True)
    assert 'model = "measure"' in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="nas calibrate --budget 300 --space CONFIG`"):
        make_pricer(load_config({"latency": {"model": "predict"}}))


def test_a_finished_run_is_opened_without_a_calibration(searched: Path, tmp_path: Path, monkeypatch) -> None:
    folder = copied(searched, tmp_path)
    before = go(folder, formula_pricer()).frame()
    monkeypatch.setattr(nas.latency, "open_model", lambda threads: None)
    config = write_config(folder, workers=0, trials=TRIALS)
    run = search(config, overrides={"latency.model": "predict"}, out=folder / "run", quiet=True)
    pd.testing.assert_frame_equal(run.frame(), before)


def test_verification_cannot_be_left_out_where_latencies_are_predicted() -> None:
    with pytest.raises(ConfigError, match=r"verify: expected true"):
        load_config({"latency": {"model": "predict"}, "final": {"verify": False}})
    assert load_config({"final": {"verify": False}}).latency.model == "measure"
    assert isinstance(make_pricer(load_config({})), Measured)


def test_a_run_of_a_version_that_knew_fewer_keys_goes_on(searched: Path, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    with Store.open(folder / "run" / "run.db") as store:
        plain = store.get_meta("config")
        assert plain["run"].pop("threads") == 1
        store.set_meta("config", plain)
    text = (folder / "run" / "config.toml").read_text()
    (folder / "run" / "config.toml").write_text(text.replace("threads = 1\n", ""))
    assert load_run(folder / "run").config.run.threads == 1
    assert go(folder, formula_pricer()).finished
    assert load_config({}).latency.model == "measure"  # as before there was a choice


def _plan(run: Run, trial: int) -> Plan:
    from ops.plan import lower

    return lower(run.build(trial), run.example_input())
