"""What the official client's callers catch and compare: statuses, errors, settings of uploads.

Same names, fields and order as in fal-client 1.0. Knows nothing of jobs or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

if TYPE_CHECKING:
    import httpx

Priority = Literal["normal", "low"]
ObjectExpiration = Literal["never", "immediate", "1h", "1d", "7d", "30d", "1y"] | int
StorageACLDecision = Literal["hide", "forbid", "allow"]
EXPIRATIONS = ("never", "immediate", "1h", "1d", "7d", "30d", "1y")


@dataclass
class Status:
    """How far a request is."""


@dataclass
class Queued(Status):
    """It waits.

    Attributes:
        position: how many requests that wait are before it.
    """

    position: int


@dataclass
class InProgress(Status):
    """It is being drawn, or its model is being loaded.

    Attributes:
        logs: all lines so far, each with `message`, `level`, `source` and `timestamp`; None unless
            they were asked for.
    """

    logs: list[dict[str, Any]] | None


@dataclass
class Completed(Status):
    """It is over: done, failed or cancelled.

    Attributes:
        logs: as of `InProgress`.
        metrics: `inference_time` in seconds.
        error: why there is no result, in words; else None.
        error_type: of what kind that is, as the hosted API names it.
    """

    logs: list[dict[str, Any]] | None
    metrics: dict[str, Any]
    error: str | None = None
    error_type: str | None = None


class FalClientError(Exception):
    """Base of the errors of a client."""


@dataclass(eq=False)
class FalClientHTTPError(FalClientError):
    """What the hosted API would answer with an error status.

    Attributes:
        message: the answer's `detail`: a text, or for 422 the list of faults.
        status_code: of HTTP.
        response_headers: names in lower case.
        response: the answer as httpx would have it.
        error_type: as the hosted API names it; None for faults of the arguments.
    """

    message: Any
    status_code: int
    response_headers: dict[str, str]
    response: httpx.Response
    error_type: str | None = None

    def __str__(self) -> str:
        return f"{self.message}"


@dataclass(eq=False)
class FalClientTimeoutError(FalClientError, TimeoutError):
    """`client_timeout` was up; the request is cancelled.

    Attributes:
        timeout: seconds.
        request_id: of the request, if there is one.
    """

    timeout: float
    request_id: str | None = None

    def __str__(self) -> str:
        which = "" if self.request_id is None else f" {self.request_id}"
        return f"Request{which} took over {self.timeout} seconds"


@dataclass(frozen=True)
class StorageACLRule:
    """Who may read an upload. Without meaning here: uploads stay on this machine."""

    user: str
    decision: StorageACLDecision


@dataclass(frozen=True)
class StorageACL:
    """Who may read an upload. Without meaning here: uploads stay on this machine."""

    default: StorageACLDecision | None = None
    rules: Sequence[StorageACLRule] | None = None


@dataclass(frozen=True)
class StorageSettings:
    """How long an upload is kept; checked, and without meaning here: delete the file at will.

    Raises:
        ValueError: `expires_in` is none of the known spans, nor a number of seconds above 0.
    """

    expires_in: ObjectExpiration | None = None
    initial_acl: StorageACL | None = None

    def __post_init__(self) -> None:
        span = self.expires_in
        seconds = isinstance(span, int) and not isinstance(span, bool) and span > 0
        if span is not None and not seconds and span not in EXPIRATIONS:
            known = ", ".join(EXPIRATIONS)
            raise ValueError(f"expires_in={span!r}: should be seconds above 0, or one of {known}")


def http_error_of(
    status: int, body: Mapping[str, Any], headers: Mapping[str, str], *, url: str
) -> FalClientHTTPError:
    """The error that the official client raises for such an answer."""
    import httpx

    response = httpx.Response(
        status,
        headers=dict(headers),
        json=dict(body),
        request=httpx.Request("POST", f"http://localhost/{quote(url, errors='replace')}"),
    )
    message = body.get("detail", response.text)
    kind = body.get("error_type") or response.headers.get("x-fal-error-type")
    return FalClientHTTPError(message, status, dict(response.headers), response, kind)
