"""Results made of thin air: a seeded, smooth function over the decisions of any space. For plans and tests of searches.

Nothing here was measured and nothing follows for real networks: which searcher is better *here* says how it deals with many
additive and some pairwise effects, noise, and results that are late. Start with `SyntheticTable`; `decisions_space` is a space
that costs nothing to draw from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from nas.errors import ConfigError
from nas.searchers.base import rng
from nas.simulate.table import Result, Row
from ops.counting import count
from search_spaces.architecture import Architecture, Value
from search_spaces.chooser import Chooser
from search_spaces.space import Space

DRAWN = 64
PAIR = 0.5
"""Weight of what two neighbouring decisions do together, beside 1 for what each does alone."""
SHARED = 0.6
"""Correlation of what an option does to the accuracy and to the cost: better is dearer."""


def decisions_space(decisions: int = 20, options: int = 4) -> Space:
    """`decisions` choices among `options` texts each and no network: drawing takes tens of microseconds.

    Raises:
        ConfigError: fewer than one decision or two options.
    """
    if decisions < 1 or options < 2:
        raise ConfigError(f"expected at least 1 decision and 2 options, got {decisions} and {options}")
    return Space(
        _decisions, "decisions", {"decisions": decisions, "options": options}, size=lambda o: options**decisions
    )


def _decisions(c: Chooser, decisions: int, options: int) -> nn.Module:
    for i in range(decisions):
        c.choice(f"d{i}", tuple(f"o{k}" for k in range(options)))
    return nn.Identity()


class SyntheticTable:
    """A result for every architecture of a space.

    The accuracy after the last epoch is a sigmoid of standardised effects: of every option (of a number: linear in its
    logarithm, more is better and dearer), and of every pair of neighbouring options. Curves rise exponentially to it, each at
    a rate of its own, so that they cross; noise is added to every epoch. The cost "latency_ms" is the exponential of
    standardised effects that are correlated with those on the accuracy. Metric "simulated" is "synthetic".

    Args:
        space: what is searched. DRAWN architectures are drawn to standardise the effects.
        epochs: of a whole training.
        seconds: of a whole training.
        spread: standard deviation of the logarithm of the seconds, between trainings; 0: all are equal.
        noise: standard deviation of the accuracy of an epoch between seeds, in accuracy.
        chance: accuracy before the first epoch.
        best: accuracy that no architecture reaches.
        costs: gives the cost metrics of an architecture in place of the invented one, e.g. `counted(space, input_shape)`.
        seed: of the function; another seed is another world.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        space: Space,
        *,
        epochs: int = 9,
        seconds: float = 9.0,
        spread: float = 0.0,
        noise: float = 0.004,
        chance: float = 0.1,
        best: float = 0.97,
        costs: Callable[[Architecture], Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        if (
            epochs < 1
            or not 0 <= seconds < math.inf
            or not spread >= 0
            or not noise >= 0
            or not 0 <= chance < best <= 1
        ):
            raise ConfigError(
                "a synthetic table: expected epochs >= 1, seconds, spread and noise >= 0 and 0 <= chance < best <= 1, got "
                f"epochs = {epochs}, seconds = {seconds}, spread = {spread}, noise = {noise}, chance = {chance}, best = {best}"
            )
        self.epochs, self.seconds, self.spread, self.noise = epochs, float(seconds), spread, noise
        self.chance, self.best, self.costs, self.seed = chance, best, costs, seed
        self._effects: dict[tuple[str, Value], tuple[float, float]] = {}
        self._pairs: dict[tuple[str, Value, str, Value], float] = {}
        drawn = [self._raw(space.sample(rng(seed, "standard", i))) for i in range(DRAWN)]
        self._standard = [_mean_and_deviation([effects[which] for effects in drawn]) for which in (0, 1)]

    def result(self, architecture: Architecture, seed: int) -> Result:
        generator = rng(self.seed, "training", architecture.digest, seed)
        final, cost = self.truth(architecture)
        rate = 4.0 * math.exp(0.5 * rng(self.seed, "rate", architecture.digest).gauss(0, 1))
        rows: list[Row] = []
        for epoch in range(1, self.epochs + 1):
            reached = (1 - math.exp(-rate * epoch / self.epochs)) / (1 - math.exp(-rate))
            value = self.chance + (final - self.chance) * reached + generator.gauss(0, self.noise)
            rows.append({"epoch": epoch, "val_accuracy": min(1.0, max(0.0, value))})
        seconds = self.seconds * math.exp(generator.gauss(0, self.spread)) if self.spread else self.seconds
        costs = {"latency_ms": cost} if self.costs is None else self.costs(architecture)
        metrics = {"val_accuracy": rows[-1]["val_accuracy"], **costs, "simulated": "synthetic"}
        return Result(metrics, rows, seconds)

    def truth(self, architecture: Architecture) -> tuple[float, float]:
        """The accuracy after the last epoch without noise, and the invented latency in ms."""
        raw = self._raw(architecture)
        z, dear = ((value - mean) / deviation for value, (mean, deviation) in zip(raw, self._standard))
        return self.chance + (self.best - self.chance) / (1 + math.exp(-1.0 - z)), math.exp(0.6 * dear)

    def _raw(self, architecture: Architecture) -> tuple[float, float]:
        gain = cost = 0.0
        for name, value in architecture.decisions:
            key = (name, value)
            if key not in self._effects:
                self._effects[key] = self._effect(name, value)
            gain += self._effects[key][0]
            cost += self._effects[key][1]
        for (one, a), (two, b) in pairwise(architecture.decisions):
            if not (_is_number(a) or _is_number(b)):
                pair = (one, a, two, b)
                if pair not in self._pairs:
                    self._pairs[pair] = PAIR * rng(self.seed, "pair", *pair).gauss(0, 1)
                gain += self._pairs[pair]
        return gain, cost

    def _effect(self, name: str, value: Value) -> tuple[float, float]:
        if _is_number(value) and float(value) > 0:
            generator = rng(self.seed, "number", name)
            size = math.log2(float(value))
            return size * generator.uniform(0.3, 1.0), size * generator.uniform(0.3, 1.0)
        generator = rng(self.seed, "option", name, value)
        gain, own = generator.gauss(0, 1), generator.gauss(0, 1)
        return gain, SHARED * gain + math.sqrt(1 - SHARED**2) * own


def counted(space: Space, input_shape: tuple[int, ...]) -> Callable[[Architecture], dict[str, Any]]:
    """Costs by counting the network on the meta device, some milliseconds each, for `SyntheticTable(costs=...)`.

    Gives params, nnz, density, weight_bytes, dense_macs and macs. "latency_ms" is macs / 20e6, a stand-in and no measurement.
    Counted before masks are drawn, so by the densities that were decided.
    """

    def costs(architecture: Architecture) -> dict[str, Any]:
        found = count(space.meta(architecture), input_shape)
        names = ("params", "nnz", "density", "weight_bytes", "dense_macs", "macs")
        return {name: getattr(found, name) for name in names} | {"latency_ms": found.macs / 20e6}

    return costs


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) or 1.0
