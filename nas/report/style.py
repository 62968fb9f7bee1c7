"""Colours, and how a figure is made and saved: one look for all pictures, readable in print, on white and on black.

Figures are matplotlib `Figure` objects (no pyplot, no global state). Start with `new_figure`, `save_figure` and `svg_text`.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nas.report.history import BASELINE

INK = "#1f2630"
MUTED = "#6c7683"
GRID = "#dfe3e8"
PAPER = "#fffffe"

# Okabe and Ito's palette, safe for colour-blind readers; black is left to the baseline, grey to random search.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#8a9199"
MARKERS = ("s", "^", "D", "v", "P", "p")
KERNEL_COLOURS = {"torch": "#0072b2", "portable": "#e69f00", "specialised": "#d55e00"}
OTHER_KERNEL = GREY

_DENSITY_STOPS = (  # log10(density), colour: the less is kept the paler
    (-2.0, (0xE6, 0xF0, 0xFA)),
    (-1.0, (0x8F, 0xBC, 0xE6)),
    (-0.4, (0x3B, 0x7D, 0xC4)),
    (0.0, (0x12, 0x3F, 0x7D)),
)
_CSS = {PALETTE[0]: "var(--blue)", INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
_RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def searcher_style(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each searcher: random search grey, baselines dark, the others from the palette in order."""
    styles: dict[str, tuple[str, str]] = {}
    others = [name for name in names if name not in ("random", BASELINE)]
    for i, name in enumerate(others):
        styles[name] = (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
    return {name: {"random": (GREY, "o"), BASELINE: (INK, "*")}.get(name) or styles[name] for name in names}


def density_colour(density: float | None) -> tuple[str, str]:
    """(fill, text) colours of something that keeps this share of its weights; a neutral pair for None."""
    if density is None or not density > 0:
        return GRID, INK
    at = max(-2.0, min(0.0, math.log10(density)))
    for (low, dark), (high, light) in itertools.pairwise(_DENSITY_STOPS):
        if at <= high:
            mix = (at - low) / (high - low)
            rgb = [round(a + (b - a) * mix) for a, b in zip(dark, light, strict=True)]
            luminance = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255
            return "#{:02x}{:02x}{:02x}".format(*rgb), "#10202f" if luminance > 0.55 else "#ffffff"
    raise AssertionError("unreachable: log10(density) is at most 0")


@contextmanager
def rc(**more: Any) -> Iterator[None]:
    """The look, for figures that are made or drawn inside it; a letter the font lacks is drawn as a box, without a warning."""
    settings: Any = {**_RC, **more}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float = 7.2, height: float = 4.2) -> Figure:
    """An empty figure in inches, laid out by itself, transparent outside the axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def tidy(axes: Axes, *, grid: str = "both") -> None:
    """Take away the frame, keep two spines and a faint grid behind the data."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    if grid != "none":
        axes.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.tick_params(length=3, width=0.8)


def message_figure(text: str, width: float = 7.2, height: float = 1.6) -> Figure:
    """A picture that says why there is no picture."""
    with rc():
        figure = new_figure(width, height)
        figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, fontsize=11)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the suffix says how: .png (200 dpi, white), .svg or .pdf. The same figure gives the same bytes.

    Raises:
        ValueError: another suffix.
    """
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f'{target}: expected a file name ending in .png, .svg or .pdf, got "{target.suffix}"')
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc(**{"svg.hashsalt": "figure"}):
        figure.savefig(target, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return target


def svg_text(figure: Figure, name: str) -> str:
    """A figure as an <svg> element to stand in a page: text stays text, neutral colours follow the page's theme.

    Args:
        figure: what to draw.
        name: unique in the page; keeps the ids of several figures apart.
    """
    buffer = io.StringIO()
    with rc(**{"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    referred = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in referred else "", text)
    text = text.replace("'DejaVu Sans'", "inherit")
    return themed(text)


def themed(svg: str) -> str:
    """An SVG for a page: neutral colours become the page's CSS variables --ink, --muted, --grid and --paper."""
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    return svg
