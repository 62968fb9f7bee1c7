"""Tables of results: known ones come back as they were, unknown ones say what they are, invented ones are smooth and repeatable."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from nas.errors import ConfigError, DataError
from nas.frames import write_frame
from nas.simulate import (
    KnownTable,
    Result,
    SyntheticTable,
    counted,
    decisions_space,
    from_file,
    from_frame,
    from_run,
    macro_space,
    macro_table,
    simulate,
)
from search_spaces import Space, get_space
from search_spaces.chooser import Chooser

SPACE = decisions_space(5, 3)


def mixed(c: Chooser) -> nn.Module:
    """Decisions of every kind, one of which is only taken sometimes."""
    if c.choice("op", ("conv", "none", "1")) == "conv":
        c.choice("width", (8, 16, 32))
    c.choice("density", (1.0, 0.5, 0.05))
    c.choice("bias", (True, False))
    return nn.Identity()


def some(n: int) -> KnownTable:
    architectures = list({a.digest: a for a in map(SPACE.sample, range(2 * n))}.values())[:n]
    results = [Result({"val_accuracy": i / n}, [{"epoch": 1, "val_accuracy": i / n}], 1.0) for i in range(n)]
    return KnownTable(architectures, results)


def test_the_known_comes_back_and_the_unknown_is_the_nearest_by_brute_force() -> None:
    table = some(30)
    known = {a.digest for a in table.architectures}
    distances = set()
    for i in range(200):
        architecture = SPACE.sample(1000 + i)
        found = table.result(architecture, 0)
        far = [sum(a[f"d{k}"] != architecture[f"d{k}"] for k in range(5)) for a in table.architectures]
        if architecture.digest in known:
            assert found.metrics["simulated"] == "known"
            continue
        assert (found.metrics["simulated"], found.metrics["simulated_distance"]) == ("nearest", min(far))
        chosen = table.architectures[far.index(min(far))]
        assert found.metrics["val_accuracy"] == table.result(chosen, 0).metrics["val_accuracy"]
        distances.add(min(far))
    assert len(distances) > 1


def test_an_unknown_architecture_can_be_an_error_or_another_tables() -> None:
    architecture = SPACE.sample(77)
    results = [Result({"val_accuracy": 0.5}, [{"epoch": 1, "val_accuracy": 0.5}])]
    strict = KnownTable([SPACE.sample(1)], results, unknown="error")
    with pytest.raises(ConfigError, match="no result for decisions"):
        strict.result(architecture, 0)
    invented = SyntheticTable(SPACE)
    table = KnownTable([SPACE.sample(1)], results, unknown=invented)
    assert table.result(architecture, 0) == invented.result(architecture, 0)
    assert table.result(architecture, 0).metrics["simulated"] == "synthetic"


def test_of_several_seeds_the_one_asked_for_is_taken_and_another_seed_always_gets_the_same() -> None:
    architecture = SPACE.sample(1)
    results = [Result({"val_accuracy": seed / 10}) for seed in range(3)]
    table = KnownTable([architecture] * 3, results, [0, 1, 2])
    assert [table.result(architecture, s).metrics["val_accuracy"] for s in range(3)] == [0.0, 0.1, 0.2]
    assert {table.result(architecture, 99).metrics["val_accuracy"] for _ in range(5)} <= {0.0, 0.1, 0.2}
    assert len({table.result(architecture, s).metrics["val_accuracy"] for s in range(50, 80)}) == 3
    assert len(table) == 1


def test_a_table_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one result"):
        KnownTable([], [])
    with pytest.raises(DataError, match="finite seconds"):
        Result({}, seconds=-1.0)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_what_a_search_found_is_read_back_as_a_table(tmp_path: Path, suffix: str) -> None:
    space = Space(mixed, "mixed")
    frame = simulate(space, SyntheticTable(space), ["random"], 18).frame
    path = tmp_path / f"trials{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        write_frame(frame, path)
    else:
        frame.to_csv(path, index=False)
    table = from_file(path, space, epochs=4, unknown="error")
    again = simulate(space, table, ["random"], 18).frame
    for column in ("digest", "val_accuracy", "latency_ms", "duration_s"):
        assert again[column].tolist() == frame[column].tolist()
    assert again["simulated"].eq("known").all()
    assert table.epochs == 4


def test_curves_of_columns_are_replayed_and_missing_ones_are_made_to_end_at_the_accuracy() -> None:
    frame = pd.DataFrame(
        {
            **{f"arch.d{i}": ["o0", "o1", "o2"] for i in range(5)},
            "val_accuracy": [0.5, 0.6, 0.7],
            "val_accuracy@1": [0.2, None, 0.3],
            "val_accuracy@2": [0.5, None, 0.7],
            "state": ["complete", "complete", "failed"],
        }
    )
    table = from_frame(frame, SPACE, epochs=3)
    assert len(table) == 2
    first, second = (table.result(a, 0) for a in table.architectures)
    assert [row["val_accuracy"] for row in first.curve] == [0.2, 0.5]
    assert [row["epoch"] for row in second.curve] == [1, 2, 3]
    assert second.curve[-1]["val_accuracy"] == 0.6
    assert 0.1 < second.curve[0]["val_accuracy"] < 0.6


def test_columns_that_are_not_of_the_space_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: decision 'd1' is missing"):
        from_frame(pd.DataFrame({"arch.d0": ["o0"], "val_accuracy": [1.0]}), SPACE)
    wrong = pd.DataFrame({**{f"arch.d{i}": ["o0"] for i in range(5)}, "arch.more": ["o0"]})
    with pytest.raises(DataError, match=r"unknown decisions \['more'\]"):
        from_frame(wrong, SPACE)
    with pytest.raises(DataError, match="columns arch"):
        from_frame(pd.DataFrame({"val_accuracy": [1.0]}), SPACE)
    with pytest.raises(DataError, match="cannot be read"):
        from_file(tmp_path / "none.csv", SPACE)


class RunLike:
    """The attributes of `nas.run.Run` that a table reads."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self._path = folder, path

    @property
    def trials(self) -> list:
        from nas.store import Store

        with Store.open(self._path, read_only=True) as store:
            return store.trials()

    def curve(self, trial: int) -> list:
        from nas.store import Store

        with Store.open(self._path, read_only=True) as store:
            return store.curve(trial)


def test_a_run_is_replayed_as_it_was(tmp_path: Path) -> None:
    invented = SyntheticTable(SPACE, spread=0.5)
    first = simulate(SPACE, invented, ["random", "nsga2"], 12, 3, store=tmp_path / "run.db")
    table = from_run(RunLike(tmp_path, tmp_path / "run.db"))  # type: ignore[arg-type]
    assert table.epochs == 9
    again = simulate(SPACE, table, ["random", "nsga2"], 12, 3)
    assert again.stays == first.stays
    assert again.frame["val_accuracy"].tolist() == first.frame["val_accuracy"].tolist()


def test_an_invented_table_is_repeatable_smooth_and_of_its_seed() -> None:
    space = decisions_space(20, 4)
    table, twin, other = SyntheticTable(space), SyntheticTable(space), SyntheticTable(space, seed=1)
    generator = random.Random(0)
    near, far = [], []
    for i in range(100):
        one, two = space.sample(i), space.sample(1000 + i)
        assert table.result(one, 3) == twin.result(one, 3)
        assert table.result(one, 3).metrics != table.result(one, 4).metrics
        assert table.truth(one) != other.truth(one)
        near.append(abs(table.truth(one)[0] - table.truth(space.mutate(one, generator))[0]))
        far.append(abs(table.truth(one)[0] - table.truth(two)[0]))
    assert np.mean(near) < 0.6 * np.mean(far)


def test_invented_curves_rise_to_the_accuracy_and_cross() -> None:
    space = decisions_space(20, 4)
    table = SyntheticTable(space, noise=0.0)
    curves = np.array([[r["val_accuracy"] for r in table.result(space.sample(i), 0).curve] for i in range(60)])
    assert (np.diff(curves, axis=1) >= 0).all()
    final = [table.truth(space.sample(i))[0] for i in range(60)]
    assert curves[:, -1] == pytest.approx(final)
    early = np.corrcoef(curves[:, 0].argsort().argsort(), curves[:, -1].argsort().argsort())[0, 1]
    assert 0.3 < early < 0.99


def test_more_of_a_number_is_better_and_dearer() -> None:
    space = Space(mixed, "mixed")
    table = SyntheticTable(space)
    base = {"op": "conv", "density": 0.5, "bias": True}
    truths = [table.truth(space.architecture({**base, "width": width})) for width in (8, 16, 32)]
    assert truths == sorted(truths)
    assert [t[1] for t in truths] == sorted(t[1] for t in truths)


def test_costs_can_be_counted_on_the_network_itself() -> None:
    space = get_space("mlp", input_shape=(1, 8, 8), classes=10)
    costs = counted(space, (1, 8, 8))
    table = SyntheticTable(space, costs=costs)
    architecture = space.sample(0)
    metrics = table.result(architecture, 0).metrics
    assert metrics["params"] == sum(p.numel() for p in space.build(architecture).parameters())
    assert metrics["latency_ms"] == metrics["macs"] / 20e6


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"noise": -1.0}, {"chance": 0.9, "best": 0.5}, {"seconds": -1.0}])
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="synthetic table"):
        SyntheticTable(SPACE, **wrong)


def test_the_macro_benchmark_is_read_with_its_seeds_and_merges_equal_networks(tmp_path: Path) -> None:
    rows = ["arch,acc_seed0,acc_seed1,acc_seed2,acc_mean,acc_std,params,flops"]
    rows += ["00000000,45.0,46.0,47.0,46.0,0.8,100,1000", "00000021,80.0,81.0,82.0,81.0,0.8,300,3000"]
    path = tmp_path / "macro.csv"
    path.write_text("\n".join(rows))
    space, table = macro_table(path)
    assert len(table) == 2
    assert space.size() == 3**8
    one = space.architecture({f"layer{i}": int(d) for i, d in enumerate("00000021")})
    assert [table.result(one, s).metrics["val_accuracy"] for s in range(3)] == pytest.approx([0.8, 0.81, 0.82])
    assert table.result(one, 0).metrics["macs"] == 3000
    other = macro_space().architecture({f"layer{i}": int(d) for i, d in enumerate("00000201")})
    assert other.digest != one.digest
    same = macro_space().architecture({f"layer{i}": int(d) for i, d in enumerate("01000001")})
    twin = macro_space().architecture({f"layer{i}": int(d) for i, d in enumerate("01000010")})
    assert same.digest == twin.digest
    path.write_text("arch,params\n0,1\n")
    with pytest.raises(DataError, match="missing are"):
        macro_table(path)
