"""Does a generator show its training pictures again? The nearest reals of generated pictures, in feature space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrgan.metrics.source import Source
from hrgan.pictures import tile, to_rgb

SHOWN, REALS = 8, 5
"""Rows of the picture, and nearest reals in each."""
OTHERS, SAME = 8, 1e-4
"""Reals among which the nearest other one is looked for, and the distance, in lengths of the features, up to which two
are the same picture."""
BLOCK = 256
"""Rows of a matrix of distances that are made at once."""


class Nearest(NamedTuple):
    """Of each generated picture."""

    reals: Tensor
    """(N, k) int64: rows of the nearest reals, the nearest first."""
    ratio: Tensor
    """(N,) float32: distance to the nearest real, over that real's distance to its own nearest other real."""

    @property
    def authenticity(self) -> float:
        """Share of generated pictures that are farther from their nearest real than that is from its nearest (Alaa et
        al. 2022, arXiv 2102.08921): 0 for copies, about a half for new pictures of the same kind."""
        return float((self.ratio > 1).float().mean())


def nearest(fake: Tensor, real: Tensor, device: torch.device) -> Nearest:
    """Of features (N, D) among features (M, D) float32, M at least 2."""
    real = real.to(device)
    found, distances = _closest(fake.to(device), real, min(REALS, len(real)))
    # Only of the reals that are near to something: the distances between all reals would take longer.
    used, position = torch.unique(found[:, 0], return_inverse=True)
    own = _closest(real[used], real, min(OTHERS, len(real)))[1]
    # Not the picture itself, nor another copy of it in the set: next to those nothing would count as a copy.
    same = SAME * real[used].norm(dim=1, keepdim=True)
    other = torch.where(own > same, own, torch.inf).amin(1)
    for row in torch.nonzero(other.isinf()).flatten().tolist():  # More copies than were looked at.
        away = (real - real[used[row]]).square().sum(1).sqrt()
        away = away[away > same[row]]
        # Of reals that are all the same only the same again is a copy.
        other[row] = away.amin() if len(away) else same[row, 0]
    return Nearest(found.cpu(), (distances[:, 0] / other[position]).cpu())


def _closest(points: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, count): rows of the nearest and their distances, in order.

    Candidates by products, which is fast and loses small distances; then these exactly: copies are what is looked for.
    """
    indices, distances = [], []
    for block in torch.split(points, BLOCK):
        rows = torch.cdist(block, among).topk(min(4 * count, len(among)), dim=1, largest=False).indices
        exact = (among[rows] - block.unsqueeze(1)).square().sum(2).sqrt()
        values, order = exact.topk(count, dim=1, largest=False)
        indices.append(rows.gather(1, order))
        distances.append(values)
    return torch.cat(indices), torch.cat(distances)


def picture_of(found: Nearest, fake: Source, fake_places: Tensor, real: Source, real_places: Tensor) -> Tensor:
    """(3, H, W) uint8: the most suspicious generated pictures at the left, their nearest reals beside them."""
    shown = []
    for row in found.ratio.argsort()[:SHOWN].tolist():
        shown.append(fake.picture(int(fake_places[row])))
        shown += [real.picture(int(real_places[index])) for index in found.reals[row].tolist()]
    return tile(torch.cat([to_rgb(image.unsqueeze(0).cpu()) for image in shown]), 1 + found.reals.shape[1])
