"""The families of networks: one file each. A family has `Generator` and `Discriminator`, built for one resolution,
fading or stable."""

from __future__ import annotations

from typing import Any

from torch import nn

from hrgan.config import Config
from hrgan.networks import progan
from hrgan.networks.layers import initialise

FAMILIES: dict[str, Any] = {"progan": progan}


def make_generator(config: Config, resolution: int, fading: bool, bf16: bool) -> nn.Module:
    """A generator with the initial weights that (seed, parameter name) decide; bf16 computes under autocast."""
    network: nn.Module = FAMILIES[config.network.family].Generator(config.network, resolution, fading, bf16)
    initialise(network, config.seed, "generator")
    return network


def make_discriminator(config: Config, resolution: int, fading: bool, bf16: bool) -> nn.Module:
    """A discriminator with the initial weights that (seed, parameter name) decide; bf16 computes under autocast."""
    network: nn.Module = FAMILIES[config.network.family].Discriminator(config.network, resolution, fading, bf16)
    initialise(network, config.seed, "discriminator")
    return network
