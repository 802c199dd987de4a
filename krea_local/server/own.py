"""The page's own API, under /api/: what may be asked, the gallery, and jobs as they go.

Serves the page's files as well: those that lie in `page/`, by name, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, FastAPI
from pydantic_core import to_json
from sse_starlette import ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from krea_local._version import __version__
from krea_local.endpoints import ENDPOINTS, MAX_PROMPT_CHARACTERS, Endpoint
from krea_local.errors import InvalidRequest
from krea_local.images import MAX_FILE_BYTES
from krea_local.schema import PRESETS, ImageSize
from krea_local.server import answers, calls, uploads
from krea_local.server.answers import Refusal, answer
from krea_local.server.jobs import FINISHED, Job
from krea_local.server.service import Event
from krea_local.server.web import Web

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
MAX_LISTED = 200


def add_routes(app: FastAPI, web: Web) -> None:
    """Add the page and its API."""
    app.include_router(_pages())
    app.include_router(_jobs(web))
    router = APIRouter(include_in_schema=False)

    @router.get("/api/schema")
    async def schema() -> Response:
        here = [one for one in ENDPOINTS.values() if one.model == web.service.model]
        return answer(
            {
                "endpoints": {one.id: {"fields": _fields(one)} for one in here},
                "presets": {name: list(size) for name, size in PRESETS.items()},
                "limits": {"prompt": MAX_PROMPT_CHARACTERS, "file": MAX_FILE_BYTES},
            }
        )

    @router.get("/api/state")
    async def state() -> Response:
        workers = [
            {
                "device": worker.device,
                "state": worker.state,
                "model": worker.model,
                "memory_used": worker.memory_used,
                "memory_total": worker.memory_total,
                "reason": worker.reason,
                "job": worker.job,
            }
            for worker in web.service.workers()
        ]
        return answer(
            {
                "model": web.service.model,
                "endpoints": [
                    calls.endpoint_of_model(web, edits=edits).id for edits in (False, True)
                ],
                "ready": web.service.ready,
                "queue_length": web.service.queue_length,
                "workers": workers,
                "version": __version__,
            }
        )

    @router.post("/api/uploads")
    async def upload(request: HttpRequest) -> Response:
        data = await uploads.read_file(request)
        file = await web.service.store_upload(data, "upload")
        width, height = answers.image_size(data)
        return answer({"url": answers.file_url("", file), "width": width, "height": height})

    app.include_router(router)


def _pages() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    headers = {
        "content-security-policy": PAGE_POLICY,
        "cache-control": "no-cache",
    }

    def add(path: str, file: Path) -> None:
        async def page() -> Response:
            return FileResponse(file, headers=headers, media_type=TYPES[file.suffix])

        router.api_route(path, methods=["GET", "HEAD"])(page)

    for file in sorted(PAGE.glob("*")):
        if file.suffix in TYPES:
            add("/" if file.name == "index.html" else f"/page/{file.name}", file)
    return router


def _jobs(web: Web) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def found(id: str) -> Job:
        job = web.service.get(id)
        if job is None:
            raise Refusal(404, "there is no such job", "not_found")
        return job

    @router.get("/api/jobs")
    async def listed(limit: str = "50", before: str | None = None) -> Response:
        if not re.fullmatch(r"[0-9]{1,3}", limit) or not 1 <= int(limit) <= MAX_LISTED:
            text = f"limit={limit[:20]!r}: should be from 1 to {MAX_LISTED}"
            raise Refusal(422, [{"loc": ["query", "limit"], "msg": text, "type": "value_error"}])
        jobs = web.service.recent(limit=int(limit) + 1, before=before)
        shown = [_shown(web, job) for job in jobs[: int(limit)]]
        return answer({"jobs": shown, "more": len(jobs) > int(limit)})

    @router.post("/api/jobs")
    async def submit(request: HttpRequest) -> Response:
        asked = await calls.read_object(request)
        arguments = asked.get("arguments")
        if not isinstance(arguments, dict) or not isinstance(asked.get("endpoint"), str):
            raise InvalidRequest('the body should be {"endpoint": "…", "arguments": {…}}')
        endpoint = calls.endpoint_here(web, str(asked["endpoint"]))
        url = arguments.get("image_url")
        if isinstance(url, str) and url.startswith("/files/"):
            arguments["image_url"] = answers.base_url(web, request) + url
        job = await calls.submit(web, request, endpoint, arguments, previews=True)
        headers = {"x-fal-request-id": job.id}
        return answer(_shown(web, job), 202, headers)

    @router.get("/api/jobs/{id}")
    async def one(id: str) -> Response:
        return answer(_shown(web, found(id)))

    @router.get("/api/jobs/{id}/events")
    async def events(id: str) -> Response:
        return answers.event_stream(_events(web, found(id)))

    @router.post("/api/jobs/{id}/cancel")
    async def cancel(id: str) -> Response:
        if await web.service.cancel(found(id).id) == "already":
            raise Refusal(409, "the job is finished already", "bad_request")
        return answer(_shown(web, found(id)), 202)

    @router.delete("/api/jobs/{id}")
    async def delete(id: str) -> Response:
        if found(id).state not in FINISHED:
            raise Refusal(409, "the job is not finished: cancel it first", "bad_request")
        await web.service.delete(id)
        return Response(status_code=204)

    return router


def _fields(endpoint: Endpoint) -> list[dict[str, object]]:
    """An endpoint's fields, with bounds, defaults and help, from the request's own."""
    schema = endpoint.schema()
    properties, required = schema["properties"], schema["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    fields: list[dict[str, object]] = []
    for name, described in properties.items():
        # Of a union, the first tells: null and a size of one's own come after it.
        facts = {**described, **next(iter(described.get("anyOf", [])), {})}
        kind, choices = facts.get("type"), facts.get("enum")
        if name == "image_size":
            side = ImageSize.model_json_schema()["properties"]["width"]
            kind, choices, facts = "size", list(PRESETS), side
        elif choices:
            kind = "enum"
        fields.append(
            {
                "name": name,
                "type": kind,
                "required": name in required,
                "default": described.get("default"),
                "minimum": facts.get("minimum"),
                "maximum": facts.get("maximum"),
                "choices": choices,
                "description": described.get("description"),
            }
        )
    return fields


def _shown(web: Web, job: Job) -> dict[str, object]:
    """A job as the page shows it."""
    pictures: list[dict[str, object]] = []
    flags: list[bool] = []
    notices: list[str] = []
    seed = job.arguments.get("seed")
    timings: dict[str, float] = {}
    if job.outcome is not None:
        flags = list(job.outcome.has_nsfw_concepts)
        notices = list(job.outcome.notices)
        timings = dict(job.outcome.timings)
        seed = job.outcome.seed
        pictures = [
            {
                "url": answers.file_url("", picture.file),
                "width": picture.width,
                "height": picture.height,
                "content_type": picture.file.content_type,
            }
            for picture in job.outcome.pictures
        ]
    failed = job.state == "failed"
    return {
        "id": job.id,
        "state": job.state,
        "endpoint": job.endpoint,
        "arguments": dict(job.arguments),
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "pictures": pictures,
        "seed": seed,
        "has_nsfw_concepts": flags,
        "timings": timings,
        "notices": notices,
        "failure": answers.failure_text(answers.failure_of(job)) if failed else None,
        "position": web.service.position(job.id),
    }


async def _events(web: Web, job: Job) -> AsyncIterator[ServerSentEvent]:
    async for event in calls.followed(web, job.id, previews=True):
        told = _event(web, event)
        yield ServerSentEvent(to_json(told).decode(), event=event.kind)


def _event(web: Web, event: Event) -> dict[str, object]:
    preview = None
    if event.preview is not None:
        preview = answers.data_uri(event.preview, "image/jpeg")
    log = None
    if event.log is not None:
        log = {
            "message": event.log.message,
            "level": event.log.level,
            "timestamp": event.log.timestamp,
        }
    job = _shown(web, event.job)
    return {
        "job": job,
        "fraction": event.fraction,
        "step": event.step,
        "num_steps": event.num_steps,
        "preview": preview,
        "position": job["position"],
        "log": log,
    }
