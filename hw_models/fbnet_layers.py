"""Networks of the FBNet space as operations: 22 choices among nine blocks -> rows that `hw_models.foreign.fit_table` takes.

Latency lists for this space (HELP, HW-NAS-Bench) describe a network by 22 numbers. One price per layer and block would be some 200
prices; described by shape, a hundred networks are enough.

Source: Wu et al., FBNet (CVPR 2019), tables 1 and 2, with the channels of HW-NAS-Bench (Li et al., ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["BLOCKS", "LAYERS", "fbnet_operations"]

# name, expansion, kernel, groups of the 1x1 convolutions; the last one is no block
BLOCKS = (
    ("k3_e1", 1, 3, 1),
    ("k3_e1_g2", 1, 3, 2),
    ("k3_e3", 3, 3, 1),
    ("k3_e6", 6, 3, 1),
    ("k5_e1", 1, 5, 1),
    ("k5_e1_g2", 1, 5, 2),
    ("k5_e3", 3, 5, 1),
    ("k5_e6", 6, 5, 1),
    ("skip", 0, 0, 0),
)
_DEPTHS = (1, 4, 4, 4, 4, 4, 1)
_WIDTHS = (16, 24, 32, 64, 112, 184, 352)
LAYERS = sum(_DEPTHS)
# data set: size of the image, stride of the stem, strides of the stages, last width, classes
_DATA: dict[str, tuple[int, int, tuple[int, ...], int, int]] = {
    "cifar100": (32, 1, (1, 1, 2, 2, 1, 2, 1), 1504, 100),
    "imagenet": (224, 2, (1, 2, 2, 2, 1, 2, 1), 1984, 1000),
}


def fbnet_operations(
    networks: Iterable[Sequence[int | str]],
    *,
    names: Sequence[Any] | None = None,
    dataset: str = "cifar100",
    batch: int = 1,
) -> pd.DataFrame:
    """Whole networks as operations.

    Args:
        networks: each 22 blocks, as positions in `BLOCKS` or their names.
        names: what to call the networks; default 0, 1, ...
        dataset: "cifar100" (32 x 32) or "imagenet" (224 x 224).
        batch: images at once.

    Returns:
        One row per network and layer, with the same stem and head: network, kind, layer, c_in, c_out, h, w (of the output), kernel,
        stride, groups, expand, batch. A skip that changes the shape is a 1x1 convolution, another one has no cost.

    Raises:
        ValueError: not 22 blocks, an unknown block or data set.
    """
    if dataset.lower() not in _DATA:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(_DATA)}")
    size, first_stride, strides, last, classes = _DATA[dataset.lower()]
    chosen = [_numbers(network) for network in networks]
    if names is None:
        names = list(range(len(chosen)))
    if len(names) != len(chosen):
        raise ValueError(f"as many names as networks are needed, got {len(names)} and {len(chosen)}")
    picks = np.array(chosen, dtype=np.int64).reshape(-1, LAYERS)
    label = np.array(names, dtype=object)
    size //= first_stride
    frames = [_same(label, "stem", -1, 3, 16, size, 3, first_stride, batch)]
    before, layer = 16, 0
    for depth, width, stage_stride in zip(_DEPTHS, _WIDTHS, strides):
        for i in range(depth):
            stride = stage_stride if i == 0 else 1
            size //= stride
            frames.append(_layer(label, picks[:, layer], layer, before, width, size, stride, batch))
            before, layer = width, layer + 1
    frames.append(_same(label, "head_conv", LAYERS, before, last, size, 1, 1, batch))
    frames.append(_same(label, "head_pool", LAYERS + 1, last, last, 1, size, 1, batch))
    frames.append(_same(label, "head_linear", LAYERS + 2, last, classes, 1, 1, 1, batch))
    frame = pd.concat(frames, ignore_index=True)
    frame["network"] = frame["network"].infer_objects()
    return frame


def _numbers(network: Sequence[int | str]) -> list[int]:
    known = {name: number for number, (name, *_) in enumerate(BLOCKS)}
    found = [known.get(block, -1) if isinstance(block, str) else int(block) for block in network]
    if len(found) != LAYERS or min(found) < 0 or max(found) >= len(BLOCKS):
        raise ValueError(
            f"a network has {LAYERS} blocks out of {', '.join(known)} or 0 to {len(BLOCKS) - 1}, got {list(network)}"
        )
    return found


def _same(
    label: Any, kind: str, layer: int, c_in: int, c_out: int, size: int, kernel: int, stride: int, batch: int
) -> pd.DataFrame:
    shape = {"c_in": c_in, "c_out": c_out, "h": size, "w": size, "kernel": kernel, "stride": stride, "groups": 1}
    return pd.DataFrame({"network": label, "kind": kind, "layer": layer, **shape, "batch": batch})


def _layer(
    label: Any, pick: Any, layer: int, c_in: int, c_out: int, size: int, stride: int, batch: int
) -> pd.DataFrame:
    """One of the 22 layers, all networks."""
    skip = pick == len(BLOCKS) - 1
    same = stride == 1 and c_in == c_out
    expand, kernel, groups = (np.array([block[i] for block in BLOCKS])[pick] for i in (1, 2, 3))
    name = np.array([block[0] for block in BLOCKS], dtype=object)[pick]
    return pd.DataFrame(
        {
            "network": label,
            "kind": np.where(skip, "skip" if same else "skip_conv", name),
            "layer": layer,
            "c_in": c_in,
            "c_out": c_out,
            "h": size,
            "w": size,
            "kernel": np.where(skip, 1, kernel),
            "stride": stride,
            "groups": np.where(skip, 1, groups),
            "expand": np.where(skip, np.nan, expand),
            "batch": batch,
        }
    )
