"""Jobs from submission to picture, through real worker processes with the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TypeVar

import pytest
from PIL import Image

import krea_local
from krea_local.endpoints import Request, find_endpoint
from krea_local.errors import InvalidImage, InvalidRequest, OutputFailed
from krea_local.recipe import read_recipe
from krea_local.server import service as service_module
from krea_local.server.jobs import FINISHED, Job
from krea_local.server.service import Event, QueueFull, Service, Unavailable
from krea_local.server.settings import Settings

T = TypeVar("T")

KREA = find_endpoint("fal-ai/flux/krea")
REDRAW = find_endpoint("fal-ai/flux/krea/image-to-image")
SIZE = {"width": 128, "height": 128}
PATIENCE = 600.0  # seconds; on an idle machine all of this takes moments


def request(**arguments: object) -> Request:
    return KREA.parse(
        {"prompt": "a fox", "image_size": SIZE, "num_inference_steps": 2, "seed": 7, **arguments}
    )


def redraw(**arguments: object) -> Request:
    given = {"prompt": "a fox", "num_inference_steps": 10, "seed": 7, "strength": 0.2}
    return REDRAW.parse({**given, "image_url": "https://a.example/a.png", **arguments})


def long() -> Request:
    """A job that is still running when somebody looks."""
    return request(num_inference_steps=50, num_images=4, image_size={"width": 512, "height": 512})


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return buffer.getvalue()


class Running:
    """A service and the loop it lives in, which turns only while a test waits for something."""

    def __init__(self, folder: Path, **told: object) -> None:
        free = told.pop("free", None)
        settings = Settings(model="tiny", devices=("cpu",), folder=folder)
        settings = replace(settings, **told)  # type: ignore[arg-type]
        self.loop = asyncio.new_event_loop()
        self.service = Service(settings) if free is None else Service(settings, free=free)  # type: ignore[arg-type]
        try:
            self(self.service.start())
        except OutputFailed:
            self.close_loop()
            raise

    def __call__(self, work: Coroutine[None, None, T], seconds: float = PATIENCE) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, seconds))

    def until(self, there: Callable[[], bool], what: str = "it") -> None:
        async def wait() -> None:
            while not there():
                await asyncio.sleep(0.005)

        self(wait())

    def until_ready(self) -> None:
        self.until(lambda: self.service.ready)

    def submit(self, asked: Request, **told: object) -> Job:
        endpoint = REDRAW if hasattr(asked, "strength") else KREA
        return self(self.service.submit(endpoint, asked, **told))  # type: ignore[arg-type]

    def wait(self, job: Job) -> Job:
        return self(self.service.wait(job.id))

    def until_running(self, job: Job, fraction: float = 0.0) -> None:
        async def watch() -> None:
            async for event in self.service.events(job.id):
                assert event.job.state not in FINISHED, "too fast for this test"
                if event.job.state == "running" and event.fraction >= fraction:
                    return

        self(watch())

    def bytes(self, job: Job) -> list[bytes]:
        assert job.outcome is not None, job
        files = [picture.file for picture in job.outcome.pictures]
        return [Path(self.service.file_path(file)).read_bytes() for file in files]

    def worker_pid(self) -> int:
        pid = self.service.workers()[0].pid
        assert pid is not None
        return pid

    def stop(self, seconds: float = 0.0) -> None:
        self(self.service.stop(seconds=seconds))
        self.close_loop()

    def close_loop(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    one = Running(tmp_path_factory.mktemp("server"))
    one.until_ready()
    yield one
    one.stop()


@pytest.fixture
def service(running: Running) -> Service:
    return running.service


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts services of a test's own, over one folder."""
    started: list[Running] = []

    def begin(**told: object) -> Running:
        started.append(Running(tmp_path / "store", **told))
        return started[-1]

    yield begin
    for one in started:
        if not one.loop.is_closed():
            one.stop()


@dataclass
class Limited:
    """A service of two workers and narrow limits, and how much room its disk has."""

    running: Running
    room: int = 10**12


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    room = [lambda: 10**12]
    one = Running(
        tmp_path_factory.mktemp("limited"),
        devices=("cpu", "cpu"),
        max_queue=2,
        private_urls=True,
        free=lambda folder: room[0](),
    )
    found = Limited(one)
    room[0] = lambda: found.room
    one.until(lambda: [facts.state for facts in one.service.workers()] == ["idle", "idle"])
    yield found
    one.stop()


def test_a_job_becomes_the_picture_that_the_library_draws(
    running: Running, service: Service, tmp_path: Path
) -> None:
    ended = running.wait(running.submit(request(num_images=2, output_format="png")))
    assert ended.state == "done"
    assert ended.outcome is not None
    assert (ended.attempts, ended.outcome.seed) == (1, 7)
    assert ended.outcome.has_nsfw_concepts == (False, False)
    assert ended.outcome.timings["inference"] == ended.outcome.timings["total"] > 0
    drawn = running.bytes(ended)
    krea = krea_local.load("tiny", device="cpu")
    whole = krea.run(request(num_images=2, output_format="png"))
    for picture, data, image in zip(ended.outcome.pictures, drawn, whole.images, strict=True):
        assert (picture.width, picture.height) == (128, 128)
        assert picture.file.content_type == "image/png"
        assert picture.file.size == len(data)
        assert service.file(picture.file.id) == picture.file
        assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()
    path = tmp_path / "a.png"
    path.write_bytes(drawn[1])
    assert read_recipe(path)["seed"] == 8


def test_the_same_request_twice_has_the_same_bytes_and_a_seed_is_fixed_at_once(
    running: Running,
) -> None:
    first = running.submit(request(seed=None))
    seed = first.arguments["seed"]
    assert isinstance(seed, int)
    again = running.submit(request(seed=seed))
    assert running.bytes(running.wait(first)) == running.bytes(running.wait(again))
    assert first.arguments == again.arguments


def test_events_begin_with_the_state_and_end_with_the_end(
    running: Running, service: Service
) -> None:
    async def watch(job: Job) -> list[Event]:
        return [event async for event in service.events(job.id, previews=True)]

    async def work() -> tuple[Job, list[Event]]:
        before = await service.submit(KREA, long())
        job = await service.submit(KREA, request(num_inference_steps=4))
        watching = asyncio.create_task(watch(job))
        await asyncio.sleep(0)
        await service.cancel(before.id)
        return job, await watching

    job, events = running(work())
    assert events[0].kind == "state"
    assert events[-1].kind == "state"
    assert events[-1].job.state == "done"
    progress = [event for event in events if event.kind == "progress"]
    fractions = [event.fraction for event in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert {event.num_steps for event in progress} == {4}
    previews = [event.preview for event in progress if event.preview]
    assert previews
    assert Image.open(io.BytesIO(previews[0])).format == "JPEG"
    said = [event.log.message for event in events if event.log]
    assert said == [log.message for log in service.logs(job.id)]
    assert said[0] == "attempt 1 starts on cpu"
    assert said[-1].startswith("done in ")
    assert [event.job.state for event in running(watch(job))] == ["done"]


def test_previews_are_made_for_whom_they_are_and_for_nobody_else(
    running: Running, service: Service
) -> None:
    async def seen(job: Job) -> list[Event]:
        return [event async for event in service.events(job.id)]

    async def work() -> tuple[list[Event], list[Event], Event]:
        unwatched = await seen(await service.submit(KREA, request(num_inference_steps=4)))
        from_the_start = await seen(await service.submit(KREA, request(), previews=True))
        job = await service.submit(KREA, long())
        async for event in service.events(job.id):
            if event.kind == "progress":
                assert event.preview is None
                break
        async for event in service.events(job.id, previews=True):
            if event.preview is not None:
                await service.cancel(job.id)
                break
        await service.wait(job.id)
        return unwatched, from_the_start, event

    unwatched, from_the_start, late = running(work())
    assert [event for event in unwatched if event.kind == "progress"]
    assert not [event for event in unwatched if event.preview]
    assert next(event.step for event in from_the_start if event.preview) == 1
    assert late.job.state == "running"


def test_a_reader_that_does_not_read_misses_progress_but_not_the_end(
    running: Running, service: Service
) -> None:
    async def work() -> list[Event]:
        job = await service.submit(KREA, request(num_inference_steps=50))
        events = service.events(job.id)
        first = await events.__anext__()
        await service.wait(job.id)
        return [first, *[event async for event in events]]

    events = running(work())
    assert len([event for event in events if event.kind == "progress"]) <= 16
    assert events[-1].job.state == "done"


def test_an_image_is_redrawn_from_bytes_or_an_upload_alike(
    running: Running, service: Service
) -> None:
    data = png()
    upload = running(service.store_upload(data, 'a/b"c.png'))
    assert (upload.name, upload.content_type, upload.size) == ("b_c.png", "image/png", len(data))
    assert Path(service.file_path(upload)).read_bytes() == data
    from_bytes = running.wait(running.submit(redraw(), image=data))
    from_upload = running.wait(running.submit(redraw(), image=upload))
    assert from_bytes.state == "done", from_bytes
    assert running.bytes(from_bytes) == running.bytes(from_upload)
    assert re.fullmatch(r"/files/[0-9a-f]{32}", str(from_bytes.arguments["image_url"]))


def test_bytes_that_are_no_image_are_refused_at_once(running: Running, service: Service) -> None:
    with pytest.raises(InvalidImage):
        running.submit(redraw(), image=b"GIF89a" + bytes(100))
    with pytest.raises(InvalidImage):
        running(service.store_upload(png()[:60], "a.png"))


def test_a_strip_too_long_to_redraw_fails_with_the_hosted_apis_422(running: Running) -> None:
    ended = running.wait(running.submit(redraw(), image=png((10_000, 2))))
    assert ended.state == "failed"
    assert ended.failure is not None
    assert ended.failure.status == 422


def test_a_url_on_a_private_address_fails_that_job_alone(running: Running) -> None:
    lost = running.submit(redraw(), image="http://127.0.0.1:9/a.png")
    fine = running.submit(request())
    assert running.wait(fine).state == "done"
    ended = running.wait(lost)
    assert ended.failure is not None
    assert ended.failure.status == 422
    ((fault,),) = [ended.failure.body["detail"]]  # type: ignore[misc]
    assert fault["type"] == "file_download_error"
    assert fault["msg"] == "Could not load image from url: http://127.0.0.1:9/a.png"
    assert ended.attempts == 0


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_within_a_step(
    running: Running, service: Service
) -> None:
    runs, waits = running.submit(long()), running.submit(request())
    running.until_running(runs, fraction=0.01)
    assert (service.position(runs.id), service.position(waits.id)) == (0, 0)
    assert running(service.cancel(waits.id)) == "requested"
    ended = service.get(waits.id)
    assert ended is not None
    assert (ended.state, ended.attempts) == ("cancelled", 0)
    assert running(service.cancel(runs.id)) == "requested"
    assert running.wait(runs).state == "cancelled"
    assert running(service.cancel(runs.id)) == "already"
    assert running(service.cancel("nobody")) == "missing"
    # And the next picture is right.
    before = running.bytes(running.wait(running.submit(request())))
    assert before == running.bytes(running.wait(running.submit(request())))


def test_cancelled_at_any_moment_a_job_ends_as_one_and_the_next_picture_is_right(
    running: Running, service: Service
) -> None:
    expected = running.bytes(running.wait(running.submit(request())))
    chance = random.Random(0)

    async def work() -> list[Job]:
        ended = []
        for _ in range(20):
            job = await service.submit(KREA, request(num_inference_steps=50))
            steps = chance.randint(0, 12)
            async for event in service.events(job.id):
                steps -= event.kind == "progress"
                if steps <= 0:
                    break
            told = await service.cancel(job.id)
            ended.append(await service.wait(job.id))
            assert told == "requested"
        return ended

    ended = running(work())
    assert {job.state for job in ended} == {"cancelled"}
    assert running.bytes(running.wait(running.submit(request()))) == expected


def test_a_job_of_low_priority_starts_after_all_others(running: Running, service: Service) -> None:
    async def work() -> list[Job]:
        jobs = [await service.submit(KREA, long())]
        jobs.append(await service.submit(KREA, request(), low_priority=True))
        jobs += [await service.submit(KREA, request()) for _ in range(3)]
        await service.cancel(jobs[0].id)
        return [await service.wait(job.id) for job in jobs[1:]]

    low, *others = running(work())
    assert low.started is not None
    assert all(job.started is not None and job.started < low.started for job in others)


def test_a_job_that_did_not_start_in_time_is_a_504(running: Running, service: Service) -> None:
    first = running.submit(long())
    late = running.wait(running.submit(request(), start_within=0.05))
    assert late.failure is not None
    assert (late.failure.status, late.failure.error_type) == (504, "request_timeout")
    assert late.attempts == 0
    running(service.cancel(first.id))
    running.wait(first)


def test_two_thousand_submits_at_once_keep_their_order_and_status_is_fast(
    running: Running, service: Service
) -> None:
    async def work() -> tuple[list[Job], int]:
        jobs = await asyncio.gather(*(service.submit(KREA, request()) for _ in range(2000)))
        end, polls = time.process_time() + 0.5, 0
        while time.process_time() < end:
            job = service.get(jobs[polls % 2000].id)
            assert job is not None
            service.position(job.id)
            polls += 1
        return jobs, polls

    jobs, polls = running(work())
    assert polls >= 500
    waiting = [job for job in jobs if job.id in service._board.queue]
    assert [service.position(job.id) for job in waiting] == list(range(len(waiting)))
    assert [job.id for job in service.recent(limit=2000)] == [job.id for job in reversed(jobs)]

    async def cancel_all() -> None:
        await asyncio.gather(*(service.cancel(job.id) for job in jobs))
        for job in jobs:
            await service.wait(job.id)

    running(cancel_all())
    assert service.queue_length == 0


def test_a_finished_job_is_forgotten_with_its_files(running: Running, service: Service) -> None:
    ended = running.wait(running.submit(request()))
    assert ended.outcome is not None
    file = ended.outcome.pictures[0].file
    assert running(service.delete(ended.id)) is True
    assert service.get(ended.id) is None
    assert service.file(file.id) is None
    assert not Path(service.file_path(file)).exists()
    with pytest.raises(KeyError):
        running.wait(ended)


def test_a_job_that_still_fetches_its_lora_is_cancelled_and_the_model_stays(
    start: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = threading.Event()
    endpoint = find_endpoint("fal-ai/flux-krea-lora")

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            asked.set()
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(b".")
                    time.sleep(0.02)

    running = start(private_urls=True)
    running.until_ready()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(60)
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.safetensors"
        lora = endpoint.parse({"prompt": "a", "loras": [{"path": url}]})
        worker = running.worker_pid()
        job = running(running.service.submit(endpoint, lora))
        running.until(asked.is_set)
        assert running(running.service.cancel(job.id)) == "requested"
        assert running.wait(job).state == "cancelled"
        thread.join(60)
    assert running.wait(running.submit(request())).state == "done"
    assert running.worker_pid() == worker


def test_a_lora_is_not_fetched_from_anywhere_but_the_hub(running: Running) -> None:
    endpoint = find_endpoint("fal-ai/flux-krea-lora")
    lora = {"path": "http://169.254.169.254/a.safetensors"}
    asked = endpoint.parse({"prompt": "a", "loras": [lora]})
    with pytest.raises(InvalidRequest, match="not on the Hugging Face hub"):
        running(running.service.submit(endpoint, asked))


def test_a_worker_that_is_killed_comes_back_and_its_job_is_the_same_picture(
    running: Running, service: Service
) -> None:
    expected = running.bytes(running.wait(running.submit(request(num_inference_steps=50))))
    job = running.submit(request(num_inference_steps=50))
    running.until_running(job)
    os.kill(running.worker_pid(), signal.SIGKILL)
    ended = running.wait(job)
    assert (ended.state, ended.attempts) == ("done", 2)
    assert running.bytes(ended) == expected
    assert any("it waits again" in log.message for log in service.logs(job.id))


def test_a_stopped_server_hands_back_what_runs_and_the_next_one_draws_it(
    start: Callable[..., Running],
) -> None:
    first = start()
    first.until_ready()
    runs, waits = first.submit(long()), first.submit(request())
    first.until_running(runs)
    with pytest.raises(OutputFailed, match="another server"):
        start()
    pid = first.worker_pid()
    first.stop(seconds=0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    later = start()
    found = later.service.get(runs.id)
    assert found is not None
    assert (found.state, found.attempts) == ("queued", 0)
    assert [later.service.position(job.id) for job in (runs, waits)] == [0, 1]
    later(later.service.cancel(runs.id))
    assert later.wait(waits).state == "done"


def test_weights_that_are_not_there_are_told_at_once_and_jobs_wait(
    start: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "krea_local.server.dispatch")
    one = start(model=str(tmp_path / "nowhere"))
    one.until(lambda: bool(one.service.workers()[0].reason))
    facts = one.service.workers()[0]
    assert "nowhere" in facts.reason
    assert not one.service.ready
    job = one.submit(request())
    one.until(lambda: one.service.workers()[0].state == "loading")  # it keeps trying
    found = one.service.get(job.id)
    assert found is not None
    assert found.state == "queued"

    def levels() -> list[str]:
        return [one.levelname for one in caplog.records if "the worker of" in one.getMessage()]

    one.until(lambda: len(levels()) > 1)
    assert levels()[:2] == ["ERROR", "INFO"]  # the same again is no news
    one.stop()
    with pytest.raises(Unavailable, match="stopping"):
        one.service._refuse_if_unavailable()


def test_a_full_disk_pauses_the_queue_until_there_is_room(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LOOK_SECONDS", 0.05)
    one = limited.running
    job = one.submit(long())
    other = one.submit(long())
    waits = one.submit(request())
    limited.room = 0
    with pytest.raises(Unavailable, match="disk is full"):
        one.submit(request())
    for running_job in (job, other):
        one(one.service.cancel(running_job.id))
        one.wait(running_job)
    one.until(lambda: {facts.state for facts in one.service.workers()} == {"idle"})
    found = one.service.get(waits.id)
    assert found is not None
    assert found.state == "queued"
    limited.room = 10**12
    assert one.wait(waits).state == "done"


def test_two_devices_share_a_queue_that_has_its_limit(limited: Limited) -> None:
    one = limited.running
    jobs = [one.submit(long()), one.submit(long())]
    one.until(lambda: {facts.state for facts in one.service.workers()} == {"busy"})
    assert {facts.job for facts in one.service.workers()} == {job.id for job in jobs}
    jobs += [one.submit(request()), one.submit(request())]
    with pytest.raises(QueueFull) as full:
        one.submit(request())
    assert 1 <= full.value.retry_after <= 600
    for job in reversed(jobs):  # those that wait first, or they would start
        one(one.service.cancel(job.id))
        assert one.wait(job).state == "cancelled"


def test_a_job_that_takes_too_long_is_stopped(
    limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = limited.running
    monkeypatch.setattr(one.service._dispatcher, "_seconds", 0.3)
    ended = one.wait(one.submit(long()))
    assert ended.failure is not None
    assert (ended.failure.status, ended.failure.error_type) == (500, "generation_timeout")


def test_an_image_by_url_is_fetched_while_its_job_waits(limited: Limited) -> None:
    data = png()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    one = limited.running
    before = [one.submit(long()), one.submit(long())]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/a.png?key=secret"
        job = one.submit(redraw(), image=url)
        one.until(lambda: one.service._store.waiting()[0][1].input is not None)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    for other in before:
        one(one.service.cancel(other.id))
    from_url = one.wait(job)
    assert from_url.state == "done", from_url
    from_bytes = one.wait(one.submit(redraw(), image=data))
    assert one.bytes(from_url) == one.bytes(from_bytes)
