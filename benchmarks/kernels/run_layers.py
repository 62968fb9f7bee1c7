"""Runs the layer benchmark: loads every contender of a row, asserts that all compute the same, and times them in one session.

A session is a case at one batch size, with all its densities and patterns: dense engines are timed once in it, between the
others, and every ratio of its rows is of times taken in the same minutes. Big weights (over 100 MB a chain) make it a session
per row. Start with `Contenders` and `run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.kernels import ours
from benchmarks.kernels.deepsparse import Worker
from benchmarks.kernels.engines import CSR_ENGINES, DENSE_ENGINES, ENGINES, Loaded, Unsupported
from benchmarks.kernels.layers import Case, chain, example
from benchmarks.kernels.protocol import Cell, Clocked, Settings, measure, per_unit_us

__all__ = ["SPARSE_ENGINES", "TOLERANCE", "Contenders", "Problem", "difference", "run"]

TOLERANCE = 1e-3  # largest difference from the masked torch network, relative to its largest value
SPARSE_ENGINES = (*CSR_ENGINES, "deepsparse")
BIG_BYTES = 100e6

Key = tuple[str, str, float]  # (contender, pattern, density); dense engines have ("torch", "", 1.0)


@dataclass(frozen=True)
class Problem:
    """A cell that stays empty because something is wrong, not merely impossible."""

    row: str
    contender: str
    text: str


@dataclass
class Contenders:
    """Who takes part.

    Attributes:
        engines: names in `engines.ENGINES`.
        paths: ours, names that `ours.load` takes.
        deepsparse: its process, or None.
        threads: of everybody.
        problems: filled while running.
    """

    engines: Sequence[str]
    paths: Sequence[str]
    deepsparse: Worker | None = None
    threads: int = 1
    problems: list[Problem] = field(default_factory=list)

    def load(self, name: str, network: nn.Module, x: torch.Tensor) -> Loaded:
        """The network in a contender."""
        if name == "deepsparse":
            assert self.deepsparse is not None
            return self.deepsparse.load(network, x, self.threads)
        if name in ENGINES:
            return ENGINES[name](network, x, self.threads)
        return ours.load(network, x, name, self.threads)

    @property
    def dense(self) -> list[str]:
        return [name for name in self.engines if name in DENSE_ENGINES]

    @property
    def sparse(self) -> list[str]:
        """Ours and the sparse engines: everybody whose time depends on the mask."""
        csr = [name for name in self.engines if name in CSR_ENGINES]
        return [*self.paths, *csr, *(["deepsparse"] if self.deepsparse is not None else [])]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest expected value; infinite where shapes differ or something is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def run(
    cases: Sequence[Case],
    densities: Sequence[float],
    contenders: Contenders,
    settings: Settings,
    *,
    batches: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure; yields a row (`report` adds the ratios) as soon as its session is over.

    Args:
        cases, densities, batches: what is measured; `batches` None takes those of each case.
        contenders: who.
        settings: how long.
        progress: told what is being done.
    """
    say = progress or (lambda text: None)
    for case in cases:
        pairs = case.pairs(densities)
        size = 1 if case.dense_bytes > BIG_BYTES else len(pairs)
        for batch in batches or case.batches:
            for i in range(0, len(pairs), size):
                yield from _session(case, batch, pairs[i : i + size], contenders, settings, say)


def _session(
    case: Case,
    batch: int,
    pairs: list[tuple[str, float]],
    contenders: Contenders,
    settings: Settings,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    x = example(case, batch)
    loaded: dict[Key, list[Loaded]] = {}
    for pattern, density in pairs:
        say(f"{case.name} batch {batch}: loading {pattern} {density:g}")
        names = contenders.sparse + (contenders.dense if (pattern, density) == pairs[0] else [])
        networks = [chain(case, length, density, pattern) for length in case.lengths]
        for name in names:
            key = (name, "", 1.0) if name in DENSE_ENGINES else (name, pattern, density)
            row = f"{case.name} {pattern} {density:g} batch {batch}"
            if (both := _both(contenders, name, networks, x, row)) is not None:
                loaded[key] = both
    loaded = {key: both for key, both in loaded.items() if all(one.alive() for one in both)}
    label = f"{case.name} batch {batch}: timing {len(loaded)} contenders"
    pairs_of_chains: dict[str, tuple[Clocked, Clocked]] = {
        "|".join(map(str, key)): (both[0].clocked, both[1].clocked) for key, both in loaded.items()
    }
    cells = dict(zip(loaded, measure(pairs_of_chains, settings, progress=lambda _: say(label)).values()))
    for both in loaded.values():
        for one in both:
            one.close()
    return [_row(case, batch, pattern, density, contenders, cells) for pattern, density in pairs]


def _both(
    contenders: Contenders, name: str, networks: list[nn.Sequential], x: torch.Tensor, row: str
) -> list[Loaded] | None:
    """Both chains in a contender, checked; None, with a problem noted unless it is a mere lack, if it cannot take part."""
    both: list[Loaded] = []
    for network in networks:
        try:
            # A bare ReLU has no kernel to force: it is the cost of a call, on any path.
            bare = name == "auto" or (name in contenders.paths and isinstance(network[0], nn.ReLU))
            one = contenders.load("auto" if bare else name, network, x)
            both.append(one)
            with torch.inference_mode():
                wrong = difference(one.output(), network(x).numpy())
        except Unsupported as reason:
            if name == "deepsparse":
                contenders.problems.append(Problem(row, name, str(reason)))
            return None
        except Exception as error:
            contenders.problems.append(Problem(row, name, f"{type(error).__name__}: {error}"))
            return None
        if wrong > TOLERANCE:
            contenders.problems.append(Problem(row, name, f"differs from torch by {wrong:.2g} of the largest value"))
            return None
    return both


def _row(
    case: Case, batch: int, pattern: str, density: float, contenders: Contenders, cells: dict[Key, Cell]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": case.name,
        "family": case.family,
        "pattern": pattern,
        "density": density,
        "batch": batch,
        "threads": contenders.threads,
        "mflop": 2e-6 * batch * case.macs(),
        "mflop_kept": 2e-6 * batch * case.macs(pattern, density),
    }
    confirmed = True
    for name in [*contenders.dense, *contenders.sparse]:
        cell = cells.get((name, "", 1.0) if name in DENSE_ENGINES else (name, pattern, density))
        row[f"{name}_us"] = math.nan if cell is None else per_unit_us(cell, case.lengths, case.split)
        confirmed &= cell is None or cell.confirmed
    row["confirmed"] = confirmed
    return row
