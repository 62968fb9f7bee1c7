"""Draws a network as a diagram of the operations it executes: what each is, how dense, how large, how long it takes.

`draw_network` draws from the operations of a plan; repeated blocks are drawn once. Graphs of cells are `nas.report.graphs`,
the version for terminals is `nas.report.tree`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nas.report.canvas import Canvas
from nas.report.plans import Operation, shape_text, shares, total_ms
from nas.report.repeats import Row, rows_of
from nas.report.style import GRID, INK, KERNEL_COLOURS, MUTED, OTHER_KERNEL, PAPER, density_colour
from nas.report.units import compact, digits

MAX_ROWS = 240
_LANES = 7
_LANE = 9
_BOX = 348
_INSET = 60
_TALL, _LOW, _GAP, _HEAD = 40, 20, 15, 26


def draw_network(operations: Sequence[Operation]) -> Canvas:
    """A network as a diagram.

    Boxes are operations, from the input down; the colour of a box and the bar on its lower edge say how many of its weights
    are kept. Beside each stand its output, its weights, multiply-adds and its share of the time (of the multiply-adds, if no
    times were measured). Lines at the left are values that skip operations, where the plan tells.

    Args:
        operations: as from `nas.report.plans.read_plan`.
    """
    rows = rows_of(operations)
    cut = len(rows) - MAX_ROWS
    if cut > 0:
        rows = rows[: MAX_ROWS // 2] + rows[-MAX_ROWS // 2 :]
    placed = _Placed(operations, rows)
    part = shares(operations)
    canvas = Canvas(placed.width, placed.height)
    _header(canvas, placed, total_ms(operations) is not None)
    frames = _frames(placed)
    for top, bottom, _ in frames:
        canvas.box(placed.box - 8, top, _BOX + 16, bottom - top, radius=9, stroke=MUTED, dashed=True)
    _connections(canvas, placed, operations)
    for i, row in enumerate(rows):
        _row(canvas, placed, i, [operations[k] for k in row.members], sum(part[k] for k in row.members))
    for top, bottom, times in frames:
        middle = (top + bottom) / 2
        canvas.box(placed.box + _BOX - 8, middle - 10, 32, 20, INK, radius=10)
        canvas.text(placed.box + _BOX + 8, middle + 4, f"{times}×", PAPER, anchor="middle", bold=True)
    if cut > 0:
        canvas.text(placed.box, placed.height - 4, f"{cut} rows in the middle are not drawn", MUTED)
    return canvas


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


def _row(canvas: Canvas, placed: _Placed, i: int, members: Sequence[Operation], share: float) -> None:
    op, top, height = members[0], placed.tops[i], placed.heights[i]
    fill, ink = density_colour(op.density)
    box, what = placed.box, " + ".join((op.what, *op.after))
    canvas.begin(_tooltip(members))
    if op.density is None:
        canvas.box(box + _INSET, top, _BOX - 2 * _INSET, height, GRID, radius=height / 2)
        canvas.text(placed.middle, top + 14, _short(what, _BOX - 2 * _INSET - 16, 11), anchor="middle")
    else:
        low, high = min(m.density or 0 for m in members), max(m.density or 0 for m in members)
        how = op.how if low == high else op.how.replace(f"{op.density:.3g}", f"{low:.3g} to {high:.3g}")
        name = op.name if len(members) == 1 else f"{op.name} …"
        weights = sum(m.weights for m in members)
        kept = sum(m.nnz for m in members) / weights if weights else op.density
        canvas.box(box, top, _BOX, height, fill, radius=5)
        canvas.box(box + 8, top + height - 5, _BOX - 16, 2, ink, opacity=0.25)
        canvas.box(box + 8, top + height - 5, max(2.0, (_BOX - 16) * min(1.0, kept)), 2, ink)
        canvas.text(box + 10, top + 16, _short(what, _BOX - 20, 12.5), ink, 12.5, bold=True)
        canvas.text(box + 10, top + 30, how, ink, 10.5)
        room = _BOX - 30 - 0.6 * 10.5 * len(how)
        name = _short(name, room, 10.5, keep_end=True)
        canvas.text(box + _BOX - 10, top + 30, name, ink, 10.5, anchor="end", opacity=0.8)
    line = placed.centre(i) + 4
    output, weights_at, macs_at, share_at = placed.columns
    canvas.text(output, line, shape_text(op.output), MUTED)
    if op.density is not None:
        canvas.text(weights_at, line, f"{sum(m.nnz for m in members):,}", anchor="end")
    if op.macs:
        canvas.text(macs_at, line, compact(sum(m.macs for m in members)), anchor="end")
    canvas.box(share_at, line - 9, max(0.8, 90 * share), 10, KERNEL_COLOURS.get(op.kernel, OTHER_KERNEL))
    canvas.text(share_at + max(0.8, 90 * share) + 6, line, f"{share:.1%}")
    canvas.end()


def _tooltip(members: Sequence[Operation]) -> str:
    lines = []
    for op in members[:12]:
        text = f"{op.name}: {' + '.join((op.what, *op.after))}"
        if op.density is not None:
            text += f", {op.how}, {op.nnz:,} weights"
        lines.append(text + (f", {digits(op.ms)} ms" if op.ms is not None else ""))
    return "\n".join(lines + ([f"and {len(members) - 12} more"] if len(members) > 12 else []))


def _header(canvas: Canvas, placed: _Placed, timed: bool) -> None:
    share = "share of time" if timed else "share of MACs"
    names = (("output", "start"), ("non-zeros", "end"), ("MACs", "end"), (share, "start"))
    for x, (name, anchor) in zip(placed.columns, names, strict=True):
        canvas.text(x, 16, name, MUTED, anchor=anchor)


def _frames(placed: _Placed) -> list[tuple[float, float, int]]:
    """(top, bottom, how often) of each repeated block."""
    frames = []
    for block in dict.fromkeys(row.block for row in placed.rows if row.block >= 0):
        inside = [i for i, row in enumerate(placed.rows) if row.block == block]
        bottom = placed.tops[inside[-1]] + placed.heights[inside[-1]] + 9
        frames.append((placed.tops[inside[0]] - 9, bottom, placed.rows[inside[0]].times))
    return frames


def _connections(canvas: Canvas, placed: _Placed, operations: Sequence[Operation]) -> None:
    """Arrows between neighbours that feed each other, and lines around what is skipped."""
    known = any(op.inputs for op in operations)
    for i in range(1, len(placed.rows)):
        k = placed.rows[i].members[0]
        if known and k not in operations[k].inputs:  # input number k is the result of operation k - 1
            continue
        canvas.line(
            ("M", (placed.middle, placed.tops[i - 1] + placed.heights[i - 1])),
            ("L", (placed.middle, placed.tops[i] - 4)),
        )
        canvas.arrow_down(placed.middle, placed.tops[i])
    for (start, end), lane in zip(placed.skips, placed.lanes, strict=True):
        x = placed.box - 16 - _LANE * (lane % _LANES)
        y0 = placed.centre(start) + 4 if start >= 0 else float(_HEAD)
        y1 = placed.centre(end) - 4
        right = placed.box + _edge(placed, end)
        canvas.line(
            ("M", (placed.box + _edge(placed, start), y0)),
            ("L", (x + 6, y0)),
            ("Q", (x, y0, x, y0 + 6)),
            ("L", (x, y1 - 6)),
            ("Q", (x, y1, x + 6, y1)),
            ("L", (right - 4, y1)),
        )
        canvas.arrow_right(right, y1)


def _edge(placed: _Placed, i: int) -> int:
    """Where the left edge of a row's box is, seen from the boxes with weights."""
    return _INSET if i >= 0 and placed.heights[i] == _LOW else 0


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


def _short(text: str, room: float, size: float, *, keep_end: bool = False) -> str:
    """The text, cut with an ellipsis where it does not fit."""
    most = int(room / (0.6 * size))
    if len(text) <= most:
        return text
    if most < 3:
        return ""
    return "…" + text[len(text) - most + 1 :] if keep_end else text[: most - 1] + "…"
