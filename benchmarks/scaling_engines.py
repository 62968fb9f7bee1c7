"""The part of `benchmarks.scaling` with real engines: what a trial costs beside its training, local processes against Ray.

Trials sleep: they take their time whatever else the machine does, so what is measured is the engine, not the competition for
cores. The engines take turns with equal blocks of trials in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd

from nas.errors import NasError
from nas.executors import Executor, Job, Placement, make_executor

TASK = "benchmarks.scaling_engines:sleeper"
Say = Callable[[str], None]


def sleeper(setup: dict[str, Any]) -> Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]:
    """The task: sleeps payload["seconds"]."""

    def evaluate(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        if payload["seconds"]:
            time.sleep(payload["seconds"])
        return {"slept": payload["seconds"]}

    return evaluate


def run_block(executor: Executor, jobs: int, seconds: float, first: int) -> float:
    """Wall time of so many jobs, the executor kept full, seconds.

    Raises:
        RuntimeError: a job was lost or failed: there is no time to speak of then.
    """
    began = time.perf_counter()
    left, held = list(range(first, first + jobs)), 0
    while left or held:
        while left and held < executor.capacity:
            executor.submit(Job(left[0], 1, {"seconds": seconds}))
            left.pop(0)
            held += 1
        for event in executor.poll(1.0):
            if event.kind in ("failed", "lost"):
                raise RuntimeError(f"job {event.trial} was {event.kind}: {event.error}")
            held -= event.kind == "done"
    return time.perf_counter() - began


def compare(
    names: Sequence[str], workers: Sequence[int], jobs: int, blocks: int, seconds: float, trivial: int, say: Say
) -> pd.DataFrame:
    """Each engine with each number of workers.

    Args:
        names: of executors; one that cannot be started is left out, and `say` is told why.
        workers: at a time.
        jobs: trials of `seconds` per engine, in `blocks` turns.
        seconds: that such a trial takes.
        trivial: trials that take no time, after as many as warm the engine up.

    Returns:
        Columns executor, workers, trivial_per_s, trials, trial_s, wall_s (of those trials), ideal_s (ceil(trials per block /
        workers) x trial_s x blocks), over_ideal, over_local.
    """
    rows: list[dict[str, Any]] = []
    for count in workers:
        with ExitStack() as stack:
            engines: dict[str, Executor] = {}
            for name in names:
                try:
                    executor = make_executor(name, TASK, {}, Placement(workers=count))
                    stack.callback(executor.close)
                    run_block(executor, 2 * count, 0.0, 10**6)
                    engines[name] = executor
                except (NasError, ModuleNotFoundError) as error:
                    say(f"engines: {name} is left out: {error}")
            rates = {name: trivial / run_block(engine, trivial, 0.0, 10**7) for name, engine in engines.items()}
            walls = dict.fromkeys(engines, 0.0)
            size = max(1, jobs // blocks)
            for block in range(blocks):
                order = list(engines) if block % 2 == 0 else list(engines)[::-1]
                for name in order:
                    walls[name] += run_block(engines[name], size, seconds, block * size)
                say(f"engines: {count} workers, block {block + 1} of {blocks}")
            ideal = -(-size // count) * seconds * blocks
            for name in engines:
                rows.append(
                    {
                        "executor": name,
                        "workers": count,
                        "trivial_per_s": rates[name],
                        "trials": size * blocks,
                        "trial_s": seconds,
                        "wall_s": walls[name],
                        "ideal_s": ideal,
                        "over_ideal": walls[name] / ideal,
                        "over_local": walls[name] / walls["local"] if "local" in walls else float("nan"),
                    }
                )
    return pd.DataFrame(rows)
