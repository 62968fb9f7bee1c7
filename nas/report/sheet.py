"""A small table for people: cells that are already text, and three ways to put it out (terminal, plain text, HTML).

`Sheet` holds no meaning; `nas.report.tables` fills it. A column has a rank: where the width does not suffice, columns of
the highest rank go first and a note says which, so that no number is ever cut.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column: its header, how it is aligned, and how soon it may be left out (rank 0: never)."""

    header: str
    right: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Sheet:
    """Rows of text under columns.

    Attributes:
        title: one line above.
        columns: one per cell of a row.
        rows: the texts; `styles[i]`, if given, is "", "good", "bad" or "dim" for row i.
        notes: lines below: units, what a mark means, what was left out.
        keys: sort keys per row for the HTML table (numbers behind the rounded texts); empty to sort by text.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    keys: tuple[tuple[float | str | None, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: expected {len(self.columns)} cells in a row, got {len(row)}: {row}")


_RICH_STYLES = {"good": "green", "bad": "red", "dim": "dim"}


def fit(sheet: Sheet, width: int, padding: int = 2) -> Sheet:
    """Leave out the columns that matter least until the rest fits into `width` characters; says so in a note."""
    kept = list(range(len(sheet.columns)))

    def needed() -> int:
        return sum(_column_width(sheet, i) + padding for i in kept) - padding

    dropped: list[int] = []
    while needed() > width:
        last = max(kept, key=lambda i: (sheet.columns[i].rank, i))
        if sheet.columns[last].rank == 0:
            break
        kept.remove(last)
        dropped.append(last)
    if not dropped:
        return sheet
    names = ", ".join(sheet.columns[i].header for i in sorted(dropped))
    return replace(
        sheet,
        columns=tuple(sheet.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in sheet.rows),
        notes=(*sheet.notes, f"not shown at this width: {names}"),
        keys=tuple(tuple(key[i] for i in kept) for key in sheet.keys),
    )


def to_rich(sheet: Sheet, width: int = 80) -> Group:
    """Title, table and notes for a terminal, no wider than `width`; texts are never read as markup."""
    fitted = fit(sheet, width)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        padding=(0, 1),
    )
    for column in fitted.columns:
        side: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(escape(column.header), justify=side, overflow="fold", no_wrap=column.right)  # only texts fold
    for i, row in enumerate(fitted.rows):
        style = fitted.styles[i] if i < len(fitted.styles) else ""
        table.add_row(*(escape(cell) for cell in row), style=_RICH_STYLES.get(style))
    title = [Text(fitted.title, style="bold")] if fitted.title else []
    return Group(*title, table, *(Text(note, style="dim") for note in fitted.notes))


def to_text(sheet: Sheet, width: int | None = None) -> str:
    """Plain text: no colour, no frame, two blanks between columns; every column unless `width` is given."""
    fitted = sheet if width is None else fit(sheet, width)
    widths = [_column_width(fitted, i) for i in range(len(fitted.columns))]

    def line(cells: Sequence[str]) -> str:
        parts = []
        for cell, column, size in zip(cells, fitted.columns, widths, strict=True):
            gap = " " * (size - text_width(cell))
            parts.append(gap + cell if column.right else cell + gap)
        return "  ".join(parts).rstrip()

    lines = [fitted.title] if fitted.title else []
    lines += [line([column.header for column in fitted.columns]), line(["-" * size for size in widths])]
    lines += [line(row) for row in fitted.rows]
    lines += list(fitted.notes)
    return "\n".join(lines) + "\n"


def print_sheet(sheet: Sheet, console: Console | None = None) -> None:
    """Print a sheet: a table where a person reads, plain text with every column where a program does."""
    console = console or Console()
    if console.is_terminal:
        console.print(to_rich(sheet, console.width))
    else:
        console.file.write(to_text(sheet))


def to_html(sheet: Sheet, *, sortable: bool = True, html_columns: frozenset[int] = frozenset()) -> str:
    """An HTML table; everything is escaped except the cells of `html_columns`, which already are HTML."""
    head = "".join(
        f'<th scope="col"{_class("n" if column.right else "")}>{html.escape(column.header)}</th>'
        for column in sheet.columns
    )
    body = []
    for i, row in enumerate(sheet.rows):
        cells = []
        for j, cell in enumerate(row):
            key = sheet.keys[i][j] if i < len(sheet.keys) else None
            sort = "" if key is None else f' data-s="{html.escape(str(key))}"'
            text = cell if j in html_columns else html.escape(cell)
            cells.append(f"<td{_class('n' if sheet.columns[j].right else '')}{sort}>{text}</td>")
        body.append(f"<tr{_class(sheet.styles[i] if i < len(sheet.styles) else '')}>{''.join(cells)}</tr>")
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in sheet.notes)
    caption = f"<caption>{html.escape(sheet.title)}</caption>" if sheet.title else ""
    kind = " sortable" if sortable and len(sheet.rows) > 1 else ""
    return (
        f'<div class=scroll><table class="sheet{kind}">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def text_width(text: str) -> int:
    """Columns a text takes in a terminal (East Asian wide characters take two, combining ones none)."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _column_width(sheet: Sheet, i: int) -> int:
    return max([text_width(sheet.columns[i].header), *(text_width(row[i]) for row in sheet.rows)])


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
