"""Files of a job between the driver and workers that do not share a disk.

A job reads and writes below the run's folder. A worker that sees that folder uses it; any other works in a scratch copy: what the
job needs is put there first, and what it changed there is taken back after every report and at the end. Names that begin with a
dot are scratch and stay. Knows no engine: the bytes travel as the executor likes. Start with `Workplace`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from nas.errors import RunError

RUN_ID = "run.id"
"""File in a run's folder by which a worker knows that it sees the same folder as the driver."""

_NUMBERS = itertools.count()  # a process may have several

Files = dict[str, bytes | None]
"""Path below the run's folder -> content; None: the file is gone."""


def run_id(folder: Path) -> str:
    """The name of a run's folder that no other has; made when it is first asked for.

    Raises:
        RunError: the folder cannot be written.
    """
    path = folder / RUN_ID
    try:
        if not path.is_file():
            scratch = path.with_name(f".{RUN_ID}.{os.getpid()}")
            scratch.write_text(uuid.uuid4().hex)
            os.replace(scratch, path)
        return path.read_text().strip()
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def pack(folder: Path, needs: Iterable[str]) -> Files:
    """The files that a job needs, folders with everything in them; what is not there is left out.

    Raises:
        RunError: one is there and cannot be read.
        ValueError: a path leads out of the folder.
    """
    found: Files = {}
    for need in needs:
        path = _inside(folder, need)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in inside:
            name = file.relative_to(folder).as_posix()
            if file.is_file() and not _hidden(name):
                try:
                    found[name] = file.read_bytes()
                except FileNotFoundError:
                    continue  # an older checkpoint that has just been removed
                except OSError as error:
                    raise RunError(f"{file}: cannot be read: {error.strerror or error}") from error
    return found


def unpack(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Put files where they belong, each whole or not at all; those that are gone are removed.

    Raises:
        RunError: the folder cannot be written.
        ValueError: a path leads out of the folder.
    """
    for name, content in files.items():
        path = _inside(folder, name)
        try:
            if content is None:
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            scratch.write_bytes(content)
            os.replace(scratch, path)
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written: {error.strerror or error}; free some space or fix the rights, then start the same "
                "command again"
            ) from error


class Workplace:
    """Where the jobs of one worker read and write: the run's folder if this machine sees it, else a scratch folder.

    A scratch folder is this object's own, below `scratch` (default: the machine's temporary folder), and is removed with the
    object; one that a killed process left is removed by the next worker of the same run on this machine.

    Args:
        folder: the run's, as the driver names it, absolute; None: jobs have no files.
        identity: `run_id` of it.
        scratch: where scratch folders are made.

    Attributes:
        folder: where to work.
        shared: whether that is the run's folder itself, so that nothing needs to travel.
    """

    def __init__(self, folder: str | Path | None, identity: str, scratch: Path | None = None) -> None:
        given = None if folder is None else Path(folder)
        self.shared = given is None or _reads(given / RUN_ID) == identity
        if given is None or self.shared:
            self.folder = given or Path()
            return
        base = Path(scratch or tempfile.gettempdir())
        try:
            base.mkdir(parents=True, exist_ok=True)
            _sweep(base, identity)
            self.folder = base / f"{_ours(identity)}-{next(_NUMBERS)}-{os.getpid()}"
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{base}: no scratch folder can be made on this machine: {error.strerror or error}"
            ) from error
        self._known: dict[str, tuple[int, int, int]] = {}
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def begin(self, files: Mapping[str, bytes | None]) -> None:
        """Forget the last job's files, and put this one's there."""
        if self.shared:
            return
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        unpack(self.folder, files)
        self._known = self._state()

    def changes(self) -> Files:
        """What the job has written or removed since the last call; nothing where the folder is shared."""
        if self.shared:
            return {}
        state = self._state()
        changed = [name for name, mark in state.items() if self._known.get(name) != mark]
        gone: Files = {name: None for name in self._known if name not in state}
        self._known = state
        return pack(self.folder, changed) | gone

    def _state(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not _hidden(name) and path.is_file():
                facts = path.stat()
                found[name] = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        return found


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise ValueError(f"expected a path below the run's folder, got {name!r}")
    return folder.joinpath(*parts)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _reads(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _ours(identity: str) -> str:
    """How the names of this machine's scratch folders of a run begin: other machines may see the same disk."""
    return f"nas-{identity}-{socket.gethostname()}"


def _sweep(base: Path, identity: str) -> None:
    """Remove this machine's scratch folders of this run whose process is gone."""
    for path in base.glob(f"nas-{identity}-*"):
        ours, _, pid = path.name.rsplit("-", 2)
        if (
            ours == _ours(identity)
            and pid.isdecimal()
            and not Path(f"/proc/{pid}").exists()
            and Path("/proc/self").exists()
        ):
            shutil.rmtree(path, ignore_errors=True)
