"""The official client's functions for asyncio, over the queue of this process.

As `client`, which documents them; nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from krea_local.endpoints import STREAM
from krea_local.fal_client.calls import (
    INTERVAL,
    NO_HEADERS,
    NO_WEBHOOKS,
    QUEUE,
    REALTIME_SECONDS,
    AnyJSON,
    Arguments,
    Handle,
    check_method,
    find_job,
    least,
    left_until,
    output_of,
    read_call,
    read_timeout,
    refuse_realtime,
    start_within,
    status_of,
    urls_of,
)
from krea_local.fal_client.client import SyncClient
from krea_local.fal_client.files import UploadRepositoryId, check_repositories, store
from krea_local.fal_client.jobs import Job
from krea_local.fal_client.types import (
    Completed,
    FalClientError,
    FalClientTimeoutError,
    Priority,
    Status,
    StorageSettings,
)

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class AsyncRequestHandle(Handle):
    """A submitted request; as `SyncRequestHandle`."""

    client: AsyncClient = field(repr=False)
    _job: Job | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_request_id(
        cls, client: AsyncClient, application: str, request_id: str
    ) -> AsyncRequestHandle:
        """The handle of a request of this process, for as long as it is remembered."""
        urls = urls_of(application, request_id)
        return cls(request_id, *urls, client=client, _job=find_job(application, request_id))

    async def status(self, *, with_logs: bool = False) -> Status:
        """How far it is; raises as `SyncRequestHandle.status`."""
        return status_of(self.found(self._job), with_logs=with_logs)

    async def iter_events(
        self, *, with_logs: bool = False, interval: float = INTERVAL
    ) -> AsyncIterator[Status]:
        """Its status now and whenever that changes, until it is over."""
        async for status in _events_async(
            self.found(self._job), with_logs=with_logs, interval=interval
        ):
            yield status

    async def get(self, *, interval: float = INTERVAL) -> AnyJSON:
        """Wait for the result; raises as `SyncRequestHandle.get`."""
        job = self.found(self._job)
        await _wait_async(job)
        return output_of(job)

    async def cancel(self) -> None:
        """Stop it; raises as `SyncRequestHandle.cancel`."""
        self.cancel_job(self._job)


@dataclass(unsafe_hash=True)
class AsyncClient:
    """As `SyncClient`, for asyncio: nothing blocks the loop, and all clients share one queue."""

    key: str | None = field(default=None, repr=False)
    default_timeout: float = 120.0

    async def run(
        self,
        application: str,
        arguments: Arguments,
        *,
        method: str = "POST",
        path: str = "",
        timeout: float | None = None,
        start_timeout: float | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> AnyJSON:
        """As `SyncClient.run`; cancelling the task cancels the request."""
        check_method(method, application)
        submit = await asyncio.to_thread(
            read_call,
            application,
            arguments,
            path=path,
            start_timeout=start_timeout,
            headers=headers,
        )
        job = submit()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not await _wait_async(job, deadline):
                raise read_timeout(job, timeout)
        except BaseException:
            QUEUE.cancel(job)
            raise
        return output_of(job)

    async def submit(
        self,
        application: str,
        arguments: Arguments,
        *,
        path: str = "",
        hint: str | None = None,
        webhook_url: str | None = None,
        priority: Priority | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        start_timeout: float | None = None,
    ) -> AsyncRequestHandle:
        """As `SyncClient.submit`."""
        if webhook_url is not None:
            raise FalClientError(NO_WEBHOOKS)
        submit = await asyncio.to_thread(
            read_call,
            application,
            arguments,
            path=path,
            priority=priority,
            start_timeout=start_timeout,
            headers=headers,
        )
        job = submit()
        return AsyncRequestHandle(job.id, *urls_of(application, job.id), client=self, _job=job)

    async def subscribe(
        self,
        application: str,
        arguments: Arguments,
        *,
        path: str = "",
        hint: str | None = None,
        with_logs: bool = False,
        interval: float = INTERVAL,
        on_enqueue: Callable[[str], Awaitable[None] | None] | None = None,
        on_queue_update: Callable[[Status], Awaitable[None] | None] | None = None,
        priority: Priority | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        start_timeout: float | None = None,
        client_timeout: float | None = None,
    ) -> AnyJSON:
        """As `SyncClient.subscribe`; the callbacks may be coroutines.

        Cancelling the task leaves the request to be drawn, as with the hosted API: `on_enqueue`
        tells its id, by which it can be had or cancelled.
        """
        start_timeout = start_within(start_timeout, client_timeout)
        # Before the job's own, which is as long by default: this one is to be up first.
        deadline = None if client_timeout is None else time.monotonic() + client_timeout
        submit = await asyncio.to_thread(
            read_call,
            application,
            arguments,
            path=path,
            priority=priority,
            start_timeout=start_timeout,
            headers=headers,
        )
        job = submit()

        async def follow() -> None:
            if on_enqueue is not None:
                await _call(on_enqueue(job.id))
            if on_queue_update is not None:
                async for status in _events_async(job, with_logs=with_logs, interval=interval):
                    await _call(on_queue_update(status))
            await _wait_async(job)

        try:
            await asyncio.wait_for(follow(), left_until(deadline))
        except asyncio.TimeoutError as error:
            if client_timeout is None:
                raise  # a callback's own
            QUEUE.cancel(job)
            raise FalClientTimeoutError(timeout=client_timeout, request_id=job.id) from error
        return output_of(job)

    async def get_handle(self, application: str, request_id: str) -> AsyncRequestHandle:
        """The handle of a request by its id."""
        return AsyncRequestHandle.from_request_id(self, application, request_id)

    async def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        """As `SyncClient.status`."""
        return await (await self.get_handle(application, request_id)).status(with_logs=with_logs)

    async def result(self, application: str, request_id: str) -> AnyJSON:
        """As `SyncClient.result`."""
        return await (await self.get_handle(application, request_id)).get()

    async def cancel(self, application: str, request_id: str) -> None:
        """As `SyncClient.cancel`."""
        await (await self.get_handle(application, request_id)).cancel()

    async def stream(
        self,
        application: str,
        arguments: Arguments,
        *,
        path: str = STREAM,
        timeout: float | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> AsyncIterator[AnyJSON]:
        """As `SyncClient.stream`."""
        submit = await asyncio.to_thread(
            read_call, application, arguments, path=path, headers=headers, streamed=True
        )
        job = submit()
        changed, shown = asyncio.Event(), 0
        try:
            with QUEUE.listening(job, _setter(changed)):
                deadline = None if timeout is None else time.monotonic() + timeout
                while True:
                    changed.clear()
                    again, finished = QUEUE.poll(job), job.finished
                    while shown < len(job.previews):
                        shown += 1
                        yield job.previews[shown - 1]
                        deadline = None if timeout is None else time.monotonic() + timeout
                    if finished:
                        break
                    if left_until(deadline) == 0:
                        raise read_timeout(job, timeout)
                    await _wait_for(changed, least(again, left_until(deadline)))
            yield output_of(job)
        finally:
            QUEUE.cancel(job)
            job.previews.clear()

    async def upload(
        self,
        data: str | bytes,
        content_type: str,
        file_name: str | None = None,
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """As `SyncClient.upload`."""
        check_repositories(repository, fallback_repository)
        return await asyncio.to_thread(store, data, content_type, file_name)

    async def upload_file(
        self,
        path: str | os.PathLike[str],
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """As `SyncClient.upload_file`."""
        check_repositories(repository, fallback_repository)
        return await asyncio.to_thread(SyncClient().upload_file, path)

    async def upload_image(
        self,
        image: Image.Image,
        format: str = "jpeg",
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """As `SyncClient.upload_image`."""
        check_repositories(repository, fallback_repository)
        return await asyncio.to_thread(SyncClient().upload_image, image, format)

    def realtime(
        self,
        application: str,
        *,
        use_jwt: bool = True,
        path: str = "/realtime",
        max_buffering: int | None = None,
        token_expiration: int = REALTIME_SECONDS,
        encode_message: Callable[[Any], bytes] | None = None,
        decode_message: Callable[[bytes], Any] | None = None,
    ) -> NoReturn:
        """Is not there; raises FalClientError."""
        refuse_realtime("realtime_async")

    def ws_connect(
        self,
        application: str,
        *,
        use_jwt: bool = True,
        path: str = "",
        max_buffering: int | None = None,
        token_expiration: int = REALTIME_SECONDS,
    ) -> NoReturn:
        """Is not there; raises FalClientError."""
        refuse_realtime("ws_connect_async")


async def _wait_async(job: Job, deadline: float | None = None) -> bool:
    changed = asyncio.Event()
    with QUEUE.listening(job, _setter(changed)):
        while True:
            changed.clear()
            if job.finished:
                return True
            left = left_until(deadline)
            if left == 0:
                return False
            again = QUEUE.poll(job)  # may end the job, and sets `changed` then
            await _wait_for(changed, least(again, left))


def _setter(event: asyncio.Event) -> Callable[[], None]:
    """What sets an event of this loop from any thread."""
    loop = asyncio.get_running_loop()

    def set_it() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            loop.call_soon_threadsafe(event.set)

    return set_it


async def _wait_for(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def _events_async(job: Job, *, with_logs: bool, interval: float) -> AsyncIterator[Status]:
    changed = asyncio.Event()
    with QUEUE.listening(job, _setter(changed)):
        while True:
            changed.clear()
            again = QUEUE.poll(job)
            status = status_of(job, with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            not_before = time.monotonic() + interval
            await _wait_for(changed, again)
            while not job.finished and (left := left_until(not_before)):
                changed.clear()
                await _wait_for(changed, left)


async def _call(answer: Awaitable[None] | None) -> None:
    if inspect.isawaitable(answer):
        await answer
