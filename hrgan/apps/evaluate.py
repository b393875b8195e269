"""The metric of a run or checkpoint, outside training."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from hrgan.apps.generate import load_generator
from hrgan.data import manifest as shards
from hrgan.metrics.extractor import make_extractor, settle_weights
from hrgan.metrics.frechet import evaluate


def evaluate_target(target: Path, data: str | None, count: int | None) -> dict[str, object]:
    """A row as in metrics.jsonl: the EMA of a run (its best, else its newest checkpoint) or of a checkpoint against
    its shards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator, alpha, config, nimg = load_generator(target, True, device, as_trained=True)
    config = replace(
        config,
        data=replace(config.data, path=data or config.data.path),
        eval=replace(config.eval, num_fake=count or config.eval.num_fake),
    )
    root = Path(config.data.path)
    manifest = shards.load(root)
    weights = settle_weights(config.eval, lambda line: print(line, file=sys.stderr))
    extractor = make_extractor(weights, device)
    folders = [root / "stats"] + ([target / "stats"] if (target / "checkpoints").is_dir() else [])
    return {"nimg": nimg, **evaluate(config, manifest, generator, alpha, extractor, 0, 1, folders)}
