"""The queue of this process: requests are drawn one after another, in a thread of their own.

Knows nothing of how callers wait, nor of how the official client names things.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from krea_local.endpoints import NOT_STARTED_IN_TIME, Endpoint, HttpError, Request, http_error
from krea_local.errors import Cancelled, KreaError

if TYPE_CHECKING:
    from krea_local.pipeline import Krea
    from krea_local.progress import Progress
    from krea_local.result import Result

logger = logging.getLogger(__name__)

KEEP_JOBS = 1000  # finished ones that can still be asked for by id
KEEP_BYTES = 256 * 2**20  # of their pictures in data URIs
PREVIEWS = 8  # of an image, at the most
EXIT_SECONDS = 10.0
Listener = Callable[[], None]


@dataclass(eq=False)
class Job:
    """A request and what becomes of it; changes only with the queue's lock held.

    Attributes:
        id: unguessable.
        endpoint: that was called.
        request: validated, its seed fixed.
        low_priority: drawn when no other waits.
        start_by: on the monotonic clock; not started by then, it fails.
        wants_previews: whether somebody looks at the picture while it is drawn.
        state: queued, running or finished.
        cancelled: whether it is to stop.
        logs: lines as the hosted API has them.
        previews: the picture so far, shaped as `output`, oldest first.
        output: the hosted API's JSON object, once it is done.
        error: why there is none.
        cause: the exception behind it, without the tensors that its traceback would keep.
        seconds: that it took.
        listeners: told of each change, with the lock held.
    """

    id: str
    endpoint: Endpoint
    request: Request
    low_priority: bool
    start_by: float | None
    wants_previews: bool
    state: Literal["queued", "running", "finished"] = "queued"
    cancelled: bool = False
    logs: list[dict[str, str]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    output: dict[str, Any] | None = None
    error: HttpError | None = None
    cause: BaseException | None = None
    seconds: float = 0.0
    listeners: list[Listener] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state == "finished"


class JobQueue:
    """Jobs in the order they came, those of low priority last.

    Args:
        model_for: the model to draw with; called in the queue's thread, may take minutes.
    """

    def __init__(self, model_for: Callable[[Endpoint], Krea]) -> None:
        self._model_for = model_for
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._finished: OrderedDict[str, int] = OrderedDict()  # by id, bytes of their pictures
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self,
        endpoint: Endpoint,
        request: Request,
        *,
        low_priority: bool = False,
        start_within: float | None = None,
        wants_previews: bool = False,
    ) -> Job:
        """Take a request; returns at once."""
        job = Job(
            id=secrets.token_hex(16),
            endpoint=endpoint,
            request=request.with_seed(),
            low_priority=low_priority,
            start_by=None if start_within is None else time.monotonic() + start_within,
            wants_previews=wants_previews,
        )
        with self._changed:
            if self._closed:
                raise RuntimeError("the interpreter is ending: no request is taken any more")
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._waiting.sort(key=lambda one: one.low_priority)  # keeps the order of the rest
            self._start_thread()
            self._changed.notify_all()
        return job

    def find(self, id: str) -> Job | None:
        """The job of that id, if it is not forgotten."""
        with self._changed:
            return self._jobs.get(id)

    def position(self, job: Job) -> int:
        """How many jobs that wait are before it."""
        with self._changed:
            self._expire()
            return self._waiting.index(job) if job in self._waiting else 0

    def cancel(self, job: Job) -> bool:
        """Stop it: at once if it waits, within a step if it runs. False if it is over."""
        with self._changed:
            self._expire()
            if job.finished:
                return False
            job.cancelled = True
            if job.state == "queued":
                self._waiting.remove(job)
                self._finish(job, error=http_error(Cancelled()))
                self._tell_waiting()
            return True

    def poll(self, job: Job) -> float | None:
        """Bring its state up to date; seconds after which to look again though nothing is told."""
        with self._changed:
            self._expire()
            if job.state != "queued" or job.start_by is None:
                return None
            return max(0.0, job.start_by - time.monotonic())

    @contextlib.contextmanager
    def listening(self, job: Job, listener: Listener) -> Iterator[None]:
        """Have `listener` called at each change of `job`, in whatever thread makes it.

        It must return at once and raise nothing.
        """
        with self._changed:
            job.listeners.append(listener)
        try:
            yield
        finally:
            with self._changed:
                job.listeners.remove(listener)

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """Read several attributes of a job as of one moment."""
        with self._changed:
            self._expire()
            yield

    def close(self) -> None:
        """Cancel everything and let the thread end, for some seconds.

        A daemon thread inside torch while the interpreter ends would crash the process.
        """
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self.cancel(job)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(EXIT_SECONDS)

    def _start_thread(self) -> None:
        # Not alive either in a process forked from the one that started it.
        if self._thread is None or not self._thread.is_alive():
            if self._thread is None:
                atexit.register(self.close)
            self._thread = threading.Thread(target=self._work, name="krea_local", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start = time.perf_counter()
            output, error, cause = None, None, None
            try:
                output = self._draw(job)
            except BaseException as raised:  # a Rust panic is none that Exception holds
                error, cause = http_error(raised), raised
                if not isinstance(raised, KreaError):
                    logger.exception("request %s failed", job.id)
                _drop_tracebacks(raised)
            with self._changed:
                self._running = None
                job.seconds = time.perf_counter() - start
                self._finish(job, output=output, error=error, cause=cause)
            del job, output, error, cause  # this thread may wait long for the next

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                self._expire()
                if self._closed:
                    return None
                if self._waiting:
                    break
                self._changed.wait()
            job = self._running = self._waiting.pop(0)
            job.state = "running"
            _tell(job)
            self._tell_waiting()
            return job

    def _draw(self, job: Job) -> dict[str, Any]:
        krea = self._model_for(job.endpoint)

        def check() -> None:
            if job.cancelled:
                raise Cancelled("cancelled by its caller")

        def on_step(progress: Progress) -> None:
            check()
            if progress.stage == "denoise":
                self._log(job, _line(progress))
                if job.wants_previews and _is_previewed(progress):
                    self._show(job, progress, krea.size_multiple)

        check()
        result: Result = krea.run(job.request, on_step=on_step, check=check)
        for notice in result.notices:
            self._log(job, notice, level="WARN")
        return result.to_api()

    def _log(self, job: Job, message: str, *, level: str = "INFO") -> None:
        line = {
            "message": message,
            "level": level,
            "source": "USER",
            "timestamp": datetime.now(timezone.utc).isoformat(),
        }
        with self._changed:
            job.logs.append(line)
            _tell(job)

    def _show(self, job: Job, progress: Progress, multiple: int) -> None:
        from krea_local.preview import preview_image

        assert progress.latents is not None
        image = preview_image(
            progress.latents, width=progress.width, height=progress.height, multiple=multiple
        )
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        picture = {"url": url, "width": image.width, "height": image.height}
        with self._changed:
            job.previews.append(
                {
                    "images": [{**picture, "content_type": "image/jpeg"}],
                    "timings": {},
                    "seed": job.request.seed,
                    "has_nsfw_concepts": [False],
                    "prompt": job.request.prompt,
                }
            )
            _tell(job)

    def _finish(
        self,
        job: Job,
        *,
        output: dict[str, Any] | None = None,
        error: HttpError | None = None,
        cause: BaseException | None = None,
    ) -> None:
        job.output, job.error, job.cause = output, error, cause
        job.state = "finished"
        if hasattr(job.request, "image_url"):  # up to 50 MiB, of no use any more
            job.request = job.request.model_copy(update={"image_url": ""})
        images = output["images"] if output is not None else []
        self._finished[job.id] = sum(len(image["url"]) for image in images)
        while len(self._finished) > 1 and (
            len(self._finished) > KEEP_JOBS or sum(self._finished.values()) > KEEP_BYTES
        ):
            oldest, _ = self._finished.popitem(last=False)
            del self._jobs[oldest]
        _tell(job)

    def _expire(self) -> None:
        """Fail what has waited longer than its caller would."""
        now = time.monotonic()
        late = [one for one in self._waiting if one.start_by is not None and one.start_by <= now]
        for job in late:
            self._waiting.remove(job)
            self._finish(job, error=NOT_STARTED_IN_TIME)
        if late:
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        """Positions have changed."""
        for job in self._waiting:
            _tell(job)


def _tell(job: Job) -> None:
    for listener in job.listeners:
        listener()


def _line(progress: Progress) -> str:
    of_several = ""
    if progress.num_images > 1:
        of_several = f" of image {progress.image + 1}/{progress.num_images}"
    return f"{progress.step}/{progress.num_steps}{of_several}"


def _is_previewed(progress: Progress) -> bool:
    """Now and then, and not of the last step, which the picture itself follows."""
    every = -(-progress.num_steps // PREVIEWS)
    return progress.step % every == 0 and progress.step < progress.num_steps


def _drop_tracebacks(error: BaseException) -> None:
    """Their frames hold tensors, which would keep the GPU's memory as long as the job is kept."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
