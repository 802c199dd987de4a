"""What is known of every job at this moment: the store's memory, so that a look costs nothing.

A change goes to the disk first, then here, then to those who watch. Belongs to one asyncio loop.
Knows nothing of workers, nor of where jobs come from.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from krea_local.server.changes import Waiting
from krea_local.server.facts import Event
from krea_local.server.jobs import FINISHED, Failure, Job, Log, Outcome, State, StoredFile
from krea_local.server.store import Store
from krea_local.server.waiting import Queue
from krea_local.server.watching import Watching

logger = logging.getLogger(__name__)

RECENT = 1024  # finished jobs that are kept at hand
AGAIN_SECONDS = 1.0  # before what the disk did not take is written again


class Board:
    """The jobs, as they are now.

    Args:
        store: where they are kept.
        on_finished: called with every job that is done, failed or cancelled.

    Attributes:
        queue: those that wait.
        changed: set when one may be able to start.
        watched: those that are not finished, and whose previews somebody has asked for.
        on_watched: called with the id of one that becomes so.
    """

    def __init__(self, store: Store, on_finished: Callable[[Job], None]) -> None:
        self.store = store
        self._on_finished = on_finished
        self.queue = Queue()
        self.changed = asyncio.Event()
        self.watched: set[str] = set()
        self.on_watched: Callable[[str], None] | None = None
        self._unfinished: dict[str, Job] = {}
        self._recent: OrderedDict[str, Job] = OrderedDict()
        self._last: dict[str, Event] = {}  # of progress, by the job that runs
        self._logs: dict[str, list[Log]] = {}  # of unfinished jobs
        self._watching = Watching()
        self._ends: dict[str, list[asyncio.Future[None]]] = {}
        for job, waiting in store.waiting():
            self._logs[job.id] = store.logs(job.id)
            self._unfinished[job.id] = job
            self.queue.put(job.id, waiting)

    # Looking.

    def job(self, id: str) -> Job | None:
        """The job of that id."""
        job = self._unfinished.get(id) or self._recent.get(id)
        if job is None and (job := self.store.job(id)) is not None:
            self._keep(job)
        return job

    def logs(self, id: str) -> Sequence[Log]:
        """The lines of a job's log."""
        return self._logs[id] if id in self._logs else self.store.logs(id)

    async def wait(self, id: str) -> Job:
        """The job once it is finished; `KeyError` if there is none of that id."""
        job = self._must(id)
        while job.state not in FINISHED:
            end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._ends.setdefault(id, []).append(end)
            await end
            job = self._must(id)
        return job

    async def events(self, id: str, *, previews: bool) -> AsyncIterator[Event]:
        """What happens to a job; see `Service.events`."""
        job = self._must(id)
        if previews and job.state not in FINISHED:
            self.watch(id)
        last = self._last.get(id)
        first = Event("state", job) if last is None else replace(last, kind="state", job=job)
        async for event in self._watching.events(first):
            yield event

    def watch(self, id: str) -> None:
        """From now on, a job's previews are wanted."""
        if id in self.watched:
            return
        self.watched.add(id)
        if self.on_watched is not None:
            self.on_watched(id)

    def _must(self, id: str) -> Job:
        job = self.job(id)
        if job is None:
            raise KeyError(id)
        return job

    # Changing.

    async def add(self, job: Job, waiting: Waiting, files: Sequence[StoredFile]) -> None:
        """A new job, with the files that belong to it; `LookupError` if its input is gone."""
        waiting = await self.store.add_job(job, waiting, files)
        self._unfinished[job.id] = job
        self._logs[job.id] = []
        self.queue.put(job.id, waiting)
        self.changed.set()

    def has_input(self, id: str, waiting: Waiting) -> None:
        """A job that waits has its input image now."""
        if id in self.queue:
            self.queue.put(id, waiting)
            self.changed.set()

    def start(self, id: str, device: str) -> tuple[Job, asyncio.Task[None]]:
        """A job runs from now on.

        Returns:
            The job, and what is done once that is on the disk; to be awaited before the job ends.
            The worker need not wait for it: should the server die before, an attempt is not
            counted.
        """
        job = self._unfinished[id]
        log = _line(f"attempt {job.attempts + 1} starts on {device}")
        now = log.timestamp
        job = replace(job, state="running", started=now, attempts=job.attempts + 1)
        self._change(job)
        self._log(id, log)
        claim = _until_it_works(lambda: self.store.claim(id, log))
        return job, asyncio.create_task(claim)

    async def hand_back(self, id: str, waiting: Waiting, why: str, *, count_attempt: bool) -> None:
        """A job that ran waits again, where it was in the order."""
        job = self._unfinished[id]
        log = _line(why, "WARN")
        await _until_it_works(lambda: self.store.hand_back(id, log, count_attempt=count_attempt))
        self._log(id, log)
        attempts = job.attempts if count_attempt else job.attempts - 1
        self._last.pop(id, None)
        self._change(replace(job, state="queued", started=None, attempts=attempts))
        self.queue.put(id, replace(waiting, start_by=None))
        self.changed.set()

    async def finish(
        self,
        id: str,
        state: State,
        *,
        outcome: Outcome | None = None,
        failure: Failure | None = None,
        logs: Sequence[Log] = (),
    ) -> Job:
        """A job, which waits no more, is done, failed or cancelled."""
        job = replace(
            self._unfinished[id],
            state=state,
            finished=time.time(),
            outcome=outcome,
            failure=failure,
        )
        await _until_it_works(lambda: self.store.finish(job, logs))
        for log in logs:
            self._log(id, log)
        del self._unfinished[id]
        self._last.pop(id, None)
        self._logs.pop(id, None)
        self.watched.discard(id)
        self._keep(job)
        self._watching.publish(Event("state", job, fraction=float(state == "done")))
        for end in self._ends.pop(id, ()):
            if not end.done():
                end.set_result(None)
        self._on_finished(job)
        return job

    def progress(
        self, id: str, *, step: int, num_steps: int, fraction: float, preview: bytes | None
    ) -> None:
        """A job that runs has got so far."""
        event = Event("progress", self._unfinished[id], fraction, step, num_steps, preview)
        self._watching.publish(event)
        last = self._last.get(id)
        if preview is None and last is not None:
            event = replace(event, preview=last.preview)
        self._last[id] = event

    async def log(self, id: str, log: Log) -> None:
        """One more line in the log of a job that is not finished."""
        self._log(id, log)
        await self.store.add_log(id, log)

    def forget(self, ids: Sequence[str]) -> None:
        """These finished jobs are no more."""
        for one in ids:
            self._recent.pop(one, None)

    def _change(self, job: Job) -> None:
        self._unfinished[job.id] = job
        self._watching.publish(Event("state", job))

    def _log(self, id: str, log: Log) -> None:
        self._logs[id].append(log)
        self._watching.publish(Event("log", self._unfinished[id], log=log))

    def _keep(self, job: Job) -> None:
        self._recent[job.id] = job
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)


def _line(message: str, level: str = "INFO") -> Log:
    return Log(message, level, time.time())


async def _until_it_works(write: Callable[[], Awaitable[None]]) -> None:
    """Write to the database, and while its disk is full, again and again."""
    while True:
        try:
            return await write()
        except sqlite3.OperationalError as error:
            logger.error("the database cannot be written, and is tried again: %s", error)
            await asyncio.sleep(AGAIN_SECONDS)
