"""Calls in: a body read, judged and put into the queue; the job followed to its end.

Knows nothing of paths, or of what answers look like.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from pydantic_core import from_json
from starlette.requests import HTTPConnection
from starlette.requests import Request as HttpRequest

from krea_local.endpoints import ENDPOINTS, IMAGE_TO_IMAGE, Endpoint, find_endpoint
from krea_local.errors import InvalidImage, InvalidRequest, UnknownEndpoint
from krea_local.images import read_data_uri
from krea_local.schema import Img2ImgRequest
from krea_local.server.answers import SHOWN_CHARACTERS, Refusal, shortened
from krea_local.server.guard import host_name, hosts_of
from krea_local.server.jobs import Job, StoredFile
from krea_local.server.service import Event, Unavailable
from krea_local.server.web import Web

LARGE_BODY = 2**20  # decoded in a thread, so that others need not wait
POSITION_SECONDS = 1.0  # between looks at a place in the queue
INPUT_FILE = re.compile(r"/files/([\w-]{16,128})")


async def read_json(request: HttpRequest) -> object:
    """The body's JSON value.

    Raises:
        InvalidRequest: it is none.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    try:
        if len(body) > LARGE_BODY:
            return await asyncio.to_thread(from_json, body, allow_inf_nan=False)
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        fault = {
            "loc": ("body",),
            "msg": "JSON decode error",
            "type": "json_invalid",
            "input": {},
            "ctx": {"error": str(error)[:SHOWN_CHARACTERS]},
        }
        raise InvalidRequest("the body is not JSON", [fault]) from error


async def read_object(request: HttpRequest) -> dict[str, object]:
    """The body's JSON object.

    Raises:
        InvalidRequest: it is none.
    """
    value = await read_json(request)
    if not isinstance(value, dict):
        fault = {
            "loc": ("body",),
            "msg": "Input should be a valid dictionary",
            "type": "model_attributes_type",
            "input": shortened(value),
        }
        raise InvalidRequest("the body should be an object", [fault])
    return value


def endpoint_here(web: Web, name: str) -> Endpoint:
    """The endpoint of that id.

    Raises:
        UnknownEndpoint: there is none, or the server draws with another model.
    """
    endpoint = find_endpoint(name)
    if endpoint.model != web.service.model:
        raise UnknownEndpoint(
            f"this server draws with {web.service.model}; start `krea-local serve --model "
            f"{endpoint.model}` for {endpoint.id}"
        )
    return endpoint


def endpoint_of_model(web: Web, *, edits: bool = False) -> Endpoint:
    """The endpoint to draw with the loaded model, where the caller names none."""
    return next(
        one
        for one in ENDPOINTS.values()
        if one.model == web.service.model and one.id.endswith(IMAGE_TO_IMAGE) == edits
    )


async def submit(
    web: Web,
    http: HTTPConnection,
    endpoint: Endpoint,
    arguments: Mapping[str, object],
    *,
    image: bytes | None = None,
    webhook: str | None = None,
    low_priority: bool = False,
    start_within: float | None = None,
    previews: bool = False,
) -> Job:
    """Validate a call and put it into the queue; once this returns, no crash loses it.

    Args:
        web: of this server.
        http: whose body was read; its share of the memory for bodies is given back.
        endpoint: that was called.
        arguments: as they came.
        image: the input image, where it came beside the arguments.
        webhook: where the job's end is told.
        low_priority: after all others that wait.
        start_within: seconds after which it fails if it has not started.
        previews: whether they are wanted from its first step on.

    Raises:
        InvalidRequest: a fault of the arguments.
        QueueFull, Unavailable: see `service`.
    """
    given = {} if image is None else {"image_url": "data:,"}
    request = endpoint.parse({**arguments, **given})
    source: bytes | StoredFile | str | None = image
    if isinstance(request, Img2ImgRequest):
        url = str(request.image_url)
        if source is None:
            source = await _input_image(web, http, url)
        request = request.model_copy(update={"image_url": url[:SHOWN_CHARACTERS]})
    release: Callable[[], None] | None = http.scope.get("state", {}).get("release_body")
    job = await web.service.submit(
        endpoint,
        request,
        image=source,
        webhook=webhook,
        low_priority=low_priority,
        start_within=start_within,
        previews=previews,
    )
    if release is not None:
        release()
    return job


async def _input_image(web: Web, http: HTTPConnection, url: str) -> bytes | StoredFile | str:
    """What the service takes for an image: bytes, one of our own files, or a URL of others."""
    if url[:5].lower() == "data:":
        return await asyncio.to_thread(read_data_uri, url)
    try:
        parts = urllib.parse.urlsplit(url)
        own = (http.scope.get("server") or ("",))[0]  # let in by the guard, too
        ours = host_name(parts.netloc) in hosts_of(web.settings) | {own}
    except ValueError as error:
        raise InvalidImage(f"image_url: is not a URL: {error}") from error
    match = INPUT_FILE.fullmatch(parts.path)
    if ours and match:
        file = web.service.file(match[1])
        if file is not None:
            return file
        raise InvalidImage(f"Could not load image from url: {url[:SHOWN_CHARACTERS]}")
    return url


async def finished(web: Web, request: HttpRequest, id: str) -> Job | None:
    """The job once it is finished; None if its client went away first, and it was cancelled.

    Raises:
        Unavailable: the server stops, and the job did not finish.
    """
    waits: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(web.service.wait(id)),
        asyncio.ensure_future(_gone(request)),
        asyncio.ensure_future(web.stopping.wait()),
    ]
    done, gone, stopping = waits
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not done.done():
            job = web.service.get(id)
            if job is not None and job.state == "running":  # it may end before the workers do
                waits[2] = asyncio.ensure_future(web.stopped.wait())
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            if isinstance(done.exception(), KeyError):
                raise Refusal(404, "the job was deleted", "not_found")
            result = done.result()
            assert isinstance(result, Job)
            return result
        # Nobody will ask for it again.
        await web.service.cancel(id)
        if gone.done():
            return None
        raise Unavailable("the server is stopping; send the request again")
    except asyncio.CancelledError:
        await web.service.cancel(id)
        raise
    finally:
        for one in waits:
            one.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def followed(web: Web, id: str, *, previews: bool = False) -> AsyncIterator[Event]:
    """What happens to a job, until it or the server ends; its place in the queue, too."""
    events = web.service.events(id, previews=previews)
    stopped = asyncio.ensure_future(web.stopped.wait())
    upcoming: asyncio.Future[Event] | None = None
    position = 0
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(events))
            waits: list[asyncio.Future[Any]] = [upcoming, stopped]
            await asyncio.wait(waits, timeout=POSITION_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if upcoming.done():
                event = upcoming.result()
                upcoming = None
            elif stopped.done():
                return
            else:
                job = web.service.get(id)
                if job is None or job.state != "queued" or web.service.position(id) == position:
                    continue
                event = Event("state", job)
            position = web.service.position(id)
            yield event
    except StopAsyncIteration:
        return
    finally:
        stopped.cancel()
        if upcoming is not None:
            upcoming.cancel()
