"""The JavaScript client's `proxyUrl`: what it would send to the hosted API, it sends here.

Its header `x-fal-target-url` says where it would have gone; the same path is served by this very
server. Nothing is ever dialled. Knows nothing of what is asked.
"""

from __future__ import annotations

import urllib.parse

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/proxy"
TARGET = "x-fal-target-url"
NO_TARGET = "/proxy/no-target"
PLACES = {
    "fal.run": "/run",
    "queue.fal.run": "/queue",
    "rest.fal.ai": "/rest",
    "rest.alpha.fal.ai": "/rest",
}


class Proxy:
    """Rewrites requests for `/proxy` to the path that they stand for, and trims closing slashes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite a request, and hand it on."""
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
            if scope["path"] == PATH and scope["type"] == "http" and scope["method"] != "OPTIONS":
                scope |= _rewritten(Headers(scope=scope).getlist(TARGET))
            scope["raw_path"] = urllib.parse.quote(scope["path"]).encode()
        await self.app(scope, receive, send)


def _rewritten(targets: list[str]) -> dict[str, object]:
    """Path and query of the one target; a path that is not there, if it is none of the API's."""
    try:
        parts = urllib.parse.urlsplit(targets[0] if len(targets) == 1 else "")
        place = PLACES.get(parts.hostname or "")
    except ValueError:
        place = None
    if place is None or parts.scheme != "https":
        return {"path": NO_TARGET}
    path = urllib.parse.unquote(parts.path).rstrip("/")
    return {"path": place + path, "query_string": parts.query.encode("ascii", "replace")}
