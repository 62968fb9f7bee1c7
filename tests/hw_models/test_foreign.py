"""Tables of foreign devices: simulated devices whose times are known sums, maxima of branches, rounded or disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hw_models.foreign import TableModel, fit_table
from hw_models.foreign_features import Operations
from hw_models.lowered_cells import cell_operations, live_edges, parse_cell

NUMBERS = np.random.default_rng(0).choice(15625, 700, replace=False).tolist()
CELLS = np.array([parse_cell(i) for i in NUMBERS])
LIVE = live_edges(CELLS)
PRICE = np.array([0.1, 0.2, 1.1, 3.0, 1.5])  # none, skip, 1x1, 3x3, pool


@pytest.fixture(scope="module")
def networks() -> pd.DataFrame:
    return cell_operations(NUMBERS)


def device(name: str, noise: float = 0.03) -> pd.Series:
    """ms of all networks on a made-up device."""
    rng = np.random.default_rng(1)
    each = PRICE[CELLS]
    if name == "compiled":  # dead operations cost nothing
        ms = 5 + (each * LIVE).sum(1)
    elif name == "eager":  # everything is executed
        ms = 3 + each.sum(1)
    elif name == "parallel":  # branches run at once
        c = each * LIVE
        second = np.maximum(c[:, 1], c[:, 0] + c[:, 2])
        ms = 3 + 0.3 * c.sum(1) + np.maximum.reduce([c[:, 3], c[:, 0] + c[:, 4], second + c[:, 5]])
    elif name == "launches":  # the host launches while the device computes
        ms = 2 + np.maximum(each.sum(1), 0.9 * (CELLS != 0).sum(1) + 3)
    elif name == "two states":
        ms = (5 + each.sum(1)) * np.where(rng.random(len(CELLS)) < 0.3, 1.35, 1.0)
    else:
        raise KeyError(name)
    return pd.Series(ms * np.exp(noise * rng.normal(size=len(ms))), index=NUMBERS)


@pytest.mark.parametrize(
    ("name", "count", "hit10", "spearman"),
    [
        ("compiled", 20, 0.96, 0.99),
        ("compiled", 100, 0.99, 0.99),
        ("eager", 20, 0.96, 0.97),
        ("launches", 50, 0.95, 0.94),
        ("parallel", 100, 0.93, 0.97),
        ("two states", 100, 0.62, 0.7),
    ],
)
def test_few_networks_predict_the_rest(
    networks: pd.DataFrame, name: str, count: int, hit10: float, spearman: float
) -> None:
    ms = device(name)
    model = fit_table(networks, ms.iloc[:count])
    score = model.score(networks, ms.iloc[count:])
    assert score["hit10"] >= hit10, model
    assert score["spearman"] >= spearman
    assert 0.8 <= score["coverage"] <= 0.99


def test_the_fit_finds_out_whether_dead_operations_are_executed(networks: pd.DataFrame) -> None:
    for name, view in (("compiled", "live"), ("eager", "raw")):
        model = fit_table(networks, device(name).iloc[:60])
        assert model.additive is not None
        assert model.additive.view == view


def test_nothing_is_learned_where_sums_are_right_and_something_where_they_are_not(networks: pd.DataFrame) -> None:
    assert fit_table(networks, device("compiled").iloc[:100]).residual is None
    assert fit_table(networks, device("parallel").iloc[:100]).residual is not None


def test_whole_milliseconds_and_one_disturbed_network_do_no_harm(networks: pd.DataFrame) -> None:
    ms = device("compiled", 0.0).round().clip(lower=1)
    disturbed = ms.copy()
    disturbed.iloc[3] *= 8
    model = fit_table(networks, disturbed.iloc[:60])
    assert model.score(networks, device("compiled", 0.0).iloc[60:])["hit10"] > 0.97


def test_ten_networks_rank_the_rest(networks: pd.DataFrame) -> None:
    score = fit_table(networks, device("compiled").iloc[:10]).score(networks, device("compiled").iloc[10:])
    assert score["spearman"] > 0.98


def test_predictions_do_not_depend_on_the_order_of_rows_or_the_unit(networks: pd.DataFrame) -> None:
    ms = device("compiled").iloc[:30]
    there = networks[networks["network"].isin(NUMBERS[:200])]
    first = fit_table(there, ms).predict_many(there)
    shuffled = there.sample(frac=1, random_state=0)
    other = fit_table(shuffled, dict(ms * 1000)).predict_many(shuffled)
    assert set(other.index) == set(first.index)
    # folds are drawn in order of appearance, so the choice of shrinkage may differ a little
    assert (other.loc[first.index, "ms"] / 1000).to_numpy() == pytest.approx(first["ms"].to_numpy(), rel=0.05)


@pytest.mark.parametrize("name", ["compiled", "parallel"])
def test_a_saved_model_says_the_same(tmp_path: Path, networks: pd.DataFrame, name: str) -> None:
    model = fit_table(networks, device(name).iloc[:100])
    model.save(tmp_path / "sub" / "table")
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["table.json", "table.npz"]
    pd.testing.assert_frame_equal(
        TableModel.load(tmp_path / "sub" / "table.json").predict_many(networks), model.predict_many(networks)
    )
    (tmp_path / "sub" / "table.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="table model"):
        TableModel.load(tmp_path / "sub" / "table")


def chains(count: int, seed: int) -> pd.DataFrame:
    """Networks of a few convolutions with shapes of their own."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for network in range(count):
        width, side = int(rng.integers(8, 65)), 32
        for _ in range(int(rng.integers(3, 12))):
            stride = int(rng.integers(1, 3)) if side > 4 else 1
            side //= stride
            out = int(rng.integers(8, 129))
            kernel = int(rng.choice([1, 3, 5]))
            rows.append({"network": f"n{network}", "kind": "conv", "cin": width, "cout": out, "hw": side, "ks": kernel})
            width = out
    return pd.DataFrame(rows)


def chain_ms(frame: pd.DataFrame) -> pd.Series:
    macs = frame["cin"] * frame["cout"] * frame["hw"] ** 2 * frame["ks"] ** 2
    each = 0.02 + macs / 5e6 + frame["cout"] * frame["hw"] ** 2 / 2e6
    return 0.5 + each.groupby(frame["network"], sort=False).sum()


def test_shapes_never_seen_are_priced_by_their_work() -> None:
    train, test = chains(60, 0), chains(60, 1)
    score = fit_table(train, chain_ms(train)).score(test, chain_ms(test))
    assert score["hit10"] > 0.95
    assert score["spearman"] > 0.99


def test_a_kind_never_seen_is_priced_and_said_to_be_analytical() -> None:
    train, test = chains(30, 0), chains(5, 1)
    test.loc[test["network"] == "n2", "kind"] = "conv_transposed"
    predicted = fit_table(train, chain_ms(train)).predict_many(test)
    assert predicted["source"].tolist() == ["learned", "learned", "analytical", "learned", "learned"]
    wide = predicted["hi_ms"] / predicted["lo_ms"]
    assert wide["n2"] > wide["n1"]


def test_costs_follow_from_shapes() -> None:
    frame = pd.DataFrame(
        {
            "network": 0,
            "kind": ["conv", "depthwise_conv", "linear", "max_pool", "relu", "mbconv"],
            "cin": [3, 16, 64, 16, 16, 16],
            "cout": [8, 16, 10, 16, 16, 24],
            "hw": [32, 16, np.nan, 8, 8, 8],
            "ks": [3, 3, np.nan, 2, np.nan, 5],
            "stride": [1, 1, np.nan, 2, 1, 2],
            "expand": [np.nan] * 5 + [6],
        }
    )
    ops = Operations.of(frame)
    macs = [3 * 8 * 9 * 1024, 16 * 9 * 256, 640, 16 * 4 * 64, 0, (16 * 96 * 4 + 96 * 25 + 96 * 24) * 64]
    assert ops.physics[:, 1] * 1e6 == pytest.approx(macs)
    assert ops.physics[:, 3] * 1e6 == pytest.approx([216, 144, 640, 0, 0, 16 * 96 + 96 * 25 + 96 * 24])


def test_kept_weights_count_and_sparsity_is_understood() -> None:
    frame = pd.DataFrame({"network": 0, "kind": "conv", "cin": 8, "cout": 8, "hw": 4, "sparsity": [0.0, 0.75]})
    ops = Operations.of(frame)
    assert ops.physics[1, 1] == pytest.approx(0.25 * ops.physics[0, 1])
    assert len(set(ops.kind)) == 2
    assert len(set(ops.key)) == 2
    assert len(set(ops.curve)) == 1


def test_longest_path_equals_the_slow_obvious_one(networks: pd.DataFrame) -> None:
    some = networks[networks["network"].isin(NUMBERS[:20])]
    ops = Operations.of(some)
    each = np.random.default_rng(0).random(len(some))

    def slow(rows: list[int], node: int) -> float:
        ending = [i for i in rows if ops.dst is not None and ops.dst[i] == node]
        return max(
            (slow(rows, int(ops.src[i])) + ops.count[i] * each[i] for i in ending if ops.src is not None), default=0.0
        )

    for n, found in enumerate(ops.longest_path(each)):
        rows = np.flatnonzero(ops.row == n).tolist()
        assert ops.dst is not None
        assert found == pytest.approx(max(slow(rows, int(node)) for node in set(ops.dst[rows])))


def test_groups_are_left_out_together() -> None:
    frame = chains(40, 0)
    ms = chain_ms(frame)
    model = fit_table(frame, ms, groups={name: i // 10 for i, name in enumerate(ms.index)})
    assert model.networks == 40
    with pytest.raises(ValueError, match="groups: network 'n5' has none"):
        fit_table(frame, ms, groups={name: 0 for name in ms.index if name != "n5"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, t: (f.drop(columns="kind"), t), "column 'kind'"),
        (lambda f, t: (f.drop(columns="network"), t), "column 'network'"),
        (lambda f, t: (f.iloc[:0], t), "not empty"),
        (lambda f, t: (f, t * -1), "above 0"),
        (lambda f, t: (f, t.where(t.index != "n3")), "'n3'"),
        (lambda f, t: (f, t.iloc[:-1].to_numpy()), "one value per network"),
        (lambda f, t: (f, pd.concat([t, t])), "appears twice"),
        (lambda f, t: (f, t.rename({"n0": "other"})), "'other' has no operations"),
        (lambda f, t: (f.assign(count=-1), t), "count must be 0 or more"),
        (lambda f, t: (f.assign(density=0.0), t), "density must be"),
        (lambda f, t: (f.assign(macs="many"), t), "column 'macs' must be a number, got 'many'"),
    ],
)
def test_bad_tables_are_named(change: Any, words: str) -> None:
    frame = chains(10, 0)
    operations, ms = change(frame, chain_ms(frame))
    with pytest.raises(ValueError, match=words):
        fit_table(operations, ms)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_very_few_networks_still_give_a_model(count: int) -> None:
    frame = chains(20, 0)
    ms = chain_ms(frame)
    predicted = fit_table(frame, ms.iloc[:count]).predict_many(frame)
    assert np.isfinite(predicted[["ms", "lo_ms", "hi_ms"]].to_numpy()).all()
    assert ((predicted["lo_ms"] < predicted["ms"]) & (predicted["ms"] < predicted["hi_ms"])).all()
