"""What serving costs and stands: `python -m benchmarks.serving`, on the tiny model, without a GPU.

Starts `krea-local serve` as users do and speaks HTTP to it. Each part prints its figures and writes
one line of JSON; where one of them breaks its rule, the command ends with 1.

    overhead   a served picture's seconds over those of the same call in this process
    load       thousands of jobs submitted at once: answers, memory, order
    polls      status requests a second while a job runs
    cancel     jobs cancelled at random moments, and the picture after each
    images     damaged, lying and monstrous input images
    bodies     slow, cut and lying request bodies
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from benchmarks.latency import positive
from krea_local.info import versions

MODEL = "fal-ai/flux/krea"
QUEUE = f"/queue/{MODEL}"
REQUESTS = "/queue/fal-ai/flux/requests"
FINE = {"image_size": {"width": 64, "height": 64}, "enable_safety_checker": False}
SMALL = FINE | {"num_inference_steps": 1}
START_SECONDS = 300.0
MIB = 2**20


@dataclass(frozen=True)
class Answer:
    """A response: its status and body."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One kept-alive connection, as thin as it goes: the client is not what is measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: object = None) -> Answer:
        """Send one request and read its answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(head(method, path, self._port, len(data)) + data)
        await writer.drain()
        answer, closing = await read_answer(reader)
        if closing:
            await self.close()
        return answer

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def head(method: str, path: str, port: int, length: int) -> bytes:
    """A request's head."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """The answer, and whether the server closes the connection after it."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:])
    }
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(lines[0].split()[1]), body), headers.get("connection") == "close"


@dataclass(frozen=True)
class Server:
    """A running `krea-local serve`."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self) -> list[int]:
        """It and its workers."""
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    left += [int(child) for child in children.read_text().split()]
        return found

    def memory(self, field: str = "VmRSS") -> dict[int, int]:
        """Bytes of each process: `VmRSS` now, `VmHWM` at the most."""
        sizes = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith(field + ":"):
                        sizes[pid] = int(line.split()[1]) * 1024
        return sizes


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """`krea-local serve` with the tiny model on a free port, ready."""
    with tempfile.TemporaryDirectory(prefix="krea_local-") as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "krea_local", "serve", "--model", "tiny"]
        command += ["--device", "cpu", "--port", str(port), "--folder", f"{folder}/data", *flags]
        with log.open("wb") as stream:
            # One thread, since there is a second process to compare with, on maybe two cores.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        server = Server(port, process, log)
        try:
            asyncio.run(_ready(server))
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _ready(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if (await Connection(server.port).ask("GET", "/health/ready")).status == 200:
                return
        await asyncio.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-2000:]}")


async def submit(connection: Connection, **arguments: object) -> str:
    """Submit a job; its id."""
    answer = await connection.ask("POST", QUEUE, {"prompt": "a fox", **SMALL, **arguments})
    if answer.status != 200:
        raise RuntimeError(f"submit: {answer.status} {answer.body[:200]!r}")
    return str(answer.json()["request_id"])


async def finished(connection: Connection, job: str) -> dict[str, Any]:
    """The job's status once it is COMPLETED."""
    while True:
        answer = await connection.ask("GET", f"{REQUESTS}/{job}/status")
        if answer.status == 200:
            return dict(answer.json())
        await asyncio.sleep(0.005)


async def picture(connection: Connection, **arguments: object) -> bytes:
    """The file of a picture drawn by a queued job."""
    job = await submit(connection, **arguments)
    await finished(connection, job)
    answer = await connection.ask("GET", f"{REQUESTS}/{job}")
    url = answer.json()["images"][0]["url"]
    return (await connection.ask("GET", "/" + url.split("/", 3)[3])).body


async def overhead(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of POST /run over those of the same call, taking turns."""
    import torch

    from krea_local import load
    from krea_local.recipe import encode

    torch.set_num_threads(1)  # as many as the server has
    krea = await asyncio.to_thread(load, "tiny", device="cpu", progress=False)
    connection = Connection(server.port)
    arguments: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 4, **FINE}
    served, here = [], []
    for seed in range(options.runs + 3):
        start = time.perf_counter()
        answer = await connection.ask("POST", f"/run/{MODEL}", arguments | {"seed": seed})
        served.append(time.perf_counter() - start)
        assert answer.status == 200, answer
        start = time.perf_counter()
        encode(krea.txt2img(**arguments, seed=seed).images[0], "jpeg")
        here.append(time.perf_counter() - start)
    difference = statistics.median(served[3:]) - statistics.median(here[3:])
    return {
        "served_seconds": statistics.median(served[3:]),
        "in_process_seconds": statistics.median(here[3:]),
        "overhead_seconds": difference,
        "runs": options.runs,
        "good": difference <= 0.010,
    }


async def load_at_once(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Many submits at once, each on a connection of its own."""
    before = sum(server.memory().values())
    start = time.perf_counter()
    statuses: Counter[int] = Counter()
    connections = [Connection(server.port) for _ in range(options.jobs)]

    async def one(connection: Connection, seed: int) -> str:
        body = {"prompt": f"fox {seed}", "seed": seed, **SMALL}
        answer = await connection.ask("POST", QUEUE, body)
        statuses[answer.status] += 1
        return str(answer.json().get("request_id", ""))

    ids = await asyncio.gather(*(one(c, seed) for seed, c in enumerate(connections)))
    seconds = time.perf_counter() - start
    for connection in connections:
        await connection.close()
    connection = Connection(server.port)
    for job in ids:
        await finished(connection, job)
    drawn = time.perf_counter() - start
    jobs: list[dict[str, Any]] = []
    while True:
        before_id = f"&before={jobs[-1]['id']}" if jobs else ""
        page = (await connection.ask("GET", f"/api/jobs?limit=100{before_id}")).json()
        jobs += page["jobs"]
        if not page["more"]:
            break
    ours = [job for job in jobs if job["id"] in set(ids)]
    started = [job["started"] for job in reversed(ours)]
    states = Counter(job["state"] for job in ours)
    in_order = started == sorted(started)
    peak = sum(server.memory("VmHWM").values()) - before
    return {
        "jobs": options.jobs,
        "submit_seconds": seconds,
        "submits_a_second": options.jobs / seconds,
        "drawn_seconds": drawn,
        "statuses": dict(statuses),
        "states": dict(states),
        "in_order": in_order,
        "extra_mib": peak / MIB,
        "good": set(statuses) == {200} and states == {"done": options.jobs} and in_order,
    }


async def polls(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Status requests, as fast as eight clients ask, while a job runs."""
    connection = Connection(server.port)
    large = {"image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 50}
    job = await submit(connection, **large, num_images=4)
    while (await connection.ask("GET", f"{REQUESTS}/{job}/status")).json()["status"] == "IN_QUEUE":
        await asyncio.sleep(0.01)
    end = time.perf_counter() + options.seconds
    counts: list[int] = []
    running = True

    async def poll() -> None:
        nonlocal running
        own, asked = Connection(server.port), 0
        while time.perf_counter() < end:
            answer = await own.ask("GET", f"{REQUESTS}/{job}/status")
            running &= answer.status == 202
            asked += 1
        counts.append(asked)
        await own.close()

    await asyncio.gather(*(poll() for _ in range(8)))
    await connection.ask("PUT", f"{REQUESTS}/{job}/cancel")
    await finished(connection, job)
    rate = sum(counts) / options.seconds
    return {"polls_a_second": rate, "running_all_along": running, "good": running and rate >= 1000}


async def cancel(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Cancel waiting and running jobs at random moments; the picture after each must be right."""
    random, connection = Random(1), Connection(server.port)
    right = await picture(connection, seed=5)
    long = {"image_size": {"width": 256, "height": 256}, "num_inference_steps": 50}
    start = time.perf_counter()
    await finished(connection, await submit(connection, **long))
    step = (time.perf_counter() - start) / 50
    seconds: dict[str, list[float]] = {"waiting": [], "running": []}
    wrong = late = 0
    for index in range(options.cancels):
        kind = "waiting" if index % 2 else "running"
        first = await submit(connection, **long, seed=index)
        second = await submit(connection, **long, seed=index) if kind == "waiting" else first
        await asyncio.sleep(random.uniform(0.02, 30 * step))
        begun = time.perf_counter()
        answer = await connection.ask("PUT", f"{REQUESTS}/{second}/cancel")
        status = await finished(connection, second)
        if answer.status == 202:
            seconds[kind].append(time.perf_counter() - begun)
            late += "error" not in status
        await connection.ask("PUT", f"{REQUESTS}/{first}/cancel")
        wrong += await picture(connection, seed=5) != right
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "cancels": sum(map(len, seconds.values())),
        "waiting_seconds": medians["waiting"],
        "running_seconds": medians["running"],
        "running_seconds_most": max(seconds["running"]),
        "step_seconds": step,
        "wrong_pictures": wrong,
        "ended_before": late,
        "good": not wrong and medians["running"] <= 2 * step + 0.05,
    }


def damaged_images(count: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, bytes): cut, bent and grafted files, bombs, headers that lie, other formats."""
    random = Random(7)
    picture = Image.effect_mandelbrot((320, 240), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    good = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        good[kind] = buffer.getvalue()
    yield from _monsters(good)
    readable = ("PNG", "JPEG", "WEBP")
    for index in range(count):
        kind = readable[index % 3]
        data = bytearray(good[kind])
        way = ("cut", "bent", "grafted", "doubled", "blanked")[index // 3 % 5]
        place = random.randrange(4, len(data))
        if way == "cut":
            del data[place:]
        elif way == "bent":
            for _ in range(random.randint(1, 40)):
                data[random.randrange(len(data))] = random.randrange(256)
        elif way == "grafted":
            data[place:] = good[readable[(index + 1) % 3]][place:]
        elif way == "doubled":
            data[place:place] = data[place // 2 : place]
        else:
            data[place : place + 64] = bytes(64)
        yield f"{kind} {way}", bytes(data)


def _monsters(good: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    for width, height in ((50_000, 50_000), (2**31 - 1, 1), (6000, 6000), (0, 5), (1, 2**31 - 1)):
        size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        pixels = chunk(b"IDAT", zlib.compress(bytes(4 * MIB), 9))
        end = chunk(b"IEND", b"")
        yield f"PNG of {width}x{height}", b"\x89PNG\r\n\x1a\n" + size + pixels + end
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(64 * MIB), 9))
    yield "PNG with a text bomb", good["PNG"][:33] + text + good["PNG"][33:]
    for kind in ("GIF", "BMP", "TIFF"):
        yield f"{kind} by any name", good[kind]
    yield from (
        (
            "SVG",
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        ),
        ("PDF", b"%PDF-1.7\n1 0 obj\n"),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n"),
        ("ZIP", b"PK\3\4" + bytes(60)),
        ("nothing", b""),
        ("text", b"a red fox"),
        ("zeros", bytes(MIB)),
    )


async def images(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Input images that are none, or not what they say: 422 or 413, never 5xx, little memory."""
    connection = Connection(server.port)
    arguments = {"prompt": "a fox", "num_inference_steps": 10, "strength": 0.1}
    arguments["enable_safety_checker"] = False
    path = f"/run/{MODEL}/image-to-image"

    async def ask(data: bytes) -> Answer:
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        return await connection.ask("POST", path, arguments | {"image_url": uri})

    buffer = io.BytesIO()
    Image.new("RGB", (320, 240), "red").save(buffer, "PNG")
    assert (await ask(buffer.getvalue())).status == 200
    before = server.memory("VmHWM")
    statuses: Counter[int] = Counter()
    bad = []
    for what, data in damaged_images(options.images):
        answer = await ask(data)
        statuses[answer.status] += 1
        if answer.status not in (200, 413, 422):
            bad.append(f"{what}: {answer.status} {answer.body[:100]!r}")
    grown = {pid: size - before.get(pid, 0) for pid, size in server.memory("VmHWM").items()}
    assert (await ask(buffer.getvalue())).status == 200
    extra = sum(grown.values())
    return {
        "files": sum(statuses.values()),
        "statuses": dict(statuses),
        "bad": bad[:10],
        "extra_mib": extra / MIB,
        "good": not bad and extra <= 256 * MIB,
    }


async def bodies(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Bodies that are cut, lie about their length, trickle, nest, or are no JSON at all."""
    path = f"/run/{MODEL}"
    good = json.dumps({"prompt": "a fox", **SMALL}).encode()
    port = server.port
    rows: list[tuple[str, bytes, bool]] = [
        ("no JSON", head("POST", path, port, 3) + b"{a}", False),
        ("nothing", head("POST", path, port, 0), False),
        ("a list", head("POST", path, port, 2) + b"[]", False),
        ("deep", head("POST", path, port, 200_000) + b"[" * 200_000, False),
        ("not UTF-8", head("POST", path, port, 4) + b'"\xff\xfe"', False),
        ("cut", head("POST", path, port, len(good) + 10) + good, True),
        ("too long", head("POST", path, port, 10**9) + good, False),
        ("length of words", head("POST", path, port, 0).replace(b" 0\r", b" many\r"), False),
        ("length below 0", head("POST", path, port, 0).replace(b" 0\r", b" -1\r"), False),
        ("NaN", head("POST", path, port, 31) + b'{"prompt":"","guidance_scale":NaN}'[:31], True),
    ]
    answers: dict[str, int | str] = {}
    for what, data, closes in rows:
        answers[what] = await _raw(port, data, closes)
    number = b'{"prompt": "", "seed": ' + b"9" * 5000 + b"}"
    answers["a seed of 5000 digits"] = await _raw(
        port, head("POST", path, port, len(number)) + number, False
    )
    huge = 80 * MIB
    answers["80 MiB"] = await _raw(port, head("POST", path, port, huge) + bytes(huge), False)
    bad = {what: status for what, status in answers.items() if str(status).startswith("5")}
    connection = Connection(port)
    alive = (await connection.ask("POST", path, {"prompt": "a fox", **SMALL})).status == 200
    return {"answers": answers, "bad": bad, "good": alive and not bad}


async def _raw(port: int, data: bytes, closes: bool) -> int | str:
    """The status that these bytes get, or how the connection ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await asyncio.wait_for(writer.drain(), 30)
            if closes:
                writer.write_eof()
        answer, _ = await asyncio.wait_for(read_answer(reader), 60)
    except (asyncio.IncompleteReadError, ConnectionError):
        return "closed"
    except asyncio.TimeoutError:
        return "silent for 60 s"
    finally:
        writer.close()
    return answer.status


Part = Callable[[Server, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
PARTS: dict[str, Part] = {
    "overhead": overhead,
    "load": load_at_once,
    "polls": polls,
    "cancel": cancel,
    "images": images,
    "bodies": bodies,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--jobs", type=positive, default=2000, help="submitted at once")
    parser.add_argument("--runs", type=positive, default=50, help="pictures for the overhead")
    parser.add_argument("--cancels", type=positive, default=200)
    parser.add_argument("--images", type=positive, default=500, help="damaged files")
    parser.add_argument("--seconds", type=positive, default=5, help="of polling")
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file too")
    options = parser.parse_args(arguments)
    all_good = True
    for name in options.parts:
        with serving() as server:
            figures = asyncio.run(PARTS[name](server, options))
        all_good &= figures["good"]
        line = json.dumps(
            {"part": name, **figures, "cores": os.cpu_count(), "versions": versions()}
        )
        print(line, flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
