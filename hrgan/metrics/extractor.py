"""Feature extractors: torch-fidelity's, a user's own, or a seeded random network. Only the one that a metric was
defined with gives the metric its plain name; every other is in the name."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINO_NAMES
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS
from torch_fidelity.utils import create_feature_extractor

from hrgan.config import CLIP, DINOV2, RANDOM_EXTRACTORS, EvalConfig
from hrgan.errors import UserError, one_line
from hrgan.noise import keyed_seed
from hrgan.pictures import to_rgb

INCEPTION = "inception-v3-compat"
RANDOM = "random-conv-64"
RANDOMS = {name: name.replace("random", RANDOM) for name in RANDOM_EXTRACTORS}
"""eval.extractor -> torch-fidelity's name of it."""
LPIPS = "lpips-vgg16"
URL_VGG16: str = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url


class RandomConv(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A random convolutional embedding (Naeem et al. 2020, arXiv 2002.09797, section 4.2), the same on every machine.

    (N, 3, H, W) uint8 -> (N, 512): resized to 64 x 64 (bilinear, antialiased), four 3x3 convolutions with leaky ReLU
    and 2x2 means between them down to 4 x 4 pixels, then a random projection of the 4096 values. He-initialised from
    a seed that its name decides.
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
            generator = torch.Generator().manual_seed(keyed_seed(name, key))
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
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
        for index in range(4):
            x = F.avg_pool2d(F.leaky_relu(F.conv2d(x, getattr(self, f"conv{index}"), padding=1), 0.2), 2)
        return (F.linear(x.flatten(1), self.out),)


for _name in RANDOMS.values():
    register_feature_extractor(_name, RandomConv)


@dataclass(frozen=True)
class Extractor:
    """A network on the device with what a result needs to say about it."""

    name: str
    """torch-fidelity's name of it, the file of a TorchScript, or module:Class."""
    sha256: str
    """Of its weights; of a user's class also of the file that it stands in."""
    resize: str
    """How pictures are brought to its input size."""
    size: int
    """Length of a feature vector."""
    network: nn.Module
    """(N, 3, H, W) uint8 -> features (N, size), or a tuple of them and, last, of the class scores for isc."""
    device: torch.device

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1, 3 or 4, H, W) uint8, through pictures.to_rgb -> features (N, size) and class scores, both float32."""
        with torch.no_grad():
            found = self.network(to_rgb(images.to(self.device)).contiguous(memory_format=torch.channels_last))
        parts = found if isinstance(found, tuple) else (found,)
        return parts[0].float(), parts[-1].float()

    def features(self, images: Tensor) -> Tensor:
        """(N, 1, 3 or 4, H, W) uint8 -> (N, size) float32."""
        return self.both(images)[0]

    def called(self, metric: str) -> str:
        """What a metric (fd, kd, isc, precision, ...) is called on these features."""
        plain = {"fd": "fid", "fd_infinity": "fid_infinity", "class_fd": "class_fid", "kd": "kid", "isc": "isc"}
        if self.name == INCEPTION and metric in plain:
            return plain[metric]
        if self.name == "vgg16" and metric in ("precision", "recall"):
            return metric
        return f"{metric}_{self.short}"

    @property
    def short(self) -> str:
        """Its name within a metric's."""
        name = "inception" if self.name == INCEPTION else self.name.replace(RANDOM, "random")
        name = Path(name).stem if name.endswith(SCRIPTS) else name.rsplit(":", 1)[-1]
        return re.sub(r"\W+", "_", name).lower()


# Weights, settled at launch


SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")
"""Endings of a TorchScript file."""


@dataclass(frozen=True)
class Settled:
    """Which extractor a run measures with, and where its weights lie: agreed on at launch by all processes."""

    name: str
    """As of Extractor.name."""
    weights: Path | None
    """None where the network has no file of weights."""
    lpips: bool
    """Whether LPIPS is at hand for ppl."""


def hub_file(name: str) -> Path:
    """Where torch keeps what it downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def settle_weights(config: EvalConfig, say: Callable[[str], None]) -> Settled:
    """The extractor and its weights, downloaded if need be. For one process only.

    UserError when weights are asked for and cannot be had, or when a file is no such weights: at launch, not at the
    first evaluation.
    """
    lpips = False
    if "ppl" in config.metrics and config.extractor not in RANDOMS:
        for url in (URL_VGG16, URL_VGG16_LPIPS):
            fetched(url, hub_file(url.rsplit("/", 1)[-1]), "eval.metrics: ppl needs LPIPS's weights", say)
        lpips = True
    name, given = config.extractor, Path(config.weights) if config.weights is not None else None
    if name in RANDOMS:
        return Settled(RANDOMS[name], None, lpips)
    if ":" in name or name.endswith(SCRIPTS):
        return Settled(name, given if ":" in name else Path(name), lpips)
    if name in DINOV2:
        return Settled(name, _dino_weights(name, given), lpips)
    if name in CLIP:
        target = hub_file(f"{name}-{MODEL_METADATA[name]['hash']}.pt")
        return Settled(name, given or fetched(MODEL_URLS[name], target, f"eval.extractor: {name}", say), lpips)
    if name == "vgg16":
        weights = given or fetched(URL_VGG16, hub_file(URL_VGG16.rsplit("/", 1)[-1]), "eval.extractor: vgg16", say)
        return Settled(name, checked_weights(weights, "features.0.weight", "classifier.6.weight", URL_VGG16), lpips)
    try:
        weights = given or fetched(URL_INCEPTION_V3, cached_weights(), "eval.extractor: inception", say)
    except UserError as error:
        if name == "inception":
            raise
        say(
            f"{error}. Measuring with a seeded random network instead: fd_random and the like are not comparable with "
            "any FID"
        )
        return Settled(RANDOM, None, lpips)
    return Settled(
        INCEPTION, checked_weights(weights, "Conv2d_1a_3x3.conv.weight", "fc.weight", URL_INCEPTION_V3), lpips
    )


def cached_weights() -> Path:
    """Where torch-fidelity looks for FID's Inception weights, and downloads them to."""
    return hub_file(URL_INCEPTION_V3.rsplit("/", 1)[-1])


def fetched(url: str, target: Path, what: str, say: Callable[[str], None]) -> Path:
    """The file of a URL, downloaded where it is not there yet. UserError with the remedy where it cannot be had."""
    if target.exists():
        return target
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # A firewall that drops packets must not hold the launch up for minutes.
    try:
        say(f"fetching {url} to {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The last part of these names is the start of the file's sha256; a download that differs is not kept.
        digest = target.stem.rsplit("-", 1)[-1]
        prefix = digest if re.fullmatch("[0-9a-f]{8,64}", digest) else None
        torch.hub.download_url_to_file(url, str(target), hash_prefix=prefix, progress=False)
        return target
    except (OSError, RuntimeError) as error:  # No network, a refusing server, no place to write, or a wrong file.
        raise UserError(
            f"{what}: weights that cannot be had here ({one_line(error)}); fetch {url} elsewhere and put it at "
            f"{target}, or name it with --eval.weights FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def checked_weights(path: Path, first: str, last: str, url: str) -> Path:
    """The path, if it holds tensors of these names (read without running any code in the file)."""
    try:
        keys = torch.load(path, map_location="cpu", weights_only=True, mmap=True).keys()
    except Exception as error:  # torch.load raises many kinds on a file that is no checkpoint; all mean the same here
        raise UserError(
            f"eval.weights: {path} cannot be read as weights ({one_line(error, 120)}); expected the file from {url}"
        ) from error
    if first not in keys or last not in keys:
        raise UserError(
            f"eval.weights: {path} holds other weights (its first is {next(iter(keys), 'nothing')}); expected the "
            f"file from {url}"
        )
    return path


def _dino_weights(name: str, given: Path | None) -> Path:
    """DINOv2's code and weights are where torch.hub puts them: torch-fidelity takes neither from elsewhere."""
    code = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    weights = hub_file(f"{DINO_NAMES[name]}_pretrain.pth")
    missing = [path for path in (code, weights) if not path.exists()]
    if given is not None or missing:
        wrong = f"eval.weights: {given}" if given is not None else f"{missing[0]} is missing"
        raise UserError(
            f"eval.extractor: {name} is read from torch's cache alone ({wrong}); on a machine with a network run "
            f"torch.hub.load('facebookresearch/dinov2', '{DINO_NAMES[name]}') and copy {code} and {weights} here"
        )
    return weights


# Networks


def make_extractor(settled: Settled, device: torch.device) -> Extractor:
    """The network that `settle_weights` named, tried on a picture. UserError for one that does not fit."""
    name, cuda = settled.name, device.type == "cuda"
    if name in RANDOMS.values():
        return _tried(name, create_feature_extractor(name, ["512"], cuda=cuda, verbose=False), None, device)
    if ":" in name:
        return _tried(name, _from_class(name, settled.weights), settled.weights, device)
    assert settled.weights is not None
    if name.endswith(SCRIPTS):
        return _tried(name, _from_script(settled.weights), settled.weights, device)
    layers = ["2048", "logits_unbiased"] if name == INCEPTION else [_layer(name)]
    try:
        # torch.hub's own files are found by torch-fidelity itself; DINOv2 takes no path at all.
        path = {} if name in DINOV2 else {"feature_extractor_weights_path": str(settled.weights)}
        network = create_feature_extractor(name, layers, cuda=cuda, verbose=False, **path)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"eval.weights: {settled.weights} is not {name}'s ({one_line(error)})") from error
    return _tried(name, network, settled.weights, device)


def _layer(name: str) -> str:
    return "clip" if name in CLIP else "dinov2" if name in DINOV2 else "fc2_relu"


def _from_script(path: Path) -> nn.Module:
    try:
        network: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        return network
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"eval.extractor: {path} cannot be read as TorchScript ({one_line(error, 120)}); save a module with "
            "torch.jit.save that takes (N, 3, H, W) uint8 and gives (N, D)"
        ) from error


def _from_class(name: str, weights: Path | None) -> nn.Module:
    """The class made without arguments; then eval.weights, if there are any, loaded into it."""
    module, _, attribute = name.partition(":")
    try:
        network: nn.Module = getattr(importlib.import_module(module), attribute)()
        if weights is not None:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network
    except Exception as error:  # The user's own code: whatever it raises is the answer.
        raise UserError(
            f"eval.extractor: {name} cannot be made ({type(error).__name__}: {one_line(error)}); expected a class of "
            "an importable module, a torch.nn.Module made without arguments"
        ) from error


def other_weights(extractor: Extractor, first: str) -> str | None:
    """The problem where the first process has other weights (sha256 `first`): the machines have different files, or a
    user's class draws its own."""
    if extractor.sha256 == first:
        return None
    return (
        f"eval.extractor: {extractor.name} has other weights ({extractor.sha256[:12]}) than on the first process "
        f"({first[:12]}); give it a file of weights that all machines have, or seed what it draws"
    )


def _tried(name: str, network: nn.Module, weights: Path | None, device: torch.device) -> Extractor:
    """The extractor, after a look at what it makes of two pictures."""
    resize = {INCEPTION: "tf1-bilinear-299", **dict.fromkeys(RANDOMS.values(), "bilinear-antialias-64")}.get(name)
    if resize is None:
        own = ":" in name or name.endswith(SCRIPTS)
        resize = "the extractor's own" if own else f"tf1-bilinear-{network.resolution if name in CLIP else 224}"
    try:
        network = network.to(device).eval().to(memory_format=torch.channels_last)
        for parameter in network.parameters():  # TorchScript knows no requires_grad_ of a whole network.
            parameter.requires_grad_(False)
        code = _source_of(network) if ":" in name else b""
        extractor = Extractor(name, _digest(network, weights, code), resize, 0, network, device)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"eval.extractor: {name} is no torch.nn.Module that can be used ({one_line(error)})") from error
    return replace(extractor, size=feature_size(extractor, (64, 64)))


def feature_size(extractor: Extractor, size: tuple[int, int]) -> int:
    """Length of the features of pictures of (height, width) pixels. UserError where the network does not take them."""
    shape = (2, 3, *size)
    try:
        features = extractor.features(torch.zeros(shape, dtype=torch.uint8))
    except Exception as error:  # A user's own network raises what it likes.
        raise UserError(
            f"eval.extractor: {extractor.name} cannot take {shape} uint8 pictures ({type(error).__name__}: "
            f"{one_line(error)})"
        ) from error
    if features.ndim != 2 or len(features) != 2 or not bool(features.isfinite().all()):
        raise UserError(
            f"eval.extractor: {extractor.name} makes {tuple(features.shape)} of 2 pictures, expected finite features "
            "(2, D)"
        )
    return features.shape[1]


def _source_of(network: nn.Module) -> bytes:
    """The file that a user's class stands in: with another one the same weights make other features."""
    file = inspect.getsourcefile(type(network))
    return Path(file).read_bytes() if file is not None else b""


def _digest(network: nn.Module, weights: Path | None, code: bytes) -> str:
    """sha256 of the file of weights, else of the tensors; with a user's code before them."""
    if weights is not None:
        with weights.open("rb") as file:
            if not code:
                return hashlib.file_digest(file, "sha256").hexdigest()
            return hashlib.sha256(code + file.read()).hexdigest()
    tensors: dict[str, Any] = network.state_dict()
    flat = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors.values())
    content = b"".join(tensor.numpy().tobytes() for tensor in flat)
    return hashlib.sha256(code + content).hexdigest()
