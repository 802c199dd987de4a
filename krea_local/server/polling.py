"""The hosted API's queue, once a request is submitted: status, result, cancelling.

    {base}/queue/{owner}/{alias}/requests/{id}[/status[/stream] | /response | /cancel]

Knows nothing of how requests are judged or submitted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic_core import to_json
from sse_starlette import ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from krea_local.endpoints import ENDPOINTS, Endpoint
from krea_local.server import answers, calls
from krea_local.server.answers import Refusal, answer
from krea_local.server.jobs import FINISHED, Job, Log
from krea_local.server.shapes import FAILURES, Cancellation, Output, QueueStatus
from krea_local.server.web import Web


def router_of(web: Web) -> APIRouter:
    """The paths of submitted requests."""
    router = APIRouter(tags=["queue"])
    here = "/queue/{owner}/{alias}/requests/{request_id}"
    longer = "/queue/{owner}/{alias}/{path:path}/requests/{request_id}"

    def found(request: HttpRequest, owner: str, alias: str, request_id: str) -> tuple[Job, str]:
        job = web.service.get(request_id)
        if job is None or ENDPOINTS[job.endpoint].app != f"{owner}/{alias}":
            raise Refusal(404, f"Request {request_id[:100]} not found", "not_found")
        return job, answers.base_url(web, request)

    def add(
        method: str, suffix: str, status: int, model: type[BaseModel] | None
    ) -> Callable[[Callable[..., Awaitable[Response]]], None]:
        def decorate(handler: Callable[..., Awaitable[Response]]) -> None:
            responses: dict[int | str, dict[str, Any]] = {status: {"model": model}, **FAILURES}
            if handler.__name__ == "status":
                responses |= {200: {"model": model}, 202: {"model": model}}
            if handler.__name__ == "cancel":
                responses |= {code: {"model": model} for code in (202, 400, 404)}
            for place in (here, longer):
                router.add_api_route(
                    place + suffix,
                    handler,
                    methods=[method],
                    status_code=status,
                    responses=responses,
                    response_class=Response,
                    include_in_schema=place == here,
                    operation_id=handler.__name__ if place == here else None,
                )

        return decorate

    @add("GET", "/status", 200, QueueStatus)
    async def status(
        request: HttpRequest, owner: str, alias: str, request_id: str, logs: str = "0"
    ) -> Response:
        job, base = found(request, owner, alias, request_id)
        told = web.service.logs(job.id) if _is_true(logs) else None
        done = job.state in FINISHED
        headers = {"x-fal-request-id": job.id}
        return answer(_status(web, base, job, told), 200 if done else 202, headers)

    @add("GET", "/status/stream", 200, None)
    async def status_stream(
        request: HttpRequest, owner: str, alias: str, request_id: str, logs: str = "0"
    ) -> Response:
        job, base = found(request, owner, alias, request_id)
        events = _statuses(web, base, job, with_logs=_is_true(logs))
        headers = {"x-fal-request-id": job.id}
        return answers.event_stream(events, headers=headers)

    async def response(request: HttpRequest, owner: str, alias: str, request_id: str) -> Response:
        job, _ = found(request, owner, alias, request_id)
        if job.state not in FINISHED:
            text = "Request is still in progress"
            raise Refusal(400, text, "bad_request", x_fal_request_id=job.id)
        return await answers.result(web, request, job)

    add("GET", "", 200, Output)(response)

    async def response_by_name(
        request: HttpRequest, owner: str, alias: str, request_id: str
    ) -> Response:
        return await response(request, owner, alias, request_id)

    add("GET", "/response", 200, Output)(response_by_name)

    @add("PUT", "/cancel", 202, Cancellation)
    async def cancel(request: HttpRequest, owner: str, alias: str, request_id: str) -> Response:
        try:
            job, _ = found(request, owner, alias, request_id)
            outcome = await web.service.cancel(job.id)
        except Refusal:
            outcome = "missing"
        status, text = {
            "requested": (202, "CANCELLATION_REQUESTED"),
            "already": (400, "ALREADY_COMPLETED"),
            "missing": (404, "NOT_FOUND"),
        }[outcome]
        headers = {} if outcome == "missing" else {"x-fal-request-id": request_id}
        return answer({"status": text}, status, headers)

    return router


def urls(base: str, endpoint: Endpoint, id: str) -> dict[str, str]:
    """Where a request is asked for, and cancelled."""
    place = f"{base}/queue/{endpoint.app}/requests/{id}"
    return {
        "response_url": place,
        "status_url": f"{place}/status",
        "cancel_url": f"{place}/cancel",
    }


def _status(web: Web, base: str, job: Job, logs: Sequence[Log] | None) -> dict[str, object]:
    """A job's state; the clients want `logs` to be there, even if they asked for none."""
    told = {"request_id": job.id, **urls(base, ENDPOINTS[job.endpoint], job.id)}
    if job.state == "queued":
        return {"status": "IN_QUEUE", "queue_position": web.service.position(job.id), **told}
    lines = None if logs is None else [_line(log) for log in logs]
    if job.state == "running":
        return {"status": "IN_PROGRESS", "logs": lines, **told}
    metrics: dict[str, float] = {}
    if job.outcome is not None:
        timings = job.outcome.timings
        metrics["inference_time"] = timings.get("inference", timings.get("total", 0.0))
    status: dict[str, object] = {"status": "COMPLETED", "logs": lines, "metrics": metrics, **told}
    if job.outcome is None:
        error = answers.failure_of(job)
        status["error"] = answers.failure_text(error)
        status["error_type"] = error.error_type or "validation_error"
    return status


def _line(log: Log) -> dict[str, str]:
    return {
        "message": log.message,
        "level": log.level,
        "source": "USER",
        "timestamp": answers.iso(log.timestamp),
    }


async def _statuses(
    web: Web, base: str, job: Job, *, with_logs: bool
) -> AsyncIterator[ServerSentEvent]:
    """Statuses as they change, each with the lines that are new; the client puts them together."""
    told = 0
    shown: tuple[object, ...] = ()
    async for event in calls.followed(web, job.id):
        lines = list(web.service.logs(job.id)) if with_logs else []
        # A status of the queue has no place for lines: they wait for the next.
        fresh = lines[told:] if event.job.state != "queued" else []
        told += len(fresh)
        status = _status(web, base, event.job, fresh if with_logs else None)
        now = (status["status"], status.get("queue_position"))
        if now != shown or fresh:
            shown = now
            yield ServerSentEvent(to_json(status).decode())


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true")
