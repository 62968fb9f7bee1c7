"""Parts of `benchmarks.scaling` that need no processes: simulated trainings through the real loop, store and searchers."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nas.config import StoppingSection
from nas.frames import complete, numbers, trials_frame
from nas.simulate import Simulation, SyntheticTable, decisions_space, simulate
from nas.simulate.run import OBJECTIVES
from nas.stopping import make_rule
from nas.store import Store, Trial
from search_spaces import Space, get_space

Say = Callable[[str], None]
DURATIONS_S = (1, 10, 100)
REFERENCE = (0.1, math.exp(0.6 * 3))
"""Worse than what is of interest: accuracy by chance, and a latency three standard deviations above the mean, ms."""
ROUNDS = 5
"""Jobs per worker where the driver's time is charged; the share of the last, unfinished round falls with it."""


def convnet() -> Space:
    """The space that costs of the driver are measured on: drawing from it costs what drawing costs."""
    return get_space("convnet", input_shape=(3, 32, 32), classes=10)


def saturation(workers: Sequence[int], searchers: Sequence[str], most_trials: int, say: Say) -> pd.DataFrame:
    """Real milliseconds of the driver per trial with so many pending, and what share of the workers' time they leave.

    Columns: searcher, workers, trials, driver_ms (wall, per trial: proposal, store, loop), driver_cpu_ms (its processor time),
    duration_s (virtual, per trial), bound (the utilisation that a driver with a core of its own can keep up: duration / (workers x
    driver_cpu), 1 at most), and simulated (the utilisation with that time charged to the virtual clock over `ROUNDS` jobs per
    worker, ramp-up and end included; missing where that is more than `most_trials`).
    """
    space = convnet()
    rows = []
    for searcher in searchers:
        for count in workers:
            trials = min(most_trials, max(200, 2 * count))
            found = _search(space, SyntheticTable(space, epochs=1), [searcher], trials, count)
            driver_s = found.driver_cpu_s / trials
            for duration_s in DURATIONS_S:
                used = math.nan
                if ROUNDS * count <= most_trials:
                    table = SyntheticTable(space, epochs=1, seconds=duration_s)
                    charged = _search(space, table, [searcher], ROUNDS * count, count, charge_driver=True)
                    used = charged.utilisation
                rows.append(
                    {
                        "searcher": searcher,
                        "workers": count,
                        "trials": trials,
                        "driver_ms": 1e3 * found.driver_s / trials,
                        "driver_cpu_ms": 1e3 * driver_s,
                        "duration_s": duration_s,
                        "bound": min(1.0, duration_s / (count * driver_s)),
                        "simulated": used,
                    }
                )
            say(f"saturation: {searcher}, {count} workers: {1e3 * driver_s:.2f} ms of CPU per trial")
    return pd.DataFrame(rows)


def pending(workers: Sequence[int], searchers: Sequence[str], trials: int, seeds: int, say: Say) -> pd.DataFrame:
    """What searchers find with so many trials pending, after the same number of trials.

    Every seed is a world and a search of its own; durations vary (spread 0.3). Columns: searcher, workers, seed, trials,
    hypervolume (accuracy x ms, reference `REFERENCE`), over_random (over that of random search of the same seed, which does not
    depend on workers), best_accuracy.
    """
    space = decisions_space()
    rows = []
    for seed in range(seeds):
        table = SyntheticTable(space, epochs=1, spread=0.3, noise=0.0, seed=seed)
        random = simulate(space, table, ["random"], trials, 1, seed=seed).hypervolume(REFERENCE)
        for searcher in searchers:
            for count in workers if searcher != "random" else workers[:1]:
                found = simulate(space, table, [searcher], trials, count, seed=seed)
                volume = found.hypervolume(REFERENCE)
                rows.append(
                    {
                        "searcher": searcher,
                        "workers": count,
                        "seed": seed,
                        "trials": trials,
                        "hypervolume": volume,
                        "over_random": volume / random,
                        "best_accuracy": float(numbers(found.frame, "val_accuracy").max()),
                    }
                )
        say(f"pending: seed {seed} of {seeds}")
    return pd.DataFrame(rows)


def pending_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of `over_random` and of the accuracy, and n."""
    grouped = frame.groupby(["searcher", "workers"], sort=False)
    return grouped.agg(
        n=("seed", "count"),
        over_random=("over_random", "mean"),
        over_random_std=("over_random", "std"),
        best_accuracy=("best_accuracy", "mean"),
        best_accuracy_std=("best_accuracy", "std"),
    ).reset_index()


def stopping(searchers: Sequence[str], trials: int, seeds: int, workers: int, say: Say) -> pd.DataFrame:
    """What stopping rules save, and what they lose.

    Trainings of 27 epochs; asha with reduction 3 from epoch 1, median from epoch 3 every 3 epochs. Columns: searcher, rule, seed,
    trials, epochs (all that were trained), epochs_share (of none), best_accuracy (of trials trained to the end),
    best_for_these_epochs (what the same search without a rule had found when it had spent as many), makespan_s.
    """
    epochs, space = 27, decisions_space()
    sections = {
        "none": StoppingSection(),
        "asha": StoppingSection("asha", min_epochs=1, reduction=3.0),
        "median": StoppingSection("median", min_epochs=3, interval=3),
    }
    rows = []
    for seed in range(seeds):
        table = SyntheticTable(space, epochs=epochs, seconds=epochs, spread=0.3, seed=seed)
        for searcher in searchers:
            whole: Simulation | None = None
            for rule, section in sections.items():
                found = simulate(
                    space,
                    table,
                    [searcher],
                    trials,
                    workers,
                    make_rule(section, epochs, seed),
                    objectives={"val_accuracy": "max"},
                    seed=seed,
                )
                whole = found if whole is None else whole
                so_far = whole.best_over_time()["val_accuracy"].to_numpy()
                affordable = max(1, found.epochs_trained // epochs)
                rows.append(
                    {
                        "searcher": searcher,
                        "rule": rule,
                        "seed": seed,
                        "trials": trials,
                        "epochs": found.epochs_trained,
                        "epochs_share": found.epochs_trained / whole.epochs_trained,
                        "best_accuracy": float(numbers(complete(found.frame), "val_accuracy").max()),
                        "best_for_these_epochs": float(so_far[min(affordable, len(so_far)) - 1]),
                        "makespan_s": found.makespan_s,
                    }
                )
        say(f"stopping: seed {seed} of {seeds}")
    return pd.DataFrame(rows)


def stopping_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the mean and standard deviation of the gain over no rule at equal epochs."""
    frame = frame.assign(gain=frame["best_accuracy"] - frame["best_for_these_epochs"])
    return (
        frame.groupby(["searcher", "rule"], sort=False)
        .agg(
            n=("seed", "count"),
            epochs_share=("epochs_share", "mean"),
            best_accuracy=("best_accuracy", "mean"),
            best_accuracy_std=("best_accuracy", "std"),
            best_for_these_epochs=("best_for_these_epochs", "mean"),
            gain=("gain", "mean"),
            gain_std=("gain", "std"),
        )
        .reset_index()
    )


def growth(trials: int, workers: int, every: int, say: Say) -> tuple[pd.DataFrame, dict[str, float]]:
    """One run with a database file, random search on convnet, 9 epochs per trial: what a trial costs as the run grows.

    Returns:
        Columns trials, ms_per_trial (wall, over the last `every`), cpu_ms_per_trial (processor time of it), rss_mb (of this
        process, 1e6 bytes), db_bytes_per_trial (file and write-ahead log over all trials); and of reading it all at the end:
        read_s, frame_s, rss_mb.
    """
    space = convnet()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        state = {"count": 0, "moment": time.perf_counter(), "cpu": time.process_time()}

        def finished(_: Trial) -> None:
            state["count"] += 1
            if state["count"] % every:
                return
            now, cpu = time.perf_counter(), time.process_time()
            size = sum(file.stat().st_size for file in Path(folder).glob("run.db*"))
            rows.append(
                {
                    "trials": state["count"],
                    "ms_per_trial": 1e3 * (now - state["moment"]) / every,
                    "cpu_ms_per_trial": 1e3 * (cpu - state["cpu"]) / every,
                    "rss_mb": rss_mb(),
                    "db_bytes_per_trial": size / state["count"],
                }
            )
            say(f"growth: {state['count']} trials, {rows[-1]['cpu_ms_per_trial']:.2f} ms of CPU per trial")
            state.update({"moment": time.perf_counter(), "cpu": time.process_time()})

        simulate(
            space, SyntheticTable(space, spread=0.3), ["random"], trials, workers, store=path, on_finished=finished
        )
        began = time.perf_counter()
        with Store.open(path, read_only=True) as store:
            done = store.trials()
        read = time.perf_counter()
        trials_frame(done)
        reading = {"read_s": read - began, "frame_s": time.perf_counter() - read, "rss_mb": rss_mb()}
    return pd.DataFrame(rows), reading


def rss_mb() -> float:
    """Memory this process holds now, in 1e6 bytes; the most it ever held where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _search(
    space: Space, table: SyntheticTable, searchers: list[str], trials: int, workers: int, *, charge_driver: bool = False
) -> Simulation:
    """With a database file, as a real search has it."""
    with tempfile.TemporaryDirectory() as folder:
        return simulate(
            space,
            table,
            searchers,
            trials,
            workers,
            objectives=OBJECTIVES,
            store=Path(folder) / "run.db",
            charge_driver=charge_driver,
        )


def growth_is_flat(frame: pd.DataFrame, factor: float = 1.5) -> tuple[bool, np.ndarray]:
    """Whether the last mark costs at most `factor` times the median of the marks, in processor time; and those ratios."""
    values = frame["cpu_ms_per_trial"].to_numpy()
    ratios = values / np.median(values)
    return bool(ratios[-1] <= factor), ratios
