"""A local server that speaks the part of the Hugging Face hub's protocol that downloads use."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories, what was asked for, and which files were fetched.

    Args:
        repos: repository id → the folder whose files it holds.
        gated: repositories that answer 403 without the token "accepted".
    """

    def __init__(self, repos: Mapping[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repos = repos
        self.gated = gated
        self.asked: list[str] = []
        self.fetched: list[str] = []
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
        if is_api:
            return self._send(
                200, json.dumps(self._listing(parts, repo, folder)).encode(), {}, head
            )
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, head)
        data = file.read_bytes()
        if not head:
            self.hub.fetched.append(f"{repo}/{'/'.join(parts[4:])}")
        tag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, head)

    def _listing(self, parts: list[str], repo: str, folder: Path) -> object:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if "tree" in parts:
            return [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in zip(names, files, strict=True)
            ]
        siblings = [{"rfilename": name} for name in names]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []}

    def _send(self, status: int, body: bytes, headers: dict[str, str], head: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
