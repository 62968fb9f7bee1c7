"""What happens when all trials are in and the front is measured (`nas.verify`): tested once, the best exported.

Tested are the front, and whatever one-shot searches found with its controls: these are replicates, none is chosen among them.

Each step looks at what is there and does only what is missing, so it can be repeated after a kill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.data import Data
from nas.export import export_module
from nas.loop import Progress
from nas.run import Run
from nas.store import Store, Trial
from nas.training import evaluate
from nas.verify import rebuilt, update


def test_front(run: Run, store: Store, data: Data, progress: Progress) -> None:
    """Measure the test accuracy of the front, once per network, after the search has made all its choices.

    So too of all complete trials of one-shot searches and their controls, which are compared as replicates.
    """
    replicated = [t.trial if t.copy_of is None else t.copy_of for t in store.trials() if _is_replicate(t)]
    for number in dict.fromkeys([*(int(n) for n in run.pareto()["trial"]), *replicated]):
        if run.trial(int(number)).metrics.get("test_accuracy") is not None:
            continue
        model = rebuilt(run, int(number), progress)
        if model is not None:
            result = evaluate(model, data.test)
            with store.transaction():
                update(run, store, int(number), {"test_accuracy": result.accuracy})


def _is_replicate(trial: Trial) -> bool:
    return trial.state == "complete" and "replicate" in trial.sampler


def winner(run: Run) -> int | None:
    """The trial a run hands out: of the feasible front, the best by the first objective; None if no trial is complete."""
    front = run.pareto()["trial"]
    return int(front.iloc[0]) if len(front) else None


def export_trial(run: Run, trial: int, folder: Path) -> dict[str, Any]:
    """Export a trial's network with a card that says how every number was got."""
    number = run.trial(trial)
    predicted = run.config.latency.model == "predict" and not number.metrics.get("latency_verified")
    card = {
        "name": f"{run.name}, trial {number.trial}",
        "run": run.name,
        "trial": number.trial,
        "space": run.space.name,
        "architecture": number.architecture.as_dict(),
        "digest": number.digest,
        "data": run.meta("data"),
        "metrics": {key: value for key, value in number.metrics.items() if value is not None},
        "how": {"latency_ms": "predicted milliseconds of one forward pass, never measured"} if predicted else {},
        "environment": run.environment,
        "training": run.config.as_dict()["train"],
        "seed": number.seed,
    }
    return export_module(run.build(number.trial), run.example_input(), folder, card=card)
