"""What trials record for the comparison of one-shot searches, and which of them are tested."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from nas.config import load_config
from nas.evaluate import TrialEvaluator
from nas.finish import test_front as measure_test_accuracy
from nas.frames import trials_frame
from nas.latency import Priced
from nas.setup import make_data, make_space
from ops.counting import total_kept_weights
from tests.nas.test_report_comparison import trial

torch.set_num_threads(1)


class NoPrices:
    predicts = False

    def price(self, model: Any, example: Any) -> Priced:
        return Priced({"latency_ms": 1.0}, pd.DataFrame())


def evaluated(folder: Path, space: dict[str, Any], densities: float) -> tuple[dict[str, Any], Any, Any]:
    config = load_config({"data": {"name": "digits", "limit": 60}, "space": space, "train": {"epochs": 1}})
    data = make_data(config)
    made = make_space(config, data.input_shape, data.classes, None)
    drawn = made.sample(1)
    given = {name: densities for name in drawn.as_dict() if name.endswith("density")}
    mine = drawn.as_dict()
    architecture = made.draw(lambda n, o: mine[n] if mine.get(n) in o else o[0], given)
    evaluator = TrialEvaluator(config, folder, data, made, NoPrices())  # type: ignore[arg-type]
    answer = evaluator({"trial": 0, "architecture": architecture.to_json(), "seed": 0}, lambda _: None)
    return answer["metrics"], made, architecture


def test_a_trial_records_kept_weights_dead_channels_and_its_share_of_skips(tmp_path: Path) -> None:
    space = {"name": "nasbench201", "channels": 4, "cells": 1, "patterns": ["unstructured"]}
    metrics, made, architecture = evaluated(tmp_path, space, 0.02)
    assert metrics["kept_weights"] == total_kept_weights(made.meta(architecture)) < metrics["nnz"]
    assert 0 < metrics["dead_channels"] < metrics["channels"]
    assert 0 <= metrics["skip_pool_share"] <= 1


def test_a_space_without_skips_records_no_share(tmp_path: Path) -> None:
    metrics, _, _ = evaluated(tmp_path, {"name": "mlp", "widths": [16], "max_depth": 1}, 1.0)
    assert "skip_pool_share" not in metrics
    assert (metrics["dead_channels"], metrics["channels"]) == (0, 26)


def test_these_metrics_are_columns_by_themselves() -> None:
    frame = trials_frame([trial(0, "dass", 0.9, {"replicate": 0, "density": 0.01})])
    assert {"kept_weights", "dead_channels", "channels", "skip_pool_share", "replicate", "group"} <= set(frame.columns)
    assert frame["group"].tolist() == ["0.01"]


def test_the_test_set_is_for_the_front_and_for_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [
        trial(0, "random", 0.9, {}),
        trial(1, "random", 0.8, {}),
        trial(2, "dass", 0.7, {"replicate": 0}),
        trial(3, "dass/random", 0.6, {"control_of": "dass", "replicate": 0}),
        trial(4, "dass/dense", None, {"control_of": "dass", "replicate": 0}, state="infeasible"),
        trial(5, "dass", 0.5, {"replicate": 1}, test_accuracy=0.4),
    ]
    measured: list[int] = []
    run = SimpleNamespace(pareto=lambda: pd.DataFrame({"trial": [0]}), trial=lambda n: trials[n])
    store = SimpleNamespace(trials=lambda: trials, transaction=nullcontext)
    monkeypatch.setattr("nas.finish.rebuilt", lambda _run, number, _progress: number)
    monkeypatch.setattr("nas.finish.evaluate", lambda model, _test: SimpleNamespace(accuracy=model / 10))
    monkeypatch.setattr(
        "nas.finish.update",
        lambda _run, _store, number, metrics: (
            measured.append(number) if metrics["test_accuracy"] == number / 10 else 1 / 0
        ),
    )
    measure_test_accuracy(run, store, SimpleNamespace(test=None), None)  # type: ignore[arg-type]
    assert measured == [0, 2, 3]
