"""Sizes of pictures: a *level* r, a power of two from 4, of a base grid of (height, width) has grid * r / 4 pixels. On
the usual 4 x 4 grid a level is the side in pixels; on 4 x 6, level 512 is 512 x 768."""

from __future__ import annotations

from collections.abc import Sequence

from hrgan.errors import UserError

SHORTEST, LONGEST = 3, 16
"""Of the base grid's sides. A 1x1 or 2x2 grid would leave the first layers nothing to arrange."""


def size_at(grid: Sequence[int], level: int) -> tuple[int, int]:
    """(height, width) in pixels of a level on a base grid."""
    return grid[0] * level // 4, grid[1] * level // 4


def size_text(grid: Sequence[int], level: int) -> str:
    """A size for people: "64²", or "64x96" as height x width."""
    height, width = size_at(grid, level)
    return f"{height}²" if height == width else f"{height}x{width}"


def target(text: str) -> tuple[tuple[int, int], int]:
    """The base grid and the level of "512", or of "512x768" as height x width. UserError with the nearest sizes that
    work: a grid of 3 to 16 pixels a side, doubled at least twice."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"resolution is {text!r}, expected a side such as 256, or height x width such as 512x768")
    height, width = int(parts[0]), int(parts[-1])
    found = _grid(height, width)
    if found is None:
        kind = f"a grid of {SHORTEST} to {LONGEST} pixels a side that is doubled at least twice, such as 4x6 to 512x768"
        if height == width:
            kind = "a power of two of 16 or more, or a height x width such as 512x768"
        raise UserError(f"resolution is {text}, expected {kind}; nearest: {' or '.join(_nearest(height, width))}")
    return found


def levels(resolution: int) -> tuple[int, ...]:
    """Each power of two from 16 to `resolution`."""
    return tuple(2**e for e in range(4, resolution.bit_length()))


def _grid(height: int, width: int) -> tuple[tuple[int, int], int] | None:
    """The smallest base grid that doubles to this size, and how far, as a level; None where there is none."""
    if height == width:
        return ((4, 4), height) if height >= 16 and height & (height - 1) == 0 else None
    for doublings in range((height | width).bit_length(), 1, -1):
        if height % 2**doublings == 0 and width % 2**doublings == 0:
            grid = height >> doublings, width >> doublings
            if min(grid) >= SHORTEST:
                return (grid, 4 << doublings) if max(grid) <= LONGEST else None
    return None


def _nearest(height: int, width: int) -> list[str]:
    """Up to two sizes that work: the square one for a square, else the nearest in both sides."""
    if height == width:
        exponent = max(4, height.bit_length() - 1)
        near = min((2**exponent, 2 ** (exponent + 1)), key=lambda side: abs(side - height))
        return [str(near)]
    grids = [(a, b) for a in range(SHORTEST, LONGEST + 1) for b in range(SHORTEST, LONGEST + 1)]
    sizes = {(a << k, b << k) for a, b in grids for k in range(2, 12)}
    sizes = {size for size in sizes if _grid(*size)}
    nearest = sorted(sizes, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    return [f"{a}x{b}" if a != b else str(a) for a, b in nearest[:2]]
