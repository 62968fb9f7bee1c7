"""Measures the networks in place, in batches, with two fixed networks in every batch that show whether the machine changed.

Networks of a batch are measured against each other in rounds; a batch is one measuring run. Even against odd rounds are its A/A
figure. Some networks are measured again in a later run, with others around them: the noise ceiling. A run whose fixed networks
are more than 3 % off has *moved*: its networks are measured once more, and the earlier times are not used. So it is with networks
whose floor no other round confirmed.

Start with `measure_all`, then `Chosen`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from benchmarks.kernels.networks import settle_
from benchmarks.kernels.run_layers import TOLERANCE, difference
from benchmarks.latency.networks import Spec
from benchmarks.latency.records import Record, Records
from hw_models.insitu import InPlace, measure_in_place
from hw_models.measure import Measurer, threads_at
from ops.layers import draw_masks_, sparsify
from ops.plan import Plan, lower
from ops.runtime import Runtime

__all__ = ["AGAIN", "MOVED", "Chosen", "Planned", "measure_all", "plan_all"]

BATCH = 24
AGAIN = 0.2  # share of the networks that is measured again in a later run
MOVED = 0.03
ATTEMPTS = 3  # records of a network at most, where none is good
SENTINEL = "sentinel/"

Measure = Callable[[Mapping[str, tuple[Runtime, torch.Tensor]], Measurer], dict[str, InPlace]]


class Progress(Protocol):
    """Told how many networks are done, of how many, and what is being done."""

    def __call__(self, done: int, total: int, text: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Planned:
    """A network with the plan that is measured and predicted: that of `lower` as it comes."""

    spec: Spec
    module: nn.Module
    plan: Plan


def plan_all(specs: Sequence[Spec], batch: int = 1, progress: Progress | None = None) -> list[Planned]:
    """Build and lower networks."""
    made = []
    for i, spec in enumerate(specs):
        if progress is not None:
            progress(i, len(specs), f"building {spec.name}")
        module = spec.build()
        made.append(Planned(spec, module, lower(module, spec.example(batch))))
    return made


def measure_all(
    networks: Sequence[Planned],
    records: Records,
    measurer: Measurer,
    *,
    again: float = AGAIN,
    progress: Progress | None = None,
    measure: Measure = measure_in_place,
) -> None:
    """Measure what the records lack; every batch is written as soon as it is measured.

    Args:
        networks: all of the benchmark.
        records: of this runtime and batch size; grows.
        measurer: settings of a measuring run.
        again: share measured a second time, in another run.
        measure: takes the times; for tests.

    Raises:
        RuntimeError: a runtime does not compute what torch computes.
    """
    twice = {p.spec.name for p in networks if random.Random(f"again {p.spec.name}").random() < again}
    while True:
        pending = _pending(networks, records, twice)
        if not pending:
            return
        for start in range(0, len(pending), BATCH):
            part = pending[start : start + BATCH]
            if progress is not None:
                progress(start, len(pending), f"measuring run {records.next_run}, {len(part)} networks")
            records.add(_run(part, records, measurer, measure))


def _pending(networks: Sequence[Planned], records: Records, twice: set[str]) -> list[Planned]:
    """Networks to measure now, in the order of the benchmark; those to be measured again in an order of their own, afterwards."""
    moved = _moved_runs(records)
    found = {p.spec.name: records.of(p.spec.name) for p in networks}
    good = {name: sum(_good(record, moved) for record in of) for name, of in found.items()}
    once = [p for p in networks if not good[p.spec.name] and len(found[p.spec.name]) < ATTEMPTS]
    if once:
        return once
    second = [p for p in networks if p.spec.name in twice and len(found[p.spec.name]) < 2]
    return random.Random(0).sample(second, len(second))


def _good(record: Record, moved: Collection[int]) -> bool:
    return record.run not in moved and record.quality == "ok"


def _run(part: Sequence[Planned], records: Records, measurer: Measurer, measure: Measure) -> list[Record]:
    items: dict[str, tuple[Runtime, torch.Tensor]] = {}
    groups: dict[str, str] = {}
    with threads_at(measurer.threads), torch.inference_mode():
        for planned in part:
            x = planned.spec.example(records.batch)
            runtime = Runtime(planned.plan, measurer.threads)
            wrong = difference(np.asarray(runtime(x)), planned.module(x).numpy())
            if wrong > TOLERANCE:
                raise RuntimeError(f"{planned.spec.name}: differs from torch by {wrong:.2g} of the largest value")
            items[planned.spec.name], groups[planned.spec.name] = (runtime, x), planned.spec.group
        for name, (plan, x) in _sentinels().items():
            items[name], groups[name] = (Runtime(plan, measurer.threads), x), name
        number = records.next_run
        measured = measure(items, replace(measurer, seed=measurer.seed + number))
    return [_record(name, groups[name], number, one) for name, one in measured.items()]


def _record(name: str, group: str, run: int, one: InPlace) -> Record:
    whole = one.whole
    return Record(
        name=name,
        group=group,
        run=run,
        ms=whole.floor_ms,
        lo_ms=whole.lo_ms,
        hi_ms=whole.hi_ms,
        median_ms=whole.median_ms,
        p90_ms=whole.p90_ms,
        quality=whole.quality,
        rounds_ms=whole.rounds,
        sum_ms=one.sum_ms,
        step_rounds_ns=tuple(tuple(round(1e6 * ms) for ms in row) for row in one.step_rounds),
    )


def _sentinels() -> dict[str, tuple[Plan, torch.Tensor]]:
    """Two chains of convolutions that are always the same: dense ones, run by torch, and sparse ones, run by our kernels."""
    made = {}
    x = torch.randn(1, 32, 24, 24, generator=torch.Generator().manual_seed(0))
    for name, density in (("dense", 1.0), ("sparse", 0.1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            chain = [layer for _ in range(4) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
            network = nn.Sequential(*chain).requires_grad_(False)
            if density < 1:
                sparsify(network, density)
                draw_masks_(network, torch.Generator().manual_seed(0))
            made[SENTINEL + name] = (lower(settle_(network, x.expand(2, -1, -1, -1)), x), x)
    return made


def _moved_runs(records: Records) -> dict[int, float]:
    """run -> by how much (relative) its fixed networks are off their lower quartile over all runs, where that is too much."""
    off: dict[int, float] = {}
    for name in sorted({record.name for record in records.all if record.name.startswith(SENTINEL)}):
        of = records.of(name)
        usual = float(np.percentile([record.ms for record in of], 25))
        for record in of:
            off[record.run] = max(off.get(record.run, 0.0), abs(record.ms / usual - 1))
    return {run: by for run, by in off.items() if by > MOVED}


class Chosen:
    """Which record stands for each network, and the pairs that show the noise.

    Args:
        names: of the networks, each measured.
        records: all there are.

    Attributes:
        records: one per name: the first that is good, else the fastest. Good is of quality "ok" and of a run that was not moved.
        again: (first ms, second ms) of networks with two good records.
        halves: (even rounds ms, odd rounds ms) of every name.
        runs, moved: how many measuring runs there were, and how many of them were moved.
        unsettled: names without a good record.
    """

    def __init__(self, names: Sequence[str], records: Records) -> None:
        moved = _moved_runs(records)
        self.records: list[Record] = []
        self.again: list[tuple[float, float]] = []
        self.unsettled: list[str] = []
        for name in names:
            found = records.of(name)
            good = [record for record in found if _good(record, moved)]
            if not good:
                self.unsettled.append(name)
            self.records.append(good[0] if good else min(found, key=lambda record: record.ms))
            if len(good) > 1:
                self.again.append((good[0].ms, good[1].ms))
        self.halves = [record.halves for record in self.records]
        self.runs = len({record.run for record in records.all})
        self.moved = len(moved)
