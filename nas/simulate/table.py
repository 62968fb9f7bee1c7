"""What a simulation replays: per architecture the result of a training, epoch by epoch, and how long it took.

`Table` is the interface, `KnownTable` one of known results; files.py makes such from runs and files, synthetic.py invents one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from nas.errors import ConfigError, DataError
from nas.simulate.cluster import uniform
from search_spaces.architecture import Architecture

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A whole training of one architecture.

    Attributes:
        metrics: of the finished trial, name with unit -> value.
        curve: a row per epoch, {"epoch": from 1, "val_accuracy": ...}; empty for what is never trained.
        seconds: how long all of it takes; every epoch takes the same share.
        state: "complete", "infeasible", or "failed" (its training raises at the end).
        violations: constraint -> amount; <= 0 is feasible.
    """

    metrics: Mapping[str, Any]
    curve: Sequence[Row] = ()
    seconds: float = 0.0
    state: Literal["complete", "infeasible", "failed"] = "complete"
    violations: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise DataError(f"a result: expected finite seconds >= 0, got {self.seconds!r}")


class Table(Protocol):
    """Results by architecture and seed; equal questions get equal answers."""

    @property
    def epochs(self) -> int:
        """Epochs of a whole training."""
        ...

    def result(self, architecture: Architecture, seed: int) -> Result: ...


class KnownTable:
    """Known results; what is not among them is answered by the nearest, or by another table.

    Every answer says in the metric "simulated" what it is: "known"; "nearest", with the number of decisions that differ in
    "simulated_distance"; or whatever the other table says. Where an architecture is known with several seeds and not with the one
    asked for, the seed decides which of them it gets.

    Args:
        architectures: of the results; one may occur several times.
        results: in the same order.
        seeds: of their trainings; None: not known.
        unknown: "nearest" (fewest decisions that differ or that only one has; among equals the first), "error", or a table.

    Raises:
        DataError: there are no results, or the three differ in length.
    """

    def __init__(
        self,
        architectures: Sequence[Architecture],
        results: Sequence[Result],
        seeds: Sequence[int | None] | None = None,
        *,
        unknown: Table | Literal["nearest", "error"] = "nearest",
    ) -> None:
        seeds = [None] * len(results) if seeds is None else seeds
        if not results or not len(architectures) == len(results) == len(seeds):
            raise DataError(
                f"expected at least one result, and an architecture and a seed for each, got {len(results)} results, "
                f"{len(architectures)} architectures, {len(seeds)} seeds"
            )
        self.epochs = max(len(result.curve) for result in results)
        self.unknown = unknown
        self._known: dict[str, list[tuple[int | None, Result]]] = {}
        self.architectures: list[Architecture] = []
        for architecture, seed, result in zip(architectures, seeds, results, strict=True):
            if architecture.digest not in self._known:
                self.architectures.append(architecture)
            self._known.setdefault(architecture.digest, []).append((seed, result))
        self._near: _Nearest | None = None

    def __len__(self) -> int:
        return len(self.architectures)

    def result(self, architecture: Architecture, seed: int) -> Result:
        """The answer.

        Raises:
            ConfigError: the architecture is not known and `unknown` is "error".
        """
        found = self._known.get(architecture.digest)
        if found is not None:
            return _noted(_pick(found, architecture.digest, seed), {"simulated": "known"})
        if self.unknown == "error":
            raise ConfigError(
                f"the table has no result for {architecture}; it knows {len(self)} architectures. "
                'Make it with unknown="nearest", or with a table to fall back on'
            )
        if self.unknown != "nearest":
            return self.unknown.result(architecture, seed)
        if self._near is None:
            self._near = _Nearest(self.architectures)
        nearest, distance = self._near.find(architecture)
        picked = _pick(self._known[nearest.digest], architecture.digest, seed)
        return _noted(picked, {"simulated": "nearest", "simulated_distance": distance})


def _pick(found: Sequence[tuple[int | None, Result]], digest: str, seed: int) -> Result:
    for known, result in found:
        if known == seed:
            return result
    return found[int(uniform("seed", digest, seed) * len(found)) if len(found) > 1 else 0][1]


def _noted(result: Result, notes: Mapping[str, Any]) -> Result:
    return Result({**result.metrics, **notes}, result.curve, result.seconds, result.state, result.violations)


class _Nearest:
    """Architectures as rows of codes, so that one comparison finds the nearest."""

    def __init__(self, architectures: Sequence[Architecture]) -> None:
        self._architectures = architectures
        self._columns: dict[str, int] = {}
        self._codes: dict[tuple[str, Any], int] = {}
        for architecture in architectures:
            for name, value in architecture.decisions:
                self._columns.setdefault(name, len(self._columns))
                self._codes.setdefault((name, value), len(self._codes))
        self._rows = np.stack([self._encoded(architecture) for architecture in architectures])

    def _encoded(self, architecture: Architecture) -> np.ndarray:
        row = np.full(len(self._columns), -1, dtype=np.int32)  # a decision that is not taken
        for name, value in architecture.decisions:
            if name in self._columns:
                row[self._columns[name]] = self._codes.get((name, value), -2)
        return row

    def find(self, architecture: Architecture) -> tuple[Architecture, int]:
        distances = (self._rows != self._encoded(architecture)).sum(axis=1)
        best = int(distances.argmin())
        return self._architectures[best], int(distances[best])
