"""`python -m benchmarks.miniature.evaluate MODEL`: does the miniature draw what it is asked to?

Every figure is a share of pictures, or of things in them, that `judge` finds right. Each prompt
names a pair of shape and colour that the transformer and its text encoders never saw together.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.fidelity import EMULATED, emulated, lossy_steps, recorded_caches
from benchmarks.latency import device_name
from benchmarks.metrics import psnr
from benchmarks.miniature import chart, scenes
from benchmarks.miniature.captions import caption
from benchmarks.miniature.judge import Verdict, judge
from benchmarks.miniature.tally import Row, Tally, table
from benchmarks.sheet import draw_text
from krea_local import InvalidRequest, Krea, KreaError, KreaWarning, load
from krea_local.info import versions
from krea_local.recipe import encode, with_recipe, write_atomically
from krea_local.schema import PRESETS, Acceleration, ImageSizePreset
from krea_local.skipping import Skipping
from krea_local.weights import find

STEPS, MANY_STEPS, IMG2IMG_STEPS = 8, 28, 16
GUIDANCE = 4.5
SIZE: ImageSizePreset = "landscape_4_3"
GUIDANCES = (1.0, 2.0, 3.0, GUIDANCE, 8.0, 20.0)
STRENGTHS = (0.3, 0.6, 0.95)
STEP_COUNTS = (4, STEPS, 16, MANY_STEPS)
THRESHOLDS = (0.04, 0.08, 0.16, 0.32)
MOST_PSNR = 99.0  # of equal pictures, so that means can be taken
SAME = ("sha256", "device", "dtype")  # in figures that may stand together
SHOWN, SHEET_COLUMNS, SHEET_CELL = 20, 4, 256


@dataclass(frozen=True)
class Prompt:
    """A prompt, the scene that it means, and the seed to draw it with."""

    text: str
    scene: scenes.Scene
    seed: int


def prompts(count: int, *, trained: bool = False) -> list[Prompt]:
    """`count` prompts, of one, two and three things in turn."""
    made = []
    for index in range(count):
        random = Random(f"evaluate {trained} {index}")
        sample = scenes.trained if trained else scenes.held_out
        scene = sample(random, 1 + index % 3)
        made.append(Prompt(caption(scene, random, strange=0), scene, index))
    return made


def draw(
    krea: Krea,
    prompt: Prompt,
    *,
    image_size: ImageSizePreset | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    acceleration: Acceleration = "none",
) -> Image.Image:
    """One picture by txt2img; at the defaults of these measurements, not of the library."""
    return krea.txt2img(
        prompt.text,
        image_size=image_size or SIZE,
        num_inference_steps=steps or STEPS,
        guidance_scale=guidance_scale or GUIDANCE,
        acceleration=acceleration,
        seed=prompt.seed,
        enable_safety_checker=False,
    ).images[0]


def pixels_of(image: Image.Image) -> scenes.Pixels:
    """[H, W, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), np.float32) / np.float32(255)


@dataclass
class Bench:
    """What the parts share."""

    krea: Krea
    count: int
    shown: list[tuple[Prompt, Image.Image, bool]] = field(default_factory=list)
    _without: dict[tuple[Prompt, int], Image.Image] = field(default_factory=dict)
    _verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)

    def held_out(self) -> list[Row]:
        """Held-out prompts at the defaults; and trained ones, to compare."""
        rows: list[Row] = []
        for name, trained in (("held out", False), ("trained", True)):
            tally = Tally()
            chosen = prompts(self.count // 3 if trained else self.count, trained=trained)
            for prompt in counted(chosen, name):
                tally.add(self._verdict(prompt), prompt.scene)
            rows.append({"prompts": name} | tally.figures())
            rows += [
                {"prompts": f"{name}, {things}"} | tally.of(things).figures()
                for things in (1, 2, 3)
            ]
        return rows

    def presets(self) -> list[Row]:
        """Every preset's size, on the same prompts."""
        return [
            {"image_size": size} | self._tally(self.count // 2, size, image_size=size)
            for size in PRESETS
        ]

    def guidance(self) -> list[Row]:
        """Guidance from 1 to 20."""
        return [
            {"guidance_scale": scale}
            | self._tally(self.count // 3, f"guidance {scale}", guidance_scale=scale)
            for scale in GUIDANCES
        ]

    def steps(self) -> list[Row]:
        """Few and many steps."""
        return [
            {"steps": steps} | self._tally(self.count // 3, f"{steps} steps", steps=steps)
            for steps in STEP_COUNTS
        ]

    def strength(self) -> list[Row]:
        """img2img from the picture of one scene to the prompt of another."""
        chosen = prompts(self.count // 5)
        others = [prompt.scene for prompt in prompts(len(chosen), trained=True)]
        rows: list[Row] = []
        for strength in STRENGTHS:
            asked, given_, distances = Tally(), Tally(), []
            for prompt, other in zip(counted(chosen, f"strength {strength}"), others, strict=True):
                given = Image.fromarray(_bytes(scenes.render(other, *PRESETS[SIZE])))
                image = self.krea.img2img(
                    prompt.text,
                    image_url=given,
                    strength=strength,
                    num_inference_steps=IMG2IMG_STEPS,
                    seed=prompt.seed,
                    enable_safety_checker=False,
                ).images[0]
                pixels = pixels_of(image)
                distances.append(float(np.abs(pixels - pixels_of(given)).mean()))
                asked.add(judge(pixels, prompt.scene), prompt.scene)
                given_.add(judge(pixels, other), other)
            row = {
                "strength": strength,
                "distance_to_input": round(sum(distances) / len(distances), 4),
                "adherence_to_input": given_.figures()["adherence"],
            }
            rows.append(row | asked.figures())
        return rows

    def levels(self) -> list[Row]:
        """Acceleration against `none`, with 8 bits emulated where that was asked for."""
        levels: tuple[Acceleration, ...] = ("none", "regular", "high")
        return [
            self._against_none(level, steps, f"{level} at {steps} steps")
            for steps in (STEPS, MANY_STEPS)
            for level in levels
        ]

    def thresholds(self) -> list[Row]:
        """Step skipping alone, at several thresholds."""
        rows = []
        for threshold in THRESHOLDS:
            with self._skipping(Skipping(threshold=threshold)):
                row = self._against_none("high", MANY_STEPS, f"threshold {threshold}")
            rows.append({"threshold": threshold} | row)
        return rows

    def _tally(
        self,
        count: int,
        name: str,
        *,
        image_size: ImageSizePreset | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Row:
        tally = Tally()
        for prompt in counted(prompts(count), name):
            tally.add(
                self._verdict(
                    prompt, image_size=image_size, steps=steps, guidance_scale=guidance_scale
                ),
                prompt.scene,
            )
        return tally.figures()

    def _verdict(
        self,
        prompt: Prompt,
        *,
        image_size: ImageSizePreset | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Verdict:
        """On one picture, drawn once however many parts ask for it."""
        key = (prompt, image_size or SIZE, steps or STEPS, guidance_scale or GUIDANCE)
        if key not in self._verdicts:
            image = draw(
                self.krea,
                prompt,
                image_size=image_size,
                steps=steps,
                guidance_scale=guidance_scale,
            )
            self._verdicts[key] = verdict = judge(pixels_of(image), prompt.scene)
            if len(self.shown) < SHOWN:
                self.shown.append((prompt, image, verdict.all))
        return self._verdicts[key]

    @contextlib.contextmanager
    def _skipping(self, skipping: Skipping) -> Iterator[None]:
        """While open, `high` is `none` and this."""
        engine = self.krea.engine
        none, kept = engine.prepare("none"), engine.prepare("high")
        engine.settings["high"] = replace(none, skipping=skipping)
        try:
            yield
        finally:
            engine.settings["high"] = kept

    def _against_none(self, level: Acceleration, steps: int, name: str) -> Row:
        tally, distances, computed = Tally(), [], []
        for prompt in counted(prompts(self.count // 5), name):
            if (prompt, steps) not in self._without:
                self._without[prompt, steps] = draw(self.krea, prompt, steps=steps)
            none = image = self._without[prompt, steps]
            if level != "none":
                with recorded_caches() as caches:
                    image = draw(self.krea, prompt, steps=steps, acceleration=level)
                computed.append(steps - sum(len(cache.skipped) for cache in caches))
                distances.append(round(min(psnr(image, none), MOST_PSNR), 2))
            tally.add(judge(pixels_of(image), prompt.scene), prompt.scene)
        row: Row = {"acceleration": level, "steps": steps}
        if distances:
            row |= {
                "lossy": lossy_steps(self.krea.engine.prepare(level)),
                "psnr": round(sum(distances) / len(distances), 2),
                "worst_psnr": min(distances),
                "computed": round(sum(computed) / len(computed), 2),
            }
        return row | tally.figures()


def counted(chosen: Sequence[Prompt], name: str) -> Iterator[Prompt]:
    """The prompts, with a line on standard error now and then."""
    started = time.perf_counter()
    for number, prompt in enumerate(chosen, 1):
        yield prompt
        if number % 20 == 0 or number == len(chosen):
            seconds = (time.perf_counter() - started) / number
            print(f"{name}: {number}/{len(chosen)}, {seconds:.2f} s each", file=sys.stderr)


def _bytes(pixels: scenes.Pixels) -> Any:
    return (pixels * 255).round().astype(np.uint8)


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "held-out": Bench.held_out,
    "presets": Bench.presets,
    "guidance": Bench.guidance,
    "steps": Bench.steps,
    "strength": Bench.strength,
    "levels": Bench.levels,
    "thresholds": Bench.thresholds,
}


def contact_sheet(shown: Sequence[tuple[Prompt, Image.Image, bool]]) -> Image.Image:
    """The first pictures of a run, right or wrong, with their prompts."""
    cell, text = SHEET_CELL, 40
    rows = math.ceil(len(shown) / SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * (cell + 12) + 12, rows * (cell + text) + 12), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prompt, image, right) in enumerate(shown):
        left = 12 + index % SHEET_COLUMNS * (cell + 12)
        top = 12 + index // SHEET_COLUMNS * (cell + text)
        small = image.copy()
        small.thumbnail((cell, cell))
        sheet.paste(small, (left, top))
        words = prompt.text.split()
        half = (len(words) + 1) // 2
        for line, part in enumerate((words[:half], words[half:])):
            at = (left, top + small.height + 4 + 15 * line)
            draw_text(pen, at, " ".join(part), 11, "#1a1a1a" if right else "#b00020", cell)
    return sheet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.evaluate", description=__doc__
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="mini", help="a folder (default: mini)"
    )
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32 (default: as load's)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument(
        "--count", type=int, default=300, help="held-out prompts; other parts take a share of them"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--emulate", choices=list(EMULATED), help="these 8 bits on the CPU, for `levels`"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write the figures to this JSON file; other parts of the same checkpoint stay in it",
    )
    parser.add_argument("--sheet", type=Path, help="write pictures to this PNG file")
    parser.add_argument("--plot", type=Path, help="draw the figures to this PNG file")
    options = parser.parse_args(arguments)
    if options.count < 15:
        parser.error("--count: at least 15, so that every part has prompts of each kind")
    if options.sheet and "held-out" not in options.parts:
        parser.error("--sheet: shows the pictures of the part held-out; name it too")
    if options.plot and not chart.PANELS.keys() & set(options.parts):
        parser.error(f"--plot: draws {', '.join(chart.PANELS)}; name one of these parts too")
    try:
        evaluate(options)
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; finished parts are kept\n")
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Run the parts; what each finds is written before the next begins."""
    if options.threads:
        torch.set_num_threads(options.threads)
    krea = load(options.model, dtype=options.dtype, progress=False)
    if options.emulate and krea.device.type != "cpu":
        raise InvalidRequest("--emulate: is for a CPU; a GPU runs what it can")
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "model": krea.label,
        "sha256": sha256(find(options.model).folder / "transformer"),
        "device": device_name(krea.device),
        "dtype": str(krea.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "emulated": options.emulate,
        "versions": versions(),
        "parts": {},
    }
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        if all(earlier[key] == result[key] for key in SAME):
            result["parts"] = earlier["parts"]
            result["emulated"] = options.emulate or earlier["emulated"]
    bench = Bench(krea, options.count)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", KreaWarning)
        if options.emulate:
            stack.enter_context(emulated(options.emulate))
        for name in options.parts:
            rows = PARTS[name](bench)
            result["parts"][name] = rows
            print(f"\n{name}\n\n{table(rows)}", flush=True)
            if options.output:
                text = json.dumps(result, indent=1) + "\n"
                write_atomically(text.encode(), options.output, overwrite=True)
            if options.sheet and name == "held-out":
                sheet = with_recipe(contact_sheet(bench.shown), {})
                write_atomically(encode(sheet, "png"), options.sheet, overwrite=True)
    if options.plot:
        chart.draw(result["parts"], options.plot)


def sha256(folder: Path) -> str:
    """Of the first weights file in `folder`."""
    (file,) = sorted(folder.glob("*.safetensors"))[:1]
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
