"""The command line: `nas search`, and commands that look at what a search left.

Errors about input are one line on standard error and exit code 2; an interrupt is 130. Heavy imports happen inside commands, so
that help is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas import commands_watch
from nas.commands_hw import add_commands
from nas.commands_worker import add_worker
from nas.errors import NasError, RunError

if TYPE_CHECKING:
    from nas.run import Run

EPILOG = """examples:
  nas search runs/configs/quickstart.toml
  nas search runs/configs/quickstart.toml --set search.trials=40 --set train.epochs=20 --out runs/longer --workers 4
  nas pareto runs/quickstart --plot front.png
  nas export runs/quickstart 12 --to exported/
  nas calibrate --budget 300 --space runs/configs/quickstart.toml
  nas profile runs/quickstart 12 --plot profile.svg
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal or pipe cannot show (C locale, odd names) is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
        sys.stdout.flush()
    except NasError as error:
        print(f"nas: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nas: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nas",
        description="Search sparse networks: architecture, sparsity level and pattern together, priced by measured latency.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sub = add("search", _search, "Run a search, or continue one that was stopped: the same command goes on.")
    sub.add_argument("config", metavar="CONFIG", help="run file (TOML)")
    sub.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, e.g. train.epochs=20; repeatable",
    )
    sub.add_argument("--out", metavar="DIR", help="the run's folder; default runs/<name>")
    sub.add_argument(
        "--workers",
        metavar="N",
        type=int,
        help="processes that train, 0 trains in this one; on a cluster the most trials at a time, 0 for all there is room for",
    )
    sub.add_argument(
        "--executor",
        metavar="NAME",
        help="what runs the trials: local (processes), inline (this one), ray, tune, workers (see nas worker) or nni",
    )
    sub.add_argument("--address", metavar="ADDR", help="of the Ray cluster: auto, HOST:6379 or ray://HOST:10001")
    _storage_argument(sub)
    sub.add_argument(
        "--standby",
        action="store_true",
        help="if another driver has the run, wait until it ends or dies, then take over",
    )
    sub.add_argument("--quiet", action="store_true", help="no progress, only the result")

    add("config", _config, "Print every key of a run file with its meaning and default: a run file to start from.")

    sub = add(
        "results", _results, "Every trial of a run as a table, failed and infeasible ones too; also while it runs."
    )
    _run_argument(sub)
    sub.add_argument(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="table for people, csv or json with everything",
    )
    sub.add_argument("--limit", metavar="N", type=_positive, help="only the last N rows (of the table)")
    sub.add_argument("--watch", action="store_true", help="show the table again and again until the run is finished")

    sub = add("pareto", _pareto, "The non-dominated networks of a run, as a table and as a picture.")
    _run_argument(sub)
    sub.add_argument("--x", metavar="COLUMN", help="cost on the x axis; default the run's second objective")
    sub.add_argument("--y", metavar="COLUMN", help="metric on the y axis; default the run's first objective")
    sub.add_argument("--plot", metavar="FILE", help="also draw it: .png or .svg")
    sub.add_argument("--format", choices=("table", "csv", "json"), default="table", help="as for results")

    sub = add("show", _show, "One trial: its decisions, the network as a drawing, and a per-layer table.")
    _run_argument(sub)
    _trial_argument(sub)
    sub.add_argument("--plot", metavar="FILE", help="also draw the network: .svg or .png")

    sub = add("report", _report, "Write one self-contained HTML page about a run.")
    _run_argument(sub)
    sub.add_argument("--to", metavar="FILE", help="default RUN/report.html")

    sub = add(
        "export", _export, "Export a trial's network as plain PyTorch source, safetensors, ONNX and torch.export."
    )
    _run_argument(sub)
    _trial_argument(sub)
    sub.add_argument("--to", metavar="DIR", required=True, help="folder to write")
    add_commands(add)
    add_worker(add)
    commands_watch.add_commands(add)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return int(text)


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, e.g. runs/quickstart")


def _trial_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trial", metavar="TRIAL", type=int, help="number of the trial, as in nas results")


def _storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="PostgreSQL server that holds the run in place of run.db, e.g. postgresql+psycopg://user@host/db; default "
        "NAS_STORAGE; leave the password to ~/.pgpass or PGPASSWORD",
    )


def _load(arguments: argparse.Namespace) -> Run:
    from nas.run import load_run

    return load_run(arguments.run)


def _search(arguments: argparse.Namespace) -> None:
    from nas.config import parse_override
    from nas.driver import search
    from nas.report.comparison import comparison_sheets
    from nas.report.sheet import print_sheet
    from nas.report.tables import last_line, pareto_sheet, searcher_sheet

    overrides = dict(parse_override(text) for text in arguments.set)
    run = search(
        arguments.config,
        overrides=overrides,
        out=arguments.out,
        workers=arguments.workers,
        executor=arguments.executor,
        address=arguments.address,
        storage=arguments.storage,
        standby=arguments.standby,
        quiet=arguments.quiet,
    )
    print()
    print_sheet(pareto_sheet(run.pareto(), run.objectives))
    print()
    print_sheet(searcher_sheet(run.frame(), run.objectives))
    print()
    for compared in comparison_sheets(run):
        print_sheet(compared)
        print()
    for what, file in (
        ("results", "run.db"),
        ("picture of the front", "front.png"),
        ("report", "report.html"),
        ("exported network", "exported"),
    ):
        path = run.folder / file
        if path.exists():
            print(f"{what + ':':22}{path}")
    if not (run.folder / "exported").exists():
        print("nothing was exported" + (": no trial is complete and feasible" if run.pareto().empty else ""))
    print(f"{'every trial:':22}nas results {run.folder}")
    frame = run.frame()
    failed = frame[frame["state"] == "failed"]
    if len(failed) == len(frame):
        first = failed.iloc[0]
        raise RunError(
            f"all {len(failed)} trials failed, the first with: {last_line(first['error'])}. See nas show {run.folder} "
            f"{first['trial']}; after the cure start again in another folder (--out)"
        )


def _config(_: argparse.Namespace) -> None:
    from nas.config_reference import reference

    sys.stdout.write(reference())


def _results(arguments: argparse.Namespace) -> None:
    from nas.report.comparison import comparison_sheets
    from nas.report.sheet import print_sheet
    from nas.report.tables import format_frame, results_sheet

    run = _load(arguments)
    if arguments.watch:
        commands_watch.watch_results(run, arguments.limit)
    elif arguments.format == "table":
        print_sheet(results_sheet(run.frame(), run.objectives, limit=arguments.limit, title=f"{run.name}: all trials"))
        for compared in comparison_sheets(run):
            print()
            print_sheet(compared)
    else:
        sys.stdout.write(format_frame(run.frame(), arguments.format, objectives=run.objectives))


def _pareto(arguments: argparse.Namespace) -> None:
    from nas.report.plots import save_front
    from nas.report.sheet import print_sheet
    from nas.report.tables import format_frame, pareto_sheet

    run = _load(arguments)
    front = run.pareto()
    if arguments.format == "table":
        print_sheet(pareto_sheet(front, run.objectives))
    else:
        sys.stdout.write(format_frame(front, arguments.format, objectives=run.objectives))
    if arguments.plot:
        path = save_front(run, Path(arguments.plot), x=arguments.x, y=arguments.y)
        print(f"picture: {path}", file=sys.stderr)


def _show(arguments: argparse.Namespace) -> None:
    from nas.report.show import print_trial, save_drawing

    run = _load(arguments)
    print_trial(run, arguments.trial)
    if arguments.plot:
        print(f"drawing: {save_drawing(run, arguments.trial, Path(arguments.plot))}")


def _report(arguments: argparse.Namespace) -> None:
    from nas.report.html import write_report

    run = _load(arguments)
    path = Path(arguments.to) if arguments.to else run.folder / "report.html"
    write_report(run, path)
    print(f"report: {path}")


def _export(arguments: argparse.Namespace) -> None:
    run = _load(arguments)
    verification = run.export(arguments.trial, arguments.to)
    print(f"exported trial {arguments.trial} to {arguments.to}")
    for entry in verification["formats"].values():
        difference = entry["largest_relative_difference"]
        print(f"  {entry['file']:14} largest relative difference {difference:.1e}, checked in {entry['checked_in']}")


if __name__ == "__main__":
    sys.exit(main())
