"""What a run hands out is measured first: the front measured again, judged again, until all of it is measured.

Where latencies were predicted, measuring the front teaches the model: it is fitted again and the networks that could come onto the
front are priced anew, so that the next ones measured are the right ones. Every pass is one transaction and looks at what is
there, so a killed process loses the pass it was in. `nas.optimism` says how far off the predictions were.

Start with `verify_front`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from hw_models.measure import MeasurementError
from nas.artifacts import write_plan
from nas.data import Data
from nas.errors import NasError
from nas.latency import Priced, Pricer, constraints_of, make_pricer
from nas.loop import Progress
from nas.objectives import feasible, number, violations
from nas.optimism import optimism
from nas.run import Run
from nas.store import State, Store, Trial
from ops.plan import PlanError
from search_spaces import SpaceError

__all__ = ["rebuilt", "update", "verify_front"]

AT_ONCE = 10
"""Networks measured before the model learns from them. Of a larger front a quarter, so that it is fitted a few times, not often."""
BELIEVED = {
    "latency_ms": "latency_search_ms",
    "latency_lo_ms": "latency_search_lo_ms",
    "latency_hi_ms": "latency_search_hi_ms",
    "latency_source": "latency_search_source",
}
"""Where the search's belief is kept once there is a better value."""


def verify_front(run: Run, store: Store, data: Data, progress: Progress, pricer: Pricer | None = None) -> None:
    """Measure the front's trained networks, interleaved, nothing else running, until the whole front is measured.

    The new values replace the ones of the search (kept as `latency_search_ms`), so the front can change; what newly comes
    onto it is measured too. A network whose latency now breaks a constraint is marked infeasible. Each pass measures at least one
    network or gives one up, so it ends.

    Where the search predicted, a network that cannot be built or measured any more is marked failed: it cannot be handed out.

    Args:
        pricer: measures; default the one of the run's config.
    """
    pricer = pricer or make_pricer(run.config)
    example = data.val.x[: run.config.latency.batch]
    given_up: set[int] = set()
    while True:
        front = [int(n) for n in run.pareto()["trial"]]
        missing = [n for n in front if n not in given_up and not run.trial(n).metrics.get("latency_verified")]
        if not missing:
            break
        chosen = _spread(missing, max(AT_ONCE, math.ceil(len(missing) / 4))) if pricer.predicts else missing
        networks = {}
        for n in chosen:
            model = rebuilt(run, n, progress)
            if model is not None:
                networks[n] = (model, example)
        what = "measuring the front" + (", which was predicted so far" if pricer.predicts else " again, interleaved")
        if networks:
            progress.message(f"{what}: {len(networks)} network{'s' if len(networks) > 1 else ''}")
        measured = _measure(pricer, networks, progress) if networks else {}
        given_up.update(n for n in chosen if n not in measured)
        if pricer.predicts:  # whose plan was predicted, too
            for n, priced in measured.items():
                write_plan(run.folder, n, priced.plan)
        with store.transaction():
            for n, priced in measured.items():
                update(run, store, n, _replaced(run.trial(n), priced, pricer.predicts) | {"latency_verified": 1})
            for n in chosen:
                if pricer.predicts and n not in measured:
                    _withdraw(store, n)
        if pricer.predicts and measured and pricer.learn():
            _price_again(run, store, pricer, example, progress)
    if pricer.predicts:
        found = optimism(trial.metrics for trial in store.trials() if trial.copy_of is None)
        store.set_meta("optimism", None if found is None else asdict(found))
        if found is not None:
            progress.message(str(found))


def rebuilt(run: Run, trial: int, progress: Progress) -> nn.Module | None:
    """A trial's network, or None and a message where it cannot be had again: the other networks still can."""
    try:
        return run.build(trial)
    except (NasError, SpaceError) as error:
        progress.message(
            f"trial {trial} cannot be built again, so its latency and test accuracy stay unchecked: {error}"
        )
        return None


def update(run: Run, store: Store, trial: int, metrics: Mapping[str, Any]) -> None:
    """Add metrics to a trial and to its copies, which share its answer; a limit may now be broken, or kept."""
    constraints = constraints_of(run.config)
    for row in store.trials():
        if trial in (row.trial, row.copy_of):
            found = violations(row.metrics | dict(metrics), constraints)
            state: State = "complete" if feasible(found) else "infeasible"
            store.update_metrics(row.trial, metrics, state=state, violations=found)


def _measure(
    pricer: Pricer, networks: dict[int, tuple[nn.Module, torch.Tensor]], progress: Progress
) -> dict[int, Priced]:
    """Measure networks together; if one of them fails, each by itself, so that it costs only itself."""
    try:
        return pricer.measure(networks)
    except (MeasurementError, PlanError) as error:
        if len(networks) == 1:
            progress.message(f"trial {next(iter(networks))} cannot be measured: {error}")
            return {}
    found: dict[int, Priced] = {}
    for n, network in networks.items():
        found |= _measure(pricer, {n: network}, progress)
    return found


def _withdraw(store: Store, trial: int) -> None:
    """Mark a trial and its copies failed."""
    error = "its latency was predicted, and it can no longer be built or measured, so it cannot be handed out"
    for row in store.trials():
        if trial in (row.trial, row.copy_of):
            store.update_metrics(row.trial, {}, state="failed", error=error)


def _replaced(trial: Trial, priced: Priced, predicts: bool) -> dict[str, Any]:
    """New metrics of a trial; what the search believed is kept under other names, the first time."""
    before = trial.metrics
    names = BELIEVED if predicts else {"latency_ms": "latency_search_ms"}
    kept = {new: before[old] for old, new in names.items() if new not in before and before.get(old) is not None}
    return kept | priced.metrics


def _price_again(run: Run, store: Store, pricer: Pricer, example: torch.Tensor, progress: Progress) -> None:
    """Ask the model again about every trained network that could be on the front."""
    for n in _contenders(run, store.trials()):
        model = rebuilt(run, n, progress)
        if model is None:
            continue
        priced = pricer.price(model, example)
        with store.transaction():
            update(run, store, n, _replaced(run.trial(n), priced, True))


def _contenders(run: Run, trials: Sequence[Trial]) -> list[int]:
    """Trained networks not measured yet that no measured one dominates if they are as fast as their interval allows."""
    objectives, constraints = run.objectives, constraints_of(run.config)
    signs = np.array([-1.0 if direction == "max" else 1.0 for direction in objectives.values()])

    def point(metrics: Mapping[str, Any]) -> np.ndarray | None:
        values = [number(metrics, name) for name in objectives]
        return None if None in values else signs * np.array(values, dtype=float)

    trained = [
        t for t in trials if t.copy_of is None and t.state in ("complete", "infeasible") and "val_accuracy" in t.metrics
    ]
    measured = [t for t in trained if t.metrics.get("latency_verified") and t.state == "complete"]
    points = [p for t in measured if (p := point(t.metrics)) is not None]
    found = []
    for trial in trained:
        if trial.metrics.get("latency_verified"):
            continue
        lo, ms = number(trial.metrics, "latency_lo_ms"), number(trial.metrics, "latency_ms")
        if lo is None or ms is None or ms <= 0:
            continue
        best = dict(trial.metrics) | {"latency_ms": lo, "latency_hi_ms": lo}
        energy = number(best, "energy_mj")
        if energy is not None:
            best["energy_mj"] = energy * lo / ms
        mine = point(best)
        if mine is None or not feasible(violations(best, constraints)):
            continue
        if not any((p <= mine).all() and (p < mine).any() for p in points):
            found.append(trial.trial)
    return found


def _spread(numbers: list[int], most: int) -> list[int]:
    """At most `most` of them, evenly spread, both ends among them: a front's extremes and its middle."""
    if len(numbers) <= most:
        return numbers
    return [numbers[round(i * (len(numbers) - 1) / max(most - 1, 1))] for i in range(most)]
