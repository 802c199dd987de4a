"""The one queue, the workers, and all that the web side may ask of them.

Every change is on the disk before anybody is told of it. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path

from krea_local import weights
from krea_local.endpoints import NOT_STARTED_IN_TIME, Endpoint, Request
from krea_local.errors import InvalidImage, InvalidRequest, KreaError, OutputFailed
from krea_local.schema import Img2ImgRequest, Lora
from krea_local.server.board import Board
from krea_local.server.changes import Waiting
from krea_local.server.dialling import Rules
from krea_local.server.dispatch import Dispatcher
from krea_local.server.facts import Cancelling, Event, QueueFull, Unavailable, WorkerFacts
from krea_local.server.fetch import FetchFailed, ImageCheck, fetch_image
from krea_local.server.files import harmless_name, new_id
from krea_local.server.jobs import FINISHED, Failure, Job, Log, StoredFile
from krea_local.server.settings import Settings
from krea_local.server.store import Store
from krea_local.server.webhooks import Key, Payload, Webhooks

__all__ = ["Cancelling", "Event", "QueueFull", "Service", "Unavailable", "WorkerFacts"]

logger = logging.getLogger(__name__)

FETCHES = 3  # at once, of 50 MiB each
LONGEST_URL_SHOWN = 200
LOOK_SECONDS = 2.0  # between looks at the disk
EXPIRE_SECONDS = 60.0
HUB = re.compile(r"https://(huggingface\.co|hf\.co)/", re.IGNORECASE)


def free_bytes(folder: Path) -> int:
    """Room on the disk that holds `folder`."""
    return shutil.disk_usage(folder).free


class Service:
    """The queue and its workers. All methods belong to one asyncio loop.

    Args:
        settings: what the server was started with.
        rules: where input images may come from; by default as the settings say.
        free: tells how many bytes the store's disk has left.

    Attributes:
        on_finished: called with every job that is done, failed or cancelled; to be set before
            `start`, as is `payload`.
        payload: the `payload` of a done job's webhook; None leaves it empty.
    """

    settings: Settings
    on_finished: Callable[[Job], None] | None = None
    payload: Payload | None = None

    def __init__(
        self,
        settings: Settings,
        *,
        rules: Rules | None = None,
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.settings = settings
        self._rules = rules or Rules(private=settings.private_urls)
        self._free = free
        self._store: Store
        self._board: Board
        self._dispatcher: Dispatcher
        self._key: Key
        self._webhooks: Webhooks
        self._arriving = 0
        self._check_image = ImageCheck()
        self._fetches = asyncio.Semaphore(FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._model = "krea"

    async def start(self) -> None:
        """Open the store, queue again what a crash left, start the workers; does not wait for them.

        Raises:
            OutputFailed: the folder is in use by another server, or cannot be used.
        """
        self._store = await asyncio.to_thread(Store, self.settings.folder)
        self._model = await asyncio.to_thread(_alias, self.settings)
        try:
            self._key = Key(self._store.folder)
        except OutputFailed:
            self._store.close()
            raise
        self._board = Board(self._store, self._tell_of_end)
        rules = replace(self._rules, private=self.settings.webhook_private_urls)
        self._webhooks = Webhooks(self._store, self._key, rules, self.payload)
        self._dispatcher = Dispatcher(self._board, self.settings)
        for waiting in self._board.queue:
            self._expect(waiting)
        self._look_at_disk()
        self._dispatcher.start()
        self._spawn(self._keep_house())
        self._spawn(self._webhooks.run())

    async def stop(self, *, seconds: float = 30.0) -> None:
        """Take no more jobs, let running ones end for so long, queue the rest again, end all."""
        await self.wind_down(seconds=seconds)
        await self.close()

    async def wind_down(self, *, seconds: float = 30.0) -> None:
        """As `stop`, but what became of jobs can still be asked, until `close`."""
        self._stopping = True
        await self._dispatcher.stop(seconds=seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Close the store; nothing may be asked any more."""
        await asyncio.to_thread(self._store.close)

    @property
    def model(self) -> str:
        """The alias of the model family that this server draws with: "krea", "dev" or "srpo"."""
        return self._model

    @property
    def ready(self) -> bool:
        """Whether a worker has its model loaded."""
        return any(facts.state in ("idle", "busy") for facts in self.workers())

    @property
    def queue_length(self) -> int:
        """Jobs that wait."""
        return len(self._board.queue)

    def workers(self) -> Sequence[WorkerFacts]:
        """The worker processes."""
        return self._dispatcher.facts()

    def jwks(self) -> dict[str, object]:
        """The public key that webhooks are signed with, as a JSON Web Key Set."""
        return self._key.jwks()

    # Submitting.

    async def submit(
        self,
        endpoint: Endpoint,
        request: Request,
        *,
        image: bytes | StoredFile | str | None = None,
        webhook: str | None = None,
        low_priority: bool = False,
        start_within: float | None = None,
        previews: bool = False,
    ) -> Job:
        """Take a job; when this returns, no crash loses it.

        Args:
            endpoint: that was called.
            request: validated; its seed is fixed here if it has none.
            image: the input image: bytes (of a data URI), a stored upload, or a URL that is
                fetched before the job starts, under `fetch`'s rules.
            webhook: where its end is told.
            low_priority: after all others that wait.
            start_within: seconds after which it fails (504 request_timeout) if it has not started.
            previews: whether they are wanted from its first step on.

        Raises:
            InvalidImage: bytes that are no PNG, JPEG or WebP, or too large.
            InvalidRequest: a LoRA that is not on the hub.
            QueueFull, Unavailable: see there.
        """
        self._refuse_foreign_loras(request)
        self._refuse_if_unavailable()
        if self.queue_length + self._arriving >= self.settings.max_queue:
            raise QueueFull(self._dispatcher.until_one_more_starts())
        now = time.time()
        self._arriving += 1
        try:
            owned = []
            if isinstance(image, bytes):
                image = await self._store_image(image, "input")
                owned.append(image)
            job = Job(
                id=str(uuid.uuid4()),
                endpoint=endpoint.id,
                arguments=self._arguments(endpoint, request, image),
                state="queued",
                created=now,
                webhook=webhook,
            )
            waiting = Waiting(
                low_priority=low_priority,
                start_by=None if start_within is None else now + start_within,
                source=image if isinstance(image, str) else None,
                input=image.id if isinstance(image, StoredFile) else None,
            )
            # Shielded: who asks may go away, but what is on the disk must be in the queue too.
            await asyncio.shield(self._add(job, waiting, owned, previews))
        finally:
            self._arriving -= 1
        return job

    async def _add(
        self, job: Job, waiting: Waiting, owned: list[StoredFile], previews: bool
    ) -> None:
        try:
            await self._board.add(job, waiting, owned)
            if previews:
                self._board.watch(job.id)
        except (LookupError, sqlite3.Error) as error:
            self._store.files.remove([file.id for file in owned])
            if isinstance(error, LookupError):
                raise InvalidImage(f"image_url: {error}") from error
            raise Unavailable(f"the server cannot keep the job: {error}") from error
        self._expect(job.id)

    def _arguments(
        self, endpoint: Endpoint, request: Request, image: StoredFile | str | None
    ) -> dict[str, object]:
        """The request as JSON, all fixed in it that a later attempt might find otherwise."""
        request = request.with_seed()
        given = request.model_fields_set
        own = {
            "guidance_scale": endpoint.guidance_scale,
            "acceleration": self.settings.load.get("acceleration", request.acceleration),
        }
        unset = {name: own[name] for name in own if name not in given}
        request = request.model_copy(update=unset)
        arguments = request.model_dump(mode="json", exclude={"image_url"})
        if isinstance(request, Img2ImgRequest):
            assert image is not None, "an image to redraw"
            if isinstance(image, StoredFile):
                arguments["image_url"] = f"/files/{image.id}"
            else:
                arguments["image_url"] = image[:LONGEST_URL_SHOWN]
        return arguments

    def _expect(self, id: str) -> None:
        """See to what a job that waits needs: its input image, and an end to its waiting."""
        waiting = self._board.queue.get(id)
        if waiting is None:
            return
        if waiting.lacks_input:
            self._spawn(self._fetch(id, waiting))
        if waiting.start_by is not None:
            delay = max(0.0, waiting.start_by - time.time())
            asyncio.get_running_loop().call_later(delay, self._too_late, id)

    def _refuse_foreign_loras(self, request: Request) -> None:
        """The worker fetches LoRAs, from whatever address their host has: so only from the hub."""
        for lora in request.loras:
            assert isinstance(lora, Lora)
            if not HUB.match(lora.path) and not self.settings.private_urls:
                raise InvalidRequest(
                    f"loras: {lora.path[:LONGEST_URL_SHOWN]!r} is not on the Hugging Face hub: "
                    "this server fetches LoRAs from there only"
                )

    def _refuse_if_unavailable(self) -> None:
        if self._stopping:
            raise Unavailable("the server is stopping")
        self._look_at_disk()
        if self._dispatcher.paused:
            raise Unavailable("the server's disk is full: try again later")

    async def _fetch(self, id: str, waiting: Waiting) -> None:
        """Have the input image of a job that waits."""
        assert waiting.source is not None
        async with self._fetches:
            if id not in self._board.queue:
                return
            try:
                data = await fetch_image(waiting.source, self._rules)
                file = await self._store_image(data, "input")
            except (FetchFailed, InvalidImage) as error:
                await self._fail_waiting(id, _not_loaded(waiting.source), str(error))
                return
            except Unavailable as error:
                body = {"detail": str(error), "error_type": "internal_error"}
                await self._fail_waiting(id, Failure(500, "internal_error", body), str(error))
                return
            except Exception:  # a hostile server's doing; whatever it is, the job must not wait on
                logger.exception("the input image of %s", id)
                reason = "the input image could not be fetched"
                await self._fail_waiting(id, _not_loaded(waiting.source), reason)
                return
            try:
                is_wanted = await self._store.add_input(id, file)
            except sqlite3.Error as error:
                self._store.files.remove([file.id])
                text = f"the server cannot keep the input image: {error}"
                body = {"detail": text, "error_type": "internal_error"}
                await self._fail_waiting(id, Failure(500, "internal_error", body), text)
                return
            if is_wanted:
                self._board.has_input(id, replace(waiting, input=file.id))
            else:
                self._store.files.remove([file.id])

    def _too_late(self, id: str) -> None:
        waiting = self._board.queue.get(id)
        # One that had started, and waits again after a crash, is not late.
        if waiting is not None and waiting.start_by is not None and not self._stopping:
            late = NOT_STARTED_IN_TIME
            failure = Failure(late.status, late.error_type, dict(late.body))
            self._spawn(self._fail_waiting(id, failure, str(late.body["detail"])))

    async def _fail_waiting(self, id: str, failure: Failure, reason: str) -> None:
        if self._board.queue.remove(id) is not None:
            log = Log(reason, "ERROR", time.time())
            await self._board.finish(id, "failed", failure=failure, logs=[log])

    async def _store_image(self, data: bytes, name: str, id: str | None = None) -> StoredFile:
        """Check an image and write it; the database is told by the caller, after."""
        kind, _, _ = await self._check_image(data)
        name_on_disk = new_id() if id is None else id
        try:
            await asyncio.to_thread(self._store.files.write, name_on_disk, data)
        except OutputFailed as error:
            raise Unavailable(str(error)) from error
        return StoredFile(name_on_disk, kind, len(data), name)

    # Looking, waiting, cancelling.

    def get(self, id: str) -> Job | None:
        """The job of that id."""
        return self._board.job(id)

    def position(self, id: str) -> int:
        """How many jobs are before this one; 0 if it is next, or no longer waits."""
        return self._board.queue.position(id)

    def logs(self, id: str) -> Sequence[Log]:
        """All lines of the job's log, oldest first."""
        return self._board.logs(id)

    async def wait(self, id: str) -> Job:
        """The job once it is finished; `KeyError` if there is none of that id."""
        return await self._board.wait(id)

    def events(self, id: str, *, previews: bool = False) -> AsyncIterator[Event]:
        """What happens to a job from now on, beginning with its present state; ends when it does.

        A reader that is too slow misses progress, never the end. `KeyError` at the first event if
        there is no job of that id. Previews are made from the first reader on who wants them.
        """
        return self._board.events(id, previews=previews)

    async def cancel(self, id: str) -> Cancelling:
        """Cancel a job: at once if it waits, within a step if it runs."""
        job = self._board.job(id)
        if job is None:
            return "missing"
        if job.state in FINISHED:
            return "already"
        if self._board.queue.remove(id) is not None:
            await asyncio.shield(self._board.finish(id, "cancelled"))
        else:
            await self._dispatcher.cancel(id)
        return "requested"

    def recent(self, *, limit: int, before: str | None = None) -> Sequence[Job]:
        """Jobs, newest first, those submitted before job `before` if given."""
        jobs = self._store.recent(limit=limit, before=before)
        return [self._board.job(job.id) or job for job in jobs]

    async def delete(self, id: str) -> bool:
        """Forget a finished job and its files; whether there was one."""
        there = await self._store.delete(id)
        self._board.forget([id])
        return there

    # Files.

    async def store_upload(self, data: bytes, name: str, *, id: str | None = None) -> StoredFile:
        """Keep an uploaded image.

        Args:
            data: its bytes.
            name: for a download's file name.
            id: from `files.new_id`, where it was promised before the bytes came; else a new one.

        Raises:
            InvalidImage: no PNG, JPEG or WebP, or too large.
            Unavailable: the disk is full.
        """
        self._refuse_if_unavailable()
        file = await self._store_image(data, harmless_name(name) or "upload", id)
        try:
            await self._store.add_upload(file)
        except sqlite3.IntegrityError:  # the same promised file twice at once: the first one counts
            logger.info("the file %s came twice", file.id)
        except sqlite3.Error as error:
            self._store.files.remove([file.id])
            raise Unavailable(f"the server cannot keep the file: {error}") from error
        return file

    def file(self, id: str) -> StoredFile | None:
        """The stored file of that id."""
        return self._store.file(id)

    def file_path(self, file: StoredFile) -> str:
        """Where its bytes are."""
        return str(self._store.files.path(file.id))

    # Housekeeping.

    def _look_at_disk(self) -> None:
        is_low = self._free(self._store.folder) < self.settings.low_disk
        if is_low != self._dispatcher.paused:
            logger.warning("the disk is %s", "full: the queue pauses" if is_low else "free again")
            self._dispatcher.paused = is_low
            self._board.changed.set()

    async def _keep_house(self) -> None:
        """Look at the disk, and forget what is old."""
        expired = 0.0
        while True:
            with contextlib.suppress(OSError):
                self._look_at_disk()
            if time.monotonic() - expired > EXPIRE_SECONDS:
                expired = time.monotonic()
                try:
                    await self.expire()
                except sqlite3.Error as error:
                    logger.error("what is old could not be forgotten; tried again: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def expire(self) -> None:
        """Forget the oldest finished jobs and uploads, as far as the settings say."""
        keep_seconds, keep_bytes = self.settings.keep_seconds, self.settings.keep_bytes
        if keep_seconds is not None or keep_bytes is not None:
            gone = await self._store.expire(keep_seconds=keep_seconds, keep_bytes=keep_bytes)
            self._board.forget(gone)

    def _tell_of_end(self, job: Job) -> None:
        if job.webhook is not None:
            self._webhooks.look()
        if self.on_finished is not None:
            try:
                self.on_finished(job)
            except Exception:  # the job has ended all the same
                logger.exception("on_finished of job %s", job.id)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _alias(settings: Settings) -> str:
    """The family of the settings' model, as far as that shows without loading it."""
    if settings.model == "tiny":  # to find it is to make it, which takes torch
        return weights.KREA.alias
    transformer = settings.load.get("transformer")
    with contextlib.suppress(KreaError, OSError):
        checkpoint = weights.find(
            settings.model,
            transformer=transformer if isinstance(transformer, (str, Path)) else None,
            fetch=False,
        )
        return checkpoint.family.alias
    return weights.KREA.alias


def _not_loaded(url: str) -> Failure:
    fault = {
        "loc": ["body", "image_url"],
        "msg": f"Could not load image from url: {url[:LONGEST_URL_SHOWN]}",
        "type": "file_download_error",
    }
    return Failure(422, None, {"detail": [fault]})
