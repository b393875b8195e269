"""How fast a set is read, beside what could be read and beside the field's usual loaders: images per second, tier by
tier. And what a set of any size takes to open, to seek in and to hold."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hrgan.config import CHUNK
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.images import Pixels, decode
from hrgan.data.manifest import VERSION, Form, Manifest, save, with_set_hash
from hrgan.data.order import Order
from hrgan.data.shards import RawSample, SetWriter, Shard, ShardReader
from hrgan.data.stream import Batch, batches
from hrgan.errors import DataError, UserError

SLOTS = 16
BATCH = SLOTS * CHUNK
"""One chunk of each slot, so that the first batch fills every slot's first window."""
HELD = 512
"""Encoded images kept in memory for the figures of one stage."""
Row = dict[str, Any]


def bench_data(path: str, originals: Path | None, seconds: float = 3.0) -> list[Row]:
    """Time each tier of a set for about `seconds` a figure; one dict a tier, rates in images/s.

    On one core: read, the tar alone; decode, the decoder alone on bytes in memory (the limit); pillow, Pillow on the
    same bytes; batch, decoded pictures to batches. loader1, loader2: `batches` with one and two workers. Peers with
    two workers: imagefolder, torchvision's ImageFolder over `originals` with crop and resize (None: left out);
    webdataset, its own pipeline over the largest tier with resize. start, middle: seconds to the first batch at the
    beginning and in the middle of an epoch. loader2/limit: loader2 against twice decode.
    """
    member = open_set(path)
    dataset = Dataset((member,), (1.0,))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_bench_tier(dataset, tier, originals, seconds) for tier in sorted(member.manifest.tiers)]
    finally:
        torch.set_num_threads(threads)


def _bench_tier(dataset: Dataset, tier: int, originals: Path | None, seconds: float) -> Row:
    form = dataset.form
    samples = list(islice(_samples(dataset, tier), HELD))
    encoded = cycle([sample.image for sample in samples])
    pixels: Pixels = np.stack([decode(sample.image, form, tier) for sample in samples[:BATCH]])  # type: ignore[assignment]
    works = {
        "read": lambda: sum(1 for _ in islice(_samples(dataset, tier), HELD)),
        "decode": lambda: len(decode(next(encoded), form, tier)[:1]),
        "pillow": lambda: len(np.asarray(Image.open(io.BytesIO(next(encoded))))[:1]),
        "batch": lambda: len(torch.from_numpy(pixels.copy())),
    }
    row: Row = {"tier": tier, **_rates(works, seconds)}
    # Turns, so that what else the machine does slows the loader and its limit alike.
    loader, limit = 0.0, 0.0
    for _ in range(3):
        loader += _loader_rate(dataset, tier, 2, seconds / 3) / 3
        limit += 2 * _rates({"decode": works["decode"]}, seconds / 3)["decode"] / 3
    row |= {"loader1": _loader_rate(dataset, tier, 1, seconds), "loader2": loader, "loader2/limit": loader / limit}
    row["webdataset"] = _rate_of(_webdataset(dataset, tier), seconds)
    if originals is not None:
        row["imagefolder"] = _rate_of(_imagefolder(originals, dataset, tier), seconds)
    middle = dataset.num_samples // 2 // CHUNK * CHUNK
    row["start"], row["middle"] = (_first_batch(dataset, tier, nimg) for nimg in (0, middle))
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


def _samples(dataset: Dataset, tier: int) -> Iterator[RawSample]:
    """The samples of the tier's first shard."""
    store, manifest = dataset.members[0]
    shard = manifest.tiers[tier][0]
    with open(store.local(shard.file, shard.bytes, shard.sha256), "rb") as stream:
        reader = ShardReader(stream, shard.file, 0, shard.samples, manifest.extension)
        for _ in range(shard.samples):
            yield reader.read()


def _loader(dataset: Dataset, tier: int, workers: int, nimg: int = 0) -> Iterator[Batch]:
    return batches(
        dataset,
        tier,
        seed=0,
        slots=SLOTS,
        window=256,
        nimg=nimg,
        batch=BATCH,
        rank=0,
        world=1,
        workers=workers,
        fleeting=True,  # as training on the CPU reads
    )


def _loader_rate(dataset: Dataset, tier: int, workers: int, seconds: float) -> float:
    return _rate_of((len(batch.samples) for batch in _loader(dataset, tier, workers)), seconds)


def _rate_of(counts: Iterator[int], seconds: float) -> float:
    """Images per second of a loader under way: what was made ahead while nobody asked does not count."""
    began = time.perf_counter()
    while time.perf_counter() - began < max(0.5, seconds / 4):
        next(counts)
    images, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        images += next(counts)
    return images / passed


def _first_batch(dataset: Dataset, tier: int, nimg: int) -> float:
    began = time.perf_counter()
    next(_loader(dataset, tier, 2, nimg))
    return time.perf_counter() - began


# Peers


def _imagefolder(originals: Path, dataset: Dataset, tier: int) -> Iterator[int]:
    """torchvision's ImageFolder and DataLoader, endless."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    size = dataset.form.size(tier)
    steps = [v2.Resize(min(size), InterpolationMode.LANCZOS), v2.CenterCrop(size), v2.PILToTensor()]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all").symlink_to(originals.resolve())  # It wants one folder a class.
        try:
            images = ImageFolder(folder, v2.Compose(steps))
        except FileNotFoundError:
            raise DataError(f"{originals}: no images found, expected the files that the set was built from") from None
        while True:
            for pictures, _ in DataLoader(images, BATCH, shuffle=True, num_workers=2):
                yield len(pictures)


def _webdataset(dataset: Dataset, tier: int) -> Iterator[int]:
    """webdataset's own pipeline over the full-resolution tier with Pillow, endless."""
    import webdataset as wds

    store, manifest = dataset.members[0]
    shards = manifest.tiers[manifest.resolution]
    urls = [str(store.local(shard.file, shard.bytes, shard.sha256)) for shard in shards]
    height, width = dataset.form.size(tier)

    def resized(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), 1))

    pictures = wds.WebDataset(urls, shardshuffle=False).shuffle(256).to_tuple(manifest.extension).map_tuple(resized)
    loader = wds.WebLoader(pictures.batched(BATCH).repeat(), batch_size=None, num_workers=min(2, len(urls)))
    for (batch,) in loader:
        yield len(batch)


def print_table(rows: list[Row]) -> None:
    """Print the rows of `bench_data`."""
    columns = [column for column in rows[0] if column not in ("start", "middle")]
    print("images/s: read, decode, pillow and batch on one core, the loaders and peers with as many workers as said")
    print("  ".join(f"{column:>13}" for column in [*columns, "start s", "middle s"]))
    for row in rows:
        cells = [f"{row[column]:13.2f}" if "/" in column else f"{row[column]:13.0f}" for column in columns]
        print("  ".join([*cells, f"{row['start']:13.2f}", f"{row['middle']:13.2f}"]))


# Any size


def bench_size(samples: int, shards: int, folder: Path | None) -> Row:
    """Write a set of `samples` small pictures (one, repeated) in `shards` shards as a build does, and say what it
    takes: seconds to write, to load the manifest, to begin the order and to find a place in it, to the first batch at
    the start and in the middle of an epoch; MB of memory of a loader's worker and of the process it was forked from.

    The manifest is that of a set built up to 1024²: seven tiers, of which only the smallest is on the disk.
    """
    if samples < 4 * shards or shards < 1:
        raise UserError(f"--samples: {samples} for {shards} shards, expected at least 4 a shard")
    with tempfile.TemporaryDirectory(dir=folder, prefix="hrgan-size-") as root:
        row = {"samples": samples, "shards": shards, "write_s": _write_repeated(Path(root), samples, shards)}
        began = time.perf_counter()
        member = open_set(root)
        row["manifest_load_s"] = time.perf_counter() - began
        row["manifest_mb"] = (Path(root) / "manifest.json").stat().st_size / 1e6
        dataset = Dataset((member,), (1.0,))
        row |= _order_seconds(member.manifest.shard_samples)
        for name, nimg in (("start_s", 0), ("middle_s", samples // 2 // CHUNK * CHUNK)):
            row[name] = _first_batch(dataset, 16, nimg)
        row["worker_mb"], row["forked_from_mb"] = _worker_memory(dataset)
        return row


def _write_repeated(root: Path, samples: int, shards: int) -> float:
    began = time.perf_counter()
    form = Form(tuple(2**e for e in range(4, 11)), (4, 4), 3, 8, "webp", 95, "crop", "lanczos", "white", "auto")
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(buffer, "WEBP", lossless=True)
    found: list[Shard] = []
    writer = SetWriter(root, "size", (16,), "webp", -(-samples // shards), lambda made: found.append(made[16]))
    for number in range(samples):
        about = {"label": 0, "origin": f"simulated/{number}.png", "size": (1024, 1024)}
        writer.write((buffer.getvalue(),), about)
    writer.finish()
    tiers = {
        tier: tuple(replace(shard, file=f"{tier}/{Path(shard.file).name}") for shard in found)
        for tier in form.tiers
    }
    manifest = Manifest(VERSION, "size", form, (0, 255), 0, "", (), (), {}, samples, "", tiers)
    save(with_set_hash(manifest), root)
    return time.perf_counter() - began


def _order_seconds(shard_samples: tuple[int, ...]) -> Row:
    began = time.perf_counter()
    order = Order(shard_samples, 0, SLOTS, 256)
    order.chunk(0)
    first = time.perf_counter() - began
    places = np.random.default_rng(0).integers(0, 10 * order.chunks_per_epoch, 1000)
    began = time.perf_counter()
    for g in places.tolist():
        order.chunk(g)
    return {"order_first_s": first, "order_place_ms": (time.perf_counter() - began) / len(places) * 1000}


def _worker_memory(dataset: Dataset) -> tuple[float, float]:
    """MB that a loader's worker holds under way, and what the process it was forked from does: pages of that are shared
    until one of them writes."""
    reader = _loader(dataset, 16, workers=1)
    for _ in range(50):
        next(reader)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return max(_anonymous_mb(int(pid)) for pid in children), _anonymous_mb(os.getpid())


def _anonymous_mb(pid: int) -> float:
    """Resident memory that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def print_size(row: Row) -> None:
    """Print what `bench_size` says."""
    for name, value in row.items():
        print(f"{name:>18}  {value:,.3f}" if isinstance(value, float) else f"{name:>18}  {value:,}", file=sys.stdout)
