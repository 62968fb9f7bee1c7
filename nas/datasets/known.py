"""The data sets that have a name: digits (built in), mnist, fashion_mnist, cifar10, cifar100.

Start with `read_known`. The others are looked for in the folder given as `path`, else in the one that the environment
variable NAS_DATA names: there directly, or in a sub-folder of one of the usual names. If they are nowhere and OpenML can
be reached, scikit-learn fetches them (and keeps them in its own cache); else the error says which files to put where.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nas.datasets import cifar, idx
from nas.datasets.raw import Part, Raw, check_labels
from nas.errors import DataError

ENVIRONMENT = "NAS_DATA"
OPENML_URL = "https://www.openml.org/api/v1/json/data/61"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGITS = tuple(str(i) for i in range(10))


@dataclass(frozen=True)
class Known:
    """A named set: how to see that its files are there, how to read them, and its number at OpenML."""

    folders: tuple[str, ...]
    files: tuple[str, ...]
    present: Callable[[Path], bool]
    read: Callable[[Path, str | None], Raw]
    openml: int
    train_rows: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]


_IDX_FILES = tuple(stem for pair in idx.FILES.values() for stem in pair)
KNOWN: dict[str, Known] = {
    "mnist": Known(
        ("mnist", "MNIST/raw", "MNIST"), _IDX_FILES, idx.present, lambda folder, _: idx.read_folder(folder, "mnist", DIGITS),
        554, 60000, (1, 28, 28), DIGITS,
    ),
    "fashion_mnist": Known(
        ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST"), _IDX_FILES, idx.present,
        lambda folder, _: idx.read_folder(folder, "fashion_mnist", FASHION_CLASSES),
        40996, 60000, (1, 28, 28), FASHION_CLASSES,
    ),
    "cifar10": Known(
        ("cifar10", "cifar-10", "cifar-10-batches-bin"), (*cifar.CIFAR10_FILES["train"], *cifar.CIFAR10_FILES["test"]),
        lambda folder: cifar.present(folder, cifar.CIFAR10_FILES), lambda folder, _: cifar.read_cifar10(folder),
        40927, 50000, (3, 32, 32), cifar.CIFAR10_CLASSES,
    ),
    "cifar100": Known(
        ("cifar100", "cifar-100", "cifar-100-binary"), (*cifar.CIFAR100_FILES["train"], *cifar.CIFAR100_FILES["test"]),
        lambda folder: cifar.present(folder, cifar.CIFAR100_FILES), cifar.read_cifar100,
        41983, 50000, (3, 32, 32), tuple(str(i) for i in range(100)),
    ),
}  # fmt: skip
NAMES = ("digits", *KNOWN)


def canonical(name: str) -> str:
    """ "Fashion-MNIST" -> "fashion_mnist", "CIFAR-10" -> "cifar10"."""
    text = name.lower().replace("-", "_")
    return text.replace("cifar_", "cifar") if text.startswith("cifar_") else text


def read_digits() -> Raw:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels 0..16 (UCI optical digits, test half)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Raw("digits", "digits", Part(bunch.images[:, None], bunch.target), class_names=DIGITS, scale=16.0)


def _candidates(known: Known, root: Path) -> list[Path]:
    return [root, *(root / folder for folder in known.folders)]


def read_known(name: str, path: Path | None, label: str | None = None) -> Raw:
    """Read a set by its canonical name.

    Args:
        name: one of `NAMES`.
        path: folder to look in; None: the environment variable NAS_DATA.
        label: "coarse" for the superclasses of cifar100.

    Raises:
        DataError: nowhere to be found; says which files are wanted and where.
    """
    if label is not None and name != "cifar100":
        raise DataError(f'{name}: has one kind of label, so label="{label}" means nothing here. Remove it.')
    if name == "digits":
        if path is not None:
            raise DataError(f'digits: comes with scikit-learn and is read from no folder. Remove path="{path}".')
        return read_digits()
    known = KNOWN[name]
    root = path if path is not None else (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if root is not None:
        for folder in _candidates(known, root):
            if folder.is_dir() and known.present(folder):
                return known.read(folder, label)
    if label in (None, "fine") and openml_reachable():
        return _fetch(name, known)
    searched = (
        f"{root} and its sub-folders {', '.join(known.folders)}"
        if root
        else f"nowhere: neither path nor {ENVIRONMENT} is set"
    )
    target = root / known.folders[0] if root else f"a folder <data>/{known.folders[0]} and set {ENVIRONMENT}=<data>"
    raise DataError(
        f"{name}: the data set is not on this machine and OpenML cannot be reached (looked in {searched}). "
        f"Put {', '.join(known.files)} (plain, .gz or .xz) into {target}."
    )


def openml_reachable(timeout_s: float = 3.0) -> bool:
    """Whether OpenML answers in time. In a thread of its own, because a name look-up has no time-out."""
    answers: list[bool] = []

    def ask() -> None:
        import urllib.request

        try:
            with urllib.request.urlopen(OPENML_URL, timeout=timeout_s) as reply:
                answers.append(reply.status == 200)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s + 1.0)
    return bool(answers and answers[0])


def _fetch(name: str, known: Known) -> Raw:
    from sklearn.datasets import fetch_openml

    where = f"{name} from OpenML (data set {known.openml})"
    try:
        bunch = fetch_openml(data_id=known.openml, as_frame=False, parser="auto", n_retries=1)
    except Exception as error:  # network, disk and parser errors of many kinds; all mean the same to the caller
        raise DataError(
            f"{where}: could not be fetched ({error}). Put the original files into a folder instead."
        ) from error
    x = np.asarray(bunch.data)
    pixels = int(np.prod(known.shape))
    if x.ndim != 2 or x.shape[1] != pixels or len(x) != known.train_rows + 10000:
        raise DataError(
            f"{where}: expected {known.train_rows + 10000} rows of {pixels} pixels, found shape {list(x.shape)}."
        )
    images = x.astype(np.uint8).reshape(-1, *known.shape)
    y = check_labels(np.asarray(bunch.target).astype(str).astype(np.int64), len(images), where)
    cut = known.train_rows
    return Raw(
        name,
        where,
        Part(images[:cut], y[:cut]),
        test=Part(images[cut:], y[cut:]),
        class_names=known.class_names,
        scale=255.0,
    )
