"""Data for training: three parts (train, val, test) of normalised tensors, from a name, a path or torch datasets.

Start with `load_data` and `from_datasets`; both return `Data`. The file formats are read in `nas.datasets`. What happens to
every set, in this order: labels become codes; a stratified test part is cut off if the source has none; the training part
is limited; a stratified validation part is cut from it; images are resized; everything is normalised with the mean and
standard deviation of the rows that remain for training. The test part is never part of the others.

It does not augment (that is `nas.training.augment`, per batch) and does not stream: a set has to fit into memory as float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.datasets import arrays, cifar, files, idx, images, known, tables
from nas.datasets.raw import (
    MAX_IMAGE_SIZE,
    Part,
    Raw,
    as_images,
    check_labels,
    check_numbers,
    check_resized,
    encode,
    image_scale,
)
from nas.errors import DataError, unknown_name

DEFAULT_TEST = 0.2
"""Fraction cut off as test part where the source has none."""

_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of one part.

    Attributes:
        x: float32[n, *input_shape], normalised.
        y: int64[n], class codes.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Data:
    """A classification data set, ready to train on.

    Attributes:
        train, val, test: the three parts; no row is in two of them.
        classes: number of classes.
        class_names: what the codes stand for.
        input_shape: shape of one row: (channels, height, width) or (features,).
        name: short name.
        mean, std: float32[channels or features], of the training part before normalisation (pixels in 0..1); std is 1 where
            a column is constant.
    """

    train: Split
    val: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    name: str
    mean: Tensor
    std: Tensor


def load_data(
    name_or_path: str | os.PathLike[str],
    *,
    validation: float = 0.1,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    image_size: int | Sequence[int] | None = None,
    limit: int | None = None,
    label: str | None = None,
    test: str | os.PathLike[str] | float | None = None,
) -> Data:
    """Load a data set.

    Args:
        name_or_path: digits, mnist, fashion_mnist, cifar10, cifar100; or an .npz, .csv or .tsv file (tables also .gz, .xz,
            .bz2); or a folder with idx files, CIFAR .bin files or one sub-folder of images per class. A relative path is
            looked for in the working directory, then below `path` or the folder that NAS_DATA names.
        validation: fraction of the training part held out to select by, in (0, 1). Ignored if the source has its own.
        seed: decides every split; the same seed gives the same rows.
        path: folder to look in instead of the one that the environment variable NAS_DATA names. Refused for digits.
        image_size: height and width in pixels (one number if equal), at most 4096; images are resized by area averaging.
        limit: use only so many rows of the training part (validation included), stratified.
        label: column (tables), base name of the label array (npz), or "coarse" (cifar100).
        test: a second file or folder of the same kind to test on, or the fraction to cut off where there is none (default 0.2).

    Raises:
        DataError: missing, unreadable or unusable data; says what, where and what to do.
        UnknownName: neither a known name nor an existing path.
    """
    size = _size(image_size)
    root = Path(path).expanduser() if path is not None else None
    try:
        raw = _read(str(name_or_path), root, size, label, test)
    except OSError as error:  # a folder without permission, a broken link, a disk error
        raise DataError(f"{name_or_path}: cannot be read ({error}).") from error
    fraction = DEFAULT_TEST if test is None or isinstance(test, (str, os.PathLike)) else _fraction("test", test)
    if raw.test is not None and test is not None and not isinstance(test, (str, os.PathLike)):
        raise DataError(f"{raw.where}: has a test part of its own, so test={test} means nothing here. Remove it.")
    return _build(raw, validation=validation, test_fraction=fraction, seed=seed, size=size, limit=limit)


def from_datasets(
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    validation: float = 0.1,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    name: str = "custom",
) -> Data:
    """Data from torch datasets of (input, label) pairs, or from (x, y) pairs of arrays or tensors.

    Inputs are rows [f], images [h, w], [c, h, w] or [h, w, c], or PIL images; bytes are divided by 255. Everything is
    read into memory once, so random transforms of a dataset are frozen: augment with the trainer instead. The result is
    normalised with the training part's statistics even if the datasets normalise already (which does no harm).

    Args:
        train: the training part.
        val: the validation part; None cuts `validation` of the training part off, stratified.
        test: the test part; None cuts 20 % of the training part off first, stratified.
        validation, seed: as in `load_data`.
        class_names: names of the labels 0..k-1; None: the labels that occur, sorted.
        name: short name.

    Raises:
        DataError: as `load_data`.
    """
    given = {"train": train, "val": val, "test": test}
    parts = {part: _collect(source, f"{name} ({part})") for part, source in given.items() if source is not None}
    first = parts["train"].x
    for part, rows in parts.items():
        if rows.x.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{name}: {part} rows have shape {list(rows.x.shape[1:])}, training rows {list(first.shape[1:])}."
            )
    names = tuple(str(n) for n in class_names) if class_names is not None else None
    if names is not None:
        for part, rows in parts.items():
            if rows.y.dtype.kind != "i" or rows.y.min() < 0 or rows.y.max() >= len(names):
                raise DataError(f"{name} ({part}): expected labels 0..{len(names) - 1} for {len(names)} class names.")
    scale = image_scale(first)
    raw = Raw(name, name, parts["train"], parts.get("val"), parts.get("test"), class_names=names, scale=scale)
    return _build(raw, validation=validation, test_fraction=DEFAULT_TEST, seed=seed, size=None, limit=None)


def _read(
    name: str,
    root: Path | None,
    size: tuple[int, int] | None,
    label: str | None,
    test: str | os.PathLike[str] | float | None,
) -> Raw:
    test_path = Path(test).expanduser() if isinstance(test, (str, os.PathLike)) else None
    canonical = known.canonical(name)
    if canonical in known.NAMES:
        if test_path is not None:
            raise DataError(f"{canonical}: a known set takes no test file; remove test={test}.")
        return known.read_known(canonical, root, label)
    source = _locate(name, root)
    if test_path is not None:
        test_path = _locate(str(test_path), root)
        files.refuse_pickle(test_path)
    if source.is_dir():
        return _read_folder(source, size, label, test_path)
    files.refuse_pickle(source)
    if test_path is not None:
        _check_same_kind(source, test_path)
    if tables.separator(source) is not None:
        return tables.read_table(source, label, test_path)
    if source.suffix.lower() == ".npz":
        raw = arrays.read_npz(source, label)
        return raw if test_path is None else _with_test(raw, arrays.read_npz(test_path, label))
    raise DataError(
        f"{source}: unknown kind of file. Expected .npz, .csv or .tsv (tables also .gz, .xz, .bz2), or a folder of images, "
        "idx files or CIFAR .bin files."
    )


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    if tables.separator(path) is not None:
        return "a table"
    return "an .npz archive" if path.suffix.lower() == ".npz" else "a file of an unknown kind"


def _check_same_kind(source: Path, test: Path) -> None:
    """Refuse a test file of another kind than the file or folder to learn from."""
    wanted, found = _kind(source), _kind(test)
    if wanted != found and wanted != "a file of an unknown kind":
        raise DataError(
            f"{test}: test must be of the same kind as the data, {wanted} ({source}), but it is {found}. "
            "Convert it, or remove test to cut a test part off."
        )


def _with_test(raw: Raw, other: Raw) -> Raw:
    """The set with the training rows of another archive as test part."""
    mine, theirs = raw.train.x, other.train.x
    if mine.shape[1:] != theirs.shape[1:] or raw.scale != other.scale:
        raise DataError(
            f"{other.where}: has rows of {theirs.dtype}{list(theirs.shape[1:])}, but {raw.where} of "
            f"{mine.dtype}{list(mine.shape[1:])}; they must agree."
        )
    return replace(raw, test=other.train)


def _read_folder(folder: Path, size: tuple[int, int] | None, label: str | None, test: Path | None) -> Raw:
    cifar100 = cifar.present(folder, cifar.CIFAR100_FILES)
    if label is not None and not cifar100:
        raise DataError(f'{folder}: label="{label}" means nothing for this kind of data. Remove it.')
    split_already = idx.present(folder) or cifar.present(folder, cifar.CIFAR10_FILES) or cifar100
    if test is not None and split_already:
        raise DataError(f"{folder}: has a test part of its own; remove test={test}.")
    if test is not None:
        _check_same_kind(folder, test)
    if idx.present(folder):
        return idx.read_folder(folder, folder.name)
    if cifar.present(folder, cifar.CIFAR10_FILES):
        return cifar.read_cifar10(folder)
    if cifar100:
        return cifar.read_cifar100(folder, label)
    return images.read_images(folder, size, test)


def _locate(name: str, root: Path | None) -> Path:
    """The file or folder that a path names, or an error that says where it was looked for."""
    given = Path(name).expanduser()
    environment = os.environ.get(known.ENVIRONMENT)
    bases = [Path(), *([root] if root else []), *([Path(environment)] if environment and not root else [])]
    for base in bases:
        if (base / given).exists():
            return base / given
    if not given.suffix and len(given.parts) == 1:
        unknown = unknown_name("data set", name, known.NAMES)
        unknown.args = (f"{unknown.args[0]}; or give the path of a file or folder (there is none of this name)",)
        raise unknown
    looked = ", ".join(str((base / given).absolute()) for base in bases)
    raise DataError(f"{name}: no such file or folder (looked for {looked}).")


def _collect(source: Any, where: str) -> Part:
    """All rows of a torch dataset or of an (x, y) pair."""
    if isinstance(source, torch.utils.data.TensorDataset) and len(source.tensors) == 2:
        source = source.tensors
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(hasattr(a, "shape") for a in source):
        x, y = np.asarray(source[0]), np.asarray(source[1])
    else:
        try:
            count = len(source)
        except TypeError as error:
            raise DataError(f"{where}: expected a dataset with a length, found {type(source).__name__}.") from error
        rows, labels = [], []
        for i in range(count):
            item = source[i]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(f"{where}: expected (input, label) pairs, found {type(item).__name__} in row {i}.")
            rows.append(np.asarray(item[0]))
            labels.append(np.asarray(item[1]))
            if rows[i].shape != rows[0].shape:
                raise DataError(
                    f"{where}: row {i} has shape {list(rows[i].shape)}, row 0 {list(rows[0].shape)}; they must agree."
                )
        if not rows:
            raise DataError(f"{where}: the dataset is empty.")
        x, y = np.stack(rows), np.stack(labels)
    check_numbers(x, where)
    y = check_labels(y, len(x), f"{where}: labels")
    return Part(x.astype(np.float64) if x.ndim == 2 else as_images(x, where), y)


def _build(
    raw: Raw, *, validation: float, test_fraction: float, seed: int, size: tuple[int, int] | None, limit: int | None
) -> Data:
    if size is not None and raw.train.x.ndim == 2:
        raise DataError(
            f"{raw.where}: image_size is for images, but the rows are {raw.train.x.shape[1]} numbers. Remove it."
        )
    raw = encode(raw)
    if 0 in raw.train.x.shape[1:]:
        raise DataError(
            f"{raw.where}: expected at least one number per row, found rows of shape {list(raw.train.x.shape[1:])}."
        )
    assert raw.class_names is not None
    y = raw.train.y
    keep = np.arange(len(y))
    sources: dict[str, tuple[Part, np.ndarray]] = {}
    if raw.test is not None:
        sources["test"] = raw.test, np.arange(len(raw.test.y))
    else:
        keep, cut = stratified(y, keep, test_fraction, leave=2, seed=(seed, 0))
        sources["test"] = raw.train, cut
    if limit is not None:
        keep = _limit(y, keep, limit, len(raw.class_names), seed, raw.where)
    if raw.val is not None:
        sources["val"] = raw.val, np.arange(len(raw.val.y))
    else:
        keep, cut = stratified(y, keep, _fraction("validation", validation), leave=1, seed=(seed, 1))
        sources["val"] = raw.train, cut
    sources["train"] = raw.train, keep
    for part, (_, rows) in sources.items():
        if len(rows) == 0:
            raise DataError(f"{raw.where}: no row is left for the {part} part. Use more data or a larger fraction.")

    if size is not None:
        rows_left = sum(len(rows) for _, rows in sources.values())
        check_resized(rows_left, raw.train.x.shape[1], size, 4, raw.where)
    mean, std = None, None
    splits: dict[str, Split] = {}
    for part in ("train", "val", "test"):
        source, rows = sources[part]
        x = _tensor(source.x, rows, raw.scale, size)
        if mean is None or std is None:
            mean, std = _statistics(x, raw.where)
        view = (-1,) + (1,) * (x.ndim - 2)
        x = x.sub_(mean.to(x.dtype).view(view)).div_(std.to(x.dtype).view(view)).to(torch.float32)
        splits[part] = Split(x, torch.from_numpy(source.y[rows]))
    assert mean is not None
    assert std is not None
    train = splits["train"]
    return Data(
        train, splits["val"], splits["test"], len(raw.class_names), raw.class_names, tuple(train.x.shape[1:]), raw.name,
        mean.float(), std.float(),
    )  # fmt: skip


def stratified(
    y: np.ndarray, rows: np.ndarray, fraction: float, *, leave: int, seed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows in two with (nearly) the same mix of classes.

    The second part has exactly round(fraction * n) rows unless `leave` forbids it. Each class gives its share rounded down;
    the rest goes to the largest remainders, ties to the lower class.

    Args:
        y: class codes of the whole set.
        rows: indices into y.
        fraction: of the second part.
        leave: rows of each class that must stay in the first part.
        seed: decides which rows.

    Returns:
        (first, second), both ascending.
    """
    codes = y[rows]
    counts = np.bincount(codes)
    shares = counts * fraction
    take = np.floor(shares).astype(int)
    room = np.maximum(counts - leave, 0)
    take = np.minimum(take, room)
    missing = round(fraction * len(rows)) - int(take.sum())
    order = np.argsort(-(shares - np.floor(shares)), kind="stable")
    for _ in range(2):
        for code in order:
            if missing > 0 and take[code] < room[code]:
                take[code] += 1
                missing -= 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(rows), dtype=bool)
    for code, number in enumerate(take):
        members = np.flatnonzero(codes == code)
        chosen[rng.permutation(members)[:number]] = True
    return rows[~chosen], rows[chosen]


def _limit(y: np.ndarray, rows: np.ndarray, limit: int, classes: int, seed: int, where: str) -> np.ndarray:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2 * classes:
        raise DataError(
            f"{where}: limit must be at least 2 rows for each of the {classes} classes ({2 * classes}), found {limit}."
        )
    if limit >= len(rows):
        return rows
    kept, _ = stratified(y, rows, 1 - limit / len(rows), leave=2, seed=(seed, 2))
    return kept


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise DataError(f"{name} must be a fraction between 0 and 1 (both excluded), found {value!r}.")
    return float(value)


def _size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    values = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise DataError(f"image_size must be a number of pixels or [height, width], found {image_size!r}.")
    if max(values) > MAX_IMAGE_SIZE:
        raise DataError(f"image_size must be at most {MAX_IMAGE_SIZE} pixels, found {image_size!r}.")
    return values[0], values[1]


def _tensor(x: np.ndarray, rows: np.ndarray, scale: float, size: tuple[int, int] | None) -> Tensor:
    """The chosen rows, divided by scale and resized: float32 for images, float64 for tables (whose columns may be large)."""
    if x.ndim == 2:
        return torch.from_numpy(x[rows].astype(np.float64) / scale)
    shape = x.shape[2:] if size is None else size
    out = torch.empty((len(rows), x.shape[1], *shape), dtype=torch.float32)
    for start in range(0, len(rows), _CHUNK):
        chunk = torch.from_numpy(x[rows[start : start + _CHUNK]].astype(np.float32)).div_(scale)
        if size is not None and tuple(chunk.shape[2:]) != size:
            chunk = torch.nn.functional.interpolate(chunk, size=size, mode="area")
        out[start : start + len(chunk)] = chunk
    return out


def _statistics(x: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """float64 mean and standard deviation per channel or column; constant columns get 1."""
    axes = (0, *range(2, x.ndim))
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for chunk in x.split(_CHUNK):
        total += chunk.sum(axes, dtype=torch.float64)
    per_channel = x.numel() // x.shape[1]
    mean = total / per_channel
    squares = torch.zeros_like(total)
    view = (-1,) + (1,) * (x.ndim - 2)
    for chunk in x.split(_CHUNK):
        squares += (chunk.double() - mean.view(view)).square_().sum(axes)
    std = (squares / per_channel).sqrt()
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        column = int(torch.argmax((~torch.isfinite(mean) | ~torch.isfinite(std)).int()))
        raise DataError(
            f"{where}: the values of column {column} are too large for their variance to be computed. Rescale it."
        )
    resolution = 1e-6 if x.dtype == torch.float32 else 1e-12
    return mean, torch.where(std <= resolution * mean.abs().clamp_min(1e-30), torch.ones_like(std), std)
