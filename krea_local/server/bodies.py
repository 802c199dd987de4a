"""Requests' bodies: of which type and size they may be, how long they may take, what they hold.

Knows nothing of who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

from krea_local.images import MAX_FILE_BYTES

MAX_JSON_BYTES = 70 * 2**20  # a file of 50 MiB in base64, and a prompt
MAX_FORM_BYTES = MAX_FILE_BYTES + 2**20
MAX_SMALL_BYTES = 64 * 2**10  # of requests that need no body
MAX_HELD_BYTES = 96 * 2**20  # of bodies at once: decoding takes another two or three times as much
BODY_SECONDS = 60.0
DRAIN_SECONDS = 1.0
FORMS = re.compile(r"POST /v1/images/edits")
WITHOUT_BODY = re.compile(r"(?:PUT|DELETE|PATCH) .*|POST /api/jobs/[^/]+/cancel")
UPLOADS = re.compile(
    r"POST /cdn/files/upload(?:/.*)?|PUT /rest/storage/upload/.+|POST /api/uploads"
)


class Refused(Exception):
    """A request that is not let in.

    Attributes:
        status: of HTTP.
        detail: why, and the way out.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


class Held:
    """How many bytes of bodies are in memory."""

    def __init__(self) -> None:
        self._held = 0

    def hold(self, size: int) -> bool:
        """Count `size` more bytes of bodies in memory, if there is room."""
        if self._held + size > MAX_HELD_BYTES:
            return False
        self._held += size
        return True

    def let_go(self, size: int) -> None:
        """So many bytes are in memory no more."""
        self._held -= size


class Body:
    """A request's body on its way in: counted, limited in size and time."""

    def __init__(self, held: Held, receive: Receive, limit: int) -> None:
        self.size = 0
        self._all = held
        self._receive = receive
        self._limit = limit
        self._held = 0
        self._whole = False
        self._deadline = time.monotonic() + BODY_SECONDS

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            HTTPException: it is too much, or takes too long.
        """
        if self._whole:
            return await self._receive()
        left = self._deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise _too_slow() from None
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self.size += size
        self._whole = not message.get("more_body", False)
        if self.size > self._limit:
            raise HTTPException(413, _too_large(self._limit), {"connection": "close"})
        if not self._all.hold(size):
            detail = "too many large requests at once; try again"
            raise HTTPException(429, detail, {"connection": "close", "retry-after": "2"})
        self._held += size
        return message

    def release(self) -> None:
        """The body is in memory no more."""
        self._all.let_go(self._held)
        self._held = 0


def _too_slow() -> HTTPException:
    text = f"the body took over {BODY_SECONDS:g} s to arrive"
    return HTTPException(408, text, {"connection": "close"})


def _too_large(limit: int) -> str:
    size = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
    return f"the body is over {size}, the limit"


def limit_of(scope: Scope) -> int:
    """How many bytes of body a request may have."""
    call = f"{scope['method']} {scope['path']}"
    if UPLOADS.fullmatch(call):
        return MAX_FILE_BYTES
    if FORMS.fullmatch(call):
        return MAX_FORM_BYTES
    if scope["method"] != "POST" or WITHOUT_BODY.fullmatch(call):
        return MAX_SMALL_BYTES
    return MAX_JSON_BYTES


def check_content(scope: Scope, headers: Headers) -> None:
    """Judge a body by what is said of it.

    Raises:
        Refused: it is of another type than what it is sent to takes, or too large.
    """
    call = f"{scope['method']} {scope['path']}"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if FORMS.fullmatch(call):
        if kind != "multipart/form-data":
            raise Refused(415, "Content-Type should be multipart/form-data")
    # What a page of another site can send without asking first is refused by its type, too.
    elif kind != "application/json" and not _needs_no_json(call):
        raise Refused(415, "Content-Type should be application/json")
    length = headers.get("content-length")
    if length is None:
        return
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Refused(400, "Content-Length should be a number")
    if int(length) > limit_of(scope):
        raise Refused(413, _too_large(limit_of(scope)))


def _needs_no_json(call: str) -> bool:
    return bool(UPLOADS.fullmatch(call) or WITHOUT_BODY.fullmatch(call))


async def drain(headers: Headers, receive: Receive) -> None:
    """Take what a refused client still sends, for a moment: before it is done it reads nothing."""
    has_body = "content-length" in headers or "transfer-encoding" in headers
    if not has_body or headers.get("expect", "").lower() == "100-continue":
        return

    async def take() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(take(), DRAIN_SECONDS)
