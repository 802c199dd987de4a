"""The hosted API's protocol: run, stream, and the queue, for the endpoints of the loaded model.

    {base}/run/{endpoint}                    and bare {base}/{endpoint}
    {base}/run/{endpoint}/stream             and bare
    {base}/queue/{endpoint}                  submit
    {base}/queue/{owner}/{alias}/requests/{id}[/status[/stream] | /response | /cancel]

Source: the official clients, which read no other documentation either.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic_core import to_json
from sse_starlette import ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from krea_local.endpoints import ENDPOINTS, STREAM, Endpoint, HttpError, http_error
from krea_local.errors import UnknownEndpoint
from krea_local.server import answers, calls, polling, proxy, shapes
from krea_local.server.answers import Refusal, answer
from krea_local.server.jobs import FINISHED, Job
from krea_local.server.service import Event
from krea_local.server.web import Web

MAX_WEBHOOK_CHARACTERS = 2048
MAX_START_SECONDS = 7 * 24 * 3600.0
Handler = Callable[[HttpRequest], Awaitable[Response]]


def add_routes(app: FastAPI, web: Web) -> None:
    """Add the hosted API's paths."""
    app.include_router(polling.router_of(web))  # first: routes are tried in order, and clients poll
    for endpoint in ENDPOINTS.values():
        _add_endpoint(app, web, endpoint)


def not_here(web: Web, path: str) -> HttpError:
    """What to say of a path that no route has: why that endpoint is not here, if it is one."""
    if path == proxy.NO_TARGET:
        places = ", ".join(proxy.PLACES)
        text = f"{proxy.TARGET} should be an https URL on {places}"
        return HttpError(400, "bad_request", {"detail": text, "error_type": "bad_request"})
    match = re.match(r"(?:/run|/queue)?/(fal-ai/.+)", path)
    if match and "/requests/" not in path:
        try:
            calls.endpoint_here(web, match[1].removesuffix(STREAM))
        except UnknownEndpoint as error:
            return http_error(error)
    return HttpError(404, None, {"detail": f"Path {path[:200]} not found"})


def _add_endpoint(app: FastAPI, web: Web, endpoint: Endpoint) -> None:
    async def run(request: HttpRequest) -> Response:
        calls.endpoint_here(web, endpoint.id)
        start_within = _start_within(request)
        job = await calls.submit(
            web,
            request,
            endpoint,
            await calls.read_object(request),
            low_priority=_low_priority(request),
            start_within=start_within,
        )
        done = await calls.finished(web, request, job.id)
        if done is None:
            return Response(status_code=499)
        return await answers.result(web, request, done)

    async def stream(request: HttpRequest) -> Response:
        calls.endpoint_here(web, endpoint.id)
        start_within = _start_within(request)
        arguments = await calls.read_object(request)
        arguments.pop("num_images", None)  # the hosted stream draws one
        job = await calls.submit(
            web,
            request,
            endpoint,
            arguments,
            low_priority=_low_priority(request),
            start_within=start_within,
            previews=True,
        )
        del arguments
        events = _streamed(web, answers.base_url(web, request), job)
        headers = {"x-fal-request-id": job.id}
        return answers.event_stream(events, headers)

    async def submit(request: HttpRequest) -> Response:
        calls.endpoint_here(web, endpoint.id)
        start_within, webhook = _start_within(request), _webhook(request)
        job = await calls.submit(
            web,
            request,
            endpoint,
            await calls.read_object(request),
            webhook=webhook,
            low_priority=_low_priority(request),
            start_within=start_within,
        )
        urls = polling.urls(answers.base_url(web, request), endpoint, job.id)
        position = web.service.position(job.id)
        body: dict[str, object] = {
            "status": "IN_QUEUE",
            "request_id": job.id,
            **urls,
            "logs": None,
            "metrics": {},
            "queue_position": position,
        }
        return answer(body, headers={"x-fal-request-id": job.id})

    named = endpoint.id.replace("/", "_").replace("-", "_")
    events: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "Server-sent events: JSON shaped like the output, previews first.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }
    _post(app, f"/run/{endpoint.id}", run, endpoint, f"run_{named}", shapes.Output)
    _post(app, f"/run/{endpoint.id}{STREAM}", stream, endpoint, f"stream_{named}", None, events)
    _post(app, f"/queue/{endpoint.id}", submit, endpoint, f"submit_{named}", shapes.Submitted)
    app.post(f"/{endpoint.id}", include_in_schema=False)(run)
    app.post(f"/{endpoint.id}{STREAM}", include_in_schema=False)(stream)


def _post(
    app: FastAPI,
    path: str,
    handler: Handler,
    endpoint: Endpoint,
    name: str,
    model: type[BaseModel] | None,
    success: dict[int | str, dict[str, Any]] | None = None,
) -> None:
    """Add a path whose body the endpoint's own schema describes and judges."""
    reference = {"$ref": f"#/components/schemas/{shapes.schema_name(endpoint)}"}
    described = {"requestBody": {"required": True, "content": {"application/json": {}}}}
    described["requestBody"]["content"] = {"application/json": {"schema": reference}}
    responses = success or {200: {"model": model, "description": "It is done."}}
    app.post(
        path,
        operation_id=name,
        response_class=Response,
        responses={**responses, **shapes.FAILURES},
        openapi_extra=described,
        tags=[endpoint.id],
    )(handler)


async def _streamed(web: Web, base: str, job: Job) -> AsyncIterator[ServerSentEvent]:
    """Previews, then the output; cancels the job if its client goes away."""
    last = job
    events = calls.followed(web, job.id, previews=True)
    try:
        async for event in events:
            last = event.job
            if event.preview is not None and last.state == "running":
                yield ServerSentEvent(to_json(_preview(event)).decode())
        if last.outcome is not None:
            yield ServerSentEvent(to_json(await answers.output(web, base, last)).decode())
        else:
            error = answers.shortened(answers.failure_of(last).body)
            yield ServerSentEvent(to_json(error).decode(), event="error")
    finally:
        if last.state not in FINISHED:
            web.later(web.service.cancel(job.id))  # this task is being cancelled itself


def _preview(event: Event) -> Mapping[str, object]:
    assert event.preview is not None
    width, height = answers.image_size(event.preview)
    image = {
        "url": answers.data_uri(event.preview, "image/jpeg"),
        "width": width,
        "height": height,
        "content_type": "image/jpeg",
    }
    return {
        "images": [image],
        "timings": {},
        "seed": event.job.arguments.get("seed"),
        "has_nsfw_concepts": [False],
        "prompt": event.job.arguments.get("prompt", ""),
    }


def _start_within(request: HttpRequest) -> float | None:
    given = request.headers.get("x-fal-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_START_SECONDS:
        text = f"X-Fal-Request-Timeout: {given[:40]!r} should be a number of seconds"
        raise Refusal(400, text, "bad_request")
    return seconds


def _low_priority(request: HttpRequest) -> bool:
    given = request.headers.get("x-fal-queue-priority", "normal").lower()
    if given not in ("low", "normal"):
        text = f"X-Fal-Queue-Priority: {given[:40]!r} should be low or normal"
        raise Refusal(400, text, "bad_request")
    return given == "low"


def _webhook(request: HttpRequest) -> str | None:
    given = request.query_params.get("fal_webhook")
    if given is None:
        return None
    try:
        parts = urllib.parse.urlsplit(given)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or len(given) > MAX_WEBHOOK_CHARACTERS:
        fault = {
            "loc": ["query", "fal_webhook"],
            "msg": f"Input should be an http(s) URL of at most {MAX_WEBHOOK_CHARACTERS} characters",
            "type": "url_parsing",
            "input": given[:200],
        }
        raise Refusal(422, [fault])
    return given
