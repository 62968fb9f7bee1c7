"""Networks of the FBNet space as operations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hw_models.fbnet_layers import BLOCKS, LAYERS, fbnet_operations
from hw_models.foreign import fit_table
from hw_models.foreign_features import Operations


def drawn(count: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, len(BLOCKS), (count, LAYERS)).tolist()


def test_shapes_follow_from_layer_to_layer() -> None:
    frame = fbnet_operations([[3] * LAYERS], dataset="imagenet")
    assert len(frame) == LAYERS + 4
    assert frame["c_in"].tolist()[1:] == frame["c_out"].tolist()[:-1]
    assert frame["h"].tolist()[:2] == [112, 112]
    assert frame.loc[frame["layer"] == LAYERS - 1, "h"].item() == 7


def test_names_and_positions_of_blocks_are_the_same() -> None:
    picks = drawn(3)
    named = [[BLOCKS[i][0] for i in picks[n]] for n in range(3)]
    pd.testing.assert_frame_equal(fbnet_operations(picks), fbnet_operations(named))


def test_costs_equal_those_counted_by_hand() -> None:
    ops = Operations.of(fbnet_operations([[2] + [8] * (LAYERS - 1)]))
    here = int(np.flatnonzero(ops.numbers["layer"].to_numpy() == 0)[0])
    assert ops.physics[here, 3] * 1e6 == pytest.approx(16 * 48 + 48 * 9 + 48 * 16)
    assert ops.physics[here, 1] * 1e6 == pytest.approx((16 * 48 + 48 * 9 + 48 * 16) * 32 * 32)


def test_fifty_networks_predict_the_rest_though_there_are_two_hundred_choices() -> None:
    frame = fbnet_operations(drawn(400))
    ops = Operations.of(frame)
    rng = np.random.default_rng(1)
    of_kind = {kind: rng.uniform(0.7, 1.4) for kind in sorted(set(ops.kind))}
    each = (0.05 + 0.03 * ops.physics[:, 1] + 0.5 * ops.physics[:, 2]) * np.array([of_kind[kind] for kind in ops.kind])
    ms: pd.Series[float] = pd.Series(1 + ops.per_network(each), index=ops.networks) * np.exp(
        0.02 * rng.normal(size=400)
    )
    score = fit_table(frame, ms.iloc[:50]).score(frame, ms.iloc[50:])
    assert score["hit10"] > 0.97
    assert score["spearman"] > 0.93


@pytest.mark.parametrize("bad", [[0] * 21, [9] * 22, ["k3_e1"] * 21 + ["k9"]])
def test_what_is_no_network_is_named(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="22 blocks"):
        fbnet_operations([bad])
    with pytest.raises(ValueError, match="unknown data set"):
        fbnet_operations(drawn(1), dataset="mnist")
