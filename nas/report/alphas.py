"""How one-shot searches came to their choice, for the report: loss and accuracy of the supernets, probabilities epoch by epoch.

`alphas_section` is the HTML; `searches_figure` and `draw_probabilities` are its pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nas.report import style
from nas.report.canvas import Canvas, Step
from nas.report.page import figure, fold, paragraphs, pre, text
from nas.report.search_logs import SearchLog, decidedness, search_logs
from nas.report.style import GREY, GRID, INK, MUTED, PALETTE, svg_text
from nas.report.units import duration, shorten, show, spread
from search_spaces.skips import is_skip_or_pool

MAX_DECISIONS = 24
"""Decisions drawn before the fold; below it `MAX_FOLDED` more."""
MAX_FOLDED = 48
MAX_EPOCHS = 40
MAX_REPLICATES = 6
SETTLED = 0.9

_SKIPS = ("#d55e00", "#a63603", "#f4a582")
_POOLS = ("#e69f00", "#cdb800", "#8a6d0b", "#f5cf6b")
_WEIGHTS = (
    "#0072b2",
    "#009e73",
    "#56b4e9",
    "#cc79a7",
    "#3f51a3",
    "#7fcdbb",
    "#9b6fb5",
    "#1b6e5a",
    "#9ecae1",
    "#c994c7",
)
_COLUMNS, _WIDE, _TALL, _GAP, _HEAD = 4, 236, 44, 16, 30


def alphas_section(run: Any) -> str:
    """The part of the report about supernets, as HTML; empty if the run has none that was started.

    Args:
        run: `nas.run.Run`, or anything with its `folder`; read only.
    """
    parts = []
    for name, group in groupby(search_logs(run.folder), key=lambda log: log.group):
        logs = list(group)
        epochs = max(len(log.rows) for log in logs)
        parts.append(f"<h3>{text(name)}</h3>")
        if epochs:
            parts.append(figure(svg_text(searches_figure(logs), f"supernets-{name}")))
        for number, log in enumerate(logs[:MAX_REPLICATES]):
            parts.append(fold(log.job, _aside(log), _replicate(log), opened=number == 0))
        if len(logs) > MAX_REPLICATES:
            parts.append(f'<p class="note">{len(logs) - MAX_REPLICATES} more replicates are not drawn.</p>')
    if not parts:
        return ""
    note = (
        '<p class="note">Supernets are judged on the half of the training part that moves the architecture parameters. Nothing '
        "here says how good a network is that is trained by itself.</p>"
    )
    return note + "".join(parts)


def searches_figure(logs: Sequence[SearchLog]) -> Figure:
    """Loss, accuracy and share of skips by epoch, a colour per supernet; dotted on the training half. Lines part phases.

    Args:
        logs: replicates of one search, at least one with an epoch.
    """
    shares = [log.skip_share() for log in logs]
    panels = 3 if any(shares) else 2
    with style.rc():
        drawn = style.new_figure(7.2 if panels == 2 else 9.2, 2.6)
        axes = list(drawn.subplots(1, panels))
        for ax, what in zip(axes, ("loss", "accuracy")):
            for i, log in enumerate(logs):
                _line(ax, [row.get(f"train_{what}") for row in log.rows], i, dotted=True)
                _line(ax, [row.get(f"supernet_{what}") for row in log.rows], i)
            ax.set_title(f"supernet's {what}", loc="left", fontsize=9)
        if panels == 3:
            for i, share in enumerate(shares):
                _line(axes[2], share, i)
            axes[2].set_title("probability of skip, pool, none", loc="left", fontsize=9)
            axes[2].set_ylim(-0.02, 1.02)
        longest = max(logs, key=lambda log: len(log.rows))
        for ax in axes:
            style.tidy(ax)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            _mark_phases(ax, longest)
        drawn.supxlabel("epoch", fontsize=9)
        handles = [Line2D([], [], color=_colour(i), linewidth=1.6, label=log.job) for i, log in enumerate(logs)]
        handles.append(
            Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)), label="on the training half")
        )
        drawn.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False, fontsize=8)
    return drawn


def draw_probabilities(log: SearchLog, names: Sequence[str]) -> Canvas:
    """A panel per decision: the probabilities of its options as layers over the epochs, what was taken at the bottom and strong.

    Args:
        log: of a supernet.
        names: decisions whose probabilities it has.
    """
    options = list(dict.fromkeys(option for name in names for option in log.choices[name] if isinstance(option, str)))
    colours = option_colours(options)
    entries = [(option, colours[option]) for option in options if any(option in log.choices[n] for n in names)]
    head = _HEAD * -(-len(entries) // 7) if entries else 0
    rows = -(-len(names) // _COLUMNS)
    canvas = Canvas(_COLUMNS * (_WIDE + _GAP) - _GAP, head + rows * (_TALL + 34))
    for i, (option, colour) in enumerate(entries):
        x, y = (i % 7) * 140, (i // 7) * _HEAD + 6
        canvas.box(x, y, 11, 11, colour, radius=2)
        canvas.text(x + 16, y + 10, shorten(option, 19), MUTED)
    for i, name in enumerate(names):
        x, y = (i % _COLUMNS) * (_WIDE + _GAP), head + (i // _COLUMNS) * (_TALL + 34)
        _panel(canvas, x, y, log, name, colours)
    return canvas


def option_colours(options: Sequence[str]) -> dict[str, str]:
    """Red for what skips, yellow for what pools, grey for nothing at all, cold colours for the others."""
    kinds: dict[tuple[str, ...], list[str]] = {_SKIPS: [], _POOLS: [], (GREY,): [], _WEIGHTS: []}
    for option in options:
        idle = is_skip_or_pool(option)
        nothing = idle and option.lower() in ("none", "zero", "zeroize")
        kinds[(GREY,) if nothing else _POOLS if idle and "pool" in option else _SKIPS if idle else _WEIGHTS].append(
            option
        )
    return {option: palette[i % len(palette)] for palette, names in kinds.items() for i, option in enumerate(names)}


def _panel(canvas: Canvas, x: float, y: float, log: SearchLog, name: str, colours: dict[str, str]) -> None:
    options, taken = log.choices[name], log.taken(name)
    values = log.probabilities(name)
    values = [values[i] for i in spread(len(values), MAX_EPOCHS)]
    values = values * 2 if len(values) == 1 else values
    last = values[-1]
    favourite = max(range(len(last)), key=lambda i: last[i])
    said = ", ".join(str(options[i]) for i in taken) or str(options[favourite])
    share = sum(last[i] for i in taken) if taken else last[favourite]
    canvas.text(x, y + 10, shorten(name, 24), MUTED, 10)
    label = f"{shorten(said, 15)} {share:.2f}"
    canvas.text(x + _WIDE, y + 10, label, INK if taken else MUTED, 10, anchor="end", bold=bool(taken))
    top, step = y + 15, _WIDE / (len(values) - 1)
    below = [0.0] * len(values)
    for i in (*taken, *(j for j in range(len(options)) if j not in taken)):
        above = [b + row[i] for b, row in zip(below, values)]
        option = options[i]
        colour = colours[option] if isinstance(option, str) else _WEIGHTS[i % len(_WEIGHTS)]
        outline: list[Step] = [("M", (x, top + _TALL * (1 - below[0])))]
        outline += [("L", (round(x + k * step, 1), round(top + _TALL * (1 - v), 1))) for k, v in enumerate(above)]
        back = list(enumerate(below))[:0:-1]
        outline += [("L", (round(x + k * step, 1), round(top + _TALL * (1 - v), 1))) for k, v in back]
        canvas.begin(f"{name}: {option} {values[0][i]:.3f} to {last[i]:.3f}{', taken' if i in taken else ''}")
        canvas.line(*outline, ("Z", ()), stroke="none", fill=colour, opacity=1.0 if i in taken else 0.4)
        canvas.end()
        below = above
    canvas.box(x, top, _WIDE, _TALL, stroke=GRID)
    for fraction in _boundaries(log):
        at = x + _WIDE * fraction
        canvas.line(("M", (at, top)), ("L", (at, top + _TALL)), stroke=INK, opacity=0.6)


def _replicate(log: SearchLog) -> str:
    """What there is to say and draw of one supernet."""
    names = log.decisions()
    parts = []
    if names:
        last = log.rows[-1]["alphas"]
        settled = sum(max(last[name]) > SETTLED for name in names)
        sure = sum(decidedness(last[name]) for name in names) / len(names)
        sentence = (
            f"{settled} of {len(names)} decisions give one option more than {SETTLED:.0%}; on average they are {sure:.0%} decided "
            "(0 %: all options equal). Each panel runs over the epochs; the layer at the bottom, in full colour, is what the first "
            "architecture found has; a panel without one is a decision that this architecture does not take."
        )
        parts.append(paragraphs([sentence if log.found else sentence.partition(" Each panel")[0]]))
        parts.append(_probabilities(log, names[:MAX_DECISIONS]))
        rest = names[MAX_DECISIONS : MAX_DECISIONS + MAX_FOLDED]
        if rest:
            parts.append(fold("Less decided", f"{len(rest)} more", _probabilities(log, rest)))
        if len(names) > MAX_DECISIONS + MAX_FOLDED:
            parts.append(f'<p class="note">{len(names) - MAX_DECISIONS - MAX_FOLDED} more decisions are not drawn.</p>')
    elif log.rows:
        parts.append(paragraphs(["This search has no architecture parameters that it logs."]))
    genotypes: dict[str, list[str]] = {}
    for one in log.found:
        if one["note"].get("genotype"):
            genotypes.setdefault(str(one["note"]["genotype"]), []).append(_which(one["note"]))
    for genotype, which in genotypes.items():
        kinds = ", ".join(dict.fromkeys(filter(None, which)))
        parts.append(f"<p>Found{text(f' ({kinds})' if kinds else '')}:</p>" + pre(genotype))
    return "".join(parts)


def _probabilities(log: SearchLog, names: Sequence[str]) -> str:
    return figure(draw_probabilities(log, names).svg(f"probabilities of {log.job}", for_page=True))


def _which(note: dict[str, Any]) -> str:
    density = note.get("density")
    return f"density {density:g}" if isinstance(density, int | float) else ""


def _aside(log: SearchLog) -> str:
    said = [f"{len(log.rows)} epochs" + ("" if log.finished else " so far")]
    if log.finished:
        said.append(f"{len(log.found)} found")
    if "seconds" in log.facts:
        said.append(duration(log.facts["seconds"]))
    if log.rows and (accuracy := log.rows[-1].get("supernet_accuracy")) is not None:
        said.append(f"supernet's accuracy {show('val_accuracy', accuracy)}")
    return ", ".join(said)


def _boundaries(log: SearchLog) -> list[float]:
    """Where phases change, as fractions of the way from the first epoch to the last."""
    rows = [row for row in log.rows if row.get("alphas")]
    return [(i - 0.5) / (len(rows) - 1) for i in range(1, len(rows)) if rows[i]["phase"] != rows[i - 1]["phase"]]


def _mark_phases(axes: Axes, log: SearchLog) -> None:
    phases = [(name, len(list(rows))) for name, rows in groupby(row["phase"] for row in log.rows)]
    if len(phases) < 2:
        return
    begin = 0.5
    for name, epochs in phases:
        if begin > 0.5:
            axes.axvline(begin, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.text(begin, 1.0, f" {name}", transform=axes.get_xaxis_transform(), fontsize=7, color=MUTED, va="top")
        begin += epochs


def _line(axes: Axes, values: Sequence[float | None], number: int, *, dotted: bool = False) -> None:
    kept = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
    how: Any = {"linestyle": (0, (1, 1.5)), "linewidth": 0.9, "alpha": 0.8} if dotted else {"linewidth": 1.6}
    marker = "." if len(kept) == 1 else None
    axes.plot([e for e, _ in kept], [v for _, v in kept], color=_colour(number), marker=marker, **how)


def _colour(number: int) -> str:
    return (*PALETTE, GREY, INK)[number % 8]
