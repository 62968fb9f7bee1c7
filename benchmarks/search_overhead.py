"""What a search costs beside training: milliseconds per trial with an objective that costs nothing.

    python -m benchmarks.search_overhead [--trials 2000] [--searchers random tpe] [--workers 0 1 2] [--space convnet]

Runs the whole loop, as a search does: propose, write to the run's SQLite database (in a temporary folder), send to an executor,
read the answer, write it, tell the searcher. Workers 0 is this process; 1 and 2 are processes of their own. Two objectives.

Prints, after 100, 500, 1000, ... trials: wall time per trial since the first trial was finished (so without starting
processes), wall time per trial over the last 100, the CPU time of this process per trial, and the wall time that went into
proposing. Where the machine is busy with other things, only the CPU time means something.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nas.errors import NasError
from nas.executors import Executor, InlineExecutor, LocalExecutor
from nas.loop import SearchLoop
from nas.searchers import SEARCHERS, Proposal, Searcher, make_searcher
from nas.store import Store, Trial
from search_spaces import get_space
from search_spaces.architecture import Architecture

OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}
MARKS = (100, 500, 1000, 2000, 5000, 10_000)
TARGET_MS = {"random": 10.0, "regularized_evolution": 10.0, "nsga2": 10.0, "tpe": 40.0}
"""The aim at 1,000 trials, everything included."""


def free_task(setup: dict[str, Any]) -> Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]]:
    """The task of the executors: scores an architecture by a sum over its decisions, in microseconds."""

    def evaluate(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        return {"state": "complete", "metrics": free_objectives(payload["architecture"]), "violations": {}, "curve": []}

    return evaluate


def free_objectives(architecture_json: str) -> dict[str, float]:
    """Two objectives that add up over decisions: easy enough that searchers converge and start to propose duplicates."""
    gain = cost = 0.0
    for name, value in Architecture.from_json(architecture_json).decisions:
        worth = zlib.crc32(f"{name}={value}".encode())
        gain += (worth & 0xFFFF) / 0x10000
        cost += (worth & 0xFFFF) / 0x20000 + (worth >> 16) / 0x20000
    return {"val_accuracy": gain, "latency_ms": cost}


class Watch:
    """Stands where the progress display does, and takes the time of every trial."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.proposing_s: list[float] = []
        self.spent_s = 0.0

    def already(self, *_: Any) -> None: ...

    def trial_started(self, trial: Trial) -> None: ...

    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None:
        print("  " + text, file=sys.stderr)

    def trial_finished(self, trial: Trial) -> None:
        self.wall_s.append(time.perf_counter())
        self.cpu_s.append(time.process_time())
        self.proposing_s.append(self.spent_s)


class Timed(Searcher):
    """A searcher with a clock around its proposals."""

    def __init__(self, inner: Searcher, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    def propose(self, *arguments: Any) -> Proposal:
        start = time.perf_counter()
        try:
            return self.inner.propose(*arguments)
        finally:
            self.watch.spent_s += time.perf_counter() - start


def measure(name: str, trials: int, workers: int, space_name: str) -> list[dict[str, Any]]:
    """One search; a row per mark.

    Raises:
        AssertionError: the search did not do its work: a trial is missing, failed or a repetition.
    """
    space = get_space(space_name, input_shape=(3, 32, 32), classes=10)
    watch = Watch()
    executor: Executor
    with tempfile.TemporaryDirectory() as folder, Store.create(Path(folder) / "run.db") as store:
        if workers == 0:
            executor = InlineExecutor(free_task({}))
        else:
            executor = LocalExecutor("benchmarks.search_overhead:free_task", {}, workers=workers)
        try:
            searcher = Timed(make_searcher(name, space, OBJECTIVES, 0), watch)
            loop = SearchLoop(
                store,
                {name: searcher},
                {name: trials},
                executor,
                objectives=OBJECTIVES,
                seed=0,
                epochs=1,
                progress=watch,
            )
            loop.run()
        finally:
            executor.close()
        done = store.trials()
    assert all(trial.state == "complete" for trial in done), "a trial failed"
    assert len({trial.digest for trial in done}) == len(done), "an architecture was proposed twice"
    return [_row(watch, name, workers, space_name, n) for n in sorted({*MARKS, len(done)}) if n <= len(done)]


def _row(watch: Watch, name: str, workers: int, space: str, n: int) -> dict[str, Any]:
    last, first = n - 1, max(0, n - 101)
    wall, cpu, proposing = watch.wall_s, watch.cpu_s, watch.proposing_s
    return {
        "searcher": name,
        "space": space,
        "workers": workers,
        "trials": n,
        "ms_per_trial": 1e3 * (wall[last] - wall[0]) / max(1, last),
        "last_100_ms": 1e3 * (wall[last] - wall[first]) / max(1, last - first),
        "cpu_ms_per_trial": 1e3 * (cpu[last] - cpu[0]) / max(1, last),
        "last_100_cpu_ms": 1e3 * (cpu[last] - cpu[first]) / max(1, last - first),
        "proposing_ms": 1e3 * (proposing[last] - proposing[0]) / max(1, last),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--searchers", nargs="+", default=sorted(TARGET_MS), choices=sorted(SEARCHERS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="0 runs trials in this process")
    parser.add_argument("--space", default="convnet", help="a shipped space, or module:function")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    chosen = parser.parse_args(arguments)
    if chosen.trials < 2:
        parser.error(f"--trials must be at least 2, got {chosen.trials}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load average {load:.1f} before the start")
    rows: list[dict[str, Any]] = []
    try:
        for workers in chosen.workers:
            for name in chosen.searchers:
                rows += measure(name, chosen.trials, workers, chosen.space)
                print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    except NasError as error:
        print(error, file=sys.stderr)
        return 2
    table = pd.DataFrame(rows)
    print()
    print(table.to_string(index=False, float_format="%.2f"))
    at_target = table[table.trials == 1000]
    for row in at_target.itertuples():
        aim = TARGET_MS.get(str(row.searcher))
        if aim is not None:
            verdict = "met" if float(str(row.ms_per_trial)) < aim else "MISSED"
            print(
                f"{row.searcher}, {row.workers} workers: {row.ms_per_trial:.1f} ms at 1000 trials, aim {aim:.0f}: {verdict}"
            )
    if chosen.csv:
        table.to_csv(chosen.csv, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
