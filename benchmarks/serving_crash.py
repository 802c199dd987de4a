"""Whether anything is lost when it is killed: `python -m benchmarks.serving_crash`.

Submits jobs to a server, kills server or worker with -9 at random moments, while models are loaded
and pictures drawn alike, and looks at what is on the disk in the end: every job that was answered
must be done, every file whole, and every request, of which each is made twice, the same bytes both
times, however often it was begun. The last line is one JSON object.

Needs no GPU: the tiny model's pictures are as good to lose as any.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from krea_local.endpoints import find_endpoint
from krea_local.server.jobs import FINISHED, Job
from krea_local.server.service import Service
from krea_local.server.settings import Settings
from krea_local.server.store import Store

WINDOW = 20  # jobs that wait at a time
REDRAWN = 5  # one request of so many has an input image
LOADING_KILLS = 0.25  # share of the kills that do not wait until a job has ended
START_SECONDS = 900.0  # on a machine that has much else to do


@dataclass
class Report:
    """What came of it; all but the first four should be 0."""

    jobs: int = 0
    server_kills: int = 0
    worker_kills: int = 0
    begun_again: int = 0
    lost: int = 0
    failed: int = 0
    torn: int = 0
    different: int = 0
    orphans: int = 0
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, torn or different."""
        return not any((self.lost, self.failed, self.torn, self.different, self.orphans))


def asked(number: int) -> tuple[str, dict[str, object]]:
    """The endpoint and arguments of job `number`; each two are the same."""
    pair = number // 2
    arguments: dict[str, object] = {
        "prompt": f"a red fox in fresh snow, number {pair}",
        "seed": pair,
        "output_format": ("png", "jpeg")[pair % 2],
    }
    if pair % REDRAWN == 0:
        redrawn = {"num_inference_steps": 10, "image_url": "data:", "strength": 0.3}
        return "fal-ai/flux/krea/image-to-image", {**arguments, **redrawn}
    size = {"width": 128, "height": 128}
    return "fal-ai/flux/krea", {**arguments, "num_inference_steps": 4, "image_size": size}


def input_image() -> bytes:
    """The image that is redrawn."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


# The server: a service that is asked over pipes.


async def host(folder: Path) -> None:
    """Run a service; orders and answers are lines of JSON."""
    service = Service(Settings(model="tiny", devices=("cpu",), folder=folder))
    await service.start()
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(orders.put_nowait, json.loads(line))

    threading.Thread(target=read, daemon=True).start()
    tasks = set()
    say(kind="started")
    while (order := await orders.get())["kind"] != "stop":
        if order["kind"] == "submit":
            task = asyncio.create_task(submit(service, order["number"]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            jobs = [service.get(one) for one in order["ids"]]
            ended = [job.id for job in jobs if job is not None and job.state in FINISHED]
            say(kind="looked", ended=ended, worker=service.workers()[0].pid)
    await service.stop()
    say(kind="stopped")


async def submit(service: Service, number: int) -> None:
    """Submit a job and answer with its id."""
    name, arguments = asked(number)
    endpoint = find_endpoint(name)
    image = input_image() if "image_url" in arguments else None
    job = await service.submit(endpoint, endpoint.parse(arguments), image=image)
    say(kind="submitted", number=number, id=job.id)


def say(**told: object) -> None:
    """Answer in one write, so that a kill does not leave half a line among others."""
    os.write(1, json.dumps(told).encode() + b"\n")


# The client, which kills.


class Server:
    """The server's process, as its client sees it."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving_crash", "--host", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()
        self.worker: int | None = None
        started = self._answers.get(timeout=START_SECONDS)
        assert started["kind"] == "started", started

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if line.endswith(b"\n"):
                self._answers.put(json.loads(line))
        self._answers.put({"kind": "gone"})

    def send(self, **order: object) -> None:
        """Ask for something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def answers(self) -> Iterator[dict[str, Any]]:
        """What it said since the last time."""
        while not self._answers.empty():
            answer = self._answers.get()
            assert answer["kind"] != "gone", "the server ended without being told to"
            self.worker = answer.get("worker", self.worker)
            yield answer

    def kill(self) -> bool:
        """Kill it with -9; whether its worker outlived it."""
        self._process.kill()
        self._end()
        deadline = time.monotonic() + 10
        while self.worker is not None and is_alive(self.worker):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        """End it as a signal would."""
        self.send(kind="stop")
        self._end()

    def _end(self) -> None:
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


def is_alive(pid: int) -> bool:
    """Whether that process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass
class Crash:
    """One run of it.

    Attributes:
        ids: of the jobs that were answered, by number.
        ended: those that are known to have ended.
    """

    folder: Path
    jobs: int
    kills: int
    chance: random.Random
    report: Report = field(default_factory=Report)
    ids: dict[int, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def run(self) -> Report:
        """Submit, kill, and look at what is left."""
        start = time.monotonic()
        server = Server(self.folder)
        sent: set[int] = set()
        looked = 0.0
        kill_at = self._next_kill()
        while len(self.ended) < self.jobs or self.kills_left:
            for answer in server.answers():
                self._hear(answer)
            open_jobs = [one for one in self.ids.values() if one not in self.ended]
            if len(sent) < self.jobs and len(sent) - len(self.ended) < WINDOW:
                number = next(n for n in range(self.jobs) if n not in sent)
                sent.add(number)
                server.send(kind="submit", number=number)
            if time.monotonic() - looked > 0.02:
                looked = time.monotonic()
                server.send(kind="look", ids=open_jobs)
            if self.kills_left and kill_at is not None and time.monotonic() >= kill_at:
                server = self._kill(server)
                sent = set(self.ids)  # what was not answered is sent again, as clients do
                kill_at = self._next_kill()
            if kill_at is None and len(self.ended) >= self._enough:
                kill_at = time.monotonic() + self.chance.uniform(0, 0.2)
            time.sleep(0.002)
        server.stop()
        self.report.seconds = round(time.monotonic() - start, 1)
        self._judge()
        return self.report

    @property
    def kills_left(self) -> int:
        """How many kills there are to be yet."""
        return self.kills - self.report.server_kills - self.report.worker_kills

    def _next_kill(self) -> float | None:
        """When the next kill is; None for once some more jobs have ended."""
        if self.chance.random() < LOADING_KILLS:
            return time.monotonic() + self.chance.uniform(0, 3)
        left = self.jobs - len(self.ended)
        most = max(1, 2 * left // max(1, self.kills_left) - 1)
        self._enough = min(self.jobs, len(self.ended) + self.chance.randint(1, most))
        return None

    _enough = 0

    def _hear(self, answer: dict[str, Any]) -> None:
        if answer["kind"] == "submitted":
            self.ids[answer["number"]] = answer["id"]
        elif answer["kind"] == "looked":
            self.ended.update(answer["ended"])

    def _kill(self, server: Server) -> Server:
        if self.chance.random() < 0.5 and server.worker is not None:
            try:
                os.kill(server.worker, signal.SIGKILL)
            except ProcessLookupError:
                return server
            self.report.worker_kills += 1
            return server
        self.report.orphans += server.kill()
        self.report.server_kills += 1
        # What it had answered before it died counts.
        while not server._answers.empty():
            answer = server._answers.get()
            if answer["kind"] != "gone":
                self._hear(answer)
        return Server(self.folder)

    def _judge(self) -> None:
        """Look at the disk."""
        report = self.report
        report.jobs = len(self.ids)
        store = Store(self.folder)
        try:
            made: dict[int, bytes] = {}
            for number, one in sorted(self.ids.items()):
                job = store.job(one)
                if job is None or job.state not in FINISHED:
                    report.lost += 1
                    continue
                report.begun_again += job.attempts > 1
                data = self._picture(store, job)
                if data is None:
                    continue
                report.different += made.setdefault(number // 2, data) != data
        finally:
            store.close()

    def _picture(self, store: Store, job: Job) -> bytes | None:
        """The file of a job, if it is whole."""
        if job.outcome is None:
            print(f"{job.id}: {job.state}: {job.failure}")
            self.report.failed += 1
            return None
        file = job.outcome.pictures[0].file
        try:
            data = store.files.path(file.id).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            assert len(data) == file.size
        except (OSError, SyntaxError, AssertionError) as error:
            print(f"{job.id}: {error}")
            self.report.torn += 1
            return None
        return data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    parser.add_argument("--host", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.host is not None:
        asyncio.run(host(options.host))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "server"
        chance = random.Random(options.seed)
        report = Crash(folder, options.jobs, options.kills, chance).run()
    print(json.dumps(asdict(report)))
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
