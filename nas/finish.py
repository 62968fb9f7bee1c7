"""What happens when all trials are in: the front measured again, tested once, drawn, reported, exported.

Each step looks at what is there and does only what is missing, so it can be repeated after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hw_models.latency import measure_many
from nas.data import Data
from nas.errors import NasError
from nas.evaluate import make_measurer, open_table
from nas.export import export_module
from nas.loop import Progress
from nas.objectives import feasible, parse_constraints, violations
from nas.run import Run
from nas.store import State, Store
from nas.training import evaluate
from search_spaces import SpaceError

MAX_VERIFY_PASSES = 3


def verify_front(run: Run, store: Store, data: Data, progress: Progress) -> None:
    """Measure the latency of the front's trained networks again, interleaved in one measuring run, nothing else running.

    The new values replace the ones of the search (kept as `latency_search_ms`), so the front can change; what newly comes
    onto it is measured too. A network whose latency now breaks a constraint is marked infeasible.
    """
    measurer, table = make_measurer(run.config), open_table()
    example = data.val.x[: run.config.latency.batch]
    broken: set[int] = set()
    for _ in range(MAX_VERIFY_PASSES):
        front = [int(n) for n in run.pareto()["trial"] if not run.trial(int(n)).metrics.get("latency_verified")]
        networks = {}
        for number in front:
            model = None if number in broken else _rebuilt(run, number, progress)
            if model is None:
                broken.add(number)
            else:
                networks[number] = (model, example)
        if not networks:
            return
        progress.message(f"measuring the front again, interleaved: {len(networks)} networks")
        measured = measure_many(networks, threads=run.config.latency.threads, table=table, measurer=measurer)
        with store.transaction():
            for number, latency in measured.items():
                _update(
                    run,
                    store,
                    number,
                    {
                        "latency_search_ms": run.trial(number).metrics["latency_ms"],
                        "latency_ms": latency.ms,
                        "latency_lo_ms": latency.lo_ms,
                        "latency_hi_ms": latency.hi_ms,
                        "latency_quality": latency.quality,
                        "latency_verified": 1,
                    },
                )


def test_front(run: Run, store: Store, data: Data, progress: Progress) -> None:
    """Measure the test accuracy of the front, once per network, after the search has made all its choices."""
    for number in run.pareto()["trial"]:
        if run.trial(int(number)).metrics.get("test_accuracy") is not None:
            continue
        model = _rebuilt(run, int(number), progress)
        if model is not None:
            result = evaluate(model, data.test)
            with store.transaction():
                _update(run, store, int(number), {"test_accuracy": result.accuracy})


def _rebuilt(run: Run, trial: int, progress: Progress) -> nn.Module | None:
    """A trial's network, or None and a message where it cannot be had again: the other networks still can."""
    try:
        return run.build(trial)
    except (NasError, SpaceError) as error:
        progress.message(
            f"trial {trial} cannot be built again, so its latency and test accuracy stay unchecked: {error}"
        )
        return None


def _update(run: Run, store: Store, trial: int, metrics: Mapping[str, Any]) -> None:
    """Add metrics to a trial and to its copies, which share its answer; a limit may now be broken, or kept."""
    constraints = parse_constraints(run.constraints)
    for row in store.trials():
        if trial in (row.trial, row.copy_of):
            found = violations(row.metrics | dict(metrics), constraints)
            state: State = "complete" if feasible(found) else "infeasible"
            store.update_metrics(row.trial, metrics, state=state, violations=found)


def winner(run: Run) -> int | None:
    """The trial a run hands out: of the feasible front, the best by the first objective; None if no trial is complete."""
    front = run.pareto()["trial"]
    return int(front.iloc[0]) if len(front) else None


def export_trial(run: Run, trial: int, folder: Path) -> dict[str, Any]:
    """Export a trial's network with a card that says how every number was got."""
    number = run.trial(trial)
    card = {
        "name": f"{run.name}, trial {number.trial}",
        "run": run.name,
        "trial": number.trial,
        "space": run.space.name,
        "architecture": number.architecture.as_dict(),
        "digest": number.digest,
        "data": run.meta("data"),
        "metrics": {key: value for key, value in number.metrics.items() if value is not None},
        "environment": run.environment,
        "training": run.config.as_dict()["train"],
        "seed": number.seed,
    }
    return export_module(run.build(number.trial), run.example_input(), folder, card=card)
