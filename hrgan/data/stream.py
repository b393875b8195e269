"""Shards to batches, in the order of `order.py`, over any number of ranks and workers.

A worker holds, for each slot it serves, the encoded samples of the slot's current window and one open shard, which it
reads onward. Memory of all of a rank's workers together: slots * window encoded samples (fewer when ranks share the
slots).
"""

import atexit
import mmap
import signal
from array import array
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hrgan.config import CHUNK
from hrgan.data.dataset import Dataset
from hrgan.data.images import Pixels, box_mean, decode
from hrgan.data.manifest import Manifest
from hrgan.data.order import Mix, Order, Place, Segment
from hrgan.data.shards import BadSample, Meta, RawSample, ShardReader, parse_meta
from hrgan.data.store import Store
from hrgan.errors import DataError, UserError
from hrgan.watch import STOP_SIGNALS


@dataclass(frozen=True)
class Batch:
    """Samples of one rank.

    images: (n, C, h, w) uint8 or uint16, channels_last in memory. labels: (n,) int64, 0 when unlabelled.
    samples: (n,) int64, each sample's number in stored order (of several sets: they follow each other). bad: one line
    for each sample replaced or left out.
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
    """A worker's part of one batch."""

    images: Pixels | None  # (n, h, w, C); None on the way: they are in the worker's next shared memory
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    bad: tuple[str, ...]


class _Encoded(NamedTuple):
    """One sample as it waits in its window: its number in all sets, the encoded image and the label; bad: why it can
    not be shown."""

    number: int
    image: bytes | memoryview
    label: int
    bad: str = ""


@dataclass(frozen=True)
class _Tier:
    """One tier of a set, opened for reading at one resolution."""

    store: Store
    manifest: Manifest
    tier: int
    factor: int  # of the resolution that is shown
    firsts: tuple[int, ...]  # number of each shard's first sample
    before: int  # samples of the sets before this one
    label: str | None  # the attribute that is the label, None for the set's own
    classes: dict[str, int]  # of all sets
    offsets: dict[int, "array[int]"] = field(default_factory=dict)  # of each shard's samples, as far as passed over

    def path(self, shard: int) -> str:
        """For people."""
        return self.store.describe(self.manifest.tiers[self.tier][shard].file)

    def open(self, shard: int, index: int) -> ShardReader:
        """A reader that stands before sample `index` of the shard."""
        what, manifest = self.manifest.tiers[self.tier][shard], self.manifest
        path = self.store.local(what.file, what.bytes, what.sha256)
        stream = open(path, "rb")  # noqa: SIM115, the reader closes it
        reader = ShardReader(stream, self.path(shard), self.firsts[shard], what.samples, manifest.extension)
        reader.go_to(index, self.offsets.setdefault(shard, array("q", [0])))
        return reader

    def prefetch(self, segments: tuple[Segment, ...]) -> None:
        """Have the shards at hand when they are opened."""
        for segment in segments:
            what = self.manifest.tiers[self.tier][segment.shard]
            self.store.prefetch(what.file, what.bytes, what.sha256)

    def verify(self, sample: RawSample) -> _Encoded:
        """The sample with its label, `bad` if that, its json or its crc32 is wrong."""
        number = self.before + int(sample.key)
        try:
            return _Encoded(number, sample.image, self._label(parse_meta(sample, len(self.manifest.classes))))
        except BadSample as error:
            return _Encoded(number, sample.image, 0, self._line(number, error))

    def _label(self, meta: Meta) -> int:
        if not self.classes:
            return 0
        if self.label is not None and self.label != self.manifest.label:
            name = meta.attributes.get(self.label, "")
        else:
            name = self.manifest.classes[meta.label] if self.manifest.classes else ""
        if name not in self.classes:
            raise BadSample(f"label is {name!r}, which the manifest does not list")
        return self.classes[name]

    def decode(self, sample: _Encoded) -> Pixels:
        """(h, w, C), of the stored tier. Raises BadSample with the line about it."""
        if sample.bad:
            raise BadSample(sample.bad)
        try:
            return decode(sample.image, self.manifest.form, self.tier)
        except BadSample as error:
            raise BadSample(self._line(sample.number, error)) from None

    def _line(self, number: int, error: BadSample) -> str:
        number -= self.before
        shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return f"{self.path(shard)}: sample {number:09d}: {error}"


TOGETHER = 2**24
"""Bytes of pictures that a worker hands over at once, if a batch has fewer: each time costs as much as decoding one."""
MOST_TOGETHER = 8
"""Batches: with more, the first would wait too long for the others."""


class _Shared:
    """Memory that workers write their pictures into and the main process reads them from, used over and over: pages of
    fresh memory would cost as much as a tenth of decoding, and a container's /dev/shm is often too small.

    A worker begins item i only when item i - prefetch was taken from the loader, and who takes an item is done with its
    pictures before the next: so prefetch + 1 places are enough.
    """

    def __init__(self, tier: _Tier, count: int, workers: int, prefetch: int, together: int = 1) -> None:
        """count: pictures of a place; workers: those with places of their own, 1 where they fill each together;
        together: places that are handed over at once."""
        form = tier.manifest.form
        self._size = *form.size(tier.tier // tier.factor), form.channels
        self._kind = np.dtype(np.uint16 if form.bits == 16 else np.uint8)
        self._bytes = count * int(np.prod(self._size)) * self._kind.itemsize
        self._places = (prefetch + 1) * together
        self._memory = mmap.mmap(-1, max(1, workers * self._places * self._bytes))  # Shared with forked processes.

    def place(self, worker: int, number: int, count: int) -> Pixels:
        """(count, h, w, C), the place of a worker's item or of a batch."""
        start = (worker * self._places + number % self._places) * self._bytes
        length = count * int(np.prod(self._size))
        flat: Pixels = np.frombuffer(self._memory, self._kind, length, start)
        return flat.reshape(count, *self._size)


class _Part:
    """One worker's part of a batch, filled sample by sample."""

    def __init__(self, tier: _Tier, count: int, place: Pixels | None, rows: Sequence[int] | None = None) -> None:
        """place: (n, h, w, C) to put the pictures into, in its `rows` (None: from the first on); None: anywhere."""
        self._factor, self._place = tier.factor, place
        self._rows: Sequence[int] = range(count) if rows is None else rows
        form = tier.manifest.form
        # Each picture is copied here while it is in the processor's cache: stacking them at the end is slower.
        kind = np.uint16 if form.bits == 16 else np.uint8
        direct = place is not None and tier.factor == 1
        fresh: Any = np.empty((0 if direct else count, *form.size(tier.tier), form.channels), kind)
        self._pixels: Pixels = place if place is not None and direct else fresh
        self._into = iter(self._rows if direct else range(count))
        self._labels: list[int] = []
        self._samples: list[int] = []
        self._bad: list[str] = []

    def add(self, pixels: Pixels, label: int, sample: int) -> None:
        """pixels: (h, w, C)."""
        self._pixels[next(self._into)] = pixels
        self._labels.append(label)
        self._samples.append(sample)

    def add_bad(self, line: str) -> None:
        self._bad.append(line)

    def item(self) -> _Item:
        filled = len(self._samples)
        pixels = self._pixels[:filled]
        if self._factor > 1:
            pixels = box_mean(pixels, self._factor)
            if self._place is not None:
                self._place[self._rows[:filled]] = pixels
        labels, samples = np.array([self._labels, self._samples], np.int64)
        return _Item(pixels if self._place is None else None, labels, samples, tuple(self._bad))


class _Cursor:
    """Reads samples in stored order, keeping the shard open between calls so that going on costs no skip."""

    def __init__(self, tier: _Tier) -> None:
        self._tier = tier
        self._shard = -1
        self._reader: ShardReader | None = None

    def read(self, segment: Segment) -> list[_Encoded]:
        """The samples of a segment. DataError naming the shard for anything that is not as the manifest says."""
        path = self._tier.path(segment.shard)
        try:
            if self._reader is None or (self._shard, self._reader.index) != (segment.shard, segment.first):
                self.close()
                self._reader, self._shard = self._tier.open(segment.shard, segment.first), segment.shard
            samples = [self._tier.verify(self._reader.read()) for _ in range(segment.samples)]
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
        self._samples: list[_Encoded] = []

    def show(self, g: int, part: _Part) -> None:
        """Add the 4 samples of chunk g of the set to the part."""
        place = self._order.place(g)
        if (place.epoch, place.window) != self._window:
            self._load(place.epoch, place.slot, place.window)
        for i in range(place.chunk * CHUNK, (place.chunk + 1) * CHUNK):
            self._show(i, part)

    def _load(self, epoch: int, slot: int, window: int) -> None:
        segments, permutation = self._order.window_of(epoch, slot, window)
        self._samples = []  # freed before the next window is read
        stored = [sample for segment in segments for sample in self._cursor.read(segment)]
        self._samples = [stored[i] for i in permutation]
        self._window = (epoch, window)
        if self._tier.store.local_root is None:
            following = self._order.following(Place(epoch, slot, window, 0))
            self._tier.prefetch(self._order.window_of(following.epoch, slot, following.window)[0])

    def _show(self, i: int, part: _Part) -> None:
        """Sample i of the window, or the next good one, cyclic."""
        count, first = len(self._samples), ""
        for step in range(count):
            sample = self._samples[(i + step) % count]
            try:
                pixels = self._tier.decode(sample)
            except BadSample as error:
                # Only the sample whose turn it is gets a line; other bad ones passed over have their own turn.
                first = first or f"{error}; replaced"
                continue
            part.add(pixels, sample.label, sample.number)
            if first:
                part.add_bad(first)
            return
        where = self._tier.store.where
        raise DataError(f"all {count} samples of a window are bad; {first}; run: hrgan data check {where}")


@dataclass(frozen=True)
class _Share:
    """The endless sequence of one rank's chunks: chunk j is global chunk `first + j * world`; `chunks` make a batch."""

    first: int
    world: int
    chunks: int


class _Training(IterableDataset[list[_Item] | DataError]):
    """Worker k of K yields, batch after batch, the rank's chunks j with j % K == k."""

    def __init__(
        self,
        tiers: tuple[_Tier, ...],
        orders: tuple[Order, ...],
        mix: Mix,
        share: _Share,
        shared: _Shared | None,
        together: int,
    ) -> None:
        """together: batches that are handed over at once."""
        self._tiers, self._orders, self._mix, self._share, self._shared = tiers, orders, mix, share, shared
        self._together = together

    def __iter__(self) -> Iterator[list[_Item] | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            items = self._items(worker, workers)
            while True:
                yield list(islice(items, self._together))
        except DataError as error:
            yield error  # as a value: an exception would reach the main process as text with a traceback

    def _items(self, worker: int, workers: int) -> Iterator[_Item]:
        slots: dict[tuple[int, int], _Slot] = {}
        share = self._share
        for number in count():
            start = number * share.chunks
            mine = range(start + (worker - start) % workers, start + share.chunks, workers)
            place = self._shared.place(0, number, share.chunks * CHUNK) if self._shared else None
            rows = [(j - start) * CHUNK + i for j in mine for i in range(CHUNK)]
            part = _Part(self._tiers[0], len(rows), place, rows if place is not None else None)
            for j in mine:
                member, g = self._mix.deal(share.first + j * share.world)
                order = self._orders[member]
                key = member, g % order.num_slots
                if key not in slots:
                    slots[key] = _Slot(self._tiers[member], order)
                slots[key].show(g, part)
            yield part.item()


class _Range(IterableDataset[list[_Item] | DataError]):
    """Worker k of K yields batches i with i % K == k of the stretches of samples in stored order: (set, start, stop),
    with `batch` of them at most from each."""

    def __init__(
        self, tiers: tuple[_Tier, ...], mix: Mix, start: int, stop: int, batch: int, shared: _Shared | None
    ) -> None:
        self._tiers, self._mix, self._start, self._stop, self._batch = tiers, mix, start, stop, batch
        self._shared = shared

    def __iter__(self) -> Iterator[list[_Item] | DataError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        cursors = [_Cursor(tier) for tier in self._tiers]
        try:
            starts = range(self._start + worker * self._batch, self._stop, workers * self._batch)
            for number, at in enumerate(starts):
                stop = min(at + self._batch, self._stop)
                place = self._shared.place(worker, number, stop - at) if self._shared else None
                yield [self._item(cursors, at, stop, place)]
        except DataError as error:
            yield error

    def _item(self, cursors: list[_Cursor], start: int, stop: int, place: Pixels | None) -> _Item:
        part = _Part(self._tiers[0], stop - start, place)
        for member, first, samples in self._stretches(start, stop):
            tier = self._tiers[member]
            for segment in _segments(tier, first, first + samples):
                for sample in cursors[member].read(segment):
                    try:
                        part.add(tier.decode(sample), sample.label, sample.number)
                    except BadSample as error:
                        part.add_bad(f"{error}; left out")
        return part.item()

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(set, its first sample, how many): of a mix a chunk at a time, in its shares."""
        if len(self._tiers) == 1:
            yield 0, start, stop - start
            return
        while start < stop:
            count = min(stop, start // CHUNK * CHUNK + CHUNK) - start
            member, g = self._mix.deal(start // CHUNK)
            yield member, g * CHUNK + start % CHUNK, count
            start += count


def _segments(tier: _Tier, start: int, stop: int) -> Iterator[Segment]:
    firsts, samples = tier.firsts, tier.manifest.shard_samples
    shard = int(np.searchsorted(firsts, start, side="right")) - 1
    while start < stop:
        count = min(stop, firsts[shard] + samples[shard]) - start
        yield Segment(shard, start - firsts[shard], count)
        start, shard = start + count, shard + 1


def _open_tiers(dataset: Dataset, resolution: int) -> tuple[_Tier, ...]:
    classes = {name: number for number, name in enumerate(dataset.classes)}
    tiers: list[_Tier] = []
    before = 0
    for store, manifest in dataset.members:
        tier = manifest.tier_for(resolution)
        if resolution < 1 or tier % resolution:
            raise UserError(f"resolution is {resolution}, expected a power of two")
        samples = manifest.shard_samples
        firsts = tuple(int(x) for x in np.cumsum((0, *samples[:-1])))
        tiers.append(_Tier(store, manifest, tier, tier // resolution, firsts, before, dataset.label, classes))
        before += manifest.num_samples
    dataset.check_tier(resolution)
    return tuple(tiers)


def _as_is(item: Any) -> Any:
    """DataLoader's own conversion would turn the arrays into tensors, each in shared memory."""
    return item


def _ignore_stop_signals(worker: int) -> None:
    """A stop sent to the whole process group (by SLURM, timeout, Ctrl-C) is the training process's to answer, which
    reads on until it has saved; a worker ends when that process does, which torch watches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # The training's own, inherited.


_reading: WeakSet[Generator[list[_Item], None, None]] = WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing would end them with SIGTERM, which they ignore, and wait for ever."""
    for items in list(_reading):
        items.close()


def _items(
    dataset: IterableDataset[list[_Item] | DataError], workers: int, prefetch: int, shared: _Shared | None
) -> Generator[list[_Item], None, None]:
    """What the dataset hands over, worker after worker in turn; a worker's DataError is raised here. The pictures of
    one from shared memory are there until the same worker's next item is taken."""
    items = _read_items(dataset, workers, prefetch, shared)
    _reading.add(items)
    return items


def _read_items(
    dataset: IterableDataset[list[_Item] | DataError], workers: int, prefetch: int, shared: _Shared | None
) -> Generator[list[_Item], None, None]:
    if workers:
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            multiprocessing_context="fork",  # _Shared is inherited.
            collate_fn=_as_is,
            worker_init_fn=_ignore_stop_signals,
        )
        source: Iterator[list[_Item] | DataError] = iter(loader)
    else:
        source = iter(dataset)
    try:
        for taken, group in enumerate(source):
            if isinstance(group, DataError):
                raise group
            if shared is not None:
                # A worker that is done earlier than others leaves the turns to them; only the last item can be short.
                place = shared.place(taken % workers, taken // workers, len(group[0].labels))
                group = [group[0]._replace(images=place)]
            yield group
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
    dataset: Dataset,
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
    fleeting: bool = False,
) -> Iterator[Batch]:
    """This rank's share of each global batch from `nimg` on, without end.

    Global batch b covers the chunks nimg/4 + b*batch/4 onward; rank r takes those whose number g has g % world == r, in
    order. batch: samples over all ranks, a multiple of 4 * world; each Batch has batch / world. nimg: a multiple of 4.
    workers: processes reading and decoding (0: this one); with workers * world a divisor of slots none reads another's
    slots (of one set). prefetch: batches that each worker prepares ahead. pin_memory: the pictures in page-locked
    memory. fleeting: the pictures are gone when the next batch is taken, which saves copying them.

    Raises UserError for wrong arguments, DataError for shards that are not as the manifest says, at once or when
    reached.
    """
    _check_shares(nimg, batch, rank, world)
    tiers = _open_tiers(dataset, resolution)
    orders = tuple(Order(tier.manifest.shard_samples, seed, slots, window) for tier in tiers)
    for tier, order in zip(tiers, orders, strict=True):
        tier.store.check_room(order.num_slots + 2, max(shard.bytes for shard in tier.manifest.tiers[tier.tier]))
    first = nimg // CHUNK
    share = _Share(first + (rank - first) % world, world, batch // CHUNK // world)
    images = share.chunks * CHUNK
    height, width = dataset.form.size(resolution)
    size = images * height * width * dataset.form.channels * dataset.form.bits // 8
    together = min(max(1, TOGETHER // size), MOST_TOGETHER) if workers else 1
    shared = _Shared(tiers[0], images, 1, prefetch, together) if workers else None
    items = _items(_Training(tiers, orders, dataset.mix(seed), share, shared, together), workers, prefetch, None)
    read = _interleaved(items, share.chunks, workers, shared) if shared else _ordered(items)
    if pin_memory:
        return (replace(batch, images=batch.images.pin_memory()) for batch in read)
    return read if fleeting or not shared else (replace(batch, images=batch.images.clone()) for batch in read)


def _interleaved(items: Iterator[list[_Item]], chunks: int, workers: int, shared: _Shared) -> Iterator[Batch]:
    """Batches whose pictures the workers put side by side into a place of `shared`, each its chunks."""
    groups: list[list[_Item]] = []
    for number in count():
        if not groups or not groups[0]:
            groups = [next(items) for _ in range(workers)]
        parts = [group.pop(0) for group in groups]
        labels, samples = np.empty((2, chunks, CHUNK), np.int64)
        for worker, part in enumerate(parts):
            offset = (worker - number * chunks) % workers
            labels[offset::workers] = part.labels.reshape(-1, CHUNK)
            samples[offset::workers] = part.samples.reshape(-1, CHUNK)
        images = torch.from_numpy(shared.place(0, number, chunks * CHUNK)).permute(0, 3, 1, 2)
        bad = tuple(line for part in parts for line in part.bad)
        yield Batch(images, torch.from_numpy(labels.ravel()), torch.from_numpy(samples.ravel()), bad)


def read_range(
    dataset: Dataset, resolution: int, start: int, stop: int, *, batch: int = 64, workers: int = 0
) -> Iterator[Batch]:
    """Samples [start, stop) in stored order (of several sets in their shares), in batches of up to `batch`. A bad
    sample is left out, with a line in the batch's `bad`; DataError for a shard that is not as the manifest says.
    """
    if not 0 <= start <= stop <= dataset.num_samples or batch < 1:
        raise UserError(f"samples {start} to {stop} by {batch}, expected a range within 0 to {dataset.num_samples}")
    tiers = _open_tiers(dataset, resolution)
    shared = _Shared(tiers[0], batch, workers, prefetch=2) if workers else None
    reader = _Range(tiers, dataset.mix(0), start, stop, batch, shared)
    read = _ordered(_items(reader, workers, 2, shared))
    return (replace(batch, images=batch.images.clone()) for batch in read) if workers else read


def stored_numbers(dataset: Dataset, start: int, stop: int) -> torch.Tensor:
    """(stop - start,) int64: the `samples` that read_range gives of this range, where all can be read. Of one set they
    are the range itself."""
    if len(dataset.members) == 1:
        return torch.arange(start, stop)
    firsts = np.cumsum([0, *(member.manifest.num_samples for member in dataset.members)])
    mix, numbers = dataset.mix(0), []
    for place in range(start, stop):
        member, chunk = mix.deal(place // CHUNK)
        numbers.append(int(firsts[member]) + chunk * CHUNK + place % CHUNK)
    return torch.tensor(numbers, dtype=torch.int64)


def _ordered(items: Iterator[list[_Item]]) -> Iterator[Batch]:
    for item in chain.from_iterable(items):
        assert item.images is not None
        images, labels, samples = map(torch.from_numpy, (item.images, item.labels, item.samples))
        yield Batch(images.permute(0, 3, 1, 2), labels, samples, item.bad)
