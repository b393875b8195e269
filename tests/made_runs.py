"""Run directories as a training leaves them, made up: for pages about runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONFIG = """
data: {{path: shards/none}}
network: {{resolution: {resolution}}}
schedule: {{total_kimg: {total}, stable_kimg: {stable}, fade_kimg: {fade}}}
"""
PROVENANCE = {
    "extractor": "random-conv-64",
    "extractor_sha256": "ab" * 32,
    "resize": "bilinear-antialias-64",
    "num_fake": 2048,
    "num_real": 2000,
    "real_set": "cd" * 32,
    "mirror": False,
    "truncation": None,
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_row(nimg: int, **more: Any) -> dict[str, Any]:
    """A line of log.jsonl of a run at 8² in which nothing is wrong."""
    return {
        "nimg": nimg,
        "kimg": nimg / 1000,
        "step": nimg // 16,
        "phase": 0,
        "resolution": 8,
        "alpha": 1.0,
        "batch": 16,
        "lr_g": 0.001,
        "lr_d": 0.001,
        "loss_g": 1.0,
        "loss_d": 1.5,
        "logit_real": 0.5,
        "logit_fake": -0.5,
        "penalty": 0.1,
        "img_per_sec": 100.0,
        "data_wait": 0.01,
        "sec_per_kimg": 10.0,
        "gpu_mem_gb": 0.0,
        "cpu_mem_gb": 1.0,
        "seconds": nimg / 100,
        "skipped_steps": 0,
        "bad_samples": 0,
        "rollbacks": 0,
        "data_wait_ranks": [0.01],
    } | more


def metric_row(nimg: int, value: float | None = 5.0, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of FID's Inception, far from its floor."""
    row = {"nimg": nimg, "resolution": 8, "fid": value, "fid_error": 0.05, "fid_floor": 0.5}
    return row | PROVENANCE | {"extractor": "pt_inception-2015-12-05", "seed": 0, "seconds": 1.0} | more


def small_run(folder: Path, metrics: list[dict[str, Any]] | None = None, **files: str | None) -> Path:
    """A finished run of 4 lines to 40 kimg with nothing to warn of: 4² to 10, a fade to 20, 8² to 40 kimg. files: other
    contents, or None for none, by name with _ for the dot."""
    folder.mkdir(parents=True)
    plan = {"resolution": 8, "total": 40, "stable": 10, "fade": 10}
    (folder / "config.yaml").write_text(CONFIG.format(**plan))
    (folder / "environment.json").write_text(
        json.dumps({"run_format": 1, "command": ["hrgan", "train"], "gpus": [], "packages": {"torch": "2"}})
    )
    write_rows(folder / "log.jsonl", [log_row(nimg) for nimg in (10_000, 20_000, 30_000, 40_000)])
    write_rows(folder / "metrics.jsonl", [metric_row(20_000, 9.0), metric_row(40_000)] if metrics is None else metrics)
    (folder / "FINISHED").write_text("40000\n")
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
    return folder


def picture(path: Path, side: int = 40, seed: int = 0, gap: int | None = 16, cells: int = 4) -> None:
    """A sample grid, or a picture of neighbours with gap=None."""
    path.parent.mkdir(exist_ok=True)
    colours = np.random.default_rng(seed)

    def grid(of: np.random.Generator) -> Any:
        small = of.integers(0, 255, (cells, cells, 3), dtype=np.uint8)
        return small.repeat(side // cells, axis=0).repeat(side // cells, axis=1)

    parts = [grid(colours)]
    if gap is not None:
        parts += [np.full((side, gap, 3), 255, np.uint8), grid(np.random.default_rng(99))]
    Image.fromarray(np.concatenate(parts, axis=1)).save(path)


def long_run(folder: Path, lines: int = 5000, evaluations: int = 40, seed: int = 0) -> Path:
    """A run to 1024² over 12,000 kimg: fades, two provenances, errors, classes, sample grids and neighbours."""
    folder.mkdir(parents=True)
    dice = random.Random(seed)
    (folder / "config.yaml").write_text(CONFIG.format(resolution=1024, total=12000, stable=600, fade=600))
    command = ["hrgan", "train", "--config", "configs/progan-1024.yaml", "--data.path", "shards/my pictures"]
    facts = {"run_format": 1, "date": "2026-01-01T00:00:00+0000", "command": command, "gpus": ["H200"] * 8}
    (folder / "environment.json").write_text(json.dumps(facts | {"packages": {"torch": "2.15", "numpy": "2.4"}}))
    rows, seconds = [], 0.0
    for number in range(1, lines + 1):
        kimg = 12000 * number / lines
        level = min(8, int((kimg + 600) // 1200))
        start = 1200 * level - 600
        size, alpha = 4 * 2**level, min(1.0, (kimg - start) / 600) if level else 1.0
        speed = 9000 / (1 + size / 4) * (1 + 0.1 * dice.random())
        seconds += 12000 / lines * 1000 / speed
        skipped = 2000 < kimg < 2030
        row = log_row(round(kimg * 1000), resolution=size, phase=2 * level - (alpha < 1), alpha=alpha, seconds=seconds)
        loss = -2 - 3 * math.exp(-kimg / 3000) + dice.gauss(0, 0.4)
        row |= {"loss_g": None if skipped else loss + 4, "loss_d": None if skipped else loss, "img_per_sec": speed}
        row |= {"logit_real": 2 + dice.gauss(0, 0.5), "logit_fake": -1 + dice.gauss(0, 0.5), "gpu_mem_gb": size / 30}
        row |= {"penalty": 0.05 + 0.2 * dice.random() ** 4, "data_wait": 0.02 + 0.2 * (size == 1024) * dice.random()}
        row |= {"lr_g": 0.001 if size < 128 else 0.0015 * size / 128, "lr_d": 0.001, "skipped_steps": 7 * (kimg > 2000)}
        rows.append(row)
    write_rows(folder / "log.jsonl", rows)
    metrics = []
    for number in range(1, evaluations + 1):
        kimg = 12000 * number // evaluations
        size = 4 * 2 ** min(8, int((kimg + 600) // 1200))
        fid = 8 + 280 * math.exp(-(kimg % 1200 if kimg < 9000 else kimg - 9000) / 900) * (0.9 + 0.2 * dice.random())
        more = {"resolution": size, "num_fake": 10000 if kimg < 10600 else 50000, "num_real": 70000, "fid_floor": 2.1}
        more |= {"fid_error": 0.04 * fid, "kid": fid / 2000, "kid_error": fid / 30000, "kid_floor": 1e-5}
        more |= {"precision": 0.4 + kimg / 40000, "recall": 0.1 + kimg / 30000, "authenticity": 0.48}
        more |= {"class_fid": 1.4 * fid, "class_fid_by_class": {f"class {n}": fid * (1 + n / 10) for n in range(12)}}
        more |= {"fid_at": {str(n): fid * (1 + 3000 / n) for n in (2500, 5000, 7500, 10000)}, "fid_infinity": fid}
        metrics.append(metric_row(kimg * 1000, fid, **more))
    write_rows(folder / "metrics.jsonl", metrics)
    for number in range(9):
        kimg, size = 1300 * number + 400, 4 * 2 ** min(8, int((1300 * number + 1000) // 1200))
        picture(folder / "samples" / f"{kimg:08.1f}kimg-{size}px.png", 1056, number, cells=8)
        if number > 5:
            picture(folder / "neighbours" / f"{kimg:08.1f}kimg-{size}px.png", 640, number, None, cells=8)
    return folder
