"""What the hosted API answers, as the OpenAPI document describes it.

Knows nothing of how any of it comes about.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from krea_local.endpoints import ENDPOINTS, Endpoint


class Image(BaseModel):
    """A finished picture."""

    url: str = Field(description="Where it is, or a data URI in sync_mode.")
    width: int
    height: int
    content_type: str


class Output(BaseModel):
    """What a call gives."""

    images: list[Image]
    timings: dict[str, float] = Field(description="Seconds by stage.")
    seed: int
    has_nsfw_concepts: list[bool]
    prompt: str


class Submitted(BaseModel):
    """What submitting gives."""

    status: Literal["IN_QUEUE"]
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int
    logs: None
    metrics: dict[str, float]


class QueueStatus(BaseModel):
    """How far a request is; a failed one is COMPLETED, too, with `error`."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = None
    logs: list[dict[str, str]] | None = None
    metrics: dict[str, float] | None = None
    error: str | None = None
    error_type: str | None = None


class Cancellation(BaseModel):
    """What became of the wish to cancel."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class Fault(BaseModel):
    """What is wrong with one argument."""

    loc: list[str | int]
    msg: str
    type: str


class Faults(BaseModel):
    """An error: in words, or fault by fault."""

    detail: str | list[Fault]
    error_type: str | None = None


FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Faults, "description": text}
    for status, text in (
        (400, "A header or parameter is wrong."),
        (401, "The server's key is missing."),
        (403, "A page of another origin asks."),
        (404, "There is no such endpoint or request."),
        (408, "The body took too long."),
        (413, "The body is too large."),
        (415, "The body is not JSON."),
        (421, "The server is not called that."),
        (422, "An argument is wrong."),
        (429, "The queue is full."),
        (499, "The request was cancelled."),
        (500, "It failed."),
        (503, "The server is stopping, or its disk is full."),
        (504, "It did not start in time."),
    )
}


def schema_name(endpoint: Endpoint) -> str:
    """What the endpoint's input is called in the OpenAPI document."""
    words = endpoint.id.removeprefix("fal-ai/").replace("/", "-").split("-")
    return "".join(word.title() for word in words) + "Input"


def schemas() -> dict[str, Any]:
    """The JSON schemas of all endpoints' inputs, by name."""
    return {schema_name(endpoint): endpoint.schema() for endpoint in ENDPOINTS.values()}
