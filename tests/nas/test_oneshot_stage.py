"""Supernets before the trials: trained once each, continued after any death, and their finds handed out as trials."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nas.artifacts import load_weights
from nas.config import RunConfig, load_config
from nas.driver import search
from nas.errors import ConfigError, EvaluationFailed, RunError
from nas.evaluate import TrialEvaluator
from nas.executors import InlineExecutor, LocalExecutor
from nas.executors.base import Event, Job
from nas.loop import SearchLoop
from nas.oneshot import stage
from nas.oneshot.algorithm import Found
from nas.oneshot.algorithms import ALGORITHMS
from nas.oneshot.engine import RESULT, read_log
from nas.oneshot.job import SupernetTrainer, job_folder
from nas.oneshot.searcher import OneShot, make_options
from nas.oneshot.stage import MAX_BLAMELESS, MAX_LOST, StagePlan, plan_stage, proposals, run_stage
from nas.report.history import equal_budget, searcher_summary
from nas.run import load_run
from nas.searchers import Proposal, SpaceExhausted, is_oneshot, searcher_options
from nas.setup import make_data, make_space
from nas.store import Store
from ops.layers import sparse_layers
from tests.nas.latency_fakes import formula_pricer
from tests.nas.oneshot_fakes import Fake, FakeDense
from tests.nas.search_helpers import CONFIG
from tests.nas.test_loop import Script, Silent, done

torch.set_num_threads(1)


def install(patch: pytest.MonkeyPatch) -> None:
    """The fakes among the algorithms, the second as the dense one; latencies by a formula."""
    patch.setitem(ALGORITHMS, "fake", Fake)
    patch.setitem(ALGORITHMS, "fake_dense", FakeDense)
    patch.setattr(stage, "DENSE", "fake_dense")
    patch.setattr("nas.evaluate.make_pricer", lambda config: formula_pricer())
    patch.setattr("nas.verify.make_pricer", lambda config: formula_pricer())


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Watch:
    """Progress of a stage, remembered."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.started: dict[str, bool] = {}
        self.finished: dict[str, bool] = {}
        self.shares: dict[str, list[float]] = {}

    def stage_started(self, jobs: Mapping[str, bool]) -> None:
        self.started = dict(jobs)

    def stage_progress(self, job: str, info: Mapping[str, Any]) -> None:
        self.shares.setdefault(job, []).append(info["done"])

    def stage_finished(self, job: str, *, failed: bool = False) -> None:
        self.finished[job] = failed

    def stage_ended(self) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def write_run_file(folder: Path, searchers: str = '"fake"', trials: int = 2, **options: Any) -> Path:
    path = folder / "small.toml"
    lines = [f"options.fake.{name} = {json.dumps(value)}" for name, value in {"batch_size": 16, **options}.items()]
    text = CONFIG.format(workers=0, trials=trials, epochs=1, method="static", export="false")
    text = text.replace('searchers = ["random", "nsga2"]', "\n".join([f"searchers = [{searchers}]", *lines]))
    path.write_text(text.replace("limit = 300", "limit = 160"))
    return path


class Bench:
    """A run without a driver: its config, data, space and folder."""

    def __init__(self, folder: Path, searchers: str = '"fake"', **options: Any) -> None:
        self.config: RunConfig = load_config(write_run_file(folder, searchers, **options))
        self.data = make_data(self.config)
        self.space = make_space(self.config, self.data.input_shape, self.data.classes, None)
        self.folder = folder / "run"
        self.watch = Watch()

    def plan(self) -> StagePlan:
        plan = plan_stage(self.config, self.space, self.data)
        assert plan is not None
        return plan

    def inline(self, jobs: int) -> InlineExecutor:
        return InlineExecutor(SupernetTrainer(self.config, self.folder, self.data, self.space))

    def local(self, jobs: int) -> LocalExecutor:
        plain = {
            "config": json.dumps(self.config.as_dict()),
            "name": "x",
            "folder": str(self.folder),
            "space_folder": "",
        }
        self.folder.mkdir(exist_ok=True)
        return LocalExecutor("tests.nas.oneshot_fakes:setup", plain, workers=1)


# -- names and options ------------------------------------------------------------------------------------------------------


def test_one_shot_names_and_options_are_accepted_in_a_run_file(tmp_path):
    config = load_config(write_run_file(tmp_path, '"fake", "tpe"', lr=1))
    assert config.search.searchers == ("random", "fake", "tpe")  # random search is always among them
    assert config.search.options["fake"]["lr"] == 1
    assert make_options("fake", config.search.options["fake"]).lr == 1.0
    assert load_config(config.as_dict(), name="small").search == config.search


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, 'has no option "epoch"; did you mean "epochs"'),
        ({"epochs": 0}, "epochs: expected a whole number >= 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected int, got 1.5"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"alpha_betas": [0.5]}, r"alpha_betas: expected 2 values, got \[0.5\]"),
        ({"augment": ["blur"]}, "augment: expected one of crop, flip, cutout"),
    ],
)
def test_wrong_options_are_said_when_the_config_is_read(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_run_file(tmp_path, **options))


def test_an_unknown_searcher_names_the_one_shot_ones_too(tmp_path):
    with pytest.raises(Exception, match='unknown searcher "fak"; did you mean "fake"'):
        search(write_run_file(tmp_path, '"fak"'), out=tmp_path / "run", quiet=True)


def test_options_and_their_defaults_can_be_asked_for():
    assert searcher_options("fake")["epochs"] == 4
    assert searcher_options("fake")["augment"] == ()
    assert is_oneshot("fake")
    assert not is_oneshot("random")
    assert not is_oneshot("nobody")


# -- plan -------------------------------------------------------------------------------------------------------------------


def test_every_replicate_is_a_job_with_a_seed_of_its_own_and_a_dense_one_beside_it(tmp_path):
    plan = Bench(tmp_path, seeds=2, epochs=6).plan()
    assert [(job.name, job.algorithm, job.seed) for job in plan.jobs] == [
        ("fake-s0", "fake", 0),
        ("fake-s1", "fake", 1),
        ("dense-fake-s0", "fake_dense", 0),
        ("dense-fake-s1", "fake_dense", 1),
    ]
    assert {(job.options["epochs"], job.options["batch_size"]) for job in plan.jobs} == {(6, 16)}
    assert [job.name for job in plan.dense["fake"]] == ["dense-fake-s0", "dense-fake-s1"]


def test_a_dense_search_that_is_listed_itself_serves_and_has_as_many_replicates_as_needed(tmp_path):
    plan = Bench(tmp_path, '"fake", "fake_dense"', seeds=2).plan()
    assert [job.name for job in plan.jobs] == ["fake-s0", "fake-s1", "fake_dense-s0", "fake_dense-s1"]
    assert [job.name for job in plan.own["fake_dense"]] == ["fake_dense-s0"]
    assert [job.name for job in plan.dense["fake"]] == ["fake_dense-s0", "fake_dense-s1"]


def test_without_controls_there_is_no_dense_search(tmp_path):
    plan = Bench(tmp_path, controls=False).plan()
    assert [job.name for job in plan.jobs] == ["fake-s0"]
    assert plan.dense == {}


def test_a_run_without_one_shot_searchers_has_no_stage(tmp_path):
    bench = Bench(tmp_path, '"tpe"')
    assert plan_stage(bench.config, bench.space, bench.data) is None


def test_augmentation_of_images_is_refused_for_tables(tmp_path):
    bench = Bench(tmp_path, augment=["flip"])
    table = type(bench.data)(**{**vars(bench.data), "input_shape": (64,)})
    with pytest.raises(ConfigError, match=r"options.fake.augment: flip are for images"):
        plan_stage(bench.config, bench.space, table)


# -- stage ------------------------------------------------------------------------------------------------------------------


def test_every_job_leaves_a_result_and_is_not_trained_again(tmp_path, monkeypatch):
    bench = Bench(tmp_path, seeds=2)
    plan = bench.plan()
    results = run_stage(plan, bench.folder, bench.inline, bench.watch)
    assert list(results) == [job.name for job in plan.jobs]
    assert bench.watch.finished == dict.fromkeys(results, False)
    assert results["fake-s0"].found != results["fake-s1"].found
    monkeypatch.setattr(Fake, "step", lambda *_: pytest.fail("trained again"))
    assert run_stage(plan, bench.folder, bench.inline, bench.watch) == results


def test_a_search_that_fails_is_named_with_its_folder_and_the_others_are_kept(tmp_path, monkeypatch):
    bench = Bench(tmp_path, seeds=3, controls=False)
    whole = Fake.step

    def step(self: Fake, *args: Any) -> Any:
        report = whole(self, *args)
        if self.setting.seed == 1 and self.count == 9:
            raise ValueError("no such thing")
        nan = self.setting.seed == 2 and self.count == 9
        return type(report)(report.loss * (float("nan") if nan else 1), report.hits)

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "step", step)
        with pytest.raises(EvaluationFailed) as caught:
            run_stage(bench.plan(), bench.folder, bench.inline, bench.watch)
    text = str(caught.value)
    assert text.startswith("2 of 3 one-shot searches failed")
    folder = job_folder(bench.folder, "fake-s1")
    assert f"fake-s1: ValueError: no such thing (checkpoint, log and error.txt: {folder})" in text
    assert "Traceback" not in text
    assert (folder / "error.txt").read_text().startswith("Traceback")
    assert "the loss is nan in phase" in text
    assert bench.watch.finished == {"fake-s0": False, "fake-s1": True, "fake-s2": True}
    assert (job_folder(bench.folder, "fake-s0") / RESULT).is_file()
    assert read_log(job_folder(bench.folder, "fake-s1"))
    again = run_stage(bench.plan(), bench.folder, bench.inline, bench.watch)  # whatever it was, it is gone
    assert len(again) == 3
    assert bench.watch.started == {"fake-s0": True, "fake-s1": False, "fake-s2": False}


def test_a_process_that_dies_is_replaced_and_goes_on_from_its_checkpoint_to_the_same_result(tmp_path):
    whole = Bench(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path, controls=False, checkpoint_s=0)
    expected = run_stage(whole.plan(), whole.folder, whole.inline, whole.watch)
    (tmp_path / "b").mkdir()
    bench = Bench(tmp_path / "b", controls=False, checkpoint_s=0, die_at=9)
    found = run_stage(bench.plan(), bench.folder, bench.local, bench.watch)
    assert (bench.folder / "died").exists()
    assert any("it goes on from its last checkpoint" in text for text in bench.watch.messages)
    assert found["fake-s0"].found == expected["fake-s0"].found
    strip = lambda log: [{k: v for k, v in row.items() if k != "seconds"} for row in log]  # noqa: E731
    assert strip(found["fake-s0"].log) == strip(expected["fake-s0"].log)
    assert bench.watch.shares["fake-s0"][-1] == 1.0


class Scripted(Script):
    """The executor the test plays, as the stage wants one."""

    def close(self) -> None:
        self.closed = True


def test_a_search_whose_process_dies_again_and_again_is_given_up(tmp_path):
    bench = Bench(tmp_path, controls=False)
    executor = Scripted(lambda job: Event("lost", job.trial, job.attempt, {}, "its process was killed", 1.0))
    with pytest.raises(EvaluationFailed, match=rf"killed \({MAX_LOST} times\)"):
        run_stage(bench.plan(), bench.folder, lambda _: executor, bench.watch)
    assert [job.attempt for job in executor.jobs] == [1, 2, 3]
    assert executor.closed


def test_machines_that_leave_are_not_held_against_a_search_until_there_were_many(tmp_path):
    bench = Bench(tmp_path, controls=False)

    def answer(job: Job) -> Event:
        own = job.attempt in (2, 5)  # less often than is held against it
        return Event("lost", job.trial, job.attempt, {} if own else {"blameless": True}, "gone", 1.0)

    executor = Scripted(answer)
    with pytest.raises(EvaluationFailed, match=rf"gone \({MAX_BLAMELESS} times\)"):
        run_stage(bench.plan(), bench.folder, lambda _: executor, bench.watch)
    assert [job.attempt for job in executor.jobs] == list(range(1, MAX_BLAMELESS + 3))


def test_that_no_worker_is_there_is_said_once(tmp_path):
    bench = Bench(tmp_path, controls=False)
    real = bench.inline(1)

    class Late(Scripted):
        looks = 0

        def poll(self, timeout_s: float = 0.0) -> list[Event]:
            self.looks += 1
            self.capacity = int(self.looks >= 3)
            return super().poll(timeout_s)

    def answer(job: Job) -> list[Event]:
        real.submit(job)
        return real.poll()

    run_stage(bench.plan(), bench.folder, lambda _: Late(answer, capacity=0), bench.watch)
    assert [text for text in bench.watch.messages if "no worker" in text] == [
        "there is no worker at the moment; the one-shot searches wait for one"
    ]


def test_as_many_jobs_run_at_once_as_the_executor_holds(tmp_path):
    bench = Bench(tmp_path, seeds=5, controls=False)
    most = []

    def answer(job: Job) -> Event:
        most.append(len(executor.waiting))
        return Event(
            "failed", job.trial, job.attempt, {"type": "nas.errors.EvaluationFailed", "message": "no"}, "T", 1.0
        )

    executor = Scripted(answer, capacity=2)
    with pytest.raises(EvaluationFailed, match="5 of 5"):
        run_stage(bench.plan(), bench.folder, lambda _: executor, bench.watch)
    assert max(most) == 2


def test_a_late_answer_of_a_process_that_was_given_up_is_not_believed(tmp_path):
    bench = Bench(tmp_path, controls=False)
    real = bench.inline(1)

    def answer(job: Job) -> list[Event]:
        if job.attempt == 1:
            return [Event("lost", job.trial, 1, {}, "killed", 1.0)]
        late = Event("failed", job.trial, 1, {"type": "builtins.ValueError", "message": "late"}, "Traceback", 1.0)
        real.submit(job)
        return [late, *real.poll()]

    executor = Scripted(answer)
    assert len(run_stage(bench.plan(), bench.folder, lambda _: executor, bench.watch)) == 1
    assert bench.watch.finished == {"fake-s0": False}


def test_an_interrupt_closes_the_executor_and_loses_nothing(tmp_path):
    bench = Bench(tmp_path, controls=False)

    def interrupt(job: Job) -> Event:
        raise KeyboardInterrupt

    executor = Scripted(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_stage(bench.plan(), bench.folder, lambda _: executor, bench.watch)
    assert executor.closed
    assert len(run_stage(bench.plan(), bench.folder, bench.inline, bench.watch)) == 1


# -- proposals --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, StagePlan, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        bench = Bench(tmp_path_factory.mktemp("trained"), seeds=2)
        plan = bench.plan()
        yield bench, plan, run_stage(plan, bench.folder, bench.inline, bench.watch)


def test_proposals_carry_the_replicates_seed_and_note(trained):
    bench, plan, results = trained
    made = proposals(plan, results, bench.space, bench.folder, 0)
    assert set(made) == {"fake", "fake/random", "fake/dense"}
    assert [(p.seed, p.sampler["replicate"], p.initial) for p in made["fake"]] == [(0, 0, None), (1, 1, None)]
    for p, job in zip(made["fake"], plan.own["fake"], strict=True):
        found = results[job.name].found[0]
        assert json.loads(p.architecture.to_json()) == found["architecture"]
        assert p.sampler["strongest"] == found["note"]["strongest"]
        assert bench.space.architecture(p.architecture.as_dict()) == p.architecture


def test_proposals_are_the_same_after_a_restart_even_if_controls_would_now_be_drawn_otherwise(trained, monkeypatch):
    bench, plan, results = trained
    before = proposals(plan, results, bench.space, bench.folder, 0)
    monkeypatch.setattr(stage, "_draw_controls", lambda *_: pytest.fail("drawn again"))
    assert proposals(bench.plan(), results, bench.space, bench.folder, 0) == before
    monkeypatch.undo()
    (bench.folder / "oneshot" / stage.CONTROLS).unlink()
    assert proposals(plan, results, bench.space, bench.folder, 0) == before


def test_a_damaged_file_of_controls_says_what_to_do(trained):
    bench, plan, results = trained
    path = bench.folder / "oneshot" / stage.CONTROLS
    proposals(plan, results, bench.space, bench.folder, 0)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(RunError, match=r"controls.json: damaged.*remove it"):
        proposals(plan, results, bench.space, bench.folder, 0)
    path.write_text(whole)


def test_the_searcher_hands_out_its_list_in_order_and_then_has_nothing(trained):
    bench = trained[0]
    given = [Proposal(bench.space.sample(seed), seed=seed) for seed in range(3)]
    searcher = OneShot(bench.space, {"val_accuracy": "max"}, proposals=given)
    assert [searcher.propose([], index, lambda digest: True) for index in range(3)] == given
    with pytest.raises(SpaceExhausted):
        searcher.propose([], 3)


# -- in the loop ------------------------------------------------------------------------------------------------------------


def one_loop(store: Store, executor: Script, bench: Bench, lists: Mapping[str, list[Proposal]]) -> SearchLoop:
    searchers = {name: OneShot(bench.space, {"val_accuracy": "max"}, proposals=made) for name, made in lists.items()}
    totals = {name: len(made) for name, made in lists.items()}
    return SearchLoop(
        store, searchers, totals, executor, objectives={"val_accuracy": "max"}, seed=7, epochs=1, progress=Silent()
    )


def test_only_trials_of_equal_network_seed_and_start_are_copies(trained, tmp_path):
    bench = trained[0]
    network = bench.space.sample(0)
    lists = {
        "a": [Proposal(network), Proposal(network, seed=8), Proposal(network, {"k": 1}, 7, "oneshot/x/i.safetensors")],
        "b": [
            Proposal(network, seed=7),
            Proposal(network, seed=8),
            Proposal(network, {}, 7, "oneshot/x/i.safetensors"),
        ],
        "c": [Proposal(network, {}, 7, "oneshot/x/other.safetensors")],
    }
    executor = Script(lambda job: done(job, 0.1 + job.trial))
    with Store.create(tmp_path / "run.db") as store:
        one_loop(store, executor, bench, lists).run()
        trials = store.trials()
        one_loop(store, executor, bench, lists).run()  # again: nothing to do
        assert store.trials() == trials
    assert sum(trial.copy_of is None for trial in trials) == 4 == len(executor.jobs)
    key = lambda t: (t.seed, t.sampler.get("initial"))  # noqa: E731
    by_number = {trial.trial: trial for trial in trials}
    for trial in trials:
        if trial.copy_of is not None:
            assert key(trial) == key(by_number[trial.copy_of])
    assert [job.payload.get("initial") for job in executor.jobs].count("oneshot/x/i.safetensors") == 1
    assert {job.payload["seed"] for job in executor.jobs} == {7, 8}


def test_a_trial_with_given_weights_and_masks_keeps_the_masks(trained, tmp_path):
    bench = trained[0]
    drawn_ones = (bench.space.sample(seed) for seed in range(50))
    sparse = next(a for a in drawn_ones if min(v for name, v in a.decisions if name.endswith("density")) < 1)
    model = bench.space.build(sparse)
    start = {}
    for name, layer in sparse_layers(model):
        if layer.density < 1:
            start[f"{name}.mask"] = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
            start[f"{name}.weight"] = torch.full(layer.weight.shape, 0.01)
    save_file(start, tmp_path / "start.safetensors")
    evaluator = TrialEvaluator(bench.config, tmp_path, bench.data, bench.space)
    payload = {"trial": 0, "architecture": sparse.to_json(), "seed": 0, "initial": "start.safetensors"}
    answer = evaluator(payload, lambda info: None)
    trained_model = bench.space.build(sparse)
    load_weights(tmp_path, 0, trained_model)
    for name, layer in sparse_layers(trained_model):
        if f"{name}.mask" in start:
            assert torch.equal(layer.mask, start[f"{name}.mask"])
            assert (layer.weight[~layer.mask] == 0).all()
    kept = sum(layer.nnz for _, layer in sparse_layers(trained_model))
    assert answer["metrics"]["nnz"] >= kept
    drawn = evaluator({**payload, "trial": 1, "initial": None}, lambda info: None)
    assert drawn["metrics"]["nnz"] != answer["metrics"]["nnz"]


@pytest.mark.parametrize("damage", ["missing", "torn", "shape", "name"])
def test_a_start_that_does_not_fit_is_said(trained, tmp_path, damage):
    bench = trained[0]
    architecture = bench.space.sample(0)
    path = tmp_path / "start.safetensors"
    name = next(iter(bench.space.build(architecture).state_dict()))
    if damage in ("shape", "name"):
        save_file({name if damage == "shape" else "nobody": torch.ones(3)}, path)
    elif damage == "torn":
        path.write_bytes(b"torn")
    evaluator = TrialEvaluator(bench.config, tmp_path, bench.data, bench.space)
    payload = {"trial": 0, "architecture": architecture.to_json(), "seed": 0, "initial": "start.safetensors"}
    with pytest.raises(EvaluationFailed, match=r"start.safetensors"):
        evaluator(payload, lambda info: None)


# -- the whole way ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands in for a kill at this very point."""


def table(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {
        (t.searcher, t.index): (t.digest, t.seed, t.metrics.get("val_accuracy"), t.sampler.get("replicate"))
        for t in load_run(folder).trials
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        folder = tmp_path_factory.mktemp("whole")
        search(write_run_file(folder, trials=3, seeds=2), out=folder / "run", quiet=True)
        yield folder


def test_a_search_trains_supernets_and_then_what_they_found_with_controls_beside(whole):
    run = load_run(whole / "run")
    counts = run.frame()["searcher"].value_counts().to_dict()
    assert counts == {"random": 3, "fake": 2, "fake/random": 2, "fake/dense": 2, "dense": 1}
    assert [t.seed for t in run.trials if t.searcher == "fake"] == [0, 1]
    assert run.finished


def test_the_report_of_such_a_run_names_them_all(whole):
    text = (whole / "run" / "report.html").read_text()
    assert all(name in text for name in ("fake/random", "fake/dense", "outside the budget"))


def test_few_trials_of_one_shot_searches_do_not_cut_the_budget_of_others(whole):
    run = load_run(whole / "run")
    assert equal_budget(run.frame()) == 3
    summary = searcher_summary(run.frame(), run.objectives).set_index("searcher")
    assert summary["trials"].to_dict() == {"random": 3, "fake": 2, "fake/random": 2, "fake/dense": 2, "dense": 1}


def test_a_search_killed_in_the_stage_and_started_again_ends_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("nas.driver._Search._finish", lambda *_: None)  # no report: seconds
    real = Fake.step
    for kill_at in (5, 9):

        def step(self: Fake, *args: Any, kill_at: int = kill_at) -> Any:
            if self.count == kill_at and self.setting.seed == 1:
                raise Stop
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Fake, "step", step)
            patch.setattr(
                "nas.executors.task.describe", lambda error: (_ for _ in ()).throw(error)
            )  # nobody catches it
            with pytest.raises(Stop):
                search(whole / "small.toml", out=tmp_path / "run", quiet=True)
        assert load_run(tmp_path / "run").trials == []  # and the run can be looked at meanwhile
    search(whole / "small.toml", out=tmp_path / "run", quiet=True)
    assert table(tmp_path / "run") == table(whole / "run")


def test_a_finished_run_is_left_alone(whole, monkeypatch):
    before = table(whole / "run")
    monkeypatch.setattr("nas.driver.plan_stage", lambda *_: pytest.fail("planned again"))
    search(whole / "small.toml", out=whole / "run", quiet=True)
    assert table(whole / "run") == before


def test_what_was_found_with_weights_is_handed_on_with_a_file_in_the_run(tmp_path, monkeypatch):
    bench = Bench(tmp_path, controls=False)
    real = Fake.found
    monkeypatch.setattr(
        Fake, "found", lambda self: [Found(f.architecture, f.note, {"w": torch.ones(2)}) for f in real(self)]
    )
    plan = bench.plan()
    results = run_stage(plan, bench.folder, bench.inline, bench.watch)
    (made,) = proposals(plan, results, bench.space, bench.folder, 0)["fake"]
    assert made.initial == "oneshot/fake-s0/initial-000.safetensors"
    assert (bench.folder / made.initial).is_file()
