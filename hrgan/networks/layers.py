"""Layers that the families share. Equalised learning rate, pixel norm and minibatch stddev: Karras et al. 2018 (arXiv
1710.10196), section 4."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hrgan.config import CHUNK

LRELU_SLOPE = 0.2
HE_GAIN = math.sqrt(2)
"""Gain of He initialisation before a leaky ReLU."""


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a tuple: the same on every machine, unrelated for different tuples."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def initialise(network: nn.Module, seed: int, role: str) -> None:
    """Fill weights with N(0, 1) and biases with 0, each weight from (seed, role, its name).

    A name holds its block's resolution, so a block has the same initial weights whenever it joins.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            generator = torch.Generator().manual_seed(keyed_seed(seed, role, name))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class ScaledLinear(nn.Module):
    """x: (N, in) -> (N, out). Weights are N(0, 1) and scaled by gain / sqrt(fan in) at run time (equalised learning
    rate)."""

    def __init__(self, in_features: int, out_features: int, gain: float = HE_GAIN, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ScaledConv(nn.Module):
    """x: (N, in, H, W) -> (N, out, H', W'). A convolution with equalised learning rate that keeps, doubles or halves
    H and W.

    resample "up" equals nearest x2 and then the convolution, "down" the convolution and then a 2x2 box mean; both are
    computed as one strided convolution with a kernel one pixel wider, which takes 2.25 times fewer multiplications
    for 3x3.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, gain: float = HE_GAIN, resample: str = "keep"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.scale = gain / math.sqrt(in_channels * kernel * kernel)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        padding = weight.shape[-1] // 2
        if self.resample == "up":
            return F.conv_transpose2d(
                x, widened(weight).flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=padding
            )
        if self.resample == "down":
            return F.conv2d(x, widened(weight) / 4, self.bias, stride=2, padding=padding)
        return F.conv2d(x, weight, self.bias, padding=padding)


def widened(weight: Tensor) -> Tensor:
    """(out, in, k, k) -> (out, in, k + 1, k + 1): the kernel convolved with a 2x2 box of ones."""
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., 1:, :-1] + w[..., :-1, 1:] + w[..., :-1, :-1]


class _PixelNorm(torch.autograd.Function):
    """y = x s, s = 1 / rms(x) over the channels. Written out because it is in every layer: autograd's own backward of
    the same takes more than twice the time and memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (length.square() / x.shape[1] + 1e-8).rsqrt().to(x.dtype)
        y: Tensor = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(1, keepdim=True, dtype=torch.promote_types(y.dtype, torch.float32))
        result: Tensor = torch.addcmul(gradient, y, along.to(y.dtype), value=-1) * scale
        return result


def pixel_norm(x: Tensor) -> Tensor:
    """x: (N, C, ...) of any float type: each pixel's feature vector to length sqrt(C), the statistic at least in
    float32.

    Differentiable once: a second backward through the generator raises.
    """
    y: Tensor = _PixelNorm.apply(x)
    return y


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, LRELU_SLOPE)


def minibatch_stddev(x: Tensor) -> Tensor:
    """x: (N, C, H, W) -> (N, C + 1, H, W), N a multiple of 4: adds the mean standard deviation over each chunk of 4
    consecutive samples.

    Computed in float32. Groups are chunks, so the result does not depend on how a batch is dealt over processes.
    """
    n, c, h, w = x.shape
    groups = x.float().view(n // CHUNK, CHUNK, c, h, w)
    spread = (groups - groups.mean(1, keepdim=True)).square().mean(1).add(1e-8).sqrt()  # (N/4, C, H, W)
    feature = spread.mean((1, 2, 3)).repeat_interleave(CHUNK).view(n, 1, 1, 1).expand(n, 1, h, w)
    return torch.cat([x, feature.to(x.dtype)], dim=1)


def upsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), nearest."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2), 2x2 box mean."""
    return F.avg_pool2d(x, 2)
