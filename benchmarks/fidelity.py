"""How near `regular` and `high` come to `none`: `python -m benchmarks.fidelity MODEL`.

Draws every prompt at `none` and at each other level, with the same seeds. PSNR, SSIM and LPIPS tell
a level's picture from that of `none`; CLIP score and ImageReward judge each, beside that of `none`.
The last line of the output is one JSON object; `--sheet FILE.png` shows the pictures side by side.

For whoever has the weights: pictures of random weights mean nothing. Nothing is ever fetched for a
metric; what is not there is left out, and the report says why. Pictures are not screened, since the
safety checker's black ones would be equal at all levels: look before you show them to others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.latency import device_name, parse_size, positive
from benchmarks.metrics import TITLES, Metric, find_metrics
from benchmarks.random_model import krea_of
from benchmarks.sheet import columns, contact_sheet, cut, short
from krea_local import engine, speed
from krea_local.api import choose_device
from krea_local.errors import (
    InvalidRequest,
    KreaError,
    KreaWarning,
)
from krea_local.info import versions
from krea_local.pipeline import Krea
from krea_local.recipe import encode, with_recipe, write_atomically
from krea_local.schema import Acceleration
from krea_local.skipping import StepCache

LOSSY: tuple[Acceleration, ...] = ("regular", "high")
EMULATED = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
GOALS: dict[str, dict[Acceleration, float]] = {
    "lpips": {"regular": 0.13, "high": 0.13},  # the mean should be below
    "image_reward": {"regular": 1.0, "high": 2.5},  # percent of the mean that is lost, at most
}
GOAL_PROMPTS = 50
SHEET_ROWS = 100  # some 60 MB of PNG

PROMPTS = (
    # People
    "portrait of an old fisherman with a grey beard, window light from the left, 85 mm",
    "a young woman with freckles laughing, hair across her face, overcast afternoon, film grain",
    "close-up of a boy with missing front teeth holding a snail on his palm",
    "a grandmother and her granddaughter kneading dough at a floury kitchen table",
    "black and white portrait of a jazz trumpeter between two songs, sweat on his forehead",
    "three friends in raincoats waiting under one umbrella, seen from behind",
    "a bearded man in a green turban looking straight at the camera, plain ochre wall",
    "a ballet dancer tying her shoe in an empty rehearsal room, long shadows",
    # Hands
    "two hands threading a needle with red thread, macro",
    "a potter's wet hands shaping a bowl on a wheel",
    "a pianist's hands on worn ivory keys, seen from above",
    "a child counting to seven on her fingers",
    # Streets and interiors
    "rush hour at a tram stop in the rain, reflections of red tail lights on cobblestones",
    "a narrow alley in Naples with laundry hung between the houses, harsh noon sun",
    "night market stall selling grilled squid, steam, paper lanterns, candid phone photo",
    "a bicycle leaning against a blue door in a whitewashed village",
    "an empty diner at four in the morning, green neon light on chrome stools",
    "a cluttered watchmaker's workshop, hundreds of small parts in wooden drawers",
    "a sunlit library reading room with a spiral staircase, wide angle",
    "commuters asleep in a subway car, fluorescent light, one of them holds a bunch of tulips",
    # Text in the picture
    'a hand-painted shop sign that says "FRESH BREAD DAILY" above a bakery window',
    'a chalkboard menu reading "Soup of the day: tomato, 4.50"',
    'a neon sign that spells "open until late" on a brick wall',
    'a vintage travel poster of the Alps with the title "GRINDELWALD"',
    'a birthday cake with "Happy 80th, Ida" in blue icing',
    "a newspaper front page on a cafe table next to a half-drunk espresso",
    # Animals
    "a red fox in fresh snow, breath visible, early morning",
    "two herons fighting over a fish, water drops frozen in the air",
    "a tabby cat asleep in a cardboard box that is too small for it",
    "an octopus changing colour on a coral reef, underwater photograph",
    "a flock of starlings above a power station at dusk",
    "extreme close-up of a bumblebee covered in pollen on a thistle",
    # Landscapes and weather
    "a lone birch in a barley field before a thunderstorm",
    "terraced rice fields at sunrise with mist in the valley, aerial photograph",
    "a frozen lake with methane bubbles under clear ice, mountains behind",
    "long exposure of a lighthouse in a gale, waves breaking over the pier",
    "sand dunes at night under the milky way, one small tent glowing",
    "autumn beech forest, a path covered with leaves, low sun between the trunks",
    # Illustration and painting
    "a watercolour of a harbour with fishing boats, loose brushwork, much white paper",
    "flat vector illustration of a city park with cyclists and a kiosk, four colours",
    "ink drawing of a dragon coiled around a clock tower, fine hatching",
    "a children's book picture of a hedgehog sailing in a walnut shell",
    "an oil painting of a still life with lemons, a pewter jug and a dead partridge",
    "isometric pixel art of a ramen shop at night",
    # Objects and products
    "product photo of a glass perfume bottle on wet black slate, rim light",
    "a pair of worn leather hiking boots on a white background",
    "an exploded view of a mechanical camera, every part floating in order",
    "a bowl of ramen with a soft egg, chopsticks lifting noodles, steam",
    # Counting and places
    "five green apples and two pears in a row on a wooden shelf",
    "a red cube on top of a blue sphere, to the right of a yellow cone, studio light",
)


@dataclass(frozen=True)
class Plan:
    """What is drawn of each prompt, and how it is judged."""

    levels: tuple[Acceleration, ...]  # `none` first
    seeds: int
    width: int
    height: int
    steps: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Shot:
    """What is kept of one picture at one level.

    Attributes:
        seconds: of the call alone: its prompt was encoded before, and nothing is screened.
        skipped: denoising steps, None where the level skips none.
        figures: by metric; an infinite PSNR means that the pictures are equal.
    """

    prompt: str
    seed: int
    level: Acceleration
    seconds: float
    skipped: int | None
    size: tuple[int, int]
    notices: tuple[str, ...]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A finished prompt: its shots, and thumbnails of its first seed in the sheet's columns."""

    prompt: str
    shots: tuple[Shot, ...]
    thumbnails: tuple[Image.Image, ...]


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        result, rows = measure(options)
        print(table(result))
        line = json.dumps(result, allow_nan=False)
        try:
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            if options.sheet:
                sheet = with_recipe(contact_sheet(result, rows), {})  # only marked as generated
                write_atomically(encode(sheet, "png"), options.sheet, overwrite=True)
                print(f"{'sheet':15} {options.sheet}")
        finally:
            print(line)
    except (KreaError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    return {None: 0, "interrupted": 130}.get(result["stopped"], 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a hub id, krea, mini, tiny or random-12b")
    add("--prompts", type=Path, metavar="FILE", help="one a line, # starts a comment; or built in")
    add("--limit", type=positive, metavar="N", help="only the first N prompts")
    add("--seeds", type=positive, default=1, metavar="N", help="pictures a prompt: seeds 0 … N-1")
    add("--levels", nargs="+", default=LOSSY, choices=LOSSY, help="to compare with none")
    add("--image-size", default="1024x1024", help="WIDTHxHEIGHT or a preset")
    add("--steps", type=positive, default=28)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--offload", default="none")
    add("--emulate", choices=list(EMULATED), help="these 8 bits on the CPU, slowly")
    add("--clip", type=Path, metavar="FOLDER", help="CLIP, such as openai/clip-vit-large-patch14")
    add(
        "--image-reward",
        type=Path,
        metavar="PATH",
        help="ImageReward.safetensors or its folder, with bert-base-uncased's vocab.txt beside it",
    )
    add("--metrics-device", default="cpu", help="where LPIPS, CLIP and ImageReward run")
    add("--sheet", type=Path, metavar="FILE.png", help="write the pictures side by side")
    add("--output", type=Path, help="append the JSON line to this file too")
    return parser


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: one a line; blank lines and lines that start with # are skipped.

    Raises:
        InvalidRequest: it cannot be read, or holds no prompts.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise InvalidRequest(f"--prompts {file}: cannot be read: {reason}") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InvalidRequest(f"--prompts {file}: holds no prompts")
    return prompts


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Draw and judge. An interrupt or an error ends it with the prompts that are finished.

    Raises:
        KreaError: before the first prompt was finished.
        KeyboardInterrupt: likewise.
    """
    _check_paths(options)
    prompts = (read_prompts(options.prompts) if options.prompts else list(PROMPTS))[: options.limit]
    width, height = parse_size(options.image_size)
    if options.emulate and choose_device(options.device).type != "cpu":
        raise InvalidRequest("--emulate: needs --device cpu; a GPU runs what it can")
    metrics, unmeasured = find_metrics(options)
    levels: tuple[Acceleration, ...] = ("none", *dict.fromkeys(options.levels))
    plan = Plan(levels, options.seeds, width, height, options.steps, metrics)
    with emulated(options.emulate) if options.emulate else contextlib.nullcontext():
        krea = krea_of(options.model, options.device, options.dtype, options.offload, 1)
        rows, stopped = _draw_all(krea, prompts, plan, thumbnails=bool(options.sheet))
        lossy = {level: lossy_steps(krea.prepare(level)) for level in levels}
    shots = [shot for row in rows for shot in row.shots]
    return {
        "model": krea.label,
        "device": device_name(krea.device),
        "dtype": str(krea.dtype).removeprefix("torch."),
        "offload": krea.offload,
        "width": shots[0].size[0],  # as drawn, which rounding may have changed
        "height": shots[0].size[1],
        "steps": plan.steps,
        "prompts": len(rows),
        "prompts_asked": len(prompts),
        "seeds": plan.seeds,
        "emulated": options.emulate,
        "stopped": stopped,
        "levels": [level_report(level, shots, plan, lossy[level]) for level in levels],
        "unmeasured": unmeasured,
        "versions": versions() | {name: metadata.version(name) for name in _packages(metrics)},
    }, rows


def _draw_all(
    krea: Krea, prompts: Sequence[str], plan: Plan, *, thumbnails: bool
) -> tuple[list[Row], str | None]:
    """The prompts that could be finished, and what ended it before the last, if anything did."""
    rows: list[Row] = []
    try:
        for level in plan.levels:  # so that nothing is compiled or quantised while it is timed
            draw(krea, prompts[0], 0, level, replace(plan, steps=min(2, plan.steps)))
        for prompt in prompts:
            keep = thumbnails and len(rows) < SHEET_ROWS
            rows.append(judge(krea, prompt, plan, first=len(rows) * plan.seeds, keep=keep))
            print(_progress(rows[-1], len(rows), len(prompts)), file=sys.stderr)
    except (KeyboardInterrupt, KreaError) as error:
        if not rows:
            raise
        return rows, str(error) if isinstance(error, KreaError) else "interrupted"
    return rows, None


def _check_paths(options: argparse.Namespace) -> None:
    """Fail now on what would fail after all is drawn."""
    if options.sheet and options.sheet.suffix.lower() != ".png":
        raise InvalidRequest(f"--sheet {options.sheet}: should end in .png")
    for name in ("sheet", "output"):
        file = getattr(options, name)
        if file and file.is_dir():
            raise InvalidRequest(f"--{name} {file}: should be a file")
        if file:
            file.absolute().parent.mkdir(parents=True, exist_ok=True)


def _packages(metrics: Sequence[Metric]) -> list[str]:
    return [metric.package for metric in metrics if metric.package]


@contextlib.contextmanager
def emulated(eight_bit: str) -> Iterator[None]:
    """While open, every device passes for one with these 8-bit products, of `EMULATED`."""
    with mock.patch.object(speed, "eight_bit_of", return_value=EMULATED[eight_bit]):
        yield


@contextlib.contextmanager
def recorded_caches() -> Iterator[list[StepCache]]:
    """While open, collects the step caches that the pipeline makes: one a batch that may skip."""
    made: list[StepCache] = []

    class Recorded(StepCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    with mock.patch.object(engine, "StepCache", Recorded):
        yield made


def lossy_steps(settings: speed.Settings) -> list[str]:
    """Which of a level's steps that change the picture are on, named as in `speed.LEVELS`."""
    on = {
        "eight_bit_linears": settings.eight_bit is not None,
        "skip_steps": settings.skipping is not None,
    }
    return [name for name, is_on in on.items() if is_on]


def judge(krea: Krea, prompt: str, plan: Plan, *, first: int, keep: bool) -> Row:
    """Draw a prompt at all levels, and compare; only one seed's pictures are held at a time.

    Args:
        krea: draws.
        prompt: what.
        plan: how often, and what is measured.
        first: the number of its first picture among all; levels take turns in going first, since
            whichever does computes what the pictures of a prompt share.
        keep: thumbnails too.
    """
    krea.encode_prompt(prompt)  # the same for all levels, so not in their seconds
    shots: list[Shot] = []
    thumbnails: tuple[Image.Image, ...] = ()
    for seed in range(plan.seeds):
        turn = (first + seed) % len(plan.levels)
        order = plan.levels[turn:] + plan.levels[:turn]
        drawn = {level: draw(krea, prompt, seed, level, plan) for level in order}
        reference = drawn["none"][0]
        for level in plan.levels:
            image, shot = drawn[level]
            figures = {
                metric.name: metric.measure(prompt, image, reference)
                for metric in plan.metrics
                if not (metric.compares and level == "none")
            }
            shots.append(replace(shot, figures=figures))
        if keep and seed == 0:
            thumbnails = columns([drawn[level][0] for level in plan.levels])
    return Row(prompt, tuple(shots), thumbnails)


def draw(
    krea: Krea, prompt: str, seed: int, level: Acceleration, plan: Plan
) -> tuple[Image.Image, Shot]:
    """One picture, not yet judged."""
    with recorded_caches() as caches, warnings.catch_warnings():
        warnings.simplefilter("ignore", KreaWarning)  # notices stand in the report
        start = time.perf_counter()
        result = krea.txt2img(
            prompt,
            image_size={"width": plan.width, "height": plan.height},
            num_inference_steps=plan.steps,
            seed=seed,
            enable_safety_checker=False,
            acceleration=level,
        )
        seconds = time.perf_counter() - start
    skipped = sum(len(cache.skipped) for cache in caches) if caches else None
    image = result.images[0]
    return image, Shot(prompt, seed, level, seconds, skipped, image.size, result.notices, {})


def _progress(row: Row, done: int, of: int) -> str:
    figures = [
        f"{shot.level} {shot.figures['psnr']:.1f} dB"
        for shot in row.shots
        if shot.seed == 0 and shot.level != "none"
    ]
    return f"{done}/{of}  {', '.join(figures)}  {cut(row.prompt, 60)}"


def level_report(
    level: Acceleration, shots: Sequence[Shot], plan: Plan, lossy: list[str]
) -> dict[str, Any]:
    """The figures of one level over all pictures."""
    own = [shot for shot in shots if shot.level == level]
    none = [shot for shot in shots if shot.level == "none"]
    seconds = statistics.median(shot.seconds for shot in own)
    skipped = [shot.skipped for shot in own if shot.skipped is not None]
    wanted = [step.name for step in speed.LEVELS[level] if not step.lossless]
    left_out = [name for name in wanted if name not in lossy]
    return {
        "acceleration": level,
        "engine": f"krea_local:{level}",
        "seconds": seconds,
        "speedup": statistics.median(shot.seconds for shot in none) / seconds,
        "steps_skipped": sum(skipped) / (plan.steps * len(skipped)) if skipped else None,
        "lossy_steps": lossy,
        "left_out": left_out,
        "notices": list(dict.fromkeys(notice for shot in own for notice in shot.notices)),
        "metrics": {
            metric.name: _judged(metric.name, level, summary(metric, own, none), left_out)
            for metric in plan.metrics
            if not (metric.compares and level == "none")
        },
    }


def summary(metric: Metric, own: Sequence[Shot], none: Sequence[Shot]) -> dict[str, Any]:
    """Mean, median and worst picture of a metric at one level.

    Figures that are not finite, such as the PSNR of equal pictures, are left out and counted in a
    note. Of a metric that judges one picture, `worst` is the worst change from `none`.
    """
    report: dict[str, Any] = {"mean": None, "median": None}
    figures = [shot.figures[metric.name] for shot in own]
    changes = figures
    if not metric.compares:
        before = [shot.figures[metric.name] for shot in none]
        changes = [figure - other for figure, other in zip(figures, before, strict=True)]
    finite = [i for i, change in enumerate(changes) if math.isfinite(change)]
    if finite:
        kept = [figures[i] for i in finite]
        report |= {"mean": statistics.fmean(kept), "median": statistics.median(kept)}
    if own[0].level != "none":
        worst = None
        if finite:
            worst = (min if metric.more_is_better else max)(finite, key=changes.__getitem__)
        report |= {
            "worst": None if worst is None else changes[worst],
            "worst_prompt": None if worst is None else own[worst].prompt,
            "worst_seed": None if worst is None else own[worst].seed,
        }
        if not metric.compares:
            mean = statistics.fmean(before[i] for i in finite) if finite else 0.0
            lost = 100 * (1 - report["mean"] / mean) if mean > 0 else None
            report |= {"lost_percent": lost}
    odd = len(figures) - len(finite)
    if odd:
        what = "equal to those of none, PSNR infinite" if metric.name == "psnr" else "not finite"
        report["note"] = f"{odd} of {len(figures)} pictures are {what}"
    return report


def _judged(
    name: str, level: Acceleration, figures: dict[str, Any], left_out: Sequence[str]
) -> dict[str, Any]:
    """`figures` with what performance asks of them, if anything, and whether it is met.

    Not judged where a step of the level did not run, or where the figure means nothing.
    """
    limit = GOALS.get(name, {}).get(level)
    if limit is None:
        return figures
    judged = "mean" if name == "lpips" else "lost_percent"
    why = None
    if left_out:
        why = f"{' and '.join(left_out)} did not run"
    elif figures[judged] is None:
        why = "nothing to judge" if name == "lpips" else "the mean of none is not above 0"
    met = None if why else figures[judged] < limit
    return figures | {"goal": {"of": judged, "below": limit, "met": met, "not_judged": why}}


def table(result: Mapping[str, Any]) -> str:
    """The report for people."""
    drawn = f"{result['prompts']} prompts x {result['seeds']} seeds"
    if result["prompts"] < result["prompts_asked"]:
        drawn += f" (of {result['prompts_asked']} prompts: {result['stopped']})"
    how = f", {result['emulated']} emulated" if result["emulated"] else ""
    lines = [
        f"{'device':15} {result['device']}{how}",
        f"{'model':15} {result['model']}, {result['dtype']}, offload {result['offload']}",
        f"{'pictures':15} {drawn}, {result['width']}x{result['height']}, {result['steps']} steps",
        "",
        f"{'':15} {'level':8} {'seconds':>9} {'speed-up':>9} {'steps skipped':>14}",
    ]
    for level in result["levels"]:
        share = level["steps_skipped"]
        lines.append(
            f"{'':15} {level['acceleration']:8} {level['seconds']:9.3f} {level['speedup']:8.2f}x "
            f"{'none' if share is None else f'{share:.0%}':>14}"
        )
    head = f"{'':15} {'level':8} {'mean':>10} {'median':>10} {'worst':>10}"
    lines += ["", head + "  the worst prompt"]
    for name, title in TITLES.items():
        for level in result["levels"]:
            if name in level["metrics"]:
                lines += _figure_lines(title, level, level["metrics"][name], result["prompts"])
                title = ""
    if any(name in result["levels"][0]["metrics"] for name in TITLES):
        lines.append(f"{'':15} (worst of a score: its change from none)")
    lines += ["", *(f"{'notice':15} {n}" for level in result["levels"] for n in level["notices"])]
    lines += [f"{'not measured':15} {TITLES[n]}: {why}" for n, why in result["unmeasured"].items()]
    return "\n".join(line.rstrip() for line in lines)


def _figure_lines(
    title: str, level: Mapping[str, Any], figures: Mapping[str, Any], prompts: int
) -> list[str]:
    """A line of figures, and one each for what is to be said of them."""
    shown = [figures.get(key) for key in ("mean", "median", "worst")]
    worst = ""
    if figures.get("worst_prompt") is not None:
        worst = f"{cut(figures['worst_prompt'], 48)} (seed {figures['worst_seed']})"
    cells = " ".join(f"{'' if figure is None else short(figure):>10}" for figure in shown)
    lines = [f"{title:15} {level['acceleration']:8} {cells}  {worst}"]
    said = [figures["note"]] if "note" in figures else []
    if figures.get("lost_percent") is not None:
        lost = figures["lost_percent"]
        said.append(f"{abs(lost):.2f} % of the mean of none is {'won' if lost < 0 else 'lost'}")
    judged = figures.get("goal")
    if judged:
        limit = f"{judged['below']:g}{' %' if judged['of'] == 'lost_percent' else ''}"
        verdict = {True: "met", False: "not met", None: f"not judged: {judged['not_judged']}"}
        few = judged["met"] is not None and prompts < GOAL_PROMPTS
        on = f" (on {prompts} prompts; it wants {GOAL_PROMPTS})" if few else ""
        said.append(f"goal below {limit}: {verdict[judged['met']]}{on}")
    return lines + [f"{'':24} {one}" for one in said]


if __name__ == "__main__":
    sys.exit(main())
