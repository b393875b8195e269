"""R3GAN's generator and discriminator (Huang et al. 2024, arXiv 2501.05441), made to grow: residual blocks without
normalisation, styles, noise, an equalised learning rate or minibatch statistics. The regularised relativistic loss
(loss.kind relativistic with R1 and R2) is what makes such plain networks train.

Parameter names hold the resolution of their block, and a network holds only the RGB layers that its phase uses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrgan.config import NetworkConfig
from hrgan.networks.derivatives import LRELU_SLOPE, filtered_downsample, filtered_upsample, lrelu
from hrgan.networks.layers import (
    ClassEmbedding,
    Conv2d,
    at_least_float32,
    downsample,
    joined,
    layout,
    logits_per_image,
    project,
    projection,
    rgb_sizes,
    sizes,
    upsample,
    width,
)


class ResidualBlock(nn.Module):
    """x: (N, C, H, W) -> the same: x + 1x1 (C -> 2C), 3x3 in groups, 1x1 (2C -> C). Begins as the identity."""

    def __init__(self, channels: int, group_size: int) -> None:
        super().__init__()
        inner = 2 * channels
        groups = inner // max(size for size in range(1, min(group_size, inner) + 1) if inner % size == 0)
        self.expand = Conv2d(channels, inner, 1)
        self.mix = Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.project = Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.project(lrelu(self.mix(lrelu(self.expand(x)))))
        return y


class Stage(nn.Module):
    """x: (N, C, H, W) -> the same: the residual blocks of a resolution."""

    def __init__(self, config: NetworkConfig, size: int) -> None:
        super().__init__()
        here = width(config, size)
        self.blocks = nn.Sequential(*(ResidualBlock(here, config.group_size) for _ in range(config.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Up(Stage):
    """x: (N, C of R/2, H, W) -> (N, C of R, 2H, 2W): a 1x1 convolution if the width changes, resampling, the blocks."""

    def __init__(self, config: NetworkConfig, size: int) -> None:
        super().__init__(config, size)
        self.change = pointwise(width(config, size // 2), width(config, size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(filtered_upsample(self.change(x)))


class Down(Stage):
    """x: (N, C of R, H, W) -> (N, C of R/2, H/2, W/2): the same, backwards."""

    def __init__(self, config: NetworkConfig, size: int) -> None:
        super().__init__(config, size)
        self.change = pointwise(width(config, size), width(config, size // 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.change(filtered_downsample(super().forward(x)))
        return y


def pointwise(before: int, after: int) -> nn.Module:
    """A 1x1 convolution without bias; nothing where the width stays."""
    return nn.Identity() if before == after else Conv2d(before, after, 1, bias=False)


def initial(config: NetworkConfig, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's initial numbers. Gains in residual blocks fall with the number L of
    blocks of the whole network at its final resolution, as L^(-1/4) (Zhang et al. 2019, arXiv 1901.09321, for blocks of
    three layers of which the last begins as 0), so that a block's weights do not depend on the phase it joins in."""
    if name.endswith((".bias", "project.weight")):
        return 0.0, 0.0
    if name.startswith("embedding") or name == "basis":
        return 0.0, 1.0
    fan_in = math.prod(parameter.shape[1:])
    if ".blocks." in name:
        depth = config.blocks * len(sizes(4, config.resolution))
        return 0.0, math.sqrt(2 / (1 + LRELU_SLOPE**2) / fan_in) * depth**-0.25
    return 0.0, 1 / math.sqrt(fan_in)


class Generator(nn.Module):
    """z: (N, latent) float32 from N(0, 1) -> (N, channels, H, W) float32, about [-1, 1]. H x W is the grid (usually
    4 x 4) times R / 4."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config, self.resolution, self.fading, self.autocast = config, resolution, fading, autocast
        self.layout = layout(config)
        self.classes = config.num_classes
        self.embedding = ClassEmbedding(self.classes, config.latent) if self.classes else None
        first = width(config, 4)
        self.basis = nn.Parameter(torch.empty(first, *config.grid))
        self.dense = nn.Linear(config.latent * (2 if self.classes else 1), first, bias=False)
        self.blocks = nn.ModuleDict(
            {str(size): Stage(config, 4) if size == 4 else Up(config, size) for size in sizes(4, resolution)}
        )
        self.to_rgb = nn.ModuleDict(
            {
                str(size): Conv2d(width(config, size), config.channels, 1, bias=False)
                for size in rgb_sizes(resolution, fading)
            }
        )

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        return initial(self.config, name, parameter)

    def enlarged(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), as images of the resolution before are shown in a fade."""
        # Nearest, which D's downsampling undoes exactly: where a fade begins, D judges as it did before, to the bit.
        return upsample(images)

    def forward(self, z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Images. `alpha` in [0, 1] is the weight of the new resolution in a fade; `labels`: (N,) int64, None without
        classes."""
        with torch.autocast(z.device.type, self.autocast, enabled=self.autocast is not None):
            x = self.basis * self.dense(joined(z, self.embedding, labels))[:, :, None, None]  # (N, C, 4, 4)
            x = old = x.contiguous(memory_format=self.layout)
            for stage in self.blocks.values():
                old, x = x, stage(x)  # in the end (N, C, R/2, R/2) and (N, C, R, R)
            image: Tensor = self.to_rgb[str(self.resolution)](x).float()  # (N, channels, R, R)
            if self.fading:
                before = self.to_rgb[str(self.resolution // 2)](old).float()
                image = torch.lerp(self.enlarged(before), image, alpha)
        return image


class Discriminator(nn.Module):
    """x: (N, channels, H, W) float32 in [-1, 1] -> logits (N, 1) float32; with the auxiliary classifier
    (N, 1 + classes)."""

    batch_statistics = False
    """Whether logits hang on the whole batch's statistics: reals and fakes then go through it in separate calls."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config, self.resolution, self.fading, self.autocast = config, resolution, fading, autocast
        self.layout = layout(config)
        self.from_rgb = nn.ModuleDict(
            {
                str(size): Conv2d(config.channels, width(config, size), 1, bias=False)
                for size in rgb_sizes(resolution, fading)
            }
        )
        self.blocks = nn.ModuleDict(
            {
                str(size): Stage(config, 4) if size == 4 else Down(config, size)
                for size in reversed(sizes(4, resolution))
            }
        )
        last = width(config, 4)
        self.basis = nn.Parameter(torch.empty(last, *config.grid))
        self.embedding = projection(config, last)
        # With classes the logit is the projection alone, of features of their own.
        heads = logits_per_image(config) if self.embedding is None else last
        self.logit = nn.Linear(last, heads, bias=False)

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        mean, spread = initial(self.config, name, parameter)
        return mean, 1 / math.sqrt(math.prod(parameter.shape[1:])) if name == "basis" else spread

    def forward(self, x: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Logits, higher is more real. `alpha` and `labels` as in the generator."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            image = x.contiguous(memory_format=self.layout)
            x = self.from_rgb[str(self.resolution)](image)  # (N, C, R, R)
            for size, stage in self.blocks.items():
                x = stage(x)
                if self.fading and size == str(self.resolution):
                    old = self.from_rgb[str(self.resolution // 2)](downsample(image))
                    x = torch.lerp(old, x, alpha)  # (N, C, R/2, R/2)
        # In float32: bf16 has steps of 0.25 at a logit of 64, and the relativistic loss lives on differences.
        pooled = (at_least_float32(x) * self.basis).sum((2, 3))  # (N, C): a depthwise convolution over the whole grid
        features = self.logit(pooled)
        return features if self.embedding is None else project(features, self.embedding, labels)
