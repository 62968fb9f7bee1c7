"""Boxes, lines and texts at given places, put out as SVG or, through matplotlib, as PNG or PDF.

Coordinates are pixels, y downwards. Only what the drawings of networks need; charts are `nas.report.plots`. Start with
`Canvas`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from nas.report.style import INK, MUTED, PAPER, rc, themed

Step = tuple[str, tuple[float, ...]]
"""Part of a line: ("M", (x, y)) move, ("L", (x, y)) straight, ("Q", (cx, cy, x, y)) and ("C", (...)) curved, ("Z", ()) close."""

_CODES = {"M": [Curve.MOVETO], "L": [Curve.LINETO], "Q": [Curve.CURVE3] * 2, "C": [Curve.CURVE4] * 3}
_ALIGN = {"start": "left", "middle": "center", "end": "right"}
_PER_INCH = 96.0


@dataclass
class _Box:
    x: float
    y: float
    width: float
    height: float
    radius: float
    fill: str
    stroke: str
    dashed: bool
    opacity: float


@dataclass
class _Line:
    steps: Sequence[Step]
    stroke: str
    fill: str
    width: float
    opacity: float


@dataclass
class _Text:
    x: float
    y: float
    text: str
    colour: str
    size: float
    anchor: str
    bold: bool
    opacity: float


@dataclass
class _Group:
    hint: str


@dataclass
class Canvas:
    """Things to draw, the later ones on top.

    Attributes:
        width, height: pixels.
    """

    width: float
    height: float
    _items: list[_Box | _Line | _Text | _Group | None] = field(default_factory=list)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        *,
        radius: float = 0.0,
        stroke: str = "none",
        dashed: bool = False,
        opacity: float = 1.0,
    ) -> None:
        """A rectangle, its corners rounded by `radius`."""
        self._items.append(_Box(x, y, width, height, radius, fill, stroke, dashed, opacity))

    def line(
        self, *steps: Step, stroke: str = MUTED, fill: str = "none", width: float = 1.0, opacity: float = 1.0
    ) -> None:
        """A line or an outline made of steps; the first is a move."""
        self._items.append(_Line(steps, stroke, fill, width, opacity))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = INK,
        size: float = 11.0,
        *,
        anchor: str = "start",
        bold: bool = False,
        opacity: float = 1.0,
    ) -> None:
        """A line of text; (x, y) is on its base line, at its "start", "middle" or "end"."""
        self._items.append(_Text(x, y, text, colour, size, anchor, bold, opacity))

    def begin(self, hint: str) -> None:
        """What follows, up to `end`, belongs together; `hint` is shown when the pointer rests on it (SVG)."""
        self._items.append(_Group(hint))

    def end(self) -> None:
        """Close the group that `begin` opened."""
        self._items.append(None)

    def arrow_down(self, x: float, y: float) -> None:
        """A small arrowhead with its tip at (x, y)."""
        self.line(("M", (x - 3.5, y - 6)), ("L", (x + 3.5, y - 6)), ("L", (x, y)), ("Z", ()), stroke="none", fill=MUTED)

    def arrow_right(self, x: float, y: float) -> None:
        """A small arrowhead with its tip at (x, y)."""
        self.line(("M", (x - 6, y - 3.5)), ("L", (x - 6, y + 3.5)), ("L", (x, y)), ("Z", ()), stroke="none", fill=MUTED)

    def svg(self, title: str, *, for_page: bool = False) -> str:
        """One <svg> element.

        Args:
            title: for readers that do not see it.
            for_page: neutral colours follow the page's theme (CSS variables) instead of being fixed, on no background.
        """
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        body = "".join(_svg(item) for item in self._items)
        paper = "" if for_page else f'<rect width="100%" height="100%" fill="{PAPER}"/>'
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(title, quote=True)}" {size} '
            f"font-family=\"system-ui, 'DejaVu Sans', sans-serif\">{paper}{body}</svg>"
        )
        return themed(text) if for_page else text

    def save(self, path: str | Path, title: str) -> Path:
        """Write an .svg, .png (192 dpi) or .pdf file.

        Raises:
            ValueError: another suffix.
        """
        target = Path(path)
        kind = target.suffix.lower()
        if kind == ".svg":
            target.write_text(self.svg(title) + "\n", encoding="utf-8")
        elif kind in (".png", ".pdf"):
            with rc():
                metadata = {"Software": None} if kind == ".png" else {"CreationDate": None}
                self._figure().savefig(target, format=kind[1:], dpi=2 * _PER_INCH, facecolor="white", metadata=metadata)
        else:
            raise ValueError(f'{target}: expected a file name ending in .svg, .png or .pdf, got "{target.suffix}"')
        return target

    def _figure(self) -> Figure:
        figure = Figure(figsize=(self.width / _PER_INCH, self.height / _PER_INCH))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.axis("off")
        for order, item in enumerate(self._items):
            if isinstance(item, _Box):
                corner = (item.x, item.y)
                shape: Rectangle | FancyBboxPatch = Rectangle(corner, item.width, item.height)
                if item.radius:
                    radius = min(item.radius, item.width / 2, item.height / 2)
                    shape = FancyBboxPatch(
                        corner, item.width, item.height, boxstyle=f"round,pad=0,rounding_size={radius}"
                    )
                shape.set(facecolor=item.fill, edgecolor=item.stroke, linewidth=0.75, alpha=item.opacity, zorder=order)
                shape.set_linestyle((0, (4, 3)) if item.dashed else "-")
                axes.add_patch(shape)
            elif isinstance(item, _Line):
                line = PathPatch(_curve(item.steps), edgecolor=item.stroke, facecolor=item.fill, zorder=order)
                line.set_linewidth(0.75 * item.width)
                line.set_alpha(item.opacity)
                axes.add_patch(line)
            elif isinstance(item, _Text):
                axes.text(
                    item.x,
                    item.y,
                    item.text,
                    color=item.colour,
                    fontsize=item.size * 0.7,  # 0.75 would be the same size; the font is wider than what browsers take
                    ha=_ALIGN[item.anchor],
                    va="baseline",
                    fontweight="bold" if item.bold else "normal",
                    alpha=item.opacity,
                    zorder=order,
                )
        return figure


def _svg(item: _Box | _Line | _Text | _Group | None) -> str:
    if item is None:
        return "</g>"
    if isinstance(item, _Group):
        return f"<g><title>{html.escape(item.hint)}</title>"
    if isinstance(item, _Box):
        more = f' rx="{item.radius:g}"' if item.radius else ""
        more += f' stroke="{item.stroke}"' if item.stroke != "none" else ""
        more += ' stroke-dasharray="4 3"' if item.dashed else ""
        more += f' opacity="{item.opacity:g}"' if item.opacity != 1 else ""
        place = f'x="{item.x:g}" y="{item.y:g}" width="{item.width:g}" height="{item.height:g}"'
        return f'<rect {place} fill="{item.fill}"{more}/>'
    if isinstance(item, _Line):
        data = "".join(code + " ".join(f"{value:g}" for value in values) for code, values in item.steps)
        stroke = f' stroke="{item.stroke}" stroke-width="{item.width:g}"' if item.stroke != "none" else ""
        more = f' opacity="{item.opacity:g}"' if item.opacity != 1 else ""
        return f'<path d="{data}" fill="{item.fill}"{stroke}{more}/>'
    more = f' text-anchor="{item.anchor}"' if item.anchor != "start" else ""
    more += ' font-weight="600"' if item.bold else ""
    more += f' opacity="{item.opacity:g}"' if item.opacity != 1 else ""
    place = f'x="{item.x:g}" y="{item.y:g}" font-size="{item.size:g}"'
    return f'<text {place} fill="{item.colour}"{more}>{html.escape(item.text)}</text>'


def _curve(steps: Sequence[Step]) -> Curve:
    points: list[tuple[float, float]] = []
    codes: list[int] = []
    for code, values in steps:
        if code == "Z":
            points.append((0.0, 0.0))
            codes.append(int(Curve.CLOSEPOLY))
        else:
            points += [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
            codes += [int(c) for c in _CODES[code]]
    return Curve(points, codes)
