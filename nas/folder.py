"""The folder of a run: made, described, and checked when a run is continued.

config.toml (resolved), environment.json, run.db (or storage.json, which names a server), artifacts/ and, for a space in a file of
the user's, a copy below space/.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from hw_models.device import host_device
from nas.config import CHANGEABLE, RunConfig, differing_keys, load_config
from nas.data import Data
from nas.errors import ConfigError, RunError
from nas.executors.travel import RUN_ID, run_id
from nas.server import without_passwords
from nas.storage import DATABASE, STORAGE, Storage, write_storage
from nas.store import Store
from search_spaces.registry import find_space_file

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "optuna",
    "pandas",
    "networkx",
    "sqlalchemy",
    "scikit-learn",
    "onnx",
    "onnxruntime",
)


def make_folder(folder: Path) -> None:
    """Make the folder, or see that it is one of ours.

    Raises:
        RunError: it cannot be made, or holds something else; nothing is changed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}; give another one with --out") from error
    if names and not names & {"run.db", "run.lock", RUN_ID, STORAGE}:
        raise RunError(f"{folder} is not empty and not a run folder; nothing was changed. Give another one with --out")


def open_run(
    folder: Path,
    config: RunConfig,
    data: Data,
    config_folder: Path,
    storage: Storage | None = None,
    *,
    standby: bool = False,
    message: Callable[[str], None] = lambda text: None,
) -> Store:
    """The run's database for writing: a new one, or the one there is if the same config and data made it.

    Args:
        folder: the run's.
        config: the run's.
        data: what it trains on.
        config_folder: where the run file is.
        storage: where the database is; None: run.db. On a server no other driver can have the run while the store is open.
        standby: wait for the driver that has the run on a server, and take over.
        message: is told whom we wait for.

    Raises:
        RunError: another config (names the key), other data or another space file made it; or the folder or the server cannot be
            used.
    """
    path, plain, facts = folder / DATABASE, config.as_dict(), data_facts(data)
    store: Store | None
    if storage is not None and storage.url:
        store = _open_server(folder, storage, standby, message)
        where = store.where
    else:
        store, where = (Store.open(path) if path.is_file() else None), DATABASE
    try:
        if store is None or store.get_meta("config") is None:  # new, or killed before anything was searched
            if any((folder / "artifacts").glob("[0-9]*")) and not path.is_file():
                raise RunError(
                    f"{folder}: {where} is missing, but artifacts of trials are there; bring {where} back, or give another folder "
                    "with --out"
                )
            _describe(folder, config, config_folder)
            store = store or Store.create(path)
            with store.transaction():
                store.set_meta("config", plain)
                store.set_meta("data", facts)
                store.set_meta("space_folder", str(config_folder))
            return store
        _check_config(folder, store.get_meta("config"), plain)
        _check_data(folder, store.get_meta("data"), facts)
        _check_space_file(folder, config, config_folder)
    except BaseException:
        if store is not None:
            store.close()
        raise
    return store


def _open_server(folder: Path, storage: Storage, standby: bool, message: Callable[[str], None]) -> Store:
    store = Store.serve(
        storage.url,
        storage.run,
        identity=run_id(folder),
        place=f"{socket.gethostname()}:{folder.resolve()}",
        standby=standby,
        message=message,
    )
    try:
        write_storage(folder, storage)
    except BaseException:
        store.close()
        raise
    return store


def space_copy(folder: Path, config: RunConfig) -> Path | None:
    """Where a run keeps a copy of the user's space file; None for a space that is not in a file of its own."""
    file = config.space["name"].rpartition(":")[0]
    return folder / "space" / Path(file).name if file.endswith(".py") else None


def data_facts(data: Data) -> dict[str, Any]:
    """What identifies a data set in a run: name, shapes, classes, sizes, how it was normalised, and digests."""
    labels, moments = hashlib.sha256(), []
    for part in (data.train, data.val, data.test):
        labels.update(part.y.contiguous().numpy().tobytes())
        x = part.x.double()
        moments += [float(f"{value:.4g}") for value in (x.mean().item(), x.pow(2).mean().sqrt().item())]
    return {
        "name": data.name,
        "input_shape": list(data.input_shape),
        "classes": data.classes,
        "class_names": list(data.class_names),
        "train": len(data.train.y),
        "val": len(data.val.y),
        "test": len(data.test.y),
        "mean": [float(f"{value:.6g}") for value in data.mean.flatten().tolist()],
        "std": [float(f"{value:.6g}") for value in data.std.flatten().tolist()],
        "labels_sha256": labels.hexdigest(),
        "moments": moments,  # mean and root mean square of train, val and test: rounded, so equal on every machine
    }


def _describe(folder: Path, config: RunConfig, config_folder: Path) -> None:
    try:
        (folder / "artifacts").mkdir(exist_ok=True)
        (folder / "config.toml").write_text(config.to_toml())
        (folder / "environment.json").write_text(json.dumps(_environment(config), indent=1) + "\n")
        copy = space_copy(folder, config)
        if copy is not None:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_space_file(config, config_folder), copy)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written: {error.strerror or error}; give another folder with --out"
        ) from error


def _space_file(config: RunConfig, config_folder: Path) -> Path:
    return find_space_file(config.space["name"].rpartition(":")[0], config_folder)


def _check_config(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    with suppress(ConfigError):  # a run of an earlier version knows fewer keys: they have their defaults
        before = load_config(before).as_dict()
    differing = [key for key in differing_keys(before, now) if key not in CHANGEABLE]
    if differing:
        key, others = differing[0], differing[1:]
        also = f" (and {len(others)} more: {', '.join(others[:5])})" if others else ""
        raise RunError(
            f"{folder} holds a run made by another config: {key} was {_look_up(before, key)!r} and is now "
            f"{_look_up(now, key)!r}{also}; put it back, or give the new search another folder with --out"
        )


def _check_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = differing_keys(before, now)
    if differing:
        key = differing[0]
        raise RunError(
            f"{folder}: the data are not the ones this run began with: {key} was {_look_up(before, key)!r} and is now "
            f"{_look_up(now, key)!r}; bring them back, or use another folder with --out"
        )


def _check_space_file(folder: Path, config: RunConfig, config_folder: Path) -> None:
    copy = space_copy(folder, config)
    if copy is None or not copy.is_file():
        return
    file = _space_file(config, config_folder)
    if file.read_bytes() != copy.read_bytes():
        raise RunError(
            f"{file} is not what this run began with (its copy: {copy}); "
            "bring it back, or give the new search another folder with --out"
        )


def _look_up(plain: Mapping[str, Any], dotted: str) -> Any:
    value: Any = plain
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _environment(config: RunConfig) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *map(without_passwords, sys.argv[1:])]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "device": asdict(host_device()),
        "threads": config.run.threads,
        "workers": config.run.workers,
    }


def _commit() -> str:
    """The commit of this project's checkout, or "unknown" where it is not one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
