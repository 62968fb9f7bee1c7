"""Connecting to Ray: a cluster of this machine's own, or one that is there; what travels to its workers; errors one can act on.

What is common to everything here that runs on Ray. It submits no work. Start with `connect` and `disconnect`.

A cluster that was connected to gets this process's code: the four packages of this project, and modules of the user's that are not
installed. Installed packages do not travel: they must be on every node.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from nas.errors import ConfigError
from nas.executors.process import THREAD_VARIABLES

OUR_PACKAGES = ("nas", "ops", "search_spaces", "hw_models")
PASSED_ON = ("NAS_CACHE_DIR", "NAS_DATA")
"""Environment variables that workers on a cluster get as they are here."""
REACH_S = 5.0
"""Seconds in which something must answer at a cluster's address."""

_STORE_BYTES = 512 << 20
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True)
class Connection:
    """What `connect` did, for `disconnect` to undo.

    Attributes:
        address: as asked for.
        ours: this connection was made here; False: Ray was connected already in this process, and stays so.
        local: the cluster is of this machine only and was started by this process, so that nothing has to travel.
    """

    address: str
    ours: bool
    local: bool


def connect(
    address: str, *, cpus: float = 0, job_cpus: float = 0, gpus: float = 0, modules: Iterable[str] = ()
) -> Connection:
    """Connect this process to Ray, once; a connection that it has already is used as it is.

    Args:
        address: "auto", "HOST:6379", "ray://HOST:10001", or "" to start a cluster of this machine.
        cpus: CPUs of a cluster that is started; 0 for all.
        job_cpus: CPUs that a cluster that is started must have, as it does not grow.
        gpus: GPUs that it must have.
        modules: names of modules that workers import and that may have to travel to them.

    Raises:
        ConfigError: there is no such cluster, it refuses this process, or it has another version of Ray or Python.
    """
    if ray.is_initialized():
        return Connection(address, ours=False, local=not address)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if not address:
        whole = int(cpus) if cpus == int(cpus) else int(cpus) + 1
        common |= {"address": "local", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        with _errors("a Ray cluster of this machine"):
            ray.init(num_cpus=whole or None, **common)
        found = ray.cluster_resources()
        for kind, option, needed in (("CPU", "cpus_per_trial", job_cpus), ("GPU", "gpus_per_trial", gpus)):
            if found.get(kind, 0.0) < needed:
                ray.shutdown()
                raise ConfigError(
                    f"{option}: expected at most the {found.get(kind, 0.0):g} {kind}s of this machine, got {needed:g}; give the "
                    "address of a cluster that has more"
                )
        return Connection(address, ours=True, local=True)
    _reach(address)
    if _JOB_VARIABLE not in os.environ:  # what was submitted with ray job submit has brought its code
        common["runtime_env"] = {"py_modules": code_that_travels(modules)}
    with _empty_folder() as empty, _errors(address), _short_patience(), _without_stderr():
        if (
            "runtime_env" in common
        ):  # else workers look in this process's folders first, where nodes may have other code
            common["runtime_env"]["working_dir"] = str(empty)
        ray.init(address=address, **common)
    return Connection(address, ours=True, local=False)


def disconnect(connection: Connection) -> None:
    """Leave the cluster, which ends what this process still runs there; ends it if it was started here."""
    if connection.ours and ray.is_initialized():
        ray.shutdown()


def worker_environment(connection: Connection, threads: int | None) -> dict[str, str]:
    """Environment variables of worker processes: thread counts, where caches are, and on this machine where modules are."""
    found = {} if threads is None else dict.fromkeys(THREAD_VARIABLES, str(threads))
    found |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if connection.local:
        found["PYTHONPATH"] = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    return found


def code_that_travels(modules: Iterable[str] = ()) -> list[str]:
    """Folders of packages and files of modules that workers need and that cannot be expected to be installed there.

    Args:
        modules: full names; their top-level packages are taken, unless they are installed or come with Python.
    """
    paths = []
    for name in dict.fromkeys((*OUR_PACKAGES, *(module.partition(".")[0] for module in modules))):
        path = _source(name)
        if path is not None and (name in OUR_PACKAGES or not _installed(path)):
            paths.append(str(path))
    return paths


def modules_named(task: str, setup: Mapping[str, Any]) -> list[str]:
    """Modules that a job names: its task's, its space's where that is "module:function", and those that a space of the user's has
    imported from its own folder or the config's."""
    from nas.executors.base import decode

    names = [task.partition(":")[0]]
    with suppress(KeyError, TypeError, ValueError):
        module, colon, _ = str(decode(setup["config"].encode())["space"]["name"]).rpartition(":")
        if colon and not module.endswith(".py"):
            names.append(module)
        if colon and setup.get("space_folder"):
            folder = Path(setup["space_folder"]).resolve()
            names += _imported_from(folder, (folder / module).resolve().parent)
    return names


def _imported_from(*folders: Path) -> list[str]:
    found = []
    for name in [name for name in sys.modules if "." not in name and name != "__main__"]:
        path = _source(name)
        if path is not None and path.parent in folders and path.stem == name:
            found.append(name)
    return found


def _source(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin and spec.origin.endswith(".py") else None


def _installed(path: Path) -> bool:
    places = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(Path(place).resolve()) for place in places if place)


def _reach(address: str) -> None:
    """Find out in seconds that nobody is there: Ray itself takes over a minute."""
    where = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, colon, port = where.removeprefix("ray://").rpartition(":")
    if not where:
        return
    if not (colon and host and port.isdecimal()) or "/" in host:
        raise ConfigError(
            f'address: expected "auto", HOST:PORT such as "head:6379", or "ray://HOST:10001", got {where!r}'
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"address {where}: no Ray cluster answers there ({getattr(error, 'strerror', None) or error}); check host and "
            "port (of ray start --head: 6379), that the head node runs, and firewalls"
        ) from error


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """What can go wrong in `ray.init`, as one line each."""
    try:
        yield
    except (RuntimeError, ValueError, ImportError, OSError, ray.exceptions.RayError) as error:
        raise ConfigError(f"address {where}: {_cure(where, error)} ({_line(error)})") from error


def _cure(where: str, error: BaseException) -> str:
    told = ""
    link: BaseException | None = error
    while link is not None:
        told += str(link)
        link = link.__cause__
    if isinstance(error, ray.exceptions.AuthenticationError) or "uthenticat" in told:
        return (
            "the cluster asks for a token and did not get the right one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the "
            "cluster's, here and on every node"
        )
    if "ersion mismatch" in told:
        return "the cluster has other versions; install them here"
    if isinstance(error, ImportError | ValueError):
        return "Ray cannot do that here"
    if isinstance(error, ConnectionError | TimeoutError):
        if where == "auto":
            return "no Ray cluster runs on this machine; start one with ray start --head, or give HOST:PORT"
        return "what answers there is no Ray cluster; check the port (of ray start --head: 6379)"
    return "Ray could not be started or reached"


@contextmanager
def _empty_folder() -> Iterator[Path]:
    """A folder with nothing of interest (Ray takes none that is quite empty)."""
    with tempfile.TemporaryDirectory(prefix="nas-ray-") as folder:
        Path(folder, "README").write_text("Code of this job is in its py_modules.\n")
        yield Path(folder)


@contextmanager
def _short_patience() -> Iterator[None]:
    """Have Ray give up after about 15 s where something listens that is no Ray cluster, instead of minutes."""
    before = dict(os.environ)
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "4")
    try:
        yield
    finally:
        for name in ("RAY_gcs_server_port_wait_time_s", "RAY_py_gcs_connect_timeout_s"):
            if name not in before:
                os.environ.pop(name, None)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep what Ray's C++ part writes while it connects off the screen; what went wrong comes as an exception."""
    sys.stderr.flush()
    keep = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(keep, 2)
    finally:
        os.close(keep)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
