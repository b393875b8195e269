"""Noise as a pure function of (seed, nimg): drawn for the whole global batch on the CPU, then cut to a process's rows.

The same numbers on every device and for every number of processes, and nothing to save for a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hrgan.config import CHUNK


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple: the same on every machine, unrelated for different tuples."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


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


def _wrapped(constant: int, bits: int) -> int:
    """An unsigned constant as the signed number of the same bits: torch's integers wrap around but are signed."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


def _mix64(x: Tensor) -> Tensor:
    """x: int64 -> int64, each input bit changing each output bit with odds of 1/2 (splitmix64's finaliser, Steele et
    al. 2014)."""
    # `>>` copies the sign: the masks make it a shift of zeros.
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * _wrapped(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * _wrapped(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & (1 << 33) - 1)


def _mix32_(x: Tensor, key: Tensor | int) -> Tensor:
    """The same of int32, in place, with a key in the middle (constants: Wellons 2018, lowbias32)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(key)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_wrapped(0x846CA68B, 32))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@torch.no_grad()
def latent_normal(z: Tensor, stream: int, count: int) -> Tensor:
    """z: (N, L) -> (N, count) float32 from N(0, 1), a pure function of each row's float32 bits and the stream: of
    neither the other rows nor any generator's state. A larger count begins with the same numbers.

    Whole numbers are the same on every device; the logarithm and the cosine after them to rounding.
    """
    bits = z.float().contiguous().view(torch.int32).long()  # (N, L)
    place = torch.arange(z.shape[1], device=z.device) * _wrapped(0x9E3779B97F4A7C15, 64)
    key = _mix64(_mix64(bits + place).sum(1) + stream)  # (N,)
    first, second = key.view(torch.int32).view(-1, 2, 1, 1).unbind(1)  # (N, 1, 1) each
    pairs = (count + 1) // 2
    index = torch.arange(2 * pairs, dtype=torch.int32, device=z.device).view(pairs, 2).t().contiguous()
    hashed = _mix32_(_mix32_(index, 0) ^ first, second)  # (N, 2, pairs)
    uniform = (hashed >> 8).bitwise_and_(0xFFFFFF).add_(1) * 2.0**-24  # (0, 1]
    radius = uniform[:, 0].log().mul_(-2).sqrt_()  # Box & Muller 1958
    angle = uniform[:, 1] * (2 * math.pi)
    return torch.stack([angle.cos().mul_(radius), angle.sin().mul_(radius)], dim=2).flatten(1)[:, :count]
