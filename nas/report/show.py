"""One trial on the screen and in a file: what `nas show` prints and draws. Start with `print_trial` and `save_drawing`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from nas.errors import ConfigError, NasError, RunError
from nas.report.drawing import draw_network
from nas.report.plans import Operation, read_plan
from nas.report.sheet import Column, Sheet, print_sheet
from nas.report.tables import layer_sheet
from nas.report.tree import network_tree
from nas.report.units import interval, label, missing, show

_FACTS = ("val_accuracy", "test_accuracy", "params", "nnz", "density", "weight_bytes", "dense_macs", "macs")
_LATENCY = ("latency_ms", "latency_lo_ms", "latency_hi_ms", "latency_source", "latency_quality")


def print_trial(run: Any, trial: int, console: Console | None = None) -> None:
    """Print a trial: its numbers, its decisions, its network as a tree and layer by layer, and why it failed if it did.

    Args:
        run: `nas.run.Run`.
        trial: row number.
        console: where to; default standard output.

    Raises:
        RunError: there is no such trial.
    """
    console = console or Console()
    found = run.trial(trial)
    print_sheet(trial_sheet(found), console)
    decisions = tuple((name, str(value)) for name, value in found.architecture.as_dict().items())
    title = f"Architecture {found.digest} of space {found.architecture.space}"
    console.print()
    print_sheet(Sheet(title, (Column("decision"), Column("value")), decisions), console)
    plan = _plan(run, trial)
    if plan is not None:
        console.print()
        print_tree(network_tree(plan, "What is executed, and the share of each"), console)
        console.print()
        print_sheet(layer_sheet(plan), console)
    if found.error:
        console.print()
        console.print(Text("Why it failed", style="bold"))
        console.print(Text(found.error), soft_wrap=True)


def print_tree(tree: Tree, console: Console) -> None:
    """Print a tree: folded to the width of a terminal, in full where a program reads."""
    if console.is_terminal:
        console.print(tree)
        return
    wide = Console(file=io.StringIO(), width=1000)
    wide.print(tree)
    text = wide.file.getvalue()  # type: ignore[attr-defined]
    console.file.write("".join(line.rstrip() + "\n" for line in text.splitlines()))


def trial_sheet(trial: Any) -> Sheet:
    """The numbers of a trial (`nas.store.Trial`), one per row."""
    rows = [("state", str(trial.state)), ("searcher", f"{trial.searcher}, its proposal {trial.index}")]
    rows.append(("seed, epochs, attempts", f"{trial.seed}, {trial.epochs}, {trial.attempts}"))
    rows += oneshot_rows(trial)
    if trial.copy_of is not None:
        rows.append(("copy of", f"trial {trial.copy_of}: the same network, not trained again"))
    metrics = trial.metrics
    if not missing(metrics.get("latency_ms")):
        how = [str(metrics[name]) for name in ("latency_source", "latency_quality") if not missing(metrics.get(name))]
        text = interval(*(metrics.get(name) for name in _LATENCY[:3]))
        rows.append((label("latency_ms"), text + (f" ({', '.join(how)})" if how else "")))
    others = [name for name in metrics if name not in _FACTS and name not in _LATENCY]
    rows += [(label(name), show(name, metrics[name])) for name in (*_FACTS, *others) if not missing(metrics.get(name))]
    if trial.duration_s is not None:
        rows.append((label("duration_s"), show("duration_s", trial.duration_s)))
    for name, amount in trial.violations.items():
        if amount > 0:
            rows.append((f"limit on {label(name)}", f"broken by {amount:.1%} of the limit"))
    return Sheet(f"Trial {trial.trial}", (Column("what"), Column("value")), tuple(rows))


def oneshot_rows(trial: Any) -> list[tuple[str, str]]:
    """Where a trial of a one-shot search, or a control of one, comes from; [] for others."""
    note: Mapping[str, Any] = trial.sampler or {}
    if "replicate" not in note:
        return []
    replicate = note["replicate"]
    if "control_of" in note:
        searched = f"{note['control_of']}-s{replicate}, its architecture {note.get('found_index', '?')}"
        wanted = f", at {note['kept_wanted']:,} kept weights" if isinstance(note.get("kept_wanted"), int) else ""
        return [("control of", searched + wanted)]
    rows = [("found by", f"search {trial.searcher}-s{replicate} of replicate {replicate}, seed {trial.seed}")]
    known = ("replicate", "genotype", "group", "initial")
    said = [f"{key} {_plain(value)}" for key, value in note.items() if key not in known and _plain(value)]
    if said:
        rows.append(("what the search says", ", ".join(said)))
    if note.get("genotype"):
        rows.append(("genotype", str(note["genotype"])))
    return rows


def _plain(value: Any) -> str:
    """A number or a word; nothing for what has parts."""
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save_drawing(run: Any, trial: int, path: str | Path) -> Path:
    """Draw a trial's network into an .svg, .png or .pdf file.

    Raises:
        ConfigError: another suffix.
        RunError: there is no such trial, it has no plan or a damaged one, or the file cannot be written.
    """
    try:
        plan = read_plan(run.plan_frame(trial))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"trial {trial}: its plan.csv is damaged ({error}); restore it from a copy of the run"
        ) from error
    canvas = draw_network(plan)
    try:
        return canvas.save(path, f"{run.name}, trial {trial}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise RunError(f"{path}: the drawing cannot be written: {error.strerror or error}") from error


def _plan(run: Any, trial: int) -> list[Operation] | None:
    try:
        return read_plan(run.plan_frame(trial))
    except (NasError, OSError, ValueError, TypeError):
        return None  # never measured, or its files are gone: the rest can still be said
