"""CIFAR-10 and CIFAR-100 in their original binary version, plain or compressed (.bin, .bin.xz, .bin.gz, .bin.bz2).

Start with `read_cifar10` and `read_cifar100`. The "python version" of these sets is pickled and is not read.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; a record is one label byte (CIFAR-100:
a coarse and a fine one), then 3 x 32 x 32 bytes, red plane first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nas.datasets.files import find, read_bytes
from nas.datasets.raw import Part, Raw
from nas.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR100_FILES = {"train": ["train.bin"], "test": ["test.bin"]}
PIXELS = 3 * 32 * 32


def present(folder: Path, files: dict[str, list[str]]) -> bool:
    """Whether the folder holds the first training file."""
    return find(folder, files["train"][0]) is not None


def missing(folder: Path, files: dict[str, list[str]]) -> list[str]:
    """The file names that are not there."""
    return [stem for stems in files.values() for stem in stems if find(folder, stem) is None]


def _records(folder: Path, stems: list[str], label_bytes: int) -> np.ndarray:
    """uint8[n, label_bytes + 3072] of the given files, in order."""

    def read(stem: str) -> np.ndarray:
        path = find(folder, stem)
        if path is None:
            python = (folder / stem.removesuffix(".bin")).is_file()
            hint = (
                " The folder holds the pickled python version, which is never read: get the binary version."
                if python
                else ""
            )
            raise DataError(f"{folder}: expected {stem} (plain, .xz, .gz or .bz2), found no such file.{hint}")
        data = read_bytes(path)
        size = label_bytes + PIXELS
        if not data or len(data) % size:
            raise DataError(
                f"{path}: expected a multiple of {size} bytes ({label_bytes} label + {PIXELS} pixels per image), found "
                f"{len(data)}. The file is cut off or another format; copy or download it again."
            )
        return np.frombuffer(data, np.uint8).reshape(-1, size)

    with ThreadPoolExecutor(max_workers=4) as pool:  # unpacking xz leaves the interpreter lock
        return np.concatenate(list(pool.map(read, stems)))


def _part(records: np.ndarray, label: int, label_bytes: int, classes: int, where: str) -> Part:
    labels = records[:, label].astype(np.int64)
    if labels.max() >= classes:
        first = int(np.argmax(labels >= classes))
        raise DataError(
            f"{where}: expected labels 0..{classes - 1}, found {labels[first]} in image {first}. Not this data set?"
        )
    return Part(records[:, label_bytes:].reshape(-1, 3, 32, 32), labels)


def _names(folder: Path, file: str, classes: int) -> tuple[str, ...]:
    path = folder / file
    names = tuple(path.read_text().split()) if path.is_file() else ()
    return names if len(names) == classes else tuple(str(i) for i in range(classes))


def read_cifar10(folder: Path) -> Raw:
    """`data_batch_1.bin` .. `data_batch_5.bin` and `test_batch.bin`."""
    parts = {
        part: _part(_records(folder, stems, 1), 0, 1, 10, f"{folder} ({part})") for part, stems in CIFAR10_FILES.items()
    }
    return Raw("cifar10", str(folder), parts["train"], test=parts["test"], class_names=CIFAR10_CLASSES, scale=255.0)


def read_cifar100(folder: Path, label: str | None = None) -> Raw:
    """`train.bin` and `test.bin`, with class names from `fine_label_names.txt` / `coarse_label_names.txt` if they are there.

    Args:
        folder: where the files lie.
        label: "fine" (default): 100 classes; "coarse": 20 superclasses.
    """
    kinds = {"coarse": (0, 20), "fine": (1, 100)}
    if label is not None and label not in kinds:
        raise DataError(f'cifar100: label must be "fine" (100 classes) or "coarse" (20), found "{label}".')
    kind = label or "fine"
    column, classes = kinds[kind]
    parts = {
        part: _part(_records(folder, stems, 2), column, 2, classes, f"{folder} ({part})")
        for part, stems in CIFAR100_FILES.items()
    }
    names = _names(folder, f"{kind}_label_names.txt", classes)
    name = "cifar100" if kind == "fine" else "cifar100_coarse"
    return Raw(name, str(folder), parts["train"], test=parts["test"], class_names=names, scale=255.0)
