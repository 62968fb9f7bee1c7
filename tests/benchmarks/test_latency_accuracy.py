"""Records that survive, runs that moved, splits that tear nothing apart, and tables, on measurements made up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from benchmarks.latency import predicting, splits, tables, targets
from benchmarks.latency.frames import observed, part
from benchmarks.latency.measuring import ATTEMPTS, BATCH, MOVED, SENTINEL, Chosen, Planned, measure_all, plan_all
from benchmarks.latency.networks import specs
from benchmarks.latency.records import Record, Records, RecordsError
from hw_models.insitu import InPlace
from hw_models.measure import Measurement, Measurer
from hw_models.workload import Workload, workload
from ops.runtime import Runtime


def record(name: str = "a/1/0", group: str = "a/1", run: int = 0, ms: float = 2.0, steps: int = 3) -> Record:
    rounds = (1.1 * ms, ms, 1.01 * ms, 1.2 * ms)
    in_place = tuple(tuple(int(1e6 * r / steps) for _ in range(steps)) for r in rounds)
    return Record(name, group, run, ms, ms, 1.1 * ms, 1.05 * ms, 1.2 * ms, "ok", rounds, ms, in_place)


# -- records ----------------------------------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = Records(tmp_path / "deep" / "r.jsonl", "here/t1")
    file.add([record(), record("a/1/1", run=4)])
    again = Records(file.path, "here/t1")
    assert again.all == file.all == [record(), record("a/1/1", run=4)]
    assert again.next_run == 5
    assert again.of("a/1/1") == [record("a/1/1", run=4)]


def test_a_line_cut_off_by_a_crash_is_skipped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, "here").add([record(), record("a/1/1")])
    path.write_text(path.read_text()[:-40])
    torn = Records(path, "here")
    assert torn.all == [record()]
    torn.add([record("a/1/2")])
    assert Records(path, "here").all == [record(), record("a/1/2")]


def test_records_of_other_runtimes_and_batches_stay_and_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for runtime, batch in (("here", 1), ("there", 1), ("here", 8)):
        Records(path, runtime, batch).add([record()])
    found = Records(path, "here", 8)
    assert (len(found.all), found.others) == (1, 2)


def test_records_of_another_version_are_refused_by_name_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, "here").add([record()])
    line = json.loads(path.read_text())
    path.write_text(path.read_text() + json.dumps({**line, "version": 99}) + "\n")
    with pytest.raises(RecordsError, match=r"r\.jsonl, line 2: expected version 1, got 99"):
        Records(path, "here")


def test_halves_are_the_even_and_the_odd_rounds() -> None:
    assert record(ms=2.0).halves == pytest.approx((2.02, 2.0))


# -- measuring --------------------------------------------------------------------------------------------------------


class Machine:
    """Stands in for the clock: every network takes 1 ms, times what the machine is slowed down by in a run."""

    def __init__(self, slow: Sequence[float] = ()) -> None:
        self.slow, self.runs = list(slow), list[list[str]]()

    def __call__(self, networks: Mapping[str, tuple[Runtime, torch.Tensor]], measurer: Measurer) -> dict[str, InPlace]:
        by = self.slow.pop(0) if self.slow else 1.0
        self.runs.append([name for name in networks if not name.startswith(SENTINEL)])
        return {name: self.one(len(runtime.schedule.steps), by) for name, (runtime, _) in networks.items()}

    @staticmethod
    def one(steps: int, by: float) -> InPlace:
        rounds = by * np.array([1.02, 1.0, 1.01, 1.03])
        whole = Measurement(by, by, 1.1 * by, by, by, "ok", tuple(rounds))
        in_place = np.outer(rounds, np.ones(steps)) / steps
        return InPlace(whole, in_place.min(axis=0), in_place, by)


@pytest.fixture(scope="module")
def small() -> list[Planned]:
    """Thirty networks (two batches), few distinct ones: planning takes time."""
    made = plan_all([s for s in specs(120) if s.setting in ("mlp-64", "convnet-8")][:6])
    copies = [replace(made[i % 6], spec=replace(made[i % 6].spec, index=1000 + i)) for i in range(24)]
    return [*made, *copies]


@pytest.fixture
def file(tmp_path: Path) -> Records:
    return Records(tmp_path / "r.jsonl", "here")


def test_every_network_is_measured_in_batches_and_some_again_in_a_later_run(
    small: list[Planned], file: Records
) -> None:
    machine = Machine()
    measure_all(small, file, Measurer(), again=0.2, measure=machine)
    names = [p.spec.name for p in small]
    first, second, *later = machine.runs
    assert first + second == names
    assert len(first) == BATCH
    again = [name for run in later for name in run]
    assert 0 < len(again) < len(names) / 2
    assert set(again) == {name for name in names if len(file.of(name)) == 2}
    chosen = Chosen(names, file)
    assert (chosen.moved, chosen.unsettled, len(chosen.again)) == (0, [], len(again))


def test_what_was_measured_is_not_measured_again_after_a_restart(small: list[Planned], file: Records) -> None:
    measure_all(small[:BATCH], file, Measurer(), again=0, measure=Machine())
    restarted, machine = Records(file.path, "here"), Machine()
    measure_all(small, restarted, Measurer(), again=0, measure=machine)
    assert machine.runs == [[p.spec.name for p in small[BATCH:]]]
    finished = Machine()
    measure_all(small, Records(file.path, "here"), Measurer(), again=0, measure=finished)
    assert finished.runs == []


def test_networks_of_a_run_that_moved_are_measured_once_more_and_the_earlier_times_are_not_used(
    small: list[Planned], file: Records
) -> None:
    machine = Machine(slow=[1.0, 1.0 + 2 * MOVED])
    measure_all(small, file, Measurer(), again=0, measure=machine)
    assert machine.runs[2] == machine.runs[1]
    chosen = Chosen([p.spec.name for p in small], file)
    assert chosen.moved == 1
    assert {r.ms for r in chosen.records} == {1.0}


def test_a_network_whose_floor_was_not_confirmed_is_measured_once_more(small: list[Planned], file: Records) -> None:
    measure_all(small[:3], file, Measurer(), again=0, measure=Machine())
    disturbed = Records(file.path.with_name("disturbed.jsonl"), "here")
    first = small[0].spec.name
    disturbed.add(replace(r, quality="unreached", ms=3.0) if r.name == first else r for r in file.all)
    machine = Machine()
    measure_all(small[:3], disturbed, Measurer(), again=0, measure=machine)
    assert machine.runs == [[first]]
    chosen = Chosen([first], disturbed)
    assert (chosen.records[0].ms, chosen.unsettled) == (1.0, [])


def test_a_machine_that_never_rests_ends_all_the_same_and_is_reported(small: list[Planned], file: Records) -> None:
    machine = Machine(slow=[1.0, *np.linspace(1.2, 9.0, 30)])
    measure_all(small, file, Measurer(), again=0, measure=machine)
    names = [p.spec.name for p in small]
    assert max(len(file.of(name)) for name in names) <= ATTEMPTS
    assert Chosen(names, file).unsettled


def test_a_runtime_that_computes_something_else_stops_the_benchmark(small: list[Planned], file: Records) -> None:
    strange = replace(small[0], module=torch.nn.Sequential(small[0].module, torch.nn.Softplus()))
    with pytest.raises(RuntimeError, match="differs from torch"):
        measure_all([strange], file, Measurer(), measure=Machine())


# -- splits and frames ------------------------------------------------------------------------------------------------


def test_folds_tear_no_architecture_apart_and_spread_every_setting() -> None:
    groups = [spec.group for spec in specs(300)]
    fold = splits.folds(groups, 5)
    for group in set(groups):
        assert len({int(f) for f, g in zip(fold, groups) if g == group}) == 1
    assert min(np.bincount(fold)) > 45
    for setting in {group.partition("/")[0] for group in groups}:
        mine = [(g, int(f)) for f, g in zip(fold, groups) if g.startswith(f"{setting}/")]
        assert len({f for _, f in mine}) == min(5, len({g for g, _ in mine}))
    with pytest.raises(ValueError, match="expected 2 to"):
        splits.folds(groups[:2], 2)


def test_the_known_share_is_what_a_loop_over_steps_finds(small: list[Planned]) -> None:
    work = workload([p.plan for p in small[:6]])
    rng = np.random.default_rng(0)
    times = [rng.random(len(work.of(i))) for i in range(6)]
    training = np.array([True, True, False, False, True, False])
    found = splits.known_share(work, times, splits.curves_of(work, training))
    curves = list(work.steps["curve"])
    seen = {curves[step] for i in range(6) if training[i] for step in work.of(i)}
    for i in range(6):
        expected = sum(t for t, step in zip(times[i], work.of(i)) if curves[step] in seen) / sum(times[i])
        assert found[i] == pytest.approx(expected)
    assert found[training] == pytest.approx(1.0)
    assert any(0 < share < 1 for share in found)


def test_observed_steps_add_up_to_the_steps_of_each_network(small: list[Planned]) -> None:
    (cells,) = plan_all([next(s for s in specs(60) if s.setting == "nasbench201-16")])
    six = [*small[:5], cells]
    work = workload([p.plan for p in six], [p.spec.name for p in six])
    assert len(set(work.of(5))) < len(work.of(5))  # its cells are alike: some steps are executed more than once
    rng = np.random.default_rng(0)
    records = [
        replace(
            record(str(i)), step_rounds_ns=tuple(map(tuple, rng.integers(1000, 9000, (4, len(work.of(i)))).tolist()))
        )
        for i in range(6)
    ]
    steps, networks = observed(work, records, threads=1)
    assert list(networks.index) == list(range(6))
    for i, one in enumerate(records):
        mine = steps[steps["network"] == i]
        assert mine["key"].is_unique
        assert mine["count"].sum() == len(work.of(i)) == networks["steps"][i]
        assert (mine["ms"] * mine["count"]).sum() == pytest.approx(one.step_ms().sum())
        assert (mine["hi_ms"] >= mine["ms"]).all()
    chosen = np.array([False, True, False, True, True, False])
    of_part, networks_of_part = part(steps, networks, chosen)
    assert set(of_part["network"]) == set(networks_of_part.index) == {1, 3, 4}
    with pytest.raises(ValueError, match="measured with 3 steps, but its plan has"):
        observed(work, [record(str(i)) for i in range(6)], threads=1)


class Oracle:
    """A model that knows the mean of its training networks and remembers whom it was fitted to."""

    fitted: list[set[str]]

    def __init__(self, networks: pd.DataFrame) -> None:
        self.mean = float(networks["ms"].mean())
        Oracle.fitted.append(set(networks["group"]))

    def predict_many(self, work: Workload) -> pd.DataFrame:
        answer = pd.DataFrame({"ms": np.full(len(work), self.mean)})
        return answer.assign(lo_ms=0.5 * self.mean, hi_ms=2 * self.mean, source="measured")


def _measured(small: list[Planned], groups: Sequence[str]) -> tuple[Workload, list[Record]]:
    work = workload([p.plan for p in small[:6]])
    records = [record(f"n{i}", group, ms=1.0 + i, steps=len(work.of(i))) for i, group in enumerate(groups)]
    return work, records


def test_nobody_is_predicted_by_a_model_that_saw_its_architecture(small: list[Planned]) -> None:
    groups = ["s/a", "s/b", "s/a", "s/c", "s/d", "s/b"]
    work, records = _measured(small, groups)
    fold = splits.folds(groups, 2)
    Oracle.fitted = []
    fit: Any = lambda steps, networks: Oracle(networks)  # noqa: E731
    found, _ = predicting.by_others(work, records, observed(work, records, 1), fold, fit)
    assert list(found["network"]) == [f"n{i}" for i in range(6)]
    for number, seen in enumerate(Oracle.fitted):
        assert seen == {group for group, f in zip(groups, fold) if f != number}
        others = [r.ms for r, f in zip(records, fold) if f != number]
        assert found.loc[found["fold"] == number, "ms"].unique() == pytest.approx([np.mean(others)])
    torn: npt.NDArray[np.int64] = np.array([0, 0, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="architecture s/a is in folds 0 and 1"):
        predicting.by_others(work, records, observed(work, records, 1), torn, fit)


def test_tiled_networks_are_the_same_networks_again(small: list[Planned]) -> None:
    work = workload([p.plan for p in small[:6]])
    many = predicting.tiled(work, 20)
    assert len(many) == 24
    for i in range(24):
        assert np.array_equal(many.of(i), work.of(i % 6))


def test_the_speed_is_that_of_the_best_call(small: list[Planned]) -> None:
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    Oracle.fitted = []
    model: Any = Oracle(pd.DataFrame({"ms": [1.0], "group": ["s/a"]}))
    work = workload([p.plan for p in small[:6]])
    assert predicting.per_second(model, work, clock=lambda: next(ticks)) == pytest.approx(3.0)  # 6 in 2 s


# -- tables -----------------------------------------------------------------------------------------------------------


def predictions(errors: Sequence[float], source: str = "measured") -> pd.DataFrame:
    real = 1.0 + np.arange(len(errors))
    guess = real * (1 + np.asarray(errors))
    facts: dict[str, Any] = {"setting": "s", "group": "s/a", "known": 1.0, "source": source}
    return pd.DataFrame({"measured_ms": real, "ms": guess, "lo_ms": 0.9 * guess, "hi_ms": 1.1 * guess}).assign(**facts)


def test_figures_stand_beside_ceiling_target_and_verdict() -> None:
    good, ceiling, target, verdict = tables.scored("known shapes", predictions([0.01] * 9 + [0.06]), [(1.0, 1.08)] * 3)
    assert good["hit5"] == pytest.approx(0.9)
    assert good["hit10"] == pytest.approx(1.0)
    assert ceiling["n"] == 3
    assert ceiling["hit5"] == pytest.approx(0.0)  # each of the two is 8 % / sqrt(2) off
    assert target["hit5"] == ">= 0.8"
    assert {verdict[name] for name in ("hit5", "hit10", "rmspe", "spearman")} == {"met"}
    *_, verdict = tables.scored("known shapes", predictions([0.01] * 7 + [0.06, 0.06, 0.11]), [])
    assert (verdict["hit5"], verdict["hit10"]) == ("MISSED", "MISSED")


def test_intervals_may_be_too_wide_as_well_as_too_narrow() -> None:
    assert targets.verdict("unseen shapes", {"coverage": 0.9})["coverage"] == "met"
    assert targets.verdict("unseen shapes", {"coverage": 0.8})["coverage"] == "MISSED"
    assert targets.verdict("unseen shapes", {"coverage": 0.97})["coverage"] == "MISSED"
    assert targets.verdict("unseen shapes", {"coverage": float("nan")})["coverage"] == "no figure"


def test_a_row_without_networks_meets_no_target() -> None:
    rows = tables.scored("known shapes", predictions([]), [])
    assert set(rows[-1].values()) == {"  verdict", "no figure"}
    assert [line["verdict"] for line in tables.flat(rows)] == ["", "no figure", "no figure", "no figure", "no figure"]


def test_every_figure_of_the_table_is_a_line_of_the_file() -> None:
    rows = tables.scored("known shapes", predictions([0.01, -0.2, 0.3]), [(1.0, 1.01)])
    flat = pd.DataFrame(tables.flat(rows)).set_index("figure")
    assert list(flat.index) == ["n", *tables.FIGURES]
    assert flat.loc["hit10", "value"] == pytest.approx(1 / 3)
    assert (flat.loc["hit10", "target"], flat.loc["hit10", "verdict"]) == (">= 0.99", "MISSED")
    assert flat.loc["hit10", "ceiling"] == pytest.approx(1.0)
    assert flat.loc["bias", "verdict"] == ""


def test_sources_are_told_apart_the_surest_first() -> None:
    both = pd.concat([predictions([0.2] * 4, "learned"), predictions([0.0] * 3)])
    table = tables.by_source(both).set_index("source")
    assert list(table.index) == ["measured", "learned"]
    assert list(table["hit5"]) == [1.0, 0.0]
    assert list(table["coverage"]) == [1.0, 0.0]
    assert list(table["width"]) == pytest.approx([0.2, 0.2])
