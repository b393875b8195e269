"""Perceptual path length (Karras et al. 2019, arXiv 1812.04948, section 4.1) in z, at the ends of its paths."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch_fidelity.noise import batch_lerp, random_normal
from torch_fidelity.utils import create_sample_similarity

from hrgan.config import Config
from hrgan.metrics.extractor import LPIPS, Extractor
from hrgan.metrics.features import Ranks, go_on
from hrgan.metrics.rows import Row
from hrgan.networks import full_precision, style
from hrgan.pictures import to_rgb
from hrgan.sizes import size_text

EPSILON = 1e-4
LATENT_SEED = 2020
"""torch-fidelity's: the same latents, so the same number."""
SIDE = 64
"""Pixels that LPIPS sees, torch-fidelity's choice."""


def path_length(
    config: Config,
    generator: nn.Module,
    alpha: float,
    resolution: int,
    extractor: Extractor,
    lpips: bool,
    ranks: Ranks,
    pause: Callable[[float], None] = go_on,
) -> Row:
    """A row of metrics.jsonl, on the main process ({} on others). By LPIPS; without it by the squared distance of the
    extractor's features, under its name. In float32, on pictures that are not rounded: between the two ends of a step
    of 1e-4 hardly a pixel changes by a whole level."""
    began = time.perf_counter()
    device, count = extractor.device, config.eval.num_fake
    distance, name, digest = _lpips(device) if lpips else _by_features(extractor)
    random = np.random.RandomState(LATENT_SEED)
    first, second = (random_normal(random, (count, config.network.latent)) for _ in range(2))
    second = batch_lerp(first, second, EPSILON)
    classes = int(generator.classes)  # type: ignore[arg-type]  # a plain int
    labels = torch.from_numpy(random.randint(0, classes, count)).to(device) if classes else None
    start, stop = count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world
    found = []
    share = -(-count // ranks.world)
    rounds = -(-share // config.eval.batch)
    with torch.no_grad(), full_precision(generator):
        for number in range(rounds):
            pause(number / rounds)
            low = min(start + number * config.eval.batch, stop)
            high = min(low + config.eval.batch, stop)
            if high > low:
                ends = torch.cat([first[low:high], second[low:high]]).to(device)
                of = None if labels is None else labels[low:high].repeat(2)
                a, b = to_floats(pictures(generator, ends, of, alpha)).chunk(2)
                found.append(distance(a, b) / EPSILON**2)
    everyone = _gathered(torch.cat(found).cpu() if found else torch.empty(0), ranks)
    if ranks.rank > 0:
        return {}
    value, error = reduced(everyone.numpy())
    key = "ppl" if lpips else f"ppl_{extractor.short}"
    rows, columns = config.network.grid
    shape = f" of {size_text(config.network.grid, resolution)}" if rows != columns else ""
    return {
        "resolution": resolution,
        key: value,
        f"{key}_error": error,
        "extractor": name,
        "extractor_sha256": digest,
        # No hash of reals says the shape here, which a resolution alone does not.
        "resize": (f"area or bilinear {SIDE}" if lpips else extractor.resize) + shape,
        "num_fake": count,
        "num_real": 0,
        "real_set": "",
        "mirror": False,
        "truncation": 1.0,
        "seed": LATENT_SEED,
        "labels": "each class as often" if classes else "none",
        "seconds": round(time.perf_counter() - began, 3),
    }


def pictures(generator: nn.Module, ends: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
    """Pictures of both ends of each path, (2 n, latent), with the same noise inputs where the family has some: they
    follow z's bits, and a path is not to measure them."""
    if isinstance(generator, style.Generator):
        return generator.drawn(generator.mapped(ends, labels), ends[: len(ends) // 2].repeat(2, 1), alpha)
    made: Tensor = generator(ends, labels, alpha)
    return made


def reduced(distances: np.ndarray) -> tuple[float | None, float | None]:
    """The mean and its standard error without the least and the greatest hundredth, as the paper has it; None for
    pictures that are not finite."""
    if not np.isfinite(distances).all():
        return None, None
    low = np.percentile(distances, 1, method="lower")
    high = np.percentile(distances, 99, method="higher")
    kept = distances[(distances >= low) & (distances <= high)]
    return float(kept.mean()), float(kept.std() / np.sqrt(len(kept)))


def to_floats(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N, 3, H, W) float32 in [0, 255], as pictures.to_rgb shows them, not rounded."""
    images = images.float().mul(127.5).add(127.5)
    images = torch.where(images.isfinite(), images.clamp(0, 255), images)
    if images.shape[1] == 4:
        share = images[:, 3:] / 255
        return images[:, :3] * share + 255 * (1 - share)
    return to_rgb(images)


def _lpips(device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor], str, str]:
    network = create_sample_similarity(
        LPIPS,
        cuda=device.type == "cuda",
        sample_similarity_resize=SIDE,
        sample_similarity_dtype="float32",
        verbose=False,
    )
    tensors = network.state_dict().values()
    digest = hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    return lambda a, b: network(a, b).flatten(), LPIPS, digest


def _by_features(extractor: Extractor) -> tuple[Callable[[Tensor, Tensor], Tensor], str, str]:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        found = extractor.network(torch.cat([a, b]))
        a, b = (found[0] if isinstance(found, tuple) else found).float().chunk(2)
        return (a - b).square().sum(1)

    return distance, extractor.name, extractor.sha256


def _gathered(own: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world == 1:
        return own
    everyone: list[Tensor | None] = [None] * ranks.world
    dist.gather_object(own, everyone if ranks.rank == 0 else None)
    return torch.cat([part for part in everyone if part is not None]) if ranks.rank == 0 else own
