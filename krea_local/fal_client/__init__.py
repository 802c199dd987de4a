"""The official Python client of the hosted API, answered by this machine's own GPU.

    from krea_local import fal_client  # instead of: import fal_client

Functions, classes and errors have the official names and parameters. Requests are drawn one after
another in a thread of this process; nothing leaves the machine, but for an image or LoRA given by
URL that is fetched.

    types     statuses, errors, settings
    files     data URIs and uploads
    jobs      the queue and its thread
    models    which model draws
    calls     a call, its job, its answer
    client    the functions; async_client the same for asyncio
    official  points the official package at a server

What differs: faults of the arguments and unknown endpoints are told by `submit` at once, as
FalClientHTTPError. `iter_events` and `on_queue_update` tell changes instead of polling. Webhooks
and realtime are the server's (`krea-local serve`). Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from krea_local._version import __version__
from krea_local.fal_client.async_client import AsyncClient, AsyncRequestHandle
from krea_local.fal_client.client import SyncClient, SyncRequestHandle
from krea_local.fal_client.files import encode, encode_file, encode_image
from krea_local.fal_client.models import configure, use
from krea_local.fal_client.official import point_official_client
from krea_local.fal_client.types import (
    Completed,
    FalClientError,
    FalClientHTTPError,
    FalClientTimeoutError,
    InProgress,
    ObjectExpiration,
    Queued,
    Status,
    StorageACL,
    StorageACLDecision,
    StorageACLRule,
    StorageSettings,
)

__all__ = [
    "AsyncClient",
    "AsyncRequestHandle",
    "Completed",
    "FalClientError",
    "FalClientHTTPError",
    "FalClientTimeoutError",
    "InProgress",
    "ObjectExpiration",
    "Queued",
    "Status",
    "StorageACL",
    "StorageACLDecision",
    "StorageACLRule",
    "StorageSettings",
    "SyncClient",
    "SyncRequestHandle",
    "__version__",
    "cancel",
    "cancel_async",
    "configure",
    "encode",
    "encode_file",
    "encode_image",
    "point_official_client",
    "realtime",
    "realtime_async",
    "result",
    "result_async",
    "run",
    "run_async",
    "set_get_current_app",
    "status",
    "status_async",
    "stream",
    "stream_async",
    "submit",
    "submit_async",
    "subscribe",
    "subscribe_async",
    "upload",
    "upload_async",
    "upload_file",
    "upload_file_async",
    "upload_image",
    "upload_image_async",
    "use",
    "version_tuple",
    "ws_connect",
    "ws_connect_async",
]

version_tuple = tuple(int(part) for part in __version__.split(".") if part.isdigit())

sync_client = SyncClient()
run = sync_client.run
subscribe = sync_client.subscribe
submit = sync_client.submit
status = sync_client.status
result = sync_client.result
cancel = sync_client.cancel
stream = sync_client.stream
realtime = sync_client.realtime
ws_connect = sync_client.ws_connect
upload = sync_client.upload
upload_file = sync_client.upload_file
upload_image = sync_client.upload_image

async_client = AsyncClient()
run_async = async_client.run
subscribe_async = async_client.subscribe
submit_async = async_client.submit
status_async = async_client.status
result_async = async_client.result
cancel_async = async_client.cancel
stream_async = async_client.stream
realtime_async = async_client.realtime
ws_connect_async = async_client.ws_connect
upload_async = async_client.upload
upload_file_async = async_client.upload_file
upload_image_async = async_client.upload_image


def set_get_current_app(func: Callable[[], Any]) -> None:
    """Without meaning here: it is for programs that run on the hosted service."""
