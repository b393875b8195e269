"""The built-in drawn set: one flat shape on a light background, any number of pictures, any resolution, no files.

Every picture is a function of (index, seed). Its class is its shape; a *mode* is a shape and a colour, so how many of
the 48 modes a generator covers can be counted exactly.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

from PIL import Image, ImageDraw

SHAPES = ("cross", "disc", "ring", "square", "star", "triangle")
COLOURS = {
    "black": (30, 30, 34),
    "blue": (36, 92, 200),
    "brown": (132, 84, 46),
    "cyan": (40, 176, 190),
    "green": (52, 152, 66),
    "orange": (240, 140, 30),
    "pink": (236, 100, 170),
    "red": (206, 44, 44),
}
BACKGROUND = (245, 243, 238)

Point = tuple[float, float]


class Factors(NamedTuple):
    """What a picture shows. place: centre (x, y) and size: radius, both as fractions of the side, with the shape
    inside.
    """

    shape: str
    colour: str
    place: Point
    size: float


def factors(index: int, seed: int) -> Factors:
    """The factors of picture `index`: shape and colour uniform and independent, size in [0.12, 0.3], place anywhere it
    fits.
    """
    digest = blake2b(f"{seed},{index}".encode(), digest_size=40).digest()
    words = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 40, 8)]
    across, down, share = (word / 2**64 for word in words[2:])
    size = 0.12 + 0.18 * share
    free = 1 - 2 * size
    colour = tuple(COLOURS)[words[1] % len(COLOURS)]
    return Factors(SHAPES[words[0] % len(SHAPES)], colour, (size + free * across, size + free * down), size)


def draw(index: int, seed: int, size: int) -> Image.Image:
    """Picture `index` as a (size, size) RGB image, antialiased by supersampling: the same picture at every size."""
    what = factors(index, seed)
    scale = max(4, 512 // size)
    side = size * scale
    mask = Image.new("L", (side, side), 0)
    centre = (what.place[0] * side, what.place[1] * side)
    DRAWERS[what.shape](ImageDraw.Draw(mask), centre, what.size * side)
    picture = Image.new("RGB", (size, size), BACKGROUND)
    picture.paste(COLOURS[what.colour], (0, 0), mask.reduce(scale))
    return picture


def _box(centre: Point, half: float) -> tuple[float, float, float, float]:
    return centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half


def _corners(centre: Point, radii: list[float]) -> list[Point]:
    """Points around the centre at equal angles, the first at the top."""
    angles = (2 * math.pi * i / len(radii) - math.pi / 2 for i in range(len(radii)))
    return [(centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _disc(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    pen.ellipse(_box(centre, radius), fill=255)


def _ring(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    pen.ellipse(_box(centre, radius), fill=255)
    pen.ellipse(_box(centre, radius * 0.55), fill=0)


def _square(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    pen.rectangle(_box(centre, radius * 0.8), fill=255)


def _cross(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    (x, y), arm = centre, radius * 0.3
    pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)


def _triangle(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    pen.polygon(_corners(centre, [radius] * 3), fill=255)


def _star(pen: ImageDraw.ImageDraw, centre: Point, radius: float) -> None:
    pen.polygon(_corners(centre, [radius, radius * 0.42] * 5), fill=255)


DRAWERS: dict[str, Callable[[ImageDraw.ImageDraw, Point, float], None]] = {
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
