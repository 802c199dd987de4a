"""The official client's functions for threads, over the queue of this process.

Same names and parameters as in fal-client 1.0. Knows nothing of models.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from krea_local.fal_client.files import (
    UploadRepositoryId,
    check_repositories,
    content_type_of,
    image_bytes,
    store,
)
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
class SyncRequestHandle(Handle):
    """A submitted request.

    Attributes:
        client: that it was submitted with.
    """

    client: SyncClient = field(repr=False)
    _job: Job | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_request_id(
        cls, client: SyncClient, application: str, request_id: str
    ) -> SyncRequestHandle:
        """The handle of a request of this process, for as long as it is remembered."""
        urls = urls_of(application, request_id)
        return cls(request_id, *urls, client=client, _job=find_job(application, request_id))

    def status(self, *, with_logs: bool = False) -> Status:
        """How far it is.

        Raises:
            FalClientHTTPError: 404, there is no such request.
        """
        return status_of(self.found(self._job), with_logs=with_logs)

    def iter_events(
        self, *, with_logs: bool = False, interval: float = INTERVAL
    ) -> Iterator[Status]:
        """Its status now and whenever that changes, until it is over.

        Args:
            with_logs: give each status all lines so far.
            interval: seconds between two statuses at least, but for the last.
        """
        yield from _events(self.found(self._job), with_logs=with_logs, interval=interval)

    def get(self, *, interval: float = INTERVAL) -> AnyJSON:
        """Wait for the result; `interval` is without meaning, as nothing is polled.

        Raises:
            FalClientHTTPError: as the hosted API would answer; its cause is the exception itself.
        """
        job = self.found(self._job)
        _wait(job)
        return output_of(job)

    def cancel(self) -> None:
        """Stop it: at once if it waits, within a step if it is being drawn.

        Raises:
            FalClientHTTPError: 400 if it is over, 404 if there is none.
        """
        self.cancel_job(self._job)


@dataclass(frozen=True)
class SyncClient:
    """The hosted API's functions, answered by this process; all clients share one queue.

    Everywhere `hint` and headers other than X-Fal-Queue-Priority and X-Fal-Request-Timeout are
    without meaning: there is one machine.

    Args:
        key: without meaning: nothing is asked for one.
        default_timeout: without meaning: submitting takes no time.
    """

    key: str | None = field(default=None, repr=False)
    default_timeout: float = 120.0

    def run(
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
        """Draw, and wait for the result. Ctrl-C cancels.

        Args:
            application: the endpoint, "fal-ai/flux/krea".
            arguments: its parameters; an `image_url` may be a path, bytes or a PIL image too.
            method: POST.
            path: added to `application`.
            timeout: seconds in all, after which it is cancelled; by default none.
            start_timeout: seconds, more than 1, in which it must have been begun.
            hint: without meaning.
            headers: see the class.

        Raises:
            FalClientHTTPError: as the hosted API would answer; its cause is the exception itself.
            httpx.ReadTimeout: `timeout` was up.
        """
        check_method(method, application)
        job = read_call(
            application, arguments, path=path, start_timeout=start_timeout, headers=headers
        )()
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            if not _wait(job, deadline):
                raise read_timeout(job, timeout)
        except BaseException:
            QUEUE.cancel(job)
            raise
        return output_of(job)

    def submit(
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
    ) -> SyncRequestHandle:
        """Have it drawn in the background, in its turn.

        A request lives no longer than this process; 1,000 finished ones are remembered by id.

        Args:
            application, arguments, path, hint, headers, start_timeout: as of `run`.
            webhook_url: is refused.
            priority: "low" comes after all others that wait.

        Raises:
            FalClientHTTPError: 404 or 422 at once; all else is told by the handle.
            FalClientError: there is a `webhook_url`.
        """
        if webhook_url is not None:
            raise FalClientError(NO_WEBHOOKS)
        job = read_call(
            application,
            arguments,
            path=path,
            priority=priority,
            start_timeout=start_timeout,
            headers=headers,
        )()
        return SyncRequestHandle(job.id, *urls_of(application, job.id), client=self, _job=job)

    def subscribe(
        self,
        application: str,
        arguments: Arguments,
        *,
        path: str = "",
        hint: str | None = None,
        with_logs: bool = False,
        interval: float = INTERVAL,
        on_enqueue: Callable[[str], None] | None = None,
        on_queue_update: Callable[[Status], None] | None = None,
        priority: Priority | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        start_timeout: float | None = None,
        client_timeout: float | None = None,
    ) -> AnyJSON:
        """Draw, tell how far it is, and wait for the result. Ctrl-C cancels.

        Args:
            application, arguments, path, hint, headers, start_timeout: as of `run`.
            with_logs: give each status all lines so far.
            interval: seconds between two statuses at least, but for the last.
            on_enqueue: called with the request's id.
            on_queue_update: called with each status, in this thread.
            priority: "low" comes after all others that wait.
            client_timeout: seconds in all, after which it is cancelled.

        Raises:
            FalClientTimeoutError: `client_timeout` was up.
            FalClientHTTPError: as `run`.
        """
        start_timeout = start_within(start_timeout, client_timeout)
        deadline = None if client_timeout is None else time.monotonic() + client_timeout
        job = read_call(
            application,
            arguments,
            path=path,
            priority=priority,
            start_timeout=start_timeout,
            headers=headers,
        )()
        try:
            if on_enqueue is not None:
                on_enqueue(job.id)
            if on_queue_update is not None:
                for status in _events(
                    job, with_logs=with_logs, interval=interval, deadline=deadline
                ):
                    on_queue_update(status)
            finished = _wait(job, deadline)
        except KeyboardInterrupt:
            QUEUE.cancel(job)
            raise
        if not finished and client_timeout is not None:
            QUEUE.cancel(job)
            raise FalClientTimeoutError(timeout=client_timeout, request_id=job.id)
        return output_of(job)

    def get_handle(self, application: str, request_id: str) -> SyncRequestHandle:
        """The handle of a request by its id."""
        return SyncRequestHandle.from_request_id(self, application, request_id)

    def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        """How far a request is; raises as `SyncRequestHandle.status`."""
        return self.get_handle(application, request_id).status(with_logs=with_logs)

    def result(self, application: str, request_id: str) -> AnyJSON:
        """Wait for a request's result; raises as `SyncRequestHandle.get`."""
        return self.get_handle(application, request_id).get()

    def cancel(self, application: str, request_id: str) -> None:
        """Stop a request; raises as `SyncRequestHandle.cancel`."""
        self.get_handle(application, request_id).cancel()

    def stream(
        self,
        application: str,
        arguments: Arguments,
        *,
        path: str = STREAM,
        timeout: float | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> Iterator[AnyJSON]:
        """Draw one picture and show it meanwhile; leaving the loop cancels.

        Yields objects shaped like the result: some rough previews of the picture as data URIs, at
        most 512 pixels a side and unscreened, then the result itself.

        Args:
            application, arguments, headers: as of `run`.
            path: "/stream", which every endpoint has, or a longer path that ends so.
            timeout: seconds between two objects at most.

        Raises:
            FalClientHTTPError: as `run`.
            httpx.ReadTimeout: `timeout` was up.
        """
        job = read_call(application, arguments, path=path, headers=headers, streamed=True)()
        changed, shown = threading.Event(), 0
        try:
            with QUEUE.listening(job, changed.set):
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
                    changed.wait(least(again, left_until(deadline)))
            yield output_of(job)
        finally:
            QUEUE.cancel(job)
            job.previews.clear()

    def upload(
        self,
        data: str | bytes,
        content_type: str,
        file_name: str | None = None,
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """Keep a copy of `data` on this machine and return its file URI.

        It lies in `uploads` in the folder that KREA_LOCAL_OUTPUT names, else in the user's cache
        folder. Repositories and `lifecycle` are without meaning; delete the file at will.

        Raises:
            OutputFailed: it cannot be written.
        """
        check_repositories(repository, fallback_repository)
        return store(data, content_type, file_name)

    def upload_file(
        self,
        path: str | os.PathLike[str],
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """Keep a copy of a file, as `upload`."""
        check_repositories(repository, fallback_repository)
        with open(path, "rb") as file:
            return store(file.read(), content_type_of(path), os.path.basename(path))  # noqa: PTH119

    def upload_image(
        self,
        image: Image.Image,
        format: str = "jpeg",
        *,
        repository: UploadRepositoryId | None = None,
        fallback_repository: UploadRepositoryId | Sequence[UploadRepositoryId] | None = None,
        lifecycle: StorageSettings | None = None,
    ) -> str:
        """Keep a PIL image as a file, as `upload`."""
        check_repositories(repository, fallback_repository)
        return store(image_bytes(image, format), f"image/{format}", None)

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
        refuse_realtime("realtime")

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
        refuse_realtime("ws_connect")


def _wait(job: Job, deadline: float | None = None) -> bool:
    """Whether the job was finished before `deadline`."""
    changed = threading.Event()
    with QUEUE.listening(job, changed.set):
        while True:
            changed.clear()
            if job.finished:
                return True
            left = left_until(deadline)
            if left == 0:
                return False
            again = QUEUE.poll(job)  # may end the job, and sets `changed` then
            changed.wait(least(again, left))


def _events(
    job: Job, *, with_logs: bool, interval: float, deadline: float | None = None
) -> Iterator[Status]:
    """The status now and at each change, no faster than `interval`, but the end at once.

    Ends with a `Completed`, or without one at `deadline`.
    """
    changed = threading.Event()
    with QUEUE.listening(job, changed.set):
        while True:
            changed.clear()
            again = QUEUE.poll(job)
            status = status_of(job, with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            not_before = time.monotonic() + interval
            if deadline is not None:
                not_before = min(not_before, deadline)
            changed.wait(least(again, left_until(deadline)))
            while not job.finished and (left := left_until(not_before)):
                changed.clear()
                changed.wait(left)
            if left_until(deadline) == 0 and not job.finished:
                return
