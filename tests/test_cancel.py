"""Calls are cancelled while they still fetch what they draw with; from servers that never end."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from krea_local import Cancelled, InvalidImage, Krea, fal_client, images
from krea_local.background import wait_for

SMALL = {"width": 128, "height": 128}
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 10, "seed": 3}


class Slow(http.server.ThreadingHTTPServer):
    """Sends a byte now and then.

    Attributes:
        asked: set once somebody asked for something.
        over: set when it is to end.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Trickle)
        self.asked, self.over = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Trickle(http.server.BaseHTTPRequestHandler):
    server: Slow

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(2**20))
        self.end_headers()
        self.server.asked.set()
        try:
            while not self.server.over.wait(0.02):
                self.wfile.write(b".")
        except OSError:
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[Slow]:
    with Slow() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def cancelled_while_it_fetches(krea: Krea, slow: Slow, **arguments: Any) -> None:
    draw = krea.img2img if "image_url" in arguments else krea.txt2img
    with ThreadPoolExecutor() as pool:
        call = pool.submit(draw, "a fox", **arguments, **ARGUMENTS)
        assert slow.asked.wait(60)
        started = time.monotonic()
        assert krea.cancel()
        with pytest.raises(Cancelled):
            call.result(60)
    assert time.monotonic() - started < images.FETCH_SECONDS / 2
    assert not krea.cancel()
    assert krea.txt2img("a fox", image_size=SMALL, **ARGUMENTS).images


def test_while_its_image_comes(krea: Krea, slow: Slow) -> None:
    cancelled_while_it_fetches(krea, slow, image_url=f"{slow.url}/fox.png")


def test_while_its_lora_comes(
    krea: Krea, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lora = {"path": f"{slow.url}/style.safetensors"}
    cancelled_while_it_fetches(krea, slow, image_size=SMALL, loras=[lora])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_draws_is_stopped_and_what_fetches_goes_on(krea: Krea, slow: Slow) -> None:
    drawing, went_on = threading.Event(), threading.Event()

    def on_step(_: object) -> None:
        drawing.set()
        assert went_on.wait(60)

    with ThreadPoolExecutor() as pool:
        fetches = pool.submit(krea.img2img, "a fox", image_url=slow.url, **ARGUMENTS)
        assert slow.asked.wait(60)
        draws = pool.submit(krea.txt2img, "a", image_size=SMALL, on_step=on_step, **ARGUMENTS)
        assert drawing.wait(60)
        assert krea.cancel()
        went_on.set()
        with pytest.raises(Cancelled):
            draws.result(60)
        assert not fetches.done()
        assert krea.cancel()
        with pytest.raises(Cancelled):
            fetches.result(60)


def test_the_twin_of_the_official_client_too(
    krea: Krea, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path))
    fal_client.use(krea)
    try:
        asked = {"prompt": "a fox", "image_url": slow.url, "num_inference_steps": 10}
        handle = fal_client.submit("fal-ai/flux/krea/image-to-image", asked)
        assert slow.asked.wait(60)
        handle.cancel()
        with pytest.raises(fal_client.FalClientHTTPError) as raised:
            handle.get()
        assert raised.value.error_type == "client_cancelled"
    finally:
        fal_client.configure()


def test_a_server_that_never_ends_is_given_up(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.2)
    with pytest.raises(InvalidImage, match=r"took over 0.2 s to arrive"):
        images.open_image(slow.url)


def test_waiting_gives_what_the_work_gives() -> None:
    def fail() -> None:
        raise KeyError("x")

    assert wait_for(lambda: 7, check=lambda: None) == 7
    with pytest.raises(KeyError):
        wait_for(fail, check=lambda: None)
