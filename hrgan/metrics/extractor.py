"""Feature extractors: FID's Inception through torch-fidelity, or a seeded random network that says so in the metric's
name."""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from hrgan.config import EvalConfig
from hrgan.errors import UserError
from hrgan.networks.layers import keyed_seed
from hrgan.pictures import to_rgb

INCEPTION = "inception-v3-compat"
RANDOM = "random-conv-64"


class RandomConv(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A random convolutional embedding (Naeem et al. 2020, arXiv 2002.09797, section 4.2), the same on every machine.

    (N, 3, H, W) uint8 -> (N, 512): resized to 64 x 64 (bilinear, antialiased), four 3x3 convolutions with leaky ReLU
    and 2x2 means between them down to 4 x 4 pixels, then a random projection of the 4096 values. He-initialised from
    a fixed seed.
    """

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        shapes = {
            "conv0": (32, 3, 3, 3),
            "conv1": (64, 32, 3, 3),
            "conv2": (128, 64, 3, 3),
            "conv3": (256, 128, 3, 3),
            "out": (512, 4096),
        }
        for key, shape in shapes.items():
            gain = 1.0 if key == "out" else math.sqrt(2 / (1 + 0.2**2))
            generator = torch.Generator().manual_seed(keyed_seed(RANDOM, key))
            weight = torch.randn(shape, generator=generator) * gain / math.sqrt(math.prod(shape[1:]))
            self.register_parameter(key, nn.Parameter(weight, requires_grad=False))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("512",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "512"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.float() / 127.5 - 1
        if x.shape[-1] != 64:
            x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
        for index in range(4):
            x = F.avg_pool2d(F.leaky_relu(F.conv2d(x, getattr(self, f"conv{index}"), padding=1), 0.2), 2)
        return (F.linear(x.flatten(1), self.out),)


register_feature_extractor(RANDOM, RandomConv)


@dataclass(frozen=True)
class Extractor:
    """A network on the device with what a result needs to say about it."""

    name: str
    """torch-fidelity's name of it."""
    metric: str
    """Name of the Frechet distance on its features: fid only for Inception."""
    sha256: str
    """Of its weights."""
    resize: str
    """How pictures are brought to its input size."""
    size: int
    """Length of a feature vector."""
    network: nn.Module

    def features(self, images: Tensor) -> Tensor:
        """(N, 1, 3 or 4, H, W) uint8 -> (N, size) float64, through pictures.to_rgb."""
        with torch.no_grad():
            features: Tensor = self.network(to_rgb(images))[0]
        return features.double()


def cached_weights() -> Path:
    """Where torch-fidelity looks for FID's Inception weights, and downloads them to."""
    name: str = URL_INCEPTION_V3.rsplit("/", 1)[-1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def settle_weights(config: EvalConfig, say: Callable[[str], None]) -> Path | None:
    """The file of Inception weights, downloaded if need be, or None where a random extractor stands in. For one
    process only.

    UserError when they are asked for and cannot be had, or when a file is no such weights: at launch, not at the
    first evaluation.
    """
    if config.extractor == "random":
        return None
    if config.weights is not None:
        return checked_weights(Path(config.weights))
    target = cached_weights()
    if target.exists():
        return checked_weights(target)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # A firewall that drops packets must not hold the launch up for minutes.
    try:
        say(f"fetching FID's Inception weights to {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The last part of the name is the start of the file's sha256; a download that differs is not kept.
        digest = target.stem.rsplit("-", 1)[-1]
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix=digest, progress=False)
        return checked_weights(target)
    except (OSError, RuntimeError) as error:  # No network, a refusing server, no place to write, or a wrong file.
        remedy = f"fetch {URL_INCEPTION_V3} elsewhere and put it at {target}, or name it with --eval.weights FILE"
        if config.extractor == "inception":
            raise UserError(
                f"eval.extractor: inception needs FID's weights, which cannot be had here ({error}); {remedy}"
            ) from error
        say(
            f"FID's Inception weights cannot be had here ({error}): measuring fd_random with a seeded "
            "random network instead, which is not "
            f"comparable with any FID. For FID, {remedy}"
        )
        return None
    finally:
        socket.setdefaulttimeout(patience)


def checked_weights(path: Path) -> Path:
    """The path, if it holds weights that Inception takes (read without running any code in the file)."""
    try:
        keys = torch.load(path, map_location="cpu", weights_only=True).keys()
    except Exception as error:  # torch.load raises many kinds on a file that is no checkpoint; all mean the same here
        raise UserError(
            f"eval.weights: {path} cannot be read as weights ({' '.join(str(error).split())[:120]}); "
            f"expected the file from {URL_INCEPTION_V3}"
        ) from error
    if "Conv2d_1a_3x3.conv.weight" not in keys or "fc.weight" not in keys:
        raise UserError(
            f"eval.weights: {path} holds other weights (its first is {next(iter(keys), 'nothing')}); "
            f"expected the file from {URL_INCEPTION_V3}"
        )
    return path


def make_extractor(weights: Path | None, device: torch.device) -> Extractor:
    """The Inception extractor of a file that `settle_weights` named, or the random one for None."""
    cuda = device.type == "cuda"
    if weights is None:
        network = create_feature_extractor(RANDOM, ["512"], cuda=cuda, verbose=False)
        digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())).hexdigest()
        return Extractor(RANDOM, "fd_random", digest, "bilinear-antialias-64", 512, network)
    network = create_feature_extractor(
        INCEPTION, ["2048"], cuda=cuda, verbose=False, feature_extractor_weights_path=str(weights)
    )
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Extractor(INCEPTION, "fid", digest, "tf1-bilinear-299", 2048, network)
