"""The Frechet distance (Heusel et al. 2017, arXiv 1706.08500) with features from all processes.

Each process adds its share of the features to float64 moments, the moments are summed over the processes, and
torch-fidelity's own formula turns them into the number. Which images are compared does not depend on the number of
processes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric

from hrgan.config import Config
from hrgan.data.dataset import Dataset
from hrgan.data.stream import Batch, read_range
from hrgan.errors import DataError
from hrgan.metrics.extractor import Extractor
from hrgan.noise import latents
from hrgan.pictures import to_float, to_uint8
from hrgan.sizes import size_text

BLOCK = 64
"""Latents are dealt to processes in blocks of this many."""


def go_on() -> None:
    """The `pause` of an evaluation that nothing interrupts. Others may raise: all processes call theirs equally often,
    once a round."""


@dataclass
class Moments:
    """Sums over features f: count (), total (D,) of f, outer (D, D) of f f^T, all float64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @staticmethod
    def zero(size: int, device: torch.device) -> Moments:
        """Of no features."""
        count, total, outer = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (size,), (size, size))
        )
        return Moments(count, total, outer)

    def add(self, features: Tensor) -> None:
        """Features (N, D) float64."""
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def reduce(self) -> None:
        """Sum over the processes."""
        if dist.is_initialized():
            for tensor in (self.count, self.total, self.outer):
                dist.all_reduce(tensor)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def statistics(self) -> dict[str, np.ndarray]:
        """mu (D,) and sigma (D, D, unbiased) as torch-fidelity's formula takes them."""
        mu = self.total / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return {"mu": mu.cpu().numpy(), "sigma": sigma.cpu().numpy()}


def frechet(a: Moments, b: Moments) -> float:
    """torch-fidelity's Frechet distance between two sets of features."""
    return float(fid_statistics_to_metric(a.statistics(), b.statistics(), False)["frechet_inception_distance"])


@dataclass(frozen=True)
class RealSet:
    """The reference of a metric: moments of every other real image, so that the two halves give the floor."""

    even: Moments
    odd: Moments
    identity: str
    """sha256 over everything that the moments depend on."""

    @property
    def all(self) -> Moments:
        """Of all the images."""
        return self.even + self.odd

    def floor(self) -> float:
        """The distance between the two halves: what a perfect generator of half as many images would get."""
        return frechet(self.even, self.odd)


def count_real(config: Config, dataset: Dataset) -> int:
    """How many reals are compared."""
    return min(config.eval.num_real or dataset.num_samples, dataset.num_samples)


def real_moments(
    config: Config,
    dataset: Dataset,
    resolution: int,
    extractor: Extractor,
    rank: int,
    world: int,
    folders: list[Path],
    pause: Callable[[], None] = go_on,
) -> RealSet:
    """Moments of the first reals in stored order, from the cache of the first folder that has or takes them, else
    computed by all processes."""
    count = count_real(config, dataset)
    key = ("moments-1", dataset.real_set, resolution, extractor.name, extractor.sha256, extractor.resize, count)
    identity = hashlib.sha256(repr(key).encode()).hexdigest()
    # Only the first process looks, so that all agree; the others hold zeros and no one but the first uses the sums.
    cached = _load_cached(folders, identity) if rank == 0 else None
    if _agree(cached is not None, rank):
        zero = Moments.zero(extractor.size, torch.device("cpu"))
        return cached if cached is not None else RealSet(zero, zero, identity)
    device = next(extractor.network.parameters()).device
    even, odd = (Moments.zero(extractor.size, device) for _ in range(2))
    start, stop = count * rank // world, count * (rank + 1) // world
    lost = torch.zeros(2, dtype=torch.float64, device=device)  # samples left out; processes that could not go on
    failure: DataError | None = None
    data, size = config.data, config.eval.batch
    batches: Iterator[Batch] = iter(())
    most = (count + world - 1) // world  # of any process
    for number in range((most + size - 1) // size):
        pause()
        try:
            if number == 0:
                batches = read_range(dataset, resolution, start, stop, batch=size, workers=data.workers)
            batch = next(batches, None)
        except DataError as error:  # Raised below, on all processes: none may wait for one that has left.
            failure, lost[1], batch, batches = error, 1, None, iter(())
        if batch is None:
            continue
        images = to_uint8(to_float(batch.images.to(device), dataset.values))
        features, is_odd = extractor.features(images), (batch.samples % 2 == 1).to(device)
        even.add(features[~is_odd])
        odd.add(features[is_odd])
        lost[0] += len(batch.bad)
        for line in batch.bad:
            print(f"real statistics: {line}", file=sys.stderr)
    even.reduce()
    odd.reduce()
    if dist.is_initialized():
        dist.all_reduce(lost)
    bad, failed = lost.tolist()
    if failed:
        raise failure or DataError("another process cannot read its shards; its line names what is wrong")
    if bad > config.data.max_bad * max(count, 1000):
        raise DataError(
            f"{dataset.where}: {int(bad)} of {count} real samples at {size_text(dataset.form.grid, resolution)} cannot "
            f"be read, more than data.max_bad {config.data.max_bad}; run: hrgan data check {dataset.where}"
        )
    result = RealSet(even, odd, identity)
    if rank == 0 and not bad:  # What lacks a sample must not pass for the whole set once that is mended.
        _store(folders, result)
    return result


def _agree(value: bool, rank: int) -> bool:
    if not dist.is_initialized():
        return value
    flag = [value if rank == 0 else None]
    dist.broadcast_object_list(flag)
    return bool(flag[0])


def _load_cached(folders: list[Path], identity: str) -> RealSet | None:
    for folder in folders:
        path = folder / f"{identity[:32]}.safetensors"
        if path.exists():
            try:
                t = safetensors.torch.load_file(path)
            except (OSError, SafetensorError) as error:
                print(f"{path} is damaged ({error}): computing the real statistics anew", file=sys.stderr)
                continue
            halves = [Moments(t[f"{half}.count"], t[f"{half}.total"], t[f"{half}.outer"]) for half in ("even", "odd")]
            return RealSet(halves[0], halves[1], identity)
    return None


def _store(folders: list[Path], reals: RealSet) -> None:
    """Into the first folder that can be written, atomically."""
    tensors = {
        f"{half}.{key}": value.cpu() for half in ("even", "odd") for key, value in vars(getattr(reals, half)).items()
    }
    content = safetensors.torch.save(tensors)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{reals.identity[:32]}.{os.getpid()}"
            partial.write_bytes(content)
            partial.replace(folder / f"{reals.identity[:32]}.safetensors")
            return
        except (
            OSError
        ):  # Shards are often read-only: the next folder (the run's own) takes it, else it is computed again next time.
            continue


def fake_moments(
    generate: Callable[[Tensor], Tensor],
    latent: int,
    count: int,
    batch: int,
    seed: int,
    extractor: Extractor,
    rank: int,
    world: int,
    pause: Callable[[], None] = go_on,
) -> Moments:
    """Moments of `count` generated images; image i has the same latent whatever the number of processes. generate:
    (N, latent) -> images."""
    device = next(extractor.network.parameters()).device
    moments = Moments.zero(extractor.size, device)
    for first in range(0, count, world * BLOCK):
        pause()
        start = first + rank * BLOCK
        if start >= count:
            continue
        z = latents(start, min(start + BLOCK, count), latent, seed, "eval").to(device)
        for part in torch.split(z, batch):
            images = generate(part)
            # A picture with NaN would turn into a black one: 0 * NaN makes the moments say so.
            moments.add(extractor.features(to_uint8(images)) + 0 * images.double().sum())
    moments.reduce()
    return moments


def evaluate(
    config: Config,
    dataset: Dataset,
    generator: nn.Module,
    alpha: float,
    extractor: Extractor,
    rank: int,
    world: int,
    folders: list[Path],
    pause: Callable[[], None] = go_on,
) -> dict[str, float | int | str | None]:
    """One line of metrics.jsonl besides nimg. Numbers are right on rank 0. The generator's training mode is left as
    it was."""
    began = time.perf_counter()
    resolution = int(generator.resolution)  # type: ignore[arg-type]  # a plain int
    training = generator.training
    generator.eval()
    try:
        with torch.no_grad():
            fakes = fake_moments(
                lambda z: generator(z, None, alpha),
                config.network.latent,
                config.eval.num_fake,
                config.eval.batch,
                config.seed,
                extractor,
                rank,
                world,
                pause,
            )
    finally:
        generator.train(training)
    row = compare(config, dataset, resolution, fakes, extractor, rank, world, folders, pause)
    return row | {"seconds": round(time.perf_counter() - began, 3)} if rank == 0 else row


def compare(
    config: Config,
    dataset: Dataset,
    resolution: int,
    fakes: Moments,
    extractor: Extractor,
    rank: int,
    world: int,
    folders: list[Path],
    pause: Callable[[], None] = go_on,
) -> dict[str, float | int | str | None]:
    """The distance of fakes to the reals of a set, with its floor and everything it depends on; {} but on rank 0."""
    reals = real_moments(config, dataset, resolution, extractor, rank, world, folders, pause)
    if rank > 0:
        return {}
    # There is no distance to non-finite pictures: null in metrics.jsonl, and never the best.
    value = frechet(fakes, reals.all) if bool(fakes.outer.isfinite().all()) else None
    return {
        "resolution": resolution,
        extractor.metric: value,
        f"{extractor.metric}_floor": reals.floor(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "resize": extractor.resize,
        "num_fake": int(fakes.count),
        "num_real": int(reals.all.count),
        "real_set": dataset.real_set,
    }
