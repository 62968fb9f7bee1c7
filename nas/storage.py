"""Where a run's database is: the file run.db in its folder, or a server, which storage.json in the folder names without a password.

Decided once, when the run begins. Start with `run_storage`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL

from nas.database import place
from nas.errors import RunError
from nas.server import server_url, shown

DATABASE = "run.db"
STORAGE = "storage.json"
ENVIRONMENT = "NAS_STORAGE"


@dataclass(frozen=True)
class Storage:
    """A run's database.

    Attributes:
        url: of the server, with the password if one was given; "" for run.db.
        run: the run's name on the server.
    """

    url: str
    run: str


def is_run(folder: Path) -> bool:
    """Whether a run's database belongs to the folder."""
    return (folder / DATABASE).is_file() or (folder / STORAGE).is_file()


def run_storage(folder: Path, run: str = "", asked: str | None = None) -> Storage:
    """The database of the run in a folder, or the one that a new run there is to have.

    Args:
        folder: the run's.
        run: the name of a new run.
        asked: URL that was asked for; None: nothing was, so a new run uses the environment's NAS_STORAGE, if it is set.

    Raises:
        RunError: the run has another database than was asked for, the URL is wrong, or storage.json is damaged.
    """
    fixed, environment = _read(folder), os.environ.get(ENVIRONMENT, "")
    if fixed is None and (folder / DATABASE).is_file():
        if asked:
            raise RunError(
                f"{folder}: expected no --storage, as this run's database is {folder / DATABASE}; got {shown(server_url(asked))}. "
                "Leave it out, or give the new search another folder with --out"
            )
        return Storage("", run)
    if fixed is None:
        url = environment if asked is None else asked
        if url:
            server_url(url)
        return Storage(url, run)
    if asked is not None and (not asked or _where(server_url(asked)) != _where(server_url(fixed.url))):
        other = shown(server_url(asked)) if asked else DATABASE
        raise RunError(
            f"{folder}: this run's database is {fixed.url}, and now {other} is asked for. Leave --storage out, or give the new "
            "search another folder with --out"
        )
    for candidate in (asked, environment):
        if candidate and _where(server_url(candidate)) == _where(server_url(fixed.url)):
            return Storage(candidate, fixed.run)
    return fixed


def write_storage(folder: Path, storage: Storage) -> None:
    """Remember the server in the folder, without the password; nothing if it is remembered already.

    Raises:
        RunError: the folder cannot be written.
    """
    path = folder / STORAGE
    temporary = path.with_name(f".{STORAGE}.{os.getpid()}")
    try:
        if not path.is_file():
            temporary.write_text(
                json.dumps({"url": shown(server_url(storage.url)), "run": storage.run}, indent=1) + "\n"
            )
            place(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def _read(folder: Path) -> Storage | None:
    path = folder / STORAGE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        url, run = found["url"], found["run"]
        if not isinstance(url, str) or not isinstance(run, str):
            raise TypeError("expected text for url and run")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f'{path}: damaged ({error!r}); it says where the run\'s database is: {{"url": "postgresql+psycopg://user@host/db", '
            '"run": "name"}'
        ) from error
    server_url(url)
    return Storage(url, run)


def _where(url: URL) -> tuple[str, str, str]:
    """What makes two URLs the same database; the user may differ."""
    host = url.host or url.query.get("host") or os.environ.get("PGHOST") or ""
    port = url.port or url.query.get("port") or os.environ.get("PGPORT") or 5432
    return str(host).lower(), str(port), url.database or url.username or ""
