"""A local server that speaks the part of the Hugging Face hub's protocol that downloads use."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories, what was asked for, and which files were fetched.

    Args:
        repos: repository id → the folder whose files it holds.
        gated: repositories that answer 403 without the token "accepted".

    What goes wrong is set by the file's name in its repository:

    Attributes:
        breaks: bytes of the file after which the connection is cut, one for each answer.
        says: (HTTP status, headers) to answer instead, one for each answer; "api" is the listing.
        sends: other content than is listed, with its own length.
        ranges: first bytes that were asked for.
        ignores_ranges: whether every answer is the whole file.
        pause: seconds before each 10 kB.
    """

    def __init__(self, repos: Mapping[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repos = repos
        self.gated = gated
        self.asked: list[str] = []
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()
        self.breaks: dict[str, list[int]] = defaultdict(list)
        self.says: dict[str, list[tuple[int, dict[str, str]]]] = defaultdict(list)
        self.sends: dict[str, bytes] = {}
        self.ranges: dict[str, list[int]] = defaultdict(list)
        self.ignores_ranges = False
        self.pause = 0.0
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        self.hub.asked.append(self.path)
        self.hub.tokens.add(self.headers.get("authorization"))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        folder = self.hub.repos.get(repo)
        if folder is None:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, head)
        authorized = self.headers.get("authorization") == "Bearer accepted"
        if repo in self.hub.gated and not authorized and not is_api:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, head)
        name = "api" if is_api else "/".join(parts[4:])
        if not head and self.hub.says[name]:
            status, headers = self.hub.says[name].pop(0)
            return self._send(status, b"{}", headers, head)
        if is_api:
            return self._send(
                200, json.dumps(self._listing(parts, repo, folder)).encode(), {}, head
            )
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, head)
        return self._send_file(f"{repo}/{name}", name, file.read_bytes(), head)

    def _send_file(self, whole_name: str, name: str, data: bytes, head: bool) -> None:
        headers = {"ETag": f'"{checksum(name, data)}"', "X-Repo-Commit": COMMIT}
        if head:
            return self._send(200, data, headers, head)
        self.hub.fetched.append(whole_name)
        data = self.hub.sends.get(name, data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        start = int(asked[1]) if asked else 0
        self.hub.ranges[name].append(start)
        if self.hub.ignores_ranges:
            start = 0
        elif asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = self.hub.breaks[name].pop(0) if self.hub.breaks[name] else None
        status = 206 if "Content-Range" in headers else 200
        return self._send(status, data[start:], headers, head, end and max(0, end - start))

    def _listing(self, parts: list[str], repo: str, folder: Path) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if "tree" in parts:
            return [
                {"type": "file", "path": name, "oid": git_checksum(path.read_bytes())}
                | {"size": path.stat().st_size, "lfs": lfs(name, path.read_bytes(), "oid")}
                for name, path in zip(names, files, strict=True)
            ]
        siblings = [
            {"rfilename": name, "blobId": git_checksum(path.read_bytes())}
            | {"size": path.stat().st_size, "lfs": lfs(name, path.read_bytes(), "sha256")}
            for name, path in zip(names, files, strict=True)
        ]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], head: bool, end: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if head:
            return
        for position in range(0, len(body[:end]), 10_000):
            time.sleep(self.hub.pause)
            try:
                self.wfile.write(body[:end][position : position + 10_000])
            except OSError:  # whoever asked has gone
                self.close_connection = True
                return
        if end is not None:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


def git_checksum(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def checksum(name: str, data: bytes) -> str:
    """As the hub: weights by their SHA-256, small files by git's SHA-1."""
    is_large = name.endswith(".safetensors")
    return hashlib.sha256(data).hexdigest() if is_large else git_checksum(data)


def lfs(name: str, data: bytes, key: str) -> dict[str, object] | None:
    if not name.endswith(".safetensors"):
        return None
    return {key: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
