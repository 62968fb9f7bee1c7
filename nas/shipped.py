"""Data and space file of a run for machines that have not got them: written below the run's folder, read by its workers.

Not compressed, not encrypted, no pickles: a safetensors file that is checked when it is read. Start with `ship` (the driver) and
`read_data` (a worker).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas.config import RunConfig
from nas.data import Data, Split
from nas.errors import DataError, RunError

DATA = "shipped/data.safetensors"
"""Below the run's folder."""
SPACE = "space"
"""Folder below the run's with the copy of the user's space file."""
SHIPPING = ("ray", "tune")
"""Executors whose workers may be on machines without the run's data."""


def ship(config: RunConfig, folder: Path, data: Data) -> tuple[str, ...]:
    """Write what the setup of workers elsewhere may lack, and name it, for `Placement.setup_needs`.

    Nothing is written for a cluster of this machine, nor for digits, which come with an installed package.

    Args:
        config: the run's.
        folder: the run's.
        data: what the driver has loaded.

    Returns:
        Paths below `folder`.

    Raises:
        RunError: the folder cannot be written.
    """
    if config.run.executor not in SHIPPING or not config.run.address:
        return ()
    file = space_file(config)
    needs = [f"{SPACE}/{file.name}"] if file.name else []
    if config.data.name != "digits":
        write_data(folder / DATA, data)
        needs.append(DATA)
    return tuple(needs)


def space_file(config: RunConfig) -> Path:
    """The file in which the config's space is, as the config names it; the empty path where it is in none of its own."""
    file = str(config.space["name"]).rpartition(":")[0]
    return Path(file) if file.endswith(".py") else Path()


def write_data(path: Path, data: Data) -> None:
    """Write all of a data set, unless just that is there.

    Raises:
        RunError: the file cannot be written.
    """
    digest = data_digest(data)
    try:
        if path.is_file() and shipped_digest(path) == digest:
            return
        facts = {
            "classes": data.classes,
            "class_names": list(data.class_names),
            "input_shape": list(data.input_shape),
            "name": data.name,
            "digest": digest,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        # Views of one tensor are written each for itself.
        tensors = {name: tensor.contiguous().clone() for name, tensor in _tensors(data).items()}
        save_file(tensors, scratch, {"data": json.dumps(facts)})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: cannot be written: {error}; free some space, then start the same command again"
        ) from error


def read_data(path: Path) -> Data:
    """What `write_data` wrote, bit by bit.

    Raises:
        DataError: the file is not there, not whole, or not one of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["data"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = {name: Split(tensors[f"{name}.x"], tensors[f"{name}.y"]) for name in ("train", "val", "test")}
        data = Data(
            **parts,
            classes=facts["classes"],
            class_names=tuple(facts["class_names"]),
            input_shape=tuple(facts["input_shape"]),
            name=facts["name"],
            mean=tensors["mean"],
            std=tensors["std"],
        )
        expected, found = facts["digest"], data_digest(data)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected the run's data as the driver wrote them, found something else or a part of it ({error}); "
            "remove the file and start the search again"
        ) from error
    if expected != found:
        raise DataError(
            f"{path}: damaged: expected digest {expected}, found {found}; remove it and start the search again"
        )
    return data


def data_digest(data: Data) -> str:
    """Of everything in a data set; equal digests are equal bits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([data.classes, data.class_names, data.input_shape, data.name]).encode())
    for name, tensor in _tensors(data).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shipped_digest(path: Path) -> str:
    """The digest in the head of a file that `write_data` wrote; "" if there is none."""
    try:
        with safe_open(path, "pt") as file:
            return str(json.loads(file.metadata()["data"])["digest"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return ""


def _tensors(data: Data) -> dict[str, Tensor]:
    found: dict[str, Any] = {"mean": data.mean, "std": data.std}
    for name in ("train", "val", "test"):
        part = getattr(data, name)
        found |= {f"{name}.x": part.x, f"{name}.y": part.y}
    return found
