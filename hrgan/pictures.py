"""Tensors to pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_uint8(images: Tensor) -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> uint8, rounded to the nearest; values outside are clamped. -1 is 0, 1 is 255."""
    return images.mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor, values: tuple[int, int] = (0, 255)) -> Tensor:
    """(N, C, H, W) uint8 or uint16 -> float32: the stored numbers `values` become -1 and 1."""
    if tuple(values) == (0, 255):
        return images.to(torch.float32).div(127.5).sub(1)
    low, high = values
    return images.to(torch.float32).sub(low).mul(2 / (high - low)).sub(1)


def to_stored(images: Tensor, values: tuple[int, int]) -> NDArray[np.uint16]:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint16 of stored numbers, rounded to the nearest; values outside
    are clamped."""
    low, high = values
    scaled = images.double().add(1).mul((high - low) / 2).add(low + 0.5).floor().clamp(low, high)
    stored: NDArray[np.uint16] = scaled.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint16)
    return stored


def save_png(pixels: NDArray[np.uint8] | NDArray[np.uint16], path: Path) -> None:
    """Write one (H, W, C) picture atomically: C 1, 3 or 4; uint16, C 1, as a 16-bit PNG."""
    partial = path.with_name(f".{path.name}")
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(partial, "PNG")
    partial.replace(path)


def to_array(image: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) uint8 -> (H, W, C)."""
    array: NDArray[np.uint8] = image.permute(1, 2, 0).cpu().numpy()
    return array


def to_rgb(images: Tensor) -> Tensor:
    """(N, 1, 3 or 4, H, W) uint8 -> (N, 3, H, W) as people and extractors see it: grey in three equal channels,
    transparency laid over white."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 3:
        return images
    alpha = images[:, 3:].to(torch.int32)
    mixed = images[:, :3].to(torch.int32) * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).to(torch.uint8)


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
