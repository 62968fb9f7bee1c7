"""Our sparse CPU kernels against every open engine: layers in chains, or whole networks.

    python -m benchmarks.cpu_kernels [--quick] [--rows main] [--densities 0.5 0.1] [--threads 2] [--out FILE.csv]
    python -m benchmarks.cpu_kernels --networks [resnet18 mobilenetv2 ...]
    python -m benchmarks.cpu_kernels --install-deepsparse [FOLDER]

Contenders: ours (`--ours`: kernels by name, and "auto", the plan chosen by measurement), torch, torch channels_last, ONNX Runtime,
OpenVINO (pip install 'sparse-nas[bench]'), CSR products of torch and SciPy, and DeepSparse 1.8.0. What is not installed is an
empty column. Every result is asserted equal to the masked torch network before the clock starts. Times are microseconds of one
layer in a chain; see `benchmarks.kernels.protocol` for how they are taken and `benchmarks.kernels.layers` for the rows.

All rows at all densities take some half hour on a quiet machine, --rows main --quick some three minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.kernels import deepsparse, engines, layers, networks, ours, report, run_layers, run_networks
from benchmarks.kernels.peak import fma_peak_gflops
from benchmarks.kernels.protocol import Settings
from hw_models.measure import threads_at

QUICK_DENSITIES = (0.5, 0.3, 0.1, 0.05)
ALL_ENGINES = (*engines.ENGINES, "deepsparse")
INSTALL_DEFAULT = "default"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--rows", default="all", help='layers or families, comma-separated shell patterns; "main" is the 20 layers'
    )
    p.add_argument("--list", action="store_true", help="list the rows and end")
    p.add_argument("--densities", nargs="+", type=float, help="of the masks; default 0.5 to 0.01")
    p.add_argument("--batches", nargs="+", type=int, help="default: 1, and 8 and 64 for linear layers")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, help="at least; at most twice as many")
    p.add_argument("--quick", action="store_true", help="fewer rounds, densities 0.5, 0.3, 0.1, 0.05")
    p.add_argument("--engines", default=",".join(ALL_ENGINES), help="comma-separated; default all")
    p.add_argument("--ours", help="comma-separated kernels, and auto; default all there are")
    p.add_argument(
        "--networks", nargs="*", metavar="NAME", help=f"whole networks: {', '.join(networks.NETWORKS)}; default all"
    )
    p.add_argument("--deepsparse", type=Path, metavar="FOLDER", help="the environment of --install-deepsparse")
    p.add_argument("--install-deepsparse", nargs="?", const=INSTALL_DEFAULT, metavar="FOLDER", help="make it and end")
    p.add_argument("--out", type=Path, help="write the table here, as CSV with the environment in comment lines")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0, or 1 if one of ours failed or computed something wrong, or 2 for wrong arguments."""
    p = parser()
    chosen = p.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if chosen.install_deepsparse:
        given = chosen.install_deepsparse
        folder = deepsparse.default_folder() if given == INSTALL_DEFAULT else Path(given)
        deepsparse.install(folder)
        console.print(f"DeepSparse {deepsparse.VERSION} is in {folder}")
        return 0
    if chosen.list:
        for case in layers.CASES:
            console.print(
                f"{case.name:24} {case.family:18} batches {case.batches}, patterns {', '.join(case.patterns)}"
            )
        return 0
    wanted = chosen.engines.split(",")
    if strange := engines.unknown(wanted, ALL_ENGINES):
        p.error(f"--engines: unknown {', '.join(strange)}; known: {', '.join(ALL_ENGINES)}")
    if min([chosen.threads, *(chosen.batches or [1]), chosen.rounds or 1]) < 1:
        p.error("--threads, --batches and --rounds must be at least 1")
    if any(not 0 < d <= 1 for d in chosen.densities or []):
        p.error(f"--densities must be in (0, 1], got {chosen.densities}")
    known = ours.known_paths()
    paths = chosen.ours.split(",") if chosen.ours else known
    try:
        cases = layers.select(chosen.rows)
    except ValueError as error:
        p.error(str(error))
    if strange := engines.unknown(chosen.networks or [], networks.NETWORKS):
        p.error(f"--networks: unknown {', '.join(strange)}; known: {', '.join(networks.NETWORKS)}")

    usable = []
    for name in wanted:
        folder = chosen.deepsparse or deepsparse.default_folder()
        reason = deepsparse.missing(folder) if name == "deepsparse" else engines.missing(name)
        if reason is None:
            usable.append(name)
        else:
            console.print(f"[yellow]no column {name}:[/] {reason}", soft_wrap=True)
    for name in engines.unknown(paths, known):
        console.print(f"[yellow]empty column {name}:[/] there is no kernel of this name; known: {', '.join(known)}")
    worker = deepsparse.Worker(folder) if "deepsparse" in usable else None
    contenders = run_layers.Contenders(
        [name for name in usable if name != "deepsparse"], paths, worker, threads=chosen.threads
    )
    try:
        with threads_at(chosen.threads):
            peak = fma_peak_gflops()
            facts = report.environment(chosen.threads, peak, deepsparse.VERSION if worker is not None else None)
            for key, value in facts.items():
                console.print(f"[dim]{key}: {value}[/]", soft_wrap=True, highlight=False)
            if chosen.networks is None:
                table = _layers(console, cases, chosen, contenders, peak)
            else:
                table = _networks(console, chosen, contenders)
    finally:
        if worker is not None:
            worker.close()
    if chosen.out is not None:
        report.write_csv(table, chosen.out, facts)
        console.print(f"written: {chosen.out}")
    for problem in contenders.problems:
        console.print(f"[red]{problem.row}: {problem.contender}:[/] {problem.text}", soft_wrap=True, markup=True)
    return 1 if any(problem.contender in paths for problem in contenders.problems) else 0


def settings_of(quick: bool, rounds: int | None, threads: int) -> Settings:
    """How long to measure, from the command line."""
    least = rounds or (4 if quick else 10)
    return Settings(
        rounds=least,
        cap_rounds=2 * least,
        burst_ms=2.0 if quick else 4.0,
        warm_ms=0.5 if quick else 1.0,
        settle_s=0.02 if threads > 1 else 0.0,
    )


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True)


def _layers(
    console: Console, cases: list[layers.Case], chosen: Any, contenders: run_layers.Contenders, peak: float
) -> pd.DataFrame:
    densities = chosen.densities or (QUICK_DENSITIES if chosen.quick else layers.DENSITIES)
    settings = settings_of(chosen.quick, chosen.rounds, chosen.threads)
    total = sum(len(case.pairs(densities)) * len(chosen.batches or case.batches) for case in cases)
    rows: list[dict[str, Any]] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=total)
        measured = run_layers.run(
            cases,
            densities,
            contenders,
            settings,
            batches=chosen.batches,
            progress=lambda text: progress.update(task, description=text),
        )
        for row in measured:
            rows.append(row)
            progress.advance(task)
            _print_row(console, report.with_ratios([row], contenders.paths, peak).iloc[0], contenders)
    frame = report.with_ratios(rows, contenders.paths, peak)
    _show(console, "Geometric means over the main layers", report.geomeans(frame, contenders.paths))
    _show(console, "Geometric means by family, over the best dense engine", report.families(frame, contenders.paths))
    _show(console, "Targets for groups of rows, over the best dense engine", report.groups(frame, contenders.paths))
    path = report.subject(contenders.paths)
    _show(
        console,
        f"Losses of {path}: slower than dense, below a target, or slower than DeepSparse",
        report.losses(frame, path),
    )
    return frame


def _print_row(console: Console, row: Any, contenders: run_layers.Contenders) -> None:
    us = {name: row[f"{name}_us"] for name in [*contenders.dense, *contenders.sparse]}
    times = " ".join(f"{name} {value:.4g}" if value == value else f"{name} -" for name, value in us.items())
    there = [path for path in contenders.paths if us[path] == us[path]]
    ratios = ", ".join(f"{path} {row[f'{path}_x_dense']:.2f}x ({row[f'{path}_peak']:.0%})" for path in there)
    head = f"{row['layer']} {row['pattern']} d={row['density']:g} b={row['batch']}"
    console.print(
        f"[bold]{head}[/] us: {times} | {ratios}{'' if row['confirmed'] else ' ~'}", highlight=False, soft_wrap=True
    )


def _networks(console: Console, chosen: Any, contenders: run_layers.Contenders) -> pd.DataFrame:
    names = chosen.networks or list(networks.NETWORKS)
    densities = chosen.densities or (0.1,)
    settings = settings_of(chosen.quick, chosen.rounds, chosen.threads)
    rows: list[dict[str, Any]] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=len(names) * len(densities))
        measured = run_networks.run(
            names, densities, contenders, settings, progress=lambda text: progress.update(task, description=text)
        )
        for row in measured:
            rows.append(row)
            progress.advance(task)
    frame = run_networks.with_ratios(rows, contenders.paths)
    _show(console, "Whole networks, ms", run_networks.shown(frame, contenders.paths))
    return frame


def _show(console: Console, title: str, table: pd.DataFrame) -> None:
    console.print(f"\n[bold]{title}[/]")
    if table.empty:
        console.print("none")
        return
    with pd.option_context("display.width", 250, "display.max_columns", 60, "display.max_rows", 2000):
        console.print(
            table.to_string(index=False, float_format=lambda v: f"{v:.3g}", na_rep="-"), highlight=False, soft_wrap=True
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main())
