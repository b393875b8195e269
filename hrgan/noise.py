"""Noise as a pure function of (seed, nimg): drawn for the whole global batch on the CPU, then cut to a process's rows.

The same numbers on every device and for every number of processes, and nothing to save for a resume.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hrgan.config import CHUNK
from hrgan.networks.layers import keyed_seed


def local_rows(nimg: int, batch: int, rank: int, world: int) -> Tensor:
    """Rows of the global batch beginning at `nimg` that belong to `rank`: whole chunks, chunk number modulo world.
    (batch / world,) int64."""
    chunk = nimg // CHUNK + torch.arange(batch) // CHUNK
    return torch.nonzero(chunk % world == rank).flatten()


def draw(sampler: Callable[..., Tensor], shape: tuple[int, ...], *key: int | str) -> Tensor:
    """`sampler` (torch.randn or torch.rand) of a shape, float32 on the CPU, from a key such as (seed, nimg, role)."""
    return sampler(shape, generator=torch.Generator().manual_seed(keyed_seed(*key)))


def pixel_noise(chunks: list[int], shape: tuple[int, ...], device: torch.device, *key: int | str) -> Tensor:
    """(4 x chunks, *shape) from N(0, 1), drawn on the device (whole images are too many numbers for the CPU): each
    chunk of four images by the key and its own number in the run, so that no other chunk or process matters."""
    parts = []
    for chunk in chunks:
        generator = torch.Generator(device).manual_seed(keyed_seed(*key, chunk))
        parts.append(torch.randn((CHUNK, *shape), generator=generator, device=device))
    return torch.cat(parts)


def latents(start: int, stop: int, length: int, *key: int | str) -> Tensor:
    """(stop - start, length) latents for images start .. stop - 1, each decided by the key and its own number alone."""
    rows = [draw(torch.randn, (length,), *key, index) for index in range(start, stop)]
    return torch.stack(rows) if rows else torch.empty(0, length)
