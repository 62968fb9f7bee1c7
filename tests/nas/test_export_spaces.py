"""Networks of every shipped space, masks drawn, come back equal from their source; a cell network travels through every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nas.export import export_module
from ops.counting import count
from ops.layers import draw_masks_, sparse_layers
from search_spaces import get_space
from search_spaces.registry import SPACES
from tests.nas.export_networks import randomised, run_here

SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "convnet": ((3, 16, 16), {"stem": 8, "widths": [8, 16]}),
    "darts": ((3, 16, 16), {"channels": 4, "cells": 3, "drop_path": 0.2}),
    "mlp": ((1, 8, 8), {}),
    "nasbench201": ((3, 16, 16), {"channels": 4, "cells": 1}),
    "nasnet": ((3, 16, 16), {"channels": 4, "cells": 1, "stem_channels": 8}),
}


def network(name: str, seed: int, **changes: Any) -> nn.Module:
    shape, options = SMALL[name]
    space = get_space(name, input_shape=shape, classes=10, **{**options, **changes})
    model = randomised(space.build(space.sample(seed)))
    draw_masks_(model, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("name", sorted(SPACES))
def test_networks_of_every_space_come_back_equal(name: str) -> None:
    for seed in range(3):
        model = network(name, seed)
        source, _ = run_here(model, torch.randn(2, *SMALL[name][0]))
        zeros = {key: layer.mask.numel() - layer.nnz for key, layer in sparse_layers(model)}
        assert sum(int((~mask).sum()) for mask in source.masks.values()) == sum(zeros.values())
        assert max(len(line) for line in source.text.splitlines()) <= 132


def test_a_sparse_cell_network_travels_through_every_format(tmp_path: Path) -> None:
    model = next(
        model for model in (network("darts", seed) for seed in range(20)) if count(model, (3, 16, 16)).density < 1
    )
    counts = count(model, (3, 16, 16))
    metrics = {"params": counts.params, "nnz": counts.nnz}
    found = export_module(model, torch.randn(1, 3, 16, 16), tmp_path / "out", card={"metrics": metrics})
    assert (found["counts"]["params"], found["counts"]["nnz"]) == (counts.params, counts.nnz)
    assert found["counts"]["unused"] == {"params": 0, "nnz": 0}
