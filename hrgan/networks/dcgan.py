"""DCGAN (Radford et al. 2016, arXiv 1511.06434), the baseline that everybody knows, made to grow.

At 64 x 64 without growth, fmap_base 1024 and latent 100, it is the well-known script's: G transposed convolutions
100-512-256-128-64-3, D convolutions 3-64-128-256-512-1, kernel 4, batch normalisation and no bias. The sigmoid is in
the loss. A layer is named by the resolution that it joins at; 8 x 8 is the first.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from hrgan.config import NetworkConfig
from hrgan.networks.derivatives import earlier_input, lrelu
from hrgan.networks.layers import (
    ClassEmbedding,
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
from hrgan.noise import draw

SPREAD = 0.02
"""Standard deviation of initial weights, section 4."""
MOMENTUM = 0.1
"""Share of a batch in the running statistics, the script's."""
EPSILON = 1e-5
PICTURES = 256
"""Whose statistics those of averaged weights are."""


class BatchNorm(nn.Module):
    """x: (N, C, H, W), or (N, C), of any float type -> the same. In training by the statistics of the whole batch of
    all processes, so that it does not depend on their number; else by running ones. Computed in float32; twice
    differentiable."""

    running_mean: Tensor
    running_var: Tensor
    measuring = False
    """The running statistics become this batch's, of this process alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            numbers = at_least_float32(x)
            if not self.training:
                running = (self.running_mean, self.running_var)
                y = F.batch_norm(numbers, *running, self.weight, self.bias, eps=EPSILON)
            elif (earlier := earlier_input(x)) is not None:
                y = self._tangent(numbers, at_least_float32(earlier))
            elif _processes() > 1 and not self.measuring:
                y, mean, variance = self._over_processes(numbers)
                self._follow(mean, variance)
            else:
                mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
                y = F.batch_norm(numbers, mean, variance, self.weight, self.bias, True, momentum=1.0, eps=EPSILON)
                self._follow(mean, variance)
        return y.to(x.dtype)

    def _over_processes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, means, unbiased variances. All processes must call it, with as many samples each.

        The variance is of what the mean is taken off: from sums of squares alone, features far from zero would lose it
        to rounding.
        """
        mean = _mean(x)
        x = x - mean
        variance = _mean(x.square())
        y = self._scaled(x * (variance + EPSILON).rsqrt())
        count = x.numel() // x.shape[1] * _processes()
        return y, mean.flatten(), variance.flatten() * (count / (count - 1))

    def _tangent(self, x: Tensor, earlier: Tensor) -> Tensor:
        """The linear function of x that touches batch normalisation where x is `earlier`."""
        apart = earlier - _mean(earlier)
        inverse = (_mean(apart.square()) + EPSILON).rsqrt()
        unit, moved = apart * inverse, (x - earlier) * inverse
        return self._scaled(unit + moved - _mean(moved) - unit * _mean(unit * moved))

    def _scaled(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return x * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics. A step with non-finite numbers is skipped (engine.py) and may leave nothing
        behind here either."""
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(torch.where(batch.isfinite(), batch, running), 1.0 if self.measuring else MOMENTUM)


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _mean(x: Tensor) -> Tensor:
    """(N, C, ...) -> (1, C, ...) means over all processes."""
    mean = x.mean([0, *range(2, x.dim())], keepdim=True)
    if _processes() == 1:
        return mean
    total: Tensor = all_reduce(mean)  # type: ignore[no-untyped-call]  # differentiable, unlike dist's own
    return total / _processes()


def initial(name: str) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's initial numbers."""
    if name.endswith("bias"):
        return 0.0, 0.0
    return (1.0 if "norm" in name else 0.0), SPREAD


class Generator(nn.Module):
    """z: (N, latent) float32 from N(0, 1) -> (N, channels, H, W) float32 in (-1, 1). H x W is the grid (usually 4 x 4)
    times R / 4."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.fading, self.autocast = resolution, fading, autocast
        self.layout = layout(config)
        self.latent, self.classes = config.latent, config.num_classes
        self.embedding = ClassEmbedding(self.classes, config.latent) if self.classes else None
        inputs = config.latent * (2 if self.classes else 1)
        first = width(config, 4)
        self.first = nn.ConvTranspose2d(inputs, first, (config.grid[0], config.grid[1]), bias=False)
        self.first_norm = BatchNorm(first)
        self.blocks = nn.ModuleDict()
        for size in sizes(16, resolution):  # Features at half of the resolution that the block joins at.
            before, here = width(config, size // 4), width(config, size // 2)
            conv = nn.ConvTranspose2d(before, here, 4, stride=2, padding=1, bias=False)
            self.blocks[str(size)] = nn.ModuleDict({"conv": conv, "norm": BatchNorm(here)})
        self.to_rgb = nn.ModuleDict(
            {
                str(size): nn.ConvTranspose2d(
                    width(config, size // 2), config.channels, 4, stride=2, padding=1, bias=False
                )
                for size in rgb_sizes(resolution, fading)
            }
        )

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        return (0.0, 1.0) if name.startswith("embedding") else initial(name)

    def enlarged(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W), as images of the resolution before are shown in a fade."""
        return upsample(images)

    @torch.no_grad()
    def measure_statistics(self) -> None:
        """Make the running statistics those of PICTURES pictures of its own or more, always the same ones, as evenly of
        all classes as they are generated. Averaged weights need it: with the statistics of those that they are the
        average of, they draw pale pictures."""
        device, norms = self.first.weight.device, [m for m in self.modules() if isinstance(m, BatchNorm)]
        count = max(PICTURES, 2 * self.classes)
        z = draw(torch.randn, (count, self.latent), "batch statistics").to(device)
        labels = torch.arange(count, device=device) % self.classes if self.classes else None
        before = self.training
        try:
            for norm in norms:
                norm.measuring = True
            self.train()(z, labels, 1.0)  # A fade mixes pictures, after the last normalisation.
        finally:
            for norm in norms:
                norm.measuring = False
            self.train(before)

    def forward(self, z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Images. `alpha` in [0, 1] is the weight of the new resolution in a fade; `labels`: (N,) int64, None without
        classes."""
        with torch.autocast(z.device.type, self.autocast, enabled=self.autocast is not None):
            x = joined(z, self.embedding, labels)[:, :, None, None]
            x = F.relu(self.first_norm(self.first(x).contiguous(memory_format=self.layout)))  # (N, C, 4, 4)
            old = x
            for block in self.blocks.values():
                old = x  # (N, C, R/4, R/4) in the end
                x = F.relu(block["norm"](block["conv"](x)))  # type: ignore[index]  # a ModuleDict
            image = torch.tanh(self.to_rgb[str(self.resolution)](x).float())  # (N, channels, R, R)
            if self.fading:
                before = torch.tanh(self.to_rgb[str(self.resolution // 2)](old).float())
                image = torch.lerp(self.enlarged(before), image, alpha)
        return image


class Discriminator(nn.Module):
    """x: (N, channels, H, W) float32 in [-1, 1] -> logits (N, 1) float32; with the auxiliary classifier
    (N, 1 + classes)."""

    batch_statistics = True
    """Whether logits hang on the whole batch's statistics: reals and fakes then go through it in separate calls."""

    def __init__(
        self, config: NetworkConfig, resolution: int, fading: bool, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.resolution, self.fading, self.autocast = resolution, fading, autocast
        self.layout = layout(config)
        self.from_rgb = nn.ModuleDict(
            {
                str(size): nn.Conv2d(config.channels, width(config, size // 2), 4, stride=2, padding=1, bias=False)
                for size in rgb_sizes(resolution, fading)
            }
        )
        self.blocks = nn.ModuleDict()
        for size in reversed(sizes(16, resolution)):
            here, below = width(config, size // 2), width(config, size // 4)
            conv = nn.Conv2d(here, below, 4, stride=2, padding=1, bias=False)
            self.blocks[str(size)] = nn.ModuleDict({"conv": conv, "norm": BatchNorm(below)})
        self.logit = nn.Conv2d(width(config, 4), logits_per_image(config), (config.grid[0], config.grid[1]), bias=False)
        self.embedding = projection(config, width(config, 4))

    def initial(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial numbers."""
        return (0.0, 1.0) if name.startswith("embedding") else initial(name)

    def forward(self, x: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        """Logits, higher is more real. `alpha` and `labels` as in the generator."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            image = x.contiguous(memory_format=self.layout)
            x = lrelu(self.from_rgb[str(self.resolution)](image))  # (N, C, R/2, R/2)
            for size, block in self.blocks.items():
                x = lrelu(block["norm"](block["conv"](x)))  # type: ignore[index]  # a ModuleDict
                if self.fading and size == str(self.resolution):
                    old = lrelu(self.from_rgb[str(self.resolution // 2)](downsample(image)))
                    x = torch.lerp(old, x, alpha)  # (N, C, R/4, R/4)
        x = at_least_float32(x)  # What follows is float32 also under autocast: bf16 has steps of 0.25 at a logit of 64.
        logits: Tensor = self.logit(x).flatten(1)
        return logits + project(x.mean((2, 3)), self.embedding, labels)
