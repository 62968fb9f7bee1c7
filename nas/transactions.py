"""Transactions that outlive the database for a while: what a lost connection undid is done again on the next one.

A transaction is a list of functions of a connection. When the connection is lost, they are called again, in order, on a new one;
a commit whose answer was lost is looked up first (`Guard.did`), so that everything is done once. Errors that say nothing about
the connection are not tried again. Knows neither tables nor trials. Start with `Transactions`.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from nas.database import Database, explain
from nas.errors import RunError
from nas.server import lost

PATIENCE_S = 300.0
"""How long a transaction is tried again while the server cannot be reached."""
_WAITS_S = (0.2, 5.0)
"""The first wait between two tries, and the longest; each is twice the one before."""

T = TypeVar("T")
Work = Callable[[Connection], T]


class Guard(Protocol):
    """What stands at the beginning of every writing transaction, in the same transaction."""

    def enter(self, connection: Connection, token: str) -> None:
        """Leave `token` in the database; wait for whoever holds it.

        Raises:
            RunError: this process may not write any more.
        """
        ...

    def did(self, connection: Connection, token: str) -> bool:
        """Whether the transaction of that token was committed; waits until that is certain."""
        ...


class Transactions:
    """One transaction at a time, over all threads.

    Args:
        database: where.
        patience_s: how long to try again after a lost connection, seconds.

    Attributes:
        guard: of writing transactions; None where nobody else can write.
        message: is told when the database cannot be reached, and when it is back.
    """

    def __init__(self, database: Database, *, patience_s: float = PATIENCE_S) -> None:
        self.where = database.where
        self.patience_s = patience_s
        self.guard: Guard | None = None
        self.message: Callable[[str], None] = lambda text: None
        self._engine = database.engine
        self._lock = threading.RLock()
        self._block: _Block | None = None

    @contextmanager
    def block(self, *, writing: bool = True) -> Iterator[None]:
        """Make the `run`s inside one transaction: kept all, or (on any exception) none. The outermost block commits.

        Raises:
            RunError: the database refused, or could not be reached for too long.
        """
        with self._lock:
            if self._block is not None:
                yield
                return
            block = self._block = _Block(self._engine, self.guard if writing else None)
            try:
                yield
                self._persist(block.commit)
            finally:
                self._block = None
                block.drop()

    def run(self, work: Work[T], *, writing: bool) -> T:
        """Call `work` in a transaction: the one of the block around, or its own. It may be called several times.

        Raises:
            RunError: as for `block`. Exceptions of `work` itself pass.
        """
        with self.block(writing=writing):
            block = self._block
            assert block is not None
            return self._persist(lambda: block.run(work))

    def _persist(self, step: Callable[[], T]) -> T:
        begun, wait, told = time.monotonic(), 0.0, False
        while True:
            try:
                result = step()
            except (DBAPIError, sqlite3.Error) as error:
                left = begun + self.patience_s - time.monotonic()
                if not lost(error) or self.patience_s <= 0:
                    raise explain(error, self.where) from error
                if left <= 0:
                    raise RunError(
                        f"{explain(error, self.where)}; tried for {self.patience_s:.0f} s. Everything before is kept: start the "
                        "same command again when the server is back"
                    ) from error
                if wait and not told:  # the first new try is made at once and in silence
                    told = True
                    self.message(
                        f"storage {self.where} cannot be reached; trying again for {_duration(self.patience_s)} "
                        f"({' '.join(str(error.orig).split()) if isinstance(error, DBAPIError) else error})"
                    )
                time.sleep(min(wait, left))
                wait = min(2 * wait, _WAITS_S[1]) or _WAITS_S[0]
                continue
            if told:
                self.message(f"storage {self.where} is back after {time.monotonic() - begun:.0f} s")
            return result


class _Block:
    """One transaction, over as many connections as it takes."""

    def __init__(self, engine: Engine, guard: Guard | None) -> None:
        self._engine = engine
        self._guard = guard
        self._token = uuid.uuid4().hex
        self._connection: Connection | None = None
        self._done: list[Work[Any]] = []
        self._committing = False

    def run(self, work: Work[T]) -> T:
        with self._dropping():
            result = work(self._ready())
        self._done.append(work)
        return result

    def commit(self) -> None:
        if not self._done or (self._committing and self._guard is None):
            return  # nothing was done, or nothing that can be lost
        with self._dropping():
            if self._committing and self._connection is None and self._did():
                return
            connection = self._ready()
            self._committing = True
            connection.commit()

    def drop(self) -> None:
        """Undo what is not committed, and give the connection back."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(DBAPIError, sqlite3.Error):
                connection.close()

    def _did(self) -> bool:
        assert self._guard is not None
        with self._engine.begin() as connection:
            return self._guard.did(connection, self._token)

    def _ready(self) -> Connection:
        if self._connection is None:
            connection = self._connection = self._engine.connect()
            try:
                connection.begin()
                if self._guard is not None:
                    self._guard.enter(connection, self._token)
                for work in self._done:
                    work(connection)
            except Exception as error:
                if not lost(error):
                    self.drop()
                raise
        return self._connection

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Leave a connection that is lost."""
        try:
            yield
        except DBAPIError as error:
            if lost(error):
                if self._connection is not None:
                    with suppress(DBAPIError):
                        self._connection.invalidate()
                self.drop()
            raise


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
