"""How far a search scales: to how many workers, trials and pending proposals, and at what price.

    python -m benchmarks.scaling [--quick] [--parts saturation pending ...] [--searchers random tpe] [--out FILE.csv]

    saturation   with how many workers the driver is too slow to keep them busy
    pending      how much worse proposals get when up to 1,000 trials have no result yet, against random search
    stopping     epochs spent and best result with asha and median, against none at equal epochs
    engines      real processes: trivial trials per second, and the wall time of sleeping trials, Ray against local
    growth       milliseconds, memory and bytes per trial as one run grows (`--trials`)

Trainings are invented and simulated on a virtual clock (`nas.simulate`), except in `engines`; loop, store and searchers are the
real ones. What searchers find holds for the invented function. `--out` writes a table per part, FILE_<part>.csv, and FILE.png.
All of it takes some hours, mostly of tpe with 2,000 trials in `pending`; --quick some five minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks import scaling_engines, scaling_simulated
from nas.errors import NasError
from nas.searchers import SEARCHERS

PARTS = ("saturation", "pending", "stopping", "engines", "growth")
DEFAULT_SEARCHERS = ("random", "tpe", "nsga2", "regularized_evolution")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="fewer workers, trials and seeds")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    p.add_argument(
        "--searchers",
        nargs="+",
        choices=sorted(set(SEARCHERS) - {"dense"}),
        default=list(DEFAULT_SEARCHERS),
        help="of pending and stopping (random is always among them), and of saturation if given; default %(default)s",
    )
    p.add_argument("--seeds", type=int, default=5, help="of pending and stopping, default %(default)s")
    p.add_argument("--trials", type=int, help="of growth; default 10000, 3000 with --quick")
    p.add_argument("--trial-seconds", type=float, default=2.0, help="of the trials of engines, default %(default)s")
    p.add_argument("--executors", nargs="+", default=["local", "ray"], help="of engines, default %(default)s")
    p.add_argument("--out", type=Path, metavar="FILE.csv", help="write FILE_<part>.csv and FILE.png")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 if the cost of a trial grew with their number, or 2 for wrong arguments."""
    p = parser()
    chosen = p.parse_args(arguments)
    if chosen.seeds < 1 or chosen.trial_seconds < 0 or (chosen.trials is not None and chosen.trials < 2):
        p.error("expected --seeds >= 1, --trials >= 2 and --trial-seconds >= 0")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load average {load:.1f} before the start")
    try:
        tables, flat = measure(chosen)
    except NasError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.out:
        stem = chosen.out.with_suffix("")
        for name, table in tables.items():
            table.to_csv(f"{stem}_{name}.csv", index=False, float_format="%.6g")
        draw(tables, Path(f"{stem}.png"))
    return 0 if flat else 1


def measure(chosen: argparse.Namespace) -> tuple[dict[str, pd.DataFrame], bool]:
    """Every part that was asked for, printed; the tables by name, and whether growth was flat."""
    quick, tables, flat = chosen.quick, dict[str, pd.DataFrame](), True
    counts: tuple[int, ...]
    others = [name for name in chosen.searchers if name != "random"]
    everyone = ["random", *others]
    if "saturation" in chosen.parts:
        counts = (1, 10, 100, 1000, 10_000)
        names = ["random"] if chosen.searchers == list(DEFAULT_SEARCHERS) else chosen.searchers
        table = scaling_simulated.saturation(counts, names, 1000 if quick else 20_000, _say)
        show(tables, "saturation", table, table)
    if "pending" in chosen.parts:
        counts, trials = ((1, 10, 100), 300) if quick else ((1, 10, 100, 1000), 2000)
        table = scaling_simulated.pending(counts, everyone, trials, chosen.seeds, _say)
        show(tables, "pending", table, scaling_simulated.pending_summary(table))
    if "stopping" in chosen.parts:
        trials = 150 if quick else 500
        table = scaling_simulated.stopping(everyone[:2], trials, chosen.seeds, 10, _say)
        show(tables, "stopping", table, scaling_simulated.stopping_summary(table))
    if "engines" in chosen.parts:
        jobs, blocks, trivial = (8, 2, 100) if quick else (40, 4, 500)
        table = scaling_engines.compare(chosen.executors, (1, 2), jobs, blocks, chosen.trial_seconds, trivial, _say)
        show(tables, "engines", table, table)
    if "growth" in chosen.parts:
        trials = chosen.trials or (3000 if quick else 10_000)
        table, reading = scaling_simulated.growth(trials, 100, max(1, min(1000, trials // 2)), _say)
        show(tables, "growth", table, table)
        flat, ratios = scaling_simulated.growth_is_flat(table)
        print(
            f"reading {trials} trials at the end: {reading['read_s']:.2f} s, their frame: {reading['frame_s']:.2f} s, "
            f"{reading['rss_mb']:.0f} MB; the last mark costs {ratios[-1]:.2f} x the median: {'flat' if flat else 'GROWS'}"
        )
    return tables, flat


def show(tables: dict[str, pd.DataFrame], name: str, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Keep a table and print what it comes to."""
    tables[name] = table
    print(f"\n{name}\n{summary.to_string(index=False, float_format=lambda value: f'{value:.4g}')}", flush=True)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel per part that has a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [name for name in ("saturation", "pending", "stopping", "growth") if name in tables]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for name, axis in zip(panels, axes[0], strict=True):
        table = tables[name]
        if name == "saturation":
            for (searcher, duration), part in table.groupby(["searcher", "duration_s"], sort=False):
                axis.plot(part["workers"], part["bound"], marker="o", label=f"{searcher}, {duration} s")
            axis.set(xscale="log", xlabel="workers", ylabel="share of their time one driver keeps busy")
        elif name == "pending":
            summary = scaling_simulated.pending_summary(table)
            for searcher, part in summary.groupby("searcher", sort=False):
                axis.errorbar(part["workers"], part["over_random"], part["over_random_std"], marker="o", label=searcher)
            axis.set(xscale="log", xlabel="workers", ylabel="hypervolume over random search's")
        elif name == "stopping":
            for (searcher, rule), part in table.groupby(["searcher", "rule"], sort=False):
                axis.scatter(part["epochs_share"], part["best_accuracy"], label=f"{searcher}, {rule}")
            axis.set(xlabel="epochs, share of no rule's", ylabel="best accuracy")
        else:
            axis.plot(table["trials"], table["cpu_ms_per_trial"], marker="o", label="processor time")
            axis.set(xlabel="trials", ylabel="driver, ms per trial", ylim=(0, None))
        axis.legend(fontsize="small")
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _say(text: str) -> None:
    print("  " + text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
