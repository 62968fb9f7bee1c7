"""The model that `nas calibrate` makes in a budget, away from the user's own: `calibrated`.

What it measured is kept in a folder. The next time the model is fitted to that anew, so that changes of the model show and
nothing is measured twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hw_models.calibrate import calibrate, fit_from_store
from hw_models.device import runtime_id
from hw_models.predictor import Predictor
from hw_models.store import MeasurementStore

__all__ = ["cache_at", "calibrated"]


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Let `hw_models.tables.cache_folder` be another folder for a while."""
    before = os.environ.get("NAS_CACHE_DIR")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["NAS_CACHE_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["NAS_CACHE_DIR"]
        else:
            os.environ["NAS_CACHE_DIR"] = before


def calibrated(
    store: Path, budget_s: float, threads: int, batch: int, progress: Callable[[float, float, str], None] | None = None
) -> Predictor:
    """A model of this machine from `budget_s` seconds of calibration on the built-in networks.

    Args:
        store: folder of the benchmark; a folder per budget, runtime and batch size is made in it.
    """
    runtime = runtime_id(threads)
    folder = store / "calibration" / f"{budget_s:g}s-batch{batch}-{runtime.replace('/', '-')}"
    done = folder / "done.json"
    with cache_at(folder):
        measurements = folder / "measurements.sqlite"
        if not done.exists():
            measurements.unlink(missing_ok=True)  # of an interrupted calibration: the budget is for one
            calibrate(budget_s, threads=threads, batch=batch, store=MeasurementStore(measurements), progress=progress)
            done.write_text(json.dumps({"budget_s": budget_s, "runtime": runtime, "batch": batch}))
        return fit_from_store(MeasurementStore(measurements), threads=threads)
