"""Opening the run's database and saying plainly what is wrong with it.

SQLite files are opened in WAL mode: one writer, and readers beside it at any time, also after the writer was killed. On a
PostgreSQL server each run has a schema of its own. Knows nothing of trials (`nas.store` does). Start with `connect` and `explain`.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from nas.errors import RunError
from nas.server import explain_server, parse_url, schema_name, server_engine, server_url, shown

__all__ = ["Database", "connect", "connect_to_copy", "explain", "place", "schema_name", "server_engine", "sqlite_path"]

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another process's transaction before it gives up."""

Mode = Literal["create", "write", "read"]


@dataclass(frozen=True)
class Database:
    """An open database and its name in messages (never with a password); whether it is on a server."""

    engine: Engine
    where: str
    server: bool = False


def sqlite_path(url_or_path: str | Path) -> Path | None:
    """The file a path or `sqlite:///` URL names; None for other databases and for SQLite in memory.

    Raises:
        RunError: something that looks like a URL is none.
    """
    text = str(url_or_path)
    if text == ":memory:":
        return None
    if "://" not in text:
        return Path(text)
    url = parse_url(text)
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))


def connect(url_or_path: str | Path, mode: Mode, run: str = "run") -> Database:
    """Open a database; the first statement is only sent by the caller.

    Args:
        url_or_path: a file, or the URL of a PostgreSQL database ("postgresql+psycopg://user@host/name").
        mode: "create" and "write" may write; only "create" makes a file that is not there. "read" never changes the file,
            works in folders that may not be written to, and beside a running writer.
        run: the run's name, for a server that holds many.

    Raises:
        RunError: the file is not there, or the URL is of no known kind.
    """
    path = sqlite_path(url_or_path)
    if path is None and ("://" not in str(url_or_path) or parse_url(str(url_or_path)).get_backend_name() == "sqlite"):
        return Database(_sqlite_engine("file::memory:", mode), "the database in memory")
    if path is None:
        return _connect_server(str(url_or_path), run, mode)
    if mode != "create" and not path.exists():
        raise RunError(
            f"{path}: expected the database of a run, found no such file. "
            "Check the run folder's name; `nas search CONFIG` makes a new run"
        )
    if path.is_dir():
        raise RunError(f"{path}: expected a database file, found a folder")
    return Database(_sqlite_engine(_uri(path, {"create": "rwc", "write": "rw", "read": "ro"}[mode]), mode), str(path))


def connect_to_copy(path: Path) -> Database:
    """Open a private copy of an SQLite file and of its write-ahead log, taken now.

    For folders in which SQLite may not make its own index of the log. The copy goes away with the returned object.
    """
    folder = tempfile.mkdtemp(prefix="nas-read-")
    try:
        for suffix in ("", "-wal"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                shutil.copyfile(source, Path(folder) / f"copy.db{suffix}")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    database = Database(_sqlite_engine(_uri(Path(folder) / "copy.db", "rw"), "read"), str(path))
    weakref.finalize(database.engine, shutil.rmtree, folder, ignore_errors=True)
    return database


def explain(error: Exception, where: str) -> RunError:
    """The `RunError` for what a database driver raised: cause in plain words, and the cure."""
    at_server = explain_server(error, where)
    if at_server is not None:
        return at_server
    cause = str(error.orig) if isinstance(error, DBAPIError) and error.orig is not None else str(error)
    low = cause.lower()
    if "disk is full" in low or "no space left" in low:
        return RunError(
            f"{where}: the disk is full; the step that failed was undone and the database is intact. "
            "Free some space and start the same command again"
        )
    if "not a database" in low or "malformed" in low:
        return RunError(
            f"{where}: damaged or not the database of a run ({cause}). "
            "Restore it from a copy, or start a new run in another folder"
        )
    if "no such table" in low or "no such column" in low or "does not exist" in low:
        return RunError(f"{where}: not the database of a run ({cause}). Check the path or URL")
    if "locked" in low:
        return RunError(
            f"{where}: another process has been writing for {BUSY_TIMEOUT_S:.0f} s ({cause}). Wait for it, or end it"
        )
    if "readonly" in low or "read-only" in low or "unable to open" in low or "permission" in low:
        return RunError(
            f"{where}: cannot be opened for writing ({cause}). Check owner and permissions of file and folder"
        )
    if "disk i/o error" in low:
        return RunError(
            f"{where}: the disk refused ({cause}): a quota, a full or failing disk, or a lost network drive. "
            "Nothing of the failed step was kept; cure the disk and start the same command again"
        )
    return RunError(f"{where}: the database refused: {cause}")


def _uri(path: Path, mode: str) -> str:
    return f"{path.absolute().as_uri()}?mode={mode}"


def _sqlite_engine(uri: str, mode: Mode) -> Engine:
    def open_file() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            if mode == "read":
                connection.execute("PRAGMA query_only = ON")
            else:
                if mode == "create":  # remembered in the file; opening must not change a file that may not be ours
                    connection.execute("PRAGMA journal_mode = WAL")
                # A power cut may lose the last commits, never the database; a kill -9 loses nothing.
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite://", creator=open_file, poolclass=StaticPool)
    begin = "BEGIN" if mode == "read" else "BEGIN IMMEDIATE"

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)  # the driver's own transactions are off (isolation_level=None)

    return engine


def _connect_server(text: str, run: str, mode: Mode) -> Database:
    return Database(server_engine(text, run, create=mode == "create"), shown(server_url(text)), server=True)


def place(temporary: Path, final: Path) -> None:
    """Give a finished file its name in one step; never replaces a file that is there.

    Raises:
        FileExistsError: `final` exists.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if final.exists():
            raise FileExistsError(str(final)) from None
        temporary.rename(final)
    temporary.unlink(missing_ok=True)
