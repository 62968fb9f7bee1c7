"""Networks of NAS-Bench-201 as operations: index <-> cell string <-> rows that `hw_models.foreign.fit_table` takes.

Public latency lists for this space (HW-NAS-Bench, HELP, nn-Meter and others) give one number per network, in the order of the
benchmark's own files; nothing else is needed to describe the networks. Lowering matters more than the regressor: each row says
whether the operation is `live`, that is, whether its input can be other than zero and its output reaches the cell's output.
Runtimes that compile a graph delete the rest, eager ones execute it; the fit finds out which.

Start with `cell_operations(range(15625))`.

Source: Dong and Yang, NAS-Bench-201 (ICLR 2020), section 2: three stages of N = 5 cells with 16, 32, 64 channels, a residual block
between stages; latencies of lowered cells: section 2.1 of the facts this package is built from.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["EDGES", "OPS", "arch_index", "arch_string", "cell_operations", "live_edges", "parse_cell", "twins"]

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from node, to node), in the order of the cell string
_COUNT = len(OPS) ** len(EDGES)
_SHUFFLE_SEED = 88  # the benchmark's files number the networks by one seeded shuffle of all of them
_TEXT = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"


def arch_string(index: int) -> str:
    """The cell string of a network, e.g. `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|`.

    Args:
        index: number in the benchmark's files, 0 to 15,624.

    Raises:
        ValueError: there is no such network.
    """
    return _TEXT.format(*(OPS[i] for i in _cells()[_checked(index)]))


def arch_index(cell: str | Sequence[Any]) -> int:
    """The number in the benchmark's files of a cell: the inverse of `arch_string`.

    Args:
        cell: as for `parse_cell`.
    """
    return _numbers()[parse_cell(cell)]


def parse_cell(cell: str | int | Sequence[Any]) -> tuple[int, ...]:
    """Operations of a cell as positions in `OPS`, in the order of `EDGES`.

    Args:
        cell: a cell string; a number in the benchmark's files; or six operations, as names or as positions in `OPS`.

    Raises:
        ValueError: no such operation, edge or number.
    """
    if isinstance(cell, int | np.integer):
        return tuple(int(i) for i in _cells()[_checked(int(cell))])
    if isinstance(cell, str) and "~" in cell:
        parts = [part for part in cell.replace("+", "|").split("|") if part.strip()]
        found = [part.strip().split("~") for part in parts]
        sources = tuple(int(f[1]) if len(f) == 2 and f[1].strip().isdigit() else -1 for f in found)
        if sources != tuple(a for a, _ in EDGES):
            raise ValueError(f"a cell has six edges written {_TEXT.format(*['op'] * 6)!r}, got {cell!r}")
        named: list[Any] = [f[0] for f in found]
    else:
        named = list(cell)
    if len(named) != len(EDGES):
        raise ValueError(f"a cell has {len(EDGES)} operations, got {len(named)} in {cell!r}")
    picked = []
    for op in named:
        number = OPS.index(op) if op in OPS else op
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 0 <= number < len(OPS):
            raise ValueError(
                f"unknown operation {op!r} in cell {cell!r}; known: {', '.join(OPS)}, or 0 to {len(OPS) - 1}"
            )
        picked.append(int(number))
    return tuple(picked)


def live_edges(cells: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which operations do something: not `none`, an input that can be other than zero, an output that reaches the cell's output.

    Args:
        cells: int[n, 6], positions in `OPS`.

    Returns:
        bool[n, 6].
    """
    cells = np.atleast_2d(np.asarray(cells))
    passes = cells != 0
    fed = np.zeros((len(cells), 4), bool)  # nodes that can be other than zero
    fed[:, 0] = True
    for e, (a, b) in enumerate(EDGES):
        fed[:, b] |= fed[:, a] & passes[:, e]
    used = np.zeros((len(cells), 4), bool)  # nodes that reach the output
    used[:, 3] = True
    for e, (a, b) in reversed(list(enumerate(EDGES))):
        used[:, a] |= used[:, b] & passes[:, e]
    return np.stack([passes[:, e] & fed[:, a] & used[:, b] for e, (a, b) in enumerate(EDGES)], axis=1)


def twins() -> NDArray[np.int64]:
    """Pairs of networks that are the same but for the names of their two inner nodes: how much a list differs on them is its noise.

    Returns:
        int[1500, 2], numbers in the benchmark's files; for `hw_models.accuracy.noise_ceiling(latency[twins()])`.
    """
    cells = _cells()
    apart = cells[:, 2] == 0  # the inner nodes do not see each other
    swapped = cells[:, [1, 0, 2, 3, 5, 4]]
    pairs = [(i, _numbers()[tuple(int(o) for o in swapped[i])]) for i in np.flatnonzero(apart)]
    return np.array([(i, j) for i, j in pairs if i < j], dtype=np.int64)


def cell_operations(
    cells: Iterable[str | int | Sequence[Any]],
    *,
    names: Sequence[Any] | None = None,
    size: int = 32,
    channels: Sequence[int] = (16, 32, 64),
    repeats: int = 5,
    classes: int = 10,
    batch: int = 1,
) -> pd.DataFrame:
    """Whole networks as operations, for `hw_models.foreign.fit_table` and `TableModel.predict_many`.

    Args:
        cells: networks, each as for `parse_cell`.
        names: what to call the networks in column `network`; default: the numbers where all are given as numbers, else 0, 1, ...
        size, channels, repeats, classes, batch: of the whole network; the benchmark's for CIFAR-10 by default (ImageNet16-120:
            size=16, classes=120).

    Returns:
        One row per network, stage and edge, and the same stem, residual blocks and head for all networks. Columns: network, kind
        (of `OPS`; "conv2d", "norm_act_pool", "linear" around the cells), c_in, c_out, h, w (of the output), kernel, stride,
        groups, batch, count (cells of a stage are equal, so 5), live (bool), src, dst (nodes of the network's graph, src < dst),
        macs, params, activations (values written, whole batch).
    """
    given = list(cells)
    if names is None:
        numbered = all(isinstance(cell, int | np.integer) for cell in given)
        names = [int(cell) for cell in given] if numbered else list(range(len(given)))  # type: ignore[arg-type]
    if len(names) != len(given):
        raise ValueError(f"as many names as networks are needed, got {len(names)} and {len(given)}")
    table = np.array([parse_cell(cell) for cell in given], dtype=np.int64).reshape(-1, len(EDGES))
    live = live_edges(table)
    label = np.array(names, dtype=object)
    blocks = []
    node = 1  # 0 is the input, 1 what the stem wrote
    fixed = [_conv(0, 1, 3, channels[0], size, 3, 1, batch)]
    hw = size
    for stage, width in enumerate(channels):
        if stage:
            hw //= 2
            before = channels[stage - 1]
            fixed.append(_conv(node, node + 1, before, width, hw, 3, 2, batch))
            fixed.append(_conv(node + 1, node + 2, width, width, hw, 3, 1, batch))
            fixed.append(_conv(node, node + 2, before, width, hw, 1, 1, batch))  # the shortcut, after average pooling
            node += 2
        for e, (a, b) in enumerate(EDGES):
            blocks.append(_edge_rows(label, table[:, e], live[:, e], width, hw, repeats, batch, node + a, node + b))
        node += 3
    head: dict[str, Any] = {
        "h": 1,
        "w": 1,
        "kernel": 1,
        "stride": 1,
        "groups": 1,
        "batch": batch,
        "count": 1,
        "live": True,
    }
    width = channels[-1]
    fixed.append(
        head
        | {"kind": "norm_act_pool", "c_in": width, "c_out": width, "macs": width * hw * hw * batch, "params": 2 * width}
        | {"activations": width * batch, "src": node, "dst": node + 1}
    )
    fixed.append(
        head
        | {"kind": "linear", "c_in": width, "c_out": classes, "macs": width * classes * batch}
        | {"params": (width + 1) * classes, "activations": classes * batch, "src": node + 1, "dst": node + 2}
    )
    for row in fixed:
        blocks.append(pd.DataFrame({"network": label} | {key: [value] * len(label) for key, value in row.items()}))
    frame = pd.concat(blocks, ignore_index=True)
    columns = ["network", "kind", "c_in", "c_out", "h", "w", "kernel", "stride", "groups", "batch", "count", "live"]
    frame = frame[[*columns, "src", "dst", "macs", "params", "activations"]]
    frame["network"] = frame["network"].infer_objects()
    return frame


def _edge_rows(
    label: NDArray[np.object_],
    ops: NDArray[np.int64],
    live: NDArray[np.bool_],
    width: int,
    hw: int,
    repeats: int,
    batch: int,
    src: int,
    dst: int,
) -> pd.DataFrame:
    """One edge of one stage, all networks. Costs by position in `OPS`."""
    values = width * hw * hw * batch
    weights = np.array([0, 0, width * width, 9 * width * width, 0])
    macs = weights * hw * hw * batch
    macs[4] = 9 * values  # additions of the pooling
    return pd.DataFrame(
        {
            "network": label,
            "kind": np.array(OPS, dtype=object)[ops],
            "c_in": width,
            "c_out": width,
            "h": hw,
            "w": hw,
            "kernel": np.array([1, 1, 1, 3, 3])[ops],
            "stride": 1,
            "groups": np.array([1, 1, 1, 1, width])[ops],
            "batch": batch,
            "count": repeats,
            "live": live,
            "src": src,
            "dst": dst,
            "macs": macs[ops],
            "params": (weights + np.array([0, 0, 2 * width, 2 * width, 0]))[ops],
            "activations": values,
        }
    )


def _conv(src: int, dst: int, c_in: int, c_out: int, hw: int, kernel: int, stride: int, batch: int) -> dict[str, Any]:
    weights = c_in * c_out * kernel * kernel
    shape = {
        "c_in": c_in,
        "c_out": c_out,
        "h": hw,
        "w": hw,
        "kernel": kernel,
        "stride": stride,
        "groups": 1,
        "batch": batch,
    }
    cost = {"macs": weights * hw * hw * batch, "params": weights + 2 * c_out, "activations": c_out * hw * hw * batch}
    return {"kind": "conv2d", **shape, "count": 1, "live": True, "src": src, "dst": dst, **cost}


@cache
def _cells() -> NDArray[np.int8]:
    """int8[15625, 6] in the order of the benchmark's files."""
    cells = list(itertools.product(range(len(OPS)), repeat=len(EDGES)))
    random.Random(_SHUFFLE_SEED).shuffle(cells)
    return np.array(cells, dtype=np.int8)


@cache
def _numbers() -> dict[tuple[int, ...], int]:
    return {tuple(int(i) for i in cell): number for number, cell in enumerate(_cells())}


def _checked(index: int) -> int:
    if not 0 <= index < _COUNT:
        raise ValueError(f"the space has networks 0 to {_COUNT - 1}, got {index}")
    return int(index)
