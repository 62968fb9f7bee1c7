"""Small files in the formats that `nas.data` reads, and where the real sets are (if they are)."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest


def real_data(folder: str) -> Path:
    """The folder of a real data set: below NAS_DATA, else in `shared/data` beside the project; skips where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("NAS_DATA", beside))
    if not (root / folder).is_dir():
        pytest.skip(f"needs the real {folder} files: set NAS_DATA to the folder that holds them")
    return root / folder


def idx_bytes(array: np.ndarray) -> bytes:
    """An unsigned-byte idx file."""
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx_set(folder: Path, train: int = 40, test: int = 20, pixels: int = 6, ending: str = ".gz") -> None:
    """A set of `train` + `test` images whose every pixel is ten times the class, classes 0..3."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in (("train", train), ("t10k", test)):
        y = np.arange(rows) % 4
        x = np.broadcast_to((10 * y)[:, None, None], (rows, pixels, pixels))
        for kind, array in (("images-idx3-ubyte", x), ("labels-idx1-ubyte", y)):
            data = idx_bytes(array)
            (folder / f"{stem}-{kind}{ending}").write_bytes(gzip.compress(data) if ending == ".gz" else data)


def cifar_records(rows: int, label_bytes: int, seed: int = 0) -> bytes:
    """Records whose labels count up (coarse = fine % 20 for two label bytes) and whose pixels are random."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % (10 if label_bytes == 1 else 100)
    columns = [labels[:, None]] if label_bytes == 1 else [labels[:, None] % 20, labels[:, None]]
    pixels = rng.integers(0, 256, (rows, 3072))
    return np.concatenate([*columns, pixels], axis=1).astype(np.uint8).tobytes()
