"""What the server knows of jobs and files: the records that are passed around.

Knows nothing of how they are kept (`store`), run (`service`) or told (`fal`, `own`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Log:
    """One line of a job's log.

    Attributes:
        message: in words.
        level: as the hosted API's clients know it: "INFO", "WARN", "ERROR".
        timestamp: seconds since 1970.
    """

    message: str
    level: str
    timestamp: float


@dataclass(frozen=True)
class StoredFile:
    """A file of the store: an input, an upload or a picture.

    Attributes:
        id: unguessable; the only name that files are looked up by.
        content_type: "image/jpeg", as judged from its bytes, never as claimed.
        size: bytes.
        name: for a download's file name; harmless.
    """

    id: str
    content_type: str
    size: int
    name: str


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        file: what it is stored as.
        width: pixels.
        height: pixels.
    """

    file: StoredFile
    width: int
    height: int


@dataclass(frozen=True)
class Outcome:
    """What a done job made.

    Attributes:
        pictures: in order.
        seed: of the first.
        has_nsfw_concepts: of each.
        timings: seconds by stage, `inference` and `total` among them.
        notices: what was done that differs from the letter of the request.
    """

    pictures: tuple[Picture, ...]
    seed: int
    has_nsfw_concepts: tuple[bool, ...]
    timings: Mapping[str, float]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a job has no picture, as HTTP answers it (`endpoints.HttpError`, in JSON)."""

    status: int
    error_type: str | None
    body: Mapping[str, object]


@dataclass(frozen=True)
class Job:
    """A submitted request and what became of it.

    Attributes:
        id: unguessable.
        endpoint: `endpoints.Endpoint.id`.
        arguments: the validated request as JSON, with its seed fixed; an input image is
            `{"image_url": "<as asked, shortened>"}`, its bytes lie in the store.
        state: queued, running, done, failed or cancelled.
        created: seconds since 1970.
        started: of the last attempt.
        finished: when it was done, failed or cancelled.
        attempts: how often a worker began it.
        outcome: of a done job.
        failure: of a failed job.
        webhook: where its end is told, or None.
    """

    id: str
    endpoint: str
    arguments: Mapping[str, object]
    state: State
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    outcome: Outcome | None = None
    failure: Failure | None = None
    webhook: str | None = None
