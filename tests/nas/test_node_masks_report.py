"""The table of searched against random node masks: pairs, thresholds, statistics, and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nas.report.node_masks import epochs_to, node_masks_comparison, node_masks_frame, node_masks_sheet
from nas.report.sheet import to_text
from nas.store import Trial
from search_spaces import Architecture
from tests.nas.synthetic_run import SyntheticRun

ARCHITECTURE = Architecture("mlp", (("depth", 1),), "0" * 16)


class Fake(SyntheticRun):
    """Trials of node_masks with given learning curves."""

    def __init__(self) -> None:
        super().__init__([])
        self.curves: dict[int, list[float]] = {}

    def add(self, role: str, replicate: int, curve: list[float], sparsity: float = 0.5, **more: Any) -> None:
        number = len(self.trials)
        state = more.pop("state", "complete")
        metrics = {"val_accuracy": curve[-1], **more} if state == "complete" else {}
        note = {"role": role, "node_sparsity": 0.0 if role == "dense" else sparsity, "weight_sparsity": 0.75}
        self.curves[number] = curve
        self.trials.append(
            Trial(
                **{"trial": number, "searcher": "node_masks", "index": number, "state": state, "seed": 7 + replicate},
                **{"architecture": ARCHITECTURE, "digest": ARCHITECTURE.digest, "epochs": len(curve)},
                metrics=metrics,
                sampler={**note, "kept_weights": 10, "criterion": 2.0, "replicate": replicate},
            )
        )

    def curve(self, number: int) -> list[dict[str, Any]]:
        return [{"epoch": i + 1, "val_accuracy": value} for i, value in enumerate(self.curves[number])]


def small_run() -> Fake:
    run = Fake()
    for replicate in range(3):
        last = 0.8 + 0.05 * replicate
        run.add("dense", replicate, [0.5, 0.75 + 0.05 * replicate, last])
        run.add("searched", replicate, [0.4, last - 0.05, last - 0.01 * replicate])
        run.add("random", replicate, [0.3, 0.4, last - 0.02])
        run.add("random", replicate, [0.3, 0.4, 0.5])
    return run


def test_one_row_per_trial_with_its_note_and_the_first_epoch_at_the_threshold_of_its_own_replicate() -> None:
    frame = node_masks_frame(small_run())
    assert frame["role"].tolist() == ["dense", "searched", "random", "random"] * 3
    assert frame["replicate"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert frame["seed"].tolist() == [7] * 4 + [8] * 4 + [9] * 4
    # thresholds 0.76, 0.8075, 0.855
    assert frame["epochs_to_threshold"].tolist() == [3, 3, 3, math.inf, 3, 3, 3, math.inf, 3, 3, 3, math.inf]
    lower = node_masks_frame(small_run(), threshold=0.9)  # 0.72, 0.765, 0.81
    assert lower["epochs_to_threshold"].tolist() == [2, 2, 3, math.inf, 2, 2, 3, math.inf, 2, 2, 3, math.inf]


def test_the_first_epoch_counts_not_the_last_and_no_history_is_no_number() -> None:
    rows = [{"epoch": e, "val_accuracy": a} for e, a in enumerate([0.2, 0.9, 0.5, 0.9], start=1)]
    assert epochs_to(rows, 0.9) == 2
    assert epochs_to(rows, 0.91) == math.inf
    assert math.isnan(epochs_to([], 0.5))


def test_searched_and_random_are_paired_within_replicates_and_several_random_masks_count_as_their_mean() -> None:
    made = node_masks_comparison(node_masks_frame(small_run()))
    row = made[(made["figure"] == "val_accuracy") & (made["versus"] == "random")].iloc[0]
    searched = np.array([0.80, 0.84, 0.88])
    random = np.array([(0.78 + 0.5) / 2, (0.83 + 0.5) / 2, (0.88 + 0.5) / 2])
    test = stats.ttest_rel(searched, random)
    low, high = test.confidence_interval(0.95)
    assert row["pairs"] == 3
    assert row["searched"] == pytest.approx(searched.mean())
    assert row["other"] == pytest.approx(random.mean())
    assert [row["difference"], row["low"], row["high"], row["p"]] == pytest.approx(
        [(searched - random).mean(), low, high, test.pvalue]
    )
    assert row["p_flip"] == 2 / 2**3  # all three differences are positive
    parent = made[(made["figure"] == "val_accuracy") & (made["versus"] == "dense")].iloc[0]
    assert parent["difference"] == pytest.approx((0 - 0.01 - 0.02) / 3)


def test_networks_that_never_reach_the_threshold_count_as_one_epoch_more() -> None:
    made = node_masks_comparison(node_masks_frame(small_run()))
    row = made[(made["figure"] == "epochs_to_threshold") & (made["versus"] == "random")].iloc[0]
    assert (row["searched"], row["other"]) == (3, (3 + 4) / 2)
    assert (row["not_reached"], row["other_not_reached"]) == (0, 3)
    assert "0 searched and 3 random networks never reach the threshold" in to_text(node_masks_sheet(small_run()))


def test_a_replicate_counts_only_where_both_of_a_pair_are_complete() -> None:
    run = small_run()
    run.add("dense", 3, [0.9])
    run.add("searched", 3, [0.9])
    run.add("random", 3, [0.9], state="failed")
    run.add("searched", 0, [0.7], sparsity=0.9)
    made = node_masks_comparison(node_masks_frame(run))
    assert set(made.loc[made["versus"] == "random", "node_sparsity"]) == {0.5}
    assert made.loc[(made["versus"] == "random") & (made["figure"] == "val_accuracy"), "pairs"].tolist() == [3]
    assert "1 of 16 trials are not complete" in to_text(node_masks_sheet(run))


def test_test_accuracy_is_compared_only_where_every_network_has_one() -> None:
    run = Fake()
    for replicate in range(2):
        run.add("dense", replicate, [0.9], test_accuracy=0.8)
        run.add("searched", replicate, [0.9], test_accuracy=0.7)
        run.add("random", replicate, [0.8], test_accuracy=0.6)
    assert "test_accuracy" in set(node_masks_comparison(node_masks_frame(run))["figure"])
    assert "test acc" in to_text(node_masks_sheet(run))
    run.add("random", 1, [0.8])
    assert "test_accuracy" not in set(node_masks_comparison(node_masks_frame(run))["figure"])
    assert "only 6 of 7 networks have one" in to_text(node_masks_sheet(run))


def test_the_sheet_says_both_sparsities_and_nothing_where_there_is_nothing() -> None:
    text = to_text(node_masks_sheet(small_run()))
    assert "node sparsity  weight sparsity" in text
    assert "0.5            0.750" in text
    assert "3 pairs say little" in text
    assert node_masks_sheet(Fake()) is None
    begun = Fake()
    begun.add("dense", 0, [0.5], state="running")
    begun.add("searched", 0, [0.5], state="proposed")
    assert node_masks_sheet(begun) is None
