"""ProGAN's generator and discriminator (Karras et al. 2018, arXiv 1710.10196, table 2 and appendix A), for one phase
at a time.

A network is built for one resolution, fading or stable, and holds only the RGB layers that this phase uses. Parameter
names hold the resolution of their block, so they are the same in every phase.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrgan.config import NetworkConfig
from hrgan.networks.derivatives import lrelu, pixel_norm
from hrgan.networks.layers import (
    HE_GAIN,
    ClassEmbedding,
    ScaledConv,
    ScaledLinear,
    downsample,
    joined,
    layout,
    logits_of,
    logits_per_image,
    minibatch_stddev,
    projection,
    rgb_sizes,
    scaled_initial,
    sizes,
    upsample,
    width,
)


class Generator(nn.Module):
    """z: (N, latent) float32 from N(0, 1) -> (N, channels, H, W) float32, about [-1, 1]. H x W is the grid (usually
    4 x 4) times R / 4."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.fading, self.autocast = resolution, fading, autocast
        self.layout = layout(config)
        self.rows, self.columns = config.grid
        first = width(config, 4)
        self.classes = config.num_classes
        self.embedding = ClassEmbedding(self.classes, config.latent) if self.classes else None
        # The gain of the first layer is sqrt(2)/4 in the authors' code.
        inputs = config.latent * (2 if self.classes else 1)
        self.dense = ScaledLinear(inputs, first * self.rows * self.columns, gain=HE_GAIN / 4, bias=False)
        self.dense_bias = nn.Parameter(torch.empty(first))
        self.blocks = nn.ModuleDict()
        for size in sizes(4, resolution):
            before = width(config, max(4, size // 2))
            block = (
                [ScaledConv(first, first, 3)]
                if size == 4
                else [ScaledConv(before, width(config, size), 3, resample="up")]
            )
            if size > 4:
                block.append(ScaledConv(width(config, size), width(config, size), 3))
            self.blocks[str(size)] = nn.ModuleList(block)
        self.to_rgb = nn.ModuleDict(
            {
                str(size): ScaledConv(width(config, size), config.channels, 1, gain=1)
                for size in rgb_sizes(resolution, fading)
            }
        )

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        return scaled_initial(name, parameter)

    def enlarged(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), as images of the resolution before are shown in a fade."""
        return upsample(images)

    def forward(self, z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Images. `alpha` in [0, 1] is the weight of the new resolution in a fade; `labels`: (N,) int64, None without
        classes."""
        with torch.autocast(z.device.type, self.autocast, enabled=self.autocast is not None):
            x = self.dense(pixel_norm(joined(z, self.embedding, labels)))
            x = x.view(len(z), -1, self.rows, self.columns)  # (N, C, 4, 4)
            x = x + self.dense_bias.view(1, -1, 1, 1)
            x = pixel_norm(lrelu(x.contiguous(memory_format=self.layout)))
            old = x
            for size, block in self.blocks.items():
                if self.fading and size == str(self.resolution):
                    old = x  # (N, C, R/2, R/2)
                for conv in block:  # type: ignore[attr-defined]  # a ModuleList
                    x = pixel_norm(lrelu(conv(x)))
            image: Tensor = self.to_rgb[str(self.resolution)](x).float()  # (N, channels, R, R)
            if self.fading:
                image = torch.lerp(self.enlarged(self.to_rgb[str(self.resolution // 2)](old).float()), image, alpha)
        return image


class Discriminator(nn.Module):
    """x: (N, channels, H, W) float32 in [-1, 1], N a multiple of 4 -> logits (N, 1) float32; with the auxiliary
    classifier (N, 1 + classes)."""

    batch_statistics = False
    """Whether logits hang on the whole batch's statistics: reals and fakes then go through it in separate calls."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.fading, self.autocast = resolution, fading, autocast
        self.layout = layout(config)
        self.from_rgb = nn.ModuleDict(
            {str(size): ScaledConv(config.channels, width(config, size), 1) for size in rgb_sizes(resolution, fading)}
        )
        self.blocks = nn.ModuleDict()
        for size in reversed(sizes(8, resolution)):
            here, below = width(config, size), width(config, size // 2)
            self.blocks[str(size)] = nn.ModuleList(
                [ScaledConv(here, here, 3), ScaledConv(here, below, 3, resample="down")]
            )
        last = width(config, 4)
        self.blocks["4"] = nn.ModuleList([ScaledConv(last + 1, last, 3)])
        self.dense = ScaledLinear(last * config.grid[0] * config.grid[1], last)
        self.logit = ScaledLinear(last, logits_per_image(config), gain=1)
        self.embedding = projection(config, last)

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        return scaled_initial(name, parameter)

    def forward(self, x: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Logits, higher is more real. `alpha` and `labels` as in the generator."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            image = x.contiguous(memory_format=self.layout)
            x = lrelu(self.from_rgb[str(self.resolution)](image))  # (N, C, R, R)
            for size, block in self.blocks.items():
                if size == "4":
                    x = minibatch_stddev(x)
                for conv in block:  # type: ignore[attr-defined]  # a ModuleList
                    x = lrelu(conv(x))
                if self.fading and size == str(self.resolution):
                    old = lrelu(self.from_rgb[str(self.resolution // 2)](downsample(image)))
                    x = torch.lerp(old, x, alpha)  # (N, C, R/2, R/2)
            x = lrelu(self.dense(x.flatten(1)))
        return logits_of(self.logit, x, self.embedding, labels)
