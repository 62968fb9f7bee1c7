"""A folder of images, one sub-folder per class, optionally under `train/`, `val/` and `test/`. Start with `read_images`.

Images become 8-bit. They have one channel if every image of the set is grey (by its pixels, not by how the file stores
them), three otherwise; transparency is ignored. Hidden files and files without an image ending are skipped.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from nas.datasets.raw import Part, Raw, check_resized
from nas.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith(".") and p.is_file()
    )


def _load(path: Path) -> np.ndarray:
    """uint8[1, h, w] if the image is grey, else uint8[3, h, w]."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on odd metadata would come once per image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):
                    return (np.asarray(image) >> 8).astype(np.uint8)[None]
                if image.mode in ("1", "L", "LA", "La"):
                    return np.array(image.convert("L"))[None]
                pixels = np.array(image.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: has too many pixels to be opened ({error}). Shrink or remove the file.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}). Replace or remove the file.") from error
    planes = pixels.transpose(2, 0, 1)
    grey = bool((planes[0] == planes[1]).all() and (planes[0] == planes[2]).all())
    return planes[:1] if grey else planes


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    if pixels.shape[1:] == size:
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels)).float()[None]
    resized = torch.nn.functional.interpolate(image, size=size, mode="area")[0]
    return resized.round().to(torch.uint8).numpy()


def read_images(folder: Path, image_size: tuple[int, int] | None = None, test: Path | None = None) -> Raw:
    """Read a folder of class folders.

    Args:
        folder: holds one folder per class, or `train/` (and `val/`, `test/`) that do.
        image_size: (height, width) to which images are resized by area; without it all must have one size.
        test: a separate folder of class folders for the test part.

    Raises:
        DataError: no class folders, a class without images, an unreadable image, images of different sizes.
    """
    children = {path.name.lower(): path for path in _folders(folder)}
    roots = {part: next((children[w] for w in words if w in children), None) for part, words in PARTS.items()}
    if roots["train"] is None:
        roots = {"train": folder, "val": None, "test": None}
    if test is not None:
        roots["test"] = test
    train_root = roots["train"]
    assert train_root is not None
    names = [path.name for path in _folders(train_root)]
    if not names:
        loose = len(_images(train_root))
        found = f"{loose} images but no class folders" if loose else "neither class folders nor a known data set"
        raise DataError(
            f"{train_root}: expected one folder of images per class ({train_root.name}/cat/1.png, ...), found {found}. "
            "Also read: idx files (MNIST), CIFAR .bin files, an .npz, .csv or .tsv file given by its path."
        )
    if image_size is not None:
        check_resized(sum(len(_images(train_root / name)) for name in names), 1, image_size, 1, str(train_root))
    loaded: dict[str, tuple[list[np.ndarray], list[Path], list[int]]] = {}
    for part, root in roots.items():
        if root is None:
            continue
        unknown = sorted({path.name for path in _folders(root)} - set(names))
        if unknown:
            raise DataError(f'{root / unknown[0]}: class "{unknown[0]}" has no folder in {train_root}.')
        arrays, paths, codes = [], [], []
        for code, name in enumerate(names):
            files = _images(root / name) if (root / name).is_dir() else []
            if not files and part == "train":
                raise DataError(f"{root / name}: expected images ({', '.join(ENDINGS[:4])}, ...), found none.")
            for path in files:
                pixels = _load(path)
                arrays.append(pixels if image_size is None else _resize(pixels, image_size))
                paths.append(path)
                codes.append(code)
        if arrays:
            loaded[part] = (arrays, paths, codes)
        elif root == test:
            raise DataError(
                f"{test}: expected one folder of images per class, named as in {train_root}, found no images. "
                "Give another test folder, or none to cut a test part off."
            )

    channels = max(array.shape[0] for arrays, _, _ in loaded.values() for array in arrays)
    first, first_path = loaded["train"][0][0], loaded["train"][1][0]
    parts: dict[str, Part] = {}
    for part, (arrays, paths, codes) in loaded.items():
        for array, path in zip(arrays, paths):
            if array.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"{path}: is {array.shape[2]} x {array.shape[1]} pixels, {first_path.name} is {first.shape[2]} x "
                    f"{first.shape[1]} (width x height); all must have one size. Set image_size to resize them."
                )
        stack = np.stack([np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays])
        parts[part] = Part(stack, np.array(codes, dtype=np.int64))
    return Raw(
        folder.name,
        str(folder),
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        class_names=tuple(names),
        scale=255.0,
    )
