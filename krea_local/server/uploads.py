"""Files in and out: the Python and the JavaScript client's ways to upload, and `/files/{id}`.

A file is looked up by its unguessable id and by nothing else. Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from krea_local.images import MAX_FILE_BYTES
from krea_local.server import answers, calls
from krea_local.server.answers import Refusal, answer
from krea_local.server.files import harmless_name, new_id
from krea_local.server.guard import TOKEN_SECONDS, Keys
from krea_local.server.jobs import StoredFile
from krea_local.server.web import Web

FILE_POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"
YEAR = 365 * 24 * 3600
TICKET_SECONDS = 3600.0
MAX_TICKETS = 10_000
TOO_LARGE = f"a file may have {MAX_FILE_BYTES // 2**20} MiB; parts are for larger ones"


async def read_file(request: HttpRequest) -> bytes:
    """The body's bytes; `guard` has counted them."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return bytes(body)


def add_routes(app: FastAPI, web: Web, keys: Keys) -> None:
    """Add the paths of the hosted API's storage, and `/files/{id}`."""
    router = APIRouter(tags=["files"])
    tickets = _Tickets()

    @router.post("/rest/storage/auth/token", include_in_schema=False)
    async def token(request: HttpRequest) -> Response:
        until = answers.iso(time.time() + TOKEN_SECONDS - 60)
        base = answers.base_url(web, request)
        body = {"token": keys.token(), "token_type": "Bearer", "expires_at": until}
        return answer({**body, "base_url": f"{base}/cdn", "base_upload_url": f"{base}/cdn"})

    @router.post("/rest/tokens", include_in_schema=False)
    async def short_token() -> Response:
        return answer(keys.token(120))

    @router.post("/cdn/files/upload", include_in_schema=False)
    async def upload(request: HttpRequest) -> Response:
        name = request.headers.get("x-fal-file-name", "")
        file = await web.service.store_upload(await read_file(request), name)
        return answer({"access_url": answers.file_url(answers.base_url(web, request), file)})

    @router.post("/rest/storage/upload/initiate", include_in_schema=False)
    async def initiate(request: HttpRequest) -> Response:
        asked = await calls.read_object(request)
        ticket = tickets.issue(harmless_name(str(asked.get("file_name", ""))))
        base = answers.base_url(web, request)
        place = f"{base}/rest/storage/upload/{ticket}"
        return answer({"upload_url": place, "file_url": f"{base}/files/{ticket}"})

    @router.put("/rest/storage/upload/{ticket}", include_in_schema=False)
    async def put(request: HttpRequest, ticket: str) -> Response:
        name = tickets.name_of(ticket)
        if name is None:
            raise Refusal(404, "no upload was initiated there, or over an hour ago", "not_found")
        if web.service.file(ticket) is None:  # else a retry, of what has arrived
            await web.service.store_upload(await read_file(request), name, id=ticket)
        return answer({})

    @router.post("/cdn/files/upload/multipart", include_in_schema=False)
    @router.post("/rest/storage/upload/initiate-multipart", include_in_schema=False)
    async def parts() -> Response:
        raise Refusal(413, TOO_LARGE, "file_too_large")

    @router.api_route(
        "/files/{file_id}",
        methods=["GET", "HEAD"],
        response_class=Response,
        operation_id="file",
        responses={404: {"description": "There is no such file."}},
    )
    async def file(request: HttpRequest, file_id: str) -> Response:
        found = web.service.file(file_id)
        if found is None:
            raise Refusal(404, "there is no such file", "not_found")
        return await _sent(web, found)

    app.include_router(router)


class _Tickets:
    """Uploads that were announced: their ids, the names that were given, and until when."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, float]] = {}

    def issue(self, name: str) -> str:
        now = time.monotonic()
        while self._open and (len(self._open) >= MAX_TICKETS or self._oldest() < now):
            del self._open[next(iter(self._open))]
        ticket = new_id()
        self._open[ticket] = (name, now + TICKET_SECONDS)
        return ticket

    def _oldest(self) -> float:
        return next(iter(self._open.values()))[1]

    def name_of(self, ticket: str) -> str | None:
        name, until = self._open.get(ticket, ("", 0.0))
        return name if until > time.monotonic() else None


async def _sent(web: Web, file: StoredFile) -> Response:
    path = Path(web.service.file_path(file))
    try:
        stat = await asyncio.to_thread(path.stat)
    except OSError:  # deleted just now
        raise Refusal(404, "there is no such file", "not_found") from None
    headers = {
        "cache-control": f"private, max-age={YEAR}, immutable",
        "content-security-policy": FILE_POLICY,
        # The JavaScript client's pages show pictures of this server; who has the id may.
        "cross-origin-resource-policy": "cross-origin",
    }
    return FileResponse(
        path,
        headers=headers,
        media_type=file.content_type,
        filename=harmless_name(file.name) or "file",
        stat_result=stat,
        content_disposition_type="inline",
    )
