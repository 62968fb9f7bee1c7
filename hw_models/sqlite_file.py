"""A SQLite file that many processes append to and that stops nobody by being damaged, locked or full.

`LayerTable` and `MeasurementStore` are made of it. A file in the user's cache folder is replaced when it cannot be used, with one
warning: a damaged one is moved aside and a new one begun, one that cannot be written is read into memory and goes on there. A file
the caller named is never moved or replaced: the error says what is wrong.

Start with `SqliteFile`: subclasses set its class attributes and put their statements through `_do`.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import platformdirs

__all__ = ["SqliteFile", "SqliteFileError", "cache_folder"]

BUSY_S = 20.0


class SqliteFileError(RuntimeError):
    """A file of measurements cannot be used; says why and what to do."""


def cache_folder() -> Path:
    """Where measurements are remembered: $NAS_CACHE_DIR, or the user's cache folder for this project."""
    return Path(os.environ.get("NAS_CACHE_DIR") or platformdirs.user_cache_dir("sparse-nas", appauthor=False))


class SqliteFile:
    """An open file, or the memory that takes its place. May be used by several threads and by forked children, which open it anew.

    Args:
        path: SQLite file, made if missing. Default: `default_name` in `cache_folder()`, which never stops anybody, only warns
            once: a damaged file is moved aside (`NAME.damaged`) and a new one begun; if it cannot be written, stays locked or
            cannot be moved, what can be read of it and all that is added lives in memory, for this process.

    Attributes:
        path: the file; None when in memory.
        default_name: of the file in the cache folder; another schema, another name: old and new releases can work side by side.
        title, plural, again: how messages call the file and its rows, and what becomes of lost ones.
        cure_damaged: what to do with a damaged file that was named by the caller.
        schema: statements CREATE ... IF NOT EXISTS.
        synchronous: of SQLite. NORMAL never loses what was added to a killed process, FULL not to a power cut either.
        error: raised for a file named by the caller; a subclass of `SqliteFileError`.

    Raises:
        SqliteFileError: a file given by `path` is damaged, no SQLite file, stays locked, or cannot be written; it is left alone.
    """

    default_name: ClassVar[str]
    title: ClassVar[str]
    plural: ClassVar[str]
    again: ClassVar[str]
    cure_damaged: ClassVar[str]
    schema: ClassVar[str]
    synchronous: ClassVar[str] = "NORMAL"
    error: ClassVar[type[SqliteFileError]] = SqliteFileError

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._explicit = path is not None
        self.path: Path | None = Path(path) if path is not None else cache_folder() / self.default_name
        self._connection: sqlite3.Connection | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._file: tuple[int, int] | None = None
        self._moved = False
        self._open()

    def close(self) -> None:
        """Close the file; the next use opens it again. What lives in memory stays until the process ends."""
        if self._connection is not None and self._owner == os.getpid() and self.path is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> None:
        while self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _identity(self.path)
                self._connection = self._connected(self.path)
                self._file = _identity(self.path)
                return
            except (OSError, sqlite3.Error) as error:
                if not self._do_without(error):
                    raise self._error(error) from error
        if self._connection is None:
            self._connection = self._in_memory(None)

    def _do(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """The result of one statement or transaction, in the file or in what takes its place.

        Args:
            work: may be called again with another connection when the first fails; so it is all or nothing.
        """
        if self._owner != os.getpid():  # a forked child
            self._lock, self._owner = threading.RLock(), os.getpid()
            if self.path is not None:
                _inherited.append(self._connection)  # closing it would be the parent's business
                self._connection = None
        with self._lock:
            while True:
                if self._connection is not None and self.path is not None and _identity(self.path) != self._file:
                    self.close()  # deleted, or moved aside by another process; what is written there nobody would find
                if self._connection is None:
                    self._open()
                assert self._connection is not None
                try:
                    return work(self._connection)
                except sqlite3.Error as error:
                    if not self._do_without(error):
                        raise self._error(error) from error

    def _do_without(self, error: Exception) -> bool:
        """After a fault of the user's cache: leave the file, so that the next `_open` finds a new one or takes the memory."""
        if self._explicit or self.path is None or not (_damaged(error) or _unwritable(error) or _locked(error)):
            return False
        with suppress(sqlite3.Error):
            self.close()
        self._connection = None
        where = self.path
        if _damaged(error) and not self._moved:
            self._moved = True  # once only: a disk that damages every new file is left for the memory
            if _identity(where) != self._file:  # another process has moved it already
                return True
            aside = _free_name(where)
            with suppress(OSError):
                _move(where, aside)
                outcome = self._salvage(aside)
                _warn_once(f"{self.title} {where} is damaged ({error}); it was moved to {aside.name}, and {outcome}")
                return True
        self._connection, self.path = self._in_memory(None if _damaged(error) else where), None
        if _damaged(error):
            self._salvage(where)
        _warn_once(
            f"{self.plural} cannot be kept in {where} ({error}); they live in memory and are measured again next time. "
            "Set NAS_CACHE_DIR to a folder that can be written"
        )
        return True

    def _salvage(self, aside: Path) -> str:
        """Called after a damaged file was moved: what it held may be added to the new one. Says what becomes of it."""
        return self.again

    def _in_memory(self, source: Path | None) -> sqlite3.Connection:
        """A database in memory, with what can be read of a file."""
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        if source is not None and source.is_file():
            uri = f"{source.resolve().as_uri()}?mode=ro"
            with suppress(sqlite3.Error), closing(sqlite3.connect(uri, uri=True, timeout=1)) as old:
                old.execute("BEGIN")
                old.execute(
                    "SELECT name FROM sqlite_master"
                ).fetchall()  # raises where it is locked; a backup would wait for ever
                old.backup(memory)
                memory.executescript(self.schema)
                return memory
            memory.close()
            memory = sqlite3.connect(":memory:", check_same_thread=False)
        memory.executescript(self.schema)
        return memory

    def _error(self, error: Exception) -> SqliteFileError:
        text = str(error)
        if _locked(error):
            cure = f"another process has held it for {BUSY_S:.0f} s; end that process, or use another file or NAS_CACHE_DIR"
        elif _unwritable(error):
            cure = "choose a folder that can be written and has room"
        else:
            cure = self.cure_damaged
        return self.error(f"{self.title} {self.path} cannot be used: {text}; {cure}")

    def _connected(self, path: Path) -> sqlite3.Connection:
        """An open, writable file. Several processes may be doing this at the same moment."""
        wanted = re.findall(r"CREATE \w+ IF NOT EXISTS (\w+)", self.schema)
        deadline = time.monotonic() + BUSY_S
        while True:
            db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")  # does not wait for others by itself, hence the loop
                db.execute(f"PRAGMA synchronous={self.synchronous}")
                there = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
                if not there:
                    db.executescript(f"BEGIN IMMEDIATE; {self.schema} COMMIT;")
                elif not there.issuperset(wanted):
                    raise sqlite3.DatabaseError(
                        f"not a database of ours, it has tables of something else: {', '.join(sorted(there))}"
                    )
                db.execute("BEGIN IMMEDIATE")  # can it be written?
                db.rollback()
                return db
            except sqlite3.OperationalError as error:
                db.close()
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except BaseException:
                db.close()
                raise


def _unwritable(error: BaseException | None) -> bool:
    """Is this about permission, a missing folder or a full disk, not about what is in the file?"""
    if isinstance(error, OSError):
        return True
    words = ("unable to open", "readonly", "disk is full", "disk I/O")
    return isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in words)


def _locked(error: BaseException | None) -> bool:
    """Does another process hold the file?"""
    return isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in ("locked", "busy"))


def _damaged(error: BaseException | None) -> bool:
    """Is this about what is in the file: damaged, no SQLite file, or tables of something else?"""
    words = (
        "not a database",
        "malformed",
        "encrypted",
        "no such table",
        "no such column",
        "has no column",
        "indexed",
        "decode",
    )
    return isinstance(error, sqlite3.DatabaseError) and any(word in str(error) for word in words)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name now; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _free_name(path: Path) -> Path:
    """NAME.damaged, or NAME.damaged.2, ...: an earlier damaged file may still be wanted."""
    first = path.with_name(f"{path.name}.damaged")
    number, free = 1, first
    while free.exists():
        number += 1
        free = first.with_name(f"{first.name}.{number}")
    return free


def _move(path: Path, aside: Path) -> None:
    """Rename a database, its log first: a new file of the same name must not find the old one's log."""
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")


_inherited: list[sqlite3.Connection | None] = []  # of parents of this process, never used and never closed
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
