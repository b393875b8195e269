"""Layers that the families share. Equalised learning rate, pixel norm and minibatch stddev: Karras et al. 2018 (arXiv
1710.10196), section 4."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrgan.config import CHUNK, NetworkConfig
from hrgan.networks.derivatives import convolve, earlier_input
from hrgan.noise import keyed_seed

HE_GAIN = math.sqrt(2)
"""Gain of He initialisation before a leaky ReLU."""


Initial = Callable[[str, nn.Parameter], tuple[float, float]]
"""Name and parameter -> mean and standard deviation of its initial numbers."""


def scaled_initial(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Under an equalised learning rate weights begin as N(0, 1) and biases as 0."""
    return 0.0, 0.0 if name.endswith("bias") else 1.0


def initialise(network: nn.Module, seed: int, role: str, initial: Initial = scaled_initial) -> None:
    """Fill parameters with normal numbers, each from (seed, role, its name).

    A name holds its block's resolution, so a block has the same initial weights whenever it joins.
    """
    for name, parameter in network.named_parameters():
        mean, spread = initial(name, parameter)
        generator = torch.Generator().manual_seed(keyed_seed(seed, role, name))
        with torch.no_grad():
            if spread:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(spread).add_(mean))
            else:
                parameter.fill_(mean)


def width(config: NetworkConfig, resolution: int) -> int:
    """Feature maps at a resolution: 512, 512, 512, 512, 256, ... for 4, 8, 16, 32, 64, ... with the paper's numbers."""
    if config.widths is not None:
        return config.widths[resolution.bit_length() - 3]
    return max(1, min(config.fmap_max, config.fmap_base * 2 // resolution))


def layout(config: NetworkConfig) -> torch.memory_format:
    """In which order the numbers of weights and features lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def sizes(first: int, last: int) -> list[int]:
    """Powers of two from first to last."""
    return [1 << power for power in range(first.bit_length() - 1, last.bit_length())]


def rgb_sizes(resolution: int, fading: bool) -> list[int]:
    """Resolutions of the RGB layers that a phase uses."""
    return [resolution // 2, resolution] if fading else [resolution]


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
            weight = widened(weight).flip(2, 3).transpose(0, 1)
            return convolve(x, weight, self.bias, padding, stride=2, transposed=True)
        if self.resample == "down":
            return convolve(x, widened(weight) / 4, self.bias, padding, stride=2)
        return convolve(x, weight, self.bias, padding)


def widened(weight: Tensor) -> Tensor:
    """(out, in, k, k) -> (out, in, k + 1, k + 1): the kernel convolved with a 2x2 box of ones."""
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., 1:, :-1] + w[..., :-1, 1:] + w[..., :-1, :-1]


class ClassEmbedding(nn.Module):
    """labels: (N,) int64 in [0, classes) -> (N, length), a learnt vector for each class, initially N(0, 1)."""

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, length))

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.weight)


def logits_per_image(config: NetworkConfig) -> int:
    """Of a discriminator: one, and a score for each class with the auxiliary classifier."""
    return 1 + (config.num_classes if config.condition == "acgan" else 0)


def projection(config: NetworkConfig, length: int) -> ClassEmbedding | None:
    """What a projection discriminator multiplies features of this length by; None without one."""
    projects = config.condition == "projection" and config.num_classes > 0
    return ClassEmbedding(config.num_classes, length) if projects else None


def joined(z: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """z: (N, L) -> (N, L) without classes, (N, 2 L) with the labels' embedding beside it."""
    return z if embedding is None else torch.cat([z, embedding(labels)], dim=1)


def project(features: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """(N, F) features -> (N, 1), what a projection discriminator adds to its logits (Miyato & Koyama 2018); 0 without
    classes. Scaled to unit variance of unit features."""
    if embedding is None:
        return features.new_zeros(len(features), 1)
    added: Tensor = (embedding(labels) * features).sum(1, keepdim=True) / math.sqrt(features.shape[1])
    return added


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or as float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logits_of(head: nn.Module, features: Tensor, embedding: nn.Module | None, labels: Tensor | None) -> Tensor:
    """(N, F) features -> (N, heads) logits: of a linear head, with the classes' projection added. At least in float32
    also under autocast: bf16 has steps of 0.25 at 64, and the relativistic loss lives on differences of logits."""
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        logits: Tensor = head(features) + project(features, embedding, labels)
    return logits


def minibatch_stddev(x: Tensor) -> Tensor:
    """x: (N, C, H, W) -> (N, C + 1, H, W), N a multiple of 4: adds the mean standard deviation over each chunk of 4
    consecutive samples.

    Computed at least in float32. Groups are chunks, so that the result does not depend on how a batch is dealt over
    processes.
    """
    n, c, h, w = x.shape
    earlier = earlier_input(x)
    groups = at_least_float32(x if earlier is None else earlier).view(n // CHUNK, CHUNK, c, h, w)
    apart = groups - groups.mean(1, keepdim=True)
    spread = apart.square().mean(1).add(1e-8).sqrt()  # (N/4, C, H, W)
    if earlier is not None:
        spread = spread + (apart * (at_least_float32(x).view_as(groups) - groups)).mean(1) / spread
    feature = spread.mean((1, 2, 3)).repeat_interleave(CHUNK).view(n, 1, 1, 1).expand(n, 1, h, w)
    return torch.cat([x, feature.to(x.dtype)], dim=1)


def upsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W), nearest."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H/2, W/2), 2x2 box mean."""
    return F.avg_pool2d(x, 2)


class Conv2d(nn.Conv2d):
    """torch's, of that second derivative, for square kernels, zeros as padding and no dilation. x: (N, in, H, W) ->
    (N, out, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, int(self.padding[0]), self.stride[0], self.groups)


