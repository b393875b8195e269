"""The metric of a run, a checkpoint or a folder of images, outside training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrgan.apps.generate import load_generator
from hrgan.config import Config, DataConfig
from hrgan.data import manifest as shards
from hrgan.data.images import ENDINGS, Unusable, make_tiers, read_image
from hrgan.errors import DataError, UserError
from hrgan.metrics.extractor import Extractor, make_extractor, settle_weights
from hrgan.metrics.frechet import Moments, compare, evaluate

Row = dict[str, object]


def evaluate_target(target: Path, data: str | None, count: int | None) -> Row:
    """A row as in metrics.jsonl: of the EMA of a run (its best, else its newest checkpoint) or of a checkpoint against
    its shards, or of a folder of images against the shards `data`. count: how many images, at least 2."""
    if count is not None and count < 2:
        raise UserError(f"--count: {count} is below the least, 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = _images(target) if target.is_dir() and not (target / "checkpoints").is_dir() else []
    if images and not (target / "state.json").exists():
        if data is None:
            raise UserError(
                f"--data: needed to measure {target}, a folder of images; name the shards to compare it with"
            )
        return _evaluate_folder(Config(data=DataConfig(path=data)), images[:count], device)
    generator, alpha, config, nimg = load_generator(target, True, device, as_trained=True)
    config = replace(
        config,
        data=replace(config.data, path=data or config.data.path),
        eval=replace(config.eval, num_fake=count or config.eval.num_fake),
    )
    root = Path(config.data.path)
    manifest, extractor = shards.load(root), _extractor(config, device)
    folders = [root / "stats"] + ([target / "stats"] if (target / "checkpoints").is_dir() else [])
    return {"nimg": nimg, **evaluate(config, manifest, generator, alpha, extractor, 0, 1, folders)}


def _evaluate_folder(config: Config, images: list[Path], device: torch.device) -> Row:
    """Files against the largest tier of a set; they are cropped and resized as the set was."""
    manifest, extractor = shards.load(Path(config.data.path)), _extractor(config, device)
    moments = Moments.zero(extractor.size, device)
    for batch in _batches(images, manifest.resolution, manifest.channels, config.eval.batch):
        moments.add(extractor.features(batch.to(device)))
    if moments.count < 2:
        raise DataError(f"{images[0].parent}: {int(moments.count)} images that can be read, expected at least 2")
    folders = [Path(config.data.path) / "stats"]
    return {**compare(config, manifest, manifest.resolution, moments, extractor, 0, 1, folders)}


def _extractor(config: Config, device: torch.device) -> Extractor:
    return make_extractor(settle_weights(config.eval, lambda line: print(line, file=sys.stderr)), device)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.name != "grid.png")


def _batches(files: list[Path], resolution: int, channels: int, size: int) -> Iterator[Tensor]:
    """(n, C, R, R) uint8; files that cannot be read are named and left out."""
    made: list[Tensor] = []
    for file in files:
        try:
            (picture,) = make_tiers(read_image(file.read_bytes()), (resolution,), channels)
        except Unusable as error:
            print(f"left out: {file}: {': '.join(map(str, error.args))}", file=sys.stderr)
            continue
        made.append(torch.from_numpy(np.array(picture).reshape(resolution, resolution, channels)).permute(2, 0, 1))
        if len(made) == size:
            yield torch.stack(made)
            made = []
    if made:
        yield torch.stack(made)
