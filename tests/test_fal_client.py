"""The in-process twin of the official client: the same programs, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.server
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

import krea_local
from krea_local import InvalidRequest, api, fal_client
from krea_local.fal_client import jobs
from krea_local.fal_client.calls import QUEUE

if TYPE_CHECKING:
    from krea_local.pipeline import Krea

APP = "fal-ai/flux/krea"
REDRAW = "fal-ai/flux/krea/image-to-image"
SMALL = {
    "prompt": "a fox",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 2,
    "seed": 1,
}


@pytest.fixture
def twin(krea: Krea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Krea]:
    """The tiny model draws; pictures go to a folder of the test."""
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path))
    fal_client.use(krea)
    yield krea
    fal_client.configure()


@contextlib.contextmanager
def busy(krea: Krea) -> Iterator[fal_client.SyncRequestHandle]:
    """A request is being drawn, and gets no further before the block ends."""
    with krea._lock:
        handle = fal_client.submit(APP, SMALL)
        for status in handle.iter_events(interval=0):
            if isinstance(status, fal_client.InProgress):
                break
        yield handle
    handle.get()


def refused(status: int, call: Any) -> fal_client.FalClientHTTPError:
    with pytest.raises(fal_client.FalClientHTTPError) as raised:
        call()
    error = raised.value
    assert error.status_code == error.response.status_code == status
    return error


def file_of(url: str) -> Path:
    return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


# The programs of the hosted API's page, but for their import and the second's address.
PROGRAM = """
import fal_client

def on_queue_update(update):
    if isinstance(update, fal_client.InProgress):
        for log in update.logs:
           print(log["message"])

result = fal_client.subscribe(
    "fal-ai/flux/krea",
    arguments={
        "prompt": "A candid street photo of a woman with a pink bob and bold eyeliner on a graffiti-covered subway platform. She wears a bright yellow patent leather coat over a black-and-white checkered turtleneck and platform boots. Natural subway lighting creates an authentic urban scene with a relaxed, unposed feel."
    },
    with_logs=True,
    on_queue_update=on_queue_update,
)
print(result)
"""  # noqa: E501
REDRAWING_PROGRAM = """
import fal_client

def on_queue_update(update):
    if isinstance(update, fal_client.InProgress):
        for log in update.logs:
           print(log["message"])

result = fal_client.subscribe(
    "fal-ai/flux/krea/image-to-image",
    arguments={
        "image_url": "https://fal.media/files/koala/Chls9L2ZnvuipUTEwlnJC.png",
        "prompt": "A cat dressed as a wizard with a background of a mystic forest."
    },
    with_logs=True,
    on_queue_update=on_queue_update,
)
print(result)
"""


@pytest.mark.parametrize("program", [PROGRAM, REDRAWING_PROGRAM], ids=["text", "image"])
def test_the_programs_of_the_hosted_apis_page_run_with_another_import(
    program: str,
    no_models_kept: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KREA_LOCAL_MODEL", "tiny")
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path / "out"))
    folder = tmp_path / "files" / "koala"
    folder.mkdir(parents=True)
    Image.new("RGB", (96, 64), "teal").save(folder / "Chls9L2ZnvuipUTEwlnJC.png")
    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            program = program.replace("import fal_client", "from krea_local import fal_client")
            program = program.replace("https://fal.media", f"http://127.0.0.1:{server.server_port}")
            names: dict[str, Any] = {}
            exec(program, names)
        finally:
            server.shutdown()
    result = names["result"]
    assert capsys.readouterr().out.endswith(f"{result}\n")
    assert set(result) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    (image,) = result["images"]
    size = (1024, 768) if program.count("image-to-image") == 0 else (96, 64)
    assert (image["width"], image["height"]) == size
    assert image["content_type"] == "image/jpeg"
    with Image.open(file_of(image["url"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", size)
    assert 0 <= result["seed"] < 2**32


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_a_request_is_drawn_as_txt2img_draws_it(twin: Krea) -> None:
    seen: list[Any] = []
    ids: list[str] = []
    result = fal_client.subscribe(
        APP,
        {**SMALL, "num_images": "2", "sync_mode": True, "output_format": "png", "unknown": 1},
        with_logs=True,
        on_enqueue=ids.append,
        on_queue_update=seen.append,
    )
    own = twin.txt2img(
        "a fox",
        image_size={"width": 64, "height": 64},
        num_inference_steps=2,
        seed=1,
        guidance_scale=4.5,
        num_images=2,
        sync_mode=True,
        output_format="png",
    ).to_api()
    assert result["images"] == own["images"]
    assert result["images"][0]["url"].startswith("data:image/png;base64,")
    end = seen[-1]
    assert isinstance(end, fal_client.Completed)
    assert (end.error, end.error_type) == (None, None)
    assert end.metrics["inference_time"] > 0
    assert [log["message"] for log in end.logs] == [
        "1/2 of image 1/2",
        "2/2 of image 1/2",
        "1/2 of image 2/2",
        "2/2 of image 2/2",
    ]
    assert {(log["level"], log["source"]) for log in end.logs} == {("INFO", "USER")}
    assert all(log["timestamp"].endswith("+00:00") for log in end.logs)
    assert fal_client.status(APP, ids[0]) == dataclasses.replace(end, logs=None)
    assert fal_client.result("fal-ai/flux", ids[0]) == result
    fal_client.result(APP, ids[0])["images"].clear()
    assert fal_client.result(APP, ids[0]) == result


def test_requests_wait_in_order_and_those_of_low_priority_last(twin: Krea) -> None:
    with busy(twin):
        low = fal_client.submit(APP, SMALL, priority="low")
        lowest = fal_client.submit(APP, SMALL, headers={"x-fal-queue-priority": "low"})
        first = fal_client.submit(APP, SMALL)
        second = fal_client.submit(APP, SMALL, hint="any", priority="normal")
        positions = [handle.status() for handle in (first, second, low, lowest)]
        assert positions == [fal_client.Queued(position) for position in range(4)]
        first.cancel()
        assert second.status() == fal_client.Queued(0)
        events = low.iter_events(interval=0)
        assert next(events) == fal_client.Queued(1)
    lowest.get()
    assert [handle.status().error for handle in (second, low, lowest)] == [None] * 3
    assert isinstance(list(events)[-1], fal_client.Completed)
    ended: list[str] = []
    with contextlib.ExitStack() as listening:
        with busy(twin):
            for name in ("low", "normal"):
                job = fal_client.submit(APP, SMALL, priority=name)._job

                def listener(name: str = name, job: jobs.Job = job) -> None:
                    if job.finished:
                        ended.append(name)

                listening.enter_context(QUEUE.listening(job, listener))
            last = fal_client.submit(APP, SMALL, priority="low")
        last.get()
    assert ended == ["normal", "low"]


def test_many_threads_submit_at_once(twin: Krea) -> None:
    def draw(seed: int) -> None:
        arguments = {**SMALL, "seed": seed, "sync_mode": True}
        drawn[seed] = fal_client.run(APP, arguments)["images"][0]["url"]

    drawn: dict[int, str] = {}
    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn.values())) == 6
    alone = fal_client.run(APP, {**SMALL, "seed": 4, "sync_mode": True})
    assert drawn[4] == alone["images"][0]["url"]


def test_a_request_that_waits_is_cancelled_at_once(twin: Krea) -> None:
    with busy(twin):
        handle = fal_client.submit(APP, SMALL)
        fal_client.cancel(APP, handle.request_id)
        status = handle.status(with_logs=True)
        assert status == fal_client.Completed(
            logs=[],
            metrics={"inference_time": 0.0},
            error="Request was cancelled",
            error_type="client_cancelled",
        )
        assert refused(499, handle.get).error_type == "client_cancelled"
        assert refused(400, handle.cancel).response.json() == {"status": "ALREADY_COMPLETED"}


def test_a_request_that_is_drawn_is_cancelled_within_a_step(twin: Krea) -> None:
    with busy(twin):
        handle = fal_client.submit(APP, {**SMALL, "num_inference_steps": 50})
        job = handle._job

        def cancel_after_three() -> None:
            if len(job.logs) == 3 and not job.cancelled:
                QUEUE.cancel(job)

        listening = QUEUE.listening(job, cancel_after_three)
        listening.__enter__()
    error = refused(499, handle.get)
    listening.__exit__(None, None, None)
    assert isinstance(error.__cause__, krea_local.Cancelled)
    assert [log["message"] for log in handle.status(with_logs=True).logs] == [
        "1/50",
        "2/50",
        "3/50",
    ]
    assert fal_client.run(APP, SMALL)["seed"] == 1


def test_a_request_that_is_over_cannot_be_cancelled_and_an_unknown_one_is_missing(
    twin: Krea,
) -> None:
    handle = fal_client.submit(APP, SMALL)
    handle.get()
    assert refused(400, handle.cancel).response.json() == {"status": "ALREADY_COMPLETED"}
    for application, request_id in ((APP, "nobody"), ("fal-ai/other", handle.request_id)):
        for call in (fal_client.status, fal_client.result):
            refused(404, functools.partial(call, application, request_id))
        error = refused(404, functools.partial(fal_client.cancel, application, request_id))
        assert error.response.json() == {"status": "NOT_FOUND"}
    with pytest.raises(ValueError, match="owner/alias"):
        fal_client.status("flux", handle.request_id)


def test_a_request_that_is_not_begun_in_time_fails_while_it_waits(twin: Krea) -> None:
    with busy(twin):
        handle = fal_client.submit(APP, SMALL, start_timeout=1.01)
        error = refused(504, handle.get)
        assert error.error_type == "request_timeout"
        assert error.response_headers["x-fal-request-timeout-type"] == "user"
        assert handle.status().error_type == "request_timeout"
        late = fal_client.submit(APP, SMALL, headers={"X-Fal-Request-Timeout": "1.01"})
        assert isinstance(list(late.iter_events())[-1], fal_client.Completed)
    assert fal_client.run(APP, SMALL, start_timeout=600)["seed"] == 1
    for seconds in (1, 0, -1, "soon", float("nan")):
        with pytest.raises(ValueError, match="start_timeout"):
            fal_client.run(APP, SMALL, start_timeout=seconds)
    with pytest.raises(ValueError, match="'normal' or 'low'"):
        fal_client.submit(APP, SMALL, priority="high")


def test_callers_wait_no_longer_than_they_say(twin: Krea) -> None:
    def last() -> Any:
        return list(QUEUE._jobs.values())[-1]

    with busy(twin):
        with pytest.raises(fal_client.FalClientTimeoutError) as raised:
            fal_client.subscribe(APP, SMALL, client_timeout=1.05)
        assert raised.value.timeout == 1.05
        assert raised.value.request_id == last().id
        assert raised.value.request_id in str(raised.value)
        assert isinstance(raised.value, TimeoutError)
        assert last().finished
        with pytest.raises(fal_client.FalClientTimeoutError):
            fal_client.subscribe(APP, SMALL, client_timeout=1.05, on_queue_update=print)
        with pytest.raises(fal_client.FalClientTimeoutError):
            asyncio.run(fal_client.subscribe_async(APP, SMALL, client_timeout=1.05))
        with pytest.raises(httpx.ReadTimeout):
            fal_client.run(APP, SMALL, timeout=0.05)
        with pytest.raises(httpx.ReadTimeout):
            asyncio.run(fal_client.run_async(APP, SMALL, timeout=0.05))
        with pytest.raises(httpx.ReadTimeout):
            list(fal_client.stream(APP, SMALL, timeout=0.05))
        assert last().finished
    with pytest.warns(UserWarning, match="client_timeout=60"):
        fal_client.subscribe(APP, SMALL, client_timeout=60, start_timeout=61)


def test_errors_are_those_of_the_hosted_api(twin: Krea, tmp_path: Path) -> None:
    for call in (
        fal_client.run,
        fal_client.submit,
        fal_client.subscribe,
        lambda *arguments: list(fal_client.stream(*arguments)),
    ):
        error = refused(422, functools.partial(call, APP, {"guidance_scale": 99}))
        assert [fault["loc"] for fault in error.message] == [
            ["body", "prompt"],
            ["body", "guidance_scale"],
        ]
        assert error.response.json() == {"detail": error.message}
        assert str(error) == str(error.message)
        assert error.error_type is None
        assert isinstance(error.__cause__, InvalidRequest)
        error = refused(404, functools.partial(call, "fal-ai/flux/schnell \ud800", SMALL))
        assert "fal-ai/flux/krea" in error.message
        assert error.response_headers["x-fal-error-type"] == "not_found"
    handle = fal_client.submit(REDRAW, {"prompt": "x", "image_url": tmp_path / "nothing.png"})
    error = refused(422, handle.get)
    assert error.message[0]["loc"] == ["body", "image_url"]
    assert error.response_headers["x-fal-request-id"] == handle.request_id
    assert isinstance(error.__cause__, krea_local.InvalidImage)
    assert error.__cause__.__traceback__ is None
    status = handle.status()
    assert isinstance(status, fal_client.Completed)
    assert "nothing.png" in str(status.error)
    refused(405, functools.partial(fal_client.run, APP, SMALL, method="GET"))
    refused(422, functools.partial(fal_client.run, APP, ["no", "object"]))
    with pytest.raises(fal_client.FalClientError, match="krea-local serve"):
        fal_client.submit(APP, SMALL, webhook_url="https://example.com")
    for call in (fal_client.realtime, fal_client.ws_connect_async):
        with pytest.raises(fal_client.FalClientError, match="stream"):
            call(APP)
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path / "file"))
        error = refused(500, functools.partial(fal_client.run, APP, SMALL))
    assert error.error_type == "internal_error"
    assert isinstance(error.__cause__, krea_local.OutputFailed)


def test_the_model_is_that_of_the_endpoint_the_variable_or_the_configuration(
    no_models_kept: None,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KREA_LOCAL_MODEL", "/nowhere")
    error = refused(500, functools.partial(fal_client.run, APP, SMALL))
    assert "/nowhere" in error.message
    assert isinstance(error.__cause__, krea_local.WeightsNotFound)
    fal_client.configure(tiny_folder, safety_threshold=0.5, progress=False)
    try:
        fal_client.run(APP, SMALL)
        (kept,) = api._kept_models.values()
        fal_client.run("fal-ai/flux/dev", SMALL)
        assert list(api._kept_models.values()) == [kept]
        fal_client.configure(tiny_folder)
        fal_client.run(APP, SMALL)
        assert list(api._kept_models) == [str(tiny_folder)]
        fal_client.configure(tiny_folder, safety_threshold=2)
        assert refused(500, functools.partial(fal_client.run, APP, SMALL)).message.startswith(
            "the model cannot be loaded as configured: safety_threshold=2"
        )
    finally:
        fal_client.configure()
    with pytest.raises(InvalidRequest, match="krea_local.load"):
        fal_client.use("tiny")
    taken = inspect.signature(fal_client.configure).parameters
    loads = inspect.signature(krea_local.load).parameters
    assert {name: loads[name].default for name in loads if name != "group"} == {
        name: taken[name].default for name in taken
    }
    assert set(taken) - {"model"} == set(api.LoadOptions.__annotations__)


def test_a_stream_shows_the_picture_while_it_is_drawn(twin: Krea) -> None:
    *previews, result = fal_client.stream(
        APP, {**SMALL, "num_inference_steps": 4, "num_images": 3, "sync_mode": True}
    )
    assert len(previews) == 3
    for event in previews:
        assert set(event) == set(result)
        (image,) = event["images"]
        assert image["url"].startswith("data:image/jpeg;base64,")
        assert (image["width"], image["height"]) == (64, 64)
        assert event["seed"] == result["seed"] == 1
    assert len({event["images"][0]["url"] for event in previews}) == 3
    assert len(result["images"]) == 1
    many = list(fal_client.stream(APP, {**SMALL, "num_inference_steps": 50}))
    assert len(many) == 8  # of 50 steps every seventh, and the picture
    redrawn = fal_client.stream(
        APP,
        {"prompt": "x", "image_url": Image.new("RGB", (96, 64)), "num_inference_steps": 10},
        path="/image-to-image/stream",
    )
    assert next(redrawn)["images"][0]["width"] == 96
    assert len(list(redrawn)[-1]["images"]) == 1


def test_who_leaves_a_stream_stops_the_drawing(twin: Krea) -> None:
    stream = fal_client.stream(APP, {**SMALL, "num_inference_steps": 50})
    next(stream)
    job = list(QUEUE._jobs.values())[-1]
    stream.close()
    assert job.cancelled or job.finished
    with busy(twin):
        waiting = fal_client.stream(APP, SMALL, timeout=0.01)
        with pytest.raises(httpx.ReadTimeout):
            next(waiting)
        assert list(QUEUE._jobs.values())[-1].error.status == 499


def test_an_interrupt_cancels_what_is_waited_for(twin: Krea) -> None:
    def interrupt() -> None:
        while not (QUEUE._waiting and QUEUE._waiting[0].listeners):
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    for call in (fal_client.run, fal_client.subscribe):
        with busy(twin):
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                call(APP, SMALL)
            thread.join()
            assert QUEUE._waiting == []
            assert list(QUEUE._jobs.values())[-1].error.status == 499


def test_the_loop_goes_on_while_a_picture_is_drawn(twin: Krea) -> None:
    async def program(blocked: contextlib.ExitStack) -> None:
        updates: list[Any] = []
        ids: list[str] = []

        async def on_enqueue(request_id: str) -> None:
            ids.append(request_id)

        subscribed = asyncio.create_task(
            fal_client.subscribe_async(
                APP, SMALL, on_enqueue=on_enqueue, on_queue_update=updates.append, with_logs=True
            )
        )
        run = asyncio.create_task(fal_client.run_async(APP, {**SMALL, "sync_mode": True}))
        left = asyncio.create_task(fal_client.run_async(APP, SMALL))
        abandoned = asyncio.create_task(
            fal_client.subscribe_async(APP, SMALL, on_enqueue=on_enqueue)
        )
        handle = await fal_client.submit_async(APP, SMALL)
        assert isinstance(await handle.status(), fal_client.Queued)
        while len(ids) < 2 or len(QUEUE._waiting) < 5:
            await asyncio.sleep(0)
        left.cancel()
        abandoned.cancel()
        for task in (left, abandoned):
            with pytest.raises(asyncio.CancelledError):
                await task
        # As with the hosted API: a call that ends takes its drawing along, a subscription not.
        assert len(QUEUE._waiting) == 4
        await fal_client.cancel_async(APP, handle.request_id)
        with pytest.raises(fal_client.FalClientHTTPError) as raised:
            await handle.get()
        assert raised.value.status_code == 499
        blocked.close()
        assert (await run)["images"][0]["url"].startswith("data:")
        assert (await subscribed)["seed"] == 1
        assert updates[0] == fal_client.Queued(1)  # behind what was awaited first
        assert [log["message"] for log in updates[-1].logs] == ["1/2", "2/2"]
        assert (await fal_client.result_async(APP, ids[1]))["seed"] == 1
        assert (await fal_client.status_async(APP, ids[1])).error is None
        again = await fal_client.async_client.get_handle(APP, ids[1])
        assert [event async for event in again.iter_events()] == [await again.status()]
        events = [event async for event in fal_client.stream_async(APP, SMALL)]
        assert len(events) == 2

    with contextlib.ExitStack() as blocked:
        blocked.enter_context(busy(twin))
        asyncio.run(program(blocked))


def test_uploads_stay_on_this_machine(twin: Krea, tmp_path: Path) -> None:
    picture = Image.new("RGB", (96, 64), "teal")
    picture.save(tmp_path / "in.png")
    url = fal_client.upload_file(tmp_path / "in.png")
    assert file_of(url).parent == tmp_path / "uploads"
    assert file_of(url).read_bytes() == (tmp_path / "in.png").read_bytes()
    assert file_of(url).suffix == ".png"
    assert fal_client.upload_file(tmp_path / "in.png") != url
    assert file_of(fal_client.upload("text", "text/plain")).read_bytes() == b"text"
    settings = fal_client.StorageSettings(expires_in="1h")
    odd = fal_client.upload(b"x", "image/jpeg", "../../../etc/a.b/c d", lifecycle=settings)
    assert file_of(odd).parent == tmp_path / "uploads"

    async def uploads() -> list[str]:
        return [
            await fal_client.upload_file_async(tmp_path / "in.png"),
            await fal_client.upload_image_async(picture, "webp"),
            await fal_client.upload_async((tmp_path / "in.png").read_bytes(), "image/png"),
        ]

    sources = [
        url,
        fal_client.upload_image(picture),
        *asyncio.run(uploads()),
        fal_client.encode_file(tmp_path / "in.png"),
        fal_client.encode_image(picture, "png"),
        picture,
        tmp_path / "in.png",
    ]
    arguments = {"prompt": "x", "num_inference_steps": 10, "strength": 0.1, "seed": 1}
    for source in sources:
        drawn = fal_client.run(REDRAW, {**arguments, "image_url": source})
        assert (drawn["images"][0]["width"], drawn["images"][0]["height"]) == (96, 64)
    assert fal_client.encode("é", "text/plain") == "data:text/plain;base64,w6k="
    with pytest.raises(ValueError, match="expires_in"):
        fal_client.StorageSettings(expires_in="2h")
    with pytest.raises(ValueError, match="upload repository"):
        fal_client.upload(b"x", "image/png", repository="s3")
    with pytest.warns(DeprecationWarning, match="'cdn'"):
        fal_client.upload(b"x", "image/png", fallback_repository=["cdn"])


def test_a_pil_image_is_taken_as_it_was_when_it_was_submitted(twin: Krea) -> None:
    arguments = {"prompt": "x", "num_inference_steps": 10, "strength": 0.1, "seed": 1}
    image = Image.new("RGB", (64, 64), "teal")
    before = fal_client.run(REDRAW, {**arguments, "image_url": image, "sync_mode": True})
    with busy(twin):
        handle = fal_client.submit(REDRAW, {**arguments, "image_url": image, "sync_mode": True})
        image.paste("white", (0, 0, 64, 64))
    assert handle.get()["images"] == before["images"]


def test_old_requests_are_forgotten_but_not_by_who_holds_them(
    twin: Krea, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "KEEP_JOBS", 2)
    handles = [fal_client.submit(APP, {**SMALL, "seed": seed}) for seed in range(4)]
    handles[-1].get()
    assert len(QUEUE._jobs) == len(QUEUE._finished) == 2
    refused(404, lambda: fal_client.status(APP, handles[0].request_id))
    assert handles[0].get()["seed"] == 0
    assert fal_client.result(APP, handles[2].request_id)["seed"] == 2
    monkeypatch.setattr(jobs, "KEEP_BYTES", 1)
    fal_client.run(APP, SMALL)
    assert len(QUEUE._jobs) == 1


def test_a_program_may_end_while_a_picture_is_drawn(tmp_path: Path) -> None:
    code = f"""
import sys
from krea_local import fal_client
print(sorted({{"torch", "httpx", "numpy", "transformers"}} & set(sys.modules)))
arguments = {SMALL!r} | {{"num_inference_steps": 50, "num_images": 4}}
handle = fal_client.submit({APP!r}, arguments | {{"image_size": "square"}})
for status in handle.iter_events(with_logs=True, interval=0):
    if isinstance(status, fal_client.InProgress) and status.logs:
        break
print("leaving")
"""
    environment = {**os.environ, "KREA_LOCAL_MODEL": "tiny", "KREA_LOCAL_OUTPUT": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert (answer.returncode, answer.stdout) == (0, "[]\nleaving\n"), answer.stderr
    assert "Fatal" not in answer.stderr
    assert not list(tmp_path.glob("*.jpeg"))


# The official package.

REALTIME_CLASSES = {"RealtimeConnection", "AsyncRealtimeConnection"}  # nothing makes one here


@pytest.fixture
def official() -> ModuleType:
    return pytest.importorskip("fal_client")


def assert_takes_as_much(ours: Any, theirs: Any) -> None:
    """Each of their parameters is ours too, in its place and with its default."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [
            (name, one.kind, None if name == "headers" else one.default)
            for name, one in inspect.signature(function).parameters.items()
        ]

    wanted = parameters(theirs)
    # Those of older versions lack some of the newest.
    assert [one for one in parameters(ours) if one in wanted] == wanted, theirs


def test_every_public_name_and_parameter_of_the_official_package_is_here(
    official: ModuleType,
) -> None:
    names = {name for name in vars(official) if not name.startswith("_")} - {"client", "auth"}
    modules = {name for name in names if inspect.ismodule(getattr(official, name))}
    missing = {name for name in names - modules if not hasattr(fal_client, name)}
    assert missing <= REALTIME_CLASSES
    assert set(official.__all__) - REALTIME_CLASSES <= set(fal_client.__all__)
    compared = 0
    for name in names - modules - REALTIME_CLASSES:
        theirs, ours = getattr(official, name), getattr(fal_client, name)
        if inspect.isclass(theirs):
            if dataclasses.is_dataclass(theirs):
                fields = [one.name for one in dataclasses.fields(theirs)]
                ours_too = [one.name for one in dataclasses.fields(ours) if one.name in fields]
                assert ours_too == fields, name
            for method, function in inspect.getmembers(theirs, inspect.isroutine):
                if not method.startswith("_") and method not in ("with_traceback", "add_note"):
                    assert_takes_as_much(getattr(ours, method), function)
                    compared += 1
        elif inspect.isroutine(theirs):
            assert_takes_as_much(ours, theirs)
            realtime = name.startswith(("realtime", "ws_connect"))
            assert realtime or inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(
                theirs
            )
            compared += 1
    assert compared > 50
    for name in ("FalClientError", "FalClientHTTPError", "FalClientTimeoutError"):
        if hasattr(official.client, name):
            theirs = [kind.__name__ for kind in getattr(official.client, name).__mro__]
            assert [kind.__name__ for kind in getattr(fal_client, name).__mro__] == theirs


def test_encodings_are_those_of_the_official_package(official: ModuleType, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "teal")
    assert fal_client.encode_image(image) == official.encode_image(image)
    assert fal_client.encode(b"\0", "a/b") == official.encode(b"\0", "a/b")
    for name in ("a.png", "a", "a.webp", "ä ö.jpg"):
        (tmp_path / name).write_bytes(b"x")
        assert fal_client.encode_file(tmp_path / name) == official.encode_file(tmp_path / name)


class Recorder(http.server.BaseHTTPRequestHandler):
    """Answers as a server would, and remembers what was asked."""

    asked: list[tuple[str, str, str | None]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, self.headers["Authorization"]))
        host = f"http://{self.headers['Host']}"
        base = f"{host}/queue/fal-ai/flux/requests/7"
        token = {
            "token": "t",
            "token_type": "Bearer",
            "base_url": host,
            "expires_at": "2999-01-01T00:00:00+00:00",
        }
        answers: dict[str, Any] = {
            "/queue/fal-ai/flux/krea": {
                "request_id": "7",
                "response_url": base,
                "status_url": f"{base}/status",
                "cancel_url": f"{base}/cancel",
            },
            "/queue/fal-ai/flux/requests/7/status": {"status": "COMPLETED", "logs": []},
            "/rest/storage/auth/token": token,
            "/cdn/files/upload": {"access_url": "http://here/a.png"},
        }
        body = json.dumps(answers.get(self.path.split("?")[0], {"seed": 7})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


# The official client leaves its connections to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_official_client_is_pointed_at_a_server_and_away_from_the_cloud(
    official: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RUN_URL_FORMAT", "QUEUE_URL_FORMAT", "REALTIME_URL_FORMAT", "REST_URL", "CDN_URL")
    for name in names:
        monkeypatch.setattr(official.client, name, getattr(official.client, name))
    backup = dict(getattr(official.client, "_BACKUP_DOMAINS", {}))
    monkeypatch.setattr(official.client, "_BACKUP_DOMAINS", backup, raising=False)
    monkeypatch.setenv("FAL_KEY", "a key of the cloud")
    monkeypatch.setenv("FAL_FORCE_AUTH_BY_USER", "1")
    monkeypatch.setenv("NO_PROXY", "*")
    Recorder.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            fal_client.point_official_client(f"{url}/", api_key="ours")
            assert official.run(APP, {"prompt": "x"}) == {"seed": 7}
            handle = official.submit(APP, {"prompt": "x"})
            assert isinstance(handle.status(with_logs=True), official.Completed)
            assert official.result(REDRAW, "7") == {"seed": 7}
            official.cancel(APP, "7")
            assert official.upload(b"x", "image/png", "a.png") == "http://here/a.png"
            assert asyncio.run(official.run_async(REDRAW, {"prompt": "x"})) == {"seed": 7}
            assert f"ws{url[4:]}/run/" == official.client.REALTIME_URL_FORMAT
            fal_client.point_official_client(url)
            official.run(APP, {"prompt": "x"})
        finally:
            server.shutdown()
            thread.join()
    asked = [(method, path) for method, path, _ in Recorder.asked]
    assert asked == [
        ("POST", "/run/fal-ai/flux/krea"),
        ("POST", "/queue/fal-ai/flux/krea"),
        ("GET", "/queue/fal-ai/flux/requests/7/status?logs=true"),
        ("GET", "/queue/fal-ai/flux/requests/7/status?logs=false"),
        ("GET", "/queue/fal-ai/flux/requests/7"),
        ("PUT", "/queue/fal-ai/flux/requests/7/cancel"),
        ("POST", "/rest/storage/auth/token?storage_type=fal-cdn-v3"),
        ("POST", "/cdn/files/upload"),
        ("POST", "/run/fal-ai/flux/krea/image-to-image"),
        ("POST", "/run/fal-ai/flux/krea"),
    ]
    keys = [key for _, _, key in Recorder.asked]
    assert keys == ["Key ours"] * 7 + ["Bearer t", "Key ours", "Key local"]
    assert official.client._BACKUP_DOMAINS == {}


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "ftp://x", "http://", "http://x?y=1", "http://[::1", "", None, 3]
)
def test_an_address_that_is_none_is_refused(url: Any) -> None:
    with pytest.raises(InvalidRequest, match="server's address"):
        fal_client.point_official_client(url)


def test_another_package_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("fal_client")
    other.__version__ = "0.1"
    monkeypatch.setitem(sys.modules, "fal_client", other)
    monkeypatch.setitem(sys.modules, "fal_client.client", ModuleType("fal_client.client"))
    with pytest.raises(ImportError, match=r"fal-client 0\.1 has no RUN_URL_FORMAT"):
        fal_client.point_official_client("http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "fal_client", None)
    with pytest.raises(ImportError, match="pip install fal-client"):
        fal_client.point_official_client("http://127.0.0.1:1")
