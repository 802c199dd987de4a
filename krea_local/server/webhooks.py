"""Notices of finished jobs, posted to the URLs that their submitters named.

Each is tried ten times over two hours, and across restarts; each is signed with this server's own
key, as the hosted API signs. Knows nothing of how the payload of a done job is put together.

Source: the hosted API's documentation of webhooks and their verification.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from krea_local.errors import OutputFailed
from krea_local.server.changes import Delivery
from krea_local.server.dialling import Rules, ask, parse_url
from krea_local.server.jobs import Job
from krea_local.server.store import Store

logger = logging.getLogger(__name__)

Payload = Callable[[Job], Mapping[str, object]]

PAUSES = (15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1800.0, 3600.0)
"""Seconds after each try but the tenth: two hours in all."""
TRY_SECONDS = 15.0
AT_ONCE = 8
USER_ID = "local"
KEY_FILE = "webhook_key.pem"


class Key:
    """The key that notices are signed with, made when first needed.

    Args:
        folder: where it is kept, readable by this user alone.

    Raises:
        OutputFailed: it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / KEY_FILE
        try:
            if not path.exists():
                _write_key(path)
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise OutputFailed(f"cannot use the key {str(path)!r}: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise OutputFailed(f"{str(path)!r} is no Ed25519 key: delete it, and it is made anew")
        self._key = key

    def headers(self, job: str, body: bytes) -> dict[str, str]:
        """The headers by which a receiver knows that a notice is ours."""
        timestamp = str(int(time.time()))
        digest = hashlib.sha256(body).hexdigest()
        message = "\n".join((job, USER_ID, timestamp, digest)).encode()
        return {
            "X-Fal-Webhook-Request-Id": job,
            "X-Fal-Webhook-User-Id": USER_ID,
            "X-Fal-Webhook-Timestamp": timestamp,
            "X-Fal-Webhook-Signature": self._key.sign(message).hex(),
        }

    def jwks(self) -> dict[str, object]:
        """The public key, as a JSON Web Key Set."""
        public = self._key.public_key().public_bytes_raw()
        x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
        kid = hashlib.sha256(public).hexdigest()[:16]
        key = {"kty": "OKP", "crv": "Ed25519", "x": x, "use": "sig", "alg": "EdDSA", "kid": kid}
        return {"keys": [key]}


class Webhooks:
    """Delivers what the store says is to be delivered.

    Args:
        store: where the deliveries are kept.
        key: to sign with.
        rules: where may be posted to.
        payload: of a done job; None for its id alone.
    """

    def __init__(self, store: Store, key: Key, rules: Rules, payload: Payload | None) -> None:
        self._store = store
        self._key = key
        self._rules = rules
        self._payload = payload
        self._more = asyncio.Event()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def look(self) -> None:
        """There may be something new to deliver."""
        self._more.set()

    async def run(self) -> None:
        """Deliver, until cancelled."""
        try:
            while True:
                self._more.clear()
                try:
                    delay = self._begin_what_is_due()
                except sqlite3.Error as error:
                    logger.error("what is to be delivered is not known: %s", error)
                    delay = TRY_SECONDS
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._more.wait(), delay)
        finally:
            for task in self._under_way.values():
                task.cancel()
            await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    def _begin_what_is_due(self) -> float | None:
        """Begin the deliveries that are due; seconds until the next one, None if there is none."""
        now = time.time()
        for delivery in self._store.deliveries():
            if delivery.job in self._under_way:
                continue
            if delivery.next > now:
                return delivery.next - now
            task = asyncio.create_task(self._deliver(delivery))
            self._under_way[delivery.job] = task
            task.add_done_callback(functools.partial(self._done, delivery.job))
        return None

    def _done(self, job: str, _: asyncio.Task[None]) -> None:
        del self._under_way[job]
        self._more.set()

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            await self._try(delivery)
        except sqlite3.Error as error:  # a full disk: posted again, rather than never
            logger.error("what came of the webhook of %s is not kept: %s", delivery.job, error)
            await asyncio.sleep(TRY_SECONDS)

    async def _try(self, delivery: Delivery) -> None:
        job = self._store.job(delivery.job)
        if job is None or job.webhook is None:
            return
        try:
            async with self._turns:
                body = json.dumps(notice(job, self._payload)).encode()
                headers = {"Content-Type": "application/json", **self._key.headers(job.id, body)}
                await asyncio.wait_for(_post(job.webhook, self._rules, headers, body), TRY_SECONDS)
        except Exception as error:  # a notice that cannot even be put together counts as a try
            reason = "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
            pause = PAUSES[min(delivery.tries, len(PAUSES) - 1)]
            logger.warning("webhook of %s, try %d: %s", job.id, delivery.tries + 1, reason)
            next_try = time.time() + pause
            await self._store.not_delivered(job.id, reason or type(error).__name__, next=next_try)
        else:
            await self._store.delivered(job.id)


def notice(job: Job, payload: Payload | None) -> dict[str, object]:
    """What is posted of a finished job."""
    told: dict[str, object] = {"request_id": job.id, "gateway_request_id": job.id}
    if job.state == "done":
        made = {} if payload is None else dict(payload(job))
        return {**told, "status": "OK", "error": None, "payload": made}
    if job.failure is None:
        body: Mapping[str, object] = {"detail": "Request was cancelled"}
        return {**told, "status": "ERROR", "error": "Request was cancelled", "payload": dict(body)}
    error = f"Invalid status code: {job.failure.status}"
    return {**told, "status": "ERROR", "error": error, "payload": dict(job.failure.body)}


async def _post(url: str, rules: Rules, headers: Mapping[str, str], body: bytes) -> None:
    """Post once; redirects are not followed.

    Raises:
        Refused: the address is not one that may be posted to.
        OSError: it is not there, or does not take it.
    """
    parsed = parse_url(url)
    async with ask("POST", parsed, rules, headers=headers, content=body) as answer:
        if not 200 <= answer.status < 300:
            raise OSError(f"answered {answer.status}")


def _write_key(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
