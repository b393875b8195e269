"""Which of the drawn set's 48 modes a picture shows: exact, by its colour and the best fitting shape, with no network.

A picture of the set is the background, to a share `covered` of each pixel replaced by one colour. So the pixels give
the colour (the direction from the background that explains them best) and `covered`; its sum gives each shape's
radius, its centroid the centre, and the shape is the one that overlaps most when it is drawn with these.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from hrgan.data.drawn import BACKGROUND, COLOURS, DRAWERS, SHAPES
from hrgan.errors import UserError

Mode = tuple[str, str]
"""Shape and colour."""
MODES: tuple[Mode, ...] = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)

INK = 40.0
"""Distance from the background, in 8-bit RGB, of a pixel that belongs to a shape: over the 99.99th percentile (37) of
Gaussian noise of standard deviation 8, and a quarter of the palest colour's distance."""
OFF_COLOUR = 0.15
"""Largest share of the ink that the colour may leave unexplained. Measured on reals: at most 0.004, under that noise
0.14 at 16² and less above. With OVERLAP it refuses 21 of the 28 colours halfway between two (black and orange is
brown)."""
OVERLAP = 0.75
"""Least intersection over union with the shape. Measured on reals: their own 0.94 or more (0.81 blurred by 0.5 pixels
at 32²), the best other shape at most 0.88 and always less than their own."""
RADII = (0.09, 0.36)
"""Of the side: the set's are 0.12 to 0.3, and under noise and blur 0.114 to 0.303. A picture that is dark all over fits
a larger one only."""
PIXELS_AT_ONCE = 2**19
"""More are no faster, and take memory."""


def recognise(images: Tensor) -> list[Mode | None]:
    """(N, 3, H, H) uint8 -> the mode of each; None where nothing fits: blank, noise, a blob, two shapes in one.

    Right for all of 2,000 reals at 16², 32² and 64². With Gaussian noise of standard deviation 8: 99.9 % at 16², all
    above. Blurred by a Gaussian of 0.5 pixels: 97.0 % at 16², all above; of 0.7 pixels: 33, 88 and 100 %, of 1 pixel:
    6, 49 and 95 %; what is missing is None, wrong are at most 0.4 % (at 16² 2.7 %). Of two reals in one picture, the
    darker of both at each pixel, 0.7 % or less pass where the second has 30 % of the ink. 5,000 pictures of 32² take
    about 1.5 s on a core, of 64² 6 s.

    UserError for pictures that are not square or have no 3 channels.
    """
    if images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(
            f"pictures of {images.shape[1]} channels and {images.shape[2]}x{images.shape[3]} pixels show no mode of "
            "the drawn set; its pictures are square and have 3"
        )
    found: list[Mode | None] = []
    side = images.shape[3]
    for part in torch.split(images.cpu(), max(1, PIXELS_AT_ONCE // side**2)) if len(images) else ():
        off, colour, covered = _coloured(part)
        overlap, radius = _fitted(covered)
        best, shape = overlap.max(1)
        share = radius.gather(1, shape[:, None])[:, 0] / side
        fits = (off < OFF_COLOUR) & (best > OVERLAP) & (share > RADII[0]) & (share < RADII[1])
        choice = torch.where(fits, shape * len(COLOURS) + colour, -1)
        found += [MODES[number] if number >= 0 else None for number in choice.tolist()]
    return found


def _coloured(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 3, H, W) uint8 -> the share of the ink that the best colour does not explain (n,), infinite without ink; its
    number (n,); and how far it covers each pixel (n, H, W), about 0 to 1, and 0 away from all ink."""
    paper = torch.tensor(BACKGROUND, dtype=torch.float32)
    inks = paper - torch.tensor(list(COLOURS.values()), dtype=torch.float32)  # (8, 3)
    missing = paper.view(3, 1, 1) - images.float()  # (n, 3, H, W)
    strength = missing.norm(dim=1)  # (n, H, W)
    drawn = (strength > INK).float()
    along = torch.einsum("kc,nchw->nkhw", F.normalize(inks, dim=1), missing)  # (n, 8, H, W)
    aside = (strength.square()[:, None] - along.square()).clamp(min=0).sqrt()
    # Without ink 0 / 0: what follows takes no minimum of it.
    off, colour = ((aside * drawn[:, None]).sum((2, 3)) / (strength * drawn).sum((1, 2))[:, None]).min(1)
    covered = along[torch.arange(len(images)), colour] / inks.norm(dim=1)[colour].view(-1, 1, 1)
    # An edge pixel that is hardly covered counts, too; beyond, the noise of a whole picture would outweigh a shape.
    near = F.max_pool2d(drawn, 3, stride=1, padding=1)
    return off.nan_to_num(torch.inf), colour, covered * near


def _fitted(covered: Tensor) -> tuple[Tensor, Tensor]:
    """(n, H, W) -> intersection over union with each shape, and the shape's radius in pixels, both (n, shapes)."""
    area = covered.sum((1, 2)).clamp(min=1e-3)
    y = covered.sum(2) @ (torch.arange(covered.shape[1]) + 0.5) / area
    x = covered.sum(1) @ (torch.arange(covered.shape[2]) + 0.5) / area
    overlaps, radii = [], []
    for shape in SHAPES:
        radius = (area / _template(shape)[-1, -1]).sqrt()
        mask = _render(shape, radius, y, x, covered.shape[1])
        overlaps.append(torch.minimum(covered, mask).sum((1, 2)) / torch.maximum(covered, mask).sum((1, 2)))
        radii.append(radius)
    return torch.stack(overlaps, 1).nan_to_num(0), torch.stack(radii, 1)


def _render(shape: str, radius: Tensor, y: Tensor, x: Tensor, side: int) -> Tensor:
    """The shape, antialiased exactly, for each radius and centre (n,), in pixels -> (n, side, side) in [0, 1].

    What covers a pixel is a difference of the summed areas at its four corners (Crow 1984).
    """
    corners = torch.arange(side + 1)
    v = (corners - y[:, None]) / (radius[:, None] * REACH)  # (n, side + 1); the table is at -1 to 1
    u = (corners - x[:, None]) / (radius[:, None] * REACH)
    size = len(radius), side + 1, side + 1
    places = torch.stack([u[:, None, :].expand(size), v[:, :, None].expand(size)], 3)
    table = F.grid_sample(
        _template(shape)[None, None], places.view(1, -1, side + 1, 2), padding_mode="border", align_corners=True
    ).view(size)
    return table.diff(dim=1).diff(dim=2) * radius.square().view(-1, 1, 1)


REACH, CELLS, FINE = 1.1, 220, 8
"""A template shows -REACH to REACH radii, in so many cells a side, each drawn as FINE x FINE."""


@cache
def _template(shape: str) -> Tensor:
    """(CELLS + 1, CELLS + 1): the area of the shape of radius 1 above and left of each point, float32."""
    side = CELLS * FINE
    mask = Image.new("L", (side, side), 0)
    DRAWERS[shape](ImageDraw.Draw(mask), (side / 2, side / 2), side / 2 / REACH)
    cells = torch.from_numpy(np.array(mask.reduce(FINE))).double() / 255 * (2 * REACH / CELLS) ** 2
    return F.pad(cells.cumsum(0).cumsum(1), (1, 0, 1, 0)).float()
