"""The report of a run: one HTML file that needs nothing else. `write_report(run, path)`.

It says what was searched and what was found, shows the front, how the searchers compare, how the networks learn, what their
layers cost, and what failed and why. It works at any moment of a search, with no complete trial and with thousands; what is
too much to show is counted. It only reads the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from nas.errors import NasError, RunError
from nas.frames import ARCH, clean_text, complete
from nas.objectives import parse_constraints
from nas.report import plots
from nas.report.alphas import alphas_section
from nas.report.comparison import comparison_figure, comparison_sheet
from nas.report.drawing import draw_network
from nas.report.graphs import draw_graph, worth_drawing
from nas.report.history import outside_budget, searchers
from nas.report.node_masks import node_masks_sheet
from nas.report.page import facts, figure, fold, key_values, page, paragraphs, pre
from nas.report.plans import Operation, read_plan
from nas.report.sheet import to_html
from nas.report.style import svg_text
from nas.report.tables import front_rows, last_line, layer_sheet, pareto_sheet, results_sheet, searcher_sheet
from nas.report.units import label, missing, show, spread
from nas.report.words import comparison, headline, status

MAX_NETWORKS = 6
MAX_CURVES = 8
MAX_STOPPED_CURVES = 40
MAX_ROWS = 500
MAX_FAILURES = 50


def write_report(run: Any, path: str | Path) -> Path:
    """Write the report of a run.

    Args:
        run: `nas.run.Run`, or anything with the same attributes; read only.
        path: the file; replaced in one step, so a reader never sees half a report.

    Raises:
        RunError: the file cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.touch()  # a place that cannot be written is said before the work
        scratch.write_text(render_report(run), encoding="utf-8")
        os.replace(scratch, target)
    except OSError as error:
        raise RunError(f"{target}: the report cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a folder that cannot be written has nothing to remove
            scratch.unlink(missing_ok=True)
    return target


def render_report(run: Any) -> str:
    """The report as HTML text (see `write_report`)."""
    return _Report(run).render()


class _Report:
    """One report: the run as it stood when the report was begun."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.frame: pd.DataFrame = run.frame()
        self.objectives: dict[str, str] = dict(run.objectives)
        self.constraints: dict[str, str] = dict(run.constraints)
        config = run.config
        self.config: dict[str, Any] = config.as_dict() if hasattr(config, "as_dict") else dict(config)
        self.front = front_rows(self.frame, self.objectives)
        shown = [int(trial) for trial in self.front["trial"]]
        self.networks = [shown[i] for i in spread(len(shown), MAX_NETWORKS)]
        self.plans = {trial: plan for trial in self.networks if (plan := self._plan(trial))}

    def render(self) -> str:
        sections = [
            ("front", "Pareto front", self._front()),
            ("searchers", "Searchers side by side", self._searchers()),
            ("oneshot", "One-shot searches and controls", self._oneshot()),
            ("supernets", "How supernets chose", alphas_section(self.run)),
            ("learning", "Learning curves", self._curves()),
            ("networks", "Networks of the front", self._networks()),
            ("trials", "All trials", self._trials()),
            ("failures", "Failed trials", self._failures()),
            ("setting", "Config and environment", self._setting()),
        ]
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        foot = f"<p>Written {now}. Counts are exact; latencies are of the machine named above unless a table says otherwise.</p>"
        return page(f"{self.run.name}: sparse architecture search", self._head(), sections, foot)

    # -- sections -------------------------------------------------------------------------------------------------------

    def _head(self) -> str:
        search, space = self.config.get("search", {}), self.config.get("space", {})
        data = self.run.meta("data") or {}
        goals = [f"{label(name)} ({'max' if way == 'max' else 'min'}imised)" for name, way in self.objectives.items()]
        limits = [f"{label(name)} {text}" for name, text in self.constraints.items()]
        what = f"Space {space.get('name', '?')} on {data.get('name', self.config.get('data', {}).get('name', '?'))}"
        if "input_shape" in data:
            shape = "x".join(str(size) for size in data["input_shape"])
            what += f" (inputs {shape}, {data.get('classes', '?')} classes)"
        sentences = [what + "; " + " and ".join(goals) + (f"; limits: {', '.join(limits)}" if limits else "") + "."]
        asked = dict.fromkeys(search.get("searchers", ()), int(search.get("trials", 0)))
        for name in {*asked, *searchers(self.frame), "dense"}:
            if outside_budget(name):  # as many as there are
                asked[name] = int((self.frame["searcher"] == name).sum())
        sentences.append(status(self.frame, asked, bool(self.run.finished)))
        lines = "".join(paragraphs(sentences).replace("<p>", '<p class="sub">'))
        return lines + facts(headline(self.frame, self.objectives))

    def _front(self) -> str:
        if self.front.empty:
            return paragraphs(["There is no front yet: no trial is complete and feasible."])
        x, y = plots.default_axes(self.frame, self.objectives)
        limits = parse_constraints(self.constraints)
        picture = plots.front_figure(self.frame, self.objectives, x, y, constraints=limits)
        parts = [figure(svg_text(picture, "front"))]
        parts.append(
            '<p class="note">Strong marks with trial numbers are the front, pale ones are dominated. The line is the best that is '
            "attained at each cost; whiskers are the interval of the latency. Crosses broke a constraint; on the lower edge: "
            "never trained. Rings were stopped early and stand at their last epoch. Small triangles at an edge lie beyond it.</p>"
        )
        parts.append(to_html(pareto_sheet(self.front, self.objectives)))
        if x != "nnz" and not complete(self.frame, ("nnz", y)).empty:
            second = plots.front_figure(self.frame, self.objectives, "nnz", y)
            parts.append(fold(f"{label(y)} against non-zeros", "", figure(svg_text(second, "front-nnz"))))
        return "".join(parts)

    def _searchers(self) -> str:
        if self.frame.empty:
            return ""
        parts = [paragraphs(comparison(self.frame, self.objectives))]
        parts.append(to_html(searcher_sheet(self.frame, self.objectives, title="")))
        parts.append(figure(svg_text(plots.history_figure(self.frame, self.objectives), "history")))
        parts.append(
            '<p class="note">Best feasible value, and share of the box between the run\'s worst and best values that is dominated, '
            "after each finished trial; a dotted line marks the equal budget.</p>"
        )
        return "".join(parts)

    def _oneshot(self) -> str:
        masks = node_masks_sheet(self.run)
        of_masks = "" if masks is None else to_html(masks)
        sheet = comparison_sheet(self.frame, self.objectives, title="")
        if sheet is None:
            return of_masks
        picture = figure(svg_text(comparison_figure(self.frame), "oneshot-kept"))
        note = (
            "A point per trial: searches are filled, their controls hollow squares (dense search), triangles (another search) and "
            "crosses (random)."
        )
        return to_html(sheet) + picture + f'<p class="note">{note}</p>' + of_masks

    def _curves(self) -> str:
        shown = [int(trial) for trial in self.front["trial"]]
        shown = [shown[i] for i in spread(len(shown), MAX_CURVES)]
        curves = {trial: rows for trial in shown if (rows := self._curve(trial))}
        if max(map(len, curves.values()), default=0) < 2:
            return ""  # a single epoch is no curve
        ended = self.frame[self.frame["state"].eq("stopped").fillna(False) & self.frame["copy_of"].isna()]
        chosen = [int(ended["trial"].iloc[i]) for i in spread(len(ended), MAX_STOPPED_CURVES)]
        stopped = [rows for trial in chosen if (rows := self._curve(trial))]
        notes = []
        if len(self.front) > len(curves):
            notes.append(f"{len(self.front) - len(curves)} more networks of the front are not drawn.")
        if stopped:
            notes.append(f"Thin and grey: {len(stopped)} of {len(ended)} trials that were stopped early.")
        note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
        return figure(svg_text(plots.curves_figure(curves, stopped=stopped), "curves")) + note

    def _networks(self) -> str:
        if self.front.empty:
            return ""
        parts = []
        if self.plans:
            profile = plots.density_figure({f"trial {trial}": plan for trial, plan in self.plans.items()})
            parts.append("<h3>Density by layer</h3>" + figure(svg_text(profile, "density")))
        for number, trial in enumerate(self.networks):
            row = self.front[self.front["trial"] == trial].iloc[0]
            aside = ", ".join(f"{label(name)} {show(name, row[name])}" for name in self.objectives)
            parts.append(
                fold(f"Trial {trial}", f"{aside} · {row['searcher']}", self._network(trial, row), opened=number == 0)
            )
        more = len(self.front) - len(self.networks)
        if more > 0:
            parts.append(f'<p class="note">{more} more networks of the front: nas show RUN TRIAL.</p>')
        return "".join(parts)

    def _network(self, trial: int, row: pd.Series) -> str:
        decided = [(name.removeprefix(ARCH), row[name]) for name in row.index if name.startswith(ARCH)]
        decisions = [(name, value) for name, value in decided if not missing(value)]
        parts = [fold("Decisions", f"{len(decisions)}", key_values(decisions))]
        plan = self.plans.get(trial)
        if plan is None:
            parts.append('<p class="note">The plan of this network cannot be read, so its layers are not shown.</p>')
        else:
            title = f"network of trial {trial}"
            parts.append("<h3>What is executed</h3>" + figure(draw_network(plan).svg(title, for_page=True), "tall"))
            parts.append("<h3>What each layer costs</h3>" + figure(svg_text(plots.cost_figure(plan), f"cost-{trial}")))
            parts.append(fold("Layer by layer", f"{len(plan)} operations", to_html(layer_sheet(plan, title=""))))
        cell = self._cell(trial)
        if cell:
            parts.append("<h3>Its graph</h3>" + figure(cell, "wide"))
        return "".join(parts)

    def _trials(self) -> str:
        if self.frame.empty:
            return ""
        sheet = results_sheet(self.frame, self.objectives, limit=MAX_ROWS, title="")
        return to_html(sheet) + '<p class="note">Click a heading to sort.</p>'

    def _failures(self) -> str:
        failed = self.frame[self.frame["state"].eq("failed").fillna(False)]
        parts = []
        for row in failed.tail(MAX_FAILURES).to_dict("records"):
            error = "no reason was recorded" if missing(row["error"]) else str(row["error"])
            what = f"{row['searcher']}, seed {row['seed']}, {row['digest']}"
            parts.append(fold(f"Trial {row['trial']}: {last_line(error)}", what, pre(error)))
        if len(failed) > MAX_FAILURES:
            parts.append(f'<p class="note">The last {MAX_FAILURES} of {len(failed)}.</p>')
        return "".join(parts)

    def _setting(self) -> str:
        try:
            environment = getattr(self.run, "environment", {}) or {}
        except NasError as error:  # damaged: said in its place, the report goes on
            environment = {"not readable": str(error)}
        machine = key_values([(key, clean_text(str(value))) for key, value in _flat(environment)])
        config = pre(clean_text(tomli_w.dumps(self.config)))
        return f'<div class="pair"><div><h3>Config</h3>{config}</div><div><h3>Environment</h3>{machine}</div></div>'

    # -- reading what may be missing ------------------------------------------------------------------------------------

    def _plan(self, trial: int) -> list[Operation] | None:
        try:
            return read_plan(self.run.plan_frame(trial))
        except (NasError, OSError, ValueError, TypeError):
            return None

    def _curve(self, trial: int) -> list[dict[str, Any]]:
        try:
            return list(self.run.curve(trial))
        except (NasError, OSError, ValueError):
            return []

    def _cell(self, trial: int) -> str:
        """The graph of a cell, where the space has one that says more than the list of operations."""
        try:
            graph = self.run.space.graph(self.run.trial(trial).architecture)
            return draw_graph(graph).svg(f"graph of trial {trial}", for_page=True) if worth_drawing(graph) else ""
        except Exception:  # whatever the user's own space raises: the report goes on without this picture
            return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values with dotted keys, in order."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value))
    return found
