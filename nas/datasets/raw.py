"""What every reader returns: the numbers of a data set as they were found, before any split or normalisation.

Start with `Raw`; `encode` turns the labels into class codes and refuses what no classifier can be trained on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nas.errors import DataError

MAX_IMAGE_SIZE = 4096
"""Largest height and width that images are resized to."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that belong together.

    Attributes:
        x: images `uint8|float[n, c, h, w]` or table rows `float[n, f]`.
        y: one label per row, `[n]`: integers or strings; codes 0..k-1 where `Raw.class_names` is given.
    """

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set as read.

    Attributes:
        name: short name for tables and reports.
        where: the file or folder, for error messages.
        train: the rows to learn from; `val` and `test` are cut from it where the source has none.
        class_names: the names of the codes in `y`; None where `y` holds the labels themselves (see `encode`).
        scale: the numbers are divided by this (255 for byte images).
    """

    name: str
    where: str
    train: Part
    val: Part | None = None
    test: Part | None = None
    class_names: tuple[str, ...] | None = None
    scale: float = 1.0

    def parts(self) -> dict[str, Part]:
        """The parts that exist, by name."""
        every = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}


def as_images(x: np.ndarray, where: str) -> np.ndarray:
    """Give images their channel axis: `[n, h, w]` becomes `[n, 1, h, w]`, `[n, h, w, c]` becomes `[n, c, h, w]`.

    Of four axes the one of length 1, 3 or 4 is the channels; if both or neither are, the second (torch's order) is.

    Raises:
        DataError: other than three or four axes.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise DataError(
            f"{where}: expected rows [n, features] or images [n, h, w], [n, c, h, w] or [n, h, w, c], "
            f"found an array of shape {list(x.shape)}. Reshape it."
        )
    if x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return x.transpose(0, 3, 1, 2)
    return x


def memory_bytes() -> int:
    """Bytes of memory this machine has; 64 GiB where the system does not say."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**36


def check_resized(
    rows: int, channels: int, size: tuple[int, int], itemsize: int, where: str, memory: int | None = None
) -> None:
    """Refuse to resize images to more bytes than the machine has memory.

    Args:
        rows: number of images.
        channels: of each.
        size: height and width they are to have.
        itemsize: bytes per number.
        where: what to name in the message.
        memory: bytes there are; None for this machine's.

    Raises:
        DataError: they cannot fit.
    """
    needed = rows * channels * size[0] * size[1] * itemsize
    memory = memory_bytes() if memory is None else memory
    if needed > memory:
        raise DataError(
            f"{where}: {rows} images of {size[0]} x {size[1]} pixels need {needed / 2**30:.0f} GiB of memory, this machine has "
            f"{memory / 2**30:.0f}. Lower image_size."
        )


def image_scale(x: np.ndarray) -> float:
    """255 for bytes (pixels then lie in 0..1), 1 for everything else."""
    return 255.0 if x.dtype == np.uint8 else 1.0


def check_numbers(x: np.ndarray, where: str) -> None:
    """Refuse NaN, infinities and anything that is not a number; the message gives the first index."""
    if x.dtype.kind not in "buif":
        raise DataError(
            f"{where}: expected numbers, found {x.dtype}. Convert the array, e.g. with x.astype('float32')."
        )
    if x.dtype.kind != "f":
        return
    finite = np.isfinite(x)
    if not finite.all():
        first = np.unravel_index(int(np.argmin(finite)), x.shape)
        position = ", ".join(str(int(i)) for i in first)
        raise DataError(
            f"{where}: expected finite numbers, found {x[first]} at [{position}] "
            f"({int((~finite).sum())} such values). Fill the gaps or drop those rows."
        )


def check_labels(y: np.ndarray, rows: int, where: str) -> np.ndarray:
    """Labels as a one-dimensional array of integers or strings.

    Args:
        y: `[n]` or `[n, 1]`; floats are accepted if they are whole numbers.
        rows: the number of rows of x.
        where: file and name of the labels.

    Raises:
        DataError: another shape (one-hot among them), a missing label, fractions, a different number of rows.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(
            f"{where}: expected one label per row, shape [n], found {list(y.shape)}. One-hot labels: use y.argmax(axis=1)."
        )
    if len(y) != rows:
        raise DataError(f"{where}: expected {rows} labels, one per row of x, found {len(y)}.")
    if y.dtype.kind == "f":
        missing = ~np.isfinite(y)
        if missing.any():
            raise DataError(
                f"{where}: the label of row {int(np.argmax(missing))} is missing. Drop that row or label it."
            )
        broken = y != np.round(y)
        if broken.any():
            first = int(np.argmax(broken))
            raise DataError(
                f"{where}: expected class labels (whole numbers or text), found {y[first]} in row {first}. "
                "This looks like a regression target; only classification is supported."
            )
        return y.astype(np.int64)
    if y.dtype.kind not in "biuUST":
        raise DataError(f"{where}: expected integer or text labels, found {y.dtype}.")
    return y.astype(np.int64) if y.dtype.kind in "biu" else y.astype(str)


def encode(raw: Raw) -> Raw:
    """Labels to codes 0..k-1 in sorted order, and the checks every data set must pass.

    Returns:
        The same set with `y` int64 codes and `class_names` filled.

    Raises:
        DataError: fewer than two classes, or a class with fewer than two rows to train on; names it.
    """
    parts = raw.parts()
    for name, part in parts.items():
        if len(part.x) == 0:
            raise DataError(f"{raw.where}: the {name} part is empty; expected at least one row.")
    names = raw.class_names
    if names is None:
        values = np.unique(np.concatenate([part.y for part in parts.values()]))
        parts = {name: Part(part.x, np.searchsorted(values, part.y)) for name, part in parts.items()}
        names = tuple(str(value) for value in values)
    if len(names) < 2:
        found = f'only "{names[0]}"' if names else "none"
        raise DataError(
            f"{raw.where}: expected at least two classes, found {found}. A classifier needs a choice to make."
        )
    counts = np.bincount(parts["train"].y.astype(np.int64), minlength=len(names))
    poor = np.flatnonzero(counts < 2)
    if len(poor):
        listed = ", ".join(f'"{names[i]}" has {counts[i]}' for i in poor[:5]) + (" ..." if len(poor) > 5 else "")
        raise DataError(
            f"{raw.where}: every class needs at least 2 rows to train on (one of them for validation), but class {listed} "
            f"({len(poor)} of {len(names)} classes). Add rows, drop the class, or check which column holds the label."
        )
    fields: dict[str, Any] = {name: Part(part.x, part.y.astype(np.int64)) for name, part in parts.items()}
    return replace(raw, class_names=names, **fields)
