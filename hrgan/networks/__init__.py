"""The families of networks: one file each. A family has `Generator` and `Discriminator`, built for one resolution,
fading or stable, with `initial` for their weights. A D says in `batch_statistics` whether its logits hang on the whole
batch, and each of its layers that is not linear (derivatives.lrelu, layers.minibatch_stddev, dcgan.BatchNorm) asks
derivatives.earlier_input once a pass, so that finite differences can hold its kinks. A G with running statistics has
`measure_statistics`, for averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hrgan.config import Config
from hrgan.networks import dcgan, progan, r3, style
from hrgan.networks.layers import initialise

FAMILIES: dict[str, Any] = {"dcgan": dcgan, "progan": progan, "style": style, "r3": r3}

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of each config.precision."""


def make_generator(config: Config, resolution: int, fading: bool, autocast: torch.dtype | None) -> nn.Module:
    """A generator with the initial weights that (seed, parameter name) decide; autocast: None computes in float32."""
    network: nn.Module = FAMILIES[config.network.family].Generator(config.network, resolution, fading, autocast)
    initialise(network, config.seed, "generator", network.initial)  # type: ignore[arg-type]  # a method of every family
    return network


def make_discriminator(config: Config, resolution: int, fading: bool, autocast: torch.dtype | None) -> nn.Module:
    """A discriminator with the initial weights that (seed, parameter name) decide; autocast: None computes in
    float32."""
    network: nn.Module = FAMILIES[config.network.family].Discriminator(config.network, resolution, fading, autocast)
    initialise(network, config.seed, "discriminator", network.initial)  # type: ignore[arg-type]  # a method of every family
    return network


def multiplications(config: Config, resolution: int) -> int:
    """About how many a picture takes in both networks, up to a factor that is the same at every resolution: each of a
    block's weights is used once for each of its pixels. Makes no weights."""
    family = FAMILIES[config.network.family]
    with torch.device("meta"):
        networks = [kind(config.network, resolution, False) for kind in (family.Generator, family.Discriminator)]
    total = 0
    for name, parameter in (item for network in networks for item in network.named_parameters()):
        size = next((int(word) for word in name.split(".") if word.isdigit() and int(word) >= 4), 1)
        total += parameter.numel() * (size**2 if parameter.dim() == 4 else 1)
    return total


@contextmanager
def full_precision(network: nn.Module) -> Iterator[None]:
    """In here a network of a family computes in float32, whatever it was built for."""
    before, network.autocast = network.autocast, None  # type: ignore[assignment]  # nn.Module types every attribute
    try:
        yield
    finally:
        network.autocast = before
