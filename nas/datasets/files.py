"""Bytes from files that may be compressed, with errors that name the file.

Start with `read_bytes` and `find`. Pickles are never opened: reading one runs whatever code its author put there.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path

from nas.errors import DataError

COMPRESSIONS = ("", ".gz", ".xz", ".bz2")
"""File endings that are unpacked on the way in."""

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt")
"""Endings of formats that execute code when read."""


def find(folder: Path, stem: str) -> Path | None:
    """The file `stem` in `folder`, plain or compressed, or None."""
    for ending in COMPRESSIONS:
        path = folder / (stem + ending)
        if path.is_file():
            return path
    return None


def read_bytes(path: Path) -> bytes:
    """The unpacked content of a file.

    Raises:
        DataError: missing, unreadable, truncated or corrupt; names the file.
    """
    try:
        packed = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(packed)
        if path.suffix == ".xz":
            return lzma.decompress(packed)
        if path.suffix == ".bz2":
            return bz2.decompress(packed)
        return packed
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
        raise DataError(
            f"{path}: expected a complete {path.suffix[1:]} file, found a truncated or corrupt one ({error}). "
            "Copy or download it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def refuse_pickle(path: Path) -> None:
    """Raise for files whose format runs code when read."""
    if path.suffix.lower() in PICKLES:
        raise DataError(
            f"{path}: {path.suffix} files are pickles and run code when read, so they are never opened. Save the arrays with "
            "numpy.savez(file, x_train=..., y_train=..., x_test=..., y_test=...) and give the .npz file."
        )
