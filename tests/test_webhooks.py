"""Notices of finished jobs arrive, signed, once; what does not is tried again, restarts too."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from krea_local.errors import OutputFailed
from krea_local.server import webhooks
from krea_local.server.changes import MAX_TRIES, Waiting
from krea_local.server.dialling import Rules
from krea_local.server.jobs import Failure, Job, Outcome
from krea_local.server.store import Store
from krea_local.server.webhooks import Key, Webhooks, notice


@dataclass
class Receiver:
    """A web server that takes notices, with the answers it is told to give, then 200."""

    url: str
    answers: list[int]
    taken: list[tuple[dict[str, str], bytes]]


@contextmanager
def receiving(*answers: int) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.taken.append((dict(self.headers), body))
            status = receiver.answers.pop(0) if receiver.answers else 200
            self.send_response(status)
            self.send_header("Location", f"{receiver.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver = Receiver(f"http://127.0.0.1:{server.server_address[1]}", list(answers), [])
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def finished(url: str, state: str = "done") -> Job:
    now = time.time()
    job = Job("id-1", "fal-ai/flux/krea", {"prompt": "a fox"}, "queued", now, webhook=url)
    failure = Failure(422, None, {"detail": [{"loc": ["body", "image_url"], "msg": "no"}]})
    if state == "done":
        outcome = Outcome((), 7, (), {"total": 1.0})
        return replace(job, state="done", finished=now, outcome=outcome)
    if state == "failed":
        return replace(job, state="failed", finished=now, failure=failure)
    return replace(job, state="cancelled", finished=now)


async def keep(store: Store, job: Job) -> None:
    await store.add_job(job, Waiting())
    await store.finish(job)


async def deliver_until(
    store: Store, enough: Callable[[], bool], *, private: bool = True, seconds: float = 60
) -> None:
    sender = Webhooks(
        store, Key(store.folder), Rules(private=private), lambda job: {"seed": job.outcome.seed}
    )
    running = asyncio.create_task(sender.run())
    deadline = time.monotonic() + seconds
    while not enough():
        assert time.monotonic() < deadline, "it never came to that"
        assert not running.done()
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def none_left(store: Store) -> Callable[[], bool]:
    return lambda: store.deliveries() == []


def test_a_notice_is_signed_as_the_hosted_api_signs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with receiving() as receiver:

        async def work() -> None:
            await keep(store, finished(receiver.url + "/hook?a=1"))
            await deliver_until(store, none_left(store))

        asyncio.run(work())
    ((headers, body),) = receiver.taken
    assert json.loads(body) == {
        "request_id": "id-1",
        "gateway_request_id": "id-1",
        "status": "OK",
        "error": None,
        "payload": {"seed": 7},
    }
    assert headers["Host"] == urlsplit(receiver.url).netloc
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Fal-Webhook-Request-Id"] == "id-1"
    assert abs(int(headers["X-Fal-Webhook-Timestamp"]) - time.time()) < 300
    # As the hosted API's documentation has receivers verify it.
    message = "\n".join(
        [
            headers["X-Fal-Webhook-Request-Id"],
            headers["X-Fal-Webhook-User-Id"],
            headers["X-Fal-Webhook-Timestamp"],
            hashlib.sha256(body).hexdigest(),
        ]
    ).encode()
    keys = Key(tmp_path).jwks()["keys"]
    assert isinstance(keys, list)
    x = keys[0]["x"]
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(x + "=" * (-len(x) % 4)))
    signature = bytes.fromhex(headers["X-Fal-Webhook-Signature"])
    public.verify(signature, message)
    with pytest.raises(InvalidSignature):
        public.verify(signature, message + b"0")
    store.close()


def test_a_failed_and_a_cancelled_job_are_told_as_errors() -> None:
    failed = notice(finished("http://x.example", "failed"), None)
    assert (failed["status"], failed["error"]) == ("ERROR", "Invalid status code: 422")
    assert failed["payload"] == {"detail": [{"loc": ["body", "image_url"], "msg": "no"}]}
    cancelled = notice(finished("http://x.example", "cancelled"), None)
    assert cancelled["status"] == "ERROR"


def test_a_notice_is_tried_until_it_is_taken_then_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", (0.01,) * 9)
    store = Store(tmp_path)
    with receiving(500, 302, 404) as receiver:

        async def work() -> None:
            await keep(store, finished(receiver.url))
            await deliver_until(store, none_left(store))

        asyncio.run(work())
        assert len(receiver.taken) == 4  # the redirect was not followed
        assert len({body for _, body in receiver.taken}) == 1
    store.close()


def test_a_notice_is_given_up_after_ten_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(webhooks.PAUSES) == pytest.approx(2 * 3600, rel=0.05)
    assert len(webhooks.PAUSES) == MAX_TRIES - 1
    monkeypatch.setattr(webhooks, "PAUSES", (0.01,) * 9)
    store = Store(tmp_path)
    with receiving(*[500] * 20) as receiver:

        async def work() -> None:
            await keep(store, finished(receiver.url))
            await deliver_until(store, none_left(store))

        asyncio.run(work())
        assert len(receiver.taken) == MAX_TRIES
    store.close()


def test_a_notice_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", (0.5,) * 9)
    store = Store(tmp_path)
    with receiving(500) as receiver:

        async def before() -> None:
            await keep(store, finished(receiver.url))
            await deliver_until(store, lambda: store.deliveries()[0].tries == 1)

        asyncio.run(before())
        store.close()
        later = Store(tmp_path)
        asyncio.run(deliver_until(later, none_left(later)))
        later.close()
        assert len(receiver.taken) == 2


def test_a_private_address_is_not_posted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", (0.0,) * 9)
    store = Store(tmp_path)
    with receiving() as receiver:

        async def work() -> None:
            await keep(store, finished(receiver.url))
            await deliver_until(store, none_left(store), private=False)

        asyncio.run(work())
        assert receiver.taken == []
    store.close()


def test_the_key_is_made_once_and_is_for_this_user_alone(tmp_path: Path) -> None:
    assert Key(tmp_path).jwks() == Key(tmp_path).jwks()
    path = tmp_path / webhooks.KEY_FILE
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("nonsense")
    with pytest.raises(OutputFailed, match="cannot use the key"):
        Key(tmp_path)
