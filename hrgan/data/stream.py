"""Shards to batches, in the order of `order.py`, over any number of ranks and workers.

A worker holds, for each slot it serves, the encoded samples of the slot's current window and one open shard, which it
reads onward. Memory of all of a rank's workers together: slots * window encoded samples (fewer when ranks share the
slots).
"""

import signal
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.gopen import gopen

from hrgan.config import CHUNK
from hrgan.data.images import box_mean, decode
from hrgan.data.manifest import BadSample, Manifest, RawSample, ShardReader, parse_meta, verify_sizes
from hrgan.data.order import Order, Segment
from hrgan.errors import DataError, UserError
from hrgan.watch import STOP_SIGNALS


@dataclass(frozen=True)
class Batch:
    """Samples of one rank.

    images: (n, C, R, R) uint8, channels_last in memory. labels: (n,) int64, 0 when unlabelled.
    samples: (n,) int64, each sample's number in stored order. bad: one line for each sample replaced or left out.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    bad: tuple[str, ...] = ()


class BadSamples:
    """Counts samples seen and replaced, so that a rotting set stops a run instead of thinning it out."""

    def __init__(self) -> None:
        self.seen = 0
        self.bad = 0
        self.lines: list[str] = []

    def add(self, batch: Batch) -> None:
        self.seen += len(batch.samples)
        self.bad += len(batch.bad)
        self.lines = (self.lines + list(batch.bad))[:3]

    def check(self, max_bad: float) -> None:
        """DataError when more than the share `max_bad` of the samples seen (of 1000 at first) had to be replaced."""
        if self.bad > max_bad * max(self.seen, 1000):
            raise DataError(
                f"{self.bad} of {self.seen} samples were bad, more than data.max_bad {max_bad}; "
                f"run: hrgan data check. First: {'; '.join(self.lines)}"
            )


class _Item(NamedTuple):
    """What a worker sends: its part of one batch. Only the pictures go through shared memory."""

    images: torch.Tensor  # (n, R, R, C) uint8
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class _Tier:
    """One tier of a set, opened for reading at one resolution."""

    root: Path
    manifest: Manifest
    tier: int
    resolution: int
    firsts: tuple[int, ...]  # number of each shard's first sample
    offsets: dict[int, "array[int]"] = field(default_factory=dict)  # of each shard's samples, as far as passed over

    def path(self, shard: int) -> Path:
        return self.root / self.manifest.tiers[self.tier][shard].file

    def open(self, shard: int, index: int) -> ShardReader:
        """A reader that stands before sample `index` of the shard."""
        path, manifest = self.path(shard), self.manifest
        stream = gopen(str(path), "rb")
        reader = ShardReader(stream, str(path), self.firsts[shard], manifest.shard_samples[shard], manifest.extension)
        reader.go_to(index, self.offsets.setdefault(shard, array("q", [0])))
        return reader

    def decode(self, sample: RawSample) -> tuple[NDArray[np.uint8], int]:
        """Pixels (T, T, C) uint8 of the stored tier, and the label. Raises BadSample."""
        label, _ = parse_meta(sample, len(self.manifest.classes))
        return decode(sample.image, self.manifest.format, self.manifest.channels, self.tier), label


class _Part:
    """One worker's part of a batch, filled sample by sample."""

    def __init__(self, tier: _Tier, count: int) -> None:
        self._resolution = tier.resolution
        # Each picture is copied here while it is in the processor's cache: stacking them at the end is slower.
        self._pixels = np.empty((count, tier.tier, tier.tier, tier.manifest.channels), np.uint8)
        self._labels, self._samples = np.empty((2, count), np.int64)
        self._bad: list[str] = []
        self._filled = 0

    def add(self, shown: "_Shown") -> None:
        i, self._filled = self._filled, self._filled + 1
        self._pixels[i], self._labels[i], self._samples[i] = shown.pixels, shown.label, shown.number
        if shown.bad:
            self._bad.append(shown.bad)

    def leave_out(self, line: str) -> None:
        self._bad.append(line)

    def item(self) -> _Item:
        pixels = self._pixels[: self._filled]
        if pixels.shape[1] != self._resolution:
            pixels = box_mean(pixels, self._resolution)
        labels, samples = self._labels[: self._filled], self._samples[: self._filled]
        return _Item(torch.from_numpy(pixels), labels, samples, tuple(self._bad))


class _Shown(NamedTuple):
    """One sample as shown. bad: the line about the sample it stands in for, empty when it is itself."""

    pixels: NDArray[np.uint8]  # (T, T, C)
    label: int
    number: int
    bad: str = ""


class _Cursor:
    """Reads samples in stored order, keeping the shard open between calls so that going on costs no skip."""

    def __init__(self, tier: _Tier) -> None:
        self._tier = tier
        self._shard = -1
        self._reader: ShardReader | None = None

    def read(self, segment: Segment) -> list[RawSample]:
        """The samples of a segment. DataError naming the shard for anything that is not as the manifest says."""
        path = self._tier.path(segment.shard)
        try:
            if self._reader is None or (self._shard, self._reader.index) != (segment.shard, segment.first):
                self.close()
                self._reader, self._shard = self._tier.open(segment.shard, segment.first), segment.shard
            samples = [self._reader.read() for _ in range(segment.samples)]
            if self._reader.index == self._tier.manifest.shard_samples[segment.shard]:
                self._reader.finish()
                self._reader = None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}, expected a readable shard") from error
        return samples

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Slot:
    """One slot: its current window's encoded samples, shown in the window's permuted order."""

    def __init__(self, tier: _Tier, order: Order) -> None:
        self._tier, self._order = tier, order
        self._cursor = _Cursor(tier)
        self._window = (-1, -1)
        self._samples: list[RawSample] = []

    def show(self, g: int) -> Iterator[_Shown]:
        """The 4 samples of chunk g."""
        place = self._order.place(g)
        if (place.epoch, place.window) != self._window:
            self._load(place.epoch, place.slot, place.window)
        for i in range(place.chunk * CHUNK, (place.chunk + 1) * CHUNK):
            yield self._good(i)

    def _load(self, epoch: int, slot: int, window: int) -> None:
        segments, permutation = self._order.window_of(epoch, slot, window)
        self._samples = []  # freed before the next window is read
        stored = [sample for segment in segments for sample in self._cursor.read(segment)]
        self._samples = [stored[i] for i in permutation]
        self._window = (epoch, window)

    def _good(self, i: int) -> _Shown:
        """Sample i of the window, or the next good one, cyclic."""
        count = len(self._samples)
        bad = ""
        for step in range(count):
            sample = self._samples[(i + step) % count]
            try:
                pixels, label = self._tier.decode(sample)
            except BadSample as error:
                # Only the sample whose turn it is gets a line; other bad ones passed over have their own turn.
                bad = bad or f"{self._name(sample)}: {error}; replaced"
                continue
            return _Shown(pixels, label, int(sample.key), bad)
        raise DataError(f"all {count} samples of a window are bad; {bad}; run: hrgan data check {self._tier.root}")

    def _name(self, sample: RawSample) -> str:
        shard = int(np.searchsorted(self._tier.firsts, int(sample.key), side="right")) - 1
        return f"{self._tier.path(shard)}: sample {sample.key}"


@dataclass(frozen=True)
class _Share:
    """The endless sequence of one rank's chunks: chunk j is global chunk `first + j * world`; `chunks` make a batch."""

    first: int
    world: int
    chunks: int


class _Training(IterableDataset[_Item | DataError]):
    """Worker k of K yields, batch after batch, the rank's chunks j with j % K == k."""

    def __init__(self, tier: _Tier, order: Order, share: _Share) -> None:
        self._tier, self._order, self._share = tier, order, share

    def __iter__(self) -> Iterator[_Item | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._items(worker, workers)
        except DataError as error:
            yield error  # as a value: an exception would reach the main process as text with a traceback

    def _items(self, worker: int, workers: int) -> Iterator[_Item]:
        slots: dict[int, _Slot] = {}
        share = self._share
        start = 0
        while True:
            mine = range(start + (worker - start) % workers, start + share.chunks, workers)
            part = _Part(self._tier, len(mine) * CHUNK)
            for j in mine:
                g = share.first + j * share.world
                slot = g % self._order.num_slots
                if slot not in slots:
                    slots[slot] = _Slot(self._tier, self._order)
                for shown in slots[slot].show(g):
                    part.add(shown)
            yield part.item()
            start += share.chunks


class _Range(IterableDataset[_Item | DataError]):
    """Worker k of K yields batches i with i % K == k of the samples [start, stop) in stored order."""

    def __init__(self, tier: _Tier, start: int, stop: int, batch: int) -> None:
        self._tier, self._start, self._stop, self._batch = tier, start, stop, batch

    def __iter__(self) -> Iterator[_Item | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        cursor = _Cursor(self._tier)
        try:
            for at in range(self._start + worker * self._batch, self._stop, workers * self._batch):
                yield self._item(cursor, at, min(at + self._batch, self._stop))
        except DataError as error:
            yield error

    def _item(self, cursor: _Cursor, start: int, stop: int) -> _Item:
        part = _Part(self._tier, stop - start)
        for segment in self._segments(start, stop):
            for sample in cursor.read(segment):
                try:
                    pixels, label = self._tier.decode(sample)
                except BadSample as error:
                    part.leave_out(f"{self._tier.path(segment.shard)}: sample {sample.key}: {error}; left out")
                    continue
                part.add(_Shown(pixels, label, int(sample.key)))
        return part.item()

    def _segments(self, start: int, stop: int) -> Iterator[Segment]:
        firsts, samples = self._tier.firsts, self._tier.manifest.shard_samples
        shard = int(np.searchsorted(firsts, start, side="right")) - 1
        while start < stop:
            count = min(stop, firsts[shard] + samples[shard]) - start
            yield Segment(shard, start - firsts[shard], count)
            start, shard = start + count, shard + 1


def _open_tier(root: Path, manifest: Manifest, resolution: int) -> _Tier:
    tier = manifest.tier_for(resolution)
    if resolution < 1 or tier % resolution:
        raise UserError(f"resolution is {resolution}, expected a power of two")
    verify_sizes(root, manifest, tier)
    samples = manifest.shard_samples
    firsts = tuple(int(x) for x in np.cumsum((0, *samples[:-1])))
    return _Tier(Path(root).absolute(), manifest, tier, resolution, firsts)


def _as_is(item: Any) -> Any:
    """DataLoader's own conversion would turn the arrays into tensors, each in shared memory."""
    return item


def _ignore_stop_signals(worker: int) -> None:
    """A stop sent to the whole process group (by SLURM, timeout, Ctrl-C) is the training process's to answer, which
    reads on until it has saved; a worker ends when that process does, which torch watches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # The training's own, inherited.


def _items(dataset: IterableDataset[_Item | DataError], workers: int, prefetch: int) -> Iterator[_Item]:
    """The dataset's items, worker after worker in turn; a worker's DataError is raised here."""
    if workers:
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            collate_fn=_as_is,
            worker_init_fn=_ignore_stop_signals,
        )
        source: Iterator[_Item | DataError] = iter(loader)
    else:
        source = iter(dataset)
    try:
        for item in source:
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        # Ends the workers now. A traceback may keep this frame, and of a DataLoader left to the cycle collector the
        # queues go first, so that it waits 5 s for each worker.
        del source


def _check_shares(nimg: int, batch: int, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise UserError(f"rank is {rank}, expected 0 to {world - 1}")
    if batch < 1 or batch % (CHUNK * world):
        unit = CHUNK * world
        nearest = max(1, round(batch / unit)) * unit
        raise UserError(f"batch is {batch}, expected a multiple of {CHUNK} x {world} processes; nearest: {nearest}")
    if nimg < 0 or nimg % CHUNK:
        nearest = max(0, round(nimg / CHUNK)) * CHUNK
        raise UserError(f"nimg is {nimg}, expected a multiple of {CHUNK}; nearest: {nearest}")


def batches(
    root: Path,
    manifest: Manifest,
    resolution: int,
    *,
    seed: int,
    slots: int,
    window: int,
    nimg: int,
    batch: int,
    rank: int,
    world: int,
    workers: int,
    prefetch: int = 4,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's share of each global batch from `nimg` on, without end.

    Global batch b covers the chunks nimg/4 + b*batch/4 onward; rank r takes those whose number g has g % world == r, in
    order. batch: samples over all ranks, a multiple of 4 * world; each Batch has batch / world. nimg: a multiple of 4.
    workers: processes reading and decoding (0: this one); with workers * world a divisor of slots none reads another's
    slots. prefetch: batches that each worker prepares ahead. pin_memory: the pictures in page-locked memory.

    Raises UserError for wrong arguments, DataError for shards that are not as the manifest says, at once or when
    reached.
    """
    _check_shares(nimg, batch, rank, world)
    tier = _open_tier(root, manifest, resolution)
    order = Order(manifest.shard_samples, seed, slots, window)
    first = nimg // CHUNK
    share = _Share(first + (rank - first) % world, world, batch // CHUNK // world)
    return _interleaved(
        _items(_Training(tier, order, share), workers, prefetch), share.chunks, max(1, workers), pin_memory
    )


def _interleaved(items: Iterator[_Item], chunks: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Each batch's items, one a worker, with their chunks put back into order."""
    start = 0
    while True:
        parts = [next(items) for _ in range(workers)]
        if workers == 1 and not pin_memory:
            part = parts[0]
            images, labels, samples = part.images, torch.from_numpy(part.labels), torch.from_numpy(part.samples)
        else:
            images = torch.empty(chunks * CHUNK, *parts[0].images.shape[1:], dtype=torch.uint8, pin_memory=pin_memory)
            labels, samples = torch.empty(2, chunks * CHUNK, dtype=torch.int64)
            for worker, part in enumerate(parts):
                offset = (worker - start) % workers
                for whole, piece in (
                    (images, part.images),
                    (labels, torch.from_numpy(part.labels)),
                    (samples, torch.from_numpy(part.samples)),
                ):
                    target = whole.view(chunks, CHUNK, *whole.shape[1:])[offset::workers]
                    target.copy_(piece.view(target.shape))
        bad = tuple(line for part in parts for line in part.bad)
        yield Batch(images.permute(0, 3, 1, 2), labels, samples, bad)
        start += chunks


def read_range(
    root: Path, manifest: Manifest, resolution: int, start: int, stop: int, *, batch: int = 64, workers: int = 0
) -> Iterator[Batch]:
    """Samples [start, stop) in stored order, in batches of up to `batch`. A bad sample is left out, with a line in the
    batch's `bad`; DataError for a shard that is not as the manifest says.
    """
    if not 0 <= start <= stop <= manifest.num_samples or batch < 1:
        raise UserError(f"samples {start} to {stop} by {batch}, expected a range within 0 to {manifest.num_samples}")
    tier = _open_tier(root, manifest, resolution)
    return _ordered(_items(_Range(tier, start, stop, batch), workers, 2))


def _ordered(items: Iterator[_Item]) -> Iterator[Batch]:
    for item in items:
        labels, samples = torch.from_numpy(item.labels), torch.from_numpy(item.samples)
        yield Batch(item.images.permute(0, 3, 1, 2), labels, samples, item.bad)
