"""Group commit: everybody's changes to the database in one transaction, one sync for all.

A thread of its own takes all changes that wait, makes each in a savepoint, commits once and then
answers all. Knows nothing of what the changes are.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], T]
MOST_AT_ONCE = 4096


def connect(path: Path) -> sqlite3.Connection:
    """Open a database so that what is committed survives a loss of power."""
    # Transactions are begun by hand; the reading connection is used by one thread at a time.
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    return database


class Writer:
    """The one thread that writes to a database.

    Args:
        path: of the database.

    Attributes:
        commits: transactions so far, each of which waited for the disk once.
    """

    def __init__(self, path: Path) -> None:
        self.commits = 0
        self._closed = False
        self._path = path
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="database writer", daemon=True)
        self._thread.start()

    async def do(self, change: Change[T]) -> T:
        """Make a change; when this returns, it is on the disk. Changes are made in their order.

        Raises:
            sqlite3.Error: it could not be made, or the disk is full.
            Exception: what `change` raises; nothing of it is left then.
        """
        if self._closed:
            raise sqlite3.ProgrammingError("the database is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.put(_Waiting(change, future, loop))
        # Whoever waits may be cancelled; the change is made all the same.
        return await asyncio.shield(future)

    def close(self) -> None:
        """Make what waits, then end."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        database = connect(self._path)
        more = True
        while more:
            batch = [self._waiting.get()]
            while len(batch) < MOST_AT_ONCE and not self._waiting.empty():
                batch.append(self._waiting.get())
            more = None not in batch
            some = [one for one in batch if one is not None]
            if some:
                self._commit(database, some)
        database.close()

    def _commit(self, database: sqlite3.Connection, batch: list[_Waiting]) -> None:
        try:
            database.execute("BEGIN IMMEDIATE")
            for one in batch:
                one.make(database)
            database.execute("COMMIT")
            self.commits += 1
        except Exception as error:
            logger.error("the database does not take %d changes: %s", len(batch), error)
            if database.in_transaction:
                database.execute("ROLLBACK")
            for one in batch:
                one.error = error
        for loop in {one.loop for one in batch}:
            answered = [one for one in batch if one.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_answer, answered)


@dataclass(eq=False)
class _Waiting:
    """A change, whoever waits for it, and what came of it."""

    change: Change[Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    result: object = None
    error: Exception | None = None

    def make(self, database: sqlite3.Connection) -> None:
        """Make the change, or all of it undone."""
        database.execute("SAVEPOINT one")
        try:
            self.result = self.change(database)
            database.execute("RELEASE one")
        except Exception as error:
            if not database.in_transaction:  # a full disk rolls all back at once
                raise
            self.error = error
            database.execute("ROLLBACK TO one")
            database.execute("RELEASE one")


def _answer(batch: list[_Waiting]) -> None:
    for one in batch:
        if one.future.done():
            continue
        if one.error is not None:
            one.future.set_exception(one.error)
        else:
            one.future.set_result(one.result)
