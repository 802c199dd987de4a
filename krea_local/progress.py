"""How far a call is: the report that `on_step` gets, a bar on standard error, timings, cancelling.

Knows nothing of models or requests.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from krea_local.errors import Cancelled

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

Stage = Literal["text", "encode", "denoise", "decode", "safety"]


@dataclass(frozen=True)
class Progress:
    """What `on_step` is called with, after each piece of work.

    Attributes:
        stage: what was worked on: `text` the prompt, `encode` the input image, `denoise`, `decode`,
            `safety`.
        step: denoising steps done for this image; 0 outside that stage.
        num_steps: denoising steps that each image takes.
        image: which image of the call, from 0.
        num_images: images of the call.
        fraction: share of the whole call that is done, 0 … 1; steps count alike.
        latents: packed latents [B, S, 64] after this step, on the device; None outside `denoise`.
        width: of each image, in pixels.
        height: likewise.
    """

    stage: Stage
    step: int
    num_steps: int
    image: int
    num_images: int
    fraction: float
    latents: Tensor | None = None
    width: int = 0
    height: int = 0


OnStep = Callable[[Progress], None]
"""Called in the generating thread; what it raises, such as `Cancelled`, ends the call."""

OnBytes = Callable[[str, int], None]
"""(component, bytes read since the last call), while a checkpoint is read."""


class Bar:
    """A progress bar on standard error, if that is a terminal; otherwise nothing.

    Args:
        total: how much work there is, in `unit`s.
        show: False for no bar in any case.
        unit: what is counted; "B" is shown with binary prefixes.
    """

    def __init__(self, total: int, *, show: bool, unit: str = "step") -> None:
        self._bar: tqdm[None] | None = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=unit, unit_scale=unit == "B", unit_divisor=1024, leave=False
            )

    def advance(self, what: str, count: int = 1) -> None:
        """`count` more of the work, `what`, is done."""
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.update(count)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class Call:
    """One call under way.

    Attributes:
        num_images: images of the call.
        num_steps: denoising steps that each image takes.
        width: of each image, in pixels.
        height: likewise.
        total: pieces of work in all: steps of every image, and each other stage.
        cancelled: set from another thread to stop the call.
        wait: waits for the GPU, so that a stage's time is its own.
        on_step: the caller's.
        bar: on standard error.
        timings: seconds by stage; 0 for a stage that was not wanted.
        notices: what was done that differs from the letter of the request.
    """

    num_images: int
    num_steps: int
    width: int
    height: int
    total: int
    cancelled: threading.Event
    wait: Callable[[], None]
    on_step: OnStep | None
    bar: Bar
    timings: dict[str, float]
    notices: list[str] = field(default_factory=list)
    done: int = 0

    def advance(
        self, stage: Stage, *, image: int = 0, step: int = 0, latents: Tensor | None = None
    ) -> None:
        """One piece of work is done: tell the bar and the caller.

        Raises:
            Cancelled: the call is to stop.
        """
        self.done += 1
        self.bar.advance(stage)
        if self.on_step is not None:
            self.on_step(
                Progress(
                    stage=stage,
                    step=step,
                    num_steps=self.num_steps,
                    image=image,
                    num_images=self.num_images,
                    fraction=self.done / self.total,
                    latents=latents,
                    width=self.width,
                    height=self.height,
                )
            )
        self._check()

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time a stage; raises `Cancelled` instead of starting one."""
        self._check()
        start = time.perf_counter()
        yield
        self.wait()
        self.timings[name] += time.perf_counter() - start

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled("cancelled; the model is ready for the next call")
