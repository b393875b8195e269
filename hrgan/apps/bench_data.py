"""How fast a set is read, beside what could be read: images per second on one core, tier by tier."""

import io
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hrgan.config import CHUNK
from hrgan.data import manifest as manifests
from hrgan.data.images import ENDINGS, make_tiers, read_image
from hrgan.data.manifest import Manifest, RawSample, open_shard
from hrgan.data.stream import Batch, batches
from hrgan.errors import DataError

SLOTS = 16
BATCH = SLOTS * CHUNK
"""One chunk of each slot, so that the untimed first batch fills every slot's first window: the rate is that of a run
under way."""
ORIGINALS = 64
"""Original files timed: enough for a mean, few enough to stay in the page cache."""
TARGETS = {"loader/originals": (32, 10.0), "loader/decode": (256, 0.9)}
"""Ratio -> (tier in pixels, the least that is good enough there)."""


def bench_data(root: Path, originals: Path | None, seconds: float = 3.0) -> list[dict[str, Any]]:
    """Time each tier of the set `root` for about `seconds` a figure; one dict a tier, rates in images/s.

    tier; read: the tar alone; decode: Pillow alone on bytes in memory (the limit); loader: `batches` in this process;
    loader2: with two workers; originals: read, crop and resize of the files under `originals` (None: left out), and the
    ratios loader/decode and loader/originals. All but loader2 use one core. A loader's first batch is not timed.
    """
    manifest = manifests.load(root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_bench_tier(root, manifest, tier, originals, seconds) for tier in sorted(manifest.tiers)]
    finally:
        torch.set_num_threads(threads)


def _bench_tier(root: Path, manifest: Manifest, tier: int, originals: Path | None, seconds: float) -> dict[str, Any]:
    encoded = cycle([sample.image for sample in _samples(root, manifest, tier, limit=512)])
    alone, shared = _loader(root, manifest, tier, workers=0), _loader(root, manifest, tier, workers=2)
    works = {
        "read": lambda: sum(1 for _ in _samples(root, manifest, tier, limit=512)),
        "decode": lambda: _decode_bare(next(encoded)),
        "loader": lambda: len(next(alone).samples),
    }
    if originals is not None:
        files = cycle(_originals(originals))
        works["originals"] = lambda: _from_original(next(files), tier, manifest.channels)
    row: dict[str, Any] = {"tier": tier} | _rates(works, seconds)
    row |= _rates({"loader2": lambda: len(next(shared).samples)}, seconds)
    row["loader/decode"] = row["loader"] / row["decode"]
    if originals is not None:
        row["loader/originals"] = row["loader"] / row["originals"]
    return row


def _rates(works: dict[str, Callable[[], int]], seconds: float) -> dict[str, float]:
    """Images per second of each work, a function that returns how many images it did; first calls go untimed.

    The works take turns of a quarter of a second, so that whatever else the machine does slows them alike.
    """
    images, spent = dict.fromkeys(works, 0), dict.fromkeys(works, 0.0)
    for work in works.values():
        work()
    while min(spent.values()) < seconds:
        for name, work in works.items():
            start = time.perf_counter()
            while (passed := time.perf_counter() - start) < 0.25:
                images[name] += work()
            spent[name] += passed
    return {name: images[name] / spent[name] for name in works}


def _samples(root: Path, manifest: Manifest, tier: int, limit: int) -> Iterator[RawSample]:
    """Up to `limit` samples from the start of the tier's first shard."""
    path = Path(root) / manifest.tiers[tier][0].file
    with open(path, "rb") as stream:
        reader = open_shard(path, manifest, tier, 0, stream)
        for _ in range(min(limit, manifest.shard_samples[0])):
            yield reader.read()


def _decode_bare(data: bytes) -> int:
    Image.open(io.BytesIO(data)).load()
    return 1


def _loader(root: Path, manifest: Manifest, tier: int, workers: int) -> Iterator[Batch]:
    return batches(
        root, manifest, tier, seed=0, slots=SLOTS, window=256, nimg=0, batch=BATCH, rank=0, world=1, workers=workers
    )


def _originals(folder: Path) -> list[Path]:
    """Files spread evenly over the folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise DataError(f"{folder}: no images found, expected the files that the set was built from")
    return [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), ORIGINALS)).astype(int)]


def _from_original(path: Path, tier: int, channels: int) -> int:
    np.asarray(make_tiers(read_image(path.read_bytes()), (tier,), channels)[0])
    return 1


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `bench_data`, and whether the two ratios asked for are met where their tiers exist."""
    columns = ["tier", "read", "decode", "loader", "loader2", "originals", "loader/decode", "loader/originals"]
    columns = [column for column in columns if column in rows[0]]
    print("images/s, one core (loader2: two workers)")
    print("  ".join(f"{column:>16}" for column in columns))
    for row in rows:
        print("  ".join(f"{row[column]:16.2f}" if "/" in column else f"{row[column]:16.0f}" for column in columns))
    for ratio, (tier, least) in TARGETS.items():
        for row in rows:
            if row["tier"] == tier and ratio in row:
                verdict = "met" if row[ratio] >= least else "missed"
                print(f"{ratio} at {tier} px: {row[ratio]:.2f}, asked {least}: {verdict}")
