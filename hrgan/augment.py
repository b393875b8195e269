"""Differentiable augmentation of what D sees: the operations of ADA (Karras et al. 2020, arXiv 2006.06676, appendix B)
and of DiffAugment (Zhao et al. 2020, arXiv 2006.10738), and ADA's control of their strength.

Reals and fakes, in D's step and in G's, pass through the same operations with the same strength. G does not learn to
draw ADA's augmentations (they do not leak) while the strength is below about 0.8, so that enough pictures of each kind
stay as they are; DiffAugment's paper always does its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from hrgan.config import ADA, AUGMENTATIONS, DIFFAUGMENT

_DRAWS = {
    "color": 4,
    "flip": 2,
    "rotate90": 2,
    "translate": 3,
    "scale": 2,
    "rotate": 2,
    "anisotropic": 2,
    "rotate_again": 2,
    "shift": 3,
    "brightness": 2,
    "contrast": 2,
    "luma_flip": 2,
    "hue": 2,
    "saturation": 2,
    "translation": 3,
    "cutout": 3,
}
"""Numbers that an operation takes, whether it happens to the image first; in the order in which they are done."""
_FIRST = {op: sum(list(_DRAWS.values())[:place]) for place, op in enumerate(_DRAWS)}
LENGTH = sum(_DRAWS.values())
"""Random numbers of an image. Each operation has its own, so that what else is listed does not change it."""

_WHOLE = ("flip", "rotate90", "translate")
_FRACTIONAL = ("scale", "rotate", "anisotropic", "shift")
_RECOLOURING = ("brightness", "contrast", "luma_flip", "hue", "saturation")

Dice = Callable[[str], list[Tensor]]
"""Operation -> its numbers, (N,) each; the first is whether it happens."""


def expanded(ops: Sequence[str]) -> tuple[str, ...]:
    """Names of operations, each once, with "diffaugment" and "ada" replaced by what they stand for. Raises ValueError
    for a name that is none."""
    lists = {"diffaugment": DIFFAUGMENT, "ada": ADA}
    names = tuple(dict.fromkeys(name for op in ops for name in lists.get(op, (op,))))
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no operation; there are {', '.join(AUGMENTATIONS)}, diffaugment, ada")
    return names


def adapted(strength: Tensor, sign_mean: Tensor, target: float, images: int, kimg: float, most: float = 1.0) -> Tensor:
    """ADA's next strength: up by images / (1000 kimg) where sign_mean > target (D overfits), down where it is below,
    within [0, most].

    strength, sign_mean: () or (1,) float32 on the device, where the result stays; sign_mean: the mean of sign(D(real)),
    or of pairs (train.signs), since the last change, `images` the reals of as many steps of the phase's batch. The
    paper: target 0.6, 500 kimg, every 4 steps.
    """
    return (strength + torch.sign(sign_mean - target) * (images / (1000 * kimg))).clamp(0, most)


def augment(images: Tensor, numbers: Tensor, strength: Tensor, ops: Collection[str]) -> Tensor:
    """Each operation of `ops` (names as of `expanded`), done to each image with probability `strength`.

    images: (N, C, H, W) float32 in [-1, 1], C 1, 3 or 4, H and W from 3 up; numbers: (N, LENGTH) float32 from U[0, 1),
    which alone decide an image's augmentation; strength: () or (1,) float32 in [0, 1], never read back to the host. All
    on one device, outside of autocast. Returns (N, C, H, W), not clamped. Equal to the input, value for value, where no
    operation happens, and an affine function of each image, so twice differentiable. Operations not listed cost
    nothing.

    In the order in which they are done, whatever the order of `ops` (distributions of the papers):
      color        (DiffAugment) brightness + U(-.5, .5), saturation x U(0, 2) about each pixel's grey, contrast
                   x U(.5, 1.5) about the image's mean
      flip         half of the images, left to right
      rotate90     by 0, 90, 180 or 270 degrees; images that are not square by 0 or 180
      translate    by whole pixels, up to 1/8 of each side
      scale        2^N(0, .2)
      rotate       U(-180, 180) degrees, before and after `anisotropic`, each with probability 1 - sqrt(1 - strength)
      anisotropic  width x 2^N(0, .2), height by its inverse
      shift        N(0, 1/8) of each side, fractional
      brightness   + N(0, .2)
      contrast     x 2^N(0, .5)
      luma_flip    half of the images: mirrored in the plane of no luma; grey images are negated
      hue          turned about the grey axis, U(-180, 180) degrees; grey images are left out
      saturation   x 2^N(0, 1); grey images are left out
      translation  (DiffAugment) as translate, each shift equally likely, what comes in is 0
      cutout       a rectangle of half the sides at a uniform centre becomes 0

    From flip to shift all is one resampling, mirrored at the edges: exact copies of pixels where the transform is of
    whole pixels, else bilinear. ADA has a sharper filter at twice the resolution; here a fractional transform blurs
    up to one pixel, and aliases where it shrinks, reals and fakes alike. Colours are changed before the alpha of C = 4
    is joined again; the other operations treat alpha as any channel.
    """

    def dice(op: str) -> list[Tensor]:
        # Two turns with 1 - sqrt(1 - p) each: at least one with p.
        chance = 1 - (1 - strength).sqrt() if op in ("rotate", "rotate_again") else strength
        happens, *values = numbers[:, _FIRST[op] : _FIRST[op] + _DRAWS[op]].unbind(1)
        return [happens < chance, *values]

    if "color" in ops:
        images = _coloured(images, *dice("color"))
    if any(op in ops for op in (*_WHOLE, *_FRACTIONAL)):
        images = _resampled(images, _geometry(images, dice, ops), any(op in ops for op in _FRACTIONAL))
    if any(op in ops for op in _RECOLOURING):
        images = _recoloured(images, dice, ops)
    if "translation" in ops:
        images = _translated(images, *dice("translation"))
    if "cutout" in ops:
        images = _cut(images, *dice("cutout"))
    return images


# Geometry


def _geometry(images: Tensor, dice: Dice, ops: Collection[str]) -> Tensor:
    """(N, 2, 3): where a pixel of the output comes from, both places in pixels from the image's centre, x before y.

    Exact where only flip, rotate90 and translate happen: their entries are whole, and those of all others then are
    of the identity.
    """
    n, _, height, width = images.shape
    zero = torch.zeros(n, device=images.device)
    one = zero + 1
    parts = []
    if "flip" in ops:
        happens, side = dice("flip")
        parts.append(_affine(torch.where(happens & (side < 0.5), -1.0, one), zero, zero, one))
    if "rotate90" in ops:
        happens, turn = dice("rotate90")
        quarters = (4 * turn).floor() if height == width else 2 * (2 * turn).floor()
        quarters = torch.where(happens, quarters, zero)
        cos, sin = (quarters == 0).float() - (quarters == 2).float(), (quarters == 1).float() - (quarters == 3).float()
        parts.append(_affine(cos, -sin, sin, cos))
    if "translate" in ops:
        happens, x, y = dice("translate")
        x, y = (width / 8 * (2 * x - 1)).round(), (height / 8 * (2 * y - 1)).round()
        parts.append(_affine(one, zero, zero, one, torch.where(happens, -x, zero), torch.where(happens, -y, zero)))
    if "scale" in ops:
        happens, size = dice("scale")
        shrunk = torch.where(happens, torch.exp2(-0.2 * _normal(size)), one)
        parts.append(_affine(shrunk, zero, zero, shrunk))
    if "rotate" in ops:
        parts.append(_turn(*dice("rotate")))
    if "anisotropic" in ops:
        happens, size = dice("anisotropic")
        wide = torch.where(happens, 0.2 * _normal(size), zero)
        parts.append(_affine(torch.exp2(-wide), zero, zero, torch.exp2(wide)))
    if "rotate" in ops:
        parts.append(_turn(*dice("rotate_again")))
    if "shift" in ops:
        happens, x, y = dice("shift")
        x, y = -width / 8 * _normal(x), -height / 8 * _normal(y)
        parts.append(_affine(one, zero, zero, one, torch.where(happens, x, zero), torch.where(happens, y, zero)))
    return reduce(_after, parts)


def _after(first: Tensor, then: Tensor) -> Tensor:
    """(N, 2, 3): the place that `first` gives for the one that `then` gives."""
    return torch.baddbmm(F.pad(first[:, :, 2:], (2, 0)), first[:, :, :2], then)


def _affine(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """(N,) each -> (N, 2, 3)."""
    zero = torch.zeros_like(xx)
    return torch.stack([xx, xy, zero if x is None else x, yx, yy, zero if y is None else y], 1).view(-1, 2, 3)


def _turn(happens: Tensor, by: Tensor) -> Tensor:
    """By U(-180, 180) degrees, from a number of U(0, 1)."""
    angle = torch.where(happens, math.pi * (2 * by - 1), 0.0)
    return _affine(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _normal(uniform: Tensor) -> Tensor:
    """N(0, 1) from U[0, 1); 0 is taken as half the step between float32's random numbers."""
    normal: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-25))
    return normal


def _resampled(images: Tensor, matrix: Tensor, fractional: bool) -> Tensor:
    """Each pixel from where `matrix` (N, 2, 3) says, bilinear, or its nearest pixel where not fractional.

    By gather in place of F.grid_sample, which is faster but has no deterministic backward on CUDA (for
    config.deterministic) and meets whole pixels only up to rounding.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2  # (W,)
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]  # (H, 1)
    x, y = (
        _mirrored(row[:, 0] * x + (row[:, 1] * y + (row[:, 2] + (size - 1) / 2)), size)
        for row, size in zip(matrix[..., None, None].unbind(1), (width, height), strict=True)
    )  # (N, H, W)
    if not fractional:
        return _taken(images, (y.round().int() * width + x.round().int()).long())
    # At the last pixel the one before it and a weight of 1 serve as well; a place can round to just below 0.
    left, top = x.floor().clamp(0, width - 2), y.floor().clamp(0, height - 2)
    x, y = (x - left).to(images.dtype), (y - top).to(images.dtype)
    index = (top.int() * width + left.int()).long()  # (N, H, W)
    x, y = x[:, None], y[:, None]
    result = _taken(images, index) * ((1 - x) * (1 - y))
    for step, weight in ((1, x * (1 - y)), (width, (1 - x) * y), (width + 1, x * y)):
        result = torch.addcmul(result, _taken(images, index + step), weight)
    return result


def _mirrored(place: Tensor, size: int) -> Tensor:
    """Places in pixels into [0, size - 1], mirrored at the centres of the first and the last pixel."""
    period = 2 * size - 2
    # Rounding may choose the wrong period only where two meet, at pixel 0.
    return (size - 1) - (place - (place / period).floor() * period - (size - 1)).abs()


def _taken(images: Tensor, index: Tensor) -> Tensor:
    """(N, C, H, W) images, (N, H, W) int64 places y W + x in them -> (N, C, H, W)."""
    flat = images.flatten(2)
    return flat.gather(2, index.flatten(1)[:, None].expand_as(flat)).view_as(images)


def _translated(images: Tensor, happens: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """By whole pixels, each shift up to 1/8 of a side equally likely; what comes in is 0."""
    places, inside = [], []
    for size, number in zip(images.shape[2:], (y, x), strict=True):
        most = int(size / 8 + 0.5)
        shift = (number * (2 * most + 1)).long() - most
        source = torch.arange(size, device=images.device) - torch.where(happens, shift, 0)[:, None]  # (N, size)
        places.append(source.clamp(0, size - 1))
        inside.append((source >= 0) & (source < size))
    taken = _taken(images, places[0][:, :, None] * images.shape[3] + places[1][:, None])
    return taken.masked_fill(~(inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


def _cut(images: Tensor, happens: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """0 in a rectangle of half the sides, of which less is seen where its centre is near an edge."""
    holes = []
    for size, number in zip(images.shape[2:], (y, x), strict=True):
        place = (torch.arange(size, device=images.device) + 0.5) / size
        holes.append((place - number[:, None]).abs() < 0.25)  # (N, size)
    hole = holes[0][:, :, None] & holes[1][:, None] & happens[:, None, None]  # (N, H, W)
    return images.masked_fill(hole[:, None], 0)


# Colour


def _coloured(images: Tensor, happens: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """DiffAugment's brightness, then saturation, then contrast, as one sum of what they scale."""

    def wide(value: Tensor, still: float) -> Tensor:
        return torch.where(happens, value, still).to(images.dtype).view(-1, 1, 1, 1)

    add, saturate, spread = wide(brightness - 0.5, 0), wide(2 * saturation, 1), wide(contrast + 0.5, 1)
    rgb = images[:, :3]
    grey = rgb.mean(1, keepdim=True)  # (N, 1, H, W)
    mean = grey.mean((2, 3), keepdim=True)  # (N, 1, 1, 1)
    rest = spread * (1 - saturate) * grey + ((1 - spread) * mean + add)  # (N, 1, H, W)
    return _with_alpha(rgb * (spread * saturate) + rest, images)


def _recoloured(images: Tensor, dice: Dice, ops: Collection[str]) -> Tensor:
    """ADA's colour transforms. All commute with turning about the grey axis, so that their product is three numbers:
    what luma is scaled by, what chroma is scaled by, and the angle by which it is turned."""
    coloured, zero = images.shape[1] > 1, torch.zeros(len(images), device=images.device)
    add, luma, chroma, angle = zero, zero + 1, zero + 1, zero
    if "brightness" in ops:
        happens, value = dice("brightness")
        add = torch.where(happens, 0.2 * _normal(value), zero)
    if "contrast" in ops:
        happens, value = dice("contrast")
        luma = chroma = torch.exp2(torch.where(happens, 0.5 * _normal(value), zero))
    if "luma_flip" in ops:
        happens, value = dice("luma_flip")
        luma = torch.where(happens & (value < 0.5), -luma, luma)
    if "hue" in ops and coloured:
        happens, value = dice("hue")
        angle = torch.where(happens, math.pi * (2 * value - 1), zero)
    if "saturation" in ops and coloured:
        happens, value = dice("saturation")
        chroma = chroma * torch.exp2(torch.where(happens, _normal(value), zero))

    rgb = images[:, :3].flatten(2)  # (N, 3, H W), or (N, 1, H W)
    count, parts = rgb.shape[1], (add * luma, luma, chroma * angle.cos(), chroma * angle.sin())
    add, luma, along, across = (part.to(images.dtype).view(-1, 1, 1) for part in parts)
    unit = torch.eye(count, dtype=images.dtype, device=images.device)
    # Turning moves a colour along the cross product of the grey axis with it.
    cross = (unit.roll(1, 0) - unit.roll(-1, 0)) / math.sqrt(3)
    matrix = along * unit + (luma - along) / count + across * cross  # (N, 3, 3)
    return _with_alpha(torch.baddbmm(add, matrix, rgb).view(len(images), count, *images.shape[2:]), images)


def _with_alpha(rgb: Tensor, images: Tensor) -> Tensor:
    """The channels beyond the third as they were."""
    return torch.cat([rgb, images[:, 3:]], 1) if images.shape[1] > 3 else rgb
