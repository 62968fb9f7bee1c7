"""`.npz` archives of numpy arrays. Start with `read_npz`. Archives with pickled objects are refused.

Accepted names, upper or lower case: the inputs `x`, `data`, `images`, `features`; the labels `y`, `label`, `labels`,
`target`, `targets`, `class`; for archives that are split already, the same with `train`, `val` (or `valid`, `validation`)
or `test` before or after: `x_train`, `train_images`, ... Inputs are `[n, features]` or images (`raw.as_images`); bytes with
three or four axes are taken as pixels and divided by 255.
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

import numpy as np

from nas.datasets.raw import Part, Raw, as_images, check_labels, check_numbers, image_scale
from nas.errors import DataError

INPUTS = ("x", "data", "images", "features")
LABELS = ("y", "label", "labels", "target", "targets", "class")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def _find(names: dict[str, str], bases: tuple[str, ...], words: tuple[str, ...]) -> str | None:
    for base in bases:
        for word in words:
            for key in (f"{base}_{word}", f"{word}_{base}") if word else (base,):
                if key in names:
                    return names[key]
    return None


def read_npz(path: Path, label: str | None = None) -> Raw:
    """Read an archive.

    Args:
        path: the .npz file.
        label: base name of the labels, e.g. "coarse" for `coarse_train` and `coarse_test`; None: one of the accepted names.

    Raises:
        DataError: corrupt, pickled, or without arrays of the accepted names; names what it found.
    """
    labels = LABELS if label is None else (label.lower(),)
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an .npz archive with x and y, found a single array.")
            names = {key.lower(): key for key in archive.files}
            keys: dict[str, tuple[str, str]] = {}
            for part, words in {**PARTS, "all": ("",)}.items():
                x, y = _find(names, INPUTS, words), _find(names, labels, words)
                if x is not None and y is not None:
                    keys[part] = (x, y)
            if "train" not in keys and "all" not in keys:
                wanted = "x_train, y_train, x_test, y_test or x, y"
                if label is not None:
                    wanted = f"x_train, {label}_train, x_test, {label}_test or x, {label}"
                found = ", ".join(f"{key}" for key in archive.files) or "nothing"
                raise DataError(f"{path}: expected arrays named {wanted}, found {found}. Rename them with numpy.savez.")
            if "train" not in keys:
                keys = {"train": keys["all"]}
            loaded = {part: (archive[x], archive[y]) for part, (x, y) in keys.items() if part != "all"}
    except DataError:
        raise
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise DataError(
                f"{path}: holds Python objects (a pickle), which run code when read and are never opened. Save plain arrays, "
                "e.g. y.astype(str) instead of an object array."
            ) from error
        raise DataError(f"{path}: cannot be read as an .npz archive ({error}).") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{path}: expected a complete .npz archive, found an unreadable one ({error}). Write or copy it again."
        ) from error

    parts: dict[str, Part] = {}
    for part, (inputs, targets) in loaded.items():
        x_key, y_key = keys[part]
        where = f"{path}: {x_key}"
        check_numbers(inputs, where)
        rows = inputs.astype(np.float64) if inputs.ndim == 2 else as_images(inputs, where)
        parts[part] = Part(rows, check_labels(targets, len(rows), f"{path}: {y_key}"))
    first = parts["train"].x
    for part, given in parts.items():
        if given.x.shape[1:] != first.shape[1:] or given.x.dtype != first.dtype:
            raise DataError(
                f"{path}: {keys[part][0]} has rows of {given.x.dtype}{list(given.x.shape[1:])}, {keys['train'][0]} of "
                f"{first.dtype}{list(first.shape[1:])}; they must agree."
            )
    scale = image_scale(first)
    return Raw(path.stem, str(path), parts["train"], parts.get("val"), parts.get("test"), scale=scale)
