"""What the functions for threads and those for asyncio share: a call, its job, its answer.

Knows nothing of how they wait.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from krea_local.endpoints import STREAM, HttpError, find_endpoint, http_error
from krea_local.errors import InvalidImage, KreaError
from krea_local.fal_client.jobs import Job, JobQueue
from krea_local.fal_client.models import model_for
from krea_local.fal_client.types import (
    Completed,
    FalClientError,
    FalClientHTTPError,
    InProgress,
    Priority,
    Queued,
    Status,
    http_error_of,
)

if TYPE_CHECKING:
    from PIL import Image

AnyJSON = dict[str, Any]
Arguments = Mapping[str, Any]
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
INTERVAL = 0.1
REALTIME_SECONDS = 120
QUEUE = JobQueue(model_for)  # one for the process, as there is one GPU


def read_call(
    application: str,
    arguments: Arguments,
    *,
    path: str = "",
    priority: Priority | None = None,
    start_timeout: float | None = None,
    headers: Mapping[str, str] = NO_HEADERS,
    streamed: bool = False,
) -> Callable[[], Job]:
    """What submits that call, which is judged and, where it holds an image, copied here.

    Raises:
        FalClientHTTPError: 404 for an endpoint that is not here, 422 for faulty arguments.
        ValueError: `priority` or `start_timeout` is out of range.
    """
    wishes = {name.lower(): value for name, value in headers.items()}
    priority_wished = priority or wishes.get("x-fal-queue-priority", "normal")
    if priority_wished not in ("normal", "low"):
        raise ValueError(f"priority={priority_wished!r}: should be 'normal' or 'low'")
    wished = wishes.get("x-fal-request-timeout") if start_timeout is None else start_timeout
    seconds = None if wished is None else _start_seconds(wished)
    name = f"{application}/{path.lstrip('/')}" if path else application
    if streamed and isinstance(arguments, Mapping):
        # One picture a stream, as with the hosted API, which does not know the parameter there.
        arguments = {key: value for key, value in arguments.items() if key != "num_images"}
    if streamed:
        name = name.removesuffix(STREAM)
    try:
        endpoint = find_endpoint(name)
        request = endpoint.parse(arguments, wire=False)
        image = getattr(request, "image_url", None)
        if hasattr(image, "getexif"):  # a PIL image, which its owner may draw on meanwhile
            request = request.model_copy(update={"image_url": _copied(image)})
    except KreaError as error:
        raise _raised(http_error(error), name) from error
    return functools.partial(
        QUEUE.submit,
        endpoint,
        request,
        low_priority=priority_wished == "low",
        start_within=seconds,
        wants_previews=streamed,
    )


def _start_seconds(wished: float | str) -> float:
    try:
        seconds = float(wished)
    except ValueError:
        seconds = 0.0
    if not seconds > 1:
        raise ValueError(f"start_timeout={wished!r}: should be more than 1 second")
    return seconds


def _copied(image: Any) -> Image.Image:
    try:
        duplicate: Image.Image = image.copy()
    except Exception as error:  # its file is read only now, and may be damaged in any way
        raise InvalidImage(f"image_url (PIL image): cannot be decoded: {error}") from error
    return duplicate


def _raised(error: HttpError, url: str, request_id: str | None = None) -> FalClientHTTPError:
    headers = error.headers
    if request_id is not None:
        headers["X-Fal-Request-Id"] = request_id
    return http_error_of(error.status, error.body, headers, url=url)


def status_of(job: Job, *, with_logs: bool) -> Status:
    """How far a job is, as the official client tells it."""
    with QUEUE.unchanging():
        if job.state == "queued":
            return Queued(position=QUEUE.position(job))
        logs: list[dict[str, Any]] | None = None
        if with_logs:
            logs = [dict(line) for line in job.logs]
        if job.state == "running":
            return InProgress(logs=logs)
        metrics = {"inference_time": job.seconds}
        if job.error is None:
            return Completed(logs=logs, metrics=metrics)
        detail: Any = job.error.body["detail"]
        text = detail if isinstance(detail, str) else "; ".join(one["msg"] for one in detail)
        return Completed(logs=logs, metrics=metrics, error=text, error_type=job.error.error_type)


def output_of(job: Job) -> AnyJSON:
    """What a finished job made.

    Raises:
        FalClientHTTPError: it failed or was cancelled.
    """
    if job.error is not None:
        raise _raised(job.error, job.endpoint.id, job.id) from job.cause
    assert job.output is not None
    return copy.deepcopy(job.output)


def least(*seconds: float | None) -> float | None:
    """The shortest of some spans, None being endless."""
    return min((one for one in seconds if one is not None), default=None)


def left_until(deadline: float | None) -> float | None:
    """Seconds until a moment of the monotonic clock, 0 once it is past."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def read_timeout(job: Job, seconds: float | None) -> Exception:
    """What the official client lets through when an answer takes too long."""
    import httpx

    return httpx.ReadTimeout(f"{job.endpoint.id} took over {seconds} seconds; it is cancelled")


def start_within(start: float | None, client: float | None) -> float | None:
    """`start_timeout` of a call that waits no longer than `client` in all."""
    if client is None:
        return start
    if start is not None and start > client:
        warnings.warn(
            f"start_timeout={start} is more than client_timeout={client}, which will be up first",
            UserWarning,
            stacklevel=3,
        )
    return client if start is None else start


def refuse_realtime(name: str) -> NoReturn:
    """Say that there are no web sockets in a process, and what there is."""
    raise FalClientError(
        f"{name} is not there in this process: `stream` shows the picture while it is drawn"
    )


@dataclass(frozen=True)
class Handle:
    """What the handles of a request have in common.

    Attributes:
        request_id: by which `status`, `result` and `cancel` find it too.
        response_url: names the request; nothing answers there, nor at the next two.
        status_url: likewise.
        cancel_url: likewise.
    """

    request_id: str
    response_url: str = field(repr=False)
    status_url: str = field(repr=False)
    cancel_url: str = field(repr=False)

    def cancel_job(self, job: Job | None) -> None:
        """Stop `job`, which is this request, if there is one.

        Raises:
            FalClientHTTPError: 400 if it is over, 404 if there is none.
        """
        if job is None:
            raise http_error_of(404, {"status": "NOT_FOUND"}, {}, url=self.response_url)
        if not QUEUE.cancel(job):
            raise http_error_of(400, {"status": "ALREADY_COMPLETED"}, {}, url=self.response_url)

    def found(self, job: Job | None) -> Job:
        """`job`, which is this request.

        Raises:
            FalClientHTTPError: 404, it is None.
        """
        if job is None:
            body = {"detail": f"Request {self.request_id} not found"}
            raise http_error_of(404, body, {}, url=self.response_url)
        return job


def urls_of(application: str, request_id: str) -> tuple[str, str, str]:
    """Names in the form of the hosted API's; nothing answers at them."""
    base = f"krea-local:/{_app(application)}/requests/{request_id}"
    return base, base + "/status", base + "/cancel"


def _app(application: str) -> str:
    """Owner and alias.

    Raises:
        ValueError: there are none.
    """
    parts = application.strip("/").split("/")
    if len(parts) < 2:
        raise ValueError(
            f"application={application!r}: should be 'owner/alias', 'owner/alias/path'"
        )
    return "/".join(parts[:2])


def find_job(application: str, request_id: str) -> Job | None:
    """The job of that id, if it is of that application and not forgotten."""
    job = QUEUE.find(request_id)
    return job if job is not None and job.endpoint.app == _app(application) else None


NO_WEBHOOKS = (
    "webhook_url: this process sends no webhooks, the server does (`krea-local serve`); here wait "
    "with the handle's get() or iter_events()"
)


def check_method(method: str, application: str) -> None:
    """Refuse what endpoints do not answer to: FalClientHTTPError 405."""
    if method.upper() != "POST":
        raise http_error_of(405, {"detail": "Method Not Allowed"}, {}, url=application)
