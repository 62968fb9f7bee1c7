"""Counts of work against the kernels' own rules and against counting; what the text of a curve gives away."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hw_models import step_features
from hw_models.step_features import SHAPE_FEATURES, WORK_FEATURES, shape, work
from hw_models.step_traits import TRAITS, traits
from hw_models.workload import workload
from ops.layers import SparseConv2d, draw_masks_
from ops.plan import lower


def curve(**facts: object) -> pd.DataFrame:
    return pd.DataFrame({"curve": [json.dumps(facts) + "@specialised"]})


LANES = ["lanes", [1, 16, 32, 32], 1, [4, 4], [8, 8]]


def test_a_layers_traits_stand_in_its_curve() -> None:
    layer = [[1, 1], [2, 2, 1, 1], [1, 2], 4, "4x1", ["silu"], True, [24, 8, 3, 3], False]
    row = traits(curve(step="conv", copies=[LANES, LANES], layer=layer)).iloc[0]
    assert tuple(row.index) == TRAITS
    expected = {
        "exponentials": 1,
        "clamps": 0,
        "residual": 1,
        "tile_rows": 8,
        "row_tiles": 8,
        "rows": 24,
        "columns": 72,
    }
    expected |= {"layer_groups": 4, "rows2": 0, "columns2": 0, "dilation": 2, "padding": 2, "pattern_rows": 4}
    assert row.to_dict() == expected | {"regrids": 0, "pool_window": 1, "followers": 0}


def test_what_torch_runs_after_a_layer_is_counted() -> None:
    facts = {
        "kind": "linear",
        "weight_shape": [10, 8],
        "stride": [],
        "padding": [],
        "dilation": [],
        "groups": 1,
        "pattern": None,
    }
    plain = traits(curve(**facts, post_ops=[], residual=False)).iloc[0]
    longer = traits(curve(**facts, post_ops=["relu"], residual=True)).iloc[0]
    assert (plain.followers, longer.followers) == (0, 2)


@pytest.mark.parametrize(
    ("call", "exponentials", "clamps", "window"),
    [
        ("SiLU()", 1, 0, 1),
        ("Hardswish()", 0, 1, 1),
        ("ReLU()", 0, 0, 1),
        ("GELU(approximate='none')", 1, 0, 1),
        ("AvgPool2d(kernel_size=3, stride=1, padding=1)", 0, 0, 9),
        ("MaxPool2d(kernel_size=(2, 3), stride=1)", 0, 0, 6),
    ],
)
def test_torch_operations_are_recognised_by_their_call(call: str, exponentials: int, clamps: int, window: int) -> None:
    row = traits(curve(kind="x", call=[call, "(($),{})"])).iloc[0]
    assert (row.exponentials, row.clamps, row.pool_window) == (exponentials, clamps, window)


@pytest.mark.parametrize(
    "text", ["", "conv 3x3", "[1, 2]@torch", '{"copies": 3}', '{"copies": [["lanes"]], "layer": "?"}']
)
def test_curves_of_other_origin_give_plain_answers(text: str) -> None:
    frame = pd.DataFrame({"curve": [text]})
    if text == '{"copies": 3}':
        frame["curve"] = ['{"copies": []}']
    row = traits(frame).iloc[0]
    assert row.rows == row.tile_rows == row.exponentials == 0
    assert row.layer_groups == row.dilation == row.pattern_rows == row.pool_window == 1


def test_depthwise_goes_are_those_of_the_kernel() -> None:
    portable = pytest.importorskip("ops.kernels.portable")
    for tiles in range(1, 200):
        sizes = portable.tile_groups(tiles, 8)[:, 0]
        assert step_features._goes(tiles) == sum(1 if size in (8, 7, 4) else size for size in sizes), tiles


def test_lines_that_share_loads_are_those_of_the_kernel() -> None:
    depthwise = pytest.importorskip("ops.kernels.depthwise")
    lengths = np.arange(1, 80)
    expected = [depthwise.line_groups(3, int(n), 8) is not None for n in lengths]
    assert step_features._in_line(lengths.astype(float)).tolist() == expected


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "channel"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_loads_are_the_columns_that_blocks_of_rows_keep(pattern: str, density: float) -> None:
    rng, rows, columns = np.random.default_rng(0), 60, 400
    counted = []
    for _ in range(40):
        if pattern == "channel":
            mask = np.zeros((rows, columns), bool)
            mask[rng.choice(rows, max(1, round(density * rows)), replace=False)] = True
        else:
            height = 4 if pattern == "4x1" else 1
            mask = np.repeat(rng.random((rows // height, columns)) < density, height, axis=0)
        counted.append(sum(mask[i : i + 30].any(axis=0).sum() for i in (0, 30)))
    args = [np.array([float(v)]) for v in (density, rows, columns, 1, 4 if pattern == "4x1" else 1)]
    loads, blocks = step_features._loads(*args, np.array([pattern == "channel"]))
    assert blocks[0] == 2
    assert loads[0] == pytest.approx(np.mean(counted), rel=0.06)


def frame() -> pd.DataFrame:
    torch.manual_seed(0)
    net = nn.Sequential(
        SparseConv2d(3, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.MaxPool2d(3, 2, 1),
        SparseConv2d(16, 40, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 10),
    ).eval()
    for layer, density, pattern in ((net[0], 0.4, "unstructured"), (net[4], 0.2, "4x1")):
        layer.set_target(density, pattern)  # type: ignore[operator]
    draw_masks_(net, torch.Generator().manual_seed(0))
    plans = [lower(net, torch.rand(1, 3, 16, 16), choose=lambda op, kernels, k=k: kernels[k]) for k in (0, -1)]
    return workload(plans).steps


def test_features_of_real_networks_are_finite_and_work_is_not_negative() -> None:
    steps = frame()
    assert {"conv", "depthwise"} <= set(steps.kind)
    for values, names in ((work(steps), WORK_FEATURES), (shape(steps), SHAPE_FEATURES)):
        assert values.shape == (len(steps), len(names))
        assert np.isfinite(values).all()
    assert (work(steps) >= 0).all()
    rows = dict(zip(WORK_FEATURES, work(steps).T, strict=True))
    assert (rows["exponentials"] > 0).any()
    assert ((rows["border macs"] > 0) == (steps.kind == "max_pool")).all()


def test_a_frame_without_layers_has_features_too() -> None:
    assert work(frame()[:0]).shape == (0, len(WORK_FEATURES))
    assert shape(frame()[:0]).shape == (0, len(SHAPE_FEATURES))
