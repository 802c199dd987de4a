"""Who may ask: host, origin, content type, key; sizes and patience. Without a socket or a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from asgi import Answer, ask

from krea_local.server import bodies, guard
from krea_local.server.app import create_app
from krea_local.server.settings import Settings

KEY = "0123456789abcdef0123"
HOST = ("host", "localhost:8080")
JSON = ("content-type", "application/json")
KREA = "fal-ai/flux/krea"
CALLS = [
    ("POST", f"/run/{KREA}"),
    ("POST", f"/{KREA}"),
    ("POST", f"/run/{KREA}/stream"),
    ("POST", f"/queue/{KREA}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/api/jobs"),
]
CHANGES = [
    *CALLS,
    ("PUT", "/queue/fal-ai/flux/requests/x/cancel"),
    ("DELETE", "/api/jobs/x"),
    ("POST", "/api/uploads"),
    ("POST", "/cdn/files/upload"),
    ("PUT", "/rest/storage/upload/x"),
    ("POST", "/api/jobs/x/cancel"),
]


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(Settings())


@pytest.fixture(scope="module")
def locked() -> Any:
    return create_app(Settings(api_key=KEY))


@pytest.fixture(scope="module")
def opened() -> Any:
    return create_app(
        Settings(hosts=("gpu.lan",), origins=("https://my.app", "http://localhost:3000"))
    )


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:80",
        "[::1]",
        "[::1]:1",
    ],
)
def test_the_machines_own_names_are_served(app: Any, host: str) -> None:
    assert ask(app, "GET", "/health/live", [("host", host)]).status == 200


BAD_HOSTS = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "127.0.0.2",
    "0.0.0.0",
    "[::ffff:127.0.0.1]",
    "[::]",
    "169.254.169.254",
    "evil@localhost",
    "localhost/evil",
    "localhost evil",
    "localhost:80:80",
    "[::1",
    "",
    "gpu.lan",
    "2130706433",
    "localhost\x00",
]


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/api/jobs"), ("GET", "/files/x"), *CALLS[:2]]
)
def test_any_other_host_is_refused(app: Any, host: str, method: str, path: str) -> None:
    answer = ask(app, method, path, [("host", host), JSON])
    assert answer.status == 421
    assert "--allow-host" in answer.body.decode()


def test_a_request_names_exactly_one_host(app: Any) -> None:
    assert ask(app, "GET", "/health/live", []).status == 421
    assert ask(app, "GET", "/health/live", [HOST, ("host", "evil.example")]).status == 421


def test_a_named_host_is_served(opened: Any) -> None:
    assert ask(opened, "GET", "/health/live", [("host", "GPU.lan:8080")]).status == 200


BAD_ORIGINS = [
    "null",
    "http://evil.example",
    "https://localhost:8080",
    "http://localhost:9999",
    "http://localhost",
    "http://127.0.0.1:8080",
    "http://localhost:8080.evil.example",
    "http://localhost:8080@evil.example",
    "file://",
    "chrome-extension://abcdef",
    "",
]


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_another_origins_page_changes_nothing(
    app: Any, origin: str, method: str, path: str
) -> None:
    answer = ask(app, method, path, [HOST, JSON, ("origin", origin)], [b"{}"])
    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_says_so_without_an_origin_is_refused_too(app: Any, site: str) -> None:
    answer = ask(app, *CALLS[0], [HOST, JSON, ("sec-fetch-site", site)], [b"{}"])
    assert answer.status == 403


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_the_servers_own_page_may(app: Any, method: str, path: str) -> None:
    headers = [HOST, JSON, ("origin", "http://localhost:8080"), ("sec-fetch-site", "same-origin")]
    assert ask(app, method, path, headers, [b"[]"]).status in (400, 422)  # judged, not refused


@pytest.mark.parametrize("origin", ["https://my.app", "http://localhost:3000"])
def test_a_named_origin_may_and_reads_the_request_id(opened: Any, origin: str) -> None:
    answer = ask(opened, *CALLS[0], [HOST, JSON, ("origin", origin)], [b"[]"])
    assert answer.status == 422
    assert answer.headers["access-control-allow-origin"] == origin
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"].lower() == "origin"


def test_a_preflight_of_a_named_origin_allows_what_the_client_sends(opened: Any) -> None:
    asked = "authorization,content-type,x-fal-queue-priority,x-fal-target-url,x-evil"
    headers = [
        HOST,
        ("origin", "https://my.app"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", asked),
        ("access-control-request-private-network", "true"),
    ]
    answer = ask(opened, "OPTIONS", "/proxy", headers)
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == "https://my.app"
    assert "PUT" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert allowed == asked.split(",")[:-1]
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "https://my.app.evil.example"])
def test_a_preflight_of_any_other_is_refused(opened: Any, origin: str) -> None:
    headers = [HOST, ("origin", origin), ("access-control-request-method", "POST")]
    answer = ask(opened, "OPTIONS", f"/run/{KREA}", headers)
    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


BAD_TYPES = [
    "",
    "text/plain",
    "text/plain;application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
    "text/json",
]


@pytest.mark.parametrize("content_type", BAD_TYPES)
@pytest.mark.parametrize(("method", "path"), CALLS)
def test_json_is_sent_as_json(app: Any, content_type: str, method: str, path: str) -> None:
    headers = [HOST] + ([("content-type", content_type)] if content_type else [])
    assert ask(app, method, path, headers, [b'{"prompt": "a fox"}']).status == 415


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_of_any_spelling_is_read(app: Any, content_type: str) -> None:
    answer = ask(app, *CALLS[0], [HOST, ("content-type", content_type)], [b"{}"])
    assert answer.json()["detail"][0]["loc"] == ["body", "prompt"]


BAD_KEYS = [
    None,
    "",
    "Key",
    "Key ",
    f"Key {KEY[:-1]}",
    f"Key {KEY}x",
    f"Key {KEY.upper()}",
    f"Basic {KEY}",
    KEY,
    f"Key Key {KEY}",
    "Key 99999999999.0000",
    "Bearer \xff\xfe",
]


@pytest.mark.parametrize("key", BAD_KEYS)
@pytest.mark.parametrize(
    ("method", "path"),
    [*CALLS, ("GET", "/api/jobs"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nope")],
)
def test_without_the_key_nothing_is_told(
    locked: Any, key: str | None, method: str, path: str
) -> None:
    headers = [HOST, JSON] + ([] if key is None else [("authorization", key)])
    answer = ask(locked, method, path, headers, [b"{}"])
    assert answer.status == 401
    assert KEY not in answer.body.decode()
    assert "x-fal-request-id" in answer.headers


@pytest.mark.parametrize("key", [f"Key {KEY}", f"Bearer {KEY}", f"key {KEY}", f"BEARER  {KEY}"])
def test_with_the_key_one_may(locked: Any, key: str) -> None:
    answer = ask(locked, *CALLS[0], [HOST, JSON, ("authorization", key)], [b"{}"])
    assert answer.status == 422


def test_two_keys_are_none(locked: Any) -> None:
    headers = [HOST, JSON, ("authorization", f"Key {KEY}"), ("authorization", "Key x")]
    assert ask(locked, *CALLS[0], headers, [b"{}"]).status == 401


@pytest.mark.parametrize("path", ["/health/live", "/"])
def test_the_page_and_the_pulse_need_no_key(locked: Any, path: str) -> None:
    assert ask(locked, "GET", path, [HOST]).status in (200, 404)


def test_a_token_is_as_good_as_the_key_until_it_is_not(
    locked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = locked.keys
    token = keys.token(60)
    path = f"/run/{KREA}?fal_jwt_token={token}"
    assert ask(locked, "POST", path, [HOST, JSON], [b"{}"]).status == 422
    until, _, signature = token.partition(".")
    assert not keys.admits(f"{int(until) + 1}.{signature}")
    now = guard.time.time()
    monkeypatch.setattr(guard.time, "time", lambda: now + 61)
    assert not keys.admits(token)


def test_every_answer_carries_the_headers_that_browsers_heed(app: Any) -> None:
    for path in ("/health/live", "/nope", "/api/jobs"):
        headers = ask(app, "GET", path, [HOST] if path != "/api/jobs" else []).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert len(headers["x-fal-request-id"]) >= 32


def test_a_length_over_the_limit_is_refused_before_a_byte_is_read(app: Any) -> None:
    for path, kind, limit in (
        (f"/run/{KREA}", "application/json", bodies.MAX_JSON_BYTES),
        ("/cdn/files/upload", "image/png", bodies.MAX_FILE_BYTES),
        ("/v1/images/edits", "multipart/form-data; boundary=x", bodies.MAX_FORM_BYTES),
    ):
        headers = [HOST, ("content-type", kind), ("content-length", str(limit + 1))]
        assert ask(app, "POST", path, [*headers, ("expect", "100-continue")]).status == 413


def test_a_body_without_a_length_is_refused_where_it_passes_the_limit(app: Any) -> None:
    chunks: list[bytes | float] = [b" " * 2**20] * 71
    answer = ask(app, *CALLS[0], [HOST, JSON], chunks)
    assert answer.status == 413
    assert "70 MiB" in answer.json()["detail"]


def test_a_length_that_is_no_number_is_refused(app: Any) -> None:
    for length in ("-1", "1e3", "０", "9" * 19):
        headers = [HOST, JSON, ("content-length", length.encode().decode("latin-1"))]
        assert ask(app, *CALLS[0], headers, [b"{}"]).status == 400


def test_a_body_that_trickles_is_given_up(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    chunks: list[bytes | float] = [b"[", 0.1, b" ", 0.1, b" ", 0.1, b" ", 0.1, b" ", 5.0, b"]"]
    assert ask(app, *CALLS[0], [HOST, JSON], chunks).status == 408


def test_many_large_bodies_at_once_are_asked_to_wait(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_HELD_BYTES", 2**20)
    answer = ask(app, *CALLS[0], [HOST, JSON], [b" " * 2**20, b" "])
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) > 0
    # And what was held is free again.
    assert ask(app, *CALLS[0], [HOST, JSON], [b" " * 2**19, b"[]"]).status == 422


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b"[1,]",
        b'{"a": NaN}',
        b'"\xff"',
        b'"\\ud800"',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"1" * 10_000,
        b"\x00",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_good_json_is_an_error_of_the_caller(app: Any, body: bytes) -> None:
    for method, path in CALLS:
        answer = ask(app, method, path, [HOST, JSON], [body])
        assert answer.status in (400, 422), answer.body
        assert len(answer.body) < 10_000


def test_a_refused_value_is_not_sent_back_at_length(app: Any) -> None:
    body = json.dumps({"prompt": "x", "num_images": "y" * 10**6, "seed": ["z" * 10**5] * 50})
    answer = ask(app, *CALLS[0], [HOST, JSON], [body.encode()])
    assert answer.status == 422
    assert len(answer.body) < 100_000


def test_a_logged_line_is_one_line_of_json_whatever_was_asked(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "krea_local.server.access"):
        answer = ask(app, "GET", "/x\n\x1b[31m\u202e?token=secret", [HOST])
    line = caplog.records[-1].getMessage()
    assert line.isascii()
    assert line.isprintable()
    told = json.loads(line)
    assert told["path"] == "/x\n\x1b[31m\u202e"
    assert told["status"] == answer.status == 404
    assert told["request_id"] == answer.headers["x-fal-request-id"]
    assert "secret" not in line


def test_openai_paths_are_refused_in_openais_words(locked: Any) -> None:
    answer: Answer = ask(locked, "POST", "/v1/images/generations", [HOST, JSON], [b"{}"])
    assert answer.json()["error"]["type"] == "authentication_error"


def test_a_websocket_of_another_origin_is_refused(app: Any) -> None:
    import asyncio

    async def connect(origin: str) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "websocket",
            "scheme": "ws",
            "path": f"/run/{KREA}/realtime",
            "query_string": b"",
            "headers": [(b"host", b"localhost:8080"), (b"origin", origin.encode())],
            "server": ("127.0.0.1", 8080),
            "subprotocols": [],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent

    for origin in BAD_ORIGINS:
        sent = asyncio.run(connect(origin))
        assert sent[0]["type"] == "websocket.close"
        assert sent[0]["code"] == 1008


def test_the_proxy_dials_nothing(app: Any) -> None:
    for target in (
        "http://fal.run/x",
        "https://evil.example/fal-ai/flux/krea",
        "https://fal.run.evil.example/x",
        "https://fal.run@evil.example/x",
        "https://[::1",
        "",
    ):
        answer = ask(app, "POST", "/proxy", [HOST, JSON, ("x-fal-target-url", target)], [b"{}"])
        assert answer.status == 400
    answer = ask(app, "POST", "/proxy", [HOST, JSON], [b"{}"])
    assert answer.status == 400


def test_the_proxy_serves_the_path_that_it_is_given(app: Any) -> None:
    for target in (f"https://fal.run/{KREA}", f"https://queue.fal.run/{KREA}/?fal_webhook=x"):
        answer = ask(app, "POST", "/proxy", [HOST, JSON, ("x-fal-target-url", target)], [b"{}"])
        assert answer.status == 422


def test_the_page_may_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    from krea_local.server.own import PAGE_POLICY

    assert "default-src 'none'" in PAGE_POLICY
    assert "unsafe" not in PAGE_POLICY
    assert "http" not in PAGE_POLICY
