"""The picture of a profile: where the time goes, what the other kernel would take, what was predicted, and where dense wins.

Start with `draw_profile` and `save_profile`; the numbers come from `hw_models.profile`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from nas.errors import ConfigError, RunError
from nas.report.axes import tick
from nas.report.canvas import Canvas
from nas.report.plans import read_plan
from nas.report.profile_tables import crossover_text, fixed, gain_text
from nas.report.style import GRID, INK, KERNEL_COLOURS, MUTED, OTHER_KERNEL, PAPER
from nas.report.units import digits, interval, missing, shorten

if TYPE_CHECKING:
    from hw_models.profile import Profile

MAX_ROWS = 40
SMALL = 0.005
"""Operations without weights below this share are added up."""
CLIP = 5.0
"""Alternatives that take longer than this many times the longest operation are cut off, so that bars stay long enough to see."""

_LEFT, _BARS, _BARS_END, _MS, _SHARE, _GAIN, _STRIP, _STRIP_END, _WIDTH = 24, 290, 690, 756, 806, 862, 900, 1080, 1190
_ROW, _TOP, _FOOT = 32, 226, 86
_LEAST = 0.01  # the density at the left end of a strip
_DENSE, _SPARSE = KERNEL_COLOURS["torch"], KERNEL_COLOURS["specialised"]


@dataclass
class _Row:
    """One line of the picture; times in ms, None where not known."""

    name: str
    what: str
    parts: dict[str, float]  # by kernel
    share: float
    other: float | None = None  # on the other kind of kernel
    other_is_dense: bool = True
    predicted: tuple[float, float, float] | None = None
    density: float | None = None
    crossover: float | None = None
    hint: str = ""

    @property
    def ms(self) -> float:
        return sum(self.parts.values())


def draw_profile(profile: Profile, title: str) -> Canvas:
    """A profile as a drawing.

    On top the whole network, its time split by operation, above its dense twin. Below a line for each operation, in order of
    execution: a bar as long as its time, coloured by its kernel; dashed, what it would take on the other kind of kernel; a
    dot and a line, the prediction and its 90 % interval; at the right, how dense the layer is (dot) on a scale that changes
    colour where the dense kernel becomes the faster one.
    """
    rows = _rows(profile)
    canvas = Canvas(_WIDTH, _TOP + _ROW * max(1, len(rows)) + _FOOT)
    own = max((max(row.ms, row.predicted[0] if row.predicted else 0.0) for row in rows), default=0.0)
    most = max((max(row.other or 0.0, row.predicted[2] if row.predicted else 0.0) for row in rows), default=0.0)
    reach = max(own, min(most, CLIP * own)) or 1.0

    def at(ms: float) -> float:
        return _BARS + (_BARS_END - _BARS) * min(ms / reach, 1.0)

    total = sum(row.ms for row in rows)
    _head(canvas, profile, title)
    _whole(canvas, profile, rows)
    _axes(canvas, at, reach, len(rows), any(r.crossover is not None or r.density is not None for r in rows))
    for i, row in enumerate(rows):
        _line(canvas, row, total, _TOP + _ROW * i + _ROW / 2, at)
    if not rows:
        canvas.text(_BARS, _TOP + 20, "no operations", MUTED)
    _legend(canvas, profile, rows, _TOP + _ROW * max(1, len(rows)) + 40)
    return canvas


def check_suffix(path: str | Path) -> None:
    """Refuse a file that `save_profile` cannot write, before anything is measured.

    Raises:
        ConfigError: another suffix than .svg, .png or .pdf.
    """
    if Path(path).suffix.lower() not in (".svg", ".png", ".pdf"):
        raise ConfigError(f'{path}: expected a file name ending in .svg, .png or .pdf, got "{Path(path).suffix}"')


def save_profile(profile: Profile, path: str | Path, title: str) -> Path:
    """Draw a profile into an .svg, .png or .pdf file.

    Raises:
        ConfigError: another suffix.
        RunError: the file cannot be written.
    """
    try:
        return draw_profile(profile, title).save(path, title)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise RunError(f"{path}: the picture cannot be written: {error.strerror or error}") from error


def _rows(profile: Profile) -> list[_Row]:
    """A line per operation; those that hardly count are added up, and the smallest where there are too many."""
    timed = profile.measured is not None
    rows = []
    for op, r in zip(read_plan(profile.table), profile.table.to_dict("records"), strict=True):
        ms = _known(r["ms"] if timed else r["predicted_ms"]) or 0.0
        prefix = "" if timed else "predicted_"
        sparse_runs = op.kernel not in ("", "torch")
        row = _Row(
            op.name,
            op.what,
            {op.kernel: ms},
            _known(r["share"]) or 0.0,
            other=_known(r[f"{prefix}dense_ms" if sparse_runs else f"{prefix}sparse_ms"]) if op.kernel else None,
            other_is_dense=sparse_runs,
            density=op.density,
            crossover=_known(r["crossover_density"]),
        )
        if not missing(r["predicted_ms"]):
            row.predicted = (float(r["predicted_ms"]), float(r["predicted_lo_ms"]), float(r["predicted_hi_ms"]))
        row.hint = _hint(row, op.how, str(r["predicted_source"] or ""))
        rows.append(row)
    kept = [i for i, row in enumerate(rows) if row.density is not None or row.share >= SMALL]
    kept = sorted(sorted(kept, key=lambda i: -rows[i].share)[: MAX_ROWS - 1])
    rest = [row for i, row in enumerate(rows) if i not in set(kept)]
    if len(rest) == 1:
        return rows
    return [rows[i] for i in kept] + ([_added(rest)] if rest else [])


def _added(rows: Sequence[_Row]) -> _Row:
    parts: dict[str, float] = {}
    for row in rows:
        for kernel, ms in row.parts.items():
            parts[kernel] = parts.get(kernel, 0.0) + ms
    total = _Row(f"{len(rows)} smaller ones", "", parts, sum(row.share for row in rows))
    if all(row.predicted for row in rows):
        ms, lo, hi = (sum(row.predicted[k] for row in rows if row.predicted) for k in range(3))
        total.predicted = (ms, lo, hi)
    total.hint = "\n".join(f"{row.name}: {digits(row.ms)} ms" for row in rows[:24])
    return total


def _hint(row: _Row, how: str, source: str) -> str:
    text = f"{row.name}: {row.what}" + (f", {how}" if how else "") + f"\n{digits(row.ms)} ms, {row.share:.1%}"
    if row.other is not None:
        text += f"\n{'dense' if row.other_is_dense else 'sparse'} kernel: {digits(row.other)} ms"
    if row.predicted is not None:
        text += f"\npredicted: {interval(*row.predicted)} ms ({source})"
    if row.crossover is not None:
        text += f"\ndense is faster: {crossover_text(row.crossover)}"
    return text


def _head(canvas: Canvas, profile: Profile, title: str) -> None:
    canvas.text(_LEFT, 30, shorten(title, 90), size=15, bold=True)
    about = f"batch {profile.batch} · {profile.threads} thread{'s' if profile.threads > 1 else ''}"
    canvas.text(_WIDTH - _LEFT, 30, about, MUTED, anchor="end")
    canvas.text(_LEFT, 72, f"{digits(profile.ms)} ms", size=26, bold=True)
    lines = []
    if profile.measured is not None:
        m = profile.measured
        settled = "" if m.quality == "ok" else f", not settled ({m.quality})"
        lines.append(f"measured, 90 % interval {_span(m.lo_ms, m.hi_ms)} ms{settled}")
    if profile.predicted is not None:
        p = profile.predicted
        lines.append(f"predicted {digits(p.ms)} ms, 90 % interval {_span(p.lo_ms, p.hi_ms)} ms ({p.source})")
    for i, text in enumerate(lines):
        canvas.text(_LEFT + 170, 58 + 17 * i, text, size=12)
    if math.isfinite(profile.gain):
        canvas.text(_WIDTH - _LEFT, 60, gain_text(profile.gain), size=15, bold=True, anchor="end")
        canvas.text(_WIDTH - _LEFT, 77, "compared with all layers dense", MUTED, anchor="end")


def _whole(canvas: Canvas, profile: Profile, rows: Sequence[_Row]) -> None:
    """The network and the same all dense on one scale, and below where the network's time goes, as wide as the page."""
    dense = profile.dense.floor_ms if profile.dense is not None else None
    if dense is None and profile.predicted_dense is not None:
        dense = profile.predicted_dense.ms
    estimates = [e for e in (profile.predicted, profile.predicted_dense) if e is not None]
    left, right, reach = _BARS, _STRIP_END, max([profile.ms, dense or 0.0, *(e.hi_ms for e in estimates)])

    def at(ms: float) -> float:
        return left + (right - left) * (ms / reach if reach > 0 else 0.0)

    for y, name, ms, colour, estimate in (
        (98, "this network", profile.ms, INK, profile.predicted),
        (124, "all layers dense", dense, _DENSE, profile.predicted_dense),
    ):
        if ms is None:
            continue
        canvas.text(left - 12, y + 9, name, anchor="end", size=11.5)
        canvas.box(left, y, at(ms) - left, 10, colour)
        end = at(max(ms, estimate.hi_ms)) if estimate is not None else at(ms)
        if estimate is not None:
            _whisker(canvas, at, estimate.ms, estimate.lo_ms, estimate.hi_ms, y + 15)
        canvas.text(end + 8, y + 10, f"{digits(ms)} ms", size=11)
    canvas.text(left - 12, 169, "where its time goes", anchor="end", size=11.5)
    total, x = sum(row.ms for row in rows), float(left)
    rest = max(0.0, profile.ms - total) if profile.measured is not None else 0.0
    total = total + rest or 1.0
    for row in rows:
        for kernel, ms in row.parts.items():
            width = (right - left) * ms / total
            canvas.begin(row.hint)
            canvas.box(x, 154, max(0.0, width - (1 if width > 3 else 0)), 22, _colour(kernel))
            name = row.name if width > 6.4 * len(row.name) + 8 else f"{ms / total:.0%}"
            if width > 6.4 * len(name) + 8:
                canvas.text(x + width / 2, 169, name, INK if kernel == "portable" else PAPER, 10.5, anchor="middle")
            canvas.end()
            x += width
    if rest / total >= 0.01:
        canvas.begin(f"the call itself, outside of all operations\n{digits(rest)} ms")
        canvas.box(x, 154, right - x, 22, GRID)
        if right - x > 30:
            canvas.text((x + right) / 2, 169, "call", MUTED, 10.5, anchor="middle")
        canvas.end()


def _axes(canvas: Canvas, at: Callable[[float], float], reach: float, count: int, strips: bool) -> None:
    """Headers, and faint lines behind the rows."""
    top, bottom, label = _TOP, _TOP + _ROW * max(1, count), _TOP - 8
    for value in MaxNLocator(5).tick_values(0.0, reach):
        if 0 <= value <= reach * 1.0001:
            canvas.line(("M", (at(value), top)), ("L", (at(value), bottom)), stroke=GRID)
            canvas.text(at(value), label, tick(round(value, 9)), MUTED, 10, anchor="middle")
    canvas.text(_BARS - 12, label, "time in ms", MUTED, 10, anchor="end")
    for x, text in ((_MS, "ms"), (_SHARE, "share"), (_GAIN, "vs dense")):
        canvas.text(x, label, text, MUTED, 10, anchor="end")
    if strips:
        for density in (0.01, 0.03, 0.1, 0.3, 1.0):
            canvas.text(_place(density), label, f"{density:g}", MUTED, 10, anchor="middle")
        canvas.text(_STRIP_END + 16, label, "dense faster", MUTED, 10)
        canvas.text((_STRIP + _STRIP_END) / 2, label - 15, "density", MUTED, 10, anchor="middle")


def _line(canvas: Canvas, row: _Row, total: float, y: float, at: Callable[[float], float]) -> None:
    canvas.begin(row.hint)
    canvas.box(_LEFT, y - _ROW / 2, _WIDTH - 2 * _LEFT, _ROW, PAPER, opacity=0.0)  # the hint shows all along the line
    canvas.text(_LEFT, y - 1 if row.what else y + 4, shorten(row.name, 38), size=11.5)
    if row.what and not row.name.endswith(row.what):
        canvas.text(_LEFT, y + 11, row.what, MUTED, 9.5)
    x = float(_BARS)
    for kernel, ms in row.parts.items():
        width = max(0.0, at(ms) - _BARS)
        canvas.box(x, y - 8, width, 10, _colour(kernel))
        x += width
    if row.other is not None:
        colour = _DENSE if row.other_is_dense else _SPARSE
        canvas.box(_BARS, y - 11, max(1.0, at(row.other) - _BARS), 16, stroke=colour, dashed=True)
        if at(row.other) >= _BARS_END and row.other > row.ms:  # perhaps cut off: say how long it is
            canvas.text(_BARS_END - 4, y + 1, f"{fixed(row.other, total)} ›", colour, 10, anchor="end")
    if row.predicted is not None:
        _whisker(canvas, at, *row.predicted, y + 10)
    canvas.text(_MS, y + 4, fixed(row.ms, total), anchor="end")
    canvas.text(_SHARE, y + 4, f"{row.share:.1%}", anchor="end", bold=row.share >= 0.1)
    if row.other is not None and row.other_is_dense and row.ms > 0:
        gain = row.other / row.ms
        canvas.text(_GAIN, y + 4, f"{digits(gain, 2)}×", INK if gain >= 1 else _SPARSE, anchor="end", bold=gain < 1)
    if row.density is not None:
        _strip(canvas, row, y)
    canvas.end()


def _strip(canvas: Canvas, row: _Row, y: float) -> None:
    """The scale of densities: orange where sparse is faster, blue where dense is; the layer is the dot."""
    end = _STRIP_END
    if row.crossover is None:
        canvas.box(_STRIP, y - 4, end - _STRIP, 8, GRID)
    else:
        cross = _STRIP if row.crossover <= 0 else _place(row.crossover)
        canvas.box(_STRIP, y - 4, cross - _STRIP, 8, _SPARSE, opacity=0.3)
        canvas.box(cross, y - 4, end - cross, 8, _DENSE, opacity=0.3)
        if 0 < row.crossover < 1:
            canvas.line(("M", (cross, y - 7)), ("L", (cross, y + 7)), stroke=INK, width=1.4)
        canvas.text(end + 16, y + 4, crossover_text(row.crossover), MUTED, 10.5)
    kernel = next(iter(row.parts))
    canvas.box(_place(row.density or 1.0) - 5, y - 5, 10, 10, _colour(kernel), radius=5, stroke=PAPER)


def _whisker(
    canvas: Canvas, at: Callable[[float], float], ms: float, lo: float, hi: float, y: float, stroke: str = INK
) -> None:
    left, right = at(max(lo, 0.0)), at(hi)
    canvas.line(("M", (left, y)), ("L", (right, y)), stroke=stroke, width=1.2)
    for x in (left, right):
        canvas.line(("M", (x, y - 2.5)), ("L", (x, y + 2.5)), stroke=stroke, width=1.2)
    canvas.box(at(ms) - 2.5, y - 2.5, 5, 5, stroke, radius=2.5)


def _legend(canvas: Canvas, profile: Profile, rows: Sequence[_Row], y: float) -> None:
    """What colours and marks mean: kernels in the first line, marks in the second; who says so in the third."""
    names = {
        "torch": "dense kernel (torch)",
        "portable": "portable sparse kernel",
        "specialised": "specialised sparse kernel",
        "": "no choice of kernel",
    }
    x = float(_LEFT)
    for kernel in (kernel for kernel in names if any(kernel in row.parts for row in rows)):
        canvas.box(x, y - 9, 14, 10, _colour(kernel))
        canvas.text(x + 19, y, names[kernel], size=10.5)
        x += 40 + 6.2 * len(names[kernel])
    x, second = float(_LEFT), y + 18
    for colour, dense in ((_DENSE, True), (_SPARSE, False)):
        if any(row.other is not None and row.other_is_dense is dense for row in rows):
            text = f"time on the {'dense' if dense else 'sparse'} kernel instead"
            canvas.box(x, second - 9, 14, 10, stroke=colour, dashed=True)
            canvas.text(x + 19, second, text, size=10.5)
            x += 40 + 6.2 * len(text)
    if profile.predicted is not None:
        _whisker(canvas, lambda ms: x + ms, 9, 0, 18, second - 4)
        canvas.text(x + 24, second, "predicted, with 90 % interval", size=10.5)
    if any(row.crossover is not None for row in rows):
        canvas.box(_STRIP, y - 8, 14, 8, _SPARSE, opacity=0.3)
        canvas.text(_STRIP + 19, y, "sparse is faster", size=10.5)
        canvas.box(_STRIP + 124, y - 8, 14, 8, _DENSE, opacity=0.3)
        canvas.text(_STRIP + 143, y, "dense is faster", size=10.5)
        canvas.box(_STRIP + 2, second - 9, 10, 10, MUTED, radius=5)
        canvas.text(_STRIP + 19, second, "density of the layer", size=10.5)
    elif any(row.density is not None for row in rows):
        canvas.text(_STRIP, y, "where dense is faster: not known", MUTED, 10.5)
    foot = "Every operation timed in its place in the running network, changes of layout included."
    canvas.text(_LEFT, second + 20, foot if profile.measured is not None else "Nothing was measured.", MUTED, 10.5)
    if profile.model:
        text = f"predicted by {shorten(profile.model, 80)}"
        canvas.text(_WIDTH - _LEFT, second + 20, text, MUTED, 10.5, anchor="end")


def _colour(kernel: str) -> str:
    return KERNEL_COLOURS.get(kernel, OTHER_KERNEL)


def _place(density: float) -> float:
    """Where a density stands on the strips."""
    part = 1 - math.log(max(min(density, 1.0), _LEAST)) / math.log(_LEAST)
    return _STRIP + (_STRIP_END - _STRIP) * part


def _span(lo: float, hi: float) -> str:
    return f"{digits(lo)} to {digits(hi)}"


def _known(value: Any) -> float | None:
    return None if missing(value) else float(value)
