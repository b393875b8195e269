"""What a tick measures of the networks as they stand, besides what its steps said: signs of health by fixed latents and
fixed reals, and what D makes of reals that it is not trained on. Training does not notice: no random number, statistic
or mode of a network changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrgan.config import CHUNK, Config
from hrgan.data import stream
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.engine import Engine
from hrgan.errors import DataError, HrganError, UserError
from hrgan.metrics.extractor import RANDOM, Extractor, Settled, make_extractor
from hrgan.metrics.rows import Row
from hrgan.monitor.health import vital_signs
from hrgan.networks.layers import downsample
from hrgan.noise import latents
from hrgan.pictures import to_float
from hrgan.schedule import Phase, Schedule
from hrgan.watch import beat

SIGNS = ("diversity_pixel", "diversity_feature", "duplicates", "detail", "logit_seen", "logit_held_out")
"""Keys of log.jsonl."""
COUNT, LARGE, COUNT_OF_LARGE = 64, 512, 32
"""Pictures on each side; from the resolution LARGE on."""
AT_ONCE = 16
"""Pictures that go through a network together."""
HURRIED_SECONDS = 1.0
"""Longest that the signs may take where the run is asked to stop."""


# Held-out pictures


def open_held_out(config: Config, dataset: Dataset, schedule: Schedule) -> Dataset | None:
    """The set of data.held_out, if there is one, whole in each tier that the run will read. UserError or DataError, one
    line, where it does not go with the set that is trained on."""
    if config.data.held_out is None:
        return None
    try:
        held_out = open_dataset(replace(config.data, path=config.data.held_out))
    except HrganError as error:
        raise type(error)(f"data.held_out: {error}") from error
    place = f"data.held_out: {held_out.where}"
    if held_out.real_set in {dataset.real_set, *(member.manifest.real_set for member in dataset.members)}:
        raise UserError(
            f"{place} is what the run is trained on; split the source: hrgan data build SRC OUT --share 0:0.9 to train "
            "on, and --share 0.9:1"
        )
    pairs = [
        ("channels", held_out.form.channels, dataset.form.channels),
        ("bits", held_out.form.bits, dataset.form.bits),
        ("grid", list(held_out.form.grid), list(dataset.form.grid)),
    ]
    if config.network.condition != "none":
        pairs.append(("classes", list(held_out.classes), list(dataset.classes)))
    for name, found, expected in pairs:
        if found != expected:
            raise UserError(
                f"{place} has {name} {found}, but {dataset.where} has {expected}; build both with the same options"
            )
    if held_out.resolution < config.network.resolution:
        raise UserError(
            f"{place} was built up to {held_out.resolution}; build it with --resolution {config.network.resolution}"
        )
    if held_out.num_samples < CHUNK:
        raise DataError(f"{held_out.where}: {held_out.num_samples} images, expected at least {CHUNK}")
    for resolution in sorted({phase.resolution for phase in schedule.phases}):
        held_out.check_tier(resolution)
    return held_out


# Signs


def faded(generator: nn.Module, images: Tensor, alpha: float) -> Tensor:
    """Reals (N, C, H, W) as D sees them in a fade: as the generator's images fade (Karras et al. 2018, appendix A)."""
    before: Tensor = generator.enlarged(downsample(images))  # type: ignore[operator]  # every family has it
    return torch.lerp(before, images, alpha)


class Reals(NamedTuple):
    """Fixed pictures of a phase, as stored."""

    images: Tensor
    """(N, C, H, W) uint8 or uint16, N a multiple of 4."""
    labels: Tensor
    """(N,) int64."""


@dataclass
class Checkup:
    """The measuring on the main process, and the time that it takes."""

    config: Config
    dataset: Dataset
    held_out: Dataset | None
    extractor: Extractor
    """The run's; where that is not the small random one, one is made."""
    spent: float = 0.0
    """Seconds so far."""
    took: float = 0.0
    """Seconds of the last time; 0 before the first."""
    since: float = 0.0
    """Seconds of the run when this began: what earlier launches spent is not known, nor is their time counted."""
    sides: dict[str, Reals] = field(default_factory=dict)
    """Reals that are trained on (seen) and that are not (held_out), of the resolution that was measured last."""
    resolution: int | None = None

    def affordable(self, seconds: float, hurried: bool) -> bool:
        """Whether log.max_share leaves the time for another one. seconds: of the run so far. hurried: not where it
        would keep a stop waiting."""
        most = self.config.log.max_share
        if hurried and self.took > HURRIED_SECONDS:
            return False
        return most == 1 or self.spent + self.took < most * (seconds - self.since)

    def measure(self, engine: Engine, phase: Phase, nimg: int) -> Row:
        """A value for each of SIGNS; None where there is none."""
        began = time.perf_counter()
        beat(f"measuring the signs of health at {nimg / 1000:g} kimg")
        self.read(phase.resolution)
        seen, alpha = self.sides["seen"], phase.alpha(nimg)
        classes = self.config.network.num_classes

        def shown(reals: Reals) -> tuple[Tensor, Tensor | None]:
            images = to_float(reals.images.to(engine.device), self.dataset.values)
            labels = reals.labels.to(engine.device) if classes else None
            return faded(engine.ema, images, alpha) if phase.fading else images, labels

        with torch.no_grad():
            images, labels = shown(seen)
            z = latents(0, len(images), self.config.network.latent, self.config.seed, "grid").to(engine.device)
            fakes = through(lambda z, labels: engine.ema(z, labels, alpha), z, labels)
            beat()
            row: Row = dict.fromkeys(SIGNS)
            row |= vital_signs(fakes, images, self.extractor.features)
            if "held_out" in self.sides and engine.zero_stage != 3:  # Which has no whole D anywhere.
                row["logit_seen"] = mean_logit(engine.discriminator.module, images, labels, alpha)
                row["logit_held_out"] = mean_logit(
                    engine.discriminator.module, *shown(self.sides["held_out"]), alpha
                )
        self.took = time.perf_counter() - began
        self.spent += self.took
        return row

    def read(self, resolution: int) -> None:
        """The reals of a resolution, once: as many on both sides, the first in stored order."""
        if resolution == self.resolution:
            return
        if self.extractor.name != RANDOM:
            self.extractor = make_extractor(Settled(RANDOM, None, False), self.extractor.device)
        sets = {"seen": self.dataset} | ({"held_out": self.held_out} if self.held_out is not None else {})
        most = min(COUNT if resolution < LARGE else COUNT_OF_LARGE, *(one.num_samples for one in sets.values()))
        found = {name: first_of(one, resolution, most) for name, one in sets.items()}
        count = min(len(reals.images) for reals in found.values()) // CHUNK * CHUNK
        self.sides = {name: Reals(reals.images[:count], reals.labels[:count]) for name, reals in found.items()}
        self.resolution = resolution


def first_of(dataset: Dataset, resolution: int, count: int) -> Reals:
    """The first pictures in stored order, without those that cannot be read. DataError for fewer than four."""
    batches = list(stream.read_range(dataset, resolution, 0, count))
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    if len(images) < CHUNK:
        raise DataError(f"{dataset.where}: {len(images)} of its first {count} samples can be read, expected {CHUNK}")
    return Reals(images, labels)


def through(network: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, labels: Tensor | None) -> Tensor:
    """What a network makes of (N, ...), AT_ONCE at a time."""
    parts = [
        network(x[at : at + AT_ONCE], None if labels is None else labels[at : at + AT_ONCE])
        for at in range(0, len(x), AT_ONCE)
    ]
    return torch.cat(parts)


def mean_logit(module: nn.Module, images: Tensor, labels: Tensor | None, alpha: float) -> float | None:
    """Of the bare D, in evaluation: batch statistics in training would change it, and wait for other processes."""
    training = module.training
    module.eval()
    try:
        mean = through(lambda x, labels: module(x, labels, alpha)[:, :1], images, labels).float().mean().item()
    finally:
        module.train(training)
    return mean if abs(mean) < float("inf") else None
