"""How well latencies of sparse networks are predicted on this machine, beside how well they could be at all.

    python -m benchmarks.latency_accuracy [--networks 300] [--budget 300] [--quick] [--out FILE.csv]
    python -m benchmarks.latency_accuracy --search

Builds networks from the shipped spaces, with zeros of mixed patterns and densities from 0.01 to 1 (`benchmarks.latency.networks`),
and measures them in place. Then:

    known shapes       each network is predicted by a model fitted to other architectures that have its shapes
    all left out       the same, whatever the shapes
    unseen shapes      by a model made of `--budget` seconds of calibration on networks of no space
    measured twice     the same kernels twice, interleaved: the noise of a measurement
    speed              predictions per second
    search (--search)  the networks that searches under a latency limit return, measured again

Every figure stands beside its noise ceiling (what a perfect predictor would score against measurements as noisy as these) and its
target. Measurements are kept in `--store`: an interrupted benchmark goes on, and a longer one adds to a shorter one.

300 networks take some quarter of an hour on a quiet machine, and the budget comes on top; --quick some three minutes in all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.kernels import report
from benchmarks.kernels.peak import fma_peak_gflops
from benchmarks.latency import calibrated, noise, predicting, search_check, splits, tables, targets
from benchmarks.latency.frames import observed
from benchmarks.latency.measuring import Chosen, measure_all, plan_all
from benchmarks.latency.networks import SETTINGS, specs
from benchmarks.latency.records import Records
from hw_models.device import runtime_id
from hw_models.measure import Measurer, threads_at
from hw_models.model import LatencyModel
from hw_models.predictor import Predictor
from hw_models.workload import Workload, workload

SPEED_NETWORKS = 20_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--networks", type=int, help="default 300; 48 with --quick")
    p.add_argument("--budget", type=float, help="seconds of calibration; default 300; 60 with --quick; 0 leaves it out")
    p.add_argument("--quick", action="store_true", help="fewer networks, shorter rounds, a smaller budget")
    p.add_argument("--rounds", type=int, help="of a measuring run, at least; default 16; 8 with --quick")
    p.add_argument("--folds", type=int, default=5, help="architectures are left out in so many parts; default 5")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--batch", type=int, default=1, help="inputs per call")
    p.add_argument("--seed", type=int, default=0, help="of the networks")
    p.add_argument(
        "--store", type=Path, default=Path("runs/latency_accuracy"), metavar="FOLDER", help="default %(default)s"
    )
    p.add_argument("--search", action="store_true", help="also check searches under a latency limit")
    p.add_argument(
        "--out", type=Path, metavar="FILE.csv", help="write the figures here, and FILE_networks.csv with every network"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 if a target was missed, or 2 for wrong arguments."""
    p = parser()
    chosen = p.parse_args(arguments)
    count = chosen.networks if chosen.networks is not None else 48 if chosen.quick else 300
    budget = chosen.budget if chosen.budget is not None else 60.0 if chosen.quick else 300.0
    rounds = chosen.rounds if chosen.rounds is not None else 8 if chosen.quick else 16
    if min(chosen.threads, chosen.batch, rounds) < 1 or budget < 0 or chosen.folds < 2:
        p.error("--threads, --batch and --rounds must be at least 1, --folds at least 2, --budget not below 0")
    if count < 2 * len(SETTINGS):
        p.error(f"--networks must be at least {2 * len(SETTINGS)}, two for each of the settings")
    console = Console(width=None if sys.stdout.isatty() else 180)
    runtime = runtime_id(chosen.threads)
    measurer = Measurer(rounds=rounds, cap_rounds=rounds + rounds // 2, threads=chosen.threads)
    with threads_at(chosen.threads), _progress(console) as progress:
        task = progress.add_task("", total=None)

        def say(done: float, total: float, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)

        networks = plan_all(specs(count, chosen.seed), chosen.batch, say)
        records = Records(chosen.store / f"networks_{chosen.seed}.jsonl", runtime, chosen.batch)
        measure_all(networks, records, measurer, progress=say)
        use = Chosen([planned.spec.name for planned in networks], records)
        work = workload([planned.plan for planned in networks], [planned.spec.name for planned in networks])
        kernels = noise.kernels_twice(measurer)
        fold = splits.folds([record.group for record in use.records], chosen.folds)

        def fit(steps: pd.DataFrame, measured: pd.DataFrame) -> LatencyModel:
            return Predictor.fit(steps, measured, runtime=runtime, threads=chosen.threads)

        frames = observed(work, use.records, chosen.threads)
        left_out, fitted = predicting.by_others(work, use.records, frames, fold, fit, say)
        model: Predictor | None = None
        if budget > 0:
            model = calibrated.calibrated(chosen.store, budget, chosen.threads, chosen.batch, say)
        found = None
        if chosen.search:
            found = search_check.returned_again(chosen.store, chosen.threads, say)
    rows, more, unseen = _figures(use, work, kernels, left_out, model, fitted)
    if found is not None:
        more += tables.wide("search", search_check.figures(found))
    facts = _facts(chosen, use, kernels)
    _print(console, facts, rows, more, left_out, unseen, found)
    if chosen.out is not None:
        _write(chosen.out, facts, rows, more, left_out, unseen)
        console.print(f"written: {chosen.out}")
    answers = [*(v for row in rows if row["row"] == "  verdict" for v in row.values()), *(r["verdict"] for r in more)]
    return 1 if "MISSED" in answers else 0


def _figures(
    use: Chosen,
    work: Workload,
    kernels: pd.DataFrame,
    left_out: pd.DataFrame,
    model: Predictor | None,
    fitted: LatencyModel,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], pd.DataFrame | None]:
    """The rows of the table of accuracy, those of other figures, and the predictions of unseen shapes."""
    pairs = use.again if len(use.again) >= 20 else use.halves
    rows = [
        *tables.scored("known shapes", left_out[left_out["known"] >= splits.KNOWN], pairs),
        *tables.scored("all left out", left_out, []),
    ]
    unseen = None
    if model is not None:
        step_ms = [record.step_ms() for record in use.records]
        known = splits.known_share(work, step_ms, set(model.table.curves))
        unseen = predicting.by(model, work, use.records, known)
        rows += tables.scored("unseen shapes", unseen[unseen["known"] <= splits.UNSEEN], pairs)
    more = [
        *tables.wide("measured twice", tables.spread(kernels["off"])),
        *tables.wide("networks twice", tables.spread(noise.twice(use.halves)["off"])),
    ]
    if use.again:
        more += tables.wide("networks again", tables.spread(noise.twice(use.again)["off"]))
    many = predicting.tiled(work, SPEED_NETWORKS)
    speed = {
        "per_second": predicting.per_second(fitted, many),
        "networks": float(len(many)),
        "steps": float(len(many.ids)),
    }
    more += tables.wide("speed", speed)
    return rows, more, unseen


def _facts(chosen: argparse.Namespace, use: Chosen, kernels: pd.DataFrame) -> dict[str, str]:
    """Where and with what the numbers were taken."""
    off = noise.twice(use.halves)["off"].median()
    holds = (
        "the targets hold" if off <= targets.AA_AT_MOST else f"above {targets.AA_AT_MOST:.1%}: no data for the targets"
    )
    facts = report.environment(chosen.threads, fma_peak_gflops(), None)
    del facts["deepsparse"]
    return {
        **facts,
        "batch": str(chosen.batch),
        "networks": f"{len(use.records)}, of {len({record.group for record in use.records})} architectures, seed {chosen.seed}",
        "measuring_runs": f"{use.runs}, of which moved {use.moved}; networks without a good measurement: {len(use.unsettled)}",
        "a_a": f"{off:.2%} typical over the networks; {holds}",
        "ceiling_from": f"{len(use.again)} networks measured again in another run"
        if len(use.again) >= 20
        else "even against odd rounds",
        "folds": str(chosen.folds),
    }


def _print(
    console: Console,
    facts: dict[str, str],
    rows: list[dict[str, Any]],
    more: list[dict[str, Any]],
    left_out: pd.DataFrame,
    unseen: pd.DataFrame | None,
    found: pd.DataFrame | None,
) -> None:
    for key, value in facts.items():
        console.print(f"[dim]{key}: {value}[/]", soft_wrap=True, highlight=False)
    _show(
        console,
        "Accuracy (hit5, hit10: share within 5 and 10 %; errors relative to the measured time)",
        tables.lines(rows),
    )
    _show(console, "Left-out architectures, by the source of the answer", tables.by_source(left_out))
    _show(console, "Left-out architectures, by setting", tables.by_setting(left_out))
    if unseen is not None:
        _show(console, "Calibrated without the spaces, by the source of the answer", tables.by_source(unseen))
        _show(console, "Calibrated without the spaces, by setting", tables.by_setting(unseen))
    if found is not None:
        _show(console, "Networks that searches returned, measured again", found)
    _show(console, "Noise, speed and search", pd.DataFrame(more))


def _write(
    path: Path,
    facts: dict[str, str],
    rows: list[dict[str, Any]],
    more: list[dict[str, Any]],
    left_out: pd.DataFrame,
    unseen: pd.DataFrame | None,
) -> None:
    """The figures, one per line, and beside them every network."""
    figures = tables.flat(rows)
    report.write_csv(pd.DataFrame([*figures, *more]), path, facts)
    frames = [left_out.assign(model="left out")] + ([] if unseen is None else [unseen.assign(model="calibrated")])
    report.write_csv(pd.concat(frames), path.with_name(f"{path.stem}_networks.csv"), facts)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


def _show(console: Console, title: str, table: pd.DataFrame) -> None:
    console.print(f"\n[bold]{title}[/]")
    if table.empty:
        console.print("none")
        return
    with pd.option_context("display.width", 250, "display.max_columns", 60, "display.max_rows", 2000):
        text = table.to_string(index=False, float_format=lambda v: f"{v:.4g}", na_rep="-")
    console.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
