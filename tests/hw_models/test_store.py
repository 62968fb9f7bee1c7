"""The store of measurements: what went in comes out, epochs are kept apart, and networks measured again tell the noise."""

import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hw_models.measure import Measurement
from hw_models.store import Epoch, MeasurementStore
from hw_models.workload import STEP_COLUMNS, STEP_NUMBERS, STEP_TEXTS

M = Measurement(0.1, 0.09, 0.123456789012345, 0.2, 0.3, "ok", (0.1, 0.12))
SENTINELS = {"dense": M, "sparse": replace(M, floor_ms=0.2)}
ENVIRONMENT = {"governor": "performance", "load_1min": 0.5, "steal_share": None}


def measured(
    count: int = 3, each: int = 4, seed: int = 0, start: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, dict[Any, Any]]:
    """(steps, networks, rounds) of `count` networks that have half of their steps in common; networks are labelled start, ..."""
    rng = np.random.default_rng(seed)
    labels = range(start, start + count)
    rows: list[dict[str, Any]] = []
    for label in labels:
        for i in range(each):
            fact = i if i % 2 else 1000 * label + i
            texts = {name: f"{name} {fact} é" for name in STEP_TEXTS}
            numbers = {name: fact + k / 3 for k, name in enumerate(STEP_NUMBERS)}
            ms = float(rng.random())
            rows.append(
                {**texts, **numbers, "ms": ms, "lo_ms": ms / 2, "hi_ms": 2 * ms, "network": label, "quality": "thin"}
            )
    size = range(count)
    networks = pd.DataFrame(
        {
            "name": [f"network {label}" for label in labels],
            "ms": rng.random(count) + 1,
            "lo_ms": rng.random(count),
            "hi_ms": rng.random(count) + 2,
            "median_ms": rng.random(count),
            "p90_ms": [math.nan] * count,
            "quality": ["ok"] * count,
            "sum_ms": rng.random(count),
            "steps": [40 + i for i in size],
            "calls": [3] * count,
            "weight_bytes": [2**40 + i for i in size],
            "arena_bytes": [12] * count,
            "batch": [1] * count,
            "threads": [2] * count,
            "group": ["darts"] * count,
            "digest": [f"digest {label}" for label in labels],
        },
        index=pd.Index(labels, name="network"),
    )
    rounds = {label: {"whole": rng.random(8), "steps": rng.random((8, 5))} for label in labels}
    return pd.DataFrame(rows), networks, rounds


def opened(store: MeasurementStore, runtime: str = "cpu/t1", **floors: float) -> Epoch:
    sentinels = {**SENTINELS, **{name: replace(M, floor_ms=floor) for name, floor in floors.items()}}
    return store.open_epoch(runtime, ENVIRONMENT, sentinels)


def test_what_went_in_comes_out_exactly(tmp_path: Path) -> None:
    steps, networks, rounds = measured()
    store = MeasurementStore(tmp_path / "deep" / "m.sqlite")
    epoch = opened(store)
    ids = store.add_networks(epoch, steps, networks, rounds)
    store.close()

    store = MeasurementStore(tmp_path / "deep" / "m.sqlite")
    again, nets = store.observations("cpu/t1")
    assert list(nets.index) == list(ids)
    assert (nets.pop("epoch") == epoch.id).all()
    assert (again.pop("epoch") == epoch.id).all()
    pd.testing.assert_frame_equal(nets[networks.columns].set_axis(networks.index), networks, check_dtype=False)
    again["network"] = again["network"].map(dict(zip(ids, networks.index)))
    pd.testing.assert_frame_equal(again[steps.columns], steps, check_dtype=False)
    for label, number in zip(networks.index, ids):
        assert {name: found.tolist() for name, found in store.rounds(number).items()} == {
            name: given.tolist() for name, given in rounds[label].items()
        }
    assert store.observations("cpu/t2")[0].empty
    with pytest.raises(KeyError, match="no network 99"):
        store.rounds(99)


def test_the_frames_have_the_same_columns_and_types_with_and_without_rows(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    empty = store.observations("cpu/t1")
    store.add_networks(opened(store), *measured())
    for none, some in zip(empty, store.observations("cpu/t1")):
        assert none.empty
        assert list(none.dtypes.items()) == list(some.dtypes.items())
    steps, networks = empty
    assert set(STEP_COLUMNS) < set(steps)
    assert {str(steps[name].dtype) for name in (*STEP_NUMBERS, "ms", "lo_ms", "hi_ms")} == {"float64"}
    assert {str(networks[name].dtype) for name in ("steps", "calls", "weight_bytes", "batch")} == {"int64"}


def test_equal_steps_are_kept_once(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    store.add_networks(epoch, *measured(3, 4))  # 2 of each network in common, 2 of its own
    store.add_networks(epoch, *measured(3, 4))
    with sqlite3.connect(tmp_path / "m.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM step").fetchone() == (2 + 3 * 2,)
        assert db.execute("SELECT COUNT(*) FROM observation").fetchone() == (2 * 3 * 4,)
    db.close()


def test_only_name_and_time_of_a_network_must_be_known_and_columns_of_other_names_come_back(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    steps, networks, _ = measured(2)
    plain = networks[["name", "ms"]].assign(space=["darts", "mlp"], image=np.array([32, 64]))
    store.add_networks(opened(store), steps.assign(where="x"), plain)
    steps, found = store.observations("cpu/t1")
    assert found["space"].tolist() == ["darts", "mlp"]
    assert found["image"].tolist() == [32, 64]
    assert set(steps["where"]) == {"x"}
    assert found["lo_ms"].tolist() == found["hi_ms"].tolist() == found["ms"].tolist()
    assert set(found["quality"]) == {"unreached"}
    assert found["sum_ms"].isna().all()
    assert set(found["batch"]) == set(found["threads"]) == {1}


def test_a_network_without_steps_is_kept_and_a_number_that_is_missing_stays_missing(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    steps, networks, _ = measured(2)
    steps = steps[steps["network"] == 1].assign(tiles=math.nan)
    ids = store.add_networks(opened(store), steps, networks)
    found, nets = store.observations("cpu/t1")
    assert list(nets.index) == list(ids)
    assert set(found["network"]) == {ids[1]}
    assert found["tiles"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, n: (s.drop(columns="macs"), n), r"steps: the columns \['macs'\] are missing"),
        (lambda s, n: (s, n.drop(columns="ms")), r"networks: the columns \['ms'\] are missing"),
        (lambda s, n: (s.assign(network=7), n), "steps: network 7 is not in the index"),
        (lambda s, n: (s, n.set_axis([0, 1, 1])), "1 is there twice"),
        (lambda s, n: (s, n.assign(ms=[1.0, math.nan, 1.0])), "networks: ms of 'network 1' .row 1. is nan"),
        (lambda s, n: (s, n.assign(ms=[1.0, 1.0, 0.0])), "networks: ms of 'network 2' .row 2. is 0"),
        (lambda s, n: (s, n.assign(ms=-1.0)), "networks: ms of 'network 0' .row 0. is -1"),
        (lambda s, n: (s.assign(hi_ms=math.inf), n), "steps: hi_ms of 'family 0 é' .row 0. is inf"),
        (lambda s, n: (s.assign(ms=-0.1), n), "steps: ms of .* is -0.1: no time"),
        (lambda s, n: (s.assign(quality="good"), n), "quality must be one of .* got 'good'"),
        (lambda s, n: (s, n.assign(calls=math.nan)), "networks: calls must be a whole number, got nan"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_of_it_is_kept(change: Any, message: str, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    steps, networks, _ = measured()
    with pytest.raises(ValueError, match=message):
        store.add_networks(epoch, *change(steps, networks))
    with pytest.raises(ValueError, match="rounds: 17 is not in the index"):
        store.add_networks(epoch, steps, networks, {17: {}})
    assert store.observations("cpu/t1", "all")[1].empty


def test_an_epoch_goes_on_while_the_sentinels_keep_their_times(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    first = opened(store)
    assert first.is_new
    assert first.moved == {}
    for floor in (0.1, 0.1029, 0.0971):
        again = opened(store, dense=floor)
        assert (again.id, again.is_new, again.moved) == (first.id, False, {})
    assert (opened(store, "cpu/t2").id, opened(store, "cpu/t2").is_new) == (first.id + 1, False)


def test_an_epoch_cannot_drift_away_by_small_steps(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    floors = [0.1 * 1.02**i for i in range(4)]
    assert [opened(store, dense=floor).is_new for floor in floors] == [True, False, True, False]


def test_moved_sentinels_begin_a_new_epoch_that_says_what_moved(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    first = opened(store)
    slow = opened(store, dense=0.11, sparse=0.201)
    assert slow.is_new
    assert slow.moved == {"dense": pytest.approx(0.1)}
    other = store.open_epoch("cpu/t1", {}, {"dense": replace(M, floor_ms=0.11), "new": M})
    assert other.is_new
    assert set(other.moved) == {"sparse", "new"}
    assert all(math.isnan(change) for change in other.moved.values())
    assert len({first.id, slow.id, other.id}) == 3
    back = opened(store)  # the machine is as it was at first
    assert (back.id, back.is_new) == (first.id, False)


def test_an_epoch_needs_sentinels(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    with pytest.raises(ValueError, match="there are none"):
        store.open_epoch("cpu/t1", {}, {})
    with pytest.raises(ValueError, match=r"\['dense'\] took no time"):
        opened(store, dense=0.0)
    assert store.epochs().empty


def test_epochs_are_never_mixed_silently(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    a, b = opened(store), opened(store, dense=0.2)
    in_a = store.add_networks(a, *measured(2))
    in_b = store.add_networks(b, *measured(3, seed=1))
    other = store.add_networks(opened(store, "cpu/t2"), *measured(1))

    def ids(epoch: Any) -> list[int]:
        steps, networks = store.observations("cpu/t1", epoch)
        assert set(steps["network"]) == set(networks.index)
        return list(networks.index)

    assert ids(None) == ids("latest") == ids(b.id) == list(in_b)
    assert ids(a.id) == list(in_a)
    assert ids("all") == [*in_a, *in_b]
    assert set(store.observations("cpu/t1", "all")[1]["epoch"]) == {a.id, b.id}
    assert not set(other) & set(ids("all"))
    assert store.observations("cpu/t2", a.id)[1].empty  # of another runtime
    opened(store)  # back in a, which is the latest now
    assert ids(None) == list(in_a)
    with pytest.raises(ValueError, match='epoch must be a number, "latest" or "all"'):
        store.observations("cpu/t1", "last")


def test_epochs_are_listed_with_environment_sentinels_and_counts(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    store.add_networks(opened(store), *measured(2))
    opened(store)
    store.open_epoch("cpu/t2", {}, {"third": M})
    frame = store.epochs()
    assert frame["runtime"].tolist() == ["cpu/t1", "cpu/t2"]
    assert frame["networks"].tolist() == [2, 0]
    assert frame["openings"].tolist() == [2, 1]
    assert frame["environment"].tolist() == [ENVIRONMENT, {}]
    assert frame["sparse_ms"].fillna(0).tolist() == [0.2, 0]
    assert frame["third_ms"].fillna(0).tolist() == [0, 0.1]
    assert (frame["last_opened_at"] >= frame["started_at"]).all()
    assert store.epochs("cpu/t2").index.tolist() == [frame.index[1]]
    assert store.epochs("none").empty


def test_noise_is_told_by_each_network_against_itself_measured_before(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    epoch = opened(store)
    steps, networks, _ = measured(3)

    def add(epoch: Epoch, ms: list[float], digests: list[str]) -> list[int]:
        return list(store.add_networks(epoch, steps, networks.assign(ms=ms, digest=digests)))

    first = add(epoch, [1, 2, 3], ["a", "b", ""])
    second = add(epoch, [1.1, 5, 3], ["a", "c", ""])
    third = add(epoch, [1.2, 2.2, 9], ["a", "b", "d"])
    pairs = store.noise("cpu/t1")
    columns = ["digest", "network", "again", "first_ms", "again_ms"]
    assert pairs[columns].to_numpy().tolist() == [
        ["a", first[0], second[0], 1, 1.1],
        ["a", second[0], third[0], 1.1, 1.2],
        ["b", first[1], third[1], 2, 2.2],
    ]
    later = opened(store, dense=0.2)
    fourth = add(later, [2, 4, 6], ["a", "b", ""])
    assert store.noise("cpu/t1").equals(pairs)
    across = store.noise("cpu/t1", across_epochs=True)
    assert across[columns].to_numpy().tolist()[3:] == [
        ["a", third[0], fourth[0], 1.2, 2],
        ["b", third[1], fourth[1], 2.2, 4],
    ]
    assert across["again_epoch"].tolist()[3:] == [later.id] * 2
    assert store.noise("cpu/t2").empty
    assert list(store.noise("cpu/t2").columns) == list(pairs.columns)


def test_the_same_network_at_another_batch_size_is_another(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    steps, networks, _ = measured(2)
    store.add_networks(opened(store), steps, networks.assign(digest="a", batch=[1, 8]))
    assert store.noise("cpu/t1").empty
    assert store.noise("cpu/t1", across_epochs=True).empty
    assert len(store.pick_for_remeasure("cpu/t1", 1.0)) == 2


def test_a_share_of_the_networks_is_picked_to_be_measured_again_those_seldom_measured_first(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    assert store.pick_for_remeasure("cpu/t1").size == 0
    epoch = opened(store)
    steps, networks, _ = measured(40, 1)
    ids = store.add_networks(epoch, steps, networks)
    picked = store.pick_for_remeasure("cpu/t1", rng=0)
    assert len(picked) == 2
    assert set(picked) <= set(ids)
    assert picked.tolist() == store.pick_for_remeasure("cpu/t1", rng=0).tolist()
    assert len({tuple(store.pick_for_remeasure("cpu/t1", rng=seed)) for seed in range(10)}) > 5
    assert len(store.pick_for_remeasure("cpu/t1", 0.026)) == 2
    assert store.pick_for_remeasure("cpu/t1", 0.0).size == 0
    # All but one measured again: that one comes first, and of the others the last measurement is named.
    again = store.add_networks(epoch, steps[steps["network"] > 0], networks.iloc[1:])
    assert store.pick_for_remeasure("cpu/t1", 1 / 40).tolist() == [ids[0]]
    assert sorted(store.pick_for_remeasure("cpu/t1", 1.0)) == [ids[0], *again]
    opened(store, dense=0.2)  # nothing measured in the latest epoch: from the one before
    assert store.pick_for_remeasure("cpu/t1", 1 / 40).tolist() == [ids[0]]
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 2"):
        store.pick_for_remeasure("cpu/t1", 2)


def test_networks_of_another_file_can_be_absorbed_once(tmp_path: Path) -> None:
    mine, theirs = MeasurementStore(tmp_path / "a.sqlite"), MeasurementStore(tmp_path / "b.sqlite")
    shared = opened(mine)
    mine.add_networks(shared, *measured(2))
    theirs.add_networks(shared, *measured(1))  # the same epoch, e.g. in a copied file
    steps, networks, rounds = measured(3, seed=1)
    steps.loc[0, "tiles"] = math.nan
    theirs.add_networks(opened(theirs, "arm/t1"), steps, networks.assign(space="x"), rounds)
    assert mine.absorb(theirs.path or "") == 4
    assert mine.absorb(theirs.path or "") == 0
    assert len(mine.epochs()) == 2
    assert len(mine.observations("cpu/t1")[1]) == 3
    for ours, other in zip(mine.observations("arm/t1"), theirs.observations("arm/t1")):
        drop = ["epoch", "network"] if "network" in ours else ["epoch"]
        pd.testing.assert_frame_equal(
            ours.drop(columns=drop).reset_index(drop=True), other.drop(columns=drop).reset_index(drop=True)
        )
    number = int(mine.observations("arm/t1")[1].index[0])
    assert mine.rounds(number)["steps"].tolist() == rounds[0]["steps"].tolist()
