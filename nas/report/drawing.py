"""Draws a network as a diagram of the operations it executes, as SVG: what each is, how dense, how large, how long it takes.

`network_svg` draws from the operations of a plan; repeated blocks are drawn once. Graphs of cells are `nas.report.graphs`,
the version for terminals is `nas.report.tree`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from nas.report.plans import Operation, shape_text, shares, total_ms
from nas.report.repeats import Row, rows_of
from nas.report.style import GRID, INK, KERNEL_COLOURS, MUTED, OTHER_KERNEL, PAPER, density_colour, themed
from nas.report.units import compact, digits

MAX_ROWS = 240
_LANES = 7
_LANE = 9
_BOX = 348
_TALL, _LOW, _GAP, _HEAD = 40, 20, 15, 26


def network_svg(operations: Sequence[Operation], *, title: str = "", for_page: bool = False) -> str:
    """A network as one <svg> element.

    Boxes are operations, from the input down; the colour of a box and the bar on its lower edge say how many of its weights
    are kept. Beside each stand its output, its weights, multiply-adds and its share of the time (of the multiply-adds, if no
    times were measured). Lines at the left are values that skip operations, where the plan tells.

    Args:
        operations: as from `nas.report.plans.read_plan`.
        title: for readers that do not see it.
        for_page: neutral colours follow the page's theme instead of being fixed.
    """
    rows = rows_of(operations)
    cut = len(rows) - MAX_ROWS
    if cut > 0:
        rows = rows[: MAX_ROWS // 2] + rows[-MAX_ROWS // 2 :]
    placed = _Placed(operations, rows)
    part = shares(operations)
    parts = [_header(placed, total_ms(operations) is not None)]
    frames, badges = _frames(placed)
    parts += frames
    parts += _connections(placed, operations)
    for i, row in enumerate(rows):
        members = [operations[k] for k in row.members]
        parts.append(_row(placed, i, members, sum(part[k] for k in row.members)))
    parts += badges
    if cut > 0:
        parts.append(_text(placed.box, placed.height - 8, f"{cut} rows in the middle are not drawn", MUTED, 11))
    label = html.escape(title or "network", quote=True)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{placed.width}" '
        f'height="{placed.height}" viewBox="0 0 {placed.width} {placed.height}" '
        f"font-family=\"system-ui, 'DejaVu Sans', sans-serif\">{''.join(parts)}</svg>"
    )
    return themed(svg) if for_page else svg


class _Placed:
    """Where everything stands, in pixels."""

    def __init__(self, operations: Sequence[Operation], rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.row_of = {k: i for i, row in enumerate(rows) for k in row.members}
        self.skips = _skips(operations, self.row_of)
        self.lanes = _lanes(self.skips)
        self.box = 26 + _LANE * min(_LANES, 1 + max(self.lanes, default=-1))
        self.middle = self.box + _BOX / 2
        self.columns = [
            self.box + _BOX + x for x in (40, 178, 262, 278)
        ]  # output, weights (right), MACs (right), share
        self.columns[1] += 20
        self.columns[2] += 30
        self.columns[3] += 48
        self.width = self.columns[3] + 150
        self.tops: list[float] = []
        y = float(_HEAD + 8)
        for i, row in enumerate(rows):
            starts = row.block >= 0 and (i == 0 or rows[i - 1].block != row.block)
            ended = i > 0 and rows[i - 1].block >= 0 and rows[i - 1].block != row.block
            y += (10 if starts else 0) + (10 if ended else 0)
            self.tops.append(y)
            y += self.tall(operations, i) + _GAP
        self.heights = [self.tall(operations, i) for i in range(len(rows))]
        self.height = int(y + 14)

    def tall(self, operations: Sequence[Operation], i: int) -> int:
        return _TALL if operations[self.rows[i].members[0]].density is not None else _LOW

    def centre(self, i: int) -> float:
        return self.tops[i] + self.heights[i] / 2


def _row(placed: _Placed, i: int, members: Sequence[Operation], share: float) -> str:
    op, top, height = members[0], placed.tops[i], placed.heights[i]
    fill, ink = density_colour(op.density)
    box = placed.box
    what = " + ".join((op.what, *op.after))
    parts = []
    if op.density is None:
        inset = 60
        parts.append(
            f'<rect x="{box + inset}" y="{top}" width="{_BOX - 2 * inset}" height="{height}" rx="{height / 2}" fill="{GRID}"/>'
        )
        parts.append(_text(placed.middle, top + 14, _short(what, _BOX - 2 * inset - 16, 11), INK, 11, anchor="middle"))
    else:
        low, high = min(m.density or 0 for m in members), max(m.density or 0 for m in members)
        how = op.how if low == high else op.how.replace(f"{op.density:.3g}", f"{low:.3g} to {high:.3g}")
        parts.append(f'<rect x="{box}" y="{top}" width="{_BOX}" height="{height}" rx="5" fill="{fill}"/>')
        kept = sum(m.nnz for m in members) / max(1, sum(_weights(m) for m in members))
        bar = max(2.0, (_BOX - 16) * min(1.0, kept))
        parts.append(
            f'<rect x="{box + 8}" y="{top + height - 5}" width="{_BOX - 16}" height="2" fill="{ink}" opacity=".25"/>'
            f'<rect x="{box + 8}" y="{top + height - 5}" width="{bar:.1f}" height="2" fill="{ink}"/>'
        )
        parts.append(_text(box + 10, top + 16, _short(what, _BOX - 20, 12.5), ink, 12.5, weight=600))
        name = op.name if len(members) == 1 else f"{op.name} …"
        room = _BOX - 30 - _size(how, 10.5)
        parts.append(_text(box + 10, top + 30, how, ink, 10.5))
        parts.append(
            _text(
                box + _BOX - 10, top + 30, _short(name, room, 10.5, keep_end=True), ink, 10.5, anchor="end", opacity=0.8
            )
        )
    middle = placed.centre(i) + 4
    parts.append(_text(placed.columns[0], middle, shape_text(op.output), MUTED, 11))
    weights, macs = sum(m.nnz for m in members), sum(m.macs for m in members)
    if op.density is not None:
        parts.append(_text(placed.columns[1], middle, f"{weights:,}", INK, 11, anchor="end"))
    if macs:
        parts.append(_text(placed.columns[2], middle, compact(macs), INK, 11, anchor="end"))
    colour = KERNEL_COLOURS.get(op.kernel, OTHER_KERNEL)
    parts.append(
        f'<rect x="{placed.columns[3]}" y="{middle - 9}" width="{max(0.8, 90 * share):.1f}" height="10" fill="{colour}"/>'
    )
    parts.append(_text(placed.columns[3] + max(0.8, 90 * share) + 6, middle, f"{share:.1%}", INK, 11))
    return f"<g><title>{html.escape(_tooltip(members))}</title>{''.join(parts)}</g>"


def _tooltip(members: Sequence[Operation]) -> str:
    lines = []
    for op in members[:12]:
        text = f"{op.name}: {' + '.join((op.what, *op.after))}"
        if op.density is not None:
            text += f", {op.how}, {op.nnz:,} weights"
        lines.append(text + (f", {digits(op.ms)} ms" if op.ms is not None else ""))
    return "\n".join(lines + ([f"and {len(members) - 12} more"] if len(members) > 12 else []))


def _header(placed: _Placed, timed: bool) -> str:
    names = (
        ("output", "start"),
        ("non-zeros", "end"),
        ("MACs", "end"),
        ("share of time" if timed else "share of MACs", "start"),
    )
    return "".join(
        _text(x, 16, name, MUTED, 11, anchor=anchor) for x, (name, anchor) in zip(placed.columns, names, strict=True)
    )


def _frames(placed: _Placed) -> tuple[list[str], list[str]]:
    """(dashed frames around the repeated blocks, badges that say how often), the badges to be drawn last."""
    frames, badges = [], []
    for block in dict.fromkeys(row.block for row in placed.rows if row.block >= 0):
        inside = [i for i, row in enumerate(placed.rows) if row.block == block]
        top, bottom = placed.tops[inside[0]] - 9, placed.tops[inside[-1]] + placed.heights[inside[-1]] + 9
        frames.append(
            f'<rect x="{placed.box - 8}" y="{top:g}" width="{_BOX + 16}" height="{bottom - top:g}" rx="9" fill="none" '
            f'stroke="{MUTED}" stroke-dasharray="4 3"/>'
        )
        times, middle = f"{placed.rows[inside[0]].times}×", (top + bottom) / 2
        badges.append(
            f'<rect x="{placed.box + _BOX - 8}" y="{middle - 10:g}" width="32" height="20" rx="10" fill="{INK}"/>'
            + _text(placed.box + _BOX + 8, middle + 4, times, PAPER, 11, anchor="middle", weight=600)
        )
    return frames, badges


def _connections(placed: _Placed, operations: Sequence[Operation]) -> list[str]:
    """Arrows between neighbours that feed each other, and lines around what is skipped."""
    known = any(op.inputs for op in operations)
    parts = []
    for i in range(1, len(placed.rows)):
        k = placed.rows[i].members[0]
        if known and k not in operations[k].inputs:  # input number k is the result of operation k - 1
            continue
        top, bottom = placed.tops[i - 1] + placed.heights[i - 1], placed.tops[i]
        x = placed.middle
        parts.append(
            f'<path d="M{x} {top}V{bottom - 4}" stroke="{MUTED}" fill="none"/>'
            f'<path d="M{x - 3.5} {bottom - 6}h7l-3.5 6z" fill="{MUTED}"/>'
        )
    for (start, end), lane in zip(placed.skips, placed.lanes, strict=True):
        x = placed.box - 16 - _LANE * (lane % _LANES)
        y0 = placed.centre(start) + 4 if start >= 0 else float(_HEAD)
        y1 = placed.centre(end) - 4
        left, right = placed.box + _edge(placed, start), placed.box + _edge(placed, end)
        parts.append(
            f'<path d="M{left} {y0}H{x + 6}Q{x} {y0} {x} {y0 + 6}V{y1 - 6}Q{x} {y1} {x + 6} {y1}H{right - 4}" '
            f'stroke="{MUTED}" stroke-width="1.1" fill="none" opacity=".8"/>'
            f'<path d="M{right - 6} {y1 - 3.5}v7l6 -3.5z" fill="{MUTED}"/>'
        )
    return parts


def _edge(placed: _Placed, i: int) -> int:
    """Where the left edge of a row's box is, seen from the boxes with weights."""
    return 60 if i >= 0 and placed.heights[i] == _LOW else 0


def _skips(operations: Sequence[Operation], row_of: dict[int, int]) -> list[tuple[int, int]]:
    """(from row, to row) of values that are not read by the next row; row -1 is the network's input. Each once."""
    found: dict[tuple[int, int], None] = {}
    for k, op in enumerate(operations):
        for source in op.inputs:
            start, end = row_of.get(source - 1, -1), row_of.get(k, -1)
            if source > 0 and source - 1 not in row_of:
                continue
            if end - start > 1:
                found[start, end] = None
    return sorted(found)


def _lanes(skips: Sequence[tuple[int, int]]) -> list[int]:
    """For each skip the lane nearest to the boxes that no other skip uses on the way; short ones are nearest."""
    lanes = [0] * len(skips)
    taken: list[list[tuple[int, int]]] = []
    for i in sorted(range(len(skips)), key=lambda i: skips[i][1] - skips[i][0]):
        start, end = skips[i]
        lane = 0
        while lane < len(taken) and any(start < other[1] and other[0] < end for other in taken[lane]):
            lane += 1
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lanes[i] = lane
    return lanes


def _weights(op: Operation) -> int:
    total = 1
    for size in op.weight:
        total *= size
    return total if op.weight else 0


def _size(text: str, size: float) -> float:
    """About how wide a text is, on the generous side; fonts differ between machines."""
    return 0.6 * size * len(text)


def _short(text: str, room: float, size: float, *, keep_end: bool = False) -> str:
    """The text, cut with an ellipsis where it does not fit."""
    most = int(room / (0.6 * size))
    if len(text) <= most:
        return text
    if most < 3:
        return ""
    return "…" + text[len(text) - most + 1 :] if keep_end else text[: most - 1] + "…"


def _text(
    x: float,
    y: float,
    text: str,
    colour: str,
    size: float,
    *,
    anchor: str = "start",
    weight: int = 400,
    opacity: float = 1.0,
) -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-weight="{weight}"' if weight != 400 else ""
    more += f' opacity="{opacity}"' if opacity != 1 else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{more}>{html.escape(text)}</text>'
