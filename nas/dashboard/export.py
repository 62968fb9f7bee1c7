"""A run as an Optuna storage file: SQLite (.db) or a journal (.log), for what reads Optuna's files. Start with `export_study`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event

from nas.dashboard.study import StudyView, directions
from nas.database import place
from nas.errors import RunError
from nas.run import Run


def export_study(run: Run, path: str | Path) -> int:
    """Write the trials of a run, as they are now, as the only study of a new file; the file appears whole or not at all.

    Args:
        run: finished or not.
        path: a new file; .db, .sqlite or .sqlite3 for SQLite, .log or .journal for a journal (which is faster to write).

    Returns:
        The number of trials written.

    Raises:
        RunError: the file is there already, is of another kind, or cannot be written.
    """
    path = Path(path)
    if path.suffix not in _KINDS:
        raise RunError(f"{path}: expected a name that ends in {', '.join(_KINDS)}, got {path.suffix or 'no ending'!r}")
    if path.exists():
        raise RunError(f"{path}: there is such a file; nothing was changed. Remove it, or give another name")
    temporary = path.with_name(f".{path.name}.new")
    trials = StudyView(run.objectives, run.curves).update(run.trials)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        temporary.unlink(missing_ok=True)
        storage, close = _KINDS[path.suffix](temporary)
        try:
            study = optuna.create_study(storage=storage, study_name=run.name, directions=directions(run.objectives))
            with warnings.catch_warnings():  # names of objectives are experimental in Optuna
                warnings.simplefilter("ignore")
                study.set_metric_names(list(run.objectives))
            study.add_trials(trials)
        finally:
            close()
        place(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(trials)


def _sqlite(path: Path) -> tuple[BaseStorage, Callable[[], Any]]:
    storage = RDBStorage(f"sqlite:///{path}")

    # Nothing is lost if the file is: it gets its name only when it is whole. Waiting for the disk was most of the time.
    @event.listens_for(storage.engine, "connect")
    def _quick(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    storage.engine.dispose()  # connections from now on

    def close() -> None:
        storage.remove_session()
        storage.engine.dispose()

    return storage, close


def _journal(path: Path) -> tuple[BaseStorage, Callable[[], Any]]:
    return JournalStorage(JournalFileBackend(str(path))), lambda: None


_KINDS: dict[str, Callable[[Path], tuple[BaseStorage, Callable[[], Any]]]] = {
    ".db": _sqlite,
    ".sqlite": _sqlite,
    ".sqlite3": _sqlite,
    ".log": _journal,
    ".journal": _journal,
}
