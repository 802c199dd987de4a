"""Captioned scenes: what the miniature learns to draw, and what its pictures are held against.

A scene is one to three flat shapes on a plain, gradient or striped ground. `sample` makes one up,
`render` draws it at any size; `captions` says it in words. Places are shares of the width and the
height, and then the nearest point of a grid of 64 pixels, as many as a token has; radii and stripes
are a few round numbers of pixels. So a shape is the same few tokens wherever it lies, which is what
makes shapes learnable in an hour: scattered freely they were not, long after colours and places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.floating[Any]]  # [H, W, 3] in [0, 1]
Plane = NDArray[np.floating[Any]]  # [H, W]

COLOURS = {
    "red": (214, 45, 48),
    "orange": (243, 134, 36),
    "yellow": (250, 208, 60),
    "green": (46, 160, 92),
    "blue": (40, 98, 204),
    "purple": (130, 64, 180),
    "pink": (245, 150, 192),
    "black": (30, 30, 34),
    "white": (250, 250, 247),
    "gray": (150, 154, 160),
}
OBJECT_COLOURS = tuple(COLOURS)[:-1]
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = ("small", "", "large")
GROUNDS = ("plain", "gradient", "stripes")
# Not in what the flow is trained on, which learns what words mean. (The autoencoder, which reads no
# captions, sees every shape in every colour.)
HELD_OUT = {
    ("circle", "purple"),
    ("square", "pink"),
    ("triangle", "red"),
    ("star", "blue"),
    ("heart", "green"),
    ("ring", "orange"),
}
GRID = 64  # pixels
SMALL_PICTURE = 700  # pixels of the shorter side; up to it, things and stripes are smaller
# By whether the picture is small, and whether there are three things: radii in pixels.
RADII = {
    (True, False): {"small": 48, "": 72, "large": 96},
    (True, True): dict.fromkeys(SIZES, 52),
    (False, False): {"small": 72, "": 96, "large": 144},
    (False, True): dict.fromkeys(SIZES, 72),
}
STRIPES = {True: 64, False: 128}  # pixels
PLACES = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}


@dataclass(frozen=True)
class Thing:
    """One shape: what it is, and about where its middle lies."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.size


@dataclass(frozen=True)
class Scene:
    """Things from left to right or from top to bottom, and the ground they lie on."""

    things: tuple[Thing, ...]
    ground: str
    ground_colours: tuple[str, ...]
    arrangement: str  # "place", "row" or "column"
    place: str = ""

    @property
    def is_held_out(self) -> bool:
        return any((thing.shape, thing.colour) in HELD_OUT for thing in self.things)

    def placed(self, width: int, height: int) -> list[tuple[Thing, int, int, int]]:
        """Each thing with its middle and its radius, in pixels."""
        radii = RADII[min(width, height) < SMALL_PICTURE, len(self.things) == 3]
        return [
            (
                thing,
                round(thing.x * width / GRID) * GRID,
                round(thing.y * height / GRID) * GRID,
                radii[thing.size],
            )
            for thing in self.things
        ]


def sample(random: Random, count: int | None = None) -> Scene:
    """A scene at random, of one to three things (`count` if given)."""
    if count is None:
        count = random.choices((1, 2, 3), (0.34, 0.38, 0.28))[0]
    ground = random.choices(GROUNDS, (0.66, 0.17, 0.17))[0]
    colours = tuple(random.sample(tuple(COLOURS), 1 if ground == "plain" else 2))
    free = [colour for colour in OBJECT_COLOURS if _stands_out(colour, ground, colours)]
    sizes = SIZES if count < 3 else ("",)
    looks = [
        (random.choice(SHAPES), random.choice(free), random.choice(sizes)) for _ in range(count)
    ]
    if random.random() < 0.2:
        looks = looks[:1] * count
    place = random.choice(("", *PLACES)) if count == 1 else ""
    arrangement = "place" if count == 1 else random.choice(("row", "column"))
    same = len(set(looks)) == 1
    if count > 1 and same:
        arrangement = "row"
    place = place or random.choice(tuple(PLACES))
    centres = _centres(count, arrangement) if count > 1 else [PLACES[place]]
    things = [
        Thing(
            shape,
            colour,
            size,
            x,
            y,
        )
        for (shape, colour, size), (x, y) in zip(looks, centres, strict=True)
    ]
    return Scene(tuple(things), ground, colours, arrangement, place if count == 1 else "")


def _stands_out(colour: str, ground: str, ground_colours: tuple[str, ...]) -> bool:
    """Whether `colour` is far from every colour of the ground, those of a gradient included."""
    point, first, last = map(colour_of, (colour, ground_colours[0], ground_colours[-1]))
    shares = np.linspace(0, 1, 11 if ground == "gradient" else len(ground_colours))
    distances = [np.linalg.norm(first + share * (last - first) - point) for share in shares]
    return bool(min(distances) > 0.25)


def _centres(count: int, arrangement: str) -> list[tuple[float, float]]:
    along = (0.25, 0.75) if count == 2 else (0.22, 0.5, 0.78)
    return [(step, 0.5) if arrangement == "row" else (0.5, step) for step in along]


def trained(random: Random, count: int | None = None) -> Scene:
    """A scene that training may see."""
    while (scene := sample(random, count)).is_held_out:
        pass
    return scene


def held_out(random: Random, count: int | None = None) -> Scene:
    """A scene with at least one combination of shape and colour that training never shows."""
    while not (scene := sample(random, count)).is_held_out:
        pass
    return scene


def render(scene: Scene, width: int, height: int) -> Pixels:
    """Draw `scene`, anti-aliased: [height, width, 3] in [0, 1]."""
    pixels = draw_ground(scene, width, height)
    for thing, x, y, radius in scene.placed(width, height):
        draw(pixels, thing.shape, colour_of(thing.colour), x, y, radius)
    return pixels


def colour_of(name: str) -> Plane:
    """[3] in [0, 1]."""
    return np.asarray(COLOURS[name], np.float32) / 255


def draw_ground(scene: Scene, width: int, height: int, stripe: float | None = None) -> Pixels:
    """The ground alone, with stripes of the usual height: [height, width, 3] in [0, 1]."""
    stripe = stripe or STRIPES[min(width, height) < SMALL_PICTURE]
    first = colour_of(scene.ground_colours[0])
    last = colour_of(scene.ground_colours[-1])
    rows = np.arange(height, dtype=np.float32) + 0.5
    if scene.ground == "gradient":
        share = rows / height
    elif scene.ground == "stripes":
        # Distance of each row to the nearest edge of a stripe, in pixels; half a pixel counts.
        phase = rows % (2 * stripe)
        share = np.clip(np.minimum(phase - stripe, 2 * stripe - phase) + 0.5, 0, 1)
        share += np.clip(0.5 - phase, 0, 1)
    else:
        share = np.zeros_like(rows)
    colours = first + share[:, None] * (last - first)
    return np.repeat(colours[:, None, :], width, axis=1).astype(np.float32)


def draw(pixels: Pixels, shape: str, colour: Plane, x: float, y: float, radius: float) -> None:
    """Draw one shape over `pixels`, in place; `x`, `y` and `radius` in pixels."""
    reach = radius * 1.2 + 2
    height, width = pixels.shape[:2]
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, width)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, height)
    if left >= right or top >= bottom:
        return
    across = (np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius
    down = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / radius
    cover = np.clip(0.5 - DISTANCES[shape](across[None, :], down[:, None]) * radius, 0, 1)[
        ..., None
    ]
    part = pixels[top:bottom, left:right]
    part += cover * (colour - part)


def mask(shape: str, size: int, x: float, y: float, radius: float) -> Plane:
    """Share of each pixel that `shape` covers, on a square of `size` pixels."""
    pixels = np.zeros((size, size, 3), np.float32)
    draw(pixels, shape, np.ones(3, np.float32), x, y, radius)
    return pixels[..., 0]


# Signed distance to the outline (negative inside) in units of the radius, y downwards. All shapes
# of one radius look about as large.


def _circle(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - np.float32(0.98)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - np.float32(0.77)) - np.float32(0.23)


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86)


def _triangle(x: Plane, y: Plane) -> Plane:
    # Equilateral, its middle a little above the centroid so that its box lies centred.
    y = y - np.float32(0.18)
    slope = np.float32(3**0.5 / 2)
    sides = slope * np.abs(x) - y / 2 - np.float32(0.6)
    distance: Plane = np.maximum(y - np.float32(0.66), sides)
    return distance


def _star(x: Plane, y: Plane) -> Plane:
    # One tenth of the star: between the ray to a point and the ray to the notch beside it.
    fifth = np.float32(2 * np.pi / 5)
    y = y - np.float32(0.08)
    length = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + fifth / 2) % fifth - fifth / 2)
    along, aside = length * np.cos(folded), length * np.sin(folded)
    point, notch = np.float32(1.1), np.float32(0.5)
    edge_x = notch * np.cos(fifth / 2) - point
    edge_y = notch * np.sin(fifth / 2)
    norm = np.hypot(edge_x, edge_y)
    distance: Plane = ((along - point) * edge_y - aside * edge_x) / norm
    return distance


def _heart(x: Plane, y: Plane) -> Plane:
    # A quarter disc's two sides, a disc on each upper one: exact where a pixel needs it.
    scale = np.float32(1.6)
    x, y = np.abs(x) / scale, np.float32(0.56) - y / scale
    lobe = np.hypot(x - np.float32(0.25), y - np.float32(0.75)) - np.float32(2**0.5 / 4)
    along = np.maximum(x + y, 0) / 2
    below = np.minimum(np.hypot(x, y - 1), np.hypot(x - along, y - along)) * np.sign(x - y)
    distance: Plane = np.where(x + y > 1, lobe, below) * scale
    return distance


DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
}


def patch(random: Random, size: int, scale: float = 1.0) -> Pixels:
    """A square piece of some picture, dense in outlines, for the autoencoder to learn from.

    Most things lie on the grid, at the radii that scenes have; the others anywhere, at any.

    Args:
        size: of the piece, in pixels.
        scale: of the picture; 1 is the size at which pictures are drawn.
    """
    ground = random.choice(GROUNDS)
    colours = tuple(random.sample(tuple(COLOURS), 1 if ground == "plain" else 2))
    whole = int(random.choice((512, 576, 768, 1024)) * scale)
    step = int(GRID * scale)
    top = random.randrange(0, max(whole - size, 0) // step + 1) * step
    stripe = random.choice(tuple(STRIPES.values())) * scale
    pixels = draw_ground(Scene((), ground, colours, "place"), whole, whole, stripe=stripe)
    pixels = pixels[top : top + size, :size]
    usual = sorted({radius for radii in RADII.values() for radius in radii.values()})
    for _ in range(random.choice((1, 2, 3))):
        if random.random() < 0.7:
            x, y = (float(random.randrange(0, size + 1, step)) for _ in range(2))
            radius = random.choice(usual) * scale
        else:
            x, y = (random.uniform(0, size) for _ in range(2))
            radius = random.uniform(38, 220) * scale
        colour = colour_of(random.choice(OBJECT_COLOURS))
        draw(pixels, random.choice(SHAPES), colour, x, y, radius)
    return pixels
