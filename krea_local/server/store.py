"""Jobs and files in SQLite: what was submitted, what became of it, and which files belong to it.

The database is the truth; what is committed is on the disk. Files are named in it only after they
are whole. One server a folder. Knows nothing of queues, workers or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from krea_local.errors import OutputFailed
from krea_local.server import changes
from krea_local.server.changes import Delivery, Waiting
from krea_local.server.files import Files
from krea_local.server.jobs import Failure, Job, Log, Outcome, Picture, StoredFile
from krea_local.server.writer import Writer, connect

SCHEMA_VERSION = 1
_TABLES = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    endpoint TEXT NOT NULL,
    arguments TEXT NOT NULL,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    low_priority INTEGER NOT NULL,
    start_by REAL,
    input TEXT REFERENCES files (id) ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
    source TEXT,
    cancelling INTEGER NOT NULL DEFAULT 0,
    outcome TEXT,
    failure TEXT,
    webhook TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, finished);
CREATE INDEX jobs_by_input ON jobs (input) WHERE input IS NOT NULL;
CREATE TABLE logs (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    message TEXT NOT NULL,
    level TEXT NOT NULL,
    timestamp REAL NOT NULL
);
CREATE INDEX logs_by_job ON logs (job);
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    job TEXT REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE INDEX files_by_job ON files (job);
CREATE TABLE deliveries (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    tries INTEGER NOT NULL DEFAULT 0,
    next REAL NOT NULL,
    delivered REAL,
    error TEXT NOT NULL DEFAULT ''
);
"""


@dataclass(frozen=True)
class _Lock:
    """The folder's lock, held as long as the descriptor is open."""

    descriptor: int

    def release(self) -> None:
        os.close(self.descriptor)


class Store:
    """What a server keeps in its folder.

    What was running when the last server ended waits again, or failed after three attempts.

    Args:
        folder: made if it is not there.

    Raises:
        OutputFailed: another server uses the folder, a newer version wrote it, or it cannot be
            written.
    """

    def __init__(self, folder: Path) -> None:
        self.files = Files(folder / "files")
        self.folder = self.files.folder.parent
        self._lock = _lock(self.folder)
        path = self.folder / "jobs.sqlite3"
        try:
            self._database = connect(path)
            _migrate(self._database, path)
            changes.alone(self._database, changes.recover)
            rows = self._database.execute("SELECT id FROM files")
            self.swept = self.files.sweep({row["id"] for row in rows})
        except BaseException as error:
            self._lock.release()
            if isinstance(error, sqlite3.Error):
                raise OutputFailed(f"cannot use {str(path)!r}: {error}") from error
            raise
        self.writer = Writer(path)

    def close(self) -> None:
        """Finish what is being written; another server may have the folder."""
        self.writer.close()
        self._database.close()
        self._lock.release()

    # Reading: at once, from what is committed.

    def job(self, id: str) -> Job | None:
        """The job of that id."""
        row = self._one("SELECT * FROM jobs WHERE id = ?", id)
        return None if row is None else _job(row)

    def waiting(self) -> list[tuple[Job, Waiting]]:
        """The jobs that wait, in the order in which they came."""
        rows = self._database.execute("SELECT * FROM jobs WHERE state = 'queued' ORDER BY seq")
        return [(_job(row), _waiting(row)) for row in rows]

    def recent(self, *, limit: int, before: str | None) -> list[Job]:
        """Jobs, newest first; those submitted before job `before`, if there is one of that id."""
        row = None if before is None else self._one("SELECT seq FROM jobs WHERE id = ?", before)
        end = 2**62 if row is None else row["seq"]
        if before is not None and row is None:
            return []
        rows = self._database.execute(
            "SELECT * FROM jobs WHERE seq < ? ORDER BY seq DESC LIMIT ?", (end, limit)
        )
        return [_job(row) for row in rows]

    def logs(self, id: str) -> list[Log]:
        """The lines of a job's log, oldest first."""
        rows = self._database.execute("SELECT * FROM logs WHERE job = ? ORDER BY rowid", (id,))
        return [Log(row["message"], row["level"], row["timestamp"]) for row in rows]

    def file(self, id: str) -> StoredFile | None:
        """The file of that id."""
        row = self._one("SELECT * FROM files WHERE id = ?", id)
        if row is None:
            return None
        return StoredFile(row["id"], row["content_type"], row["size"], row["name"])

    def deliveries(self) -> list[Delivery]:
        """The webhooks that are yet to be delivered, soonest first."""
        rows = self._database.execute(
            "SELECT * FROM deliveries WHERE delivered IS NULL AND tries < ? ORDER BY next",
            (changes.MAX_TRIES,),
        )
        return [Delivery(row["job"], row["tries"], row["next"]) for row in rows]

    def _one(self, query: str, *values: object) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._database.execute(query, values).fetchone()
        return row

    # Writing: durable once it returns.

    async def add_job(
        self, job: Job, waiting: Waiting, files: Sequence[StoredFile] = ()
    ) -> Waiting:
        """Take a job, with the files that belong to it; its place in the order is told.

        Raises:
            LookupError: its input image is a file that is not there any more.
        """
        arguments = json.dumps(dict(job.arguments))

        def change(database: sqlite3.Connection) -> Waiting:
            return changes.add_job(database, job, arguments, waiting, files)

        return await self.writer.do(change)

    async def add_upload(self, file: StoredFile) -> None:
        """Name a file that belongs to no job."""
        await self.writer.do(lambda database: changes.add_file(database, file, None))

    async def add_input(self, id: str, file: StoredFile) -> bool:
        """The input image of a job was fetched; whether the job still waits for it."""
        return await self.writer.do(lambda database: changes.add_input(database, id, file))

    async def claim(self, id: str, log: Log) -> None:
        """A job runs since `log` was said."""
        await self.writer.do(lambda database: changes.claim(database, id, log))

    async def hand_back(self, id: str, log: Log, *, count_attempt: bool) -> None:
        """A job that ran waits again."""
        await self.writer.do(
            lambda database: changes.hand_back(database, id, log, count_attempt=count_attempt)
        )

    async def mark_cancelling(self, id: str) -> None:
        """A running job is to be cancelled; if the server ends first, it is not run again."""
        await self.writer.do(lambda database: changes.mark_cancelling(database, id))

    async def finish(self, job: Job, logs: Sequence[Log] = ()) -> None:
        """A job is done, failed or cancelled, as it says."""
        outcome = None if job.outcome is None else json.dumps(asdict(job.outcome))
        failure = None if job.failure is None else json.dumps(asdict(job.failure))
        pictures = [] if job.outcome is None else [one.file for one in job.outcome.pictures]
        await self.writer.do(
            lambda database: changes.finish(database, job, outcome, failure, pictures, logs)
        )

    async def add_log(self, id: str, log: Log) -> None:
        """One more line in a job's log."""
        await self.writer.do(lambda database: changes.add_log(database, id, log))

    async def delete(self, id: str) -> bool:
        """Forget a finished job and its files; whether there was one."""
        gone = await self.writer.do(lambda database: changes.delete(database, id))
        await asyncio.to_thread(self.files.remove, gone or ())
        return gone is not None

    async def expire(self, *, keep_seconds: float | None, keep_bytes: int | None) -> list[str]:
        """Forget the oldest finished jobs and unused uploads; the ids of those jobs.

        A job whose webhook is still to be delivered stays for that.
        """
        before = None if keep_seconds is None else time.time() - keep_seconds
        jobs, gone = await self.writer.do(
            lambda database: changes.expire(database, before, keep_bytes)
        )
        await asyncio.to_thread(self.files.remove, gone)
        return jobs

    async def delivered(self, id: str) -> None:
        """A job's webhook was delivered."""
        await self.writer.do(lambda database: changes.delivered(database, id))

    async def not_delivered(self, id: str, error: str, *, next: float) -> None:
        """A job's webhook was not delivered; it is tried again at `next`, seconds since 1970."""
        await self.writer.do(lambda database: changes.not_delivered(database, id, error, next))


def _lock(folder: Path) -> _Lock:
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OutputFailed(f"cannot write {str(path)!r}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise OutputFailed(
            f"another server, process {owner}, uses {str(folder)!r}: stop it, or name another "
            "folder"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return _Lock(descriptor)


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise OutputFailed(
            f"{str(path)!r} is of a newer krea_local (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): use that one, or name another folder"
        )
    if version == 0:
        database.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    with contextlib.suppress(OSError):  # prompts are nobody else's business
        path.chmod(0o600)


def _job(row: sqlite3.Row) -> Job:
    outcome, failure = row["outcome"], row["failure"]
    return Job(
        id=row["id"],
        endpoint=row["endpoint"],
        arguments=json.loads(row["arguments"]),
        state=row["state"],
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        attempts=row["attempts"],
        outcome=None if outcome is None else read_outcome(json.loads(outcome)),
        failure=None if failure is None else Failure(**json.loads(failure)),
        webhook=row["webhook"],
    )


def read_outcome(told: Mapping[str, object]) -> Outcome:
    """An outcome from its JSON object, which `dataclasses.asdict` makes."""
    pictures, flags = told["pictures"], told["has_nsfw_concepts"]
    seed, timings, notices = told["seed"], told["timings"], told["notices"]
    assert isinstance(pictures, list)
    assert isinstance(flags, list)
    assert isinstance(seed, int)
    assert isinstance(timings, dict)
    assert isinstance(notices, list)
    return Outcome(
        pictures=tuple(
            Picture(StoredFile(**one["file"]), one["width"], one["height"]) for one in pictures
        ),
        seed=seed,
        has_nsfw_concepts=tuple(flags),
        timings=timings,
        notices=tuple(notices),
    )


def _waiting(row: sqlite3.Row) -> Waiting:
    return Waiting(
        seq=row["seq"],
        low_priority=bool(row["low_priority"]),
        start_by=row["start_by"],
        input=row["input"],
        source=row["source"],
    )
