"""What is special about running on Ray Tune: how jobs end with their processes, what Tune leaves behind, and `NasSearch`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import ConcurrencyLimiter

from nas.errors import ConfigError, EvaluationFailed, RunError, UnknownName
from nas.executors import Executor, Job, Placement, make_executor
from nas.executors.ray_cluster import connect, disconnect
from nas.executors.tune import SETTINGS
from nas.executors.tune_search import NasSearch
from nas.searchers import SEARCHERS, make_searcher
from search_spaces.architecture import Architecture
from tests.conformance.searcher_laws import layered_space, pair_space
from tests.conformance.test_executors import TASK, collect, run_one
from tests.ray_environment import restored_environment

SETTLED = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_MAX_PENDING_TRIALS_PG": "2"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with restored_environment():
        connection = connect("", cpus=4)
        yield
        disconnect(connection)


def make(folder: Path | None = None, task: str = "setup", **options: Any) -> Executor:
    return make_executor("tune", f"{TASK}:{task}", {"run_id": "none"}, Placement(folder=folder, workers=1, **options))


# -- jobs as trials -----------------------------------------------------------------------------------------------------------


def test_a_job_ends_with_its_process_or_its_time_and_the_next_one_runs(cluster: None, tmp_path: Path) -> None:
    with make(tmp_path, timeout_s=2.0) as executor:
        killed = run_one(executor, "signal", 1, signal=signal.SIGKILL)
        assert (killed.kind, killed.payload) == ("lost", {})
        assert "died" in (killed.error or "")
        overdue = run_one(executor, "sleep", 2, seconds=60)
        assert (overdue.kind, overdue.payload["type"]) == ("failed", "builtins.TimeoutError")
        assert "timeout_s = 2 s" in (overdue.error or "")
        executor.submit(Job(3, 1, {"do": "sleep", "seconds": 60}))
        assert executor.cancel(3)
        assert run_one(executor, "return", 3, value=7).payload == {"value": 7}
        assert (tmp_path / "tune").is_dir()
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
    assert not (tmp_path / "tune").exists()
    assert not SETTINGS.keys() & os.environ.keys()


def test_processes_that_die_in_the_setup_are_one_clear_error(cluster: None) -> None:
    with make(task="setup_dies") as executor:
        executor.submit(Job(0, 1, {}))
        with pytest.raises(EvaluationFailed, match="a worker died 3 times in a row"):
            collect(executor, 1, seconds=90)


def test_an_address_of_ray_client_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"executor tune cannot work through ray://there:10001; .* use executor ray"):
        make(address="ray://there:10001")


# -- NasSearch without Tune ---------------------------------------------------------------------------------------------------


def score(config: dict[str, Any]) -> dict[str, float]:
    decisions = Architecture.from_json(config["architecture"]).as_dict()
    return {"accuracy": float(decisions["l0.width"]), "latency_ms": float(decisions["depth"])}  # type: ignore[arg-type]


def search_for(searcher: str, **options: Any) -> NasSearch:
    return NasSearch(layered_space(), searcher, ["accuracy", "latency_ms"], ["max", "min"], seed=3, **options)


def go_on(
    search: Any, first: int, count: int, measure: Callable[[dict[str, Any]], dict[str, float]] = score
) -> list[str]:
    """Digests of the next proposals, each evaluated before the next but one."""
    digests, waiting = [], []
    for number in range(first, first + count):
        config = search.suggest(f"t{number}")
        assert config["digest"] == Architecture.from_json(config["architecture"]).digest
        digests.append(config["digest"])
        waiting.append((f"t{number}", config))
        if len(waiting) > 1:
            trial, done = waiting.pop(0)
            search.on_trial_complete(trial_id=trial, result=measure(done))
    for trial, done in waiting:
        search.on_trial_complete(trial_id=trial, result=measure(done))
    return digests


@pytest.mark.parametrize("searcher", sorted(SEARCHERS))
def test_a_restored_search_goes_on_with_the_same_proposals(searcher: str, tmp_path: Path) -> None:
    options = {
        "nsga2": {"population": 4},
        "tpe": {"startup": 4},
        "regularized_evolution": {"population": 4, "tournament": 2},
    }
    one = search_for(searcher, options=options.get(searcher))
    before = go_on(one, 0, 10)
    assert len(set(before)) == 10
    one.suggest("pending")
    one.save(str(tmp_path / "state"))
    saved = json.loads((tmp_path / "state").read_text())
    assert saved["searcher"] == searcher
    if searcher == "nsga2":
        assert {trial["sampler"]["generation"] for trial in saved["trials"]} >= {0, 1}
    two = search_for(searcher, options=options.get(searcher))
    two.restore(str(tmp_path / "state"))
    for search in (one, two):
        search.on_trial_complete("pending", {"accuracy": 8.0, "latency_ms": 1.0})
    assert go_on(two, 10, 6) == go_on(one, 10, 6)


def test_it_proposes_what_its_searcher_proposes() -> None:
    mine = go_on(NasSearch(layered_space(), "random", "accuracy", "max", seed=5), 0, 5)
    searcher = make_searcher("random", layered_space(), {"accuracy": "max"}, 5)
    theirs: list[str] = []
    for index in range(5):
        theirs.append(searcher.propose([], index, theirs.__contains__).architecture.digest)
    assert mine == theirs


def test_results_steer_the_search() -> None:
    """Evolution that is told that narrow networks are better proposes narrower ones than if wide ones were."""
    options = {"population": 6, "tournament": 6}
    widths = []
    for sign in (1, -1):
        search = NasSearch(layered_space(), "regularized_evolution", "score", "max", options=options)
        found: list[float] = []

        def measure(config: dict[str, Any], sign: int = sign, found: list[float] = found) -> dict[str, float]:
            found.append(score(config)["accuracy"])
            return {"score": sign * found[-1]}

        go_on(search, 0, 30, measure)
        widths.append(sum(found[10:]))
    assert widths[0] > widths[1]


def test_failed_and_infeasible_trials_are_data(tmp_path: Path) -> None:
    search = NasSearch(layered_space(), "tpe", "accuracy", "max", constraints={"latency_ms": "<= 2"})
    for trial in "abcd":
        search.suggest(trial)
    search.on_trial_complete("a", {"accuracy": 1.0, "latency_ms": 1.0})
    search.on_trial_complete("b", {"accuracy": float("nan"), "latency_ms": 1.0})
    search.on_trial_complete("c", {"latency_ms": 4.0})
    search.on_trial_complete("d", {"accuracy": 1.0}, error=True)
    search.on_trial_complete("nobody's", {"accuracy": 1.0})
    search.save(str(tmp_path / "state"))
    trials = json.loads((tmp_path / "state").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed", "infeasible", "failed"]
    assert trials[2]["violations"] == {"latency_ms": 1.0}


def test_a_space_with_nothing_left_ends_the_experiment() -> None:
    search = NasSearch(pair_space(), "random", mode="max")
    proposals = [search.suggest(str(number)) for number in range(7)]
    assert len({proposal["digest"] for proposal in proposals[:6]}) == 6
    assert proposals[6] == NasSearch.FINISHED


def test_points_evaluated_elsewhere_are_known_and_not_proposed_again() -> None:
    search = NasSearch(pair_space(), "random", ["a", "b"], ["max", "min"])
    known = pair_space().sample(0)
    search.add_evaluated_point({"architecture": known.to_json()}, [1.0, 2.0])
    digests = [search.suggest(str(number))["digest"] for number in range(5)]
    assert known.digest not in digests
    assert search.suggest("one more") == NasSearch.FINISHED
    with pytest.raises(ConfigError, match=r"one value for each of a, b, got 1\.0"):
        search.add_evaluated_point({"architecture": known.to_json()}, 1.0)


def test_what_is_wrong_is_said_when_it_is_made_or_restored(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match='did you mean "tpe"'):
        NasSearch(layered_space(), "tpp", "a", "max")
    with pytest.raises(ConfigError, match="lists of one length"):
        NasSearch(layered_space(), "tpe", ["a", "b"], ["max"])
    with pytest.raises(ConfigError, match="expected metric and mode"):
        NasSearch(layered_space(), "tpe").suggest("1")
    path = tmp_path / "state"
    search_for("random").save(str(path))
    with pytest.raises(ConfigError, match="written with searcher = 'random', this searcher has 'tpe'"):
        search_for("tpe").restore(str(path))
    path.write_text("{}")
    with pytest.raises(RunError, match=r"state: expected a file that NasSearch\.save wrote"):
        search_for("tpe").restore(str(path))


def test_metric_and_mode_may_come_from_tune() -> None:
    search = NasSearch(layered_space(), "random")
    assert search.set_search_properties("accuracy", "max", {"lr": 0.1})
    assert search.suggest("1")["digest"]
    assert not search.set_search_properties("loss", "min", {})
    assert search.set_search_properties(None, None, {})


def test_a_pickled_search_goes_on() -> None:
    """Tune pickles its searcher when an experiment starts."""
    one = search_for("nsga2", options={"population": 4})
    go_on(one, 0, 6)
    two = cloudpickle.loads(cloudpickle.dumps(one))
    assert go_on(two, 6, 4) == go_on(one, 6, 4)


# -- NasSearch in Tune --------------------------------------------------------------------------------------------------------


def train(config: dict[str, Any]) -> None:
    accuracy = int(config["digest"], 16) / 2**64  # no two alike, so that ASHA has somebody to stop
    for epoch in range(1, 5):
        tune.report({"epoch": epoch, "accuracy": accuracy * epoch, "latency_ms": score(config)["latency_ms"]})


def test_tune_runs_it_with_a_limiter_and_asha_and_keeps_its_state(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTLED.items():
        monkeypatch.setenv(name, value)
    search = search_for("nsga2", options={"population": 4})
    asha = ASHAScheduler(time_attr="epoch", metric="accuracy", mode="max", max_t=4, grace_period=1, reduction_factor=2)
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 0.5}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, 2), scheduler=asha, num_samples=8, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="asha", storage_path=str(tmp_path), verbose=0),
    ).fit()
    epochs = sorted(result.metrics["epoch"] for result in results)
    assert len(epochs) == 8
    assert epochs[0] < 4
    assert epochs[-1] == 4
    again = search_for("nsga2", options={"population": 4})
    again.restore_from_dir(str(tmp_path / "asha"))
    assert again.suggest("next") == search.suggest("next")
    with pytest.raises(ValueError, match="Search algorithms cannot be used with PopulationBasedTraining"):
        tune.Tuner(
            train,
            tune_config=tune.TuneConfig(
                search_alg=search_for("random"),
                scheduler=PopulationBasedTraining("epoch", "accuracy", "max", hyperparam_mutations={"lr": [1.0, 2.0]}),
                num_samples=1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="pbt", storage_path=str(tmp_path), verbose=0),
        ).fit()
    assert ray.is_initialized()
