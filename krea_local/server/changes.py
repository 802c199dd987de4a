"""Each change to the database, as one function of its connection; see `store` for the tables.

`writer` makes them, many in a transaction. Knows nothing of threads, files on disk or asyncio.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from krea_local.server.jobs import Job, Log, StoredFile

MAX_ATTEMPTS = 3
MAX_TRIES = 10
"""Of delivering a webhook, as the hosted API does."""


@dataclass(frozen=True)
class Waiting:
    """What the queue knows of a job, beside the job.

    Attributes:
        seq: its place in the order of submission.
        low_priority: after all others.
        start_by: seconds since 1970 by which it is to start, or None.
        input: the id of its input image's file, once that is there.
        source: the URL that its input image is fetched from, or None.
    """

    seq: int = 0
    low_priority: bool = False
    start_by: float | None = None
    input: str | None = None
    source: str | None = None

    @property
    def lacks_input(self) -> bool:
        """Whether its input image is still to be fetched."""
        return self.source is not None and self.input is None


@dataclass(frozen=True)
class Delivery:
    """A webhook that is to be delivered.

    Attributes:
        job: its id.
        tries: that failed.
        next: seconds since 1970 of the next one.
    """

    job: str
    tries: int
    next: float


def alone(database: sqlite3.Connection, change: Callable[[sqlite3.Connection], None]) -> None:
    """Make one change in a transaction of its own."""
    database.execute("BEGIN IMMEDIATE")
    try:
        change(database)
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def recover(database: sqlite3.Connection) -> None:
    """After a server ended without a word: what ran waits again, where it was in the order."""
    now = time.time()
    died = "the server or its worker ended while this ran"
    rows = database.execute("SELECT id, attempts, cancelling FROM jobs WHERE state = 'running'")
    for row in rows.fetchall():
        if row["cancelling"]:
            _end(database, row["id"], "cancelled", now)
        elif row["attempts"] >= MAX_ATTEMPTS:
            _end(database, row["id"], "failed", now, failure=json.dumps(given_up(died)))
        else:
            log = Log(f"{died}; it waits again", "WARN", now)
            hand_back(database, row["id"], log, count_attempt=True)


def given_up(reason: str) -> dict[str, Any]:
    """The failure, in JSON, of a job that was begun as often as may be."""
    text = f"given up after {MAX_ATTEMPTS} attempts: {reason}"
    return {
        "status": 500,
        "error_type": "internal_error",
        "body": {"detail": text, "error_type": "internal_error"},
    }


def add_job(
    database: sqlite3.Connection,
    job: Job,
    arguments: str,
    waiting: Waiting,
    files: Sequence[StoredFile],
) -> Waiting:
    """A new job at the end of the order; `LookupError` if its input is gone."""
    cursor = database.execute(
        "INSERT INTO jobs (id, endpoint, arguments, state, created, low_priority, start_by, input, "
        "source, webhook) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
        (
            job.id,
            job.endpoint,
            arguments,
            job.created,
            waiting.low_priority,
            waiting.start_by,
            waiting.input,
            waiting.source,
            job.webhook,
        ),
    )
    for file in files:
        add_file(database, file, job.id)
    if waiting.input is not None:
        there = database.execute("SELECT 1 FROM files WHERE id = ?", (waiting.input,)).fetchone()
        if there is None:
            raise LookupError("the uploaded image is not there any more")
    assert cursor.lastrowid is not None
    return replace(waiting, seq=cursor.lastrowid)


def add_file(database: sqlite3.Connection, file: StoredFile, job: str | None) -> None:
    """Name a file, of a job or an upload."""
    database.execute(
        "INSERT INTO files (id, content_type, size, name, created, job) VALUES (?, ?, ?, ?, ?, ?)",
        (file.id, file.content_type, file.size, file.name, time.time(), job),
    )


def add_input(database: sqlite3.Connection, id: str, file: StoredFile) -> bool:
    """Name the fetched input image of a job; False, and nothing is done, if it waits no more."""
    cursor = database.execute(
        "UPDATE jobs SET input = ? WHERE id = ? AND state = 'queued'", (file.id, id)
    )
    if cursor.rowcount:
        add_file(database, file, id)
    return bool(cursor.rowcount)


def claim(database: sqlite3.Connection, id: str, log: Log) -> None:
    """A job is running since `log` was said, and this attempt counts."""
    database.execute(
        "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1, start_by = NULL "
        "WHERE id = ?",
        (log.timestamp, id),
    )
    add_log(database, id, log)


def hand_back(database: sqlite3.Connection, id: str, log: Log, *, count_attempt: bool) -> None:
    """A running job waits again, where it was in the order."""
    database.execute(
        "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - ? WHERE id = ?",
        (0 if count_attempt else 1, id),
    )
    add_log(database, id, log)


def mark_cancelling(database: sqlite3.Connection, id: str) -> None:
    """Should the server end before the job does: it is not to run again."""
    database.execute("UPDATE jobs SET cancelling = 1 WHERE id = ?", (id,))


def finish(
    database: sqlite3.Connection,
    job: Job,
    outcome: str | None,
    failure: str | None,
    pictures: Sequence[StoredFile],
    logs: Sequence[Log],
) -> None:
    """The end of a job: its state, its pictures, its last lines, its webhook, all or none."""
    assert job.finished is not None
    _end(database, job.id, job.state, job.finished, outcome, failure)
    for file in pictures:
        add_file(database, file, job.id)
    for log in logs:
        add_log(database, job.id, log)


def _end(
    database: sqlite3.Connection,
    id: str,
    state: str,
    finished: float,
    outcome: str | None = None,
    failure: str | None = None,
) -> None:
    database.execute(
        "UPDATE jobs SET state = ?, finished = ?, outcome = ?, failure = ? WHERE id = ?",
        (state, finished, outcome, failure, id),
    )
    database.execute(
        "INSERT INTO deliveries (job, next) SELECT id, ? FROM jobs WHERE id = ? AND webhook "
        "IS NOT NULL",
        (finished, id),
    )


def add_log(database: sqlite3.Connection, id: str, log: Log) -> None:
    """One more line."""
    database.execute(
        "INSERT INTO logs (job, message, level, timestamp) VALUES (?, ?, ?, ?)",
        (id, log.message, log.level, log.timestamp),
    )


def delete(database: sqlite3.Connection, id: str) -> list[str] | None:
    """Forget a finished job; the ids of its files, or None if there is no such job."""
    row = database.execute("SELECT finished FROM jobs WHERE id = ?", (id,)).fetchone()
    if row is None or row["finished"] is None:
        return None
    # A picture that another job is to redraw stays, as an upload would.
    database.execute(
        "UPDATE files SET job = NULL WHERE job = ? AND id IN "
        "(SELECT input FROM jobs WHERE input IS NOT NULL AND finished IS NULL)",
        (id,),
    )
    files = database.execute("SELECT id FROM files WHERE job = ?", (id,)).fetchall()
    database.execute("DELETE FROM jobs WHERE id = ?", (id,))
    return [file["id"] for file in files]


_OLDEST = """
SELECT 'job' AS kind, id, finished AS age,
       (SELECT coalesce(sum(size), 0) FROM files WHERE job = jobs.id) AS bytes
FROM jobs
WHERE finished IS NOT NULL
  AND id NOT IN (SELECT job FROM deliveries WHERE delivered IS NULL AND tries < :max_tries)
UNION ALL
SELECT 'upload', id, created, size
FROM files
WHERE job IS NULL
  AND id NOT IN (SELECT input FROM jobs WHERE input IS NOT NULL AND finished IS NULL)
ORDER BY age
"""


def expire(
    database: sqlite3.Connection, before: float | None, keep_bytes: int | None
) -> tuple[list[str], list[str]]:
    """Forget jobs and uploads older than `before`, and the oldest while files take too much.

    Returns:
        The ids of the jobs, and of the files.
    """
    (total,) = database.execute("SELECT coalesce(sum(size), 0) FROM files").fetchone()
    jobs, files = [], []
    for row in database.execute(_OLDEST, {"max_tries": MAX_TRIES}).fetchall():
        too_old = before is not None and row["age"] < before
        too_much = keep_bytes is not None and total > keep_bytes
        if not too_old and not too_much:
            break
        total -= row["bytes"]
        if row["kind"] == "job":
            jobs.append(row["id"])
            files += delete(database, row["id"]) or []
        else:
            files.append(row["id"])
            database.execute("DELETE FROM files WHERE id = ?", (row["id"],))
    return jobs, files


def delivered(database: sqlite3.Connection, id: str) -> None:
    """A webhook arrived."""
    database.execute(
        "UPDATE deliveries SET delivered = ?, error = '' WHERE job = ?", (time.time(), id)
    )


def not_delivered(database: sqlite3.Connection, id: str, error: str, next: float) -> None:
    """A webhook did not arrive."""
    database.execute(
        "UPDATE deliveries SET tries = tries + 1, next = ?, error = ? WHERE job = ?",
        (next, error, id),
    )
