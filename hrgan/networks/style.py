"""StyleGAN2's generator and discriminator (Karras et al. 2020, arXiv 1912.04958: the skip generator and the residual
discriminator of figure 7, "config F"), for one phase at a time, made to grow as ProGAN's do.

Parameter names hold the resolution of their block. A generator keeps the RGB layers of all lower resolutions, whose
images it sums. Activations have the paper's gain of sqrt(2); leaky ReLU being positively homogeneous, it is multiplied
into the weights and biases before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrgan.config import NetworkConfig
from hrgan.networks.derivatives import convolve, filtered, filtered_downsample, filtered_upsample, lrelu, pixel_norm
from hrgan.networks.layers import (
    HE_GAIN,
    ClassEmbedding,
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
    width,
)
from hrgan.noise import latent_normal

MAPPING_LR = 0.01
"""Learning rate of the mapping network relative to the others'."""
NOISE, SECOND, COIN = range(3)
"""Streams of random numbers from z: noise inputs, the second z of style mixing, whether and where it takes over."""


# Layers


class ActivatedLinear(nn.Module):
    """x: (N, in) -> (N, out), leaky ReLU with gain sqrt(2) included. `lr` multiplies weights and bias at run time, and
    weights begin as N(0, 1) / lr: a learning rate so many times that of the other layers (StyleGAN, section B)."""

    def __init__(self, in_features: int, out_features: int, lr: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.lr, self.scale = lr, 1 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        gain = HE_GAIN * self.lr
        return lrelu(F.linear(x, self.weight * (self.scale * gain), self.bias * gain))


class ModulatedConv(nn.Module):
    """Parameters of a convolution whose input channels a style scales, and the two scales (section 2.2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, latent: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.affine = ScaledLinear(latent, in_channels, gain=1)
        self.scale = 1 / math.sqrt(in_channels * kernel * kernel)

    def modulation(self, w: Tensor) -> Tensor:
        """w: (N, latent) -> (N, in, 1, 1), what the input is multiplied by, the equalised learning rate's constant
        included."""
        with torch.autocast(w.device.type, enabled=False):
            s: Tensor = self.affine(w) * self.scale
        return s[:, :, None, None]

    def demodulation(self, s: Tensor) -> Tensor:
        """s: (N, in, 1, 1) -> (N, out, 1, 1), what makes the scaled weights of each output channel unit length."""
        with torch.autocast(s.device.type, enabled=False):
            power = F.linear(s.flatten(1).square(), self.weight.square().sum((2, 3)))
        return (power + 1e-8).rsqrt()[:, :, None, None]


class StyleLayer(ModulatedConv):
    """x: (N, in, H, W), w: (N, latent), noise: (N, 1, H', W') or None -> (N, out, H', W'), H' = 2H with `up`.

    Modulated 3x3 convolution, demodulation, noise, bias, leaky ReLU. Scaling activations before and after a common
    convolution equals scaling each sample's weights, without a convolution per sample.
    """

    def __init__(self, in_channels: int, out_channels: int, latent: int, up: bool, noise: bool) -> None:
        super().__init__(in_channels, out_channels, 3, latent)
        self.strength = nn.Parameter(torch.empty(1)) if noise else None
        self.up = up

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        s = self.modulation(w)
        x = x * s.to(x.dtype)
        if self.up:
            # Convolved before it is filtered: 4 times fewer multiplications than in the definition's order.
            weight = self.weight.flip(2, 3).transpose(0, 1)
            x = convolve(x, weight, stride=2, transposed=True)  # (N, out, 2H + 1, 2W + 1)
            x, gain = filtered(x, 1), 4 * HE_GAIN
        else:
            x, gain = convolve(x, self.weight, padding=1), HE_GAIN
        d = self.demodulation(s) * gain
        x = torch.addcmul((self.bias * HE_GAIN).to(x.dtype).view(1, -1, 1, 1), x, d.to(x.dtype))
        if noise is not None and self.strength is not None:
            x = x + (noise * (self.strength * HE_GAIN)).to(x.dtype)
        return lrelu(x)


class ToRGB(ModulatedConv):
    """x: (N, in, H, W), w: (N, latent) -> (N, channels, H, W) float32: modulated 1x1 convolution, not demodulated."""

    def __init__(self, in_channels: int, channels: int, latent: int) -> None:
        super().__init__(in_channels, channels, 1, latent)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return convolve(x * self.modulation(w).to(x.dtype), self.weight, self.bias).to(w.dtype)


class Conv(nn.Module):
    """x: (N, in, H, W) -> (N, out, H', W'), of the weights and bias times `gain` at equalised learning rate.
    H' = H/2 with `down`: filtered, then the convolution at every second pixel."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, gain: float, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.scale = 1 / math.sqrt(in_channels * kernel * kernel)
        self.gain, self.down = gain, down

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * (self.scale * self.gain), self.bias * self.gain
        padding = self.weight.shape[-1] // 2
        if self.down:
            return convolve(filtered(x, padding + 1), weight, bias, stride=2)
        return convolve(x, weight, bias, padding)


class ResidualBlock(nn.Module):
    """x: (N, in, H, W) -> (N, out, H/2, W/2): (two convolutions + one 1x1 past them) / sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = Conv(in_channels, in_channels, 3, HE_GAIN)
        self.second = Conv(in_channels, out_channels, 3, gain=1, down=True)  # sqrt(2) / sqrt(2)
        self.skip = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.skip_scale = 1 / math.sqrt(2 * in_channels)

    def forward(self, x: Tensor) -> Tensor:
        past = convolve(filtered_downsample(x), self.skip * self.skip_scale)
        return lrelu(self.second(lrelu(self.first(x)))) + past


# Networks


class Generator(nn.Module):
    """z: (N, latent) float32 from N(0, 1) -> (N, channels, H, W) float32, about [-1, 1]. H x W is the grid (usually
    4 x 4) times R / 4.

    Noise inputs and style mixing are pure functions of z, so images are functions of (weights, z, labels, alpha).
    """

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.fading, self.autocast = resolution, fading, autocast
        self.layout = layout(config)
        self.rows, self.columns = config.grid
        self.latent, self.mixing, self.classes = config.latent, config.mixing, config.num_classes
        self.noisy = config.noise
        self.layers = 2 * len(sizes(4, resolution))
        """Places that take a w: every convolution, and the last RGB layer. The other RGB layers share the w of the
        next block's first convolution."""
        self.embedding = ClassEmbedding(self.classes, config.latent) if self.classes else None
        self.mapping = nn.ModuleDict()
        for layer in range(config.mapping_layers):
            inputs = config.latent * (2 if self.classes and layer == 0 else 1)
            # Not the bare number, which in a parameter's name would read as a resolution.
            self.mapping[f"layer{layer}"] = ActivatedLinear(inputs, config.latent, MAPPING_LR)
        self.constant = nn.Parameter(torch.empty(1, width(config, 4), self.rows, self.columns))
        self.blocks, self.to_rgb = nn.ModuleDict(), nn.ModuleDict()
        for size in sizes(4, resolution):
            here = width(config, size)
            block = [StyleLayer(width(config, size // 2), here, config.latent, True, config.noise)] if size > 4 else []
            self.blocks[str(size)] = nn.ModuleList([*block, StyleLayer(here, here, config.latent, False, config.noise)])
            self.to_rgb[str(size)] = ToRGB(here, config.channels, config.latent)

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        if name.endswith(("strength", "affine.bias")):
            return float(name.endswith("bias")), 0.0
        if name.startswith("mapping") and name.endswith("weight"):
            return 0.0, 1 / MAPPING_LR
        return scaled_initial(name, parameter)

    def enlarged(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), as images of the resolution before are shown in a fade."""
        return filtered_upsample(images)

    def w(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """The mapping network: (N, latent) -> (N, latent). It is small, and computes in float32."""
        w = pixel_norm(joined(z, self.embedding, labels))
        for layer in self.mapping.values():
            w = layer(w)
        return w

    def mapped(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """ws: (N, layers, latent), what each layer's style is made of. In training mode `mixing` of the samples take
        that of another z from a random layer on (StyleGAN, section 3.1)."""
        ws = self.w(z, labels).unsqueeze(1).expand(-1, self.layers, -1)
        if self.training and self.mixing:
            other = self.w(latent_normal(z, SECOND, self.latent), labels)
            coin, place = torch.special.ndtr(latent_normal(z, COIN, 2)).unbind(1)  # (N,) each, uniform
            start = 1 + (place * (self.layers - 1)).long().clamp(max=self.layers - 2)  # 1 .. layers - 1
            mixed = (coin < self.mixing)[:, None] & (torch.arange(self.layers, device=z.device) >= start[:, None])
            ws = torch.where(mixed[:, :, None], other[:, None], ws)
        return ws

    def noise(self, z: Tensor) -> list[Tensor]:
        """For each convolution (N, 1, H, W) from N(0, 1). Lower layers come first in one stream, so a layer's noise
        stays when the network grows."""
        shapes = [
            (self.rows * size // 4, self.columns * size // 4)
            for size in sizes(4, self.resolution)
            for _ in range(1 if size == 4 else 2)
        ]
        counts = [rows * columns for rows, columns in shapes]
        parts = torch.split(latent_normal(z, NOISE, sum(counts)), counts, dim=1)
        return [part.reshape(-1, 1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def drawn(self, ws: Tensor, z: Tensor, alpha: float) -> Tensor:
        """Images of ws: (N, layers, latent), twice differentiable by them; z decides the noise alone."""
        noise: list[Tensor] | list[None] = self.noise(z) if self.noisy else [None] * (self.layers - 1)
        step = 0
        with torch.autocast(ws.device.type, self.autocast, enabled=self.autocast is not None):
            x = self.constant.expand(len(ws), -1, -1, -1).contiguous(memory_format=self.layout)
            image: Tensor | None = None
            for size, block in self.blocks.items():
                for layer in block:  # type: ignore[attr-defined]  # a ModuleList
                    x = layer(x, ws[:, step], noise[step])
                    step += 1
                rgb: Tensor = self.to_rgb[size](x, ws[:, step])  # (N, channels, H, W)
                if image is not None:
                    fade = alpha if self.fading and size == str(self.resolution) else 1.0
                    rgb = self.enlarged(image) + fade * rgb
                image = rgb
        assert image is not None
        return image

    def forward(self, z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Images. `alpha` in [0, 1] is the weight of the new resolution in a fade; `labels`: (N,) int64, None without
        classes."""
        return self.drawn(self.mapped(z, labels), z, alpha)


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
            {
                str(size): Conv(config.channels, width(config, size), 1, HE_GAIN)
                for size in rgb_sizes(resolution, fading)
            }
        )
        self.blocks = nn.ModuleDict(
            {
                str(size): ResidualBlock(width(config, size), width(config, size // 2))
                for size in reversed(sizes(8, resolution))
            }
        )
        last = width(config, 4)
        self.last = Conv(last + 1, last, 3, HE_GAIN)
        self.dense = ActivatedLinear(last * config.grid[0] * config.grid[1], last)
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
                x = block(x)
                if self.fading and size == str(self.resolution):
                    old = lrelu(self.from_rgb[str(self.resolution // 2)](downsample(image)))
                    x = torch.lerp(old, x, alpha)  # (N, C, R/2, R/2)
            x = lrelu(self.last(minibatch_stddev(x)))  # (N, C, 4, 4)
            x = self.dense(x.flatten(1))
        return logits_of(self.logit, x, self.embedding, labels)
