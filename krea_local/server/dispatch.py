"""Jobs to workers: the next one to the first that is idle, again where a worker died.

Keeps every worker going, stops a job that is cancelled or takes too long, and starts none while the
disk is low. Knows nothing of where jobs come from, or of who watches them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from krea_local.endpoints import http_error
from krea_local.server.board import Board
from krea_local.server.changes import MAX_ATTEMPTS, Waiting, given_up
from krea_local.server.facts import WorkerFacts
from krea_local.server.files import new_id
from krea_local.server.jobs import Failure, Job, Log
from krea_local.server.settings import Settings
from krea_local.server.store import read_outcome
from krea_local.server.workers import Message, Worker, WorkerDied

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds, after a worker that could not be started
OBEY_SECONDS = 30.0  # for a worker to stop a job, before it is killed
HAND_BACK_SECONDS = 10.0
FIRST_GUESS = 10.0  # seconds a job takes, before there was one


@dataclass(eq=False)
class _Running:
    """A job at a worker.

    Attributes:
        why: it is to stop, if it is.
        over: set when it runs no more.
    """

    worker: Worker
    job: str
    files: list[str]
    why: Literal["", "cancelled", "too long"] = ""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    logs: list[asyncio.Task[None]] = field(default_factory=list)


class Dispatcher:
    """The workers, and what runs at each.

    Attributes:
        paused: while this is true, no job starts.
    """

    def __init__(self, board: Board, settings: Settings) -> None:
        self._board = board
        self._seconds = settings.job_seconds
        self._workers = [
            Worker(settings, device, board.store.files.folder) for device in settings.devices
        ]
        self._running: dict[str, _Running] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._mean_seconds = FIRST_GUESS
        self.paused = False
        board.on_watched = self._show

    def start(self) -> None:
        """Start the workers; does not wait for them."""
        self._tasks = [asyncio.create_task(self._tend(worker)) for worker in self._workers]

    async def stop(self, *, seconds: float) -> None:
        """Let what runs end for so long, queue the rest again, stop the workers."""
        self._stopping = True
        self._board.changed.set()
        running = list(self._running.values())
        ends = [asyncio.create_task(_over(one)) for one in running]
        if ends:
            await asyncio.wait(ends, timeout=seconds)
        for one in running:
            if not one.over.is_set():
                one.worker.kill()
        if ends:  # they write to the disk, which may be full
            await asyncio.wait(ends, timeout=HAND_BACK_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def facts(self) -> Sequence[WorkerFacts]:
        """The workers."""
        return [worker.facts for worker in self._workers]

    def until_one_more_starts(self) -> int:
        """Seconds in which about one more job of those that wait will have started."""
        return max(1, min(600, math.ceil(self._mean_seconds / len(self._workers))))

    async def cancel(self, id: str) -> bool:
        """Have a job stop within a step; whether it runs."""
        running = self._running.get(id)
        if running is None:
            return False
        self._stop_job(running, "cancelled")
        # Should the server end before the job does, it is not run again.
        with contextlib.suppress(sqlite3.Error):  # the disk is full: it stops all the same
            await self._board.store.mark_cancelling(id)
        return True

    def _show(self, id: str) -> None:
        running = self._running.get(id)
        if running is not None:
            running.worker.show(id)

    def _stop_job(self, running: _Running, why: Literal["cancelled", "too long"]) -> None:
        if running.why or running.over.is_set():
            return
        running.why = why
        loop = asyncio.get_running_loop()
        running.timers.append(loop.call_later(OBEY_SECONDS, running.worker.kill))
        running.worker.cancel(running.job)

    async def _tend(self, worker: Worker) -> None:
        """Keep a worker going, with whatever is next."""
        pause, said = FIRST_PAUSE, ""
        while not self._stopping:
            try:
                await worker.load()
                while True:
                    taken, waiting = await self._next(worker)
                    pause, said = FIRST_PAUSE, ""
                    await self._run(worker, taken, waiting)
            except WorkerDied as error:
                again = str(error) == said  # each attempt fails alike where weights are missing
                level = logging.INFO if again else logging.ERROR
                logger.log(level, "the worker of %s: %s", worker.facts.device, error)
                said = str(error)
            except Exception:  # a fault of ours must not leave a GPU without its keeper
                logger.exception("the keeper of %s begins anew", worker.facts.device)
            if not self._stopping:
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)

    async def _next(self, worker: Worker) -> tuple[str, Waiting]:
        """The first job that can start, once there is one; `WorkerDied` if that comes first."""
        changed = self._board.changed
        while True:
            worker.check()
            ready = not self._stopping and not self.paused
            if ready and (taken := self._board.queue.take()) is not None:
                return taken
            changed.clear()
            some = asyncio.create_task(_set(changed))
            await asyncio.wait((some, worker.listening), return_when=asyncio.FIRST_COMPLETED)
            some.cancel()

    async def _run(self, worker: Worker, id: str, waiting: Waiting) -> None:
        """Have a worker draw a job, and make of it what becomes of it.

        Raises:
            WorkerDied: the worker has to be started again; the job was seen to.
        """
        job = self._board.job(id)
        assert job is not None
        count = job.arguments["num_images"]
        assert isinstance(count, int)
        running = _Running(worker, id, [new_id() for _ in range(count)])
        self._running[id] = running
        try:
            job, claim = self._board.start(id, worker.facts.device)
            await self._draw(running, job, waiting, claim)
        except WorkerDied:
            raise
        except Exception as error:
            logger.exception("job %s", id)
            await self._board.finish(id, "failed", failure=Failure(**asdict(http_error(error))))
        finally:
            del self._running[id]
            for timer in running.timers:
                timer.cancel()
            running.over.set()

    async def _draw(
        self, running: _Running, job: Job, waiting: Waiting, claim: asyncio.Task[None]
    ) -> None:
        order = {
            "id": job.id,
            "endpoint": job.endpoint,
            "arguments": {name: job.arguments[name] for name in job.arguments if name != IMAGE},
            "input": waiting.input,
            "files": running.files,
            "previews": job.id in self._board.watched,
        }
        loop = asyncio.get_running_loop()
        too_long = loop.call_later(self._seconds, self._stop_job, running, "too long")
        running.timers.append(too_long)
        try:
            answer = await running.worker.run(order, lambda told: self._hear(running, told))
        except WorkerDied as error:
            self._board.store.files.remove(running.files)
            await claim
            await self._after_death(running, job, waiting, error.brief)
            raise
        await claim
        if answer["kind"] == "done":
            await self._done(job, answer)
            return
        self._board.store.files.remove(running.files)
        if answer["kind"] == "cancelled":
            await self._stopped(running)
        else:
            failure = Failure(**answer["failure"])
            logs = [Log(answer["reason"], "ERROR", time.time())]
            await self._board.finish(job.id, "failed", failure=failure, logs=logs)

    def _hear(self, running: _Running, told: Message) -> None:
        """What a worker tells while it draws."""
        if told["kind"] == "log":
            log = Log(told["message"], told["level"], time.time())
            running.logs.append(asyncio.create_task(self._board.log(running.job, log)))
            return
        preview = told["preview"]
        self._board.progress(
            running.job,
            step=told["step"],
            num_steps=told["num_steps"],
            fraction=told["fraction"],
            preview=None if preview is None else base64.b64decode(preview),
        )

    async def _done(self, job: Job, answer: Message) -> None:
        outcome = read_outcome(answer["outcome"])
        now = time.time()
        logs = [Log(notice, "WARN", now) for notice in outcome.notices]
        seconds = outcome.timings["total"]
        logs.append(Log(f"done in {seconds:.2f} s", "INFO", now))
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        await self._board.finish(job.id, "done", outcome=outcome, logs=logs)

    async def _stopped(self, running: _Running) -> None:
        """A job stopped because it was told to, or its worker was killed for that."""
        if running.why == "too long":
            # Not 504, on which the JavaScript client would ask for the same again.
            kind, text = "generation_timeout", f"took over {self._seconds:g} s: cancelled"
            failure = Failure(500, kind, {"detail": text, "error_type": kind})
            await self._board.finish(running.job, "failed", failure=failure)
        else:
            await self._board.finish(running.job, "cancelled")

    async def _after_death(
        self, running: _Running, job: Job, waiting: Waiting, reason: str
    ) -> None:
        """What becomes of a job whose worker died at it."""
        if running.why:
            await self._stopped(running)
        elif self._stopping:
            why = "the server stops; this waits for the next one"
            await self._board.hand_back(job.id, waiting, why, count_attempt=False)
        elif job.attempts >= MAX_ATTEMPTS:
            logs = [Log(reason, "ERROR", time.time())]
            failure = Failure(**given_up(reason))
            await self._board.finish(job.id, "failed", failure=failure, logs=logs)
        else:
            why = f"{reason}; it waits again"
            await self._board.hand_back(job.id, waiting, why, count_attempt=True)
        # It may have been cancelled while it was handed back.
        if running.why == "cancelled" and self._board.queue.remove(job.id) is not None:
            await self._board.finish(job.id, "cancelled")


IMAGE = "image_url"


async def _over(running: _Running) -> None:
    await running.over.wait()


async def _set(event: asyncio.Event) -> None:
    await event.wait()
