"""A small server with the page's JSON API that draws landscapes of hills instead of a model's.

Speaks real HTTP and server-sent events, validates with the library's own endpoints, and is slow on
purpose: a step takes `step_seconds`.
"""

from __future__ import annotations

import base64
import colorsys
import io
import json
import math
import random
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

import krea_local.server
from krea_local.endpoints import ENDPOINTS, http_error
from krea_local.errors import InvalidRequest
from krea_local.schema import PRESETS, ImageSize, fit_input_size

PAGE = Path(krea_local.server.__file__).parent / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript",
         ".svg": "image/svg+xml"}  # fmt: skip
KINDS = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "string"}
MODELS = ("fal-ai/flux/krea", "fal-ai/flux/krea/image-to-image")


def schema() -> dict[str, Any]:
    endpoints = {}
    for name in MODELS:
        properties = ENDPOINTS[name].request.model_json_schema()["properties"]
        fields = []
        for field, facts in properties.items():
            facts = {**facts, **next(iter(facts.get("anyOf", [])), {})}
            kind = "size" if field == "image_size" else KINDS.get(facts.get("type"))
            if "enum" in facts and kind == "string":
                kind = "enum"
            if kind is None:
                continue
            told = {"name": field, "type": kind, "default": facts.get("default")}
            told["minimum"], told["maximum"] = facts.get("minimum"), facts.get("maximum")
            if kind == "size":
                side = ImageSize.model_json_schema()["properties"]["width"]
                told["minimum"], told["maximum"] = side["minimum"], side["maximum"]
            choices = list(PRESETS) if kind == "size" else facts.get("enum")
            fields.append({**told, "choices": choices, "description": facts["description"]})
        endpoints[name] = {"fields": fields}
    return {"endpoints": endpoints, "presets": dict(PRESETS), "limits": {}}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Hills at dusk."""
    dice = random.Random(seed)
    hue = dice.random()
    small = Image.new("RGB", (width // 2, height // 2))
    across, down = small.size
    draw = ImageDraw.Draw(small)

    def colour(shift: float, saturation: float, value: float) -> tuple[int, ...]:
        parts = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        return tuple(int(255 * part) for part in parts)

    for y in range(down):
        t = y / down
        draw.line((0, y, across, y), fill=colour(0.12 * t, 0.45 - 0.3 * t, 0.55 + 0.42 * t))
    x, y, r = dice.uniform(0.2, 0.8) * across, dice.uniform(0.15, 0.4) * down, 0.06 * down
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour(0.1, 0.12, 1))
    small = small.filter(ImageFilter.GaussianBlur(down / 90))
    draw = ImageDraw.Draw(small)
    for layer in range(5):
        waves = [(dice.uniform(1, 9), dice.uniform(0, 7), dice.uniform(0.1, 1)) for _ in range(5)]
        base = down * (0.45 + 0.12 * layer)
        points = [
            (
                x,
                base + down * 0.05 * sum(a / f * math.sin(f * x / across * 4 + p) * 2
                                         for f, p, a in waves),
            )
            for x in range(0, across + 4, 4)
        ]  # fmt: skip
        fill = colour(0.06 * layer, 0.3 + 0.1 * layer, 0.72 - 0.14 * layer)
        draw.polygon([(0, down), *points, (across, down)], fill=fill)
    return small.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Stub(ThreadingHTTPServer):
    """The server; `url` says where, and its attributes may be changed while it runs."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.step_seconds = 0.1
        self.api_key: str | None = None
        self.gpu = True
        self.fail: str | None = None
        self.state = {"ready": True, "reason": ""}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, tuple[str, bytes]] = {}
        self.news = threading.Condition()
        self.progress: dict[str, dict[str, Any]] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        threading.Thread(target=self._work, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A browser that leaves mid-stream is no news."""

    def keep(self, content_type: str, data: bytes) -> str:
        name = secrets.token_hex(8)
        self.files[name] = (content_type, data)
        return f"/files/{name}"

    def add(self, endpoint: str, values: dict[str, Any]) -> dict[str, Any]:
        upload = str(values.get("image_url", ""))
        if upload.startswith("/files/"):
            values = {**values, "image_url": self.url.rstrip("/") + upload}
        request = ENDPOINTS[endpoint].parse(values).with_seed()
        arguments = json.loads(request.model_dump_json(exclude_none=True))
        if upload.startswith("/files/"):
            arguments["image_url"] = upload
        with self.news:
            job = {
                "id": secrets.token_hex(8), "endpoint": endpoint, "state": "queued",
                "arguments": arguments, "created": time.time(), "started": None, "finished": None,
                "position": 0, "pictures": [], "seed": arguments["seed"],
                "has_nsfw_concepts": [], "timings": {}, "notices": [], "failure": None,
            }  # fmt: skip
            self.jobs[job["id"]] = job
            self._number()
        return job

    def end(self, job: dict[str, Any], state: str, **facts: Any) -> None:
        with self.news:
            job.update(facts, state=state, finished=time.time())
            self._number()

    def _number(self) -> None:
        for place, job in enumerate(job for job in self.jobs.values() if job["state"] == "queued"):
            job["position"] = place
        self.news.notify_all()

    def _work(self) -> None:
        while True:
            with self.news:
                self.news.wait_for(lambda: self.state["ready"] and self._next())
                job = self._next()
                job.update(state="running", started=time.time())
                self._number()
            self._draw(job)

    def _next(self) -> Any:
        return next((job for job in self.jobs.values() if job["state"] == "queued"), None)

    def _draw(self, job: dict[str, Any]) -> None:
        asked = job["arguments"]
        size = asked.get("image_size")
        if size is None:
            data = self.files[asked["image_url"].rsplit("/", 1)[1]][1]
            width, height = Image.open(io.BytesIO(data)).size
            width, height = fit_input_size(width=width, height=height) or (512, 512)
        else:
            is_preset = isinstance(size, str)
            width, height = PRESETS[size] if is_preset else (size["width"], size["height"])
        steps, images = asked["num_inference_steps"], asked["num_images"]
        start, pictures = time.time(), []
        for index in range(images):
            final = picture(width, height, asked["seed"] + index)
            small = final.resize((width // 8, height // 8))
            noise = Image.effect_noise(small.size, 120).convert("RGB")
            for step in range(1, steps + 1):
                time.sleep(self.step_seconds)
                if job["state"] == "cancelled" or (self.fail and step > 2):
                    break
                shown = Image.blend(noise, small, (step / steps) ** 0.5)
                uri = "data:image/jpeg;base64," + base64.b64encode(jpeg(shown, 80)).decode()
                with self.news:
                    self.progress[job["id"]] = {
                        "fraction": (index + step / steps) / images, "step": step,
                        "num_steps": steps, "preview": uri,
                    }  # fmt: skip
                    self.news.notify_all()
            if job["state"] == "cancelled":
                return
            if self.fail:
                self.end(job, "failed", failure=self.fail)
                return
            url = self.keep("image/jpeg", jpeg(final))
            pictures.append(
                {"url": url, "width": width, "height": height, "content_type": "image/jpeg"}
            )
        seconds = time.time() - start
        self.end(job, "done", pictures=pictures, has_nsfw_concepts=[False] * images,
                 timings={"inference": seconds, "total": seconds})  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: object, content_type: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", CSP)
        self.end_headers()
        self.wfile.write(data)

    def handle_one(self, method: str) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        server, parts = self.server, path.strip("/").split("/")
        if parts[0] != "api":
            return self.static(path)
        key = self.headers.get("Authorization")
        if server.api_key and key != f"Key {server.api_key}":
            return self.answer(401, {"detail": "a key is needed"})
        if parts[1] == "schema":
            return self.answer(200, schema())
        if parts[1] == "state":
            return self.answer(200, self.facts())
        if parts[1] == "uploads":
            return self.uploaded(data)
        if parts[1] != "jobs":
            return self.answer(404, {"detail": f"Path {path} not found"})
        if len(parts) == 2 and method == "POST":
            asked = json.loads(data)
            try:
                return self.answer(202, server.add(asked["endpoint"], asked["arguments"]))
            except InvalidRequest as error:
                told = http_error(error)
                return self.answer(told.status, told.body)
        if len(parts) == 2:
            wanted = dict(pair.split("=") for pair in query.split("&"))
            every = list(server.jobs.values())[::-1]
            if "before" in wanted:
                every = every[[job["id"] for job in every].index(wanted["before"]) + 1 :]
            limit = int(wanted["limit"])
            return self.answer(200, {"jobs": every[:limit], "more": len(every) > limit})
        job = server.jobs.get(parts[2])
        if job is None:
            return self.answer(404, {"detail": "no such job"})
        if method == "DELETE":
            del server.jobs[parts[2]]
            return self.answer(200, {})
        if parts[3:] == ["cancel"]:
            server.end(job, "cancelled")
            return self.answer(202, job)
        if parts[3:] == ["events"]:
            return self.stream(job)
        return self.answer(200, job)

    def facts(self) -> dict[str, Any]:
        server = self.server
        running = [job["id"] for job in server.jobs.values() if job["state"] == "running"]
        waiting = [job for job in server.jobs.values() if job["state"] == "queued"]
        ready, reason = server.state["ready"], server.state["reason"]
        now = "failed" if reason else "loading" if not ready else "busy" if running else "idle"
        worker = {
            "device": "cuda:0" if server.gpu else "cpu", "state": now, "model": "krea",
            "memory_used": server.gpu * 35_200_000_000, "memory_total": server.gpu * 85_000_000_000,
            "reason": reason, "job": running[0] if running else None,
        }  # fmt: skip
        return {
            "model": "krea", "endpoints": list(MODELS), "ready": ready,
            "queue_length": len(waiting), "workers": [worker], "version": "0.6.0",
        }  # fmt: skip

    def uploaded(self, data: bytes) -> None:
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        except OSError:
            return self.answer(422, {"detail": "image_url (upload): not an image"})
        url = self.server.keep(f"image/{(image.format or '').lower()}", data)
        return self.answer(200, {"url": url, "width": image.width, "height": image.height})

    def stream(self, job: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        told_state, told_progress = None, None
        while True:
            with self.server.news:
                state = (job["state"], job["position"])
                progress = self.server.progress.get(job["id"])
                if state == told_state and progress is told_progress:
                    self.server.news.wait(5)
                    continue
                kind = "progress" if state == told_state else "state"
                told_state, told_progress = state, progress if kind == "progress" else told_progress
                empty = {"fraction": 0, "step": 0, "num_steps": 0, "preview": None}
                data = {"job": job, "position": job["position"], **(progress or empty)}
                event = f"event: {kind}\r\ndata: {json.dumps(data)}\r\n\r\n"
            self.wfile.write(event.encode())
            self.wfile.flush()
            if job["state"] in ("done", "failed", "cancelled"):
                return

    def static(self, path: str) -> None:
        if path.startswith("/files/") and (found := self.server.files.get(path[7:])):
            return self.answer(200, found[1], found[0])
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if file.parent == PAGE and file.is_file():
            return self.answer(200, file.read_bytes(), TYPES[file.suffix])
        return self.answer(404, {"detail": f"Path {path} not found"})

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")
