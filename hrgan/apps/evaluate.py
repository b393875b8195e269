"""The metrics of any two of: a run, a checkpoint, a folder of pictures, shards. Outside training, on any number of
processes."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from hrgan.apps.generate import load_generator
from hrgan.checkpoint import find
from hrgan.checks import problems
from hrgan.config import Config, DataConfig, refuse
from hrgan.data import manifest as manifests
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.data.manifest import Form
from hrgan.data.store import cache_folder
from hrgan.engine import from_all, join, on_first
from hrgan.errors import DataError, UserError
from hrgan.metrics.evaluation import Evaluated, evaluated, measure, save_neighbours
from hrgan.metrics.extractor import Extractor, make_extractor, other_weights, settle_weights
from hrgan.metrics.features import Ranks
from hrgan.metrics.rows import Row
from hrgan.metrics.source import (
    PLAIN,
    Source,
    from_dataset,
    from_folder,
    from_generator,
    mirrored,
    pictures_in,
)
from hrgan.pictures import save_png, to_array
from hrgan.sizes import size_text, target

# What is asked for


@dataclass(frozen=True)
class Settings:
    """What the command line says; None takes what the run or the defaults say."""

    data: str | None = None
    """Shards in place of those that a run was trained on."""
    count: int | None = None
    """Generated pictures, or those taken of A, at least 2."""
    num_real: int | None = None
    """Pictures taken of B."""
    metrics: tuple[str, ...] | None = None
    extractor: str | None = None
    weights: str | None = None
    mirror: bool | None = None
    kid_subset_size: int | None = None
    bootstrap: int | None = None
    resolution: str | None = None
    """What folders and shards are brought to, as of `hrgan data build`."""
    workers: int | None = None
    """Loader processes of each process."""
    picture: Path | None = None
    """File for the picture of nearest reals; that of a run goes to its folder."""

    def of(self, config: Config) -> Config:
        """A configuration as it is measured with."""
        names = ("num_real", "extractor", "weights", "mirror", "kid_subset_size", "bootstrap")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.extractor is not None and self.weights is None:
            changes["weights"] = None  # The run's are another network's.
        changes |= {"num_fake": self.count} if self.count is not None else {}
        changes |= {"metrics": list(self.metrics)} if self.metrics is not None else {}
        data = replace(config.data, path=self.data or config.data.path)
        data = replace(data, workers=self.workers) if self.workers is not None else data
        found = replace(config, data=data, eval=replace(config.eval, **changes))
        # How a checkpoint was trained is no question any more.
        refuse(problems(Config(data=found.data, eval=found.eval)), "hrgan eval")
        return found

    def check(self) -> None:
        """UserError for a count that is no set."""
        for name, count in (("--count", self.count), ("--num-real", self.num_real)):
            if count is not None and count < 2:
                raise UserError(f"{name}: {count} is below the least, 2")
        if self.picture is not None and not self.picture.parent.is_dir():
            raise UserError(f"--picture: there is no folder {self.picture.parent}; make it, or name another file")


@dataclass(frozen=True)
class Operand:
    """One of the two: a generator, a set of shards, or a folder."""

    where: str
    config: Config
    """A generator's own; of others the defaults."""
    generator: nn.Module | None = None
    alpha: float = 1.0
    nimg: int | None = None
    """Of a generator."""
    digest: str = ""
    """sha256 of a generator's weights."""
    dataset: Dataset | None = None

    @property
    def size(self) -> tuple[tuple[int, ...], int] | None:
        """(grid, level); None for a folder, whose pictures have any size."""
        if self.generator is not None:
            return tuple(self.config.network.grid), int(self.generator.resolution)  # type: ignore[arg-type]  # an int
        return (self.dataset.form.grid, self.dataset.resolution) if self.dataset is not None else None


def open_operand(text: str, settings: Settings, device: torch.device) -> Operand:
    """What a word names. UserError where it is nothing that can be measured."""
    path = Path(text)
    if (path / "checkpoints").is_dir() or (path / "state.json").exists() or path.parent.name == "checkpoints":
        folder = find(path)
        generator, alpha, config, nimg = load_generator(folder, True, device, as_trained=True)
        digest = json.loads((folder / "manifest.json").read_text())["ema.safetensors"]
        return Operand(f"{path} at {nimg / 1000:g} kimg", settings.of(config), generator, alpha, nimg, digest)
    if "://" in text or text.startswith("pipe:") or (path / manifests.FILE).exists():
        config = settings.of(Config(data=DataConfig(path=text)))
        return Operand(text, config, dataset=open_dataset(replace(config.data, path=text)))
    if path.is_dir() and pictures_in(path):
        return Operand(text, settings.of(Config()))
    raise UserError(
        f"{text}: neither a run, a checkpoint, shards nor a folder with pictures; name for example runs/demo, "
        "runs/demo/checkpoints/120000 or shards/mine"
    )


# Measuring


def evaluate_pair(a: str, b: str | None, settings: Settings) -> list[Row]:
    """The rows of A against the reference B, as in metrics.jsonl; none on any process but the first. B None:
    settings.data, or the shards that A was trained on."""
    settings.check()
    if b is not None and settings.data is not None:
        raise UserError(f"--data: says nothing where the reference is named, {b}; leave one out")
    rank, world, device = join()
    ranks = Ranks(rank, world)
    left = open_operand(a, settings, device)
    named = b or settings.data
    if named is not None:
        right = open_operand(named, settings, device)
    elif left.generator is not None:  # As it was trained: from a cache, in shares, with another label.
        right = Operand("the run's set", left.config, dataset=open_dataset(left.config.data))
    else:
        raise UserError(f"--data: needed to measure {a}; name the shards, or a second folder, to compare it with")
    config = left.config if left.generator is not None else replace(right.config, network=left.config.network)
    extractor, lpips = chosen_extractor(config, device, ranks)
    real = _reference(right, left, config, settings)
    folders = _stats_folders(right, left, Path(a))
    if left.generator is not None:
        found = evaluated(config, left.generator, left.alpha, real, extractor, lpips, ranks, folders)
    else:
        if "ppl" in config.eval.metrics:
            raise UserError(f"eval.metrics: ppl needs a generator, but {a} is none; leave ppl out")
        fake = _source(left, right, config, settings, settings.count)
        _check_sizes(fake, real)
        found = measure(config, fake, real, extractor, ranks, folders)
    if found.problem is not None:
        raise DataError(found.problem)
    if found.neighbours is not None:
        _keep_neighbours(found, left, Path(a), real.level, settings, own_set=named is None)
    about: Row = {"nimg": left.nimg} if left.nimg is not None else {}
    if real.size[0] != real.size[1]:
        about["size"] = f"{real.size[0]}x{real.size[1]}"
    return [{**about, **row} for row in found.rows]


def chosen_extractor(config: Config, device: torch.device, ranks: Ranks) -> tuple[Extractor, bool]:
    """The extractor on this process, and whether LPIPS is at hand. UserError where processes have different ones."""
    settled = on_first(ranks.rank, ranks.world, lambda: settle_weights(config.eval, _say_error))
    extractor = make_extractor(settled, device)
    first = on_first(ranks.rank, ranks.world, lambda: extractor.sha256)
    problem = next(filter(None, from_all(other_weights(extractor, first), ranks.world)), None)
    if problem is not None:
        raise UserError(problem)
    return extractor, settled.lpips


def _say_error(line: str) -> None:
    print(line, file=sys.stderr)


def _level(left: Operand, right: Operand, settings: Settings) -> tuple[tuple[int, ...], int] | None:
    """(grid, level) that both are compared at: a generator's, else --resolution, else the largest that sets have; None
    for folders as they are."""
    asked = target(settings.resolution) if settings.resolution is not None else None
    sizes = {side.where: side.size for side in (left, right) if side.generator is not None and side.size is not None}
    if len(set(sizes.values())) > 1 or (sizes and asked is not None and asked not in sizes.values()):
        given = {**sizes, "--resolution": asked} if asked is not None else sizes
        listed = " and ".join(f"{size_text(*size)} of {where}" for where, size in given.items() if size is not None)
        raise UserError(f"sizes that differ: {listed}; pictures of one size can be compared")
    if sizes:
        return next(iter(sizes.values()))
    if asked is not None:
        return asked
    sets = [side.size for side in (left, right) if side.size is not None]
    return min(sets, key=lambda size: size[1]) if sets else None


def _source(
    side: Operand, other: Operand, config: Config, settings: Settings, count: int | None, hashed: bool = False
) -> Source:
    """A set or a folder as pictures of the size that both are compared at. hashed: as a reference, whose statistics are
    kept."""
    size = _level(side, other, settings)
    if side.dataset is not None:
        assert size is not None
        grid, level = size
        if tuple(side.dataset.form.grid) != tuple(grid) or level > side.dataset.resolution:
            held = size_text(side.dataset.form.grid, side.dataset.resolution)
            raise UserError(
                f"sizes that differ: {size_text(grid, level)} is asked for, but {side.where} was built up to {held}; "
                "build it anew with --resolution"
            )
        return from_dataset(config, side.dataset, level, count)
    return from_folder(config, Path(side.where), *_form(other, size), count, hashed)


def _form(other: Operand, size: tuple[tuple[int, ...], int] | None) -> tuple[Form | None, tuple[int, int]]:
    """How files are made into pictures: as the set was, or the one that the generator learnt from; with the stored
    numbers that are black and white."""
    if size is None:
        return None, (0, 255)
    (height, width), level = size
    if other.dataset is not None:
        return replace(other.dataset.form, tiers=(level,)), other.dataset.values
    form, values = replace(PLAIN, tiers=(level,), grid=(height, width)), (0, 255)
    if other.generator is not None:
        network = other.config.network
        alpha = "keep" if network.channels == 4 else "white"
        form = replace(form, channels=network.channels, bits=network.bits, alpha=alpha)
        low, high = other.config.data.values or (0, 2**network.bits - 1)
        values = low, high
    return form, values


def _reference(right: Operand, left: Operand, config: Config, settings: Settings) -> Source:
    if right.generator is not None:
        # Of other latents than A's: pictures of the same ones would be nearer to each other than others are.
        count = settings.num_real or config.eval.num_fake
        settled = replace(config, network=right.config.network, eval=replace(config.eval, num_fake=count))
        level = int(right.generator.resolution)  # type: ignore[arg-type]  # a plain int
        role = "eval reference"
        identity = hashlib.sha256(repr((right.digest, settled.seed, role, settled.precision)).encode()).hexdigest()
        return from_generator(settled, right.generator, right.alpha, level, right.where, role=role, identity=identity)
    source = _source(right, left, config, settings, config.eval.num_real, hashed=True)
    return mirrored(source) if config.eval.mirror else source


def _check_sizes(fake: Source, real: Source) -> None:
    if fake.size != real.size:
        sizes = " and ".join(f"{side.size[1]}x{side.size[0]} of {side.where}" for side in (fake, real))
        raise UserError(f"sizes that differ: {sizes}; bring both to one with --resolution")


def _stats_folders(right: Operand, left: Operand, a: Path) -> list[Path]:
    """Where statistics of the reference are kept: beside the shards, else in the run."""
    # Of a folder of pictures they go to where those of sets from a URL go.
    folders = [right.dataset.stats_folder() if right.dataset is not None else cache_folder() / "stats"]
    return folders + ([a / "stats"] if left.generator is not None and (a / "checkpoints").is_dir() else [])


def _keep_neighbours(found: Evaluated, left: Operand, a: Path, level: int, settings: Settings, own_set: bool) -> None:
    """To --picture, else into the run's folder, if it shows what the run was trained on."""
    assert found.neighbours is not None
    if settings.picture is not None:
        save_png(to_array(found.neighbours), settings.picture)
    elif own_set and left.nimg is not None:
        run = a if (a / "checkpoints").is_dir() else find(a).parent.parent
        save_neighbours(found.neighbours, run, left.nimg, level)
    else:
        _say_error("--picture FILE would keep the picture of the nearest reals")
