"""Waiting that can be given up; calls that are cancelled while they fetch what they draw with."""

from __future__ import annotations

import http.server
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from krea_local import Cancelled, Krea, fal_client, images, lora_files
from krea_local.background import TooSlow, wait_for

SMALL = {"width": 128, "height": 128}
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 10, "seed": 3}
PATIENCE = 60.0


class Slow(http.server.ThreadingHTTPServer):
    """Sends a byte now and then; of "/silent" none at all.

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
        self.server.asked.set()
        if self.path.startswith("/silent"):
            self.server.over.wait()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(2**20))
        self.end_headers()
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


class Call:
    """A call in a thread of its own, which no failing test waits for."""

    def __init__(self, function: Callable[..., object], *given: Any, **named: Any) -> None:
        self._ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                function(*given, **named)
            except BaseException as error:
                self._ends.put(error)
            else:
                self._ends.put(None)

        threading.Thread(target=run, daemon=True).start()

    @property
    def is_over(self) -> bool:
        return not self._ends.empty()

    def error(self) -> BaseException | None:
        """What it raised, once it is over."""
        return self._ends.get(timeout=PATIENCE)


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_cancelled_while_it_fetches(krea: Krea, asked: threading.Event, call: Call) -> None:
    assert asked.wait(PATIENCE)
    started = time.monotonic()
    assert krea.cancel()
    assert isinstance(call.error(), Cancelled)
    assert time.monotonic() - started < images.FETCH_SECONDS / 2
    assert not krea.cancel()
    assert krea.txt2img("a fox", image_size=SMALL, **ARGUMENTS).images


@pytest.mark.parametrize("path", ["fox.png", "silent"])
def test_a_call_is_cancelled_while_its_image_comes(krea: Krea, slow: Slow, path: str) -> None:
    call = Call(krea.img2img, "a fox", image_url=f"{slow.url}/{path}", **ARGUMENTS)
    assert_cancelled_while_it_fetches(krea, slow.asked, call)


@pytest.mark.parametrize("path", ["style", "silent"])
def test_a_call_is_cancelled_while_its_lora_comes_and_leaves_nothing(
    krea: Krea, slow: Slow, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loras = [{"path": f"{slow.url}/{path}.safetensors"}]
    call = Call(krea.txt2img, "a fox", image_size=SMALL, loras=loras, **ARGUMENTS)
    assert_cancelled_while_it_fetches(krea, slow.asked, call)
    slow.over.set()
    until(lambda: not [path for path in tmp_path.rglob("*") if path.is_file()])


def test_a_call_is_cancelled_while_the_hub_sends_and_the_next_one_finds_it(
    krea: Krea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sent = threading.Event(), threading.Event()

    def download(repo: str, name: str, *, revision: str | None) -> str:
        asked.set()
        assert sent.wait(PATIENCE)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loras = [{"path": "owner/name/style.safetensors"}]
    call = Call(krea.txt2img, "a fox", image_size=SMALL, loras=loras, **ARGUMENTS)
    assert_cancelled_while_it_fetches(krea, asked, call)
    # As many as may are under way now; a third waits, and can be cancelled too.
    second = Call(lora_files.find_lora, "owner/name/style.safetensors")
    third = Call(krea.txt2img, "a fox", image_size=SMALL, loras=loras, **ARGUMENTS)
    until(krea.cancel)
    assert isinstance(third.error(), Cancelled)
    sent.set()
    assert isinstance(second.error(), lora_files.KreaError)  # there is no such file


def test_what_draws_is_cancelled_and_what_fetches_goes_on(
    krea: Krea, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 10 * PATIENCE)
    drawing, went_on = threading.Event(), threading.Event()

    def on_step(_: object) -> None:
        drawing.set()
        assert went_on.wait(PATIENCE)

    fetches = Call(krea.img2img, "a fox", image_url=slow.url, **ARGUMENTS)
    assert slow.asked.wait(PATIENCE)
    draws = Call(krea.txt2img, "a", image_size=SMALL, on_step=on_step, **ARGUMENTS)
    assert drawing.wait(PATIENCE)
    assert krea.cancel()
    went_on.set()
    assert isinstance(draws.error(), Cancelled)
    assert not fetches.is_over
    assert krea.cancel()
    assert isinstance(fetches.error(), Cancelled)


def test_a_call_that_waits_for_the_model_is_cancelled_before_it_draws(krea: Krea) -> None:
    steps: list[object] = []
    with krea._lock:
        call = Call(krea.txt2img, "a fox", image_size=SMALL, on_step=steps.append, **ARGUMENTS)
        until(krea.cancel)
    assert isinstance(call.error(), Cancelled)
    assert steps == []


def test_the_twin_of_the_official_client_cancels_what_fetches(
    krea: Krea, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_LOCAL_OUTPUT", str(tmp_path))
    fal_client.use(krea)
    try:
        asked = {"prompt": "a fox", "image_url": slow.url, "num_inference_steps": 10}
        handle = fal_client.submit("fal-ai/flux/krea/image-to-image", asked)
        assert slow.asked.wait(PATIENCE)
        handle.cancel()
        with pytest.raises(fal_client.FalClientHTTPError) as raised:
            handle.get()
        assert raised.value.error_type == "client_cancelled"
    finally:
        fal_client.configure()


def test_waiting_gives_what_the_work_gives() -> None:
    def fail(_: threading.Event) -> None:
        raise KeyError("x")

    assert wait_for(lambda left: 7, check=lambda: None) == 7
    with pytest.raises(KeyError):
        wait_for(fail, check=lambda: None)


def test_work_that_is_left_behind_learns_of_it() -> None:
    learned: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def refuse() -> None:
        raise ZeroDivisionError

    def work(left: threading.Event) -> None:
        learned.put(left.wait(PATIENCE))

    with pytest.raises(TooSlow, match="over 0.1 s"):
        wait_for(work, check=lambda: None, seconds=0.1)
    with pytest.raises(ZeroDivisionError):
        wait_for(work, check=refuse)
    assert [learned.get(timeout=PATIENCE) for _ in range(2)] == [True, True]
