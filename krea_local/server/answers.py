"""Answers out: JSON, errors in each API's words, a job as the hosted API shows it, our own URLs.

Knows nothing of paths.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

import anyio
from pydantic_core import to_json
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from krea_local.endpoints import (
    HttpError,
    http_error,
)
from krea_local.errors import Cancelled
from krea_local.server.jobs import FINISHED, Job, StoredFile
from krea_local.server.service import QueueFull, Unavailable
from krea_local.server.web import Web

SHOWN_CHARACTERS = 300  # of a refused value, in the answer that refuses it
RETRY_SECONDS = 10
PING_SECONDS = 15
_ORIENTATION = 0x0112  # in EXIF: 5 … 8 are turned by a quarter
STOP_SECONDS = 30.0  # for running jobs, once the server is told to end


class Refusal(Exception):
    """An answer other than success, raised where there is nothing more to do."""

    def __init__(
        self, status: int, detail: object, error_type: str | None = None, **headers: str
    ) -> None:
        super().__init__(str(detail))
        body = {"detail": detail} | ({"error_type": error_type} if error_type else {})
        self.error = HttpError(status, error_type, body)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(to_json(body), status, headers, media_type="application/json")


def refused(path: str, error: HttpError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for `error`, in the form that callers of `path` know."""
    sent = {**error.headers, **(headers or {})}
    if path.startswith("/v1/"):
        return answer(openai_error(error), openai_status(error), sent)
    return answer(shortened(error.body), error.status, sent)


def openai_status(error: HttpError) -> int:
    """OpenAI answers 400 where the hosted API answers 422."""
    return 400 if error.status == 422 else error.status


def openai_error(error: HttpError) -> Mapping[str, object]:
    """An error in the shape of OpenAI's API."""
    detail = error.body.get("detail")
    param = None
    message = detail if isinstance(detail, str) else "invalid request"
    if isinstance(detail, list) and detail:
        param = ".".join(str(part) for part in detail[0]["loc"][1:]) or None
        message = "; ".join(_told(fault) for fault in detail)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    told = {"message": message[:2000], "type": kind, "param": param, "code": error.error_type}
    return {"error": told}


def _told(fault: Mapping[str, object]) -> str:
    loc = fault["loc"]
    assert isinstance(loc, (list, tuple))
    return f"{'.'.join(str(part) for part in loc[1:]) or 'body'}: {fault['msg']}"


def shortened(value: object) -> object:
    """A JSON value with long texts cut: nobody needs 60 MB of image back to see what was wrong."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN_CHARACTERS * 7 else value[:SHOWN_CHARACTERS] + "…"
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print some
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        pairs = list(value.items())[:100]
        return {str(shortened(key)): shortened(one) for key, one in pairs}
    if isinstance(value, (list, tuple)):
        return [shortened(one) for one in value[:100]]
    return value


def error_of(error: Exception) -> tuple[HttpError, Mapping[str, str]]:
    """Status, body and headers of what a handler raised."""
    if isinstance(error, Refusal):
        return error.error, error.headers
    if isinstance(error, QueueFull):
        body = {"detail": str(error), "error_type": "queue_full"}
        return HttpError(429, "queue_full", body), {"retry-after": str(error.retry_after)}
    if isinstance(error, Unavailable):
        text = str(error) or "the server takes no jobs now"
        body = {"detail": text, "error_type": "unavailable"}
        return HttpError(503, "unavailable", body), {"retry-after": str(RETRY_SECONDS)}
    return http_error(error), {}


def base_url(web: Web, request: HttpRequest) -> str:
    """How this client reaches the server; `guard` has checked the Host that it names."""
    if web.settings.public_url:
        return web.settings.public_url.rstrip("/")
    return f"{request.url.scheme}://{request.headers['host']}"


def file_url(base: str, file: StoredFile) -> str:
    """Where a stored file is served."""
    return f"{base}/files/{file.id}"


def data_uri(data: bytes, content_type: str) -> str:
    """`data` as a URL of its own."""
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"


async def file_bytes(web: Web, file: StoredFile) -> bytes:
    """The bytes of a stored file."""
    return await asyncio.to_thread(Path(web.service.file_path(file)).read_bytes)


async def output(web: Web, base: str, job: Job) -> dict[str, object]:
    """A done job as the hosted API's output, with all five keys."""
    return await asyncio.to_thread(output_now, web, base, job)


def output_now(web: Web, base: str, job: Job) -> dict[str, object]:
    """As `output`, reading files in this thread."""
    outcome = job.outcome
    assert outcome is not None
    inline = job.arguments.get("sync_mode") is True
    images = []
    for picture in outcome.pictures:
        file = picture.file
        url = file_url(base, file)
        if inline:
            url = data_uri(Path(web.service.file_path(file)).read_bytes(), file.content_type)
        images.append(
            {
                "url": url,
                "width": picture.width,
                "height": picture.height,
                "content_type": file.content_type,
            }
        )
    inference = outcome.timings.get("inference", outcome.timings.get("total", 0.0))
    return {
        "images": images,
        "timings": {"inference": inference, **outcome.timings},
        "seed": outcome.seed,
        "has_nsfw_concepts": list(outcome.has_nsfw_concepts),
        "prompt": job.arguments.get("prompt", ""),
    }


def payload(web: Web, job: Job) -> Mapping[str, object]:
    """What a webhook tells of a done job."""
    return output_now(web, (web.settings.public_url or web.address).rstrip("/"), job)


def failure_of(job: Job) -> HttpError:
    """Why a finished job has no output."""
    if job.failure is not None:
        return HttpError(job.failure.status, job.failure.error_type, job.failure.body)
    return http_error(Cancelled("cancelled"))


def failure_text(error: HttpError) -> str:
    """Why, in words."""
    detail = error.body.get("detail")
    if isinstance(detail, list):
        return "; ".join(str(fault.get("msg", "")) for fault in detail)
    return str(detail)


def event_stream(
    events: AsyncIterator[ServerSentEvent], headers: Mapping[str, str] | None = None
) -> Response:
    """Server-sent events; a stopping server lets them end of themselves."""
    return EventSourceResponse(
        events,
        headers=headers,
        ping=PING_SECONDS,
        shutdown_event=anyio.Event(),
        shutdown_grace_period=STOP_SECONDS,
    )


async def result(web: Web, request: HttpRequest, job: Job) -> Response:
    """A finished job's answer: its output, or its error with the status it failed with."""
    assert job.state in FINISHED
    headers = {"x-fal-request-id": job.id}
    if job.outcome is not None:
        return answer(await output(web, base_url(web, request), job), headers=headers)
    return refused(request.url.path, failure_of(job), headers)


def iso(timestamp: float) -> str:
    """Seconds since 1970 as the hosted API writes moments."""
    return datetime.fromtimestamp(timestamp, timezone.utc).isoformat()


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an image once it is upright, from its header."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size
