"""The metric of a run, a checkpoint or a folder of images, outside training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hrgan.apps.generate import load_generator
from hrgan.checkpoint import numbered
from hrgan.config import Config, DataConfig, from_dict, read_yaml
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.data.images import Unusable, make_tiers, read_picture
from hrgan.data.manifest import Form
from hrgan.data.sources import ENDINGS
from hrgan.errors import DataError, UserError
from hrgan.metrics.extractor import Extractor, make_extractor, settle_weights
from hrgan.metrics.frechet import Moments, compare, count_real, evaluate
from hrgan.monitor.log import Row, append, read_rows
from hrgan.pictures import to_float, to_uint8
from hrgan.sizes import size_text
from hrgan.watch import stopped_by_signals


def evaluate_target(target: Path, data: str | None, count: int | None) -> Row:
    """A row as in metrics.jsonl: of the EMA of a run (its best, else its newest checkpoint) or of a checkpoint against
    its shards, or of a folder of images against the shards `data`. count: how many images, at least 2."""
    _check_count(count)
    device = _device()
    images = _images(target) if target.is_dir() and not (target / "checkpoints").is_dir() else []
    if images and not (target / "state.json").exists():
        if data is None:
            raise UserError(
                f"--data: needed to measure {target}, a folder of images; name the shards to compare it with"
            )
        return _evaluate_folder(Config(data=DataConfig(path=data)), images[:count], device)
    generator, alpha, config, nimg = load_generator(target, True, device, as_trained=True)
    config = _measured_as(config, data, count)
    dataset, extractor = open_dataset(config.data), _extractor(config, device)
    folders = [dataset.stats_folder()] + ([target / "stats"] if (target / "checkpoints").is_dir() else [])
    return {"nimg": nimg, **evaluate(config, dataset, generator, alpha, extractor, 0, 1, folders)}


def _evaluate_folder(config: Config, images: list[Path], device: torch.device) -> Row:
    """Files against the largest tier of a set; they are cropped and resized as the set was."""
    dataset, extractor = open_dataset(config.data), _extractor(config, device)
    form = replace(dataset.form, tiers=(dataset.resolution,))
    moments = Moments.zero(extractor.size, device)
    for batch in _batches(images, form, dataset.values, config.eval.batch):
        moments.add(extractor.features(batch.to(device)))
    if moments.count < 2:
        raise DataError(f"{images[0].parent}: {int(moments.count)} images that can be read, expected at least 2")
    folders = [dataset.stats_folder()]
    return {**compare(config, dataset, dataset.resolution, moments, extractor, 0, 1, folders)}


def _check_count(count: int | None) -> None:
    if count is not None and count < 2:
        raise UserError(f"--count: {count} is below the least, 2")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measured_as(config: Config, data: str | None, count: int | None) -> Config:
    path, num_fake = data or config.data.path, count or config.eval.num_fake
    return replace(config, data=replace(config.data, path=path), eval=replace(config.eval, num_fake=num_fake))


def _extractor(config: Config, device: torch.device) -> Extractor:
    return make_extractor(settle_weights(config.eval, lambda line: print(line, file=sys.stderr)), device)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.name != "grid.png")


def _batches(files: list[Path], form: Form, values: tuple[int, int], size: int) -> Iterator[Tensor]:
    """(n, C, H, W) uint8; files that cannot be read are named and left out."""
    made: list[Tensor] = []
    for file in files:
        try:
            (pixels,) = make_tiers(read_picture(file.read_bytes(), form), form).images
        except Unusable as error:
            print(f"left out: {file}: {': '.join(map(str, error.args))}", file=sys.stderr)
            continue
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        made.append(to_uint8(to_float(picture, values)))
        if len(made) == size:
            yield torch.stack(made)
            made = []
    if made:
        yield torch.stack(made)


# Beside or after a training


@dataclass(frozen=True)
class Watcher:
    """What `hrgan eval --watch` measures a run with."""

    run: Path
    config: Config
    dataset: Dataset
    extractor: Extractor
    passed_over: set[int] = field(default_factory=set)
    """nimg of the checkpoints that were pruned too soon or do not verify."""
    measured: set[int] = field(default_factory=set)
    """nimg of those measured here. Where some reals cannot be read, their rows say fewer than are asked for."""

    def next(self) -> Path | None:
        """The newest checkpoint without a row of the same extractor, counts and set."""
        settings, real = self.config.eval, count_real(self.config, self.dataset)
        wanted = (self.extractor.name, self.extractor.sha256, settings.num_fake, real, self.dataset.real_set)
        keys = ("extractor", "extractor_sha256", "num_fake", "num_real", "real_set")
        rows = read_rows(self.run / "metrics.jsonl")
        done = {row["nimg"] for row in rows if tuple(row.get(key) for key in keys) == wanted}
        done |= self.measured | self.passed_over
        return next((path for path in numbered(self.run) if int(path.name) not in done), None)

    def measure(self, folder: Path) -> None:
        """Add the row of a checkpoint, or say why it gets none."""
        nimg, device = int(folder.name), next(self.extractor.network.parameters()).device
        try:
            generator, alpha, _, _ = load_generator(folder, True, device, as_trained=True)
        except (UserError, OSError, SafetensorError) as error:
            gone = not folder.is_dir()
            _say(f"{folder} passed over: {'the training pruned it before it was measured' if gone else error}")
            self.passed_over.add(nimg)
            return
        folders = [self.dataset.stats_folder(), self.run / "stats"]
        row = evaluate(self.config, self.dataset, generator, alpha, self.extractor, 0, 1, folders)
        append(self.run / "metrics.jsonl", {"nimg": nimg, **row})
        self.measured.add(nimg)
        name = self.extractor.metric
        size = size_text(self.dataset.form.grid, row["resolution"])  # type: ignore[arg-type]  # a level
        _say(f"{name} {row[name]} at {nimg / 1000:g} kimg, {size} (floor {row[f'{name}_floor']})")


def watch(run: Path, data: str | None, count: int | None, every: float) -> None:
    """Follow a run: add a row to its metrics.jsonl for each checkpoint that has none of the same extractor, counts and
    set, the newest first, and look again after `every` seconds, until it is finished and none is left.

    `best` stays the training's own. Raises Stopped on SIGTERM, SIGINT and SIGUSR1.
    """
    _check_count(count)
    if every <= 0:
        raise UserError(f"--every: {every:g}, expected more than 0 seconds")
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; --watch follows a run directory, for example runs/demo")
    with stopped_by_signals(f"stopped following {run}; the same command goes on"):
        if not (run / "checkpoints").is_dir():
            _say(f"{run}: no training has begun there yet: waiting for it")
        while not (run / "checkpoints").is_dir():  # The last thing that a new run makes.
            time.sleep(every)
        config = _measured_as(from_dict(read_yaml(run / "config.yaml")), data, count)
        watcher = Watcher(run, config, open_dataset(config.data), _extractor(config, _device()))
        while True:
            finished = (run / "FINISHED").exists()  # Before looking for checkpoints: no more come after it.
            folder = watcher.next()
            if folder is not None:
                watcher.measure(folder)
            elif finished:
                break
            else:
                time.sleep(every)
    _say(f"{run} is finished and measured; checkpoints passed over: {len(watcher.passed_over)}")


def _say(line: str) -> None:
    print(line, flush=True)
