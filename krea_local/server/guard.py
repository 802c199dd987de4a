"""Who may ask: host, origin, key, content type, size and patience, before a body is read.

A wall around the whole application, in plain ASGI. It also gives every answer its request id and
the headers that browsers heed, and writes one line of JSON a request into the log. Knows nothing of
what is asked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from krea_local.server.bodies import Body, Held, Refused, check_content, drain, limit_of
from krea_local.server.settings import Settings

logger = logging.getLogger("krea_local.server.access")

STATE_CHANGING = ("POST", "PUT", "DELETE", "PATCH")
TOKEN_SECONDS = 3600
PUBLIC = re.compile(r"/|/page/[^/]+|/health/(?:live|ready)|/\.well-known/jwks\.json")
# The id is the capability: nobody guesses 128 bits.
CAPABILITY = re.compile(r"(?:GET|HEAD) /files/[^/]+|PUT /rest/storage/upload/[^/]+")
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([\w.-]{1,253}))(?::[0-9]{1,5})?", re.ASCII)
CORS_HEADERS = re.compile(
    r"accept|authorization|content-type|range|last-event-id|user-agent|x-(?:fal|app-fal)-[a-z0-9-]+"
    r"|x-stainless-[a-z-]+"
)
EXPOSED = "x-fal-request-id, x-fal-error-type, x-fal-request-timeout-type, retry-after, etag"
API_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def host_name(netloc: str) -> str:
    """The name in "user@name:port", in lower case and without the dot that may end it."""
    return (urllib.parse.urlsplit(f"//{netloc}").hostname or "").rstrip(".")


def hosts_of(settings: Settings) -> frozenset[str]:
    """The names by which clients may call the server."""
    names = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in settings.hosts)}
    if settings.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        names.add(settings.host.lower())
    if settings.public_url:
        names.add(host_name(urllib.parse.urlsplit(settings.public_url).netloc))
    return frozenset(names)


@dataclass(frozen=True)
class Keys:
    """What a client may present: the key, or a token that the server made for one who had it.

    Attributes:
        digest: of the key; None if there is none, and all may ask.
        secret: tokens are signed with; lives as long as the process.
    """

    digest: bytes | None
    secret: bytes

    @classmethod
    def of(cls, api_key: str | None) -> Keys:
        """For that key."""
        digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        return cls(digest, secrets.token_bytes(32))

    def token(self, seconds: int = TOKEN_SECONDS) -> str:
        """A token that is good for so long."""
        until = str(int(time.time()) + seconds)
        return f"{until}.{self._sign(until)}"

    def admits(self, presented: str) -> bool:
        """Whether it is the key or a token, in constant time."""
        if self.digest is None:
            return True
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        is_key = hmac.compare_digest(digest, self.digest)
        return is_key or self._is_token(presented)

    def _is_token(self, presented: str) -> bool:
        until, dot, signature = presented.partition(".")
        if not dot or not re.fullmatch(r"[0-9]{1,12}", until):
            return False
        good = hmac.compare_digest(signature.encode(), self._sign(until).encode())
        return good and int(until) > time.time()

    def _sign(self, until: str) -> str:
        return hmac.new(self.secret, until.encode(), hashlib.sha256).hexdigest()


class Guard:
    """The wall around `app`.

    Attributes:
        keys: what clients may present.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self.app = app
        self.keys = keys
        self._settings = settings
        self._hosts = hosts_of(settings)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.origins)
        self._own = None
        if settings.public_url:
            parts = urllib.parse.urlsplit(settings.public_url)
            self._own = f"{parts.scheme}://{parts.netloc}".lower()
        self._held = Held()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then hand it on."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_host(scope, headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
        except Refused as error:
            await receive()  # the protocol wants "connect" taken first
            await send({"type": "websocket.close", "code": 1008, "reason": error.detail[:100]})
            return
        await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        request_id = secrets.token_hex(16)
        headers = Headers(scope=scope)
        body = Body(self._held, receive, limit_of(scope))
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": request_id, "release_body": body.release}
        status = 0
        logged_id = request_id

        async def send_on(message: Message) -> None:
            nonlocal status, logged_id
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(raw=message["headers"])
                self._add_headers(added, scope, headers, request_id)
                logged_id = added["x-fal-request-id"]
                message["headers"] = added.raw
            await send(message)

        try:
            try:
                preflight = self._check(scope, headers)
            except Refused as error:
                await drain(headers, receive)
                await _refuse(scope["path"], error, send_on)
            else:
                if preflight is None:
                    await self.app(scope, body.receive, send_on)
                else:
                    await _respond(204, preflight, b"", send_on)
        finally:
            body.release()
            self._log(scope, status, time.perf_counter() - began, body.size, logged_id)

    def _check(self, scope: Scope, headers: Headers) -> dict[str, str] | None:
        """Raise `Refused`, or give the headers that answer a browser's preflight, or None."""
        self._check_host(scope, headers)
        method = scope["method"]
        if method == "OPTIONS" and "access-control-request-method" in headers:
            return self._preflight(scope, headers)
        if method in STATE_CHANGING:
            self._check_origin(scope, headers)
        self._check_key(scope, headers)
        if method in STATE_CHANGING:
            check_content(scope, headers)
        return None

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        given = headers.getlist("host")
        match = HOST.fullmatch(given[0]) if len(given) == 1 else None
        name = (match[1] or match[2]).lower().rstrip(".") if match else ""
        # An address cannot be rebound, so that of this very connection is as good as a name.
        own = (scope.get("server") or ("",))[0]
        if not name or name not in self._hosts | {own}:
            raise Refused(
                421,
                f"this server is not called {name[:100]!r}; if it should be, start it with "
                "--allow-host NAME",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        given = headers.getlist("origin")
        if not given:
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise Refused(403, "another site's page may not do this")
            return
        if len(given) > 1 or not self._is_allowed(given[0], scope, headers):
            raise Refused(
                403,
                f"pages of {given[0][:100]!r} may not do this; if they should, start the server "
                "with --allow-origin ORIGIN",
            )

    def _is_allowed(self, origin: str, scope: Scope, headers: Headers) -> bool:
        origin = origin.lower()
        scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
        own = self._own or f"{scheme}://{headers.get('host', '')}".lower()
        return origin != "null" and (origin == own or origin in self._origins)

    def _preflight(self, scope: Scope, headers: Headers) -> dict[str, str]:
        if not self._is_allowed(headers.get("origin", "null"), scope, headers):
            raise Refused(403, "this origin is not allowed; see --allow-origin")
        asked = headers.get("access-control-request-headers", "").lower().split(",")
        allowed = [name.strip() for name in asked if CORS_HEADERS.fullmatch(name.strip())]
        answer = {
            "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE",
            "access-control-allow-headers": ", ".join(allowed),
            "access-control-max-age": "600",
        }
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return answer

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        method, path = scope.get("method", "GET"), scope["path"]
        if self.keys.digest is None:
            return
        if method in ("GET", "HEAD") and PUBLIC.fullmatch(path):
            return
        if CAPABILITY.fullmatch(f"{method} {path}"):
            return
        given = headers.getlist("authorization")
        scheme, _, presented = (given[0] if len(given) == 1 else "").partition(" ")
        if not given:  # browsers cannot send headers with a websocket
            presented = QueryParams(scope["query_string"]).get("fal_jwt_token", "")
            scheme = "key"
        if scheme.lower() not in ("key", "bearer") or not self.keys.admits(presented.strip()):
            raise Refused(
                401,
                "this server wants its key: Authorization: Key …",
                {"www-authenticate": "Key"},
            )

    def _add_headers(
        self, answer: MutableHeaders, scope: Scope, headers: Headers, request_id: str
    ) -> None:
        answer.setdefault("x-fal-request-id", request_id)
        answer["x-content-type-options"] = "nosniff"
        answer["referrer-policy"] = "no-referrer"
        answer["x-frame-options"] = "DENY"
        answer.setdefault("content-security-policy", API_POLICY)
        answer.setdefault("cross-origin-resource-policy", "same-origin")
        answer.setdefault("cross-origin-opener-policy", "same-origin")
        answer.setdefault("cache-control", "no-store")
        if not self._origins:
            return
        answer.add_vary_header("origin")
        origin = headers.get("origin")
        if origin is not None and self._is_allowed(origin, scope, headers):
            answer["access-control-allow-origin"] = origin
            answer["access-control-expose-headers"] = EXPOSED

    def _log(self, scope: Scope, status: int, seconds: float, size: int, request_id: str) -> None:
        # ASCII by JSON's escapes: no line break, no terminal's control. The query may hold a token.
        line = {
            "request_id": request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"][:300],
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": size,
        }
        logger.info("%s", json.dumps(line))


async def _refuse(path: str, error: Refused, send: Send) -> None:
    body: dict[str, object] = {"detail": error.detail}
    if path.startswith("/v1/"):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        told = {"message": error.detail, "type": kind, "param": None, "code": None}
        body = {"error": told}
    headers = {**error.headers, "content-type": "application/json", "connection": "close"}
    await _respond(error.status, headers, json.dumps(body).encode(), send)


async def _respond(status: int, headers: Mapping[str, str], body: bytes, send: Send) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    if status != 204:
        raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
