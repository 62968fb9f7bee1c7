"""The folder of an export: written beside its place and moved there when it is whole.

A reader never sees a half-written folder; somebody else's folder is never touched.

Start with `check_destination` and `replaced_folder`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nas.export.errors import ExportError

SOURCE, WEIGHTS, MASKS, ONNX, PT2 = (
    "network.py",
    "weights.safetensors",
    "masks.safetensors",
    "network.onnx",
    "network.pt2",
)
CARD, VERIFICATION = "card.md", "verification.json"
FILES = (SOURCE, WEIGHTS, MASKS, ONNX, PT2, CARD, VERIFICATION)
KIND = "exported network"  # verification.json says so; this is how an export is known


def check_destination(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier export.

    Raises:
        ExportError: it is a file, or a folder with other contents; names them.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ExportError(f"expected a folder to export to, found a file: {folder}; choose another place")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name != "__pycache__")
    if not found:
        return
    foreign = [name for name in found if name not in FILES]
    if foreign or not _is_export(folder):
        what = ", ".join((foreign or found)[:5])
        raise ExportError(
            f"expected an empty folder or an earlier export, found {folder} with other contents ({what}); "
            "choose another folder, or move these files away"
        )


def _is_export(folder: Path) -> bool:
    try:
        content = json.loads((folder / VERIFICATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; it takes the place of `folder` if the block ends well, and is removed if not.

    Raises:
        ExportError: the file system refuses (unwritable, full); says which path.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ExportError(
            f"expected a writable folder, found {folder.parent}: {error.strerror or error}; choose another folder"
        ) from error
    try:
        yield work
        _ordinary_permissions(work)
        check_destination(folder)
        _swap(work, folder)
    except OSError as error:
        raise ExportError(
            f"expected to write {folder}, found: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _ordinary_permissions(work: Path) -> None:
    """Temporary folders, and files that libraries write through them, are private to their owner; an export is not."""
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)
    for file in work.iterdir():
        file.chmod(0o666 & ~umask)


def _swap(work: Path, folder: Path) -> None:
    if not folder.exists():
        work.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        work.rename(folder)
    except OSError:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
