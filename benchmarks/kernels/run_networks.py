"""Runs the network benchmark: latency of whole networks, every contender checked against the masked torch network.

A network is called as a user calls it, so a contender's time has all its conversions and the cost of the call in it. The CSR
products take part in chains only. Start with `run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.kernels import ours, targets
from benchmarks.kernels.engines import DENSE_ENGINES, Loaded, Unsupported
from benchmarks.kernels.networks import example, sparse
from benchmarks.kernels.protocol import Clocked, InProcess, Settings, measure
from benchmarks.kernels.report import fastest
from benchmarks.kernels.run_layers import TOLERANCE, Contenders, Problem, difference

__all__ = ["OURS_TOLERANCE", "run", "shown", "with_ratios"]

OURS_TOLERANCE = 1e-4


class _Nothing:
    """Takes the place of the short chain: a network is timed whole."""

    def burst(self, settings: Settings) -> float:
        return 0.0


def run(
    names: Sequence[str],
    densities: Sequence[float],
    contenders: Contenders,
    settings: Settings,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure; yields a row per network and density."""
    say = progress or (lambda text: None)
    for name in names:
        for density in densities:
            yield _row(name, density, contenders, settings, say)


def _row(
    name: str, density: float, contenders: Contenders, settings: Settings, say: Callable[[str], None]
) -> dict[str, Any]:
    network, x = sparse(name, density), example(name)
    with torch.inference_mode():
        expected = network(x).numpy()
    row: dict[str, Any] = {"network": name, "density": density, "threads": contenders.threads}
    loaded: dict[str, Loaded] = {}
    rivals = [*contenders.dense, *(["deepsparse"] if contenders.deepsparse is not None else [])]
    for contender in [*rivals, *contenders.paths]:
        say(f"{name} {density:g}: loading {contender}")
        mine = contender in contenders.paths
        try:
            if mine:
                one, facts = _ours(network, x, contender, contenders.threads)
                row |= facts
            else:
                one = contenders.load(contender, network, x)
            wrong = difference(one.output(), expected)
        except Unsupported as reason:
            if contender == "deepsparse":
                contenders.problems.append(Problem(f"{name} {density:g}", contender, str(reason)))
            continue
        except Exception as error:
            contenders.problems.append(Problem(f"{name} {density:g}", contender, f"{type(error).__name__}: {error}"))
            continue
        if wrong > (OURS_TOLERANCE if mine else TOLERANCE):
            text = f"differs from torch by {wrong:.2g} of the largest value"
            contenders.problems.append(Problem(f"{name} {density:g}", contender, text))
            continue
        loaded[contender] = one
    label = f"{name} {density:g}: timing {len(loaded)} contenders"
    clocked: dict[str, tuple[Clocked, Clocked]] = {c: (_Nothing(), one.clocked) for c, one in loaded.items()}
    cells = measure(clocked, settings, progress=lambda _: say(label))
    for one in loaded.values():
        one.close()
    for contender in [*rivals, *contenders.paths]:
        row[f"{contender}_ms"] = 1e3 * min(cells[contender].long) if contender in cells else math.nan
    return row


def _ours(network: nn.Module, x: torch.Tensor, path: str, threads: int) -> tuple[Loaded, dict[str, float]]:
    """A runtime, made twice: the second time everything is compiled, and its making is the packing time."""
    plan = ours.plan_for(network, x, path, threads)
    ours.packing_seconds(plan, threads)[0](x)
    runtime, seconds = ours.packing_seconds(plan, threads)
    facts = {f"{path}_packing_s": seconds}
    facts |= {f"{path}_{name}": value for name, value in ours.runtime_bytes(runtime).items() if not math.isnan(value)}
    facts["largest_map_nbytes"] = max(4.0 * math.prod(op.output_shape) for op in plan.ops)
    return Loaded(InProcess(lambda: runtime(x)), lambda: np.asarray(runtime(x))), facts


def with_ratios(rows: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> pd.DataFrame:
    """The rows with best_dense, best_dense_ms, `<path>_x_dense` and `<path>_x_deepsparse`, target and verdict of the best path."""
    frame = pd.DataFrame(list(rows))
    frame["best_dense"], frame["best_dense_ms"] = fastest(frame, tuple(DENSE_ENGINES), "ms")
    for path in [*paths, "deepsparse"]:
        if f"{path}_ms" in frame:
            frame[f"{path}_x_dense"] = frame["best_dense_ms"] / frame[f"{path}_ms"].astype(float)
            if path != "deepsparse" and "deepsparse_ms" in frame:
                frame[f"{path}_x_deepsparse"] = frame["deepsparse_ms"].astype(float) / frame[f"{path}_ms"].astype(float)
    at_target = (frame["density"] == 0.1) & (frame["threads"] == 1)
    frame["target"] = frame["network"].map(targets.NETWORKS).where(at_target)
    reached = frame[[f"{path}_x_dense" for path in paths]].max(axis=1)
    verdict = (reached >= frame["target"]).map({True: "met", False: "MISSED"})
    frame["verdict"] = verdict.where(frame["target"].notna(), "")
    return frame


def shown(frame: pd.DataFrame, paths: Sequence[str]) -> pd.DataFrame:
    """What goes to the screen: a column per network."""
    times = [c for c in frame.columns if c.endswith("_ms") and c != "best_dense_ms"]
    ratios = [c for c in frame.columns if "_x_" in c]
    more = [c for c in frame.columns if c.endswith(("_packing_s", "nbytes"))]
    chosen = frame[["density", *times, "best_dense", *ratios, "target", "verdict", *more]]
    return chosen.set_axis(list(frame["network"])).T.rename_axis("network").reset_index()
