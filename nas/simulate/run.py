"""`simulate`: a whole search, with the real loop, store and searchers, on an engine that only pretends to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas.errors import ConfigError, RunError
from nas.frames import complete, numbers, trials_frame
from nas.loop import SearchLoop
from nas.pareto import hypervolume, normalise_directions
from nas.searchers import Searcher, fitted_options, is_oneshot, make_searcher
from nas.simulate.clock import SECOND
from nas.simulate.cluster import Faults, Group
from nas.simulate.engine import SimulatedExecutor, Stay
from nas.simulate.table import Table
from nas.stopping import StoppingRule
from nas.store import Store, Trial
from search_spaces.space import Space

OBJECTIVES = {"val_accuracy": "max", "latency_ms": "min"}


class Watch:
    """Stands where the progress display does: takes the real time of every final state, and keeps what is said."""

    def __init__(self) -> None:
        self.finished_s: list[float] = []
        self.messages: list[str] = []

    def already(self, trials: Iterable[Trial]) -> None: ...

    def trial_started(self, trial: Trial) -> None: ...

    def trial_progress(self, trial: Trial, info: dict[str, Any]) -> None: ...

    def trial_finished(self, trial: Trial) -> None:
        self.finished_s.append(time.perf_counter())

    def workers(self, busy: int, capacity: int) -> None: ...
    def trial_lost(self, trial: Trial) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


@dataclass(frozen=True)
class Simulation:
    """What a simulated search did.

    Attributes:
        frame: `nas.frames.trials_frame`, and per trial start_s (its first job), end_s (its last), busy_s (all of them), jobs, and
            epochs_trained, repeated ones included; virtual seconds. Missing for copies, which need no job.
        objectives: metric -> direction.
        stays: every job: trial, attempt, worker, start, end (virtual ns), ending, epochs.
        makespan_s: virtual seconds until the last job ended.
        utilisation: share of the workers' time in which they held a job.
        driver_s: real seconds that the loop took, all in all.
        driver_cpu_s: of these, processor time of this process.
        finished_s: real time of every final state since the start, seconds.
        messages: what the loop said.
    """

    frame: pd.DataFrame
    objectives: dict[str, str]
    stays: list[Stay]
    makespan_s: float
    utilisation: float
    driver_s: float
    driver_cpu_s: float
    finished_s: list[float]
    messages: list[str]

    @property
    def epochs_trained(self) -> int:
        """Epochs of all jobs, lost ones included: what the search cost."""
        return sum(stay.epochs for stay in self.stays)

    def best_over_time(self, metric: str | None = None) -> pd.DataFrame:
        """Columns time_s (virtual) and the best feasible value of a metric so far; default: of the first objective."""
        metric = metric or next(iter(self.objectives))
        if metric not in self.frame:
            raise ConfigError(
                f"expected a metric of this simulation, got {metric!r}; columns: {', '.join(map(str, self.frame))}"
            )
        rows = self._ended()
        best = np.maximum if self.objectives.get(metric, "max") == "max" else np.minimum
        return pd.DataFrame({"time_s": numbers(rows, "end_s"), metric: best.accumulate(numbers(rows, metric))})

    def hypervolume_over_time(self, reference: Sequence[float], points: int = 200) -> pd.DataFrame:
        """Columns time_s (virtual) and hypervolume of what was complete by then, in the product of the objectives' units.

        Args:
            reference: a point worse than anything of interest, in the order of the objectives.
            points: moments at most, evenly spaced over the trials.
        """
        rows = self._ended()
        values = np.column_stack([numbers(rows, name) for name in self.objectives])
        steps = np.unique(np.linspace(1, len(rows), min(len(rows), points)).round().astype(np.int64))
        volumes = [hypervolume(values[:k], reference, self.objectives) for k in steps]
        return pd.DataFrame({"time_s": numbers(rows, "end_s")[steps - 1], "hypervolume": volumes})

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Of all complete trials; see `hypervolume_over_time`."""
        rows = complete(self.frame, self.objectives)
        return hypervolume(np.column_stack([numbers(rows, n) for n in self.objectives]), reference, self.objectives)

    def _ended(self) -> pd.DataFrame:
        rows = complete(self.frame, self.objectives)
        return rows[rows["end_s"].notna()].sort_values(["end_s", "trial"], kind="stable")


def simulate(
    space: Space,
    table: Table,
    searchers: Sequence[str] | Mapping[str, Searcher],
    trials: int,
    workers: int | Sequence[Group] = 1,
    stopping: StoppingRule | None = None,
    *,
    objectives: Mapping[str, str] = OBJECTIVES,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    faults: Faults | None = None,
    seed: int = 0,
    store: str | Path = ":memory:",
    progress: bool = False,
    start_s: float = 0.0,
    charge_driver: bool = False,
    on_finished: Callable[[Trial], None] = lambda trial: None,
) -> Simulation:
    """Search as `nas.search` does, with trainings replayed from a table on a virtual clock.

    The same arguments give the same history, unless the driver's time is charged.

    Args:
        space: what is searched.
        table: what a training of an architecture would have given.
        searchers: names, or name -> searcher. One-shot searchers cannot be simulated.
        trials: per searcher.
        workers: how many, or groups that join and leave.
        stopping: a rule, e.g. `nas.stopping.make_rule(nas.config.StoppingSection("asha"), table.epochs, seed)`; None: every
            training goes to its end.
        objectives: metric -> "max" or "min"; metrics of the table.
        options: of the searchers, by name; what is not given is fitted to `trials`.
        faults: stragglers, lost and failed trainings.
        seed: of searchers, trainings and faults.
        store: where the run's database is made; default in memory.
        progress: an event after every epoch, as real trainings send them.
        start_s: virtual seconds that every job takes before it trains.
        charge_driver: let the virtual clock run while the loop is at work (see `SimulatedExecutor`).
        on_finished: called after every final state.

    Raises:
        RunError: all workers left before the search was done.
        ConfigError, UnknownName: an argument is wrong.
    """
    if isinstance(searchers, str):
        searchers = [searchers]
    if isinstance(searchers, Mapping):
        chosen = dict(searchers)
    else:
        given = dict(options or {})
        for name in filter(is_oneshot, searchers):
            raise ConfigError(
                f"searcher {name} trains a supernet, of which a table knows nothing; it cannot be simulated"
            )
        chosen = {
            name: make_searcher(name, space, objectives, seed, {**fitted_options(name, trials), **given.get(name, {})})
            for name in searchers
        }
    normalise_directions(objectives)
    if not chosen or trials < 1:
        raise ConfigError(
            f"expected at least one searcher and one trial, got {len(chosen)} searchers and {trials} trials"
        )
    watch = Watch()
    with Store.create(store) as database:
        began, cpu = time.perf_counter(), time.process_time()
        with SimulatedExecutor(
            table,
            workers,
            faults=faults,
            seed=seed,
            progress=progress,
            start_s=start_s,
            charge_driver=charge_driver,
        ) as executor:
            loop = SearchLoop(
                database,
                chosen,
                dict.fromkeys(chosen, trials),
                executor,
                objectives=objectives,
                seed=seed,
                epochs=table.epochs,
                progress=watch,
                stopping=stopping,
                on_finished=on_finished,
            )
            loop.run()
        driver_s, driver_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        done = database.trials()
    left = [trial.trial for trial in done if not trial.finished]
    if left:
        raise RunError(
            f"the simulation ended with {len(left)} trials open (the first is {left[0]}) and {executor.capacity} workers: "
            "let a group of workers stay, or another join"
        )
    return Simulation(
        _with_times(trials_frame(done), executor.stays),
        dict(objectives),
        executor.stays,
        executor.makespan_s,
        executor.utilisation,
        driver_s,
        driver_cpu_s,
        [moment - began for moment in watch.finished_s],
        watch.messages,
    )


def _with_times(frame: pd.DataFrame, stays: Sequence[Stay]) -> pd.DataFrame:
    start, end, busy, jobs, epochs = (dict[int, int]() for _ in range(5))
    for stay in stays:
        number = stay.trial
        start.setdefault(number, stay.start)
        end[number] = stay.end
        busy[number] = busy.get(number, 0) + stay.end - stay.start
        jobs[number] = jobs.get(number, 0) + 1
        epochs[number] = epochs.get(number, 0) + stay.epochs
    numbered = frame["trial"].tolist()
    columns: dict[str, Any] = {}
    for name, found in (("start_s", start), ("end_s", end), ("busy_s", busy)):
        columns[name] = pd.array([found[n] / SECOND if n in found else None for n in numbered], dtype="Float64")
    for name, found in (("jobs", jobs), ("epochs_trained", epochs)):
        columns[name] = pd.array([found.get(n) for n in numbered], dtype="Int64")
    return pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)
