"""Calls of a pipeline, ours or another's, from prompt to pictures, with a clock beside them.

Steps are skipped by a fixed pattern, half of them: with random weights the changes that a threshold
looks at mean nothing. Knows nothing of what is compared, or of where figures go.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.latency import peak_gib, reset_peak
from benchmarks.peers import Draw
from krea_local.pipeline import Krea
from krea_local.progress import OnStep
from krea_local.schema import Acceleration, Txt2ImgRequest
from krea_local.skipping import Skipping
from krea_local.speed import Settings
from krea_local.transformer import Execution

HALF = Skipping(computed=0.5)


@dataclass
class Calls:
    """What all measured calls have in common.

    Attributes:
        device: where pictures are made.
        steps: of each picture.
        runs: measured calls, after the first two.
        prompts: how many there were.
    """

    device: torch.device
    steps: int
    runs: int
    prompts: int = 0

    def new_prompt(self) -> str:
        """Another one each time: the cache of prompts would hide the text encoders."""
        self.prompts += 1
        return f"a red fox in fresh snow, number {self.prompts}"


Timed = Callable[[Calls, tuple[int, int], int, int], dict[str, float]]
"""(calls, (width, height), batch, seed) → seconds of each stage known, after drawing."""


def prepare(krea: Krea, level: Acceleration) -> None:
    """Make a level ready, with its steps skipped by a pattern."""
    settings = krea.prepare(level)
    if settings.skipping is not None:
        krea.engine.settings[level] = dataclasses.replace(settings, skipping=HALF)


def krea_draw(krea: Krea, level: Acceleration, on_step: OnStep | None = None) -> Timed:
    """Our pipeline as something to be timed."""

    def draw(calls: Calls, size: tuple[int, int], batch: int, seed: int) -> dict[str, float]:
        krea.batch_size = batch
        request = Txt2ImgRequest.parse(
            {
                "prompt": calls.new_prompt(),
                "image_size": {"width": size[0], "height": size[1]},
                "num_inference_steps": calls.steps,
                "num_images": batch,
                "seed": seed,
                "enable_safety_checker": False,
                "acceleration": level,
            }
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a level cannot do here is kept in "notices"
            result = krea.run(request, on_step=on_step)
        assert result.images[0].size == size
        return dict(result.timings)

    return draw


def peer_draw(drawn: Draw) -> Timed:
    """Another's pipeline as something to be timed."""

    def draw(calls: Calls, size: tuple[int, int], batch: int, seed: int) -> dict[str, float]:
        images = drawn(
            calls.new_prompt(),
            width=size[0],
            height=size[1],
            steps=calls.steps,
            seed=seed,
            guidance_scale=4.5,
            num_images=batch,
        )
        assert [image.size for image in images] == [size] * batch
        return {}

    return draw


def timed(
    draw: Timed, calls: Calls, size: tuple[int, int], batch: int, seed: int
) -> tuple[float, dict[str, float]]:
    """Seconds of one call, from prompt to pictures, and of its stages."""
    start = time.perf_counter()
    stages = draw(calls, size, batch, seed)
    if calls.device.type == "cuda":
        torch.cuda.synchronize(calls.device)
    return time.perf_counter() - start, stages


def measure(draw: Timed, calls: Calls, size: tuple[int, int], batch: int) -> dict[str, Any]:
    """First call, then another, then `runs` more; seconds are their median."""
    reset_peak(calls.device)
    first, _ = timed(draw, calls, size, batch, seed=0)
    second, _ = timed(draw, calls, size, batch, seed=1)  # some engines finish compiling here
    measured = [timed(draw, calls, size, batch, seed=2 + i) for i in range(calls.runs)]
    seconds = [call for call, _ in measured]
    return {
        "width": size[0],
        "height": size[1],
        "batch": batch,
        "runs": len(measured),
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "stages": {
            name: statistics.median(stages[name] for _, stages in measured)
            for name in measured[0][1]
        },
        "first_image_seconds": first,
        "second_image_seconds": second,
        "peak_gib": peak_gib(calls.device),
    }


def described(settings: Settings) -> dict[str, Any]:
    """Settings as JSON."""
    execution: Execution = settings.execution
    return {
        "kernels": execution.kernels.name,
        "attention": execution.attention.name,
        "gelu_epilogue": execution.gelu_epilogue,
        "eight_bit": settings.eight_bit and str(settings.eight_bit).removeprefix("torch."),
        "skipping": settings.skipping and dataclasses.asdict(settings.skipping),
    }


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
