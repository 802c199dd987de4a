"""What a picture shows, measured, and held against the scene that was asked for.

Grounds are the same all along a row, and things keep away from the left and right edges; so the
edges tell each row's ground, and what differs from it is a thing. A thing's colour is the name
nearest to its median; its shape the one whose ideal mask, with the same area and centroid, it
overlaps most, if its outline is near enough to that one's: a lumpy circle is no circle. Its size is
judged by its area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.miniature.scenes import (
    COLOURS,
    DISTANCES,
    PLACES,
    SHAPES,
    Pixels,
    Plane,
    Scene,
    Thing,
    draw_ground,
    mask,
)

MARGIN = 0.03  # of the width, at each side
DIFFERENCE = 0.14  # from the ground, as a distance in RGB of 0 … 1
LEAST_AREA = 300  # pixels; the smallest thing, a star, has 1,800, and a speck of less is no thing
# The mean distance by which an outline may be off, in radii, whatever the shape.
OUTLINE_OFF = 0.03
INNER = 5  # pixels from the outline, which is blurred: from there on colours count
SIZE_TOLERANCE = 0.15  # sizes are a quarter apart at the least
PLACE_TOLERANCE = 0.125  # of the width or height; places are a quarter apart
UNEVEN, LEAST_EVEN = 0.2, 0.9  # at least this share of a thing lies this near to its colour
GROUND_DIFFERENCE, GROUND_OFF = 0.2, 0.15  # at most this share of the rows is further off
GROUND_SLACK = 0.01  # of the height
TEMPLATE = 96  # pixels

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32) / 255


@dataclass(frozen=True)
class Found:
    """One thing in a picture; lengths as in `scenes.Thing`."""

    shape: str | None  # None: none of them
    colour: str | None  # None: of several colours
    x: float
    y: float
    radius: float  # in pixels, by its area


@dataclass(frozen=True)
class Verdict:
    """What is right. Tuples have one entry for each thing asked for."""

    ground: bool
    count: bool
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    sizes: tuple[bool, ...]
    place: bool

    @property
    def all(self) -> bool:
        things = self.colours + self.shapes + self.sizes
        return self.ground and self.count and self.place and all(things)


def judge(pixels: Pixels, scene: Scene) -> Verdict:
    """Hold a picture, [H, W, 3] in [0, 1], against the scene it should show."""
    height, width = pixels.shape[:2]
    asked = [(thing, radius) for thing, _, _, radius in scene.placed(width, height)]
    found = sorted(things(pixels), key=lambda one: one.x if scene.arrangement == "row" else one.y)
    count = len(found) == len(asked)
    # Whatever the order: that counts for the place. Of too many things, the first are looked at.
    candidates: list[Found | None] = [*found[: len(asked) + 1]]
    candidates += [None] * (len(asked) - len(candidates))
    paired = max(permutations(candidates, len(asked)), key=lambda picked: _matches(asked, picked))
    right = [_compare(*pair) for pair in zip(asked, paired, strict=True)]
    colours, shapes, sizes = zip(*right, strict=True)
    return Verdict(
        ground=_ground_is_right(pixels, scene),
        count=count,
        colours=colours,
        shapes=shapes,
        sizes=sizes,
        place=count and _place_is_right(found, scene, asked),
    )


Asked = tuple[Thing, int]  # with its radius in pixels


def _compare(asked: Asked, found: Found | None) -> tuple[bool, bool, bool]:
    """Whether colour, shape and size are right."""
    if found is None:
        return False, False, False
    thing, radius = asked
    size = abs(found.radius / radius - 1) < SIZE_TOLERANCE
    return found.colour == thing.colour, found.shape == thing.shape, size


def _matches(asked: Sequence[Asked], found: Sequence[Found | None]) -> int:
    return sum(sum(_compare(*pair)) for pair in zip(asked, found, strict=True))


def _place_is_right(order: list[Found], scene: Scene, asked: Sequence[Asked]) -> bool:
    """`order`: as many things as asked for, along the row or column."""
    if scene.arrangement == "place":
        if not scene.place:
            return True
        x, y = PLACES[scene.place]
        return abs(order[0].x - x) < PLACE_TOLERANCE and abs(order[0].y - y) < PLACE_TOLERANCE
    spread_x = max(one.x for one in order) - min(one.x for one in order)
    spread_y = max(one.y for one in order) - min(one.y for one in order)
    if (spread_x > spread_y) != (scene.arrangement == "row"):
        return False
    best = max(_matches(asked, several) for several in permutations(order))
    return _matches(asked, order) == best


def things(pixels: Pixels) -> list[Found]:
    """Every thing in a picture, [H, W, 3] in [0, 1]."""
    height, width = pixels.shape[:2]
    ground = np.median(_edges(pixels), axis=1)  # [H, 3]
    differs = np.linalg.norm(pixels - ground[:, None, :], axis=2) > DIFFERENCE
    # Stripes' edges are not sharp, and may lie a little lower here than there: such threads go.
    differs = ndimage.binary_opening(differs, np.ones((7, 7), bool))
    labels, _ = ndimage.label(differs)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        part = labels[box] == index
        if part.sum() < LEAST_AREA:
            continue
        inner = ndimage.binary_erosion(part, iterations=INNER)
        colours = pixels[box][inner if inner.any() else part]
        colour = np.median(colours, axis=0)
        # What is nearer to the thing's colour than to the ground's: outlines at half their height.
        to_thing = np.linalg.norm(pixels[box] - colour, axis=2)
        nearer = part & (
            to_thing < np.linalg.norm(pixels[box] - ground[box[0]][:, None, :], axis=2)
        )
        part = nearer if nearer.any() else part
        even = np.mean(np.linalg.norm(colours - colour, axis=1) < UNEVEN) > LEAST_EVEN
        shape = shape_of(part)
        rows, columns = np.nonzero(part)
        found.append(
            Found(
                shape=shape,
                colour=nearest(colour) if even else None,
                x=float(columns.mean() + box[1].start) / width,
                y=float(rows.mean() + box[0].start) / height,
                radius=float(np.sqrt(part.sum() / _unit_areas()[shape or "circle"])),
            )
        )
    return found


def _edges(pixels: Pixels) -> Pixels:
    margin = max(int(MARGIN * pixels.shape[1]), 1)
    return np.concatenate([pixels[:, :margin], pixels[:, -margin:]], axis=1)


def nearest(colour: Plane) -> str:
    """The name of the colour nearest to [3] in [0, 1]."""
    return _NAMES[int(np.linalg.norm(_PALETTE - colour, axis=1).argmin())]


def shape_of(part: NDArray[np.bool_]) -> str | None:
    """The shape that a mask shows, or None where it shows none of them well enough."""
    overlaps = overlaps_of(part)
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= least_overlaps()[best] else None


def overlaps_of(part: NDArray[np.bool_]) -> dict[str, float]:
    """Intersection over union of a mask with each ideal one, same area and centroid."""
    rows, columns = np.nonzero(part)
    scale = np.sqrt(part.sum() / _AREA)
    middle = (np.arange(TEMPLATE) + 0.5 - TEMPLATE / 2) * scale
    down = np.floor(rows.mean() + 0.5 + middle).astype(int)
    across = np.floor(columns.mean() + 0.5 + middle).astype(int)
    inside = ((down >= 0) & (down < part.shape[0]))[:, None] & (
        (across >= 0) & (across < part.shape[1])
    )
    seen = part[down.clip(0, part.shape[0] - 1)][:, across.clip(0, part.shape[1] - 1)] & inside
    return {
        shape: float((seen & template).sum() / (seen | template).sum())
        for shape, template in _templates().items()
    }


@cache
def least_overlaps() -> dict[str, float]:
    """By shape, what is left of the overlap where all of the outline is off by `OUTLINE_OFF`."""
    across = np.linspace(-1.3, 1.3, 1041, dtype=np.float32)
    square = float(across[1] - across[0]) ** 2
    near = 0.02
    outlines = {
        shape: float((np.abs(distance(across[None], across[:, None])) < near).sum()) * square
        for shape, distance in DISTANCES.items()
    }
    return {
        shape: 1 - OUTLINE_OFF * outlines[shape] / (2 * near) / area
        for shape, area in _unit_areas().items()
    }


@cache
def _unit_areas() -> dict[str, float]:
    """Area of each shape of radius 1."""
    return {shape: float(mask(shape, 240, 120, 120, 100).sum()) / 100**2 for shape in SHAPES}


_AREA = (TEMPLATE / 2.6) ** 2


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    """Each shape with an area of `_AREA` and its centroid in the middle."""
    made = {}
    for shape in SHAPES:
        middle = radius = TEMPLATE / 4
        ideal = mask(shape, TEMPLATE, 2 * middle, 2 * middle, radius)
        radius *= np.sqrt(_AREA / ideal.sum())
        ideal = mask(shape, TEMPLATE, 2 * middle, 2 * middle, radius)
        steps = np.arange(TEMPLATE) + 0.5
        x = 4 * middle - (ideal.sum(0) @ steps) / ideal.sum()
        y = 4 * middle - (ideal.sum(1) @ steps) / ideal.sum()
        made[shape] = mask(shape, TEMPLATE, x, y, radius) > 0.5
    return made


def _ground_is_right(pixels: Pixels, scene: Scene) -> bool:
    """Whether the edges have the colours of the ideal ground, row by row."""
    height, width = pixels.shape[:2]
    ideal = draw_ground(scene, width, height)[:, 0]  # [H, 3]
    seen = np.median(_edges(pixels), axis=1)
    slack = max(int(GROUND_SLACK * height), 1)  # rows by which a stripe may lie too high or low
    off = min(
        float(
            np.mean(np.linalg.norm(np.roll(ideal, by, axis=0) - seen, axis=1) > GROUND_DIFFERENCE)
        )
        for by in range(-slack, slack + 1, max(slack // 4, 1))
    )
    return off < GROUND_OFF
