"""Pickles of strangers, opened without running anything: `load_pickle(path)`.

Only containers, numbers, text and numpy arrays are built; a file that names anything else is refused before it is called.
PyTorch files go through torch's own restricted reader.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from hw_models.importers.table import TableFormatError, first_bytes

__all__ = ["is_pickle", "is_torch", "load_pickle", "load_torch"]

_PLAIN = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("builtins", "range"),
    ("builtins", "slice"),
    ("__builtin__", "set"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _Allowed(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise TableFormatError(
                f"this pickle wants to run {module}.{name}, which a table of numbers does not need; it was not opened. "
                "Convert it to JSON, CSV or NPZ where you trust it"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_pickle(path: Path) -> Any:
    """The object in a pickle.

    Raises:
        TableFormatError: it is no pickle, damaged, or names something that is not a container, number, text or array.
    """
    data = path.read_bytes()
    first: Exception | None = None
    for encoding in ("ASCII", "latin1"):  # the second for files of Python 2
        try:
            return _Allowed(io.BytesIO(data), encoding=encoding).load()
        except TableFormatError:
            raise
        except Exception as error:
            first = first or error
    raise TableFormatError(f"{path.name} is no pickle that can be read: {first}") from first


def load_torch(path: Path) -> Any:
    """The object in a file of torch.save: tensors, containers, numbers.

    Raises:
        TableFormatError: it is no such file, or holds something else.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not is_torch(path):
            return load_pickle(path)
        raise TableFormatError(f"{path.name} cannot be read as a file of torch.save: {error}") from error


def is_torch(path: Path) -> bool:
    """Is this a file of torch.save (a zip archive, or the older form)?"""
    head = first_bytes(path, 32)
    return zipfile.is_zipfile(path) or b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." in head


def is_pickle(head: bytes) -> bool:
    """Does it begin like a pickle of protocol 2 or later, or end up as one of protocol 0?"""
    return head[:1] == b"\x80" or head[:3] in (b"(dp", b"(lp", b"cco")
