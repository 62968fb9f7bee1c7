"""CSV and TSV tables, plain or compressed, through pandas. Start with `read_table`.

The first line names the columns. The label is the column asked for, else the one named target, label or class if there is
exactly one such, else the last. Text columns become one 0/1 column per value, values in sorted order; booleans become 0/1.
Gaps are refused, with row and column: what to put there is a decision about the data.
"""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nas.datasets.raw import Part, Raw, check_labels
from nas.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("target", "label", "class")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
MAX_VALUES = 256
"""A text column with more distinct values than this is taken for an identifier and refused."""


def separator(path: Path) -> str | None:
    """The separator that the file's ending stands for, or None if it is no table."""
    stem = path.name.lower()
    for ending in (".gz", ".xz", ".bz2"):
        stem = stem.removesuffix(ending)
    return SEPARATORS.get(Path(stem).suffix)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    sep = separator(path)
    if sep is None:
        raise DataError(f"{path}: expected a table (.csv, .tsv, also .gz, .xz, .bz2).")
    try:
        head = pd.read_csv(path, sep=sep, header=None, nrows=1, dtype=str, keep_default_na=False)
        names = [str(name) for name in head.iloc[0]]
        fractions = any(_is_number(name) and not name.strip().isdigit() for name in names)
        numbers = all(_is_number(name) for name in names)
        if fractions or (numbers and len(set(names)) < len(names)):
            raise DataError(
                f"{path}: expected column names in the first line, found data ({', '.join(names[:6])} ...). Add a header line."
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f'{path}: two columns are named "{repeated[0]}". Give every column its own name.')
        frame = pd.read_csv(path, sep=sep, skipinitialspace=True, low_memory=False)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise DataError(
            f"{path}: cannot be read as a table ({error}). Check the separator and that the file is complete."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path}: the rows have more fields than the header has names. Name every column.")
    if frame.shape[1] < 2:
        raise DataError(
            f"{path}: expected at least one input column and a label, separated by {sep!r}, found the single column "
            f'"{frame.columns[0]}". Is another separator in use?'
        )
    return frame


def _refuse_gaps(frame: pd.DataFrame, path: Path) -> None:
    for column in frame.columns:
        values = frame[column]
        gaps = values.isna().to_numpy()
        found = "a gap (NaN)"
        if not gaps.any() and values.dtype.kind == "f":
            gaps = ~np.isfinite(values.to_numpy())
            found = "an infinity"
        if gaps.any():
            row = int(np.argmax(gaps))
            raise DataError(
                f'{path}: {found} in row {row + 1} (line {row + 2} of the file), column "{column}"; {int(gaps.sum())} in this '
                "column. Fill the gaps or drop those rows; text that pandas reads as missing (NA, None, null) needs another word."
            )


def _label_column(frame: pd.DataFrame, label: str | None, path: Path) -> str:
    columns = [str(column) for column in frame.columns]
    if label is not None:
        if label not in columns:
            listed = ", ".join(columns[:20]) + (" ..." if len(columns) > 20 else "")
            raise DataError(f'{path}: no column "{label}" to use as the label; columns: {listed}.')
        return label
    named = [column for column in columns if column.lower() in LABELS]
    return named[0] if len(named) == 1 else columns[-1]


def _features(frame: pd.DataFrame, path: Path) -> np.ndarray:
    """float64[n, f]: numbers as they are, text one-hot."""
    columns: list[np.ndarray] = []
    for name in frame.columns:
        values = frame[name]
        if values.dtype.kind in "buif":
            columns.append(values.to_numpy(dtype=np.float64)[:, None])
            continue
        text = values.astype(str).to_numpy(dtype=str)
        distinct, codes = np.unique(text, return_inverse=True)
        if len(distinct) > MAX_VALUES:
            raise DataError(
                f'{path}: text column "{name}" has {len(distinct)} different values (at most {MAX_VALUES} are one-hot coded); '
                "it looks like an identifier or free text. Drop it or turn it into numbers."
            )
        columns.append((codes[:, None] == np.arange(len(distinct))).astype(np.float64))
    return np.concatenate(columns, axis=1)


def read_table(path: Path, label: str | None = None, test: Path | None = None) -> Raw:
    """Read a table, with a second one of the same columns as test part if given.

    Args:
        path: .csv or .tsv, also .gz, .xz, .bz2.
        label: name of the label column.
        test: a second table.

    Raises:
        DataError: unreadable, gaps (row and column), unknown label column, columns that differ between the two.
    """
    import pandas as pd

    frame = _read(path)
    _refuse_gaps(frame, path)
    rows = len(frame)
    column = _label_column(frame, label, path)
    if test is not None:
        other = _read(test)
        _refuse_gaps(other, test)
        if set(other.columns) != set(frame.columns):
            differing = sorted(map(str, set(other.columns) ^ set(frame.columns)))
            raise DataError(
                f"{test}: expected the columns of {path}; these are in only one of the two: {', '.join(differing[:10])}."
            )
        frame = pd.concat([frame, other[frame.columns]], ignore_index=True)
    x = _features(frame.drop(columns=[column]), path)
    labels = frame[column]
    y = labels.to_numpy() if labels.dtype.kind in "buif" else labels.astype(str).to_numpy(dtype=str)
    y = check_labels(y, len(frame), f'{path}: column "{column}"')
    name = path.name.split(".")[0]
    test_part = None if test is None else Part(x[rows:], y[rows:])
    return Raw(name, str(path), Part(x[:rows], y[:rows]), test=test_part)
