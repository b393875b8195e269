"""Tensors to pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> uint8, rounded to the nearest; values outside are clamped. -1 is 0, 1 is 255."""
    return images.mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 -> float32 in [-1, 1]."""
    return images.to(torch.float32).div(127.5).sub(1)


def save_png(image: Tensor, path: Path) -> None:
    """Write one (C, H, W) uint8 picture, C 1 or 3, atomically."""
    array = image.permute(1, 2, 0).cpu().numpy()
    partial = path.with_name(f".{path.name}")
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(partial, "PNG")
    partial.replace(path)


def grid_side(resolution: int, wanted: int) -> int:
    """Rows and columns of a grid that stays within about 2048 pixels."""
    return max(1, min(wanted, 2048 // resolution))


def tile(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(N, C, H, W) uint8 -> (C, H', W') uint8: rows of `columns` pictures with white gaps, small pictures enlarged to
    about 64 pixels."""
    factor = max(1, 64 // images.shape[-1])
    images = F.interpolate(images, scale_factor=factor, mode="nearest") if factor > 1 else images
    missing = -len(images) % columns
    images = F.pad(torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)]), (0, gap, 0, gap), value=255)
    rows = [torch.cat(list(row), dim=2) for row in torch.split(images, columns)]
    return torch.cat(rows, dim=1)[:, :-gap, :-gap]


def side_by_side(left: Tensor, right: Tensor, gap: int = 16) -> Tensor:
    """Two (C, H, W) uint8 pictures of one height beside each other, a white band between."""
    band = left.new_full((left.shape[0], left.shape[1], gap), 255)
    return torch.cat([left, band, right], dim=2)
