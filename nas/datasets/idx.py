"""The idx format of MNIST and its descendants (Fashion-MNIST, KMNIST, ...): plain, .gz, .xz or .bz2.

Start with `read_folder`; `parse` reads one file.

Source: the format description on Y. LeCun's MNIST page: two zero bytes, a type code, the number of axes, each length as a
big-endian 32-bit integer, then the values, big-endian, last axis fastest.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from nas.datasets.files import find, read_bytes
from nas.datasets.raw import Part, Raw, check_labels, check_numbers, image_scale
from nas.errors import DataError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def parse(data: bytes, where: str) -> np.ndarray:
    """One idx file's bytes as an array (native byte order, a copy).

    Raises:
        DataError: not idx, an unknown type code, or more or fewer bytes than the header promises.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in TYPES:
        raise DataError(
            f"{where}: expected an idx file (two zero bytes, a type code, ...), found {data[:4].hex(' ') or 'nothing'}."
        )
    axes = data[3]
    start = 4 + 4 * axes
    if axes == 0 or len(data) < start:
        raise DataError(f"{where}: the idx header is cut off. Copy or download the file again.")
    shape = struct.unpack(f">{axes}I", data[4:start])
    dtype = np.dtype(TYPES[data[2]])
    expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise DataError(
            f"{where}: the header promises shape {list(shape)}, {expected} bytes in all, but the file has {len(data)}. "
            "Copy or download it again."
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _find(folder: Path, stem: str) -> Path | None:
    return find(folder, stem) or find(folder, stem.replace("-idx", ".idx"))


def present(folder: Path) -> bool:
    """Whether the folder holds the training images of an idx set."""
    return _find(folder, FILES["train"][0]) is not None


def missing(folder: Path) -> list[str]:
    """The file names that are not there."""
    return [stem for pair in FILES.values() for stem in pair if _find(folder, stem) is None]


def read_folder(folder: Path, name: str, class_names: tuple[str, ...] | None = None) -> Raw:
    """The four files of an idx set.

    Args:
        folder: where `train-images-idx3-ubyte` and its three companions lie, plain or compressed.
        name: name of the set.
        class_names: names of the codes, or None to use the codes that occur.
    """
    gone = missing(folder)
    if gone:
        raise DataError(f"{folder}: expected the four idx files, missing {', '.join(gone)} (plain, .gz, .xz or .bz2).")
    parts = {}
    for part, stems in FILES.items():
        images_path, labels_path = (folder / stem if (path := _find(folder, stem)) is None else path for stem in stems)
        images = parse(read_bytes(images_path), str(images_path))
        if images.ndim != 3:
            raise DataError(f"{images_path}: expected images [n, h, w], found shape {list(images.shape)}.")
        check_numbers(images, str(images_path))
        labels = check_labels(parse(read_bytes(labels_path), str(labels_path)), len(images), str(labels_path))
        if class_names is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise DataError(
                f"{labels_path}: expected labels 0..{len(class_names) - 1}, found {labels.min()}..{labels.max()}."
            )
        parts[part] = Part(images[:, None], labels)
    train, test = parts["train"], parts["test"]
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{folder}: training images are {train.x.shape[2:]} pixels, test images {test.x.shape[2:]}.")
    return Raw(name, str(folder), train, test=test, class_names=class_names, scale=image_scale(train.x))
