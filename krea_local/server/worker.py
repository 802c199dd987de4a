"""The process that owns one GPU: `python -m krea_local.server.worker`, started by `workers`.

Orders come as lines of JSON on standard input, the first one with the settings. Answers go as lines
of JSON to a descriptor of their own, so that no library's print gets between them. What it draws
it writes to the store's files; only the server then names them in the database. It ends with the
server: at the end of its orders, or by the kernel's word where the server was killed.

Knows nothing of queues, databases or HTTP.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from krea_local.endpoints import Request, find_endpoint, http_error
from krea_local.errors import Cancelled, KreaError, KreaWarning, WeightsNotFound
from krea_local.images import open_image
from krea_local.recipe import CONTENT_TYPES, encode
from krea_local.schema import Img2ImgRequest, Txt2ImgRequest, fit_input_size
from krea_local.server.files import Files
from krea_local.server.jobs import Outcome, Picture, StoredFile

if TYPE_CHECKING:
    from krea_local.pipeline import Krea
    from krea_local.progress import Progress
    from krea_local.result import Result

logger = logging.getLogger(__name__)

LOAD_FAILED = 70
CUDA_IS_LOST = 71
"""Exit codes. After a fatal error no later call of the process can use the GPU."""
SERVED_FORMATS = ("PNG", "JPEG", "WEBP")
PREVIEW_SECONDS = 0.5
HEARTBEAT_SECONDS = 2.0
_PDEATHSIG = 1  # of prctl(2)


class Answers:
    """The way back to the server; from any thread, a line at a time."""

    def __init__(self, descriptor: int) -> None:
        self._file: IO[bytes] = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()

    def send(self, kind: str, **told: object) -> None:
        """Tell the server something."""
        line = json.dumps({"kind": kind, **told}).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[self._file.write(line) or 0 :]
            except OSError:  # nobody is there any more
                os._exit(0)


class Orders:
    """What the server wants: jobs one by one, and at any time that one be cancelled or shown."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._shown: set[str] = set()
        self._stream = stream
        self.settings: dict[str, Any] = json.loads(stream.readline())
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next job."""
        return self._jobs.get()

    def is_cancelled(self, id: str) -> bool:
        """Whether that job is to stop."""
        return id in self._cancelled

    def is_shown(self, id: str) -> bool:
        """Whether somebody looks at that job's previews."""
        return id in self._shown

    def forget(self, id: str) -> None:
        """That job is over."""
        self._cancelled.discard(id)
        self._shown.discard(id)

    def _read(self) -> None:
        for line in self._stream:
            order = json.loads(line)
            if order["kind"] == "cancel":
                self._cancelled.add(order["id"])
            elif order["kind"] == "show":
                self._shown.add(order["id"])
            else:
                if order.get("previews"):
                    self._shown.add(order["id"])
                self._jobs.put(order)
        os._exit(0)  # the server is gone, or wants us to be


def main() -> None:
    """Load the model, then draw what is asked for, for as long as the server lives."""
    # Standard output may be written by any library: let it be seen, but not be taken for answers.
    os.dup2(2, 1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    _die_with(int(sys.argv[2]))
    answers = Answers(int(sys.argv[1]))
    orders = Orders(sys.stdin.buffer)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore", KreaWarning)  # every one is among the result's notices
    krea = _load(orders.settings, answers)
    threading.Thread(target=_beat, args=(krea, answers), daemon=True).start()
    files = Files(Path(orders.settings["files"]))
    while True:
        order = orders.next()
        _Drawing(krea, files, orders, answers, order).run()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the server's dies, whatever it is doing."""
    # Ctrl-C in a terminal is the server's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)


def _load(settings: Mapping[str, Any], answers: Answers) -> Krea:
    from krea_local.api import load

    try:
        ours = {"device": settings["device"], "progress": False}
        krea = load(settings["model"], **{**settings["load"], **ours})
        _warm_up(krea)
    except Exception as error:
        text = str(error) if isinstance(error, KreaError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, KreaError):
            logger.exception("the model cannot be loaded")
        answers.send("refused", reason=text)
        os._exit(LOAD_FAILED)
    used, total = _memory(krea)
    answers.send("ready", label=krea.label, device=str(krea.device), used=used, total=total)
    return krea


def _warm_up(krea: Krea) -> None:
    """Draw a small picture, so that what can fail fails now and the first job finds all ready."""
    size = {"width": 64, "height": 64}
    request = Txt2ImgRequest.parse(
        {"prompt": "", "image_size": size, "num_inference_steps": 1, "seed": 0}
    )
    try:
        krea.run(request)
    except WeightsNotFound as error:  # no safety checker: jobs that want it will be told
        logger.warning("%s", error)
        krea.run(request.model_copy(update={"enable_safety_checker": False}))


def _memory(krea: Krea) -> tuple[int, int]:
    """Bytes of the GPU's memory that are used, by anybody, and that there are."""
    if krea.device.type != "cuda":
        return 0, 0
    import torch

    free, total = torch.cuda.mem_get_info(krea.device)
    return total - free, total


def _beat(krea: Krea, answers: Answers) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost: the job's thread tells
            used, total = _memory(krea)
            answers.send("memory", used=used, total=total)


class _ToServer(logging.Handler):
    """Has what our own modules log go into the job's log too."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(logging.INFO)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        level = "WARN" if record.levelno == logging.WARNING else record.levelname
        self._answers.send("log", message=record.getMessage(), level=level)


class _Drawing:
    """One job under way."""

    def __init__(
        self, krea: Krea, files: Files, orders: Orders, answers: Answers, order: dict[str, Any]
    ) -> None:
        self.krea = krea
        self.files = files
        self.orders = orders
        self.answers = answers
        self.id: str = order["id"]
        self.order = order
        self.size = (0, 0)
        self.shown = 0.0  # when the last preview was made
        self.told: tuple[str, ...] = ()  # notices of the input image

    def run(self) -> None:
        """Draw it and answer with what became of it."""
        handler = _ToServer(self.answers)
        ours = logging.getLogger("krea_local")
        ours.addHandler(handler)
        try:
            outcome = self._draw()
        except Cancelled:
            self.answers.send("cancelled")
        except Exception as error:
            if _is_fatal(error):
                self.answers.send("fatal", reason=str(error))
                os._exit(CUDA_IS_LOST)
            reason = str(error)
            if not isinstance(error, KreaError):  # its text may tell of the machine
                logger.exception("job %s failed", self.id)
                reason = "internal error; the server's log has it"
            self.answers.send("failed", failure=asdict(http_error(error)), reason=reason)
        else:
            self.answers.send("done", outcome=asdict(outcome))
        finally:
            ours.removeHandler(handler)
            self.orders.forget(self.id)

    def _draw(self) -> Outcome:
        request = self._request()
        result = self.krea.run(request, on_step=self._on_step, check=self._check)
        return self._store(result)

    def _request(self) -> Request:
        endpoint = find_endpoint(self.order["endpoint"])
        arguments = dict(self.order["arguments"])
        multiple = self.krea.size_multiple
        if self.order["input"] is not None:
            data = self.files.path(self.order["input"]).read_bytes()
            opened = open_image(data, formats=SERVED_FORMATS)
            self.told = opened.notices
            arguments["image_url"] = opened.image
            width, height = opened.image.size
            self.size = fit_input_size(width=width, height=height, multiple=multiple) or self.size
        request = endpoint.request.parse(arguments)
        if isinstance(request, Txt2ImgRequest):
            self.size = request.size(multiple)
        else:
            assert isinstance(request, Img2ImgRequest)
        return request

    def _check(self) -> None:
        if self.orders.is_cancelled(self.id):
            raise Cancelled("cancelled")

    def _on_step(self, progress: Progress) -> None:
        self._check()
        preview = None
        now = time.monotonic()
        # Only where somebody looks: a preview makes the GPU wait.
        wanted = self.orders.is_shown(self.id) and now - self.shown > PREVIEW_SECONDS
        if wanted and progress.latents is not None:
            preview = self._preview(progress)
            # Counted from the end, so that a slow GPU has more to do than previews.
            self.shown = time.monotonic()
        self.answers.send(
            "progress",
            step=progress.step,
            num_steps=progress.num_steps,
            fraction=progress.fraction,
            preview=preview,
        )

    def _preview(self, progress: Progress) -> str:
        from krea_local.preview import preview_image

        assert progress.latents is not None
        width, height = self.size
        image = preview_image(
            progress.latents[:1], width=width, height=height, multiple=self.krea.size_multiple
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
        return base64.b64encode(buffer.getvalue()).decode()

    def _store(self, result: Result) -> Outcome:
        extension = result.output_format
        kind = CONTENT_TYPES[extension]
        pictures = []
        for i, (name_on_disk, image) in enumerate(
            zip(self.order["files"], result.images, strict=True)
        ):
            data = encode(image, extension)
            self.files.write(name_on_disk, data)
            name = f"{self.id[:8]}-{result.seed + i}.{extension}"
            file = StoredFile(name_on_disk, kind, len(data), name)
            pictures.append(Picture(file, image.width, image.height))
        return Outcome(
            pictures=tuple(pictures),
            seed=result.seed,
            has_nsfw_concepts=result.has_nsfw_concepts,
            timings={"inference": result.timings["total"], **result.timings},
            notices=(*self.told, *result.notices),
        )


def _is_fatal(error: BaseException | None) -> bool:
    """Whether the GPU is lost to this process: every later call would fail too."""
    import torch

    from krea_local.memory import is_out_of_memory

    while error is not None:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            text = str(error)
            signs = ("CUDA error", "device-side assert", "cudaErrorIllegalAddress")
            lost = getattr(torch, "AcceleratorError", None)
            if any(sign in text for sign in signs) or (lost and isinstance(error, lost)):
                return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
