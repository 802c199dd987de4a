"""Pointing the official client, the package fal-client, at a server of one's own."""

from __future__ import annotations

import importlib
import os
import urllib.parse
from typing import Any

from krea_local.errors import InvalidRequest

KEPT_BY_CLIENTS = ("_auth", "_client", "_token_manager")


def point_official_client(url: str, api_key: str | None = None) -> None:
    """Have the official package `fal_client` call the server at `url`, and the cloud no more.

    For this process, from now on, and for all its clients: run, queue, realtime, uploads. The
    variable FAL_KEY is replaced, so that a key for the cloud is not sent to the server, and what
    its module-level functions keep of earlier calls is dropped; clients that have called already
    should be made anew.

    Args:
        url: of `krea-local serve`: "http://127.0.0.1:8080".
        api_key: the server's, if it has one.

    Raises:
        InvalidRequest: `url` is not http(s) with a host, or has a query.
        ImportError: the package is not installed, or is one whose addresses are elsewhere.
    """
    base, socket = _bases(url)
    try:
        package: Any = importlib.import_module("fal_client")
        module: Any = importlib.import_module("fal_client.client")
    except ImportError as error:
        raise ImportError(
            "the official client is not installed: pip install fal-client, or take "
            "`from krea_local import fal_client` instead, which needs no server"
        ) from error
    addresses = {
        "RUN_URL_FORMAT": f"{base}/run/",
        "QUEUE_URL_FORMAT": f"{base}/queue/",
        "REALTIME_URL_FORMAT": f"{socket}/run/",
        "REST_URL": f"{base}/rest",
        "CDN_URL": f"{base}/cdn",
    }
    gone = [name for name in addresses if not hasattr(module, name)]
    if gone:
        version = getattr(package, "__version__", "of this version")
        raise ImportError(
            f"fal-client {version} has no {', '.join(gone)} to redirect: 0.10 and 1.0 have"
        )
    for name, address in addresses.items():
        setattr(module, name, address)
    # 1.0 asks another domain of the cloud where the first cannot be reached.
    getattr(module, "_BACKUP_DOMAINS", {}).clear()
    os.environ["FAL_KEY"] = api_key or "local"
    os.environ.pop("FAL_FORCE_AUTH_BY_USER", None)  # would log in at the cloud instead
    for client in (package.sync_client, package.async_client):
        for name in KEPT_BY_CLIENTS:
            vars(client).pop(name, None)


def _bases(url: str) -> tuple[str, str]:
    """`url` without its last slash, and the same for web sockets."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, AttributeError, TypeError):
        fine = False
    if not fine or parts.query or parts.fragment:
        raise InvalidRequest(f"url={url!r}: should be a server's address, http://127.0.0.1:8080")
    base = url.rstrip("/")
    return base, "ws" + base.removeprefix("http")
