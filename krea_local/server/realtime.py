"""The hosted API's realtime connection: call after call over one websocket, in msgpack.

Each message is a call's arguments, each answer its output, with the pictures inline. Calls of one
connection are drawn one after another, and cancelled when it ends.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic_core import from_json, to_json
from starlette.websockets import WebSocket, WebSocketDisconnect

from krea_local.endpoints import ENDPOINTS, Endpoint
from krea_local.errors import InvalidRequest, KreaError
from krea_local.server import answers, calls
from krea_local.server.answers import Refusal
from krea_local.server.service import QueueFull, Unavailable
from krea_local.server.web import Web

NOT_POSSIBLE = 1011  # as websockets number it
MOST_WAITING = 8  # messages of one connection
LARGE = 2**20  # bytes; a message of more waits alone, or not at all


def add_routes(app: FastAPI, web: Web) -> None:
    """Add the websockets."""
    for endpoint in ENDPOINTS.values():
        for place in (f"/run/{endpoint.id}/realtime", f"/{endpoint.id}/realtime"):
            app.add_api_websocket_route(place, _route(web, endpoint))


def _route(web: Web, endpoint: Endpoint) -> Any:
    async def serve(socket: WebSocket) -> None:
        await socket.accept()
        try:
            pack: Any = importlib.import_module("msgpack")
        except ModuleNotFoundError:
            await _tell(socket, "UNSUPPORTED", "the server lacks msgpack: pip install msgpack")
            await socket.close(NOT_POSSIBLE)
            return
        asked: asyncio.Queue[Any] = asyncio.Queue(MOST_WAITING)
        gone = asyncio.ensure_future(_listen(socket, asked))
        stopped = asyncio.ensure_future(web.stopped.wait())
        ends = [gone, stopped]
        try:
            while True:
                upcoming = asyncio.ensure_future(asked.get())
                await asyncio.wait([upcoming, *ends], return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done() or not await _answer(
                    web, endpoint, socket, pack, upcoming.result(), ends
                ):
                    upcoming.cancel()
                    return
        except WebSocketDisconnect:
            return
        finally:
            for one in ends:
                one.cancel()

    return serve


async def _listen(socket: WebSocket, asked: asyncio.Queue[Any]) -> None:
    """Take what is sent, also while a call is drawn; ends when the client is gone."""
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        size = len(message.get("bytes") or message.get("text") or "")
        if asked.full() or (size > LARGE and not asked.empty()):
            text = f"{asked.qsize()} calls wait already; send one of {size} bytes when they do not"
            await _tell(socket, "TOO_MANY", text)
        else:
            asked.put_nowait(message)


async def _answer(
    web: Web,
    endpoint: Endpoint,
    socket: WebSocket,
    pack: Any,
    message: Any,
    ends: Sequence[asyncio.Future[Any]],
) -> bool:
    """Draw what one message asks for, and send it; False if one of `ends` came before."""
    try:
        arguments = {**_read(pack, message), "sync_mode": True}
        calls.endpoint_here(web, endpoint.id)
        job = await calls.submit(web, socket, endpoint, arguments)
    except (KreaError, Refusal, QueueFull, Unavailable) as error:
        found, _ = answers.error_of(error)
        told = to_json(answers.shortened(found.body)).decode()
        await _tell(socket, (found.error_type or "validation_error").upper(), told)
        return True
    done = asyncio.ensure_future(web.service.wait(job.id))
    try:
        await asyncio.wait([done, *ends], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not done.done():
            done.cancel()
            web.later(web.service.cancel(job.id))
    if not done.done() or done.cancelled():
        return False
    finished = done.result()
    if finished.outcome is None:
        failure = answers.failure_of(finished)
        kind = (failure.error_type or "error").upper()
        await _tell(socket, kind, answers.failure_text(failure))
        return True
    output = await answers.output(web, "", finished)
    await socket.send_bytes(pack.packb({**output, "request_id": job.id}))
    return True


def _read(pack: Any, message: Any) -> dict[str, object]:
    data = message.get("bytes")
    try:
        found = from_json(message["text"]) if data is None else pack.unpackb(data, raw=False)
    except Exception as error:  # msgpack raises many kinds on damaged messages
        raise InvalidRequest(f"the message cannot be read: {str(error)[:100]}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InvalidRequest("the message should be an object")
    return found


async def _tell(socket: WebSocket, kind: str, reason: str) -> None:
    told = {"type": "x-fal-error", "error": kind, "reason": reason[:1000]}
    await socket.send_text(to_json(told).decode())
