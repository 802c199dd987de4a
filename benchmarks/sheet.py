"""Pictures of all levels side by side, with their figures. Knows nothing of how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from benchmarks.metrics import TITLES

if TYPE_CHECKING:
    from benchmarks.fidelity import Row, Shot

THUMBNAIL = 256
AMPLIFIED = 4


def columns(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Thumbnails of a row: `none`, then each level and its difference from `none`."""
    none, *others = images
    thumbnails = [_thumbnail(none)]
    for image in others:
        difference = _thumbnail(ImageChops.difference(image, none), Image.Resampling.BOX)
        amplified = difference.point([min(255, AMPLIFIED * value) for value in range(256)] * 3)
        thumbnails += [_thumbnail(image), amplified]
    return tuple(thumbnails)


def _thumbnail(image: Image.Image, how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """`image` with its longer side THUMBNAIL; a smaller one is enlarged, its pixels visible."""
    scale = THUMBNAIL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize((size[0], size[1]), how if scale < 1 else Image.Resampling.NEAREST)


MARGIN, GAP = 24, 8
HEAD, CAPTION, FIGURES, BETWEEN = 104, 30, 18, 18  # heights; FIGURES is that of one line
PAPER, INK, GREY, LINE = "#ffffff", "#1a1a1a", "#6a6a6a", "#dddddd"


def contact_sheet(result: Mapping[str, Any], rows: Sequence[Row]) -> Image.Image:
    """One row a prompt, at its first seed; one column a level, and its difference from `none`."""
    rows = [row for row in rows if row.thumbnails]
    levels = result["levels"]
    width, height = rows[0].thumbnails[0].size
    cell = max(width, 224)  # a narrower one has no room for two scores
    captions = max(len(_captions(shot, 0)) for row in rows for shot in row.shots)
    row_height = CAPTION + height + captions * FIGURES + BETWEEN
    lefts = [
        # A level and its difference are a group; the gap between groups is wider.
        MARGIN + column * (cell + GAP) + (column + 1) // 2 * GAP
        for column in range(2 * len(levels) - 1)
    ]
    size = (lefts[-1] + cell + MARGIN, HEAD + len(rows) * row_height)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, result, lefts, cell)
    for number, row in enumerate(rows):
        top = HEAD + number * row_height
        draw.line((MARGIN, top, size[0] - MARGIN - 1, top), fill=LINE)
        draw_text(
            draw, (MARGIN, top + 7), " ".join(row.prompt.split()), 14, INK, size[0] - 2 * MARGIN
        )
        for left, thumbnail in zip(lefts, row.thumbnails, strict=True):
            sheet.paste(thumbnail, (left, top + CAPTION))
        shots = {shot.level: shot for shot in reversed(row.shots)}  # the first seed's stays
        for column, level in enumerate(levels):
            left = lefts[max(0, 2 * column - 1)]
            room = 2 * cell + GAP if column else cell
            for line, text in enumerate(_captions(shots[level["acceleration"]], result["steps"])):
                at = (left, top + CAPTION + height + 4 + line * FIGURES)
                draw_text(draw, at, text, 12, GREY, room)
    return sheet


def _draw_head(
    draw: ImageDraw.ImageDraw, result: Mapping[str, Any], lefts: Sequence[int], cell: int
) -> None:
    title = f"{result['model']}: acceleration against none"
    emulated = f", {result['emulated']} emulated" if result["emulated"] else ""
    about = (
        f"{result['width']}x{result['height']}, {result['steps']} steps, seed 0, "
        f"{result['dtype']} on {result['device']}{emulated}"
    )
    across = lefts[-1] + cell - MARGIN
    draw_text(draw, (MARGIN, 14), title, 20, INK, across)
    draw_text(draw, (MARGIN, 41), about, 12, GREY, across)
    for column, level in enumerate(result["levels"]):
        left, name = lefts[max(0, 2 * column - 1)], level["acceleration"]
        speed_up = f", {level['speedup']:.2f}x as fast" if column else ""
        draw_text(draw, (left, 64), name, 15, INK, cell)
        draw_text(draw, (left, 84), f"{level['seconds']:.2f} s{speed_up}", 12, GREY, cell)
        if column:
            text = f"{name} - none, {AMPLIFIED}x"
            draw_text(draw, (left + cell + GAP, 64), text, 15, INK, cell)


def _captions(shot: Shot, steps: int) -> list[str]:
    """What is written under a picture: how far it is from `none`, and its own scores."""
    distances: list[str] = []
    scores: list[str] = []
    for name, figure in shot.figures.items():
        if name == "psnr":
            distances.append("equal to none" if math.isinf(figure) else f"{short(figure)} dB")
        else:
            compares = name in ("ssim", "lpips")
            (distances if compares else scores).append(f"{TITLES[name]} {short(figure)}")
    if shot.skipped is not None:
        distances.append(f"{shot.skipped} of {steps} steps skipped")
    return [",  ".join(parts) for parts in (distances, scores) if parts]


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: str, width: int
) -> None:
    """One line of text, cut where it would be wider than `width`."""
    font = _font(size)
    length = len(text)
    while length > 1 and draw.textlength(cut(text, length), font=font) > width:
        length -= 1
    draw.text(at, cut(text, length), fill=ink, font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu if the system has it; Pillow's own has hardly more than ASCII."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def cut(text: str, length: int) -> str:
    """`text` in at most `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def short(figure: float) -> str:
    """Four digits."""
    return f"{figure:#.4g}"
